"""Prediction in the view only gives what the cropped image gives, at its place in the frame."""

import contextlib
import json
from fractions import Fraction

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from dicoms import write_dicom
from endoscope_frames import draw_frame
from PIL import Image

from imrcnn_d2.data.endoscope_view import find_view
from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.batch import Journal, predict_files
from imrcnn_d2.deploy.inputs import VideoWriter
from imrcnn_d2.deploy.live import predict_live
from imrcnn_d2.deploy.predictor import FrameViews


def frame(seed=0, shape="octagon"):
    return draw_frame(shape, inset="map", seed=seed, height=120, width=160)[0]


@pytest.fixture(scope="module")
def cropping(tiny_run):
    return Predictor(None, tiny_run / "model_best.pth", crop_view=True)


def xywh(box):
    return [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0]


def test_the_same_as_the_crop_at_its_place(predictor, cropping):
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


def test_a_frame_without_a_view_is_seen_whole(predictor, cropping):
    dark = np.full((60, 80, 3), 4, np.uint8)
    assert torch.equal(cropping(dark).pred_boxes.tensor, predictor(dark).pred_boxes.tensor)


def test_outputs_say_it(cropping, predictor, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(frame()).save(folder / "a.png")
    write_dicom(folder / "b.dcm", frame(1))
    out = tmp_path / "out"
    predict_files(cropping, [folder], out, save=("masks", "overlays"))
    coco = json.loads((out / "predictions.json").read_text())
    assert coco["info"]["crop_view"] is True
    for record, seed in zip(coco["images"], (0, 1), strict=True):
        assert (record["width"], record["height"]) == (160, 120)
        view = find_view(frame(seed))
        assert record["view"] == xywh(view.box)
        found = [a for a in coco["annotations"] if a["image_id"] == record["id"]]
        assert found
        for annotation in found:
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            assert mask.shape == (120, 160)
            outside = mask.copy()
            outside[view.box.slices] = False
            assert not outside.any()
    assert np.asarray(Image.open(out / "masks" / "a.png")).shape == (120, 160)
    with Image.open(out / "overlays" / "a.jpg") as overlay:
        assert overlay.size == (160, 120)
    # without it nothing says so, and the folder is not mixed up
    with pytest.raises(ValueError, match="differs in crop_view"):
        predict_files(predictor, [folder], out, save=("masks", "overlays"))
    predict_files(predictor, [folder], tmp_path / "whole")
    coco = json.loads((tmp_path / "whole" / "predictions.json").read_text())
    assert "crop_view" not in coco["info"] and "view" not in coco["images"][0]


def test_a_video_has_one_view(cropping, tmp_path):
    """Frame 0 is black, 1 is dark at the left: later frames still see what is there."""
    bright = frame()
    half = bright.copy()
    half[:, :90] //= 20
    frames = [np.zeros_like(bright), half, *[bright] * 3]
    with VideoWriter(tmp_path / "v.mp4", time_base=Fraction(1, 25)) as video:
        for number, image in enumerate(frames):
            video.write(image, Fraction(number, 25))
    predict_files(cropping, [tmp_path / "v.mp4"], tmp_path / "out")
    images = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert "view" not in images[0]
    assert images[1]["view"][2] < images[2]["view"][2]
    assert images[2]["view"] == images[3]["view"] == images[4]["view"]
    expected = xywh(find_view(bright).box)
    assert images[4]["view"] == pytest.approx(expected, abs=6), "H.264 blurs"


def test_a_view_is_kept():
    views = FrameViews()
    bright, other = frame(), frame(1, "square")
    kept = [views(bright) for _ in range(10)][-1]
    assert views(other) is kept and views(np.zeros_like(bright)) is kept
    assert kept.box == find_view(bright).box
    views, half = FrameViews(), bright.copy()
    half[:, :90] = 0
    assert views(bright).box == views(half).box == kept.box, "by all that the frames show"
    larger = np.zeros((240, 320, 3), np.uint8)
    assert views(larger) is None, "another size is another view"
    late = FrameViews()
    assert [late(np.zeros_like(bright)) for _ in range(20)] == [None] * 20
    assert late(bright).box == kept.box, "looked for until something is lit"


def test_live(cropping, tmp_path):
    with VideoWriter(tmp_path / "v.mp4", time_base=Fraction(1, 25)) as video:
        for number in range(3):
            video.write(frame(), Fraction(number, 25))
    predict_live(cropping, str(tmp_path / "v.mp4"), tmp_path / "out")
    with contextlib.closing(Journal(tmp_path / "out", {**_run(tmp_path / "out")})) as journal:
        records = [record for record, _ in journal.frames()]
    assert records and all("view" in record for record in records)
    assert json.loads((tmp_path / "out" / "live.json").read_text())["about"]["crop_view"] is True


def _run(folder):
    return json.loads((folder / Journal.FILE).read_text().splitlines()[0])["run"]
