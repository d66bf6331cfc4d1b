"""One scene through every format: prepared, split, registered, written for a tool and read back."""

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from imrcnn_d2.cli import export_annotations
from imrcnn_d2.data import catalog, formats
from imrcnn_d2.data.formats import FORMATS, PublicDataSet, Sample, Source, export
from imrcnn_d2.data.images import inspect_image, read_mask
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.utils.files import BadInputError, Rejects

NAMES = "abcde"
SPLITS = ("train", "val", "test")
CATEGORIES = [{"id": 1, "name": "adenoma"}, {"id": 2, "name": "early cancer"}]
CLASSES = [category["name"] for category in CATEGORIES]
# Public data sets have layouts of their own: test_public_data_sets.py. These read prepared data.
_OTHERS = {"merge", "procedures"} | {n for n, f in FORMATS.items() if isinstance(f, PublicDataSet)}
SHARED = [name for name in FORMATS if name == "kvasir-seg" or name not in _OTHERS]
WRITABLE = [name for name, form in FORMATS.items() if form.write]


def boxes(name):
    return [5 + NAMES.index(name), 5, 15, 10]


def scene(root, form, link=False):
    """Five images of 60x40 with a rectangle each in a format's layout; the command's arguments.
    With `link`, e.png is a link out of the folder."""
    images, masks = root / "images", root / "masks"
    for folder in (images, masks):
        folder.mkdir(parents=True)
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "polyp"}]}
    xml, table = "<annotations><version>1.1</version>", "file,label\n"
    for i, name in enumerate(NAMES):
        path = images / f"{name}.png"
        if link and name == "e":
            path.symlink_to(root.parent / "private.png")
            path = root.parent / "private.png"
        Image.new("RGB", (60, 40), (40 * i, 9, 0)).save(path)
        x, y, w, h = boxes(name)
        mask = np.zeros((40, 60), np.uint8)
        mask[y : y + h, x : x + w] = 255
        Image.fromarray(mask).save(masks / f"{name}.png")
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        lesion = {"id": i, "image_id": i, "category_id": 1, "segmentation": [polygon]}
        coco["images"].append({"id": i, "file_name": f"{name}.png"})
        coco["annotations"].append(lesion)
        xml += f'<image name="{name}.png" width="60" height="40"><box label="polyp" '
        xml += f'xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/></image>'
        table += f"{name}.png,{'cancer' if name in 'ab' else 'ulcer'}\n"
        if form == "labelme":
            shape = {"label": "polyp", "shape_type": "rectangle", "points": [[x, y], polygon[4:6]]}
            document = {"shapes": [shape], "imagePath": f"{name}.png", "imageData": None}
            (images / f"{name}.json").write_text(json.dumps(document))
    (root / "own.json").write_text(json.dumps(coco))
    (root / "own.xml").write_text(f"{xml}</annotations>")
    (root / "own.csv").write_text(table)
    arguments = {
        "kvasir-seg": ["--root", root],
        "masks": ["--images", images, "--masks", masks, "--classes", "polyp"],
        "coco": ["--annotations", root / "own.json", "--images", images],
        "labelme": ["--root", images],
        "cvat": ["--annotations", root / "own.xml", "--images", images],
        "lesion-free": ["--root", images],
        # A class in each split is more than five images give.
        "classification": ["--csv", root / "own.csv", "--root", images, "--ratio", "1:0:0"],
        "synthetic": ["--num-images", 5, "--size", 64],
    }
    return [form, *arguments[form]]


def prepared(out):
    """COCO contents by split."""
    return {s: json.loads((out / "annotations" / f"{s}.json").read_text()) for s in SPLITS}


def boxes_of(out):
    """{file name: its annotations' boxes} of a prepared data set, or category ids without boxes."""
    boxes = {}
    for content in prepared(out).values():
        names = {image["id"]: image["file_name"] for image in content["images"]}
        boxes |= {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            box = annotation.get("bbox", annotation["category_id"])
            boxes[names[annotation["image_id"]]].append(box)
    return boxes


@pytest.mark.parametrize("form", SHARED)
def test_a_scene_through_a_format(form, tmp_path, run, monkeypatch):
    out = tmp_path / "contract"
    args = [*scene(tmp_path / "in", form), "--out", out]
    run(*args)
    sizes = [len(content["images"]) for content in prepared(out).values()]
    expected_sizes = {"classification": [5, 0, 0], "lesion-free": [0, 0, 5], "synthetic": [1, 4, 0]}
    assert sizes == expected_sizes.get(form, [3, 1, 1])
    is_classified = form == "classification"
    if form != "synthetic":
        classes = {"classification": lambda name: [1 + (name not in "ab")]}
        lesions_of = classes.get(form, lambda name: [boxes(name)] if form != "lesion-free" else [])
        assert boxes_of(out) == {f"{name}.png": lesions_of(name) for name in NAMES}
    monkeypatch.setattr(catalog, "_registered", {})
    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    catalog.register_data_set(out, is_classified)
    for split, content in prepared(out).items():
        records = DatasetCatalog.get(f"contract_{split}")
        for annotation in content["annotations"] if not is_classified else ():
            assert annotation["iscrowd"] == 0 and annotation["category_id"] == 1
            assert annotation["area"] == 150 or form == "synthetic"
        for image, record in zip(content["images"], records, strict=True):
            assert record["file_name"] == str(out / "images" / image["file_name"])
            assert Image.open(record["file_name"]).size == (image["width"], image["height"])
        if is_classified:
            read = [record["label"] + 1 for record in records]
        else:
            read = [a["bbox"] for record in records for a in record["annotations"]]
        assert read == [a.get("bbox", a["category_id"]) for a in content["annotations"]]

    assert run(*args).endswith("already there, unchanged\n")
    if form not in WRITABLE:
        return
    # and from the prepared data to the tool and back, with lesion-free images added
    tool, again, healthy = tmp_path / "tool", tmp_path / "again", tmp_path / "healthy"
    to_tool = ["--annotations", out / "annotations" / "train.json", "--images", out / "images"]
    to_tool += ["--to", form, "--output", tool]
    assert run(*to_tool, command=export_annotations) == f"{tool}: written\n"
    assert f"{tool}: exists" in run(*to_tool, command=export_annotations, fails=True)
    train = [image["file_name"] for image in prepared(out)["train"]["images"]]
    images = tmp_path / "of_train"
    for folder in (images, healthy):
        folder.mkdir()
    for name in train:
        shutil.copy(out / "images" / name, images)
    Image.new("RGB", (50, 50), "red").save(healthy / "h.png")
    source = {"labelme": ["--root", tool], "cvat": ["--annotations", tool / "annotations.xml"]}
    source = source.get(form, ["--masks", tool, "--kind", "files"])
    run(form, *source, "--images", images, "--negatives", healthy, "--out", again)
    assert boxes_of(again) == {**{name: [boxes(name[0])] for name in train}, "h.png": []}


@pytest.mark.parametrize("form", sorted({*SHARED} - {"synthetic"}))
def test_links_out_of_the_folder(tmp_path, form, run):
    out = tmp_path / "out"
    args = [*scene(tmp_path / "sent", form, link=True), "--out", out]
    message = run(*args, fails=True)
    assert "e.png: is a link" in message and "--follow-links" in message
    run(*args, "--on-error", "reject")
    assert len(boxes_of(out)) == 4
    assert 'e.png,"is a link' in (out / "rejected.csv").read_text()
    private = (tmp_path / "private.png").read_bytes()
    assert all(path.read_bytes() != private for path in (out / "images").iterdir())
    shutil.rmtree(out)
    run(*args, "--follow-links")
    assert len(boxes_of(out)) == 5 and not (out / "images" / "e.png").is_symlink()


def test_links_to_whole_folders(tmp_path, run):
    """A folder that is named may be a link; images/ of Kvasir-SEG and a class's folder may not."""
    scene(tmp_path / "sent", "kvasir-seg")
    (tmp_path / "root").symlink_to("sent")
    run("kvasir-seg", "--root", tmp_path / "root", "--out", tmp_path / "out")
    (tmp_path / "torn").mkdir()
    for name in ("images", "masks"):
        (tmp_path / "torn" / name).symlink_to(tmp_path / "sent" / name)
    args = ["--root", tmp_path / "torn", "--out", tmp_path / "out2"]
    for form in ("kvasir-seg", "classification"):
        assert "images: is a link" in run(form, *args, fails=True)
    run("kvasir-seg", *args, "--follow-links")
    assert boxes_of(tmp_path / "out2") == boxes_of(tmp_path / "out")


def back(to, out, images):
    """What our readers make of an exported folder."""
    rejects = Rejects()
    if to == "labelme":
        return formats.read_labelme(out, rejects, out / "none", images, CLASSES)
    if to == "cvat":
        return formats.read_cvat([out / "annotations.xml"], images, rejects, CLASSES)
    return formats.read_mask_folder(images, out, rejects, "files", classes=CLASSES)


def saved(folder, lesions_of):
    """A data set of images {name: [(mask, category, fields)]}, written as files."""
    samples = []
    for i, (name, lesions) in enumerate(lesions_of.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = lesions[0][0].shape if lesions else (40, 60)
        Image.new("RGB", (width, height), (i % 256, i // 256, 0)).save(path)
        annotations = [annotation_from_mask(m, c, **fields) for m, c, fields in lesions]
        samples.append(Sample(name, inspect_image(path), annotations))
    return Source(samples, CATEGORIES, {})


def check_masks(to, source, tmp_path):
    assert export(source, FORMATS[to], tmp_path / "out") == []
    returned = back(to, tmp_path / "out", tmp_path / "images").samples
    theirs = {sample.file_name: sample.annotations for sample in returned}
    assert {sample.file_name for sample in source.samples} == theirs.keys()
    for sample in source.samples:
        assert len(sample.annotations) == len(theirs[sample.file_name])
        for ours in sample.annotations:
            alike = [a for a in theirs[sample.file_name] if a["category_id"] == ours["category_id"]]
            rles = [annotation["segmentation"] for annotation in alike]
            overlaps = mask_util.iou([ours["segmentation"]], rles, [0] * len(rles))
            assert overlaps.max() >= (1 if to == "masks" else 0.99)


@pytest.mark.parametrize("to", WRITABLE)
def test_lesions_and_back(to, kvasir_352, tmp_path):
    paths = sorted((kvasir_352 / "masks").iterdir())[:60]  # some have holes, some several parts
    masks = {f"{path.stem}.png": [(read_mask(path), 1, {})] for path in paths}
    check_masks(to, saved(tmp_path / "images", masks | {"healthy.png": []}), tmp_path)


@pytest.mark.parametrize("to", WRITABLE)
@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mask_and_back(to, data, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("any")
    shape = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    masks = data.draw(st.lists(arrays(bool, shape), max_size=3))
    lesions = {mask.tobytes(): (mask, 1 + i % 2, {}) for i, mask in enumerate(masks) if mask.any()}
    assume(len(lesions) == len(masks) > 0)
    # Masks that come back at an IoU of 0.99 may come back equal, and equal ones are refused.
    assume(all((a & b).sum() < 0.98 * (a | b).sum() for a, b in combinations(masks, 2)))
    check_masks(to, saved(tmp_path / "images", {"a.png": list(lesions.values())}), tmp_path)


@pytest.fixture
def described(tmp_path):
    """One image with fields of every kind, and one without a lesion, in a folder in images/."""
    mask = np.zeros((40, 60), bool)
    mask[5:20, 5:30] = True
    parts = mask.copy()
    parts[30:35, 40:50] = True
    fields = {"lesion_id": "l <1>", "size_mm": 12, "sure": False, "occluded": True}
    lesions = [(mask, 1, fields), (parts, 2, {"iscrowd": 1, "depth": 0.5})]
    source = saved(tmp_path / "images", {"a.png": lesions, "b/c.png": []})
    source.samples[0].fields.update(patient_id="p1", blurred=True)
    return source


@pytest.mark.parametrize("to", ["labelme", "cvat"])
def test_fields(to, described, tmp_path):
    out = tmp_path / "deep" / "out"
    notes = export(described, FORMATS[to], out)
    first, second = back(to, out, tmp_path / "images").samples
    lesion, crowd = first.annotations
    kept = ("lesion_id", "size_mm", "sure", "occluded", "iscrowd")
    assert [lesion[key] for key in kept] == ["l <1>", 12, False, True, 0]
    assert (crowd["iscrowd"], crowd["depth"]) == (1, 0.5 if to == "labelme" else "0.5")
    assert (second.file_name, second.annotations) == ("b/c.png", [])
    if to == "cvat":
        assert notes == ["not in CVAT's file: blurred, patient_id of the images"]
        return
    assert first.fields == {"patient_id": "p1", "blurred": True} and notes == []
    for name in ("a", "b/c"):
        path, image = out / f"{name}.json", tmp_path / "images" / f"{name}.png"
        image_path = json.loads(path.read_text())["imagePath"]
        assert image_path[0] == "." and (path.parent / image_path).samefile(image)


def test_labels_of_a_cvat_task(described, tmp_path):
    def kinds(out):
        export(described, FORMATS["cvat"], out)
        adenoma, cancer = json.loads((out / "labels.json").read_text())
        assert [adenoma["name"], cancer["name"]] == CLASSES
        return {a["name"]: (a["input_type"], a["values"]) for a in adenoma["attributes"]}

    text, check_box = ("text", [""]), ("checkbox", ["false"])
    number = ("number", ["0", "12", "1"])
    assert kinds(tmp_path / "a") == {"lesion_id": text, "size_mm": number, "sure": check_box}
    # An annotator who adds or opens a lesion gets no 0 mm from CVAT for it.
    described.samples[0].annotations[1]["category_id"] = 1
    kept = kinds(tmp_path / "b")
    assert (kept["size_mm"], kept["sure"], kept["iscrowd"]) == (text, text, check_box)


def test_what_masks_cannot_keep(described, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BadInputError, match="a.png: .*crowd"):
        export(described, FORMATS["masks"], out)
    assert not out.exists()
    described.samples[0].annotations.pop()
    notes = export(described, FORMATS["masks"], out)
    assert notes == ["not in the masks: blurred, lesion_id, occluded, patient_id, size_mm, sure"]
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert written == ["a/adenoma_1.png", "b/c/0.png"]
    for name in ("x/y", "cancer_2", "7", "_"):
        odd = replace(described, categories=[{"id": 1, "name": name}])
        with pytest.raises(BadInputError, match=name):
            export(odd, FORMATS["masks"], tmp_path / "other")
    described.samples[0].annotations[0]["keypoints"] = [1, 2, 2]
    described.samples[0].fields["device"] = {"maker": "x"}
    for to in WRITABLE:
        notes = export(described, FORMATS[to], tmp_path / to)
        assert "lists and objects cannot be kept: device, keypoints" in notes
    lesion = (np.ones((4, 4), bool), 1, {"remark": "a\x01b"})
    source = saved(tmp_path / "two", {"a.png": [lesion], "a.bmp": [lesion]})
    for to in ("labelme", "masks"):
        with pytest.raises(BadInputError, match="a.bmp: would share its file with .*a.png"):
            export(source, FORMATS[to], tmp_path / "other")
    with pytest.raises(BadInputError, match=".x01"):
        export(source, FORMATS["cvat"], tmp_path / "other")


def test_prepared_data_open_in_supervision(kvasir_original, tmp_path, run):
    """Without glue code: the lines of docs/guide/annotation-tools.md."""
    sv = pytest.importorskip("supervision")
    args = "--root", kvasir_original, "--out", tmp_path / "out", "--ratio", "1:0:0"
    run("kvasir-seg", *args, "--min-area", 1, "--seed", 3)
    assert json.loads((tmp_path / "out" / "splits.json").read_text())["seed"] == 3
    files = f"{tmp_path}/out/images", f"{tmp_path}/out/annotations/train.json"
    dataset = sv.DetectionDataset.from_coco(*files, force_masks=True)
    assert dataset.classes == ["polyp"] and len(dataset) == 5
    for path, image, detections in dataset:
        mask = read_mask(kvasir_original / "masks" / Path(path).name)
        assert image.shape[:2] == mask.shape and set(detections.class_id) == {0}
        assert np.array_equal(detections.mask.any(axis=0), mask)
