"""Cross-validation: every model x data set x seed x fold is trained and evaluated, by Hydra.

    imrcnn cross-validate model=mrcnn_lite,imrcnn_lite dataset=kvasir_seg folds=5 seed=0,1
    imrcnn cross-validate model=imrcnn_lite dataset=datasets/hospitals folds=centre

With folds=centre each fold tests one centre, with a model that was trained, chosen and given its
threshold on the others; a page as of imrcnn validate says how well, by centre.

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
# Hydra's options with which it starts nothing.
_SHOWING = {
    *("--cfg", "-c", "--info", "-i", "--version", "--hydra-help"),
    *("--shell-completion", "-sc"),
}
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
    if _SHOWING & {argument.partition("=")[0] for argument in sys.argv[1:]}:
        return application(train)()
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
    """The runs of the command line, to which it adds all folds where it names none."""
    from imrcnn_d2.engine.cross_validation import FoldRun, data_set_folder, number_of_folds

    if not any(argument.startswith("fold=") for argument in sys.argv):
        counts = {}
        for cfg in planned_configs("fold=0"):
            folder = data_set_folder(cfg.datasets, str(cfg.dataset))
            counts[number_of_folds(cfg.folds, folder)] = f"{folder} by folds={cfg.folds}"
        if len(counts) > 1:
            numbers = ", ".join(f"{count} of {name}" for count, name in counts.items())
            raise ValueError(f"The numbers of folds differ ({numbers}): start one sweep for each.")
        sys.argv.append(f"fold=range(0,{next(iter(counts))})")
    runs = [FoldRun.from_config(cfg) for cfg in planned_configs()]
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise ValueError(f"Two runs would share the folder {name}: give each its output=.")
    return runs


def planned_configs(*more):
    """The configs of the command line's runs, by Hydra's own sweep, which here only collects them;
    `more` are further overrides."""
    configs, argv = [], sys.argv

    def collect(cfg):  # Hydra looks at the file of a function
        configs.append(cfg)

    overrides = [a for a in argv if not a.startswith(("hydra.launcher", "hydra/launcher"))]
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            quiet += [f"hydra.sweep.dir={scratch}", "hydra/launcher=basic"]
            sys.argv = [*overrides, *more, *quiet]
            application(collect)()
    finally:
        sys.argv = argv
    return configs


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
    for page in write_left_out(runs):
        print(f"\nBy {page.parent.name}, each by the model that had not seen it:\n{page}")
    return 0 if complete else 1


def write_left_out(runs):
    """The page of each model and seed whose runs left out each value of a field once, all finished:
    every value is evaluated at the threshold that its own model has stored."""
    from imrcnn_d2.engine.cross_validation import number_of_folds
    from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
    from imrcnn_d2.evaluation.output import RESULTS, read_metrics
    from imrcnn_d2.report.validation import Validation, write_validation
    from imrcnn_d2.task import Task

    logging.getLogger("detectron2").setLevel(logging.WARNING)  # COCO's lines, one page a centre
    by_model = {}
    for run in runs:
        if run.left_out is not None and run.state() == "finished":
            by_model.setdefault(run.folder.parent, []).append(run)
    pages = []
    for folder, folds in by_model.items():
        field, data = folds[0].folds, folds[0].datasets / folds[0].dataset
        records = [read_metrics(run.metrics_file) for run in folds]
        localises = Task.named(records[0]["meta"].get("task")).localises
        if len(folds) < number_of_folds(field, data) or not localises:
            continue
        results, thresholds = {}, []
        for run, recorded in zip(folds, records, strict=True):
            tau = (recorded.get("tau_val") or recorded["meta"])["tau"]
            gt = run.fold_root / "annotations" / "test.json"
            detections = run.metrics_file.with_name(RESULTS)
            results[run.left_out] = evaluate_lesions(gt, detections, tau=tau, bootstrap=Bootstrap())
            thresholds.append(f"{run.left_out} {tau:.3g}")
        validation = Validation.of(
            results,
            title=f"Leave-one-{field}-out: {folds[0].config_file.stem} on {data.name}",
            facts={
                "Weights": f"one training per {field}, on all others: {folder}",
                "Threshold": f"stored in the weights of each: {', '.join(thresholds)}",
                "Data": str(data),
            },
        )
        page, *_ = write_validation(validation, folder / field, image_root=data / "images")
        pages.append(page)
    return pages
