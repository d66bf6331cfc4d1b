"""The numbers of a comparison: every model's figures, and which of them differ."""

import logging
import math
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import numpy as np
from tqdm import tqdm

from ..evaluation.comparison import (
    ModelFigures,
    check_same_units,
    image_level_test,
    model_figures,
    paired_difference,
)
from ..evaluation.significance import corrected_resampled_t_test, holm
from .compare_runs import Gathered, training_images

__all__ = ["ENDPOINTS", "Comparison", "Test", "compare"]

logger = logging.getLogger(__name__)

PRIMARY = "segm/AP50_voc"
# What is tested, fixed before any figure is seen: the more tests, the weaker each. As
# group/figure; those that a comparison does not have are left out.
ENDPOINTS = (
    "segm/AP50_voc",
    "bbox/AP50_voc",
    "segm/AP",
    "bbox/AP",
    "lesion/iou",
    "lesion/iou_box",
    "lesion/precision",
    "lesion/recall",
    "lesion/f1",
    "tau_val.lesion/precision",
    "tau_val.lesion/recall",
    "tau_val.lesion/f1",
    "image/recall",
    "image/specificity",
    "image/auroc",
    "image/miou",
    "patient/recall",
    "patient/specificity",
    "patient/auroc",
)


@dataclass(frozen=True)
class Test:
    """
    One difference between two models.

    Attributes:
        first, second (str): labels of the models.
        endpoint (str): group/figure.
        estimate, low, high (float): first minus second, with its 95 % interval.
        p (float): two-sided.
        p_holm (float): adjusted by Holm's method; NaN for the primary endpoint.
        primary (bool): the one endpoint that is not adjusted.
        test (str): its name.
        undefined_share (float): of the resamples, left out.
    """

    first: str
    second: str
    endpoint: str
    estimate: float
    low: float
    high: float
    p: float
    p_holm: float
    primary: bool
    test: str
    undefined_share: float


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
    def clustered(self):
        """bool: some patient has several images."""
        measures = next(iter(self.models.values())).measures
        return measures.unit == "patient" and measures.num_units < len(measures.unit_of_image)


def compare(gathered, bootstrap, *, primary=PRIMARY, baseline=None):
    """
    Score all runs again, resample and test.

    Args:
        gathered (Gathered):
        bootstrap (Bootstrap):
        primary (str): the primary endpoint, group/figure.
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
    for run in tqdm(runs, desc="Scoring", delay=2):
        check_same_units(runs[0].results, run.results, (str(runs[0].folder), str(run.folder)))
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
    available = [model.resampled for model in models.values()]
    available += [one.figures for own in folds.values() for one in own]
    group, _, figure = primary.partition("/")
    if not all(figure in figures.get(group, ()) for figures in available):
        known = dict.fromkeys(
            f"{g}/{f}" for figures in available for g in figures for f in figures[g]
        )
        raise ValueError(
            f"The primary endpoint {primary!r} is not among the figures that are resampled: "
            f"{', '.join(known)}. COCO's AP, AP75, APs, APm and APl are with --ci-all."
        )
    n_train, n_test = _sizes(gathered.folds)
    meta = (runs or [next(iter(gathered.folds.values()))[0][0]])[0].results.meta
    settings = {key: meta[key] for key in ("tau", "iou_threshold", "iou_type", "classes")}
    settings.update(asdict(bootstrap), primary=primary, baseline=baseline)
    if models:
        settings["unit"] = next(iter(models.values())).measures.unit
    every = runs + [run for own in gathered.folds.values() for seeds in own for run in seeds]
    remarks = [*gathered.remarks, *(remark for run in every for remark in _stale(run))]
    return Comparison(
        gathered,
        models,
        folds,
        _bootstrap_tests(gathered.split, models, primary, baseline),
        _fold_tests(folds, n_train, n_test, primary, baseline) if n_train else [],
        n_train,
        n_test,
        primary,
        settings,
        remarks,
    )


def _pairs(labels, baseline):
    """The pairs to compare: the later one given is the first, being the newer model."""
    if baseline is None or baseline not in labels:
        return [(b, a) for a, b in combinations(labels, 2)]
    return [(label, baseline) for label in labels if label != baseline]


def _endpoints(primary, has):
    """The primary endpoint and those of ENDPOINTS for which ``has(group, figure)``."""
    chosen = dict.fromkeys([primary, *ENDPOINTS])
    return [endpoint for endpoint in chosen if has(*endpoint.split("/"))]


def _bootstrap_tests(split, models, primary, baseline):
    tests = []
    for first, second in _pairs(list(models), baseline):
        pair = models[first], models[second]

        def has(group, figure, pair=pair):
            return all(
                figure in model.resampled.get(group, ())
                and not math.isnan(model.figures[group][figure])
                for model in pair
            )

        for endpoint in _endpoints(primary, has):
            difference = paired_difference(*pair, *endpoint.split("/"))
            tests.append(_test(first, second, endpoint, difference, "paired bootstrap", primary))
        results = [[run.results for run in split[label]] for label in (first, second)]
        for prefix in ("", "tau_val."):
            outcome = image_level_test(*results, tau_val=bool(prefix))
            if outcome is not None:
                endpoint = f"{prefix}image/accuracy"
                difference = paired_difference(*pair, *endpoint.split("/"))
                name = f"McNemar's exact, {outcome.only_first} : {outcome.only_second}"
                test = _test(first, second, endpoint, difference, name, primary)
                tests.append(replace(test, p=outcome.p))
    return _adjusted(tests)


def _fold_tests(folds, n_train, n_test, primary, baseline):
    tests = []
    for first, second in _pairs(list(folds), baseline):

        def of_folds(group, figure, pair=(first, second)):
            """(2, k) figures of the two models; NaN where a fold has none."""
            return np.array(
                [
                    [one.figures.get(group, {}).get(figure, np.nan) for one in folds[label]]
                    for label in pair
                ]
            )

        def has(group, figure, of_folds=of_folds):
            return np.isfinite(of_folds(group, figure)).all()

        for endpoint in _endpoints(primary, has):
            one, two = of_folds(*endpoint.split("/"))
            difference = corrected_resampled_t_test(one - two, n_train, n_test)
            name = "corrected resampled t-test"
            tests.append(_test(first, second, endpoint, difference, name, primary))
    return _adjusted(tests)


def _test(first, second, endpoint, difference, name, primary):
    return Test(
        first=first,
        second=second,
        endpoint=endpoint,
        **asdict(difference),
        p_holm=math.nan,
        primary=endpoint == primary,
        test=name,
    )


def _adjusted(tests):
    """All but those of the primary endpoint are one family of tests."""
    family = [test for test in tests if not test.primary]
    adjusted = iter(holm([test.p for test in family]))
    return [test if test.primary else replace(test, p_holm=float(next(adjusted))) for test in tests]


def _sizes(folds):
    """Images that a fold's models were trained on, and tested on: means over the folds."""
    if not folds:
        return None, None
    runs = [seeds[0] for seeds in next(iter(folds.values()))]
    n_train = [training_images(run) for run in runs]
    n_test = float(np.mean([run.results.meta["images"] for run in runs]))
    return (None if None in n_train else float(np.mean(n_train))), n_test


def _stale(run):
    """[a remark] where metrics.json holds other figures than its detections give."""
    figures = run.results.groups()
    differing = [
        f"{group}/{name}"
        for group in figures
        for name, value in (run.metrics.get(group) or {}).items()
        if name in figures[group]
        and not math.isclose(
            figures[group][name], math.nan if value is None else value, abs_tol=1e-6
        )
        and not (value is None and math.isnan(figures[group][name]))
    ]
    if not differing:
        return []
    remark = (
        f"{run.folder / 'metrics.json'} holds other figures than its detections give now "
        f"({', '.join(differing)}): those here were scored again; evaluate it again to renew it."
    )
    logger.warning(remark)
    return [remark]
