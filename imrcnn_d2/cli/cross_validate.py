"""Cross-validation: every model x data set x seed x fold is trained and evaluated, by Hydra.

    imrcnn cross-validate model=mrcnn_lite,imrcnn_lite dataset=kvasir_seg folds=5 seed=0,1

The folds are made once, next to the prepared data set, and are the same for all models. A run that
breaks is listed and the others go on; the same command again resumes what was interrupted and skips
what is finished. On SIGTERM or Ctrl-C the current training is saved, and the exit code is 75. Ends
with a table and the command that compares the models.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import resources

import hydra
from omegaconf import DictConfig

from imrcnn_d2.cli import new_parser
from imrcnn_d2.utils.files import check_no_way_out

WAIT_SECONDS = 5
_FOLDER = resources.files("imrcnn_d2") / "configs" / "cross_validation"


def argument_parser() -> argparse.ArgumentParser:
    """Of the help alone: Hydra reads the command line."""
    options = (_FOLDER / "sweep.yaml").read_text(encoding="utf-8").partition("\nhydra:")[0]
    parser = new_parser(__doc__, usage="imrcnn cross-validate [KEY=VALUE …]", epilog=options)
    parser.add_argument("--cfg", metavar="job", help="print the config, and end")
    parser.add_argument("--hydra-help", action="store_true", help="list Hydra's other options")
    return parser


def main(argv: list[str] | None = None) -> int | str | None:
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]  # where Hydra reads them
    if {"-h", "--help"} & {*sys.argv[1:]}:
        argument_parser().print_help()
        return None
    if any(a.startswith("-") and a not in ("-m", "--multirun") for a in sys.argv[1:]):
        return application(train)()  # --cfg job and the like start nothing
    from imrcnn_d2.engine.hooks import interruptible

    with interruptible():
        return _cross_validate()


def application(action: Callable[[DictConfig], None]):
    """A Hydra application that takes its overrides from the command line."""
    return hydra.main(version_base="1.3", config_path=str(_FOLDER), config_name="sweep")(action)


def train(cfg):
    from imrcnn_d2.engine.cross_validation import FoldRun

    FoldRun.from_config(cfg).train()


def planned_runs():
    """The runs of the command line: Hydra's own sweep, which here only collects the configs."""
    from imrcnn_d2.engine.cross_validation import FoldRun

    configs, argv = [], sys.argv

    def collect(cfg):  # Hydra looks at the file of a function
        configs.append(cfg)

    overrides = [a for a in argv if not a.startswith(("hydra.launcher", "hydra/launcher"))]
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            sys.argv = [*overrides, *quiet, f"hydra.sweep.dir={scratch}", "hydra/launcher=basic"]
            application(collect)()
    finally:
        sys.argv = argv
    runs = [FoldRun.from_config(cfg) for cfg in configs]
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise ValueError(f"Two runs would share the folder {name}: give each its output=.")
    return runs


def _cross_validate():
    from imrcnn_d2.engine.cross_validation import describe_runs, prepare_folds
    from imrcnn_d2.engine.hooks import Interrupted

    try:
        runs = planned_runs()
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for output in {run.output for run in runs}:
            check_no_way_out(output)
        prepare_folds(runs)
    except (OSError, ValueError) as error:
        return str(error)
    try:
        application(train)()
    except Interrupted:
        raise
    except SystemExit:
        # A launcher gives up on all jobs when one of them was killed; the others still run.
        logging.getLogger(__name__).error("The launcher gave up; waiting for what still runs.")
        while any(run.state() == "running" for run in runs):
            time.sleep(WAIT_SECONDS)
    text, complete = describe_runs(runs)
    print(f"\n{text}")
    return 0 if complete else 1
