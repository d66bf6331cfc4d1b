"""Metrics by group against evaluations of files that hold the group alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rectangles import rectangles

from imrcnn_d2.evaluation import Bootstrap, OperatingPoint, evaluate_lesions
from imrcnn_d2.evaluation.detection.inputs import read_ground_truth
from imrcnn_d2.evaluation.output import write_results
from imrcnn_d2.evaluation.statistics import clopper_pearson
from imrcnn_d2.evaluation.subgroups import UNKNOWN, By, group_values, parse_by, with_groups


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 10**6), per_patient=st.booleans())
def test_a_group_of_images_is_a_data_set_of_its_own(random_case, seed, per_patient):
    data, results = random_case(seed, num_images=8)
    for image in data["images"]:
        image["centre"] = ("A", "B", None)[image["id"] % 3]
        if per_patient:
            image["patient_id"] = image["id"] // 2
    for result in results:  # so that boxes and masks hit different lesions
        result["bbox"][0] += 3
    settings = {"tau": 0.5, "iou_threshold": 0.6, "iou_type": "bbox"}
    options = {"operating_point": OperatingPoint(0.3, "f1", "val"), "bootstrap": Bootstrap(20, 3)}
    whole = evaluate_lesions(data, results, **settings, **options)
    grouped = with_groups(whole, [By("centre")], **options).by_group["centre"]
    assert grouped.level == "image"
    assert list(grouped.groups) == ["A", "B", UNKNOWN]
    for centre, group in zip(("A", "B", None), grouped.groups.values(), strict=True):
        images = [image for image in data["images"] if image["centre"] == centre]
        ids = {image["id"] for image in images}
        lesions, detected = (
            [record for record in records if record["image_id"] in ids]
            for records in (data["annotations"], results)
        )
        part = {**data, "images": images, "annotations": lesions}
        alone = evaluate_lesions(part, detected, **settings, **options)
        n = {key: alone.meta[key] for key in ("images", "lesions", "patients")}
        assert group.n == {key: number for key, number in n.items() if number is not None}
        assert group.undefined_shares == alone.undefined_shares
        values = {**alone.compared(), "calibration": alone.calibration}
        for ours, theirs in ((group.values, values), (group.intervals, alone.intervals)):
            assert ours.keys() == theirs.keys()
            for level, values in theirs.items():
                for name, value in values.items():
                    assert ours[level][name] == pytest.approx(value, nan_ok=True), (level, name)


def test_masks_without_scores_stay_without(dataset, region):
    """A group without a detection does not turn unscored results into scored ones."""
    data = dataset(2, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)])
    for image, centre in zip(data["images"], "AB", strict=True):
        image["centre"] = centre
    whole = evaluate_lesions(data, [region(1, 0, 0, 10, 10, score=None)])
    groups = with_groups(whole, [By("centre")]).by_group["centre"].groups
    assert np.isnan(groups["B"].values["segm"]["AP50"])
    assert groups["B"].values["lesion"]["recall"] == 0


@pytest.fixture
def sized(dataset):
    """Lesions of 4 mm (hit, IoU 0.8), 5 mm (missed), 12 mm (hit) and unknown size (hit)."""
    text = "1 0 0 10 10; 1 20 0 10 10; 2 0 0 10 10; 3 0 0 10 10; 3 20 0 10 10 crowd"
    data = dataset(3, rectangles(text))
    for annotation, size in zip(data["annotations"], (4, 5, 12.5, None, 40), strict=True):
        annotation["size_mm"] = size
    # (4) a false alarm: of no group
    results = rectangles("1 0 0 8 10 @0.9; 2 0 0 10 10 @0.9; 3 0 0 10 10 @0.9; 3 20 20 10 10 @0.9")
    return data, results


def test_groups_of_lesions(sized):
    whole = evaluate_lesions(*sized)
    grouped = with_groups(whole, [parse_by("size_mm:5,10,20")]).by_group["size_mm"]
    assert grouped.level == "lesion"
    metrics = {name: group.values["lesion"] for name, group in grouped.groups.items()}
    # 40 mm is a crowd.
    recalls = {name: values["recall"] for name, values in metrics.items()}
    assert recalls == {"<5": 100, "5-10": 0, "10-20": 100, UNKNOWN: 100}
    overlaps = {"iou": 80, "iou_box": 80, "iou_all": 80, "dice": 100 * 1.6 / 1.8}
    assert metrics["<5"] == pytest.approx({"TP": 1, "FN": 0, "recall": 100, **overlaps})
    assert np.isnan(metrics["5-10"]["iou"]) and metrics["5-10"]["iou_all"] == 0
    assert grouped.groups["5-10"].n == {"images": 1, "lesions": 1}
    assert grouped.groups["<5"].cases("lesion/recall") == (1, "lesions")


def test_groups_of_lesions_at_the_threshold_of_the_weights(sized):
    data, results = sized
    results[0]["score"] = 0.4
    whole = evaluate_lesions(data, results, operating_point=OperatingPoint(0.3, "f1", "val"))
    groups = with_groups(whole, [parse_by("size_mm:5,10,20")]).by_group["size_mm"].groups
    recalls = {level: values["recall"] for level, values in groups["<5"].values.items()}
    assert recalls == {"lesion": 0, "tau_val.lesion": 100}


def test_every_metric_has_its_denominator(dataset, region):
    """Centre A: 2 images with a lesion, one missed, one lesion-free image with 2 false alarms;
    centre B: one lesion-free image."""
    data = dataset(4, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)])
    for image, centre in zip(data["images"], "AAAB", strict=True):
        image["centre"] = centre
    results = [region(1, 0, 0, 10, 10, score=0.9)]
    results += [region(3, x, 0, 10, 10, score=0.8) for x in (0, 20)]
    groups = with_groups(evaluate_lesions(data, results), [By("centre")]).by_group["centre"].groups
    expected = {
        "lesion/recall": (2, "lesions"),
        "lesion/precision": (3, "detections"),
        "lesion/f1": (4, "lesions and false alarms"),
        "lesion/iou": (1, "lesions found"),
        "lesion/fp_per_image": (3, "images"),
        "lesion/fp_per_lesion_free_image": (1, "lesion-free images"),
        "image/recall": (2, "images with a lesion"),
        "image/specificity": (1, "lesion-free images"),
        "image/auroc": (1, "lesion-free images"),
        "image/miou": (2, "images with a lesion"),
        "segm/AP50": (2, "lesions"),
        "calibration/ece": (3, "detections"),
        "lesion/specificity": None,  # mixes images and detections
    }
    assert {endpoint: groups["A"].cases(endpoint) for endpoint in expected} == expected
    assert groups["B"].cases("image/auroc") == (0, "images with a lesion")
    rows = {(row["level"], row["figure"]): row for row in groups["A"].rows()}
    assert rows["image", "auroc"]["cases"] == 1 and rows["image", "auroc"]["few_cases"]
    assert rows["image", "TP"]["cases"] is None


def test_intervals_of_groups_of_lesions(dataset, region):
    """One lesion per patient, most of them hit: exact intervals of independent cases."""
    data = dataset(60, [region(i, 0, 0, 10, 10) for i in range(1, 61)], patients=range(60))
    classes = ["Is"] * 40 + ["IIa"] * 19 + ["Ip"]
    for annotation, paris in zip(data["annotations"], classes, strict=True):
        annotation["paris"] = paris
    hit = np.array([i % 2 == 0 or i >= 40 for i in range(60)])
    results = [region(i + 1, 0, 0, 10, 10, score=0.9) for i in np.flatnonzero(hit).tolist()]
    bootstrap = Bootstrap(500, 1)
    whole = evaluate_lesions(data, results, bootstrap=bootstrap)
    groups = with_groups(whole, [By("paris")], bootstrap=bootstrap).by_group["paris"].groups
    (weights,) = bootstrap.weights(60)
    expected = [100 * end for end in clopper_pearson(hit[:40].sum(), 40)]
    assert groups["Is"].intervals["lesion"]["recall"] == pytest.approx(expected)
    assert not groups["Is"].undefined_shares
    exact = (100 * 0.025 ** (1 / 19), 100)  # Clopper and Pearson's, of 19 of 19
    assert groups["IIa"].intervals["lesion"]["recall"] == pytest.approx(exact)
    assert groups["IIa"].n == {"images": 19, "lesions": 19, "patients": 19}
    absent = (weights[:, 59] == 0).mean()
    assert groups["Ip"].undefined_shares["lesion.recall"] == pytest.approx(absent)


def truth_of(dataset, values):
    data = dataset(len(values))
    for image, value in zip(data["images"], values, strict=True):
        image["x"] = value
    return read_ground_truth(data)


DATES = [20230104, 20230105, 20230107, 20230111]
DATE_BINS = ["<20230105", "20230105-20230107", "20230107-20230110", ">=20230110"]


@pytest.mark.parametrize(
    ("values", "text", "names", "group"),
    [
        (["b", "a", None, "b"], "x", ["a", "b", UNKNOWN], [1, 0, 2, 1]),
        ([True, False, None, True], "x", ["false", "true", UNKNOWN], [1, 0, 2, 1]),
        ([1, 10, 2, None], "x:each", ["1", "2", "10", UNKNOWN], [0, 2, 1, 3]),
        ([5, 4.9, 10, None], "x:5,10", ["<5", "5-10", ">=10", UNKNOWN], [1, 0, 2, 3]),
        ([5, 5, 7, 9], "x:5,10", ["5-10"], [0, 0, 0, 0]),
        ([-3, 0, 0.5, 2], "x:-1,.5", ["<-1", "-1-0.5", ">=0.5"], [0, 1, 2, 2]),
        (DATES, "x:20230105,20230107,20230110", DATE_BINS, [0, 1, 2, 3]),
        (["a", UNKNOWN, None, "z"], "x", ["a", "z", UNKNOWN], [0, 2, 2, 1]),
        ([3, "a", 3, "3"], "x", ["3", "a"], [0, 1, 0, 0]),
        (range(30), "x:each", [f"{i}" for i in range(30)], list(range(30))),
    ],
)
def test_values_and_their_groups(dataset, values, text, names, group):
    level, got, numbers = group_values(truth_of(dataset, values), parse_by(text))
    assert (level, got, numbers.tolist()) == ("image", names, group)


@pytest.mark.parametrize(
    ("values", "text", "message"),
    [
        ([1, 2, 3, 4], "x", "'x' .* 1 to 4"),
        *((["a", "b"], "x:5", "'x' .*'a'"), ([True, False], "x:5", "'x' .*True")),
        *(([None] * 4, "x", "'x'.*file_name"), ([1, 2, 3, 4], "y", "'y'.* x;")),
        *((["a", ["b"]], "x", r"'x' .*\['b'\]"), (["a", {"b": 1}], "x", "'x' .*{'b': 1}")),
        (range(31), "x:each", "'x' has 31 groups"),
    ],
)
def test_columns_that_do_not_group(dataset, values, text, message):
    with pytest.raises(ValueError, match=message):
        group_values(truth_of(dataset, values), parse_by(text))


def test_what_is_requested(dataset, region):
    assert parse_by("centre") == By("centre")
    assert parse_by("size:5,10") == By("size", (5.0, 10.0))
    assert parse_by("a:b") == By("a:b")  # a column's name
    assert parse_by("a:b:each") == By("a:b", each=True)
    for wrong in ("size:10,5", "size:5,5"):
        with pytest.raises(ValueError, match=wrong):
            parse_by(wrong)
    data = dataset(1, [region(1, 0, 0, 10, 10, age="a")])
    data["images"][0]["age"] = 5
    with pytest.raises(ValueError, match="both have 'age'"):
        group_values(read_ground_truth(data), By("age"))
    del data["annotations"][0]["age"]
    with pytest.raises(ValueError, match="'age'.* twice"):
        with_groups(evaluate_lesions(data, []), [parse_by("age:4"), parse_by("age:5")])


def test_files(sized, tmp_path):
    data, results = sized
    for image in data["images"]:
        image["centre"] = "A" if image["id"] < 3 else "B"
    bootstrap = Bootstrap(50)
    whole = evaluate_lesions(data, results, bootstrap=bootstrap)
    bys = [By("centre"), parse_by("size_mm:5")]
    write_results(with_groups(whole, bys, bootstrap=bootstrap), tmp_path)
    document = json.loads((tmp_path / "metrics.json").read_text())["by_group"]
    a = document["centre"]["groups"]["A"]
    assert a["n"] == {"images": 2, "lesions": 3} and document["centre"]["level"] == "image"
    assert a["lesion"]["recall"] == pytest.approx(200 / 3)
    assert 0 < document["size_mm"]["groups"]["<5"]["undefined_shares"]["lesion.recall"] < 1
    lines = (tmp_path / "by_group.csv").read_text().splitlines()
    columns = "column,of,group,images,lesions,level,figure,value,low,high"
    assert lines[0] == f"{columns},cases,cases_are,few_cases"
    low, high = a["lesion"]["recall_ci"]
    recall = f"centre,image,A,2,3,lesion,recall,{a['lesion']['recall']},{low},{high}"
    assert f"{recall},3,lesions,True" in lines
    assert "size_mm,lesion,>=5,2,2,lesion,recall,50.0," in "\n".join(lines)
    assert "centre,image,B,1,1,segm,APl,,,,,," in lines
