import csv
import json
import math
from dataclasses import replace

import pytest

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.inputs import mask_areas, read_results
from imrcnn_d2.evaluation.detection.results import OperatingPoint
from imrcnn_d2.evaluation.output import coco_results, write_evaluation, write_results
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.utils.files import write_atomically


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


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_other_tables(paths):
    first, second = rows_of(paths["per_patient.csv"])
    assert (first["patient_id"], first["images"], first["n_gt"], first["TP"]) == (
        "a",
        "2",
        "2",
        "1",
    )
    assert (second["patient_id"], second["patient_outcome"], second["iou"]) == ("b", "TN", "")
    froc = rows_of(paths["froc.csv"])
    assert [(row["score"], row["tp"], row["fp"]) for row in froc] == [
        ("0.9", "1", "0"),
        ("0.8", "1", "1"),
        ("0.25", "2", "1"),
    ]
    assert [float(row["sensitivity"]) for row in froc] == [50, 50, 100]
    assert [float(row["fp_per_image"]) for row in froc] == pytest.approx([0, 1 / 3, 1 / 3])
    bins = rows_of(paths["calibration.csv"])
    assert [row["lower"] for row in bins[:4]] == ["0.0", "0.1", "0.2", "0.3"]
    assert [row["detections"] for row in bins] == list("0010000110")
    assert (bins[2]["hit_rate"], bins[0]["hit_rate"]) == ("100.0", "")
    thresholds = {row["tau"]: row for row in rows_of(paths["thresholds.csv"])}
    assert len(thresholds) == 19
    assert [thresholds[tau]["lesion_TP"] for tau in ("0.05", "0.25", "0.3", "0.95")] == [
        "2.0",
        "2.0",
        "1.0",
        "0.0",
    ]
    sizes = {(row["scale"], row["size"]): row for row in rows_of(paths["by_size.csv"])}
    assert sizes["coco", "small"]["n"] == "2.0"
    assert sizes["share_of_image", "5-15 %"]["recall"] == "50.0"
    assert rows_of(paths["confusion_matrix.csv"]) == [
        {"truth": "lesion", "lesion": "1", "background": "1"},
        {"truth": "background", "lesion": "1", "background": ""},
    ]


def test_intervals_stand_beside_their_figures(dataset, region, tmp_path):
    data = dataset(
        4,
        [region(i, 0, 0, 10, 10, category_id=1 + i % 2) for i in (1, 2, 3)],
        classes=("a", "b"),
    )
    results = [region(i, 0, 0, 10, 7 + i, category_id=1 + i % 2, score=1 - i / 10) for i in (1, 2)]
    point = OperatingPoint(0.8, "f1", "val")
    scored = evaluate_lesions(data, results, operating_point=point, bootstrap=Bootstrap(50))
    paths = write_results(scored, tmp_path)
    assert "per_patient.csv" not in paths
    written = json.loads(paths["metrics.json"].read_text(), parse_constant=refuse)
    assert {key: written["tau_val"][key] for key in ("tau", "rule", "dataset")} == {
        "tau": 0.8,
        "rule": "f1",
        "dataset": "val",
    }
    assert written["confusion_matrix"] == {
        "classes": ["a", "b", "background"],
        "counts": [[1, 0, 0], [0, 1, 1], [0, 0, None]],
    }
    assert list(written["by_class"]) == ["a", "b"]
    small = written["by_size"]["coco"]["small"]
    groups = (written["lesion"], written["tau_val"]["image"], written["by_class"]["b"], small)
    for group in groups:
        low, high = group["recall_ci"]
        assert low <= group["recall"] <= high
    assert written["by_size"]["coco"]["large"]["recall_ci"] == [None, None]  # there is none
    assert "n_ci" not in small and "n_ci" not in written["calibration"]
    assert written["by_class"]["a"]["recall_ci"][1] == 100
    assert written["froc"]["mean_ci"][0] < written["froc"]["mean"]
    assert written["calibration"]["brier_ci"][0] <= written["calibration"]["brier"]
    row = next(row for row in rows_of(paths["by_size.csv"]) if row["size"] == "small")
    assert float(row["recall_low"]) == small["recall_ci"][0]


def test_coco_results_are_what_was_read(scored):
    gt, detections = scored.ground_truth, scored.detections
    again = read_results(json.loads(json.dumps(coco_results(detections, gt))), gt)
    assert again.scored and again.score.tolist() == detections.score.tolist()
    assert again.regions.boxes.tolist() == detections.regions.boxes.tolist()
    assert mask_areas(again.regions.masks).tolist() == [100, 100, 80]
    unscored = replace(detections, scored=False)
    again = read_results(json.loads(json.dumps(coco_results(unscored, gt))), gt)
    assert not again.scored and again.score.tolist() == [1, 1, 1]


def test_sources(scored, tmp_path, monkeypatch):
    (tmp_path / "gt.json").write_bytes(b"{}\n")
    monkeypatch.chdir(tmp_path)
    write_evaluation(scored, tmp_path, gt="gt.json", dt="dt.json", checkpoint="c")
    meta = json.loads((tmp_path / "metrics.json").read_text())["meta"]
    assert {key: meta[key] for key in list(meta)[:6]} == {
        "gt": str(tmp_path / "gt.json"),
        # sha256sum's
        "gt_sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
        "image_root": None,
        "dt": str(tmp_path / "dt.json"),
        "checkpoint": "c",
        "checkpoint_sha256": None,
    }


def test_a_link_in_the_way_is_not_followed(tmp_path):
    own = tmp_path / "own"
    own.write_text("mine")
    for name in ("figures.json", "figures.json.tmp"):
        (tmp_path / name).symlink_to(own)
    write_atomically(tmp_path / "figures.json", "new")
    assert (own.read_text(), (tmp_path / "figures.json").read_text()) == ("mine", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "own"]


def test_the_longest_name(tmp_path):
    name = 127 * "ü" + "a"
    write_atomically(tmp_path / name, "new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_is_left_beside_the_files(paths):
    names = {path.name for path in paths["metrics.json"].parent.iterdir()}
    assert names == set(paths)


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
