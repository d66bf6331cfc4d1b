"""The files of an evaluation, and the log of test sets."""

import csv
import hashlib
import json
import math
import os
import re
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from rectangles import rectangles

from imrcnn_d2.evaluation import Bootstrap, OperatingPoint, evaluate_lesions
from imrcnn_d2.evaluation.detection.inputs import mask_areas, read_results
from imrcnn_d2.evaluation.output import (
    coco_results,
    log_test_evaluation,
    read_test_log,
    write_evaluation,
    write_results,
)
from imrcnn_d2.utils.files import write_atomically


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def scored(dataset, region):
    data = dataset(3, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)], patients=["a", "a", "b"])
    data["images"][0] = dict(reversed(data["images"][0].items()))
    data["images"][1]["centre"] = 'a, "b" ü'  # only one image has the field
    results = rectangles("1 0 0 10 10 @0.9; 1 20 0 10 10 @0.8; 2 0 0 10 8 @0.25")
    return evaluate_lesions(data, results)


@pytest.fixture(scope="module")
def paths(scored, tmp_path_factory):
    return write_results(scored, tmp_path_factory.mktemp("out") / "new", dataset="three")


def test_metrics_are_strict_json(scored, paths):
    written = json.loads(paths["metrics.json"].read_text(), parse_constant=refuse)
    assert list(written)[:5] == ["bbox", "segm", "lesion", "image", "patient"]
    for group, values in scored.groups().items():
        expected = {name: None if math.isnan(v) else v for name, v in values.items()}
        assert written[group] == expected
    assert written["segm"]["APl"] is None
    assert {"dataset": "three", "tau": 0.7, "images": 3}.items() <= written["meta"].items()
    assert written["meta"]["versions"]["pycocotools"]
    assert {path.name for path in paths["metrics.json"].parent.iterdir()} == set(paths)


# Columns of tables, as they are written.
TABLES = {
    "per_image.csv": {
        **{"image_id": "1 2 3", "file_name": "1.png 2.png 3.png", "patient_id": "a a b"},
        **{"TP": "1 0 0", "FP": "1 0 0", "score": "0.9 0.25 0.0", "union_iou": "50.0 0.0 -"},
        **{"n_gt": "1 1 0", "n_det": "2 0 0", "FN": "0 1 0", "image_outcome": "TP FN TN"},
    },
    "per_patient.csv": {
        **{"patient_id": "a b", "images": "2 1", "n_gt": "2 0", "TP": "1 0"},
        **{"patient_outcome": "TP TN", "iou": "100.0 -"},
    },
    "pr_curve.csv": {
        **{"score": "0.9 0.8 0.25", "class": "lesion lesion lesion", "n_gt": "2 2 2"},
        **{"tp": "1 1 2", "fp": "0 1 1", "recall": "50.0 50.0 100.0"},
        **{"precision": "100.0 50.0 66.66", "precision_envelope": "100.0 66.66 66.66"},
    },
    "froc.csv": {
        **{"score": "0.9 0.8 0.25", "tp": "1 1 2", "fp": "0 1 1"},
        **{"sensitivity": "50.0 50.0 100.0", "fp_per_image": "0.0 0.33 0.33"},
    },
    "calibration.csv": {
        "lower": "0.0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9",
        **{"detections": "0 0 1 0 0 0 0 1 1 0", "hit_rate": "- - 100.0 - - - - 0.0 100.0 -"},
    },
    "confusion_matrix.csv": {
        **{"truth": "lesion background", "lesion": "1 1", "background": "1 -"}
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(paths, name):
    rows = [row for row in rows_of(paths[name]) if row.get("iou_type") in (None, "segm")]
    for column, text in TABLES[name].items():
        cells = [row[column] or "-" for row in rows]
        short = [re.sub(r"(\.\d\d)\d+", r"\1", cell) for cell in cells]
        assert " ".join(short) == text, column


def test_further_rows(paths):
    assert [row["centre"] for row in rows_of(paths["per_image.csv"])] == ["", 'a, "b" ü', ""]
    tp = {row["tau"]: float(row["lesion_TP"]) for row in rows_of(paths["thresholds.csv"])}
    assert len(tp) == 19
    assert [tp[tau] for tau in ("0.05", "0.25", "0.3", "0.95")] == [2, 2, 1, 0]
    sizes = {(row["scale"], row["size"]): row for row in rows_of(paths["by_size.csv"])}
    assert sizes["coco", "small"]["n"] == "2.0"
    assert sizes["share_of_image", "5-15 %"]["recall"] == "50.0"


def test_intervals_stand_next_to_their_metrics(dataset, region, tmp_path):
    lesions = [region(i, 0, 0, 10, 10, category_id=1 + i % 2) for i in (1, 2, 3)]
    data = dataset(4, lesions, classes=("a", "b"))
    results = [region(i, 0, 0, 10, 7 + i, category_id=1 + i % 2, score=1 - i / 10) for i in (1, 2)]
    point = OperatingPoint(0.8, "f1", "val")
    scored = evaluate_lesions(data, results, operating_point=point, bootstrap=Bootstrap(50))
    paths = write_results(scored, tmp_path)
    assert "per_patient.csv" not in paths
    written = json.loads(paths["metrics.json"].read_text(), parse_constant=refuse)
    assert {"tau": 0.8, "rule": "f1", "dataset": "val"}.items() <= written["tau_val"].items()
    counts = [[1, 0, 0], [0, 1, 1], [0, 0, None]]
    assert written["confusion_matrix"] == {"classes": ["a", "b", "background"], "counts": counts}
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
    unscored = replace(detections, scored=False, regions=replace(detections.regions, masks=None))
    again = read_results(json.loads(json.dumps(coco_results(unscored, gt))), gt)
    assert not again.scored and again.score.tolist() == [1, 1, 1] and again.regions.masks is None


def test_sources(scored, tmp_path, monkeypatch):
    (tmp_path / "gt.json").write_bytes(b"{}\n")
    monkeypatch.chdir(tmp_path)
    write_evaluation(scored, tmp_path, gt="gt.json", dt="dt.json", checkpoint="c")
    before = (tmp_path / "metrics.json").read_text()
    meta = json.loads(before)["meta"]
    assert {key: meta[key] for key in list(meta)[:6]} == {
        "gt": str(tmp_path / "gt.json"),
        # sha256sum's
        "gt_sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
        **{"image_root": None, "dt": str(tmp_path / "dt.json")},
        **{"checkpoint": "c", "checkpoint_sha256": None},
    }
    with pytest.raises(TypeError):  # what no JSON can hold leaves the old file
        write_results(scored, tmp_path, note=object())
    assert (tmp_path / "metrics.json").read_text() == before


def test_writes_are_whole_or_nothing(tmp_path):
    """Links in the way are not followed; a write that fails leaves the old file."""
    mine, path = tmp_path / "mine", tmp_path / "metrics.json"
    mine.write_text("mine")
    for name in ("metrics.json", "metrics.json.tmp"):
        (tmp_path / name).symlink_to(mine)
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert (mine.read_text(), path.read_text()) == ("mine", "old")
    write_atomically(path, b"newer")
    longest = 127 * "ü" + "a"
    write_atomically(tmp_path / longest, "")
    assert path.read_text() == "newer"
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.json", "mine", longest}


@pytest.fixture
def root(tmp_path):
    """A prepared data set, as far as the log sees it."""
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    (tmp_path / "set" / "splits.json").write_text("{}")
    return tmp_path / "set"


def test_each_evaluation_of_a_test_set_is_a_line(root, tmp_path):
    gt = root / "annotations" / "test.json"
    before = datetime.now(timezone.utc) - timedelta(seconds=1)  # the log has whole seconds
    digests = [hashlib.sha256(bytes([i])).hexdigest() for i in range(2)]
    for digest in digests:
        log_test_evaluation(gt, source="a, b.pth", sha256=digest, output=tmp_path / "out")
    log_test_evaluation(str(gt), source="masks", sha256=None, output="out")
    rows = rows_of(root / "test_evaluations.csv")
    assert [row["sha256"] for row in rows] == [*digests, ""]
    assert read_test_log(gt) == rows
    assert rows[0]["what"].endswith("/a, b.pth") and rows[0]["output"] == str(tmp_path / "out")
    date = datetime.fromisoformat(rows[-1]["date"])
    assert before <= date <= datetime.now(timezone.utc)


def test_only_the_test_part_of_a_prepared_data_set_is_logged(root, tmp_path):
    foreign = tmp_path / "annotations" / "test.json"
    for gt in (root / "annotations" / "val.json", root / "test.json", foreign, None):
        log_test_evaluation(gt, source="x", sha256="y", output="z")
        assert read_test_log(gt) == []
    assert not list(tmp_path.rglob("test_evaluations.csv"))


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_cannot_be_written_to_is_warned_of(root, caplog, kind):
    gt, log = root / "annotations" / "test.json", root / "test_evaluations.csv"
    if kind == "folder":
        log.mkdir()  # also root cannot append to a folder
    elif kind == "link":  # as a data set from elsewhere may hold one, to any file
        log.symlink_to(root / "splits.json")
    else:
        os.mkfifo(log)
    log_test_evaluation(gt, source="x", sha256="y", output="z")
    assert (root / "splits.json").read_text() == "{}"
    assert str(log) in caplog.text
    assert caplog.records[0].levelname == "WARNING"
