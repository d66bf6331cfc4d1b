"""The pictures beside a classifier's evaluation."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from recognition_runs import draw_classes, prepare_classes, write_classifier

from imrcnn_d2.data.catalog import register_classification_dataset
from imrcnn_d2.report.plots.draw_all import plot_test_results

NAME = "gastric_recognition_test"  # of the folder that write_classifier makes


@pytest.fixture
def output(tmp_path):
    draw_classes(tmp_path / "raw", (6, 6, 6), size=16)
    out = prepare_classes(tmp_path / "raw", tmp_path / "set", ratio=(1, 1, 2)).out
    gt = out / "annotations" / "test.json"
    known = DatasetCatalog.pop(NAME), MetadataCatalog.pop(NAME)
    register_classification_dataset(NAME, gt, out / "images")
    DatasetCatalog.get(NAME)
    yield write_classifier(tmp_path / "run", gt)
    DatasetCatalog[NAME], MetadataCatalog[NAME] = known


def test_a_training_ends_with_pictures(output):
    plot_test_results(str(output), [NAME], tau=0.7)
    folder = output / "inference" / NAME
    for stem in ("confusion_matrix", "roc_curve", "calibration"):
        pixels = np.asarray(Image.open(folder / f"{stem}.png").convert("L"))
        assert pixels.std() > 5, stem
