"""External validation: frozen weights on other hospitals' data, which they must not have seen."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image

from imrcnn_d2.cli import validate
from imrcnn_d2.data.external import read_folders, read_prepared
from imrcnn_d2.data.training_images import hash_image, seen_in_training
from imrcnn_d2.deploy.runtimes import TorchRuntime
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.report import validation
from imrcnn_d2.utils.files import BadInputError

from .conftest import TAU, read_coco, read_table, save_image


def prepared(folder, splits, *, boxes=False, **fields):
    """A prepared data set of images by split, each with a lesion, but for every third image; the
    fields of an image are functions of its seed."""
    for split, seeds in splits.items():
        images, annotations = [], []
        for seed in seeds:
            name = f"{seed}.png"
            save_image(folder / "images" / name, seed)
            values = {key: field(seed) for key, field in fields.items()}
            images.append({"id": seed, "file_name": name, "height": 60, "width": 80, **values})
            if seed % 3:
                region = {"bbox": [10, 10, 30, 40]}
                if not boxes:
                    region["segmentation"] = [[10, 10, 40, 10, 40, 50, 10, 50]]
                ids = {"id": seed, "image_id": seed, "category_id": 7}
                annotations.append({**ids, **region, "lesion_id": f"l{seed}", "iscrowd": 0})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 7, "name": "adenoma"}]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    (folder / "splits.json").write_text("{}")
    return folder


@pytest.fixture
def hashed(loaded, tmp_path):
    """A function from image files to weights that were trained on them."""

    def make(*paths):
        hashes = sorted(map(hash_image, paths))
        path = tmp_path / f"hashed_{len(hashes)}.safetensors"
        TorchRuntime.export(replace(loaded, metadata={"training_images": hashes}), path)
        return path

    return make


@pytest.fixture
def page(monkeypatch):
    """What the report is made of, in place of the report: the results, the folder, the texts."""
    page, pool, parts = Mock(), validation.Validation.of, {}

    def of(results, **texts):
        parts.update(results=results, texts=texts)
        return pool(results, **texts)

    def write(_, output, image_root):
        page(parts["results"], output, **parts["texts"], image_root=image_root)
        return [output / "validation.html"]

    monkeypatch.setattr(validation.Validation, "of", of)
    monkeypatch.setattr(validation, "write_validation", write)
    return page


def run(weights, output, *arguments):
    arguments = ["--weights", weights, "--output", output, *arguments]
    validate.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 1
    return capsys.readouterr().err


def test_two_hospitals(hashed, predictor, tmp_path, page, capsys):
    """All images of all splits, at the stored threshold, by centre; ids of one hospital are none of
    the other's."""
    fields = {"patient_id": lambda seed: f"p{seed % 2}", "centre": lambda seed: f"C{seed % 2 + 1}"}
    one = prepared(tmp_path / "one", {"train": (1, 2), "val": (3,), "test": (4, 5, 6)}, **fields)
    two = prepared(tmp_path / "two", {"test": (7, 8, 9)}, patient_id=lambda seed: "p0")
    trained_on = save_image(tmp_path / "own.png", 99)
    weights, out = hashed(trained_on), tmp_path / "out"
    run(weights, out, "--data", one, two, "--by", "class")
    printed = capsys.readouterr().out
    assert "C1" in printed and "two" in printed and "Weights and threshold were used" in printed

    truth = json.loads((out / "ground_truth.json").read_text())
    assert [image["id"] for image in truth["images"]] == list(range(1, 10))
    assert [image["centre"] for image in truth["images"][-4:]] == ["C1", "two", "two", "two"]
    patients = {image["patient_id"] for image in truth["images"]}
    assert patients == {"one/p0", "one/p1", "two/p0"}
    assert [a["lesion_id"] for a in truth["annotations"][-2:]] == ["two/l7", "two/l8"]
    assert truth["categories"] == [{"id": 1, "name": "polyp"}]
    assert {a["class"] for a in truth["annotations"]} == {"adenoma"}

    predictions = read_coco(out / "predictions")
    assert predictions["info"]["tau"] == TAU and len(predictions["images"]) == 9
    assert {i["file_name"] for i in predictions["images"]} == {
        i["file_name"] for i in truth["images"]
    }
    (results, folder), texts = page.call_args
    assert folder == out and results.meta["tau"] == TAU and results.meta["images"] == 9
    assert list(results.by_group) == ["centre", "class"]
    sizes = {name: group.n["images"] for name, group in results.by_group["centre"].groups.items()}
    assert sizes == {"C1": 3, "C2": 3, "two": 3}
    assert texts["marks"] == [] and f"{TAU:g}" in texts["facts"]["Threshold"]
    assert (Path(texts["image_root"]) / truth["images"][0]["file_name"]).is_file()
    for folder in (one, two):
        (logged,) = read_table(folder / "test_evaluations.csv")
        assert logged["output"] == str(out)

    files = out / "ground_truth.json", out / "predictions" / "predictions.json"
    again = evaluate_lesions(*files, tau=TAU)
    assert results.lesion == pytest.approx(again.lesion, nan_ok=True)
    assert results.segm == pytest.approx(again.segm, nan_ok=True)
    written = json.loads((out / "metrics.json").read_text())
    assert written["lesion"]["TP"] == again.lesion["TP"]
    assert written["meta"]["predictions"]["tau"] == TAU

    before = (out / "predictions" / "progress.jsonl").read_bytes()
    run(weights, out, "--data", one, two)
    assert (out / "predictions" / "progress.jsonl").read_bytes() == before, "predicted again"


def test_training_images_are_refused(hashed, tmp_path, page, capsys, caplog):
    """By their pixels, whatever their files are named; copies of another size are reported."""
    data = prepared(tmp_path / "data", {"test": (1, 2, 3, 4)})
    for seed, name in ((1, "a.bmp"), (2, "b.png")):
        save_image(tmp_path / name, seed)
    pattern = np.random.default_rng(3).integers(0, 255, (15, 20, 3), dtype=np.uint8)
    large = Image.fromarray(pattern).resize((320, 240), Image.Resampling.BICUBIC)
    large.resize((80, 60)).save(data / "images" / "3.png")
    large.save(tmp_path / "c.jpg", quality=80)
    weights = hashed(*(tmp_path / name for name in ("a.bmp", "b.png", "c.jpg")))
    message = refused(capsys, weights, tmp_path / "out", "--data", data)
    for part in ("2 of 4", "1.png", "2.png", "--allow-training-data", "training_images.csv"):
        assert part in message, part
    assert not (tmp_path / "out" / "predictions").exists() and "3.png" not in message

    run(weights, tmp_path / "out", "--data", data, "--allow-training-data")
    marks = page.call_args.kwargs["marks"]
    assert len(marks) == 2 and "2 of 4" in marks[0] and "1 of 4" in marks[1]
    assert "3.png" in caplog.text
    rows = {
        Path(row["file"]).name: row["training image"]
        for row in read_table(tmp_path / "out" / "training_images.csv")
    }
    assert rows == {"1.png": "same", "2.png": "same", "3.png": "alike"}
    assert all(mark in capsys.readouterr().out.replace("\n", " ") for mark in marks[:1])


def test_images_are_compared_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("imrcnn_d2.data.training_images._BLOCK", 2)
    paths = [save_image(tmp_path / f"{seed}.png", seed) for seed in range(5)]
    seen = seen_in_training(paths, [hash_image(paths[4]), hash_image(paths[1])])
    assert seen == ([paths[1], paths[4]], [])
    assert seen_in_training(paths, []) == ([], [])


def test_what_weights_do_not_say_is_said(weights, tmp_path, page, caplog):
    data = prepared(tmp_path / "data", {"test": (1, 2)}, boxes=True)
    run(weights, tmp_path / "out", "--data", data)
    assert len(page.call_args.kwargs["marks"]) == 1 and "trained on" in caplog.text
    assert page.call_args.args[0].meta["iou_type"] == "bbox", "boxes are evaluated as boxes"


def test_folders_of_images_and_masks(hashed, tmp_path, page):
    """Of two centres, whose masks end in _mask; an empty one is of an image without a lesion."""
    for centre, seeds in (("north", (1, 2, 3)), ("south", (4, 5, 6))):
        for seed in seeds:
            save_image(tmp_path / f"images_{centre}" / f"{seed}.png", seed)
            mask = np.zeros((60, 80), np.uint8)
            mask[20:40, 20:50] = 255 * bool(seed % 3)
            path = tmp_path / f"masks_{centre}" / f"{seed}_mask.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(mask).save(path)
    folders = [tmp_path / f"{kind}_{c}" for kind in ("images", "masks") for c in ("north", "south")]
    arguments = ["--images", *folders[:2], "--masks", *folders[2:]]
    run(hashed(save_image(tmp_path / "own.png", 99)), tmp_path / "out", *arguments)
    results = page.call_args.args[0]
    assert results.meta["lesions"] == 4 and results.meta["lesion_free_images"] == 2
    assert list(results.by_group["centre"].groups) == ["north", "south"]
    (tmp_path / "west").mkdir()
    alone = (tmp_path / "images_south").rename(tmp_path / "west" / "images")
    data = read_folders([alone], [folders[3]], ["polyp"])
    assert {image["centre"] for image in data.coco["images"]} == {"west"}
    for seed in (4, 6):
        (folders[3] / f"{seed}_mask.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)^2 files.*4\.png.*6\.png.*--on-error reject"):
        read_folders([alone], [folders[3]], ["polyp"])


def test_what_cannot_be_validated(hashed, classifier_weights, tmp_path, page, capsys, monkeypatch):
    """Each before any image is predicted."""
    monkeypatch.setattr("imrcnn_d2.deploy.batch.predict_files", Mock(side_effect=AssertionError))
    data, empty = prepared(tmp_path / "data", {"test": (1, 2)}), tmp_path / "empty"
    empty.mkdir()
    weights = hashed(save_image(tmp_path / "own.png", 99))
    for parts, *arguments in (
        (("classifier",), classifier_weights, tmp_path / "out", "--data", data),
        ((str(empty), "--all-test"), weights, tmp_path / "out", "--data", empty),
        (("nowhere", "no such"), weights, tmp_path / "out", "--data", tmp_path / "nowhere"),
        (("twice",), weights, tmp_path / "out", "--data", data, data),
        (("device",), weights, tmp_path / "out", "--data", data, "--by", "device"),
    ):
        message = refused(capsys, *arguments)
        assert all(part in message for part in parts), message
    for arguments in ([], ["--data", data, "--images", data], ["--images", data]):
        with pytest.raises(SystemExit) as end:
            run(weights, tmp_path / "out", *arguments)
        assert end.value.code == 2
    with pytest.raises(BadInputError, match=r"test\.json.*adenoma.*cancer"):
        read_prepared([data], ["polyp", "cancer"])
    file = data / "annotations" / "test.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["image_id"] = 99
    file.write_text(json.dumps(content))
    with pytest.raises(BadInputError, match=r"test\.json.*annotation 1"):
        read_prepared([data], ["polyp"])
    classes = [{"id": 1, "image_id": 1, "category_id": 1}]  # of whole images
    file.write_text(json.dumps({**content, "annotations": classes}))
    with pytest.raises(BadInputError, match=r"test\.json.*classifiers"):
        read_prepared([data], ["polyp"])


@pytest.mark.slow
def test_every_table_says_that_training_images_are_among_the_data(hashed, tmp_path):
    data = prepared(tmp_path / "data", {"test": range(1, 9)}, centre=lambda seed: f"C{seed % 3}")
    weights, out = hashed(data / "images" / "4.png"), tmp_path / "out"
    run(weights, out, "--data", data, "--allow-training-data", "--by", "class")
    tables = [path for path in out.glob("*.md") if path.stem != "validation"]
    assert {"centres", "pooled", "calibration_by_centre"} <= {path.stem for path in tables}
    for path in (*tables, out / "validation.md", out / "validation.html"):
        assert "trained on 1 of 8 images" in path.read_text(), path
    with open(out / "centres.csv", newline="") as file:
        assert {row["centre"] for row in csv.DictReader(file)} == {"C0", "C1", "C2"}


@pytest.mark.slow
def test_data_without_any_lesion(hashed, tmp_path):
    """A healthy bowel: sensitivity is not defined, specificity is."""
    data = prepared(tmp_path / "data", {"test": (3, 6, 9)})
    run(hashed(save_image(tmp_path / "own.png", 99)), tmp_path / "out", "--data", data)
    assert "specificity" in (tmp_path / "out" / "centres.md").read_text()


def test_dicom_is_to_be_prepared_first(weights, tmp_path, capsys):
    for folder in ("images", "masks"):
        save_image(tmp_path / folder / "a.png", 1)
    dicom = write_dicom(tmp_path / "images" / "b.dcm")
    save_image(tmp_path / "masks" / "b.png", 1)
    folders = ["--images", tmp_path / "images", "--masks", tmp_path / "masks"]
    error = refused(capsys, weights, tmp_path / "out", *folders)
    assert str(dicom) in error and "prepare-dataset masks" in error
    assert not (tmp_path / "out" / "predictions").exists()


def test_a_name_that_no_table_can_hold_is_refused(weights, tmp_path, capsys):
    for folder in ("images", "masks"):
        save_image(tmp_path / folder / os.fsdecode(b"\xff.png"), 1)
    folders = ["--images", tmp_path / "images", "--masks", tmp_path / "masks"]
    assert r"\udcff.png: " in refused(capsys, weights, tmp_path / "out", *folders)
    assert not (tmp_path / "out" / "predictions").exists()
