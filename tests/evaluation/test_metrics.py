import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from imrcnn_d2.evaluation.counting import UnitCounts
from imrcnn_d2.evaluation.metrics import lesion_figures, ratios, unit_figures


def units(lesions, tp, fp, score=None, iou=0.8):
    """Counts of units whose every hit has the same overlaps."""
    lesions, tp, fp = (np.array(values) for values in (lesions, tp, fp))
    score = np.zeros(len(tp)) if score is None else np.array(score, float)
    return UnitCounts(lesions, tp, fp, score, tp * iou, tp * 2 * iou / (1 + iou), tp * (iou + 0.1))


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
    figures = lesion_figures(units([3, 1, 0, 0], [2, 0, 0, 0], [1, 0, 0, 3]))
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
    counts = units([1, 2], [1, 1], [fp, 0])
    assert math.isnan(lesion_figures(counts)["specificity"])
    assert math.isnan(lesion_figures(counts)["fp_per_lesion_free_image"])
    assert math.isnan(unit_figures(counts)["specificity"])


def test_without_a_hit_only_the_overlap_of_hits_is_undefined():
    figures = lesion_figures(units([1], [0], [1]))
    assert all(math.isnan(figures[name]) for name in ("iou", "iou_box", "dice"))
    assert figures["iou_all"] == 0


def test_without_masks():
    counts = units([1, 1], [1, 0], [0, 0], iou=np.nan)
    figures = lesion_figures(counts)
    assert all(math.isnan(figures[name]) for name in ("iou", "dice", "iou_all"))
    assert figures["TP"] == 1


def test_unit_figures_by_hand():
    # Hit; called by a false alarm only; missed; called; silent.
    figures = unit_figures(
        units([2, 1, 1, 0, 0], [2, 0, 0, 0, 0], [0, 1, 0, 2, 0], [0.9, 0.8, 0.1, 0.8, 0])
    )
    auroc = (2 + 1.5 + 1) / 6  # pairs won by the positive image, ties half
    assert figures == pytest.approx(
        {
            "TP": 2,
            "FP": 1,
            "FN": 1,
            "TN": 1,
            "precision": 200 / 3,
            "recall": 200 / 3,
            "specificity": 50,
            "accuracy": 60,
            "f1": 200 / 3,
            "auroc": 100 * auroc,
            "localised_recall": 100 / 3,
        }
    )


def test_auroc_needs_both_kinds_of_images():
    assert math.isnan(unit_figures(units([1, 1], [1, 0], [0, 0], [0.9, 0.1]))["auroc"])
    assert math.isnan(unit_figures(units([0, 0], [0, 0], [1, 0], [0.9, 0.1]))["auroc"])
    assert math.isnan(unit_figures(units([0, 0], [0, 0], [1, 0]))["localised_recall"])


small = arrays(np.int64, 12, elements=st.integers(0, 3))


@settings(deadline=None, max_examples=40)
@given(
    lesions=small,
    hits=small,
    fp=small,
    score=arrays(float, 12, elements=st.sampled_from([0, 0.2, 0.5, 0.9])),
)
def test_unit_figures_agree_with_others(lesions, hits, fp, score):
    counts = units(lesions, np.minimum(hits, lesions), fp, score)
    figures = unit_figures(counts)
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
    won = [float(p > n) + 0.5 * float(p == n) for p in score[truth] for n in score[~truth]]
    expected = 100 * np.mean(won) if won else np.nan
    assert figures["auroc"] == pytest.approx(expected, nan_ok=True)
