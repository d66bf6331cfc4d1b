"""The records of Detectron2's own reader, from memory that processes share."""

import copy
import json
import logging
import os
import pickle
import random
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.datasets import load_coco_json
from torch.utils.data import DataLoader

from imrcnn_d2.data.catalog import load_catalog
from imrcnn_d2.data.formats import read_kvasir_seg, with_lesion_free
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.utils.files import Rejects


def polygon(*box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(id_, image_id, **fields):
    box = [id_, id_ + 1, 5, 6.5]
    known = {"id": id_, "image_id": image_id, "category_id": 7, "bbox": box, "iscrowd": 0}
    return {**known, "segmentation": polygon(*box), **fields}


@pytest.fixture
def coco():
    """Every kind of annotation, in no order."""
    rle = mask_util.encode(np.asfortranarray(np.eye(40, 60, dtype=np.uint8)))
    return {
        "annotations": [
            annotation(12, 30),
            annotation(5, 9, segmentation={**rle, "counts": rle["counts"].decode()}, area=40),
            annotation(3, 30, category_id=2, lesion_id="l3"),
            annotation(8, 30, segmentation={"size": [40, 60], "counts": [3, 10, 2387]}, iscrowd=1),
            annotation(2, 9, segmentation=[[1, 2, 3, 4], *polygon(1, 2, 3, 4)]),
            annotation(1, 9, segmentation=[], keypoints=[1, 2, 2, 30, 4, 1]),
            annotation(6, 11, iscrowd=1),
        ],
        "categories": [{"id": 7, "name": "cancer"}, {"id": 2, "name": "ulcer \u00e4"}],
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 60, "height": 40, **extra}
            for i, extra in ((30, {"patient_id": "p", "centre": None}), (9, {}), (10, {}), (11, {}))
        ],
    }


@pytest.fixture
def written(coco, tmp_path):
    """Returns a function that writes `coco`, changed by `edit`, and gives the path."""

    def write(edit=lambda coco: None, name="coco.json"):
        edit(coco)
        path = tmp_path / name
        path.write_text(json.dumps(coco, ensure_ascii=False), encoding="utf-8")
        return path

    return write


def test_records_are_those_of_detectron2(written):
    path = written()
    expected = load_coco_json(str(path), "images", None, ["lesion_id"])
    expected[-1].update(patient_id="p", centre=None)  # image 30
    for record in expected:
        for one in record["annotations"]:
            one["category_id"] = {2: 0, 7: 1}[one["category_id"]]
    catalogue = load_catalog(path, "images")
    assert list(catalogue) == expected
    assert [record["image_id"] for record in expected] == [9, 10, 11, 30]
    assert list(catalogue.categories.items()) == [(2, "ulcer \u00e4"), (7, "cancer")]
    assert catalogue.lesion_counts.tolist() == [3, 0, 0, 2]


def test_prepared_data_are_read_as_by_detectron2(kvasir_original, no_polyp, tmp_path):
    rejects = Rejects()
    source = with_lesion_free(read_kvasir_seg(kvasir_original, rejects), no_polyp, rejects)
    prepare_dataset(source, tmp_path / "set", SplitOptions(ratio=(1, 0, 0)), rejects)
    json_file = tmp_path / "set" / "annotations" / "train.json"
    expected = load_coco_json(str(json_file), str(tmp_path / "set" / "images"))
    catalogue = load_catalog(json_file, tmp_path / "set" / "images")
    assert (len(catalogue), (catalogue.lesion_counts == 0).sum()) == (15, 10)
    for record, wanted in zip(catalogue, expected, strict=True):
        for one in wanted["annotations"]:
            one["category_id"] -= 1
        assert {key: record[key] for key in wanted} == wanted
        assert os.path.isfile(record["file_name"])


def test_it_is_a_sequence(written):
    catalogue = load_catalog(written(), "images")
    ids = [record["image_id"] for record in catalogue]
    assert catalogue[-1]["image_id"] == catalogue[np.int64(3)]["image_id"] == ids[3]
    assert [r["image_id"] for r in catalogue[::-2]] == ids[::-2]
    assert [r["image_id"] for r in reversed(catalogue)] == ids[::-1]
    assert catalogue[1] in catalogue
    assert {r["image_id"] for r in random.sample(catalogue, 4)} == set(ids)
    for index in (4, -5):
        with pytest.raises(IndexError):
            catalogue[index]


def test_changing_a_record_changes_nothing(written):
    catalogue = load_catalog(written(), "images")
    record = catalogue[0]
    before = copy.deepcopy(record)
    record["annotations"].pop()
    record["file_name"] = "other"
    assert catalogue[0] == before


def test_with_lesions(written):
    catalogue = load_catalog(written(), "images")
    subset = catalogue.with_lesions()
    assert list(subset) == [catalogue[0], catalogue[3]]
    assert subset.lesion_counts.tolist() == [3, 2]
    assert len(catalogue) == 4


def test_the_file_is_read_again_only_when_it_changed(written):
    path = written()
    catalogue = load_catalog(path, "images")
    assert load_catalog(path, "images") is catalogue
    assert load_catalog(path, "elsewhere")[0]["file_name"] == os.path.join("elsewhere", "9.png")
    os.utime(path, ns=(0, 0))
    assert load_catalog(path, "images") is not catalogue
    written(lambda coco: coco["images"].pop(0))
    assert len(load_catalog(path, "images")) == 3
    assert len(catalogue) == 4  # who holds the former one goes on with it


def test_workers_of_a_data_loader(written):
    catalogue = load_catalog(written(), "images")
    loader = DataLoader(catalogue, batch_size=2, num_workers=2, collate_fn=_same)
    assert [record for batch in loader for record in batch] == list(catalogue)


def _same(batch):
    return batch


def test_detectron2s_loaders(written):
    catalogue = load_catalog(written(), "images")
    test_loader = build_detection_test_loader(catalogue, mapper=copy.copy)
    assert [batch[0] for batch in test_loader] == list(catalogue)
    loader = build_detection_train_loader(
        catalogue, mapper=copy.copy, total_batch_size=2, aspect_ratio_grouping=False
    )
    seen = [next(iter(loader)) for _ in range(3)]
    assert all(record in catalogue for batch in seen for record in batch)


def test_memory_is_compact_and_handed_to_other_processes_without_a_copy(written):
    def many(coco):
        coco["images"] = [{**coco["images"][1], "id": i} for i in range(5000)]
        coco["annotations"] = [
            {**annotation(i % 50, i, category_id=2), "id": i} for i in range(5000)
        ]

    catalogue = load_catalog(written(many), "images")
    assert len(pickle.dumps(catalogue)) < 5000 * 400
    # What a process that is not forked gets: handles of shared memory instead of the tensors.
    assert len(ForkingPickler.dumps(catalogue)) < 5000
    # Forked ones share what no reference count lies in.
    assert not any(isinstance(value, list) for value in vars(catalogue).values())


def test_a_set_without_annotations_or_images(written):
    assert [
        r["annotations"] for r in load_catalog(written(lambda c: c.pop("annotations")), "")
    ] == [[]] * 4
    empty = load_catalog(written(lambda c: c.update(images=[])), "")
    assert len(empty) == 0 and list(empty) == []


def test_what_is_left_out_is_said(written, caplog):
    def edit(coco):
        coco["annotations"] += [annotation(20, 99), annotation(21, 9, segmentation=[[1, 2, 3, 4]])]

    with caplog.at_level(logging.WARNING, "imrcnn_d2"):
        catalogue = load_catalog(written(edit), "")
    assert len(catalogue[0]["annotations"]) == 3
    assert "1 annotations belong to images that the file does not have" in caplog.text
    assert "1 annotations have polygons of fewer than three points only" in caplog.text


def outlined(segmentation):
    return lambda coco: coco["annotations"][2].update(segmentation=segmentation)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda c: c["annotations"].append(annotation(2, 9)), ValueError, "are not unique"),
        (lambda c: c["images"].append(c["images"][0]), ValueError, "Image ids .* not unique"),
        (
            lambda c: c["annotations"][2].update(bbox=[]),
            ValueError,
            "3 of image 30 .* empty 'bbox'",
        ),
        (lambda c: c["annotations"][2].update(category_id=4), KeyError, "category_id=4 does not"),
        (lambda c: c["annotations"][2].update(ignore=1), ValueError, '"ignore" .* not supported'),
        (outlined([[1, 2, 3, 4, 1e9, 6]]), ValueError, "annotation 3: the coordinate 1e.09"),
        (outlined([[0, 0, 0, 39, 1, 0] * 5000]), ValueError, "annotation 3: .* pixels long"),
        (outlined(["x"]), ValueError, "annotation 3 has neither polygons nor RLE"),
        (outlined({"size": [40, 60], "counts": "4@"}), ValueError, "annotation 3: its RLE"),
        (outlined({"size": [40, 60], "counts": [2399]}), ValueError, "annotation 3: its RLE"),
        (outlined({"counts": [2400]}), ValueError, "annotation 3: its RLE has size None"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, "3", 4]), ValueError, "annotation 3"),
        (lambda c: c["annotations"][2].update(iscrowd=None), ValueError, "annotation 3"),
        (lambda c: c["annotations"][2].pop("image_id"), ValueError, r"annotations\[2\] lacks"),
        (lambda c: c["images"][0].update(id=[1]), ValueError, r"images\[0\] has the id"),
        (lambda c: c["images"][0].update(height=10**9), ValueError, "image 30: 1000000000 is no"),
        (lambda c: c["images"][0].pop("width"), ValueError, "image 30 has no height and width"),
        (lambda c: c.update(images=5), ValueError, "no list of images"),
        (lambda c: c.pop("categories"), ValueError, "no categories"),
    ],
)
def test_bad_files_are_named(written, edit, error, message):
    path = written(edit)
    with pytest.raises(error, match=message) as raised:
        load_catalog(path, "")
    assert str(path) in str(raised.value)


def test_a_list_that_is_there_twice(written):
    path = written()
    text = path.read_text(encoding="utf-8").rstrip("}")
    path.write_text(text + ', "annotations": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="coco.json: the key 'annotations' is there twice"):
        load_catalog(path, "")


def test_damaged_json_is_named(written):
    path = written()
    path.write_text(path.read_text(encoding="utf-8")[:-200], encoding="utf-8")
    with pytest.raises(ValueError, match="coco.json is no valid JSON"):
        load_catalog(path, "")
