"""The predictor gives what Detectron2's own evaluation gives, for every kind of input and model."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from dicoms import write_dicom
from endoscope_frames import draw_frame
from PIL import Image

from imrcnn_d2.data.endoscope_view import find_view
from imrcnn_d2.deploy import Predictor, load_model, predict_files, pretrained
from imrcnn_d2.deploy.live import predict_live
from imrcnn_d2.deploy.predictor import FrameViews

from .conftest import RETINANET, config, random_image, read_coco, read_table, same, write_video


def test_it_is_what_the_evaluation_sees(predictor, tiny_run, kvasir_original):
    paths, images = sorted((kvasir_original / "images").iterdir())[:2], []
    for number, path in enumerate(paths):
        size = dict(zip(("width", "height"), Image.open(path).size, strict=True))
        images.append({"file_name": str(path), "image_id": number, "annotations": [], **size})
    loaded = load_model(None, tiny_run / "model_best.pth")
    mapper = predictor.task.mapper(loaded.cfg, is_train=False)
    with torch.no_grad():
        loader = build_detection_test_loader(images, mapper=mapper, num_workers=0)
        expected = [loaded.model(batch)[0]["instances"] for batch in loader]
    for result, instances in zip(predictor(paths), expected, strict=True):
        assert len(result)
        same(result, instances)


def test_files_arrays_and_batches(predictor, tiny_run, image_folder):
    sizes = [(60, 80)] * 3 + [(80, 60)] * 2
    images = [random_image(seed, *size) for seed, size in enumerate(sizes)]
    alone, path = predictor(images), image_folder / "a.png"
    assert alone[3].image_size == (80, 60)
    one = predictor(images[0]), predictor(path), *predictor([str(path)])
    results, expected = [*predictor(images, batch_size=4), *one], [*alone, *alone[:1] * 3]
    for pair in zip(results, expected, strict=True):
        same(*pair)
    for shape, named in {
        **{(4, 5): r"\(4, 5\)", (4, 5, 4): r"\(4, 5, 4\)"},
        **{(0, 5, 3): "5x0", (1, 5000, 3): "5000x1"},
    }.items():
        pytest.raises(ValueError, predictor, [np.zeros(shape, np.uint8)]).match(named)
    pytest.raises(ValueError, predictor, [np.zeros((4, 5, 3), np.float32)]).match("float32")
    assert predictor.tau == predictor.metadata["tau"] == 0.5
    assert predictor.classes == ["polyp"] and predictor.metadata["model"] == "IMR-CNN"
    cfg = predictor.cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT, cfg.MODEL.DEVICE = "BGR", "cuda:7"  # of another machine
    other = Predictor(cfg, tiny_run / "model_best.pth", tau=0.25)
    assert other.tau == other.metadata["tau"] == 0.25
    assert torch.equal(other.prepare(images[0]), predictor.prepare(images[0]).flip(0))
    assert len(other(images[0]))


def test_a_classifier(classifier, classifier_weights, image_folder, tmp_path):
    loaded = load_model(None, classifier_weights)
    mapper = classifier.task.mapper(loaded.cfg, is_train=False)
    paths = [image_folder / "a.png", image_folder / "b" / "c.jpg"]
    with torch.no_grad():
        expected = loaded.model([mapper({"file_name": str(path)}) for path in paths])
    results = classifier(paths, batch_size=2)
    for result, output in zip(results, expected, strict=True):
        torch.testing.assert_close(result, output["scores"], rtol=1e-4, atol=1e-5)
    done = predict_files(classifier, [image_folder], tmp_path, save=["overlays", "labelme"])
    assert done.images == 3
    row, probabilities = read_table(tmp_path / "predictions.csv")[0], results[0].tolist()
    best = classifier.classes[probabilities.index(max(probabilities))]
    assert row["class"] == best
    written = [float(row[f"probability {name}"]) for name in classifier.classes]
    assert written == pytest.approx(probabilities)
    annotation = read_coco(tmp_path)["annotations"][0]
    assert annotation["image_id"] == 1 and "bbox" not in annotation
    assert annotation["score"] == pytest.approx(max(probabilities))
    assert json.loads((tmp_path / "labelme" / "a.json").read_text())["flags"] == {best: True}
    assert Image.open(tmp_path / "overlays" / "a.jpg").size == (80, 60)
    with pytest.raises(ValueError, match="ImageClassifier"):
        predict_files(classifier, [image_folder], tmp_path, save=["masks"])
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
    with pytest.raises(ValueError, match="RetinaNet"):
        predict_files(predictor, [image_folder], tmp_path / "masks", save=["masks"])


def test_the_weights_of_the_package(kvasir_original):
    path, ious = pretrained("demo"), []
    assert path.stat().st_size <= 20e6
    assert "Kvasir-SEG" in path.with_suffix(".md").read_text(encoding="utf-8")
    predictor = Predictor.from_pretrained("demo", device="cpu")
    for path in sorted((kvasir_original / "images").iterdir()):
        (mask_path,) = (kvasir_original / "masks").glob(f"{path.stem}.*")
        truth = np.asarray(Image.open(mask_path).convert("L")) >= 128
        instances = predictor(path)
        mask = instances.pred_masks[instances.scores >= predictor.tau].any(dim=0).numpy()
        ious.append((mask & truth).sum() / (mask | truth).sum())
    assert len(ious) == 5 and np.median(ious) > 0.8, np.round(ious, 2)


def frame(seed=0, shape="octagon"):
    return draw_frame(shape, inset="map", seed=seed, height=120, width=160)[0]


@pytest.fixture(scope="module")
def cropping(tiny_run):
    return Predictor(None, tiny_run / "model_best.pth", crop_view=True)


def xywh(box):
    return [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0]


def test_a_view_gives_what_the_crop_gives_at_its_place(predictor, cropping):
    image = frame()
    view = find_view(image)
    x0, y0, x1, y1 = view.box
    assert x0 > 20 and x1 < 160, "there is something to crop"
    of_crop, of_frame = predictor(view.crop(image)), cropping(image)
    assert len(of_crop) == len(of_frame) > 0 and of_frame.image_size == (120, 160)
    moved = of_crop.pred_boxes.tensor + torch.tensor([x0, y0, x0, y0])
    assert torch.equal(of_frame.pred_boxes.tensor, moved)
    assert torch.equal(of_frame.scores, of_crop.scores)
    assert torch.equal(of_frame.pred_masks[:, y0:y1, x0:x1], of_crop.pred_masks)
    assert of_frame.pred_masks.sum() == of_crop.pred_masks.sum() > 0
    assert not torch.equal(of_frame.scores, predictor(image).scores)
    dark = np.full((60, 80, 3), 4, np.uint8)  # without a view, the whole frame is seen
    assert torch.equal(cropping(dark).pred_boxes.tensor, predictor(dark).pred_boxes.tensor)


def test_outputs_name_the_view(cropping, predictor, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    Image.fromarray(frame()).save(folder / "a.png")
    write_dicom(folder / "b.dcm", frame(1))
    predict_files(cropping, [folder], out, save=("masks", "overlays"))
    coco = read_coco(out)
    assert coco["info"]["crop_view"] is True
    for image, seed in zip(coco["images"], (0, 1), strict=True):
        view = find_view(frame(seed))
        assert (image["width"], image["height"], image["view"]) == (160, 120, xywh(view.box))

    for path in (out / "masks" / "a.png", out / "overlays" / "a.jpg"):
        assert Image.open(path).size == (160, 120)
    # Without it no output names one, and runs are not mixed.
    with pytest.raises(ValueError, match="crop_view"):
        predict_files(predictor, [folder], out, save=("masks", "overlays"))
    predict_files(predictor, [folder], tmp_path / "whole")
    coco = read_coco(tmp_path / "whole")
    assert "crop_view" not in coco["info"] and "view" not in coco["images"][0]


def test_a_video_has_one_view(cropping, tmp_path):
    """Frame 0 is black, 1 is dark at the left: later frames still see what is there."""
    bright, half = frame(), frame()
    half[:, :90] //= 20
    black, expected = np.zeros_like(bright), find_view(bright).box
    film = write_video(tmp_path / "v.mp4", [black, half, *[bright] * 3])
    predict_files(cropping, [film], tmp_path / "out")
    first, *images = read_coco(tmp_path / "out")["images"]
    assert "view" not in first
    assert images[0]["view"][2] < images[1]["view"][2]
    assert images[1]["view"] == images[2]["view"] == images[3]["view"]
    assert images[3]["view"] == pytest.approx(xywh(expected), abs=6), "H.264 blurs"
    report = predict_live(cropping, str(film), tmp_path / "live")
    assert report["about"]["crop_view"] is True
    assert all("view" in image for image in read_coco(tmp_path / "live")["images"][2:])

    views = FrameViews()
    kept = [views(bright) for _ in range(10)][-1]
    assert views(frame(1, "square")) is views(black) is kept and kept.box == expected
    views = FrameViews()
    assert views(bright).box == views(half).box == expected, "by all that the frames show"
    assert views(np.zeros((240, 320, 3), np.uint8)) is None, "another size is another view"
    late = FrameViews()
    assert not any(late(black) for _ in range(20))
    assert late(bright).box == expected, "looked for until something is lit"
