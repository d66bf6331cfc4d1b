import csv
import json
import math

import pytest

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.files import write_atomically, write_results


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(scope="module")
def scored(dataset, region):
    data = dataset(3, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)], patients=["a", "a", "b"])
    data["images"][0] = dict(reversed(data["images"][0].items()))
    data["images"][1]["centre"] = 'a, "b" ü'  # only one image has the field
    results = [
        region(1, 0, 0, 10, 10, score=0.9),
        region(1, 20, 0, 10, 10, score=0.8),
        region(2, 0, 0, 10, 8, score=0.25),
    ]
    return evaluate_lesions(data, results)


@pytest.fixture(scope="module")
def paths(scored, tmp_path_factory):
    return write_results(scored, tmp_path_factory.mktemp("out") / "new", dataset="three")


def test_metrics_are_strict_json(scored, paths):
    written = json.loads(paths["metrics.json"].read_text(), parse_constant=refuse)
    assert list(written)[:5] == ["bbox", "segm", "lesion", "image", "patient"]
    for group, figures in scored.groups().items():
        for name, figure in figures.items():
            expected = None if math.isnan(figure) else figure
            assert written[group][name] == expected
    assert written["segm"]["APl"] is None
    assert written["meta"]["dataset"] == "three"
    assert written["meta"]["tau"] == 0.7
    assert written["meta"]["images"] == 3
    assert written["meta"]["versions"]["pycocotools"]


def test_per_image_has_a_row_an_image(paths):
    with paths["per_image.csv"].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:2] == ["image_id", "file_name"]
    assert [row["file_name"] for row in rows] == ["1.png", "2.png", "3.png"]
    assert [row["patient_id"] for row in rows] == ["a", "a", "b"]
    assert [row["centre"] for row in rows] == ["", 'a, "b" ü', ""]
    assert [row["TP"] for row in rows] == ["1", "0", "0"]
    assert [row["FP"] for row in rows] == ["1", "0", "0"]
    assert [row["score"] for row in rows] == ["0.9", "0.25", "0.0"]
    assert [row["union_iou"] for row in rows] == ["50.0", "0.0", ""]


def test_pr_curve_has_a_row_a_detection(paths):
    with paths["pr_curve.csv"].open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["iou_type"] == "segm"]
    assert [row["score"] for row in rows] == ["0.9", "0.8", "0.25"]
    assert [row["class"] for row in rows] == ["lesion"] * 3
    assert [(row["tp"], row["fp"], row["n_gt"]) for row in rows] == [
        ("1", "0", "2"),
        ("1", "1", "2"),
        ("2", "1", "2"),
    ]
    assert [float(row["precision"]) for row in rows] == pytest.approx([100, 50, 200 / 3])
    assert [float(row["precision_envelope"]) for row in rows] == pytest.approx(
        [100, 200 / 3, 200 / 3]
    )
    assert [float(row["recall"]) for row in rows] == pytest.approx([50, 50, 100])


def test_nothing_is_left_beside_the_files(paths):
    names = {path.name for path in paths["metrics.json"].parent.iterdir()}
    assert names == {"metrics.json", "per_image.csv", "pr_curve.csv"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "figures.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    write_atomically(path, b"newer")
    assert path.read_text() == "newer"
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


def test_figures_that_no_json_can_hold_leave_the_old_file(scored, tmp_path):
    write_results(scored, tmp_path, note="first")
    with pytest.raises(TypeError):
        write_results(scored, tmp_path, note=object())
    assert json.loads((tmp_path / "metrics.json").read_text())["meta"]["note"] == "first"
