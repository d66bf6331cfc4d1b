"""The evaluator gives what evaluate_classification does, whatever the processes and padding."""

import csv
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from imrcnn_d2.data.catalog import register_classification_dataset
from imrcnn_d2.evaluation import Bootstrap, ClassificationEvaluator, evaluate_classification

NAME = "evaluator_recognition_test"
LABELS = [0, 1, 2, 0, 1, 2, 2, 1]


@pytest.fixture
def gt(tmp_path):
    """A registered data set of eight images of three classes, the first of them cancer."""
    names = ("early gastric cancer", "ulcer", "gastritis")
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 9, "height": 9, "centre": "A"}
            for i in range(1, 9)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 5 + label} for i, label in enumerate(LABELS, 1)
        ],
        "categories": [
            {"id": 5 + k, "name": name, "supercategory": "benign" if k else "cancer"}
            for k, name in enumerate(names)
        ],
    }
    path = tmp_path / "annotations" / "test.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    register_classification_dataset(NAME, path, tmp_path / "images")
    yield path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def probability():
    scores = np.random.default_rng(0).random((8, 3)) + 0.4 * np.eye(3)[LABELS]
    return torch.tensor(scores / scores.sum(axis=1, keepdims=True), dtype=torch.float32)


def outputs(evaluator, probability, images):
    evaluator.reset()
    for i in images:
        evaluator.process([{"image_id": i}], [{"scores": probability[i - 1]}])
    return evaluator.evaluate()


def test_files_and_figures(gt, probability, tmp_path):
    out = tmp_path / "out"
    evaluator = ClassificationEvaluator(
        NAME, output_dir=out, bootstrap=Bootstrap(40), meta={"checkpoint": "best.pth"}
    )
    figures = outputs(evaluator, probability, [3, 1, 2, 8, 7, 6, 5, 4, 4, 3])  # a padded batch
    results = [
        {"image_id": i, "scores": row.double().tolist()} for i, row in enumerate(probability, 1)
    ]
    scored = evaluate_classification(gt, results)
    assert figures == scored.groups()
    assert all(isinstance(v, float) for group in figures.values() for v in group.values())

    written = json.loads((out / "metrics.json").read_text())
    assert written["recognition"]["top1"] == figures["recognition"]["top1"]
    low, high = written["recognition"]["balanced_accuracy_ci"]
    assert low <= figures["recognition"]["balanced_accuracy"] <= high
    assert written["confusion_matrix"]["counts"] == scored.confusion.rows()
    assert written["calibration"]["ece"] == scored.calibration["ece"]
    meta = written["meta"]
    assert (meta["task"], meta["dataset"], meta["checkpoint"]) == ("recognition", NAME, "best.pth")
    assert meta["images_of_class"] == [2, 3, 3] and meta["cancer_classes"] == [
        "early gastric cancer"
    ]
    assert evaluate_classification(meta["gt"], meta["dt"]).groups() == figures

    with open(out / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_id"] for row in rows] == [str(i) for i in range(1, 9)]
    assert {row["centre"] for row in rows} == {"A"}
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert right == sum(row["outcome"] == "right" for row in rows)
    assert figures["recognition"]["top1"] == 100 * right / 8
    with open(out / "confusion_matrix.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(rows[1][name]) for name in meta["classes"]] == scored.confusion.rows()[1]


def test_processes_share_the_images(gt, probability, monkeypatch):
    alone = outputs(ClassificationEvaluator(NAME), probability, range(1, 9))
    parts = []
    for images in (range(1, 6), range(5, 9)):
        evaluator = ClassificationEvaluator(NAME)
        monkeypatch.setattr(comm, "gather", lambda own, dst: parts.append(own) or [[]])
        monkeypatch.setattr(comm, "is_main_process", lambda: False)
        assert outputs(evaluator, probability, images) == {}
    monkeypatch.setattr(comm, "gather", lambda own, dst: parts)
    monkeypatch.setattr(comm, "is_main_process", lambda: True)
    assert outputs(evaluator, probability, []) == alone


def test_errors_say_what_to_do(gt, probability):
    with pytest.raises(ValueError, match="set MODEL.CLASSIFIER.NUM_CLASSES"):
        outputs(ClassificationEvaluator(NAME), probability[:, :2], range(1, 9))
    with pytest.raises(ValueError, match="lack 1 of the 8 images"):
        outputs(ClassificationEvaluator(NAME), probability, range(1, 8))
    DatasetCatalog.register("no_file", lambda: [])
    try:
        with pytest.raises(ValueError, match="register_classification_dataset"):
            ClassificationEvaluator("no_file")
    finally:
        DatasetCatalog.remove("no_file")
