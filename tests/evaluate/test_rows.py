import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.results import THRESHOLDS


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_thresholds_are_evaluations(random_case, seed):
    data, results = random_case(seed, num_images=4)
    table = evaluate_lesions(data, results).thresholds
    assert [row["tau"] for row in table] == pytest.approx(np.arange(1, 20) * 0.05)
    for row in table[::3]:
        scored = evaluate_lesions(data, results, tau=row["tau"])
        for group, own in (("lesion", scored.lesion), ("image", scored.image)):
            for name, figure in own.items():
                if name not in ("selection", "auroc"):
                    assert row[f"{group}_{name}"] == pytest.approx(figure, nan_ok=True)


def test_a_score_at_a_threshold_counts(dataset, region):
    """0.15, 0.3, 0.35 ... as they are written, not as sums of 0.05 come out."""
    assert THRESHOLDS[2] == 0.15 and THRESHOLDS[5] == 0.3 and THRESHOLDS[13] == 0.7
    data = dataset(1, [region(1, 0, 0, 10, 10)])
    for tau in THRESHOLDS:
        table = evaluate_lesions(data, [region(1, 0, 0, 10, 10, score=tau)]).thresholds
        assert [row["tau"] for row in table if row["lesion_TP"]][-1] == tau


def test_patients(dataset, region):
    data = dataset(
        4,
        [region(1, 0, 0, 10, 10), region(3, 0, 0, 10, 10), region(3, 20, 0, 10, 10)],
        patients=[7, "b", 7, "b"],
    )
    results = [
        region(1, 0, 0, 10, 8, score=0.9),
        region(3, 20, 0, 10, 10, score=0.8),
        region(3, 20, 20, 10, 10, score=0.95),
        region(4, 0, 0, 10, 10, score=0.6),
    ]
    scored = evaluate_lesions(data, results)
    seven, b = scored.per_patient
    assert seven["iou"] == pytest.approx(90) and seven["iou_box"] == pytest.approx(90)
    assert seven["dice"] == pytest.approx(50 * (1.6 / 1.8 + 1))
    for name in ("iou", "dice", "iou_box"):
        del seven[name]
    assert seven == {
        "patient_id": 7,
        "images": 2,
        "n_gt": 3,
        "n_det": 3,
        "TP": 2,
        "FP": 1,
        "FN": 1,
        "patient_outcome": "TP",
        "score": 0.95,
    }
    assert (b["patient_id"], b["patient_outcome"], b["score"]) == ("b", "TN", 0.6)
    assert np.isnan(b["iou"])


def test_without_scores(dataset, region):
    scored = evaluate_lesions(
        dataset(1, [region(1, 0, 0, 10, 10)], patients=["a"]), [region(1, 0, 0, 10, 10, score=None)]
    )
    for rows in (scored.per_image, scored.per_patient):
        assert np.isnan(rows[0]["score"])
