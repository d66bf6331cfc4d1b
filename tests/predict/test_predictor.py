"""The predictor gives what Detectron2's evaluation gives; overlays; predict, export, demo-app."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.cli import demo_app, export, predict, robustness
from imrcnn_d2.data import masks
from imrcnn_d2.deploy import Predictor, load_model, outputs, predict_files, pretrained
from imrcnn_d2.deploy.outputs import draw_overlay
from imrcnn_d2.deploy.runtimes import TorchRuntime

from .conftest import RETINANET, config, random_image, read_coco, read_table, same


def test_it_is_what_the_evaluation_sees(predictor, loaded, kvasir_original):
    paths, images = sorted((kvasir_original / "images").iterdir())[:2], []
    for path in paths:
        width, height = Image.open(path).size
        images.append({"file_name": str(path), "image_id": path.stem, "annotations": []})
        images[-1] |= {"width": width, "height": height}
    mapper = predictor.task.mapper(loaded.cfg, is_train=False)
    with torch.no_grad():
        loader = build_detection_test_loader(images, mapper=mapper, num_workers=0)
        expected = [loaded.model(batch)[0]["instances"] for batch in loader]
    for result, instances in zip(predictor(paths), expected, strict=True):
        assert len(result)
        same(result, instances)


def test_masks_are_those_that_detectron2_pastes_and_pycocotools_encodes(predictor):
    """In boxes in the middle, over a border, over all and of less than a pixel."""
    boxes = [
        [10, 20, 30, 50],
        [-9, 5, 20, 70],
        [0, 0, 128, 96],
        [60, 40, 60.4, 40.3],
        [90, 0, 200, 9],
    ]
    boxes = torch.tensor(boxes, dtype=torch.float32)
    masks = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    masks[2] = masks[2] > 0.9
    fields = {"scores": torch.linspace(0.9, 0.5, 5), "pred_classes": torch.zeros(5, dtype=int)}

    def output():
        copies = {"pred_boxes": Boxes(boxes.clone()), "pred_masks": masks.clone(), **fields}
        return Instances((96, 128), **copies)

    expected = detector_postprocess(output(), 60, 80)
    finished = predictor.finish(output(), 60, 80)
    assert torch.equal(finished.pred_masks, expected.pred_masks)
    assert torch.equal(finished.pred_boxes.tensor, expected.pred_boxes.tensor)
    annotations = outputs.records(predictor, output(), 60, 80)
    encoded = [
        mask_util.encode(np.asfortranarray(m.numpy(), np.uint8)) for m in expected.pred_masks
    ]
    assert [a["segmentation"]["counts"].encode() for a in annotations] == [
        e["counts"] for e in encoded
    ]
    assert [a["area"] for a in annotations] == mask_util.area(encoded).tolist()
    assert len(annotations) == 5 and annotations[3]["area"] == 0


def test_detections_inside_others_go_if_the_weights_say_so(
    predictor, loaded, weights, tmp_path, monkeypatch
):
    """In instances and records, of the weights and of a file that is exported of them."""
    monkeypatch.setattr(masks, "PART_SHARE", 0.2)  # random weights find few parts
    content = torch.load(weights, weights_only=True)
    content["operating_point"]["suppress_parts"] = True
    (tmp_path / "config.yaml").write_text(loaded.cfg.dump())
    torch.save(content, path := tmp_path / "whole.pth")
    exported = tmp_path / "exported.safetensors"
    TorchRuntime.export(load_model(None, path, device="cpu"), exported)
    removed = 0
    for file in (path, exported):
        whole = Predictor(None, file, device="cpu")
        assert whole.metadata["suppress_parts"] and "suppress_parts" not in predictor.metadata
        for seed in range(4):
            image = random_image(seed, 60, 80)
            both = [
                outputs.records(p, *p.forward([p.prepare(image)]), 60, 80)
                for p in (predictor, whole)
            ]
            columns = ([r[k] for r in both[0]] for k in ("segmentation", "score", "category_id"))
            is_part = masks.parts_of_others(*columns)
            assert both[1] == [r for r, part in zip(both[0], is_part, strict=True) if not part]
            same(whole(image), predictor(image)[torch.from_numpy(~is_part)])
            removed += is_part.sum()
    assert removed


def test_files_arrays_and_batches(predictor, weights, image_folder):
    images = [random_image(seed, *((60, 80) if seed < 3 else (80, 60))) for seed in range(5)]
    alone, path = predictor(images), image_folder / "a.png"
    assert alone[3].image_size == (80, 60)
    one = predictor(images[0]), predictor(path), *predictor([str(path)])
    results, expected = [*predictor(images, batch_size=4), *one], [*alone, *alone[:1] * 3]
    for pair in zip(results, expected, strict=True):
        same(*pair)
    sizes = {(4, 5): "(4, 5)", (4, 5, 4): "(4, 5, 4)", (0, 5, 3): "5x0", (1, 5000, 3): "5000x1"}
    for shape, named in sizes.items():
        with pytest.raises(ValueError, match=re.escape(named)):
            predictor([np.zeros(shape, np.uint8)])
    pytest.raises(ValueError, predictor, [np.zeros((4, 5, 3), np.float32)]).match("float32")
    assert predictor.tau == predictor.metadata["tau"] == 0.5
    assert predictor.classes == ["polyp"] and predictor.metadata["model"] == "IMR-CNN"
    cfg = predictor.cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT, cfg.MODEL.DEVICE = "BGR", "cuda:7"  # of another machine
    other = Predictor(cfg, weights, tau=0.25)
    assert other.tau == other.metadata["tau"] == 0.25
    assert torch.equal(other.prepare(images[0]), predictor.prepare(images[0]).flip(0))
    assert len(other(images[0]))


@pytest.mark.parametrize("name", ["predictor", "mapped"])
def test_supervision_takes_the_instances(name, request):
    instances = request.getfixturevalue(name)(random_image(0))
    sv = pytest.importorskip("supervision")
    detections = sv.Detections.from_detectron2({"instances": instances})
    assert len(detections) == len(instances) > 1
    assert (detections.xyxy == instances.pred_boxes.tensor.numpy()).all()
    assert (detections.mask == instances.pred_masks.numpy()).all()
    assert (detections.confidence == instances.scores.numpy()).all()
    assert (detections.class_id == instances.pred_classes.numpy()).all()


def test_a_classifier(classifier, classifier_weights, image_folder, tmp_path):
    loaded = load_model(None, classifier_weights)
    mapper = classifier.task.mapper(loaded.cfg, is_train=False)
    paths = [image_folder / "a.png", image_folder / "b" / "c.jpg"]
    with torch.no_grad():
        expected = loaded.model([mapper({"file_name": str(path)}) for path in paths])
    results = classifier(paths, batch_size=2)
    for result, output in zip(results, expected, strict=True):
        torch.testing.assert_close(result, output["scores"], rtol=1e-4, atol=1e-5)
    predict_files(classifier, [image_folder], tmp_path, save=["overlays", "labelme"])
    row, probabilities = read_table(tmp_path / "predictions.csv")[0], results[0].tolist()
    best = classifier.classes[probabilities.index(max(probabilities))]
    assert row["class"] == best
    written = [float(row[f"probability {name}"]) for name in classifier.classes]
    assert written == pytest.approx(probabilities)
    coco = read_coco(tmp_path)
    assert "tau" not in coco["info"]["description"].replace("no tau", "")
    annotation = coco["annotations"][0]
    assert annotation["score"] == pytest.approx(max(probabilities)) and "bbox" not in annotation
    assert json.loads((tmp_path / "labelme" / "a.json").read_text())["flags"] == {best: True}
    assert Image.open(tmp_path / "overlays" / "a.jpg").size == (80, 60)
    no_masks = {"save": ["masks"]}
    pytest.raises(ValueError, predict_files, classifier, [], tmp_path, **no_masks).match("Image")
    pytest.raises(ValueError, Predictor, None, classifier_weights, tau=0.5).match("τ")


def test_a_retinanet(image_folder, tmp_path):
    cfg, weights, out = config(*RETINANET), tmp_path / "model.pth", tmp_path / "out"
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    predictor, loaded = Predictor(cfg, weights), load_model(cfg, weights)
    assert predictor.classes == ["class 1", "class 2"]
    image = predictor.prepare(random_image(0))
    with torch.no_grad():
        (expected,) = loaded.model([{"image": image, "height": 60, "width": 80}])
    boxes = predictor(random_image(0)).pred_boxes.tensor, expected["instances"].pred_boxes.tensor
    torch.testing.assert_close(*boxes, rtol=0, atol=1e-2)
    predict_files(predictor, [image_folder], out, save=["overlays", "labelme"])
    annotations = read_coco(out)["annotations"]
    assert len(annotations) == 12 and "segmentation" not in annotations[0]
    shapes = json.loads((out / "labelme" / "a.json").read_text())["shapes"]
    assert [shape["shape_type"] for shape in shapes] == ["rectangle"] * 4
    x, y, width, height = annotations[0]["bbox"]
    assert shapes[0]["points"] == [[x, y], [x + width, y + height]]
    assert annotations[0]["area"] == pytest.approx(width * height)


def test_the_weights_of_the_package(kvasir_original):
    path, ious = pretrained("demo"), []
    assert path.stat().st_size <= 20e6
    for text in (path.with_suffix(".md"), path.with_name("LICENSE.txt")):
        assert all(name in text.read_text(encoding="utf-8") for name in ("Kvasir-SEG", "PolypGen"))
    predictor = Predictor.from_pretrained("demo", device="cpu")
    for path in sorted((kvasir_original / "images").iterdir()):
        (mask_path,) = (kvasir_original / "masks").glob(f"{path.stem}.*")
        truth = np.asarray(Image.open(mask_path).convert("L")) >= 128
        instances = predictor(path)
        mask = instances.pred_masks[instances.scores >= predictor.tau].any(dim=0).numpy()
        ious.append((mask & truth).sum() / (mask | truth).sum())
    assert len(ious) == 5 and np.median(ious) > 0.8, np.round(ious, 2)


CLASSES = ["polyp", "ulcère"]


def near(overlay, color):
    """The pixels of nearly this color, (H, W)."""
    return (abs(overlay.astype(int) - color) < 60).all(axis=2)


def test_contours():
    image, mask = np.full((240, 320, 3), 90, np.uint8), np.zeros((240, 320), np.uint8, order="F")
    mask[50:150, 50:150] = 1
    mask[80:120, 80:120] = 0
    box = rectangle(1, 100, 80, 60, 50, size=(240, 320), score=0.9)
    without_mask = {key: value for key, value in box.items() if key != "segmentation"}
    for annotation, line in (
        *((box, np.s_[80, 105:155]), (box, np.s_[85:125, 159]), (without_mask, np.s_[80, 105:155])),
        ({**box, "segmentation": mask_util.encode(mask)}, np.s_[79, 85:115]),  # of the hole
    ):
        overlay = draw_overlay(image, [annotation], CLASSES, "")
        assert near(overlay, outputs.CONTOUR)[line].all()
        assert (overlay[123:126, 122:145] == 90).all(), "what is inside stays visible"
    assert (image == 90).all(), "the image itself is left alone"
    boxes = [rectangle(1, 5 * i, 0, 10, 10, i + 1, score=0.9 - i / 10) for i in range(2)]
    png = outputs.mask_png(boxes, (40, 50), CLASSES, {})
    labels = np.asarray(Image.open(io.BytesIO(png)))  # the surer one is on top
    assert (labels[:10, :10] == 1).all() and (labels[:10, 10:15] == 2).all()
    assert labels.sum() == 100 + 2 * 50


@pytest.mark.parametrize("size", [(1080, 1920), (352, 352), (64, 48), (10, 200), (1, 1)])
def test_the_footer_is_there_whatever_the_size(size):
    text = outputs.footer({"weights_sha256": "0123456789abcdef", "tau": 0.5})
    assert text == "Research use only, not for diagnosis · weights 01234567 · τ 0.5"
    image = np.full((*size, 3), 200, np.uint8)
    box = rectangle(1, 0, 0, 1, 1, 2, size=size, score=0.9)
    overlay = draw_overlay(image, [box], CLASSES, text)
    assert overlay.shape == image.shape
    if min(size) > 100:
        bottom = near(overlay[-size[0] // 30 :], 255)
        assert bottom[:, : size[1] // 2].any() and not bottom[:, -1].any(), "its end is cut off"


def test_labels_are_legible():
    image = np.zeros((352, 352, 3), np.uint8)
    class_annotations = [{"category_id": 2, "score": 0.8, "probabilities": [0.2, 0.8]}]
    assert near(draw_overlay(image, class_annotations, CLASSES, ""), 255)[:40, :200].sum() > 50
    boxes = [rectangle(1, 100, 100, 90, 90, size=(352, 352), score=0.9 - i / 10) for i in range(3)]
    texts = [near(draw_overlay(image, boxes[:number], CLASSES, ""), 255) for number in (1, 2, 3)]
    for fewer, more in zip(texts, texts[1:], strict=False):
        assert (more & fewer).sum() > 0.95 * fewer.sum(), "earlier labels are not covered"
        assert more.sum() > fewer.sum() + 50


def run(tool, *arguments):
    tool.main([str(argument) for argument in arguments])


def fails(capsys, tool, arguments, status, part):
    """Checks the exit status of a call, and a part of its message."""
    assert pytest.raises(SystemExit, run, tool, *arguments).value.code == status
    error = capsys.readouterr().err
    # The last line: argparse's usage has the names of all options.
    *_, last = ["", *error.splitlines()]
    assert str(part) in last and "Traceback" not in error, arguments


def test_from_weights_to_results_and_back_through_an_export(
    weights, image_folder, tmp_path, capsys
):
    image, exported = image_folder / "a.png", tmp_path / "model.safetensors"
    (image_folder / "bad.jpg").write_bytes(b"no image")
    common = ["--input", image_folder, "--overlays", "--masks", "--labelme"]
    first = ["--weights", weights, "--output", tmp_path / "a", *common, "--tau", 0.4]
    run(predict, *first)
    assert "3 images predicted; 1 inputs could not be read" in capsys.readouterr().out
    coco = read_coco(tmp_path / "a")
    assert coco["info"]["tau"] == 0.4
    for name in ("overlays/a.jpg", "masks/a.png", "labelme/a.json", "failed.csv"):
        assert (tmp_path / "a" / name).is_file()
    options = ["--format", "safetensors", "--weights", weights, "--images", image]
    run(export, *options, "--output", exported)
    assert "differ by at most 0 (bound 0), boxes by 0 %" in capsys.readouterr().out
    run(predict, "--weights", exported, "--output", tmp_path / "b", *common)
    other = read_coco(tmp_path / "b")
    assert (other["annotations"], other["images"]) == (coco["annotations"], coco["images"])
    assert other["info"]["config_sha256"] == coco["info"]["config_sha256"]

    # Of corrected files, which stay, the run names each.
    (tmp_path / "a" / "labelme" / "a.json").write_text("corrected")
    os.utime(image, (0, 0))
    run(predict, *first)
    assert "labelme/a.json" in capsys.readouterr().out


def test_errors_are_a_line(weights, tiny_run, image_folder, tmp_path, capsys, monkeypatch):
    odd, none, bad = tmp_path / "odd.yaml", tmp_path / "none.yaml", tmp_path / "bad.png"
    odd.write_text("MODEL: {NOSUCH: 1}")
    bad.touch()
    given, output = ["--weights", weights], ["--output", tmp_path / "out"]
    inputs = [*output, "--input", image_folder]
    ray, live = [*inputs, "--engine", "ray"], [*output, "--live", "a.mp4"]
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "imrcnn_d2.deploy.ray", raising=False)
    paths = {none: none, odd: odd, "configs/mrcnn_lite.yaml": weights}
    names = "nothing", "none.pth", tiny_run / "config.yaml"
    for call in (
        *((predict, ["--weights", name, *inputs], 1, name) for name in names),
        *((predict, [*given, *inputs, "--config-file", p], 1, paths[p]) for p in paths),
        (predict, [*given, *live, "--masks"], 2, "--live"),
        (predict, [*given, *live, "--batch-size", 2], 2, "--live"),
        (predict, [*given, *output], 2, "--input"),
        (predict, [*given, *inputs, "--tau", 7], 2, "--tau"),
        (predict, [*given, *ray, "--masks"], 2, "--masks"),
        (predict, [*given, *ray, "--actors", 0], 2, "--actors"),
        (predict, [*given, *ray], 1, "pip install 'imrcnn-d2[ray]'"),
        (predict, [*given, *output, "--input", bad], 1, ""),  # which names it in failed.csv
        (demo_app, ["--weights", "none.pth"], 1, "none.pth"),
        (demo_app, ["--port", 70000], 2, "--port"),
    ):
        fails(capsys, *call)


def test_a_card_that_torch_cannot_use_is_a_line(
    weights, image_folder, tmp_path, capsys, monkeypatch
):
    (tmp_path / "version").write_text("NVRM version: 390.157\n")
    monkeypatch.setattr("imrcnn_d2.engine.config._NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    arguments = ["--weights", weights, "--input", image_folder, "--output", tmp_path / "out"]
    fails(capsys, predict, arguments, 1, "390.157")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the line says
    run(predict, *arguments)


def test_exports_are_checked(weights, image_folder, tmp_path, capsys, monkeypatch):
    target, none = tmp_path / "exports", tmp_path / "none"
    target.mkdir()
    none.mkdir()
    common = ["--weights", weights, "--images", image_folder / "a.png"]
    int8 = [*common, *"--format openvino --precision int8 --output".split(), target / "m.openvino"]
    fp16 = [*common, "--format", "safetensors", "--precision", "fp16", "--output"]
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path))
    monkeypatch.setitem(export.BOUNDS["fp16"], "score", -1)
    fails(capsys, export, int8, 1, "--calibration")
    fails(capsys, export, [*int8, "--calibration", none], 1, none)
    fails(capsys, export, [*fp16, target / "m.safetensors"], 1, "scores differ by")
    fails(capsys, export, [*fp16, target / "m.pth"], 2, "m.pth")
    assert not list(target.iterdir())


@pytest.mark.slow
def test_the_page_is_served_until_it_is_ended(weights, tmp_path, monkeypatch):
    """A process of its own, which leaves nothing in the folder for temporary files."""
    gradio_client = pytest.importorskip("gradio_client", reason="the demo extra is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = [sys.executable, "-W", "ignore", "tools/demo_app.py", "--port", "0", "--weights"]
    options = {"env": {**os.environ, "TMPDIR": str(tmp_path)}, "stdout": subprocess.PIPE}
    process = subprocess.Popen([*command, str(weights)], text=True, **options)
    try:
        lines = iter(process.stdout.readline, "")
        url = next(m[1] for line in lines if (m := re.search(r"Open (http://127\.\S+)", line)))
        client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
        assert list(tmp_path.glob("imrcnn-uploads-*"))
        for size, text in ((7000, "7000x7000"), (70, "<figure")):
            Image.new("L", (size, size)).save(tmp_path / "a.png")
            files = [gradio_client.handle_file(str(tmp_path / "a.png"))]
            assert text in client.predict(files, 0.5, api_name="/look")[1]
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert not list(tmp_path.glob("imrcnn-uploads-*"))
    finally:
        process.kill()


REFUSED = [
    (predict, ["--input", "i", "--actors", "3"], "--actors"),
    (predict, ["--live", "v.mp4", "--follow-links"], "--follow-links"),
    (robustness, ["--plot", "a", "--dataset", "b"], "--dataset"),
    (robustness, ["--plot", "a", "--distortions", "jpeg"], "--distortions"),
]


@pytest.mark.parametrize(("command", "arguments", "named"), REFUSED)
def test_options_without_effect_are_refused(command, arguments, named, capsys):
    weights = ["--weights", "w"] if command is predict else []
    with pytest.raises(SystemExit):
        command.main([*weights, *arguments, "--output", "o"])
    assert f"error: {named} is for" in capsys.readouterr().err
