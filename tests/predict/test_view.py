"""The endoscope's view is what a network sees, in training, evaluation and prediction alike."""

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from dicoms import write_dicom
from endoscope_frames import draw_frame
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imrcnn_d2 import model_zoo
from imrcnn_d2.cli import demo_app, export, predict, robustness, train, validate
from imrcnn_d2.data import mapper
from imrcnn_d2.data.catalog import register_lesion_dataset
from imrcnn_d2.data.endoscope_view import Box, View, find_crop, find_view
from imrcnn_d2.data.loader import SeededDataset, build_train_loader
from imrcnn_d2.data.mapper import ClassificationMapper, CropToView, LesionMapper, in_frame
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.deploy import Predictor, load_model, outputs, predict_files
from imrcnn_d2.deploy.live import predict_live
from imrcnn_d2.deploy.predictor import FrameViews
from imrcnn_d2.evaluation import LesionEvaluator

from .conftest import config, read_coco, same, write_video


def frame(seed=0, shape="octagon"):
    return draw_frame(shape, inset="map", seed=seed, height=120, width=160)[0]


@pytest.fixture(scope="module")
def cropping(weights):
    return Predictor(None, weights, crop_view=True)


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
    options = {"save": ("masks", "overlays")}
    pytest.raises(ValueError, predict_files, predictor, [folder], out, **options).match("crop_view")
    predict_files(predictor, [folder], tmp_path / "whole")
    assert "view" not in (tmp_path / "whole" / "predictions.json").read_text()


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
    dim, kept = [views(half) for _ in range(9)][-1], views(bright)  # the tenth
    assert views(frame(1, "square")) is views(black) is kept and kept.box == expected != dim.box
    views = FrameViews()
    assert views(bright).box == views(half).box == expected, "by all that the frames show"
    assert views(np.zeros((240, 320, 3), np.uint8)) is None, "another size is another view"
    late = FrameViews()
    assert not any(late(black) for _ in range(20))
    assert late(bright).box == expected, "looked for until something is lit"


HEIGHT, WIDTH = 30, 40
SIDES = st.tuples(*(st.integers(0, n) for n in (WIDTH, HEIGHT, WIDTH, HEIGHT)))


def box_mask(box, value=1):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = value
    return mask


def ordered(sides):
    """A box of at least a pixel."""
    (x0, x1), (y0, y1) = sorted(sides[::2]), sorted(sides[1::2])
    x0, y0 = min(x0, WIDTH - 1), min(y0, HEIGHT - 1)
    return Box(x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))


@given(sides=SIDES, seed=st.integers(0, 99))
def test_there_and_back(sides, seed):
    """Cropped and put back, masks, RLE, boxes and polygons are what they were within the view."""
    box, rng = ordered(sides), np.random.default_rng(seed)
    x0, y0, x1, y1 = box
    corners = np.array([(x0, y0), (x1 - 1, y0), (x1 - 1, y1 - 1), (x0, y1 - 1)], np.int32)
    view = View((HEIGHT, WIDTH), corners)
    assert view.box == box and np.array_equal(view.mask, box_mask(box))
    crop = CropToView(view)
    masks = rng.random((3, HEIGHT, WIDTH)) > 0.5
    corners = rng.uniform(0, HEIGHT, (3, 4)).astype(np.float32)
    cropped = Instances((crop.h, crop.w))
    cropped.pred_boxes = Boxes(torch.from_numpy(corners - np.float32([box.x0, box.y0] * 2)))
    parts = np.stack([crop.apply_segmentation(mask) for mask in masks])
    cropped.pred_masks = torch.from_numpy(parts)
    frame = crop.to_frame(cropped)
    assert frame.image_size == (HEIGHT, WIDTH)
    torch.testing.assert_close(frame.pred_boxes.tensor, torch.from_numpy(corners))
    for mask, part, back in zip(masks, parts, frame.pred_masks.numpy(), strict=True):
        expected = mask & box_mask(box).view(bool)
        assert np.array_equal(back, expected)
        rle = outputs.patch_rle(part, box.x0, box.y0, HEIGHT, WIDTH)
        assert rle == mask_util.encode(np.asfortranarray(expected.view(np.uint8)))
    (polygon,) = crop.apply_polygons([corners.reshape(-1, 2).copy()])
    assert np.allclose(polygon + [box.x0, box.y0], corners.reshape(-1, 2), atol=1e-4)


@pytest.fixture
def screen(tmp_path):
    """A full-screen image and its dataset dict: a lesion in the view, one in the map over it and
    one on the black half."""
    image, view, inset = draw_frame("octagon", inset="map", height=240, width=320)
    Image.fromarray(image).save(tmp_path / "screen.png")
    x0, y0, x1, y1 = inset
    places = [(200, 90, 230, 110), (x0 + 4, y0 + 4, x1 - 4, y1 - 4), (10, 20, 40, 40)]
    annotations = []
    for left, top, right, bottom in places:
        mask = np.zeros(view.shape, np.uint8)
        mask[top:bottom, left:right] = 1
        fields = annotation_from_mask(mask, 0, iscrowd=0)
        annotations.append({**fields, "bbox_mode": BoxMode.XYWH_ABS})
    record = {"file_name": str(tmp_path / "screen.png"), "image_id": 1, "height": 240, "width": 320}
    return image, {**record, "annotations": annotations}


def test_training_evaluation_and_prediction_see_the_same(screen, weights, caplog):
    image, record = screen
    cfg = config("INPUT.CROP_TO_VIEW", True, "INPUT.MIN_SIZE_TRAIN", (64,))
    cfg.merge_from_list(["INPUT.AUG.VFLIP_PROB", 0.0, "INPUT.AUG.ROT90", False])
    cfg.merge_from_list(["INPUT.AUG.COLOR", 0.0, "INPUT.RANDOM_FLIP", "none"])
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    loaded = load_model(cfg, weights)
    predictor = Predictor(cfg, weights)
    view = find_crop(image)
    trained = LesionMapper(cfg, is_train=True)(record)
    tested = LesionMapper(cfg, is_train=False)(record)
    assert torch.equal(trained["image"], tested["image"])
    assert torch.equal(tested["image"], predictor.prepare(image, view))
    with torch.no_grad():
        (output,) = loaded.model([tested])
    expected = in_frame(tested, output["instances"])
    result = predictor(image)
    assert len(result) and result.image_size == (240, 320)
    same(result, expected)
    # Of the three lesions one is in the view, where the scaled crop has it.
    (box,) = trained["instances"].gt_boxes.tensor.numpy()
    scale = tested["image"].shape[1] / tested["height"]
    moved = np.array([200, 90, 230, 110]) - [*view.box[:2], *view.box[:2]]
    assert box == pytest.approx(scale * moved, abs=0.5)
    assert "screen.png" in caplog.text and "2, left out" in caplog.text
    # A classifier's image is of the view as well.
    cfg = config("INPUT.SIZE", 32, "INPUT.CROP_TO_VIEW", True, model="efficientnet_lite0")
    cropped = ClassificationMapper(cfg, is_train=False)({**record, "label": 0})["image"]
    part = cv2.resize(view.crop(image), (32, 32), interpolation=cv2.INTER_AREA)
    assert abs(cropped.numpy().transpose(1, 2, 0).astype(int) - part).mean() < 12


def test_frames_without_a_lesion_or_a_view(screen, tmp_path):
    image, record = screen
    cfg = config("INPUT.CROP_TO_VIEW", True)
    sample = LesionMapper(cfg, is_train=True)({**record, "annotations": []})
    assert len(sample["instances"]) == len(sample["instances"].gt_masks) == 0
    Image.fromarray(image // 30).save(record["file_name"])  # nothing is lit
    for either in (cfg, config()):
        sample = LesionMapper(either, is_train=False)(record)
        assert "view" not in sample and (sample["height"], sample["width"]) == (240, 320)


def test_a_training_finds_the_view_of_a_file_once(screen, tmp_path, monkeypatch):
    _, record = screen
    Image.fromarray(frame(1, "square")).save(tmp_path / "other.png")
    other = {"file_name": str(tmp_path / "other.png"), "image_id": 2, "annotations": []}
    cfg, records = config("INPUT.CROP_TO_VIEW", True), [record, other]
    searched = set()

    def search_once(image):
        assert image.tobytes() not in searched
        searched.add(image.tobytes())
        return find_crop(image)

    monkeypatch.setattr(mapper, "find_crop", search_once)
    loader = build_train_loader(
        records, mapper=LesionMapper(cfg, is_train=True), total_batch_size=2, num_workers=1
    )
    loader.batch_sampler.start_at(seed=3, iteration=0)
    epochs = list(zip(loader.batch_sampler, loader, range(3), strict=False))
    monkeypatch.setattr(mapper, "find_crop", find_crop)
    for keys, samples, _ in epochs:
        assert {key[2] for key in keys} == {0, 1}
        for key, sample in zip(keys, samples, strict=True):
            anew = SeededDataset(records, LesionMapper(cfg, is_train=True))[key]
            assert torch.equal(sample["image"], anew["image"])
            assert (sample["height"], sample["width"]) == (anew["height"], anew["width"])
            boxes = (each["instances"].gt_boxes.tensor for each in (sample, anew))
            assert torch.equal(*boxes)


def test_which_views_are_not_relied_on():
    frame, truth, _ = draw_frame("disc")
    assert find_crop(frame).box == find_view(frame).box
    small = np.zeros_like(frame)
    small[200:300, 300:400] = cv2.resize(frame, (100, 100))
    for other in (small, np.zeros_like(frame)):
        assert find_crop(other) is None
    for shape in ((1, 1), (2, 5), (1, 500), (6, 1000)):
        thin = np.full((*shape, 3), (200, 100, 90), np.uint8)
        assert find_crop(thin) is None or find_crop(thin).is_whole
    strip = np.zeros_like(frame)
    strip[20:120] = (200, 120, 100)
    assert find_crop(strip) is None, "a banner"
    corners = np.zeros_like(frame)  # what is lit is a thin triangle's sides
    cv2.polylines(corners, [np.array([(40, 40), (600, 40), (40, 440)])], True, (220, 120, 90), 14)
    assert find_crop(corners) is None
    whole, _, _ = draw_frame("whole")
    smooth = np.full_like(whole, (190, 90, 70))  # mucosa in all corners, round a brighter lesion
    cv2.ellipse(smooth, (320, 240), (120, 100), 0, 0, 360, (230, 160, 130), -1)
    for image in (whole, smooth):
        view = find_crop(image)
        assert view.is_whole and np.array_equal(view.crop(image), image)


def test_a_part_of_the_view_beyond_a_shadow():
    """A lit lesion there belongs to the view; writing, a map and a second image do not."""
    frame = np.zeros((400, 600, 3), np.uint8)
    cv2.ellipse(frame, (200, 200), (170, 180), 0, 0, 360, (200, 110, 90), -1)
    apart = frame.copy()
    cv2.ellipse(apart, (410, 220), (28, 60), 0, 0, 360, (120, 50, 40), -1)
    assert find_view(apart).box.x1 == pytest.approx(438, abs=4)
    for colour in ((200, 200, 200), (20, 165, 135)):
        other = frame.copy()
        cv2.ellipse(other, (410, 220), (28, 60), 0, 0, 360, colour, -1)
        assert find_view(other).box == find_view(frame).box
    second = frame.copy()
    second[160:280, 382:480] = (180, 90, 70)
    assert find_view(second).box == find_view(frame).box


def test_an_evaluation_is_of_the_whole_frame(screen, tmp_path):
    """Predictions that are right in the crop are right in the frame; lesions that the view leaves
    out are missed."""
    _, record = screen
    annotations = [{**a, "id": i, "image_id": 1} for i, a in enumerate(record["annotations"], 1)]
    for annotation in annotations:
        del annotation["bbox_mode"]
        annotation["category_id"] = 1
    image = {"id": 1, "file_name": "screen.png", "height": 240, "width": 320}
    coco = {"images": [image], "categories": [{"id": 1, "name": "polyp"}]}
    (tmp_path / "gt.json").write_text(json.dumps({**coco, "annotations": annotations}))
    name = f"view {tmp_path}"
    register_lesion_dataset(name, tmp_path / "gt.json", tmp_path)
    sample = LesionMapper(config("INPUT.CROP_TO_VIEW", True), is_train=False)(
        DatasetCatalog.get(name)[0]
    )
    crop = sample["view"]
    output = Instances((sample["height"], sample["width"]))
    part = crop.apply_segmentation(mask_util.decode(record["annotations"][0]["segmentation"]))
    output.pred_masks = torch.from_numpy(part.astype(bool))[None]
    output.pred_boxes = output_boxes = Boxes(torch.tensor([[200.0, 90, 230, 110]]))
    output_boxes.tensor -= torch.tensor([crop.x0, crop.y0, crop.x0, crop.y0])
    output.scores, output.pred_classes = torch.ones(1), torch.zeros(1, dtype=int)
    evaluator = LesionEvaluator(name)
    evaluator.reset()
    evaluator.process([sample], [{"instances": output}])
    lesion = evaluator.evaluate()["lesion"]
    metrics = lesion["precision"], lesion["recall"], lesion["iou"]
    assert metrics == pytest.approx((100, 100 / 3, 100))


def test_the_weights_say_what_they_see_and_a_switch_what_they_shall(tiny_run, weights, tmp_path):
    names = [name for name in model_zoo.list() if name.endswith(".yaml")]
    shipped = {name: model_zoo.get_config(name).INPUT.CROP_TO_VIEW for name in names}
    assert shipped == {name: not name.endswith("_paper.yaml") for name in shipped}
    text = (tiny_run / "config.yaml").read_text()
    key = "  CROP_TO_VIEW: false\n"
    assert text.count(key) == 1
    state = torch.load(weights, weights_only=True)
    content, path = {**state, "artifact": 1, "classes": ["polyp"]}, tmp_path / "model.pth"
    # Weights of before the key see whole frames.
    for stored, switch, seen in (
        (key, None, False),
        ("", None, False),
        ("", True, True),
        (key.replace("false", "true"), None, True),
    ):
        torch.save({**content, "config": text.replace(key, stored)}, path)
        assert load_model(None, path, crop_view=switch).cfg.INPUT.CROP_TO_VIEW is seen
    sees_view, sees_all = (Predictor(None, path, crop_view=switch) for switch in (None, False))
    assert sees_view.crop_view and sees_view.metadata["crop_view"] is True
    assert not sees_all.crop_view and "crop_view" not in sees_all.metadata
    common = {
        predict: ["--weights", "w", "--input", "i", "--output", "o"],
        validate: ["--weights", "w", "--output", "o"],
        robustness: ["--weights", "w", "--output", "o"],
        demo_app: [],
        export: ["--weights", "w", "--format", "onnx", "--images", "i", "--output", "o"],
    }
    for command, arguments in common.items():
        for options, expected in (([], None), (["--crop-view"], True), (["--no-crop-view"], False)):
            args = command.argument_parser().parse_args([*arguments, *options])
            assert args.crop_view is expected, command


def test_an_export_keeps_what_the_switch_says(weights, cropping, tmp_path):
    Image.fromarray(frame()).save(tmp_path / "a.png")
    path = tmp_path / "model.safetensors"
    arguments = ["--format", "safetensors", "--images", tmp_path / "a.png", "--crop-view"]
    export.main([str(a) for a in ("--weights", weights, *arguments, "--output", path)])
    exported = Predictor(None, path)
    assert exported.crop_view and exported.cfg.INPUT.CROP_TO_VIEW
    same(exported(frame()), cropping(frame()))


def test_an_evaluation_sees_as_the_weights_were_trained():
    cfg = model_zoo.get_config("imrcnn_lite")
    for known, opts, expected in (
        (None, [], True),
        (True, [], True),
        (False, [], False),
        (False, ["INPUT.CROP_TO_VIEW", "True"], True),
    ):
        assert train._seeing_as_trained(cfg, known, opts).INPUT.CROP_TO_VIEW is expected
