"""Which differences between models are tested, and how."""

import math
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import numpy as np

from ..evaluation.comparison import image_level_test, paired_difference
from ..evaluation.significance import corrected_resampled_t_test, holm

__all__ = ["ENDPOINTS", "PRIMARY", "Test", "bootstrap_tests", "endpoints_of", "fold_tests"]

# By task.
PRIMARY = {"lesions": "segm/AP50_voc", "recognition": "recognition/balanced_accuracy"}
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


def endpoints_of(task, classes=(), cancer_classes=()):
    """
    Args:
        task (str): "lesions" or "recognition".
        classes (list[str]), cancer_classes (list[str]): of a recognition data set.

    Returns:
        tuple[str, ...]: what is tested, group/figure.
    """
    if task == "lesions":
        return ENDPOINTS
    return (
        *("recognition/balanced_accuracy", "recognition/top1", "recognition/auroc"),
        *(f"recognition/accuracy_{name}" for name in classes),
        # Of a single cancer class sensitivity is its accuracy: no reason to test it twice.
        *(["cancer/recall"] if len(cancer_classes) > 1 else []),
        *("cancer/specificity", "cancer/auroc"),
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


def _pairs(labels, baseline):
    """The pairs to compare: the later one given is the first, being the newer model."""
    if baseline is None or baseline not in labels:
        return [(b, a) for a, b in combinations(labels, 2)]
    return [(label, baseline) for label in labels if label != baseline]


def _endpoints(primary, endpoints, has):
    """The primary endpoint and those of ``endpoints`` for which ``has(group, figure)``."""
    chosen = dict.fromkeys([primary, *endpoints])
    return [endpoint for endpoint in chosen if has(*endpoint.split("/", 1))]


def bootstrap_tests(split, models, primary, baseline, endpoints=ENDPOINTS):
    """
    Paired bootstrap of the endpoints, and McNemar's test at image level, for each pair of models.

    Args:
        split (dict[str, list[Run]]): the runs by label.
        models (dict[str, ModelFigures]): their figures.
        primary (str): the primary endpoint, group/figure.
        baseline (str or None): as for :func:`imrcnn_d2.report.compare.compare`.
        endpoints (tuple[str, ...]): see :func:`endpoints_of`.

    Returns:
        list[Test]:
    """
    tests = []
    for first, second in _pairs(list(models), baseline):
        pair = models[first], models[second]

        def has(group, figure, pair=pair):
            return all(
                figure in model.resampled.get(group, ())
                and not math.isnan(model.figures[group][figure])
                for model in pair
            )

        for endpoint in _endpoints(primary, endpoints, has):
            difference = paired_difference(*pair, *endpoint.split("/", 1))
            tests.append(_test(first, second, endpoint, difference, "paired bootstrap", primary))
        results = [[run.results for run in split[label]] for label in (first, second)]
        for prefix in ("", "tau_val."):
            outcome = image_level_test(*results, tau_val=bool(prefix))
            if outcome is not None:
                recognised = "recognition" in pair[0].figures
                endpoint = "recognition/top1" if recognised else f"{prefix}image/accuracy"
                difference = paired_difference(*pair, *endpoint.split("/", 1))
                name = f"McNemar's exact, {outcome.only_first} : {outcome.only_second}"
                test = _test(first, second, endpoint, difference, name, primary)
                tests.append(replace(test, p=outcome.p))
    return _adjusted(tests)


def fold_tests(folds, n_train, n_test, primary, baseline, endpoints=ENDPOINTS):
    """
    Corrected resampled t-test of the endpoints for each pair of models.

    Args:
        folds (dict[str, list[ModelFigures]]): by label, a fold each.
        n_train, n_test (float): images of a fold for training and for testing.
        primary (str), baseline (str or None), endpoints (tuple[str, ...]): as for
            :func:`bootstrap_tests`.

    Returns:
        list[Test]: of the endpoints that are defined in every fold.
    """
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

        for endpoint in _endpoints(primary, endpoints, has):
            one, two = of_folds(*endpoint.split("/", 1))
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
