"""Classified images in Detectron2's catalogs, and their numbers by class."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from recognition_runs import CLASSES, draw_classes, prepare_classes
from sklearn.utils.class_weight import compute_class_weight

from imrcnn_d2.data.catalog import (
    balanced_weights,
    labels_of,
    load_datasets,
    load_labelled_catalog,
    register_classification_dataset,
)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with a prepared data set gastric_recognition."""
    root = tmp_path_factory.mktemp("recognition")
    draw_classes(root / "raw", (9, 12, 15), size=16)
    prepare_classes(root / "raw", root / "gastric_recognition", ratio=(2, 1, 1))
    return root


def test_the_prepared_data_set_has_its_name(datasets, monkeypatch):
    monkeypatch.setenv("IMRCNN_DATASETS", str(datasets))
    records = load_datasets("gastric_recognition_test", filter_empty=True)
    metadata = MetadataCatalog.get("gastric_recognition_test")
    assert metadata.thing_classes == sorted(CLASSES)
    assert metadata.evaluator_type == "recognition"
    path = datasets / "gastric_recognition" / "annotations" / "test.json"
    assert metadata.json_file == str(path)
    content = json.loads(path.read_text())
    assert len(records) == len(content["images"]) == len(list(InferenceSampler(len(records))))
    for record in records:
        assert set(record) == {"file_name", "image_id", "width", "height", "label"}
        folder = record["file_name"].split("/")[-2]  # named as the class
        assert metadata.thing_classes[record["label"]] == folder
        assert (record["width"], record["height"]) == (16, 16)
    assert np.bincount(labels_of(records)).sum() == len(records)


def test_missing_data_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="prepare_dataset.py classification --root DIR"):
        DatasetCatalog.get("gastric_recognition_val")


def test_other_data_sets_get_a_name_by_a_call(datasets):
    folder = datasets / "gastric_recognition"
    register_classification_dataset(
        "own_classes", folder / "annotations" / "val.json", folder / "images"
    )
    try:
        assert {record["label"] for record in DatasetCatalog.get("own_classes")} == {0, 1, 2}
    finally:
        DatasetCatalog.remove("own_classes")
        MetadataCatalog.remove("own_classes")


def test_images_without_a_class_or_with_two_are_refused(datasets, tmp_path):
    source = datasets / "gastric_recognition" / "annotations" / "val.json"
    content = json.loads(source.read_text())
    path = tmp_path / "val.json"
    content["annotations"].append({**content["annotations"][0], "id": 999})
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="1 images do not have exactly one class, such as .* with 2"
    ):
        load_labelled_catalog(path, tmp_path)
    content["annotations"] = content["annotations"][1:-1]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="with 0; make the file with"):
        load_labelled_catalog(path, tmp_path)
    content["annotations"][0]["category_id"] = 77
    path.write_text(json.dumps(content))
    with pytest.raises(KeyError, match="category_id=77 does not exist"):
        load_labelled_catalog(path, tmp_path)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.array([0] * 5 + [1] * 2 + [2] * 13)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(balanced_weights(labels, 3), expected)
    assert balanced_weights(labels, 3)[labels].mean() == pytest.approx(1)
    for number in (2, 4):
        with pytest.raises(ValueError, match=r"\[5, 2, 13.*Each class needs some"):
            balanced_weights(labels, number)
