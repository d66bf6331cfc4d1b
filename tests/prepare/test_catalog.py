"""Detectron2's own records, from shared memory, by names looked up when they are loaded."""

import copy
import json
import logging
import os
import pickle
import random
import re
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2 import data
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from omegaconf import OmegaConf
from processes import ROOT
from recognition_runs import CLASSES, draw_classes, prepare_classes
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import DataLoader

from imrcnn_d2.data import catalog
from imrcnn_d2.data.audit.findings import find_prepared
from imrcnn_d2.data.catalog import load_catalog, load_labelled_catalog
from imrcnn_d2.data.formats import read_coco
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.engine.cross_validation import FoldRun
from imrcnn_d2.utils.files import Rejects


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(id_, image_id, **fields):
    box = [id_, id_ + 1, 5, 6.5]
    known = {"id": id_, "image_id": image_id, "category_id": 7, "bbox": box, "iscrowd": 0}
    return {**known, "segmentation": polygon(*box), **fields}


@pytest.fixture
def written(tmp_path):
    """Returns a function that writes every kind of annotation, in no order, changed by `edit`."""
    rle = mask_util.encode(np.asfortranarray(np.eye(40, 60, dtype=np.uint8)))
    fields = {30: {"patient_id": "p", "centre": None}, 9: {}, 10: {}, 11: {}}
    size = {"width": 60, "height": 40}
    coco = {
        "annotations": [
            annotation(12, 30),
            annotation(5, 9, segmentation={**rle, "counts": rle["counts"].decode()}, area=40),
            annotation(3, 30, category_id=2, lesion_id="l3"),
            annotation(8, 30, segmentation={"size": [40, 60], "counts": [3, 10, 2387]}, iscrowd=1),
            annotation(
                2, 9, segmentation=[[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], *polygon(1, 2, 3, 4)]
            ),
            annotation(1, 9, segmentation=[], keypoints=[1, 2, 2, 30, 4, 1], bbox=[1, 2, 0, 0]),
            annotation(6, 11, iscrowd=1),
        ],
        "categories": [{"id": 7, "name": "cancer"}, {"id": 2, "name": "ulcer \u00e4"}],
        "images": [{"id": i, "file_name": f"{i}.png", **size, **f} for i, f in fields.items()],
    }

    def write(edit=lambda coco: None):
        edit(coco)
        path = tmp_path / "coco.json"
        path.write_text(json.dumps(coco, ensure_ascii=False), encoding="utf-8")
        return path

    return write


def test_records_are_those_of_detectron2(written):
    path = written()
    expected = load_coco_json(str(path), "images", None, ["lesion_id"])
    expected[-1].update(patient_id="p", centre=None)  # image 30
    for record in expected:
        for lesion in record["annotations"]:
            lesion["category_id"] = {2: 0, 7: 1}[lesion["category_id"]]
    records = load_catalog(path, "images")
    assert list(records) == expected
    assert [record["image_id"] for record in expected] == [9, 10, 11, 30]
    assert list(records.categories.items()) == [(2, "ulcer \u00e4"), (7, "cancer")]
    assert records.lesion_counts.tolist() == [3, 0, 0, 2]
    subset = records.with_lesions()
    assert list(subset) == [records[0], records[3]] and len(records) == 4
    assert subset.lesion_counts.tolist() == [3, 2]
    assert records[-1]["image_id"] == records[np.int64(3)]["image_id"] == 30
    assert [r["image_id"] for r in records[::-2]] == [30, 10]
    assert {r["image_id"] for r in random.sample(records, 4)} == {9, 10, 11, 30}
    for index in (4, -5):
        with pytest.raises(IndexError):
            records[index]
    before, record = copy.deepcopy(records[0]), records[0]
    record["annotations"].pop()
    assert records[0] == before
    loader = DataLoader(records, batch_size=2, num_workers=2, collate_fn=list)
    assert [record for batch in loader for record in batch] == list(records)


def test_the_file_is_read_again_only_when_it_changed(written):
    path = written()
    records = load_catalog(path, "images")
    assert load_catalog(path, "images") is records
    os.utime(path, ns=(0, 0))
    assert load_catalog(path, "images") is not records
    written(lambda coco: coco["images"].pop(0))
    assert len(load_catalog(path, "images")) == 3
    assert len(records) == 4  # who holds the former one goes on with it
    assert load_catalog(path, "elsewhere")[0]["file_name"].startswith("elsewhere/")


def test_memory_is_compact_and_handed_to_other_processes_without_a_copy(written):
    def many(coco):
        coco["images"] = [{**coco["images"][1], "id": i} for i in range(5000)]
        coco["annotations"] = [{**annotation(i % 50, i), "id": i} for i in range(5000)]

    records = load_catalog(written(many), "images")
    assert len(pickle.dumps(records)) < 5000 * 400
    # What a process that is not forked gets: handles of shared memory instead of the tensors.
    assert len(ForkingPickler.dumps(records)) < 5000
    # Forked ones share what no reference count lies in.
    assert not any(isinstance(value, list) for value in vars(records).values())


def test_what_is_missing_left_out_or_damaged(written, caplog):
    more = [annotation(20, 99), annotation(21, 9, segmentation=[[1, 2, 3, 4]])]
    with caplog.at_level(logging.WARNING, "imrcnn_d2"):
        records = load_catalog(written(lambda c: c["annotations"].extend(more)), "")
    assert len(records[0]["annotations"]) == 3
    assert [r.args[1] for r in caplog.records] == [1, 1]
    records = load_catalog(written(lambda c: c.pop("annotations")), "")
    assert [record["annotations"] for record in records] == [[]] * 4
    path = written(lambda c: c.update(images=[]))
    assert list(load_catalog(path, "")) == []
    text = path.read_text(encoding="utf-8").rstrip("}")
    for damaged in (text, text + ', "categories": []}'):  # cut; a key twice
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_catalog(path, "")


def lesion(**changes):
    return lambda coco: coco["annotations"][2].update(changes)


def rle(counts):
    return lesion(segmentation={"size": [40, 60], "counts": counts})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["annotations"].append(annotation(2, 9)), "Annotation ids"),
        (lambda c: c["images"].append(c["images"][0]), "Image ids"),
        (lambda c: c["images"].append({**c["images"][0], "id": "x"}), "image ids"),
        (lesion(bbox=[]), "3 of image 30 .*'bbox'"),
        (lesion(category_id=4), "category_id=4"),
        (lesion(ignore=1), "annotation 3: .*ignore"),
        *((lesion(bbox=bad), "annotation 3") for bad in ([1, 2, "3", 4], [1, 2, 3, -1])),
        *((lesion(iscrowd=bad), "annotation 3") for bad in (None, 2)),
        (lesion(segmentation=["x"]), "annotation 3"),
        (lesion(segmentation=[[1, 2, 3, 4, 1e9, 6]]), "annotation 3: .*1e.09"),
        (lesion(segmentation=[[0, 0, 0, 39, 1, 0] * 5000]), "annotation 3: .*long"),
        (lesion(segmentation={"counts": [2400]}), "annotation 3: .*size None"),
        *((rle(bad), "annotation 3: its RLE") for bad in ("4@", [2399])),
        (lambda c: c["annotations"][2].pop("image_id"), r"annotations\[2\]"),
        (lambda c: c["images"][0].update(id=[1]), r"images\[0\] has the id"),
        (lambda c: c["images"][0].update(height=10**9), "image 30: .*1000000000"),
        (lambda c: c["images"][0].pop("width"), "image 30 has no height and width"),
        (lambda c: c.update(images=5), "images"),
        (lambda c: c.pop("categories"), "categories"),
    ],
)
def test_bad_files_are_named(written, edit, message):
    path = written(edit)
    with pytest.raises((ValueError, KeyError), match=message) as raised:
        load_catalog(path, "")
    assert str(path) in str(raised.value)


def forget(*names):
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        if name in MetadataCatalog:
            MetadataCatalog.remove(name)


@pytest.fixture
def prepared(coco_folder, tmp_path, monkeypatch):
    """Returns a function that prepares own data, all in train, as $IMRCNN_DATASETS/`dataset`."""

    def make(dataset, edit=lambda coco: None):
        source, out = read_coco(*coco_folder(edit), Rejects()), tmp_path / "sets" / dataset
        prepare_dataset(source, out, SplitOptions(ratio=(1, 0, 0)), Rejects())
        monkeypatch.setenv("IMRCNN_DATASETS", str(out.parent))
        return out

    return make


@pytest.fixture
def scratch_names():
    """Names of data sets that are forgotten after the test."""
    names = "scratch_lesions", "scratch_list", "scratch_lesion_free"
    yield names
    forget(*names)


def test_loading_and_the_classes_of_the_file(prepared, caplog):
    def edit(coco):
        coco["images"][0].update(patient_id="p", centre="X")
        coco["annotations"][0].update(lesion_id="l")
        coco["categories"] = [{"id": 7, "name": "ulcer"}, {"id": 3, "name": "cancer"}]
        for lesion, category in zip(coco["annotations"], (7, 3), strict=True):
            lesion["category_id"] = category

    out = prepared("egc", edit)
    metadata = MetadataCatalog.get("egc_train")  # held by others before loading
    with caplog.at_level(logging.WARNING, "imrcnn_d2"):
        records = DatasetCatalog.get("egc_train")
    assert "egc_train" in caplog.text and "ulcer" in caplog.text
    files = [str(out / "images" / f"{i}.png") for i in (1, 2, 3)]
    assert [record["file_name"] for record in records] == files
    assert (records[0]["patient_id"], records[0]["centre"]) == ("p", "X")
    assert "patient_id" not in records[1]
    assert records[0]["annotations"][0]["lesion_id"] == "l"
    classes = [[a["category_id"] for a in record["annotations"]] for record in records]
    assert classes == [[1], [0], []]  # lesion-free images are kept
    assert metadata.thing_classes == ["cancer", "ulcer"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata.json_file == str(out / "annotations" / "train.json")
    assert metadata.image_root == str(out / "images")
    caplog.clear()
    assert DatasetCatalog.get("egc_train") == records and not caplog.text


def test_short_names_are_looked_for_when_loading(prepared, tmp_path, monkeypatch):
    folder = prepared("synthetic").parent
    monkeypatch.chdir(tmp_path)
    for name, variables in (
        ("a", {"IMRCNN_DATASETS": "a", "DETECTRON2_DATASETS": "b"}),
        ("b", {"DETECTRON2_DATASETS": "b"}),
        ("datasets", {"DETECTRON2_DATASETS": "b"}),
        ("datasets", {}),
    ):
        folder = folder.rename(name)
        for variable in ("IMRCNN_DATASETS", "DETECTRON2_DATASETS"):
            monkeypatch.setenv(variable, variables.get(variable, ""))
        assert len(DatasetCatalog.get("synthetic_train")) == 3
        image_root = MetadataCatalog.get("synthetic_train").image_root
        assert image_root == os.path.join(name, "synthetic", "images")
        assert catalog.read_classes("synthetic") == ["early gastric cancer"]


def test_every_command_looks_for_a_name_in_the_same_folder(prepared, tmp_path, monkeypatch):
    """Detectron2's, though datasets/ has a data set of the name too."""
    shutil.copytree(prepared("synthetic").parent, tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMRCNN_DATASETS")
    monkeypatch.setenv("DETECTRON2_DATASETS", "sets")
    expected = Path("sets", "synthetic")
    assert catalog.prepared_folder("synthetic") == find_prepared("synthetic") == expected
    shutil.copytree(expected, "sets/mine")
    assert find_prepared("mine") == Path("sets", "mine")
    sweep = OmegaConf.load(ROOT / "configs" / "cross_validation" / "sweep.yaml")
    sweep.dataset = "synthetic"
    assert FoldRun.from_config(sweep).datasets == Path("sets").resolve()


def test_a_folder_is_registered_under_its_name(prepared, tmp_path):
    folder = prepared("my polyps")
    try:
        catalog.register_data_set(folder)
        assert len(DatasetCatalog.get("my polyps_train")) == 3
        other = tmp_path / "other" / folder.name
        other.parent.mkdir()
        folder.rename(other)
        catalog.register_data_set(other)
        assert len(DatasetCatalog.get("my polyps_train")) == 3
        assert MetadataCatalog.get("my polyps_train").image_root == str(other / "images")
        catalog.register_data_set(tmp_path / "none" / folder.name)
        with pytest.raises(FileNotFoundError, match="none/my polyps"):
            DatasetCatalog.get("my polyps_train")
    finally:
        catalog._registered.pop("my polyps", None)
        forget(*(f"my polyps_{split}" for split in ("train", "val", "test")))
    with pytest.raises(ValueError, match="coco_2017_train"):  # of Detectron2
        catalog.register_data_set(tmp_path / "coco_2017")


def test_missing_data_names_path_and_command(tmp_path, monkeypatch):
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path))
    for dataset, lesion, command in (
        ("kvasir_seg", "polyp", "kvasir-seg --root DIR --out"),
        ("egc", "early gastric cancer", "coco --annotations FILE --images DIR --out"),
        ("synthetic", "lesion", "synthetic --num-images 160 --size 256 --out"),
        ("lesion_free", "lesion", "lesion-free --root DIR --out"),
        ("gastric_recognition", None, "classification --root DIR --out"),
    ):
        path = tmp_path / dataset / "annotations" / "val.json"
        with pytest.raises(FileNotFoundError, match=f"{path}.*imrcnn prepare-dataset {command}"):
            DatasetCatalog.get(f"{dataset}_val")
        metadata = MetadataCatalog.get(f"{dataset}_val")
        assert metadata.evaluator_type == ("coco" if lesion else "recognition")
        assert metadata.get("thing_classes") == (lesion and [lesion])
        assert {f"{dataset}_train", f"{dataset}_test"} <= {*DatasetCatalog}


def test_data_sets_are_joined_filtered_and_loaded_by_stock_loaders(coco_folder, scratch_names):
    """Ours, of two lesions and a lesion-free image, a list alike and a list of one image."""
    ours, theirs, lesion_free = scratch_names
    json_file, images = coco_folder()
    catalog.register_lesion_dataset(ours, json_file, images, ["guess"])
    metadata = MetadataCatalog.get(ours)
    assert (metadata.thing_classes, metadata.evaluator_type) == (["guess"], "coco")
    records = DatasetCatalog.get(ours)
    assert metadata.thing_classes == ["early gastric cancer"]
    for name, content in ((theirs, records[:]), (lesion_free, records[2:])):
        DatasetCatalog.register(name, lambda content=content: content)
        MetadataCatalog.get(name).thing_classes = ["early gastric cancer"]
    assert catalog.load_datasets([ours]) is records
    for names in ([ours, theirs], [theirs, ours]):
        assert list(catalog.load_datasets(names)) == [*records, *records]
        assert list(catalog.load_datasets(names, filter_empty=True)) == 2 * records[:2]
    with pytest.raises(ValueError, match=f"{lesion_free} .*--ratio"):
        catalog.load_datasets([ours, lesion_free], filter_empty=True)
    MetadataCatalog.get(theirs).thing_classes.append("ulcer")
    with pytest.raises(ValueError, match="thing_classes"):
        catalog.load_datasets([ours, theirs])
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (ours,), (ours,)
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 1
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    batch = next(iter(data.build_detection_train_loader(cfg)))
    assert [sample["image"].shape[-2:] for sample in batch] == [(40, 60)] * 2
    loader = data.build_detection_test_loader(cfg, ours)
    assert [sample["image_id"] for (sample,) in loader] == [1, 2, 3]
    images.rename(images.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match=str(images)):
        DatasetCatalog.get(ours)


def test_classified_images(monkeypatch, scratch_names, tmp_path):
    folder = tmp_path / "gastric_recognition"
    draw_classes(tmp_path / "raw", (9, 12, 15), size=16)
    prepare_classes(tmp_path / "raw", folder, ratio=(2, 1, 1))
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path))
    records = catalog.load_datasets("gastric_recognition_test", filter_empty=True)
    metadata = MetadataCatalog.get("gastric_recognition_test")
    assert metadata.thing_classes == sorted(CLASSES)
    assert metadata.evaluator_type == "recognition"
    content = json.loads((folder / "annotations" / "test.json").read_text())
    assert len(records) == len(content["images"])
    for record in records:
        assert set(record) == {"file_name", "image_id", "width", "height", "label"}
        name = record["file_name"].split("/")[-2]  # of the folder
        assert metadata.thing_classes[record["label"]] == name
        assert (record["width"], record["height"]) == (16, 16)
    assert [*catalog.labels_of(records)] == [record["label"] for record in records]
    files = folder / "annotations" / "val.json", folder / "images"
    catalog.register_classification_dataset(scratch_names[0], *files)
    assert {record["label"] for record in DatasetCatalog.get(scratch_names[0])} == {0, 1, 2}
    # without a class, or with two
    content = json.loads(files[0].read_text())
    path, annotations = tmp_path / "val.json", content["annotations"]
    two = [*annotations, {**annotations[0], "id": 999}]
    unknown = [{**annotations[0], "category_id": 77}, *annotations[1:]]
    for changed, error, message in (
        (two, ValueError, "1 images .* with 2"),
        (annotations[1:], ValueError, "1 images .* with 0"),
        (unknown, KeyError, "category_id=77"),
    ):
        path.write_text(json.dumps({**content, "annotations": changed}))
        with pytest.raises(error, match=f"{path}.*{message}"):
            load_labelled_catalog(path, tmp_path)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.array([0] * 5 + [1] * 2 + [2] * 13)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(catalog.balanced_weights(labels, 3), expected)
    assert catalog.balanced_weights(labels, 3)[labels].mean() == pytest.approx(1)
    for number in (2, 4):
        with pytest.raises(ValueError, match=r"\[5, 2, 13"):
            catalog.balanced_weights(labels, number)
