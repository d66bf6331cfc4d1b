"""What happened in each image, and the formulas, against pixels, plain loops and scikit-learn."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.counts import UnitCounts
from imrcnn_d2.evaluation.detection.metrics import (
    lesion_metrics,
    lesion_proportions,
    unit_metrics,
    unit_proportions,
)


def test_masks_matched_by_boxes(dataset, region):
    """What is counted depends on the matching; overlaps stay those of masks and of boxes."""
    truth = dataset(1, [region(1, 0, 0, 10, 10)])
    result = region(1, 0, 0, 10, 4, score=0.9) | {"bbox": [0, 0, 10, 10]}
    for iou_type, expected in (("bbox", (1, 0.4, 1)), ("segm", (0, 0, 0))):
        counts = evaluate_lesions(truth, [result], iou_type=iou_type).counts
        values = (counts.tp[0], counts.iou[0], counts.iou_box[0])
        assert values == pytest.approx(expected)


def test_merged_into_patients():
    columns = [np.array(values) for values in ([1, 0, 2], [1, 0, 0], [0, 1, 2])]
    shares = [np.array(values) for values in ([0.5, 0.9, 0.2], [0.6, 0, 0], [0.7, 0, 0])]
    unions = [np.array(values) for values in ([0.8, 0, 0], [0.3, 0, 0.1], [0.4, 0, 0.2])]
    merged = UnitCounts(*columns, *shares, *unions).merged(np.array([1, 0, 1]))
    assert (merged.lesions.tolist(), merged.tp.tolist()) == ([0, 3], [0, 1])
    assert (merged.fp.tolist(), merged.fn.tolist()) == ([1, 2], [0, 2])
    assert (merged.score.tolist(), merged.iou.tolist()) == ([0.9, 0.5], [0, 0.6])
    assert merged.union_iou == pytest.approx([0, 0.4])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.0, 0.5, 0.7]))
def test_agrees_with_pixels_and_plain_loops(random_case, seed, tau):
    data, results = random_case(seed)
    counts = evaluate_lesions(data, results, tau=tau).counts

    def pixels(record):
        return mask_util.decode(record["segmentation"]).astype(bool)

    for position, image in enumerate(data["images"]):
        annotations = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        lesions = [a for a in annotations if not a["iscrowd"]]
        free = list(lesions)
        tp, fp, overlaps, detected, best = 0, 0, [], np.zeros((40, 50), bool), 0
        for result in sorted(results, key=lambda r: -r["score"]):
            if result["image_id"] != image["id"]:
                continue
            mask, category = pixels(result), result["category_id"]
            same = [a for a in free if a["category_id"] == category]
            iou = [(mask & pixels(a)).sum() / (mask | pixels(a)).sum() for a in same]
            is_hit = bool(iou) and max(iou) >= 0.5
            in_crowd = any(
                (mask & pixels(a)).sum() / mask.sum() >= 0.5
                for a in annotations
                if a["iscrowd"] and a["category_id"] == category
            )
            if not is_hit and in_crowd:
                continue
            best = max(best, result["score"])
            if is_hit:
                target = max(range(len(same)), key=lambda i: (iou[i], i))
                free = [a for a in free if a is not same[target]]
            if result["score"] >= tau:
                detected |= mask
                tp, fp = tp + is_hit, fp + (not is_hit)
                overlaps += [iou[target]] if is_hit else []
        row = [counts.tp, counts.fp, counts.fn, counts.score]
        assert [column[position] for column in row] == [tp, fp, len(lesions) - tp, best]
        assert counts.iou[position] == pytest.approx(sum(overlaps))
        assert counts.dice[position] == pytest.approx(sum(2 * i / (1 + i) for i in overlaps))
        union_iou = union_dice = 0
        if lesions:
            annotated = np.any([pixels(a) for a in lesions], axis=0)
            both = (detected & annotated).sum()
            union_iou = both / (detected | annotated).sum()
            union_dice = 2 * both / (detected.sum() + annotated.sum())
        assert counts.union_iou[position] == pytest.approx(union_iou)
        assert counts.union_dice[position] == pytest.approx(union_dice)


def sums_of(lesions, tp, fp, iou=0.8):
    """Sums over units whose every hit has the same overlaps, as has the union."""
    lesions, tp, fp = (np.array(values) for values in (lesions, tp, fp))
    dice = 2 * iou / (1 + iou)
    overlaps = (tp * iou, tp * dice, tp * (iou + 0.1), (tp > 0) * iou, (tp > 0) * dice)
    return UnitCounts(lesions, tp, fp, np.zeros(len(tp)), *overlaps).columns().sum(axis=0)


def test_formulas_of_lesions():
    # Two of three lesions hit and a false alarm; a miss; a silent and a noisy lesion-free image.
    assert lesion_metrics(sums_of([3, 1, 0, 0], [2, 0, 0, 0], [1, 0, 0, 3])) == pytest.approx(
        {
            **{"TP": 2, "FP": 4, "FN": 2, "TN": 1, "precision": 100 * 2 / 6, "recall": 50},
            **{"specificity": 20, "accuracy": 100 * 3 / 9, "f1": 40},
            **{"iou": 80, "iou_box": 90, "dice": 100 * 1.6 / 1.8, "iou_all": 40},
            **{"fp_per_image": 1, "fp_per_lesion_free_image": 1.5},
        }
    )


@pytest.mark.parametrize(
    ("metrics", "proportions"),
    [(lesion_metrics, lesion_proportions), (unit_metrics, unit_proportions)],
)
def test_proportions_are_what_the_metrics_are_made_of(metrics, proportions):
    sums = sums_of([3, 1, 0, 0], [2, 0, 0, 0], [1, 0, 0, 3])
    values = metrics(sums)
    shares = {name: part / whole for name, (part, whole) in proportions(sums).items()}
    f1 = shares.pop("f1")
    assert values["f1"] == pytest.approx(100 * 2 * f1 / (1 + f1))
    expected = {name: 100 * share for name, share in shares.items()}
    assert {name: values[name] for name in shares} == pytest.approx(expected)


small = arrays(np.int64, 12, elements=st.integers(0, 3))


@settings(deadline=None, max_examples=40)
@given(lesions=small, hits=small, fp=small)
def test_metrics_of_units_are_scikit_learns(lesions, hits, fp):
    tp = np.minimum(hits, lesions)
    metrics = unit_metrics(sums_of(lesions, tp, fp))
    truth, predicted = lesions > 0, (tp + fp) > 0
    tn, false, missed, right = confusion_matrix(truth, predicted, labels=[False, True]).ravel()
    assert [metrics[key] for key in ("TP", "FP", "FN", "TN")] == [right, false, missed, tn]
    accuracy = pytest.approx(100 * np.mean(truth == predicted))
    assert (metrics["accuracy"], metrics["specificity"]) == (
        accuracy,
        pytest.approx(100 * tn / (tn + false) if tn + false else np.nan, nan_ok=True),
    )
    functions = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    for name, function in functions.items():
        expected = 100 * function(truth, predicted, zero_division=np.nan)
        assert metrics[name] == pytest.approx(expected, nan_ok=True)
