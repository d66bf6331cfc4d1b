"""Figures by group against evaluations of files that hold the group alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.detection.inputs import read_ground_truth
from imrcnn_d2.evaluation.detection.results import OperatingPoint
from imrcnn_d2.evaluation.output import write_results
from imrcnn_d2.evaluation.subgroups import UNKNOWN, By, group_values, parse_by, with_groups


def filtered(data, results, keep):
    """The data and results of the images for which `keep` of their record is true."""
    images = [image for image in data["images"] if keep(image)]
    ids = {image["id"] for image in images}
    own = [a for a in data["annotations"] if a["image_id"] in ids]
    return {**data, "images": images, "annotations": own}, [
        result for result in results if result["image_id"] in ids
    ]


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, nan_ok=True), name


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), per_patient=st.booleans())
def test_a_group_of_images_is_a_data_set_of_its_own(random_case, seed, per_patient):
    data, results = random_case(seed, num_images=8)
    for image in data["images"]:
        image["centre"] = ("A", "B", None)[image["id"] % 3]
        if per_patient:
            image["patient_id"] = image["id"] // 2
    how = {"operating_point": OperatingPoint(0.3, "f1", "val"), "bootstrap": Bootstrap(20, 3)}
    whole = evaluate_lesions(data, results, tau=0.5, **how)
    grouped = with_groups(whole, [By("centre")], **how).by_group["centre"]
    assert grouped.level == "image"
    assert list(grouped.groups) == ["A", "B", UNKNOWN]
    for name, group in grouped.groups.items():
        centre = None if name == UNKNOWN else name
        part = filtered(data, results, lambda image: image["centre"] == centre)  # noqa: B023
        alone = evaluate_lesions(*part, tau=0.5, **how)
        assert group.n["images"] == len(part[0]["images"])
        assert group.n["lesions"] == alone.meta["lesions"]
        assert group.n.get("patients") == alone.meta["patients"]
        for level, figures in alone.compared().items():
            assert_same(group.values[level], figures)
        for level, intervals in alone.intervals.items():
            assert_same(group.intervals[level], intervals)


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
def sized(dataset, region):
    """Lesions of 4 mm (found, IoU 0.8), 5 mm (missed), 12 mm (found) and unknown size (found)."""
    data = dataset(
        3,
        [
            region(1, 0, 0, 10, 10, size_mm=4),
            region(1, 20, 0, 10, 10, size_mm=5),
            region(2, 0, 0, 10, 10, size_mm=12.5),
            region(3, 0, 0, 10, 10),
            region(3, 20, 0, 10, 10, size_mm=40, iscrowd=1),
        ],
    )
    results = [
        region(1, 0, 0, 8, 10, score=0.9),
        region(2, 0, 0, 10, 10, score=0.9),
        region(3, 0, 0, 10, 10, score=0.9),
        region(3, 20, 20, 10, 10, score=0.9),  # a false alarm: of no group
    ]
    return data, results


def test_groups_of_lesions(sized):
    whole = evaluate_lesions(*sized)
    grouped = with_groups(whole, [parse_by("size_mm:5,10,20")]).by_group["size_mm"]
    assert grouped.level == "lesion"
    figures = {name: group.values["lesion"] for name, group in grouped.groups.items()}
    assert list(figures) == ["<5", "5-10", "10-20", UNKNOWN]  # 40 mm is a crowd
    assert [own["recall"] for own in figures.values()] == [100, 0, 100, 100]
    assert figures["<5"]["iou"] == pytest.approx(80)
    assert figures["<5"]["dice"] == pytest.approx(100 * 1.6 / 1.8)
    assert np.isnan(figures["5-10"]["iou"]) and figures["5-10"]["iou_all"] == 0
    assert set(figures["<5"]) == {"recall", "iou", "iou_box", "iou_all", "dice"}
    assert grouped.groups["5-10"].n == {"images": 1, "lesions": 1}


def test_intervals_of_groups_of_lesions(dataset, region):
    """One lesion an image, a third of them found: as resampling shares by hand."""
    number = 60
    data = dataset(number, [region(i, 0, 0, 10, 10) for i in range(1, number + 1)])
    for annotation in data["annotations"]:
        annotation["paris"] = "Is" if annotation["image_id"] <= 40 else "IIa"
    found = [i for i in range(1, 41) if i % 2] + list(range(41, 61))
    results = [region(i, 0, 0, 10, 10, score=0.9) for i in found]
    bootstrap = Bootstrap(500, 1)
    whole = evaluate_lesions(data, results, bootstrap=bootstrap)
    groups = with_groups(whole, [By("paris")], bootstrap=bootstrap).by_group["paris"].groups
    (weights,) = bootstrap.weights(number)
    hit = np.isin(np.arange(1, 41), found)
    recall = 100 * (weights[:, :40] @ hit) / weights[:, :40].sum(axis=1)
    assert groups["Is"].intervals["lesion"]["recall"] == pytest.approx(
        tuple(np.percentile(recall, (2.5, 97.5)))
    )
    exact = (100 * 0.025 ** (1 / 20), 100)  # Clopper and Pearson's, of 20 of 20
    assert groups["IIa"].intervals["lesion"]["recall"] == pytest.approx(exact)
    assert groups["IIa"].n == {"images": 20, "lesions": 20}


def test_a_group_that_resamples_may_miss(sized):
    whole = evaluate_lesions(*sized)
    by = [parse_by("size_mm:5")]
    grouped = with_groups(whole, by, bootstrap=Bootstrap(300)).by_group["size_mm"].groups
    share = grouped["<5"].undefined_shares["lesion.recall"]
    assert share == pytest.approx((2 / 3) ** 3, abs=0.1)
    assert set(grouped["<5"].undefined_shares) == {
        f"lesion.{figure}" for figure in ("recall", "iou", "iou_box", "iou_all", "dice")
    }


@pytest.mark.parametrize(
    ("values", "text", "names", "group"),
    [
        (["b", "a", None, "b"], "x", ["a", "b", UNKNOWN], [1, 0, 2, 1]),
        ([True, False, None, True], "x", ["false", "true", UNKNOWN], [1, 0, 2, 1]),
        ([1, 10, 2, None], "x:each", ["1", "2", "10", UNKNOWN], [0, 2, 1, 3]),
        ([5, 4.9, 10, None], "x:5,10", ["<5", "5-10", ">=10", UNKNOWN], [1, 0, 2, 3]),
        ([5, 5, 7, 9], "x:5,10", ["5-10"], [0, 0, 0, 0]),
        ([-3, 0, 0.5, 2], "x:-1,.5", ["<-1", "-1-0.5", ">=0.5"], [0, 1, 2, 2]),
        (
            [20230104, 20230105, 20230107, 20230111],
            "x:20230105,20230107,20230110",
            ["<20230105", "20230105-20230107", "20230107-20230110", ">=20230110"],
            [0, 1, 2, 3],
        ),
        (["a", UNKNOWN, None, "z"], "x", ["a", "z", UNKNOWN], [0, 2, 2, 1]),
        ([3, "a", 3, "3"], "x", ["3", "a"], [0, 1, 0, 0]),
    ],
)
def test_values_and_their_groups(dataset, values, text, names, group):
    data = dataset(4)
    for image, value in zip(data["images"], values, strict=True):
        image["x"] = value
    level, got, of = group_values(read_ground_truth(data), parse_by(text))
    assert (level, got, of.tolist()) == ("image", names, group)


@pytest.mark.parametrize(
    ("values", "text", "message"),
    [
        (
            [1, 2, 3, 4],
            "x",
            "numbers from 1 to 4: give the limits of bins, such as x:5,10,20",
        ),
        (["a", "b", "a", "a"], "x:5", "has the value 'a': bins are for numbers"),
        ([True, False, True, True], "x:5", "has the value True: bins are for numbers"),
        ([None] * 4, "x", "No image and no annotation has a value of 'x'. Images have .*file_name"),
        ([["a"], "a", "b", "c"], "x", r"has the value \['a'\]"),
        ([1, 2, 3, 4], "y", "No image and no annotation has a value of 'y'. Images have .* x; "),
    ],
)
def test_columns_that_do_not_group(dataset, values, text, message):
    data = dataset(4)
    for image, value in zip(data["images"], values, strict=True):
        image["x"] = value
    with pytest.raises(ValueError, match=message):
        group_values(read_ground_truth(data), parse_by(text))


def test_a_column_is_grouped_by_once(dataset):
    data = dataset(1)
    data["images"][0]["age"] = 5
    with pytest.raises(ValueError, match="'age' is to be grouped by twice"):
        with_groups(evaluate_lesions(data, []), [parse_by("age:4"), parse_by("age:5")])


def test_too_many_groups_and_a_column_on_both_levels(dataset, region):
    data = dataset(40, [region(1, 0, 0, 10, 10, name="a")])
    for image in data["images"]:
        image["name"] = f"n{image['id']}"
    with pytest.raises(ValueError, match="Images and annotations both have 'name'"):
        group_values(read_ground_truth(data), By("name"))
    del data["annotations"][0]["name"]
    with pytest.raises(ValueError, match="'name' has 40 groups, more than the 30"):
        group_values(read_ground_truth(data), By("name"))


def test_what_is_asked_for():
    assert parse_by("centre") == By("centre")
    assert parse_by("size:5,10") == By("size", (5.0, 10.0))
    assert parse_by("a:b") == By("a:b")  # a column's name
    assert parse_by("a:b:each") == By("a:b", each=True)
    for wrong in ("size:10,5", "size:5,5"):
        with pytest.raises(ValueError, match="the limits of bins must rise"):
            parse_by(wrong)


def test_files(sized, tmp_path):
    data, results = sized
    for image in data["images"]:
        image["centre"] = "A" if image["id"] < 3 else "B"
    bootstrap = Bootstrap(50)
    whole = evaluate_lesions(data, results, bootstrap=bootstrap)
    bys = [By("centre"), parse_by("size_mm:5")]
    write_results(with_groups(whole, bys, bootstrap=bootstrap), tmp_path)
    document = json.loads((tmp_path / "metrics.json").read_text())["by_group"]
    assert list(document) == ["centre", "size_mm"]
    a = document["centre"]["groups"]["A"]
    assert a["n"] == {"images": 2, "lesions": 3}
    assert a["lesion"]["recall"] == pytest.approx(200 / 3) and len(a["lesion"]["recall_ci"]) == 2
    assert document["size_mm"]["groups"]["<5"]["lesion"]["recall"] == 100
    lines = (tmp_path / "by_group.csv").read_text().splitlines()
    assert lines[0] == "column,of,group,images,lesions,level,figure,value,low,high"
    low, high = a["lesion"]["recall_ci"]
    recall = a["lesion"]["recall"]
    assert f"centre,image,A,2,3,lesion,recall,{recall},{low},{high}" in lines
    assert "size_mm,lesion,>=5,2,2,lesion,recall,50.0," in "\n".join(lines)
    assert "centre,image,B,1,1,segm,APl,,," in lines
