import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from imrcnn_d2.evaluation.detection.counts import UnitCounts, named
from imrcnn_d2.evaluation.detection.metrics import (
    image_metrics,
    lesion_metrics,
    lesion_proportions,
    ratios,
    unit_metrics,
    unit_proportions,
)


def units(lesions, tp, fp, iou=0.8):
    """Counts of units whose every hit has the same overlaps, as has the union."""
    lesions, tp, fp = (np.array(values) for values in (lesions, tp, fp))
    dice = 2 * iou / (1 + iou)
    overlaps = (tp * iou, tp * dice, tp * (iou + 0.1), (tp > 0) * iou, (tp > 0) * dice)
    return UnitCounts(lesions, tp, fp, np.zeros(len(tp)), *overlaps)


def test_ratios_by_hand():
    figures = ratios(tp=6, fp=2, fn=4, tn=8)
    assert figures == pytest.approx(
        {"precision": 75, "recall": 60, "specificity": 80, "accuracy": 70, "f1": 200 / 3}
    )


def test_undefined_ratios_are_nan():
    assert all(math.isnan(figure) for figure in ratios(0, 0, 0, 0).values())
    nothing_detected = ratios(tp=0, fp=0, fn=3, tn=0)
    assert math.isnan(nothing_detected["precision"])
    assert math.isnan(nothing_detected["specificity"])
    assert nothing_detected["recall"] == nothing_detected["f1"] == 0


def test_lesion_figures_by_hand():
    # Two of three lesions hit and a false alarm; a miss; a silent and a noisy lesion-free image.
    figures = lesion_metrics(units([3, 1, 0, 0], [2, 0, 0, 0], [1, 0, 0, 3]).sums())
    assert figures == pytest.approx(
        {
            "TP": 2,
            "FP": 4,
            "FN": 2,
            "TN": 1,
            "precision": 100 * 2 / 6,
            "recall": 50,
            "specificity": 20,
            "accuracy": 100 * 3 / 9,
            "f1": 40,
            "iou": 80,
            "iou_box": 90,
            "dice": 100 * 1.6 / 1.8,
            "iou_all": 40,
            "fp_per_image": 1,
            "fp_per_lesion_free_image": 1.5,
        }
    )


@pytest.mark.parametrize("fp", [0, 2])
def test_specificity_is_decided_from_the_ground_truth(fp):
    sums = units([1, 2], [1, 1], [fp, 0]).sums()
    assert math.isnan(lesion_metrics(sums)["specificity"])
    assert math.isnan(lesion_metrics(sums)["fp_per_lesion_free_image"])
    assert math.isnan(unit_metrics(sums)["specificity"])


def test_without_a_hit_only_the_overlap_of_hits_is_undefined():
    figures = lesion_metrics(units([1], [0], [1]).sums())
    assert all(math.isnan(figures[name]) for name in ("iou", "iou_box", "dice"))
    assert figures["iou_all"] == 0


def test_without_masks():
    counts = units([1, 1], [1, 0], [0, 0], iou=np.nan)
    figures = lesion_metrics(counts.sums())
    assert all(math.isnan(figures[name]) for name in ("iou", "dice", "iou_all"))
    assert figures["TP"] == 1


def test_unit_figures_by_hand():
    # Hit; called by a false alarm only; missed; called; silent. Every hit image has a union of 0.8.
    counts = units([2, 1, 1, 0, 0], [2, 0, 0, 0, 0], [0, 1, 0, 2, 0])
    expected = {
        "TP": 2,
        "FP": 1,
        "FN": 1,
        "TN": 1,
        "precision": 200 / 3,
        "recall": 200 / 3,
        "specificity": 50,
        "accuracy": 60,
        "f1": 200 / 3,
        "localised_recall": 100 / 3,
    }
    assert unit_metrics(counts.sums()) == pytest.approx(expected)
    expected |= {"miou": 80 / 3, "mdice": 100 * 1.6 / 1.8 / 3}
    assert image_metrics(counts.sums()) == pytest.approx(expected)


def test_localised_recall_needs_a_positive_image():
    assert math.isnan(unit_metrics(units([0, 0], [0, 0], [1, 0]).sums())["localised_recall"])


def test_figures_of_resamples_are_those_of_the_units_drawn():
    """Sums of (B, K) give (B,) figures: each resample's own."""
    counts = units([3, 1, 0, 0, 2], [2, 0, 0, 0, 1], [1, 0, 0, 3, 0])
    draws = np.array([[0, 0, 1, 2, 3], [4, 4, 4, 4, 4], [2, 2, 2, 2, 2]])
    weights = np.array([np.bincount(draw, minlength=5) for draw in draws])
    sums = named(weights @ counts.columns())
    for figures in (lesion_metrics, image_metrics):
        resampled = figures(sums)
        for b, draw in enumerate(draws):
            taken = UnitCounts(*(getattr(counts, f.name)[draw] for f in fields(counts)))
            expected = figures(taken.sums())
            assert {k: v[b] for k, v in resampled.items()} == pytest.approx(expected, nan_ok=True)


def test_proportions_are_what_the_figures_are_made_of():
    sums = units([3, 1, 0, 0], [2, 0, 0, 0], [1, 0, 0, 3]).sums()
    for figures, proportions in (
        (lesion_metrics, lesion_proportions),
        (unit_metrics, unit_proportions),
    ):
        own = figures(sums)
        shares = {k: part / whole for k, (part, whole) in proportions(sums).items()}
        f1 = shares.pop("f1")
        assert own["f1"] == pytest.approx(100 * 2 * f1 / (1 + f1))
        assert {k: own[k] for k in shares} == pytest.approx({k: 100 * s for k, s in shares.items()})


small = arrays(np.int64, 12, elements=st.integers(0, 3))


@settings(deadline=None, max_examples=40)
@given(
    lesions=small,
    hits=small,
    fp=small,
)
def test_unit_figures_agree_with_others(lesions, hits, fp):
    counts = units(lesions, np.minimum(hits, lesions), fp)
    figures = unit_metrics(counts.sums())
    truth, said = lesions > 0, (counts.tp + fp) > 0
    tn, false, missed, tp = confusion_matrix(truth, said, labels=[False, True]).ravel()
    assert [figures[key] for key in ("TP", "FP", "FN", "TN")] == [tp, false, missed, tn]
    for name, function in (
        ("precision", precision_score),
        ("recall", recall_score),
        ("f1", f1_score),
    ):
        expected = 100 * function(truth, said, zero_division=np.nan)
        assert figures[name] == pytest.approx(expected, nan_ok=True)
