"""``evaluate_lesions`` on scenes that are worked out by hand."""

import math
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rectangles import rectangles

from imrcnn_d2.evaluation import Bootstrap, OperatingPoint, evaluate_lesions
from imrcnn_d2.evaluation.annotator_agreement import read_annotator, read_model
from imrcnn_d2.evaluation.detection.results import THRESHOLDS

COCO_KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP50_voc", "BEP"]
TABLE = ("TP", "FP", "FN", "TN")
ALL_RIGHT = dict.fromkeys(("precision", "recall", "specificity", "accuracy", "f1"), 100)


def table(metrics):
    return [metrics[name] for name in TABLE]


@pytest.fixture(scope="module")
def case(dataset, region):
    """Five images of three patients. 1: two lesions, one hit well (IoU 0.9), one barely (0.5, score
    below 0.7). 2: a lesion missed, a false alarm next to it. 3: a crowd, hit. 4: healthy and
    silent. 5: healthy with a false alarm of low score."""
    annotations = rectangles("1 0 0 10 10; 1 20 0 10 10; 2 0 0 10 10; 3 0 0 30 30 crowd")
    results = rectangles(
        "1 0 0 10 9 @0.95; 1 20 0 5 10 @0.6; 2 20 20 10 10 @0.8; 3 5 5 10 10 @0.99; "
        "5 0 0 10 10 @0.3"
    )
    return dataset(5, annotations, patients=["a", "b", "b", "b", "c"]), results


def test_by_hand(case):
    scored = evaluate_lesions(*case, tau=0.7)
    groups = scored.groups()
    assert list(groups) == ["bbox", "segm", "lesion", "paper", "image", "patient"]
    assert list(scored.bbox) == list(scored.segm) == COCO_KEYS
    assert all(type(value) is float for values in groups.values() for value in values.values())
    assert scored.lesion == pytest.approx(
        {
            **{"TP": 1, "FP": 1, "FN": 2, "TN": 3, "precision": 50, "recall": 100 / 3},
            **{"specificity": 75, "accuracy": 400 / 7, "f1": 40},
            **{"iou": 90, "iou_box": 90, "iou_all": 30, "dice": 100 * 1.8 / 1.9},
            # The last row of 10 pixels is missing: 1 pixel, above the tolerance of 0.64.
            **{"hd95": 1, "nsd": 100 * (36 - 10 + 34 - 8) / (36 + 34)},
            **{"fp_per_image": 1 / 5, "fp_per_lesion_free_image": 0},
            "selection": (50 + 100 / 3 + 40 + 100) / 4,
        }
    )
    # As lesion, but of the two images with a lesion the first has no false alarm either.
    assert scored.paper == pytest.approx(
        {
            **{"TP": 1, "FP": 1, "FN": 2, "TN": 4, "precision": 50, "recall": 100 / 3},
            **{"specificity": 80, "accuracy": 500 / 8, "f1": 40, "AP_per_image": 25},
        }
    )
    unions = {"miou": (100 * 90 / 200 + 0) / 2, "mdice": (100 * 180 / 290 + 0) / 2}
    image = {"TP": 2, "FP": 0, "FN": 0, "TN": 3, "localised_recall": 50, "auroc": 100, **unions}
    assert scored.image == pytest.approx({**image, **ALL_RIGHT})
    # Patient a is positive and predicted by a hit, b by a false alarm; c is healthy and silent.
    patient = {"TP": 2, "FP": 0, "FN": 0, "TN": 1, "localised_recall": 50, "auroc": 100}
    assert scored.patient == pytest.approx({**patient, **ALL_RIGHT})
    # In order of score: hit, false alarm, hit, false alarm; three lesions. The crowd's is left out.
    assert scored.segm["AP50_voc"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert scored.segm["BEP"] == pytest.approx(100 * 2 / 3)
    sizes = {"images": 5, "lesions": 3, "crowds": 1, "lesion_free_images": 3, "patients": 3}
    assert sizes.items() <= scored.meta.items()


def test_table_5_of_the_paper(dataset, region):
    """280 images, 286 of 300 lesions found, 22 false alarms in 10 images: the published row of
    IMR-CNN to the digit. The counts are of raw scores at 0.7, whatever a map makes of them."""
    lesions = [region(1 + n % 250, 10 * (n // 250), 0, 8, 8) for n in range(300)]
    raw = [0.7] * 286 + [0.69] * 14 + [0.9] * 22
    alarms = [region(1 + n % 10, 30, 20, 8, 8) for n in range(22)]
    results = [
        {**lesion, "score": score / 10, "raw_score": score}
        for lesion, score in zip(lesions + alarms, raw, strict=True)
    ]
    scored = evaluate_lesions(dataset(280, lesions), results, bootstrap=Bootstrap(50))
    assert table(scored.paper) == [286, 22, 14, 270]
    published = {"precision": 92.9, "recall": 95.3, "accuracy": 93.9, "specificity": 92.5}
    published["f1"] = 94.1
    for name, value in published.items():
        assert f"{scored.paper[name]:.1f}" == str(value)
        low, high = scored.intervals["paper"][name]
        assert low < scored.paper[name] < high
    assert scored.lesion["TP"] == 0


def test_fields_of_the_data_set_pass_through(dataset):
    data = dataset(1)
    data["images"][0] |= {"centre": "Oslo", "score": "of the clinic"}
    (row,) = evaluate_lesions(data, []).per_image
    assert (row["centre"], row["images.score"], row["score"]) == ("Oslo", "of the clinic", 0)


def test_one_row_per_patient(dataset):
    lesions = rectangles("1 0 0 10 10; 3 0 0 10 10; 3 20 0 10 10")
    data = dataset(4, lesions, patients=[7, "b", 7, "b"])
    results = rectangles(
        "1 0 0 10 8 @0.9; 3 20 0 10 10 @0.8; 3 20 20 10 10 @0.95; 4 0 0 10 10 @0.6"
    )
    seven, b = evaluate_lesions(data, results).per_patient
    assert seven == {
        **{"patient_id": 7, "images": 2, "patient_outcome": "TP", "score": 0.95},
        **{"n_gt": 3, "n_det": 3, "TP": 2, "FP": 1, "FN": 1},
        **{"iou": pytest.approx(90), "iou_box": pytest.approx(90)},
        **{"hd95": pytest.approx(1), "nsd": ANY},
        "dice": pytest.approx(50 * (1.6 / 1.8 + 1)),
    }
    assert (b["patient_id"], b["patient_outcome"], b["score"]) == ("b", "TN", 0.6)
    assert np.isnan(b["iou"])
    unscored = evaluate_lesions(data, [{**r, "score": None} for r in results])
    for rows in (unscored.per_image, unscored.per_patient):
        assert np.isnan(rows[0]["score"])
    assert table(unscored.lesion) == [2, 2, 1, 1] and unscored.image["miou"] > 0
    ranked = [*unscored.segm.values(), *unscored.bbox.values(), *unscored.froc.values()]
    assert np.isnan([*ranked, unscored.image["auroc"], unscored.calibration["ece"]]).all()
    assert not unscored.curves and not unscored.thresholds
    assert not len(unscored.metrics.froc.curve()["score"])
    assert evaluate_lesions(dataset(2), []).patient is None


@pytest.mark.parametrize("unknown", [None, ""])
def test_a_sequence_belongs_to_the_patient_whom_one_of_its_frames_names(dataset, unknown):
    """An earlier frame without a patient comes before those of another patient; a sequence of two
    patients, say a number that both have, is of neither."""
    data = dataset(7, rectangles("1 0 0 10 10; 2 0 0 10 10; 3 0 0 10 10"))
    names = zip("ssstttt", (unknown, unknown, "a", "b", "c", unknown, unknown), strict=True)
    for image, (sequence, patient) in zip(data["images"], names, strict=True):
        image |= {"sequence_id": sequence, "patient_id": patient}
    data["images"][1] |= {"sequence_id": unknown, "patient_id": "b"}
    for annotation in data["annotations"]:
        annotation["lesion_id"] = f"l{annotation['image_id']}"
    scored = evaluate_lesions(data, rectangles("1 0 0 10 10 @0.9"))
    assert scored.metrics.unit_of_image.tolist() == [0, 1, 0, 1, 2, 3, 3]
    rows = [(row["patient_id"], row["images"], row["n_gt"]) for row in scored.per_patient]
    assert rows == [("a", 2, 2), ("b", 2, 1), ("c", 1, 0)]
    assert [row["patient_id"] for row in scored.per_lesion] == ["a", "b", "a"]
    assert scored.meta["patients"] == 3 and scored.meta["images_of_unknown_patients"] == 2


def test_patients_known_for_a_part_are_units_next_to_the_other_images(dataset):
    """Two patients, a sequence of an unknown one, and three images of which nothing is known."""
    data = dataset(9, rectangles("1 0 0 10 10; 3 0 0 10 10; 7 0 0 10 10"), patients="aabb")
    for image in data["images"][4:6]:
        image["sequence_id"] = "s"
    results = rectangles("1 0 0 10 10 @0.9; 4 0 0 10 10 @0.95; 7 0 0 10 10 @0.8; 8 0 0 10 10 @0.9")
    scored = evaluate_lesions(data, results, bootstrap=Bootstrap(50))
    assert scored.metrics.unit_of_image.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5]
    assert scored.meta["patients"] == 2 and scored.meta["images_of_unknown_patients"] == 5
    # Per patient: of the known two only, exactly as if there were no others.
    known = scored.part(np.arange(4), bootstrap=Bootstrap(50))
    assert scored.patient == pytest.approx(known.patient, nan_ok=True)
    assert sum(table(scored.patient)) == 2 and sum(table(scored.image)) == 9
    assert scored.at(0.92)["patient"] == pytest.approx(known.at(0.92)["patient"], nan_ok=True)
    assert [row["patient_id"] for row in scored.per_patient] == ["a", "b"]
    assert scored.intervals["patient"]["recall"] == known.intervals["patient"]["recall"]


def test_unique_lesions(dataset, region):
    """Patient a has lesion 1 in two frames, once annotated in two parts, and lesion 2 in one; b has
    another lesion 1, in three frames."""
    places = ((1, 0, 1), (1, 20, 1), (2, 0, 1), (2, 20, 2), (3, 0, 1), (4, 0, 1), (5, 0, 1))
    lesions = [region(i, x, 0, 10, 10, lesion_id=lesion) for i, x, lesion in places]
    lesions.append(region(5, 20, 20, 10, 10, iscrowd=1))
    data = dataset(6, lesions, patients="aabbbc")
    hits = ((1, 0, 0.9), (1, 20, 0.8), (2, 20, 0.5), (3, 0, 0.9), (4, 0, 0.8), (6, 0, 0.9))
    results = [region(i, x, 0, 10, 10, score=score) for i, x, score in hits]
    point, bootstrap = OperatingPoint(0.5, "f1"), Bootstrap(300)
    scored = evaluate_lesions(data, results, operating_point=point, bootstrap=bootstrap)
    expected = {"n": 3, "recall": 200 / 3, "frame_recall": 100 * (1 / 2 + 0 + 2 / 3) / 3}
    assert scored.unique_lesion == pytest.approx(expected)
    at_point = {"n": 3, "recall": 100, "frame_recall": 100 * (1 / 2 + 1 + 2 / 3) / 3}
    assert scored.tau_val["unique_lesion"] == pytest.approx(at_point)
    for name in ("recall", "frame_recall"):
        low, high = scored.intervals["unique_lesion"][name]
        assert low < expected[name] < high
    names = ("patient_id", "lesion_id", "frames", "frames_found")
    rows = [[row[name] for name in names] for row in scored.per_lesion]
    assert rows == [["a", 1, 2, 1], ["a", 2, 1, 0], ["b", 1, 3, 2]]
    assert scored.document()["unique_lesion"]["n"] == 3 and "per_lesion.csv" in scored.tables()
    part = scored.part(np.array([0, 5]))
    assert part.unique_lesion == {"n": 1, "recall": 100, "frame_recall": 100}
    # Unknown without the id of a single lesion, or of a patient.
    del data["annotations"][3]["lesion_id"]
    assert evaluate_lesions(data, results).unique_lesion is None
    assert evaluate_lesions(dataset(6, lesions, patients="aabb"), results).unique_lesion is None


def test_threshold_and_overlap(case):
    low, high = (evaluate_lesions(*case, tau=tau) for tau in (0.0, 0.9))
    assert (table(low.lesion)[:2], table(high.lesion)[:2]) == ([2, 2], [1, 0])
    assert low.segm == pytest.approx(high.segm, nan_ok=True)
    assert low.bbox == pytest.approx(high.bbox, nan_ok=True)
    assert low.image["auroc"] == high.image["auroc"]
    assert evaluate_lesions(*case, tau=0.95).lesion["TP"] == 1
    assert evaluate_lesions(*case, tau=0.9501).lesion["TP"] == 0
    strict = evaluate_lesions(*case, tau=0.5, iou_threshold=0.6)
    assert table(strict.lesion)[:3] == [1, 2, 2]
    assert strict.segm["AP50_voc"] == low.segm["AP50_voc"]  # always at IoU 0.5


def test_classes(dataset, region):
    """Counts are summed, AP50_voc and BEP are means over the classes that have ground truth."""
    data = dataset(
        3,
        rectangles("1 0 0 10 10; 1 20 0 10 10 class 2; 2 0 0 10 10 class 2; 2 20 0 10 10 crowd"),
        classes=("a", "b", "never"),
    )
    # (1) its box is elsewhere; (2) b in truth; (4) on the crowd
    results = rectangles(
        "1 0 0 10 8 @0.9; 1 20 0 10 10 @0.9; 2 0 0 10 10 class 2 @0.8; 2 20 0 10 10 @0.8; "
        "3 0 0 5 5 class 3 @0.75"
    )
    results[0]["bbox"] = [30, 30, 5, 5]
    scored = evaluate_lesions(data, results)
    assert (table(scored.lesion), scored.image["FP"]) == ([2, 2, 1, 0], 1)
    assert scored.per_image[2]["score"] == 0.75
    assert [name for kind, name, _ in scored.curves if kind == "segm"] == ["a", "b", "never"]
    a, b, _ = scored.by_class.values()
    assert list(scored.by_class) == ["a", "b", "never"]
    assert (table(a), table(b)) == ([1, 1, 0, 2], [1, 0, 1, 1])
    assert (a["iou"], a["iou_box"], b["iou"]) == (pytest.approx(80), 0, pytest.approx(100))
    assert (a["precision"], b["recall"], a["fp_per_image"]) == (50, 50, pytest.approx(1 / 3))
    # Of masks, though a's box hits nothing.
    assert (a["AP50_voc"], a["BEP"], b["AP50_voc"]) == (100, 100, 50)
    assert b["AP50"] == pytest.approx(100 * 51 / 101)  # COCO's recalls 0, 0.01, ... 0.5
    assert (scored.segm["AP50_voc"], scored.bbox["AP50_voc"]) == (75, 25)
    by_boxes = evaluate_lesions(data, results, iou_type="bbox").lesion
    assert (table(by_boxes), by_boxes["iou"]) == ([1, 3, 2, 0], pytest.approx(100))
    # One detection of two lesions: undefined, and so is the mean; without a detection it is 0.
    assert np.isnan([b["BEP"], scored.segm["BEP"]]).all()
    assert evaluate_lesions(data, results[:2]).segm["BEP"] == 50
    boxes = [{k: v for k, v in result.items() if k != "segmentation"} for result in results]
    by_class = evaluate_lesions(data, boxes).by_class
    assert (by_class["a"]["AP50_voc"], by_class["b"]["AP50_voc"]) == (0, 50)
    assert not evaluate_lesions(dataset(1), []).by_class


def test_nothing_detected(dataset, region):
    scored = evaluate_lesions(dataset(2, [region(1, 0, 0, 10, 10)]), [])
    for group in (scored.bbox, scored.segm):
        assert [group[name] for name in COCO_KEYS if name not in ("APm", "APl")] == [0] * 6
        assert np.isnan([group["APm"], group["APl"]]).all()
    assert table(scored.lesion) == [0, 0, 1, 1]
    assert np.isnan([scored.lesion[name] for name in ("precision", "iou", "dice")]).all()
    assert scored.lesion["recall"] == scored.lesion["f1"] == scored.lesion["iou_all"] == 0
    assert scored.lesion["selection"] == 25  # precision counts 0
    assert [scored.image[name] for name in ("specificity", "auroc", "miou")] == [100, 50, 0]


def test_no_ground_truth(dataset, region):
    scored = evaluate_lesions(dataset(2), [region(1, 0, 0, 10, 10, score=0.9)])
    assert np.isnan([*scored.bbox.values(), *scored.segm.values()]).all()
    assert table(scored.lesion) == [0, 1, 0, 1]
    assert np.isnan([scored.lesion["recall"], scored.lesion["iou_all"]]).all()
    assert scored.lesion["specificity"] == scored.lesion["selection"] == 50
    names = ("auroc", "localised_recall", "miou", "mdice", "recall")
    assert np.isnan([scored.image[name] for name in names]).all()
    for values in evaluate_lesions(dataset(0), []).groups().values():
        assert np.isnan([value for name, value in values.items() if name not in TABLE]).all()


def test_no_lesion_free_images(dataset, region):
    """Whatever is predicted, precision would be 100 % then: it is undefined, also in a resample or
    a group of images that has none."""
    data = dataset(2, [region(1, 0, 0, 10, 10)], patients="ab")
    for results in ([], [region(1, 20, 20, 5, 5, score=0.9)]):
        everything = evaluate_lesions(data, results, bootstrap=Bootstrap(200))
        scored = everything.part(np.array([0]))
        undefined = [scored.lesion[n] for n in ("specificity", "fp_per_lesion_free_image")]
        for group in (scored.image, scored.patient):
            undefined += [group[n] for n in ("precision", "specificity", "accuracy", "f1", "auroc")]
            assert group["recall"] == (100 if results else 0) and group["localised_recall"] == 0
        assert np.isnan(undefined).all()
        assert scored.lesion["selection"] == 0
        assert everything.image["accuracy"] == (100 if results else 50)
        for group in ("image", "patient"):  # twice the first image
            share = everything.undefined_shares[f"{group}.accuracy"]
            assert share == pytest.approx(0.25, abs=0.1)


def test_boxes_alone(dataset, region, caplog):
    box = {key: v for key, v in region(1, 0, 0, 10, 9).items() if key != "segmentation"}
    truth = dataset(2, [region(1, 0, 0, 10, 10)])
    requested = evaluate_lesions(truth, [box | {"score": 0.9}], iou_type="bbox")
    assert not caplog.records
    fallen_back = evaluate_lesions(truth, [box | {"score": 0.9}])
    assert "results have no masks" in caplog.text
    for scored in (requested, fallen_back):
        assert scored.meta["iou_type"] == "bbox" and scored.lesion["TP"] == 1
        assert scored.lesion["iou_box"] == pytest.approx(90) and scored.bbox["AP50_voc"] == 100
        small = scored.by_size["coco"]["small"]
        assert small["recall"] == 100 and small["iou_box"] == pytest.approx(90)
        masks = [group[name] for group in (scored.lesion, small) for name in ("iou", "dice")]
        masks += [scored.lesion["iou_all"], scored.image["miou"], *scored.segm.values()]
        assert np.isnan(masks).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("iou_type", "mask"), ("iou_threshold", 0), ("iou_threshold", 1.01)),
        *(("tau", -0.1), ("tau", math.nan), ("tau", math.inf)),
    ],
)
def test_wrong_settings(dataset, name, value):
    with pytest.raises(ValueError, match=f"{name} is '?{value}"):
        evaluate_lesions(dataset(1), [], **{name: value})
    if name == "tau":
        with pytest.raises(ValueError, match=f"tau is {value}"):
            evaluate_lesions(dataset(1), [], operating_point=OperatingPoint(value, "f1"))
        with pytest.raises(ValueError, match=f"tau is {value}"):
            read_model("model", [], value, read_annotator("a", dataset(1)))


@pytest.fixture
def sizes(dataset, region):
    """Lesions of 0.5, 1, 5, 15, 30 and 100 % of images of 40 x 50, and a crowd of 10 %."""
    data = dataset(
        4,
        rectangles(
            "1 0 0 5 2; 1 20 0 5 4; 2 0 0 10 10; 2 20 0 10 30; 2 40 0 10 20 crowd; 3 0 0 20 30; "
            "4 0 0 50 40"
        ),
    )
    # (2) IoU 0.8; (3) below the threshold; (4) on the crowd; (6) IoU 0.5; (7) a false alarm
    results = rectangles(
        "1 20 0 5 4 @0.9; 2 0 0 10 8 @0.9; 2 20 0 10 30 @0.6; 2 40 0 10 20 @0.9; "
        "3 0 0 20 30 @0.9; 4 0 0 25 40 @0.9; 3 30 30 5 5 @0.9"
    )
    return data, results


def test_by_size(sizes):
    scored = evaluate_lesions(*sizes, bootstrap=Bootstrap(200))
    strata = scored.by_size["share_of_image"]
    assert {name: stratum["n"] for name, stratum in strata.items()} == {
        **{"<1 %": 1, "1-5 %": 1, "5-15 %": 1, "15-30 %": 1, ">=30 %": 2}
    }
    assert [stratum["recall"] for stratum in strata.values()] == [0, 100, 100, 0, 100]
    overlaps = {"iou": 80, "iou_all": 80, "dice": 100 * 1.6 / 1.8, "iou_box": 80}
    assert strata["5-15 %"] == pytest.approx({"n": 1, "recall": 100, **overlaps})
    assert strata[">=30 %"]["iou"] == pytest.approx(75)
    assert np.isnan(strata["<1 %"]["iou"]) and strata["<1 %"]["iou_all"] == 0
    # A lesion is the same in every resample that has its image: no interval.
    group = "by_size.share_of_image.5-15 %"
    assert np.isnan(scored.intervals[group]["iou_all"]).all()
    assert scored.undefined_shares[f"{group}.iou_all"] == pytest.approx(0.75**4, abs=0.12)
    exact = (100 * 0.025**0.5, 100)  # Clopper and Pearson's, of two of two
    assert scored.intervals["by_size.share_of_image.>=30 %"]["recall"] == pytest.approx(exact)


def test_size_is_the_annotated_area(sizes):
    data, results = sizes
    areas = (1023, 1024, 9215, 9216, 1, 1e6, 0)
    for annotation, area in zip(data["annotations"], areas, strict=True):
        annotation["area"] = area
    strata = evaluate_lesions(data, results).by_size["coco"]
    assert [(name, stratum["n"]) for name, stratum in strata.items()] == [
        *(("small", 2), ("medium", 2), ("large", 2))
    ]
    del data["images"][2]["height"], data["images"][2]["width"]
    assert list(evaluate_lesions(data, results).by_size) == ["coco"]


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 10**6))
def test_thresholds_are_evaluations(random_case, seed):
    data, results = random_case(seed, num_images=4)
    scored = evaluate_lesions(data, results)
    counter, rows = scored.counter, scored.thresholds
    nothing = counter.per_image(counter.above(2))
    assert [row["tau"] for row in rows] == pytest.approx(np.arange(1, 20) * 0.05)
    for row in rows[::3]:
        scored = evaluate_lesions(data, results, tau=row["tau"])
        for group, values in (("lesion", scored.lesion), ("image", scored.image)):
            for name in values.keys() - {"selection", "auroc"}:
                assert row[f"{group}_{name}"] == pytest.approx(values[name], nan_ok=True)
        counts = counter.per_image(counter.above(row["tau"]), nothing)  # from above
        assert counts.union_iou == pytest.approx(scored.counts.union_iou)


def test_a_score_at_a_threshold_is_above_it(dataset, region):
    """0.15, 0.3, 0.35 ... as they are written, not as sums of 0.05 come out."""
    data = dataset(1, [region(1, 0, 0, 10, 10)])
    for tau in (0.15, 0.3, 0.7, *THRESHOLDS[::5]):
        hit = [region(1, 0, 0, 10, 10, score=tau)]
        scored = evaluate_lesions(data, hit, tau=tau, iou_threshold=1)
        assert [row["tau"] for row in scored.thresholds if row["lesion_TP"]][-1] == tau
        assert scored.lesion["TP"] == 1
    # (x + width) - x is a bit less than the width: an overlap just below 1 of what is the same.
    data["annotations"][0]["bbox"] = hit[0]["bbox"] = [0.2, 0.2, 0.5, 0.5]
    strict = {"iou_type": "bbox", "iou_threshold": 1}
    assert evaluate_lesions(data, hit, **strict).lesion["TP"] == 1
