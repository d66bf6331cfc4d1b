"""The commands of `imrcnn`: one module each, with `argument_parser()` and `main(argv=None)`.

What takes long to import is imported where it is used, so that `--help` is quick.
"""

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from imrcnn_d2.utils.files import for_terminal, install_extra

__all__ = [
    "WEIGHTS_HELP",
    "add_crop_view",
    "add_tau",
    "new_parser",
    "one_line_errors",
    "output_file",
    "output_folder",
    "predictor_arguments",
    "refuse_options",
]

WEIGHTS_HELP = (
    "file, URL, hf://USER/REPO in the Hugging Face Hub, or demo: those that come with the package"
)


def new_parser(description: str, **options) -> argparse.ArgumentParser:
    """A parser that prints a module's docstring as it is."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=form, **options)


@contextlib.contextmanager
def one_line_errors(parser: argparse.ArgumentParser, extra: str = "") -> Iterator[None]:
    """End with status 1 and one line where a file or value is refused, or an extra is missing."""
    try:
        yield
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {for_terminal(error)}\n")
    except ModuleNotFoundError as error:
        if not extra:
            raise
        parser.exit(1, f"{parser.prog}: this needs {error.name}: {install_extra(extra)}\n")


def add_tau(parser: argparse.ArgumentParser, *, help: str, default: float | None = None) -> None:
    """Add the score threshold, ``tau``, under both of its names."""
    parser.add_argument("--tau", "--score-threshold", type=float, default=default, help=help)


def add_crop_view(parser: argparse.ArgumentParser) -> None:
    """Add --crop-view and --no-crop-view, None if neither is given."""
    parser.add_argument(
        "--crop-view",
        action=argparse.BooleanOptionalAction,
        help="show the network the endoscope's view only, without the writing next to it and with "
        "what lies over it blanked, or the whole frame (as the weights were trained, by "
        "INPUT.CROP_TO_VIEW); results are of the whole frame",
    )


def refuse_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str], reason: str
) -> None:
    """End with an error that names an option, of these names in `args`, whose value is not its
    default, and the reason."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} {reason}")


def output_file(text: str) -> Path:
    """The path of a file to write, for `type` of an argument: no folder, nor in a file."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name the file to write in it")
    return output_folder(path.parent) / path.name


def output_folder(text: str | Path) -> Path:
    """The path of a folder to write to, for `type` of an argument."""
    path = Path(text)
    if file := next((p for p in (path, *path.parents) if p.is_file()), None):
        raise argparse.ArgumentTypeError(f"{file} is a file: name a folder")
    return path


def predictor_arguments() -> argparse.ArgumentParser:
    """The options of every command that predicts, for `parents`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--config-file",
        type=Path,
        help="what the weights were trained with; not needed for files of `imrcnn train` and "
        "`imrcnn export`, which have it in them, nor where a config.yaml is next to the weights",
    )
    parser.add_argument(
        "--runtime",
        type=_runtime,
        metavar="NAME",
        help="what runs the network: torch, torch-bf16, or onnxruntime or openvino, which an "
        "exported file is for; auto takes the fastest on this machine",
    )
    add_crop_view(parser)
    return parser


def _runtime(name: str) -> str:
    from imrcnn_d2.deploy.runtimes import RUNTIMES

    if name not in (known := (*RUNTIMES, "auto")):
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return name
