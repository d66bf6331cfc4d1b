"""What a comparison has shown, and what it has not, in words."""

import math
from collections.abc import Iterator

from imrcnn_d2.evaluation.detection.metrics import METRICS, is_percent
from imrcnn_d2.report.comparison.models import Comparison, Test, of_primary
from imrcnn_d2.report.names import metric_name
from imrcnn_d2.report.tables import format_value, p_text


def findings(comparison: Comparison) -> list[str]:
    """A paragraph on each pair of models by the primary endpoint, on the same images and over the
    folds, the primary comparison first."""
    paragraphs = {}
    for tests, over in ((comparison.tests, ""), (comparison.fold_tests, _folds(comparison))):
        for test in of_primary(tests, comparison.primary):
            pair = test.first, test.second
            margin = [t for t in tests if t.shows != "difference" and (t.first, t.second) == pair]
            paragraphs[" ".join(_of_pair(test, margin, over, comparison))] = test.primary
    return sorted(paragraphs, key=paragraphs.get, reverse=True)


def family_text(comparison: Comparison) -> str:
    """Which p-values are adjusted, and for how many tests."""
    number, pair = comparison.family, comparison.settings["pair"]
    name = f"{' − '.join(pair or ())}, {metric_name(comparison.primary)}"
    if any(test.primary for test in (*comparison.tests, *comparison.fold_tests)):
        return (
            f"Primary comparison: {name}. Its p-value is not adjusted, which is right only if it "
            f"was chosen before any result was seen; the other {number} p-values are adjusted "
            "together by Holm’s method."
        )
    reason = "of several pairs of models none was named as the primary one"
    if pair is not None:
        reason = f"the primary comparison, {name}, cannot be tested"
    return f"All {number} p-values are adjusted together by Holm’s method: {reason}."


def difference_text(test: Test) -> str:
    """The difference with its interval."""
    decimals = 1 if is_percent(test.endpoint.partition("/")[2]) else 2
    return format_value("", test.estimate, (test.low, test.high), decimals)


def unit_text(endpoint: str) -> str:
    """The unit of a difference of "group/metric"."""
    name = endpoint.partition("/")[2]
    return "points" if is_percent(name) else METRICS[name].unit


def _folds(comparison):
    """The number of folds in words; empty without folds."""
    folds = next(iter(comparison.folds.values()), ())
    seeds = comparison.seeds_of_folds
    each = f" with {seeds} seeds each" if seeds else " with several seeds"
    return f"over {len(folds)} folds{'' if seeds == 1 else each}" if folds else ""


def _of_pair(test: Test, margin: list[Test], over: str, comparison: Comparison) -> Iterator[str]:
    """Sentences on one pair; ``over`` is the number of folds in words, empty without folds."""
    unit, number = unit_text(test.endpoint), comparison.family
    name = f"{test.first} − {test.second}, {metric_name(test.endpoint)}, {over or _runs(test)}"
    value = difference_text(test)
    yield f"{name}: {value} {unit}, {_p(test)}."
    if math.isnan(test.p):
        yield "This cannot be tested: nothing is known of how it would vary."
    elif math.isnan(test.se):
        yield "No difference was shown; as the two agree throughout, its error is not known."
    elif test.judged_p < 0.05:
        higher = test.first if test.estimate > 0 else test.second
        yield f"A difference was shown: the value of {higher} is higher."
    elif test.p < 0.05:
        yield (
            "No difference was shown: p is below 0.05 by itself, but not after the adjustment for "
            f"{number} tests."
        )
    else:
        limits = value.partition(" ")[2].strip("[]").replace(", ", " to ")
        compatible = f"differences from {limits} {unit} are compatible with the data"
        yield f"No difference was shown; {compatible}."
    if margin:
        whose = {"non-inferiority": f" of {test.first}"}
        outcomes = (
            f"{other.shows}{whose.get(other.shows, '')} was "
            f"{'' if other.judged_p < 0.05 else 'not '}shown ({_p(other)})"
            for other in margin
        )
        limit = f"{comparison.settings['margin']:g} {unit}"
        yield f"With a margin of {limit}: {' and '.join(outcomes)}."
    if over:
        return
    if test.of_checkpoints:
        yield (
            "With one run of each, this is about these two checkpoints, not these two methods: "
            "other trainings of the same methods would differ too."
        )
    elif min(test.runs) == 1:
        single, other = test.first, test.second
        if test.runs[1] == 1:
            single, other = other, single
        yield f"{single} has one run: its trainings are assumed to vary as those of {other}."


def _runs(test):
    first, second = test.runs
    if first == second:
        return "one run of each" if first == 1 else f"{first} runs of each"
    return f"{first} and {second} runs"


def _p(test):
    text = p_text(test.p)
    text = f"p {text[0]} {text[1:]}" if text.startswith("<") else f"p = {text}"
    return text if test.primary else f"{text}, adjusted {p_text(test.p_holm)}"
