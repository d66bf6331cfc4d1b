"""The command `imrcnn`: `imrcnn COMMAND …` runs `main` of imrcnn_d2/cli/COMMAND.py.

This module lies next to the package, whose import takes longer than that of torch: `imrcnn --help`
needs neither, and `imrcnn install-detectron2` runs where Detectron2 is missing.
"""

import importlib
import os
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

COMMANDS = {
    "prepare-dataset": "check images and annotations, split them, write a data set",
    "audit-dataset": "look for bad files, wrong annotations, duplicates and leakage",
    "export-annotations": "write annotations for LabelMe or CVAT, or as masks",
    "plan": "write a config for a data set and this machine, with the reasons",
    "train": "train or evaluate a model",
    "cross-validate": "train every model x data set x seed x fold",
    "evaluate": "score COCO results or a folder of masks, without a model",
    "validate": "score a model on data of other hospitals, by centre",
    "alarm-rule": "choose when detections in a video are an alarm",
    "robustness": "score a model on blurred, badly lit and compressed images",
    "compare": "compare models: tables, tests, precision-recall curves",
    "report": "write one HTML page about a run, or about several",
    "agreement": "measure how far annotators agree",
    "annotation-suspects": "rank annotations that cross-validated models contradict",
    "predict": "find lesions in images, videos and DICOM files",
    "export": "write a model as one file, for PyTorch, ONNX Runtime or OpenVINO",
    "demo-app": "try a model on a web page",
    "demo": "synthetic images, training, evaluation and report in one go",
    "install-detectron2": "install Detectron2, without a compiler",
}


def main(argv: list[str] | None = None) -> int | str | None:
    """Run a command, its name written with hyphens or underscores; returns the exit status."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(_usage())
        return None
    if command == "--version":
        print(f"imrcnn-d2 {version('imrcnn-d2')}")
        return None
    name = command.replace("_", "-")
    if name not in COMMANDS:
        return f"imrcnn: there is no command {command!r}\n\n{_usage()}"
    sys.argv = [f"imrcnn {name}", *arguments]  # by which the command calls itself
    module = name.replace("-", "_")
    _quiet_libraries()
    if name == "install-detectron2":  # as a file: the package cannot be imported yet
        (package,) = find_spec("imrcnn_d2").submodule_search_locations
        spec = spec_from_file_location(module, Path(package, "cli", f"{module}.py"))
        installer = module_from_spec(spec)
        spec.loader.exec_module(installer)
        return installer.main()
    if find_spec("detectron2") is None:
        return "imrcnn: Detectron2 is missing: run `imrcnn install-detectron2`"
    return importlib.import_module(f"imrcnn_d2.cli.{module}").main()


def _quiet_libraries() -> None:
    """Keep what libraries tell developers off a user's screen, here and in the processes that a
    command starts: warnings, unless -W or PYTHONWARNINGS ask for some, torch's log, and in a log
    file the bars of downloads. Only a command does so, not the import of the package.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ["PYTHONWARNINGS"] = "ignore"
    os.environ.setdefault("TORCH_LOGS", "-all")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "60")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    hint = "imrcnn COMMAND --help lists its options"
    return "\n".join(["usage: imrcnn COMMAND … | --version", "", *lines, "", hint])


if __name__ == "__main__":
    sys.exit(main())
