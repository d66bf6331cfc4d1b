"""The numbers of a comparison: every model's figures, and which of them differ."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from ..evaluation.comparison import ModelFigures, check_same_units, model_figures
from ..evaluation.recognition import check_same_images
from .compare_differences import PRIMARY, bootstrap_tests, endpoints_of, fold_tests
from .compare_runs import Gathered, training_images

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """
    Attributes:
        gathered (Gathered): the runs.
        models (dict[str, ModelFigures]): on one split, by label; empty without such runs.
        folds (dict[str, list[ModelFigures]]): of a cross-validation, a fold each.
        tests (list[Test]), fold_tests (list[Test]): the differences.
        n_train, n_test (float or None): images that a fold's models were trained on (without those
            for validation) and tested on, means over the folds.
        primary (str): the primary endpoint, group/figure.
        settings (dict): thresholds, and how was resampled.
        remarks (list[str]): what a reader must know.
    """

    gathered: Gathered
    models: dict[str, ModelFigures]
    folds: dict[str, list[ModelFigures]]
    tests: list
    fold_tests: list
    n_train: float | None
    n_test: float | None
    primary: str
    settings: dict
    remarks: list

    @property
    def runs(self):
        """list[tuple[str, Run]]: label and run, of all runs."""
        split = [(label, run) for label, runs in self.gathered.split.items() for run in runs]
        return split + [
            (label, run)
            for label, folds in self.gathered.folds.items()
            for runs in folds
            for run in runs
        ]

    @property
    def dataset(self):
        """str or None: the name of the (first) test set."""
        return self.runs[0][1].dataset

    @property
    def task(self):
        """str: "lesions" or "recognition"."""
        return self.runs[0][1].task

    @property
    def clustered(self):
        """bool: some patient has several images."""
        measures = next(iter(self.models.values())).measures
        return measures.unit == "patient" and measures.num_units < len(measures.unit_of_image)


def compare(gathered, bootstrap, *, primary=None, baseline=None):
    """
    Score all runs again, resample and test.

    Args:
        gathered (Gathered):
        bootstrap (Bootstrap):
        primary (str or None): the primary endpoint, group/figure; None for that of PRIMARY.
        baseline (str or None): label of the model that all others are compared with; None for all
            pairs.

    Returns:
        Comparison:

    Raises:
        ValueError: test sets that differ, an endpoint or a baseline that there is not.
    """
    labels = list(dict.fromkeys([*gathered.split, *gathered.folds]))
    if baseline is not None and baseline not in labels:
        raise ValueError(f"There is no model {baseline!r} among {', '.join(labels)}.")
    runs = [run for seeds in gathered.split.values() for run in seeds]
    every = runs + [run for own in gathered.folds.values() for seeds in own for run in seeds]
    task, meta = every[0].task, every[0].results.meta
    check = check_same_units if task == "lesions" else check_same_images
    for run in tqdm(runs, desc="Scoring", delay=2):
        check(runs[0].results, run.results, (str(runs[0].folder), str(run.folder)))
    models = {
        label: model_figures([run.results for run in seeds], bootstrap)
        for label, seeds in gathered.split.items()
    }
    folds = {
        label: [
            model_figures([run.results for run in seeds])
            for seeds in tqdm(own, desc=f"Folds of {label}", delay=2)
        ]
        for label, own in gathered.folds.items()
    }
    endpoints = endpoints_of(task, meta["classes"], meta.get("cancer_classes", ()))
    primary = primary or PRIMARY[task]
    _check_primary(primary, models, folds, endpoints)
    n_train, n_test = _sizes(gathered.folds)
    about = ("tau", "iou_threshold", "iou_type", "classes", "cancer_classes")
    settings = {key: meta[key] for key in about if key in meta}
    settings.update(asdict(bootstrap), primary=primary, baseline=baseline)
    if models:
        settings["unit"] = next(iter(models.values())).measures.unit
    return Comparison(
        gathered=gathered,
        models=models,
        folds=folds,
        tests=bootstrap_tests(gathered.split, models, primary, baseline, endpoints),
        fold_tests=(
            fold_tests(folds, n_train, n_test, primary, baseline, endpoints) if n_train else []
        ),
        n_train=n_train,
        n_test=n_test,
        primary=primary,
        settings=settings,
        remarks=[
            *gathered.remarks,
            *(remark for run in every for remark in run.remarks),
            *(_gaps(models, folds, primary) if task == "lesions" else []),
            *_unknown(every, bool(folds) and n_train is None),
        ],
    )


def _check_primary(primary, models, folds, endpoints):
    group, _, figure = primary.partition("/")
    available = [model.resampled for model in models.values()]
    available += [one.figures for own in folds.values() for one in own]
    if all(figure in figures.get(group, ()) for figures in available):
        return
    raise ValueError(
        f"The primary endpoint {primary!r} is not among the figures that are resampled. Give "
        f"GROUP/FIGURE as metrics.json has them, such as {', '.join(endpoints)}; COCO's AP, AP75, "
        "APs, APm and APl need --ci-all."
    )


def _sizes(folds):
    """Images that a fold's models were trained on, and tested on: means over the folds."""
    if not folds:
        return None, None
    runs = [seeds[0] for seeds in next(iter(folds.values()))]
    n_train = [training_images(run) for run in runs]
    n_test = float(np.mean([run.results.meta["images"] for run in runs]))
    return (None if None in n_train else float(np.mean(n_train))), n_test


def _gaps(models, folds, primary):
    """[remarks on models that lack what is to be tested, or what others have]."""
    group, _, figure = primary.partition("/")
    every = [*((label, [model]) for label, model in models.items()), *folds.items()]
    undefined = [k for k, own in every if any(math.isnan(m.figures[group][figure]) for m in own)]
    without_point = [k for k, own in every if any(None in m.taus for m in own)]
    remarks = []
    if undefined:
        remarks.append(
            f"The primary endpoint {primary} is undefined for {_listed(undefined)}: choose "
            "--primary bbox/AP50_voc where there are boxes only, or lesion/iou without scores."
        )
    if without_point:
        remarks.append(
            f"No operating point of its own (tau_val): {_listed(without_point)}. Evaluate again "
            "with tools/train_net.py --eval-only, or with tools/evaluate.py --tau-from."
        )
    return remarks


def _listed(labels):
    return ", ".join(dict.fromkeys(labels))


def _unknown(runs, sizes):
    """[remarks on what no file tells]; ``sizes``: those of the folds' training sets are missing."""
    remarks = []
    old = [str(run.run_folder or run.folder) for run in runs if run.run is None]
    if old:
        remarks.append(
            f"Without run.json, so of unknown model, seed and fold: {', '.join(old)}. They go by "
            "the name given (NAME=PATH) or the folder's."
        )
    if sizes:
        remarks.append(
            "How many images the folds' models were trained on is not known (no run.json, no "
            "train.json beside the test set): the differences over folds are not tested."
        )
    return remarks
