"""From COCO to the annotation tools and back: every mask is kept."""

import json
import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from imrcnn_d2.data.formats import (
    FORMATS,
    Sample,
    Source,
    export,
    read_coco,
    read_cvat,
    read_kvasir_seg,
    read_labelme,
    read_mask_folder,
)
from imrcnn_d2.data.images import inspect_image, read_mask
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.utils.files import BadInputError, Rejects

CATEGORIES = [{"id": 1, "name": "adenoma"}, {"id": 2, "name": "early cancer"}]
CLASSES = [category["name"] for category in CATEGORIES]
WRITABLE = [name for name, form in FORMATS.items() if form.write]


def back(to, out, images, classes=CLASSES):
    """What our readers make of an exported folder."""
    rejects = Rejects()
    if to == "labelme":
        return read_labelme(out, rejects, out / "none", images, classes)
    if to == "cvat":
        return read_cvat([out / "annotations.xml"], images, rejects, classes)
    return read_mask_folder(images, out, rejects, "files", classes=classes)


def saved(folder, masks_of):
    """A data set of images {name: [(mask, category, fields)]}, written as files."""
    samples = []
    for i, (name, lesions) in enumerate(masks_of.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = lesions[0][0].shape if lesions else (40, 60)
        Image.new("RGB", (width, height), (i % 256, i // 256, 0)).save(path)
        annotations = [annotation_from_mask(m, c, **fields) for m, c, fields in lesions]
        samples.append(Sample(name, inspect_image(path), annotations))
    return samples


def check_masks(samples, returned, least):
    ours = {sample.file_name: sample.annotations for sample in samples}
    theirs = {sample.file_name: sample.annotations for sample in returned}
    assert ours.keys() == theirs.keys()
    for name, annotations in ours.items():
        assert len(annotations) == len(theirs[name])
        for annotation in annotations:
            alike = [a for a in theirs[name] if a["category_id"] == annotation["category_id"]]
            overlaps = mask_util.iou(
                [annotation["segmentation"]], [a["segmentation"] for a in alike], [0] * len(alike)
            )
            assert overlaps.max() >= least


@pytest.mark.parametrize("to", WRITABLE)
def test_lesions_and_back(to, kvasir_352, tmp_path):
    masks = {}
    for path in sorted((kvasir_352 / "masks").iterdir())[:60]:
        mask = read_mask(path)  # whole: some have holes, some several parts
        masks[f"{path.stem}.png"] = [(mask, 1, {})]
    masks["healthy.png"] = []
    samples = saved(tmp_path / "images", masks)
    assert export(Source(samples, CATEGORIES, {}), FORMATS[to], tmp_path / "out") == []
    returned = back(to, tmp_path / "out", tmp_path / "images")
    check_masks(samples, returned.samples, 1 if to == "masks" else 0.99)


@pytest.mark.parametrize("to", WRITABLE)
@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mask_and_back(to, data, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("any")
    shape = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    drawn = data.draw(st.lists(arrays(bool, shape), max_size=3))
    lesions = {mask.tobytes(): (mask, 1 + i % 2, {}) for i, mask in enumerate(drawn) if mask.any()}
    assume(len(lesions) == len(drawn) > 0)
    # Masks that come back at an IoU of 0.99 may come back equal, and equal ones are refused.
    assume(all((a & b).sum() < 0.98 * (a | b).sum() for a, b in combinations(drawn, 2)))
    samples = saved(tmp_path / "images", {"a.png": list(lesions.values())})
    export(Source(samples, CATEGORIES, {}), FORMATS[to], tmp_path / "out")
    returned = back(to, tmp_path / "out", tmp_path / "images")
    check_masks(samples, returned.samples, 1 if to == "masks" else 0.99)


@pytest.fixture
def described(tmp_path):
    """One image with fields of every kind, and one without a lesion, in a folder of its own."""
    mask = np.zeros((40, 60), bool)
    mask[5:20, 5:30] = True
    parts = mask.copy()
    parts[30:35, 40:50] = True
    fields = {"lesion_id": "l <1>", "size_mm": 12, "sure": False, "occluded": True}
    lesions = [(mask, 1, fields), (parts, 2, {"iscrowd": 1, "depth": 0.5})]
    samples = saved(tmp_path / "images", {"a.png": lesions, "b/c.png": []})
    samples[0].fields.update(patient_id="p1", blurred=True)
    return Source(samples, CATEGORIES, {}), tmp_path / "images"


@pytest.mark.parametrize("to", ["labelme", "cvat"])
def test_fields(to, described, tmp_path):
    source, images = described
    notes = export(source, FORMATS[to], tmp_path / "out")
    returned = back(to, tmp_path / "out", images)
    first, second = returned.samples
    lesion, crowd = first.annotations
    kept = ("lesion_id", "size_mm", "sure", "occluded", "iscrowd")
    assert [lesion[key] for key in kept] == ["l <1>", 12, False, True, 0]
    assert (crowd["iscrowd"], crowd["depth"]) == (1, 0.5 if to == "labelme" else "0.5")
    assert (second.file_name, second.annotations) == ("b/c.png", [])
    if to == "labelme":
        assert first.fields == {"patient_id": "p1", "blurred": True} and notes == []
    else:
        assert notes == ["not in CVAT's file: blurred, patient_id of the images"]


def test_labels_of_a_cvat_task(described, tmp_path):
    export(described[0], FORMATS["cvat"], tmp_path / "out")
    adenoma, cancer = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert (adenoma["name"], cancer["name"]) == tuple(CLASSES)
    kinds = {a["name"]: (a["input_type"], a["values"]) for a in adenoma["attributes"]}
    assert kinds == {
        "lesion_id": ("text", [""]),
        "size_mm": ("number", ["0", "12", "1"]),
        "sure": ("checkbox", ["false"]),
    }
    text = (tmp_path / "out" / "annotations.xml").read_text()
    assert text.startswith('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1')


def test_what_only_some_lesions_have_stays_unknown_in_cvat(described, tmp_path):
    """An annotator who adds or opens a lesion gets no 0 mm from CVAT for it."""
    source, images = described
    lesion, crowd = source.samples[0].annotations
    crowd["category_id"] = 1
    export(source, FORMATS["cvat"], tmp_path / "out")
    adenoma, _ = json.loads((tmp_path / "out" / "labels.json").read_text())
    kinds = {a["name"]: (a["input_type"], a["values"]) for a in adenoma["attributes"]}
    assert kinds["size_mm"] == kinds["sure"] == ("text", [""])
    assert kinds["iscrowd"] == ("checkbox", ["false"])


@pytest.mark.parametrize("to", WRITABLE)
def test_lists_and_objects_are_told(to, described, tmp_path):
    source, _ = described
    source.samples[0].annotations.pop()
    source.samples[0].annotations[0]["keypoints"] = [1, 2, 2]
    source.samples[0].fields["device"] = {"maker": "x"}
    notes = export(source, FORMATS[to], tmp_path / "out")
    assert "lists and objects cannot be kept: device, keypoints" in notes


def test_what_masks_cannot_keep(described, tmp_path):
    source, images = described
    with pytest.raises(BadInputError, match="a.png: has a crowd region"):
        export(source, FORMATS["masks"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    source.samples[0].annotations.pop()
    notes = export(source, FORMATS["masks"], tmp_path / "out")
    assert notes == ["not in the masks: blurred, lesion_id, occluded, patient_id, size_mm, sure"]
    written = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.png"))
    assert list(map(str, written)) == ["a/adenoma_1.png", "b/c/0.png"]
    for name in ("x/y", "cancer_2", "7", "_"):
        odd = replace(source, categories=[{"id": 1, "name": name}])
        with pytest.raises(BadInputError, match="cannot be told from a file's name; rename it"):
            export(odd, FORMATS["masks"], tmp_path / "other")


def test_labelme_finds_the_images(described, tmp_path):
    export(described[0], FORMATS["labelme"], tmp_path / "deep" / "out")
    for name in ("a", "b/c"):
        path = tmp_path / "deep" / "out" / f"{name}.json"
        image_path = json.loads(path.read_text())["imagePath"]
        assert not os.path.isabs(image_path)
        assert (path.parent / image_path).resolve() == described[1].resolve() / f"{name}.png"


def test_two_images_that_would_share_a_file(tmp_path):
    mask = np.ones((4, 4), bool)
    samples = saved(tmp_path / "images", {"a.png": [(mask, 1, {})], "a.bmp": [(mask, 1, {})]})
    for to in ("labelme", "masks"):
        with pytest.raises(BadInputError, match="a.bmp: would share its file with .*a.png"):
            export(Source(samples, CATEGORIES, {}), FORMATS[to], tmp_path / "out")


def test_text_that_xml_cannot_hold(tmp_path):
    mask = np.ones((4, 4), bool)
    samples = saved(tmp_path / "images", {"a.png": [(mask, 1, {"remark": "a\x01b"})]})
    with pytest.raises(BadInputError, match="XML cannot hold '.x01'"):
        export(Source(samples, CATEGORIES, {}), FORMATS["cvat"], tmp_path / "out")


def test_a_folder_that_is_not_empty(described, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="exists; choose another --output"):
        export(described[0], FORMATS["labelme"], tmp_path / "out")


def test_polygons_of_coco(coco_folder, tmp_path):
    json_file, images = coco_folder()
    names = ["early gastric cancer"]
    for to in WRITABLE:
        samples = list(read_coco(json_file, images, Rejects()).samples)
        source = Source(samples, [{"id": 1, "name": names[0]}], {})
        export(source, FORMATS[to], tmp_path / to)
        returned = back(to, tmp_path / to, images, names)
        boxes = [[a["bbox"] for a in sample.annotations] for sample in returned.samples]
        assert boxes == [[[10, 10, 20, 10]], [[10, 10, 20, 10]], []]


def test_prepared_data_open_in_supervision(kvasir_original, tmp_path):
    """Without glue code: the lines of datasets/README.md."""
    sv = pytest.importorskip("supervision")
    out = tmp_path / "kvasir_seg"
    options = SplitOptions(ratio=(1, 0, 0))
    prepare_dataset(read_kvasir_seg(kvasir_original, Rejects()), out, options, Rejects())
    dataset = sv.DetectionDataset.from_coco(
        f"{out}/images", f"{out}/annotations/train.json", force_masks=True
    )
    assert dataset.classes == ["polyp"] and len(dataset) == 5
    for path, image, detections in dataset:
        mask = read_mask(kvasir_original / "masks" / Path(path).name)
        assert image.shape[:2] == mask.shape
        specks = mask & ~detections.mask.any(axis=0)
        assert not (detections.mask & ~mask).any() and specks.sum() < 100
        assert set(detections.class_id) == {0}
