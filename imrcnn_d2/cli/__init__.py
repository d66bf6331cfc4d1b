"""The commands of `imrcnn`: one module each, with `argument_parser()` and `main(argv=None)`.

What takes long to import is imported where it is used, so that `--help` is quick.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from imrcnn_d2.utils.files import for_terminal

__all__ = ["new_parser", "one_line_errors", "predictor_arguments"]


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
        parser.exit(1, f"{parser.prog}: this needs {error.name}: pip install -e '.[{extra}]'\n")


def predictor_arguments() -> argparse.ArgumentParser:
    """The options of every command that predicts, for `parents`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--config-file",
        type=Path,
        help="what the weights were trained with; not needed for files of `imrcnn export`, nor "
        "where training left its config.yaml next to them",
    )
    parser.add_argument(
        "--runtime",
        type=_runtime,
        metavar="NAME",
        help="what runs the network: torch, torch-bf16, or onnxruntime or openvino, which an "
        "exported file is for; auto takes the fastest on this machine",
    )
    parser.add_argument(
        "--crop-view",
        action="store_true",
        help="show the network the endoscope's view only, without banners and insets, as in data "
        "prepared with --deidentify; results refer to the whole frame",
    )
    return parser


def _runtime(name: str) -> str:
    from imrcnn_d2.deploy.runtimes import RUNTIMES

    if name not in (known := (*RUNTIMES, "auto")):
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return name
