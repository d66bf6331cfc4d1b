import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation import evaluate_lesions

COCO_KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP50_voc", "BEP"]
COUNT_KEYS = ["TP", "FP", "FN", "TN", "precision", "recall", "specificity", "accuracy", "f1"]
LESION_KEYS = [*COUNT_KEYS, "iou", "iou_box", "iou_all", "dice", "fp_per_image", "selection"]
IMAGE_KEYS = [*COUNT_KEYS, "localised_recall", "miou", "mdice", "auroc"]


@pytest.fixture(scope="module")
def case(dataset, region):
    """
    Five images of three patients. 1: two lesions, one hit well (IoU 0.9), one barely (0.5, score
    below 0.7). 2: a lesion missed, a false alarm beside it. 3: a crowd, hit. 4: healthy and silent.
    5: healthy with a false alarm of low score.
    """
    annotations = [
        region(1, 0, 0, 10, 10),
        region(1, 20, 0, 10, 10),
        region(2, 0, 0, 10, 10),
        region(3, 0, 0, 30, 30, iscrowd=1),
    ]
    results = [
        region(1, 0, 0, 10, 9, score=0.95),
        region(1, 20, 0, 5, 10, score=0.6),
        region(2, 20, 20, 10, 10, score=0.8),
        region(3, 5, 5, 10, 10, score=0.99),
        region(5, 0, 0, 10, 10, score=0.3),
    ]
    return dataset(5, annotations, patients=["a", "b", "b", "b", "c"]), results


def test_by_hand(case):
    scored = evaluate_lesions(*case, tau=0.7)
    lesion = dict(scored.lesion)
    assert lesion.pop("selection") == pytest.approx((50 + 100 / 3 + 40 + 100) / 4)
    assert lesion == pytest.approx(
        {
            "TP": 1,
            "FP": 1,
            "FN": 2,
            "TN": 3,
            "precision": 50,
            "recall": 100 / 3,
            "specificity": 75,
            "accuracy": 400 / 7,
            "f1": 40,
            "iou": 90,
            "iou_box": 90,
            "iou_all": 30,
            "dice": 100 * 1.8 / 1.9,
            "fp_per_image": 1 / 5,
            "fp_per_lesion_free_image": 0,
        }
    )
    assert scored.image == pytest.approx(
        {
            "TP": 2,
            "FP": 0,
            "FN": 0,
            "TN": 3,
            "precision": 100,
            "recall": 100,
            "specificity": 100,
            "accuracy": 100,
            "f1": 100,
            "auroc": 100,
            "localised_recall": 50,
            "miou": (100 * 90 / 200 + 0) / 2,
            "mdice": (100 * 180 / 290 + 0) / 2,
        }
    )
    # Patient a is positive and called by a hit, b by a false alarm; c is healthy, not called.
    assert [scored.patient[key] for key in ("TP", "FP", "FN", "TN")] == [2, 0, 0, 1]
    assert scored.patient["localised_recall"] == 50
    assert scored.patient["auroc"] == 100
    # In order of score: hit, false alarm, hit, false alarm; three lesions. The crowd's is left out.
    assert scored.segm["AP50_voc"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert scored.segm["BEP"] == pytest.approx(100 * 2 / 3)
    assert scored.meta["lesions"] == 3
    assert scored.meta["crowds"] == 1
    assert scored.meta["lesion_free_images"] == 3
    assert scored.meta["patients"] == 3


def test_keys(case):
    groups = evaluate_lesions(*case).groups()
    assert list(groups) == ["bbox", "segm", "lesion", "image", "patient"]
    assert list(groups["bbox"]) == list(groups["segm"]) == COCO_KEYS
    assert set(LESION_KEYS) <= set(groups["lesion"])
    assert list(groups["image"]) == IMAGE_KEYS
    assert all(type(value) is float for figures in groups.values() for value in figures.values())


def test_the_threshold_leaves_curves_and_auroc_alone(case):
    low, high = (evaluate_lesions(*case, tau=tau) for tau in (0.0, 0.9))
    assert (low.lesion["TP"], high.lesion["TP"]) == (2, 1)
    assert (low.lesion["FP"], high.lesion["FP"]) == (2, 0)
    assert low.segm == pytest.approx(high.segm, nan_ok=True)
    assert low.bbox == pytest.approx(high.bbox, nan_ok=True)
    assert low.image["auroc"] == high.image["auroc"]


def test_a_score_at_the_threshold_counts(case):
    assert evaluate_lesions(*case, tau=0.95).lesion["TP"] == 1
    assert evaluate_lesions(*case, tau=0.9501).lesion["TP"] == 0


def test_the_overlap_asked_for(case):
    scored = evaluate_lesions(*case, tau=0.5, iou_threshold=0.6)
    assert (scored.lesion["TP"], scored.lesion["FP"], scored.lesion["FN"]) == (1, 2, 2)
    # The curve stays at IoU 0.5.
    assert scored.segm["AP50_voc"] == evaluate_lesions(*case).segm["AP50_voc"]


def test_rows(case):
    rows = evaluate_lesions(*case, tau=0.7).per_image
    assert [row["image_id"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["patient_id"] for row in rows] == ["a", "b", "b", "b", "c"]
    assert [row["image_outcome"] for row in rows] == ["TP", "TP", "TN", "TN", "TN"]
    assert [(row["n_gt"], row["n_det"], row["TP"], row["FP"], row["FN"]) for row in rows] == [
        (2, 1, 1, 0, 1),
        (1, 1, 0, 1, 1),
        (0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0),
    ]
    assert [row["score"] for row in rows] == [0.95, 0.8, 0, 0, 0.3]
    assert [rows[0][key] for key in ("iou", "union_iou")] == pytest.approx([90, 45])
    assert rows[1]["union_iou"] == 0
    assert math.isnan(rows[1]["iou"])
    assert math.isnan(rows[2]["union_iou"])


def test_fields_of_the_data_set_pass_through(dataset):
    data = dataset(1)
    data["images"][0] |= {"centre": "Oslo", "score": "of the clinic"}
    (row,) = evaluate_lesions(data, []).per_image
    assert row["centre"] == "Oslo"
    assert row["images.score"] == "of the clinic"
    assert row["score"] == 0


def test_several_classes(dataset, region):
    """Counts are summed, AP50_voc and BEP are means over the classes that have ground truth."""
    truth = dataset(
        2,
        [region(1, 0, 0, 10, 10), region(1, 20, 20, 10, 10, category_id=2)],
        classes=("a", "b", "never"),
    )
    results = [
        region(1, 0, 0, 10, 10, score=0.9),
        region(1, 20, 20, 10, 10, score=0.8),  # on the lesion of the other class
        region(1, 0, 20, 5, 5, category_id=2, score=0.8),
        region(1, 20, 20, 10, 10, category_id=2, score=0.7),
        region(2, 0, 0, 5, 5, category_id=3, score=0.75),
    ]
    scored = evaluate_lesions(truth, results)
    assert [scored.lesion[key] for key in ("TP", "FP", "FN", "TN")] == [2, 3, 0, 0]
    assert scored.segm["AP50_voc"] == pytest.approx(100 * (1 + 1 / 2) / 2)
    assert scored.segm["BEP"] == pytest.approx(100 * (1 + 0) / 2)
    assert scored.segm["AP50"] == pytest.approx(75)
    assert scored.image["FP"] == 1  # image 2 is called by the third class
    assert scored.per_image[1]["score"] == 0.75
    assert [name for kind, name, _ in scored.curves if kind == "segm"] == ["a", "b", "never"]


def test_break_even_point_of_all_classes_is_undefined_where_one_is(dataset, region):
    truth = dataset(
        1,
        [region(1, 0, 0, 9, 9), region(1, 20, 0, 9, 9), region(1, 0, 20, 9, 9, category_id=2)],
        classes=("a", "b"),
    )
    results = [region(1, 0, 0, 9, 9, score=0.9), region(1, 0, 20, 9, 9, category_id=2, score=0.9)]
    assert math.isnan(evaluate_lesions(truth, results).segm["BEP"])
    assert evaluate_lesions(truth, results[1:]).segm["BEP"] == 50  # class a: nothing at all, so 0


def test_nothing_detected(dataset, region):
    scored = evaluate_lesions(dataset(2, [region(1, 0, 0, 10, 10)]), [])
    for group in (scored.bbox, scored.segm):
        for name in ("AP", "AP50", "AP75", "APs", "AP50_voc", "BEP"):
            assert group[name] == 0
        assert math.isnan(group["APl"])
    assert [scored.lesion[key] for key in ("TP", "FP", "FN", "TN")] == [0, 0, 1, 1]
    assert math.isnan(scored.lesion["precision"])
    assert math.isnan(scored.lesion["iou"])
    assert scored.lesion["recall"] == scored.lesion["f1"] == scored.lesion["iou_all"] == 0
    assert scored.lesion["selection"] == 25
    assert scored.image["specificity"] == 100
    assert scored.image["auroc"] == 50
    assert scored.image["miou"] == scored.image["mdice"] == 0


def test_no_ground_truth(dataset, region):
    scored = evaluate_lesions(dataset(2), [region(1, 0, 0, 10, 10, score=0.9)])
    assert all(map(math.isnan, [*scored.bbox.values(), *scored.segm.values()]))
    assert [scored.lesion[key] for key in ("TP", "FP", "FN", "TN")] == [0, 1, 0, 1]
    assert math.isnan(scored.lesion["recall"])
    assert math.isnan(scored.lesion["iou_all"])
    assert scored.lesion["specificity"] == 50
    assert scored.lesion["selection"] == scored.image["specificity"] == 50
    for name in ("auroc", "localised_recall", "miou", "mdice", "recall"):
        assert math.isnan(scored.image[name])


def test_no_images_at_all(dataset):
    groups = evaluate_lesions(dataset(0), []).groups()
    undefined = [
        value
        for figures in groups.values()
        for key, value in figures.items()
        if key not in ("TP", "FP", "FN", "TN")
    ]
    assert all(map(math.isnan, undefined))


def test_no_lesion_free_images(dataset, region):
    truth = dataset(1, [region(1, 0, 0, 10, 10)])
    for results in ([], [region(1, 20, 20, 5, 5, score=0.9)]):
        scored = evaluate_lesions(truth, results)
        assert math.isnan(scored.lesion["specificity"])
        assert math.isnan(scored.image["specificity"])
        assert scored.lesion["selection"] == 0


def test_patients_need_to_be_known_for_every_image(dataset):
    assert evaluate_lesions(dataset(2, patients=["a"]), []).patient is None
    assert evaluate_lesions(dataset(2, patients=["a", "a"]), []).patient["TN"] == 1


def test_boxes_alone(dataset, region, caplog):
    boxes = {key: value for key, value in region(1, 0, 0, 10, 9).items() if key != "segmentation"}
    truth = dataset(2, [region(1, 0, 0, 10, 10)])
    asked = evaluate_lesions(truth, [boxes | {"score": 0.9}], iou_type="bbox")
    assert not caplog.records
    fallen_back = evaluate_lesions(truth, [boxes | {"score": 0.9}])
    assert "results have no masks: lesions are matched by boxes" in caplog.text
    for scored in (asked, fallen_back):
        assert scored.meta["iou_type"] == "bbox"
        assert scored.lesion["TP"] == 1
        assert scored.lesion["iou_box"] == pytest.approx(90)
        assert scored.bbox["AP50_voc"] == 100
        of_masks = [scored.lesion[key] for key in ("iou", "iou_all", "dice")]
        of_masks += [scored.image["miou"], scored.image["mdice"], *scored.segm.values()]
        assert all(map(math.isnan, of_masks))
    nothing_right = evaluate_lesions(truth, [boxes | {"score": 0.9, "bbox": [30, 30, 2, 2]}])
    assert math.isnan(nothing_right.lesion["iou_all"])


@pytest.mark.parametrize(
    "wrong", [{"iou_type": "mask"}, {"iou_threshold": 0}, {"iou_threshold": 50}, {"tau": -1}]
)
def test_wrong_settings(dataset, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        evaluate_lesions(dataset(1), [], **wrong)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), num_classes=st.integers(1, 3))
def test_ap50_of_coco_can_be_read_off_the_curves(random_case, seed, num_classes):
    """COCO's AP50 samples the same curves at 101 recalls, AP50_voc at every one."""
    dataset, results = random_case(seed, num_classes=num_classes)
    scored = evaluate_lesions(dataset, results)
    grid = np.linspace(0, 1, 101)
    for kind in ("bbox", "segm"):
        sampled = []
        for curve in (curve for own, _, curve in scored.curves if own == kind and curve.num_gt):
            reached = [curve.precision[curve.recall >= recall].max(initial=0) for recall in grid]
            sampled.append(sum(reached) / len(grid))
        expected = 100 * sum(sampled) / len(sampled) if sampled else float("nan")
        assert scored.groups()[kind]["AP50"] == pytest.approx(expected, nan_ok=True)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), shuffle=st.randoms())
def test_order_of_images_does_not_matter(random_case, seed, shuffle):
    dataset, results = random_case(seed, scores="distinct")
    before = evaluate_lesions(dataset, results).groups()
    for records in (results, dataset["images"], dataset["categories"]):
        shuffle.shuffle(records)
    after = evaluate_lesions(dataset, results).groups()
    for group, figures in before.items():
        assert after[group] == pytest.approx(figures, nan_ok=True)
