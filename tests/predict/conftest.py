"""A tiny IMR-CNN with random weights, which finds something everywhere, and files to find it in."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from dicoms import write_dicom
from PIL import Image

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.inputs import public_name
from imrcnn_d2.engine import load_config

TAU = 0.5
OPTS = [
    *("INPUT.MIN_SIZE_TEST", 64),
    *("INPUT.MAX_SIZE_TEST", 128),
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.TIMM.WEIGHTS", ""),
    *("MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 10),
]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder that a training leaves: config.yaml and model_best.pth."""
    folder = tmp_path_factory.mktemp("run")
    cfg = load_config("configs/kvasir_seg/imrcnn_lite.yaml", OPTS)
    cfg.OUTPUT_DIR = str(folder)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():  # surer of themselves, so that scores differ and masks have edges
        model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.5)
        model.roi_heads.mask_head.predictor.weight.normal_(std=10)
    point = {"tau": TAU, "rule": "f1", "dataset": "kvasir_seg_val"}
    torch.save({"model": model.state_dict(), "operating_point": point}, folder / "model_best.pth")
    return folder


@pytest.fixture(scope="session")
def predictor(tiny_run):
    """Of the tiny model."""
    return Predictor(None, tiny_run / "model_best.pth")


def random_image(seed, height=60, width=80):
    """A coarse random pattern, (H, W, 3) uint8: JPEG and H.264 keep it nearly."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def image_folder(tmp_path):
    """Three images, one in a folder below."""
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b/c.jpg", "d.png")):
        Image.fromarray(random_image(seed)).save(folder / name)
    return folder


def write_bad_images(folder: Path) -> dict[str, str]:
    """Writes images that cannot be read; returns a part of the reason, by name."""
    frames = [Image.fromarray(random_image(seed)) for seed in range(3)]
    frames[0].save(folder / "cut.png")
    good = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_bytes(b"no image")
    (folder / "zero.ppm").write_bytes(b"P6 0 0 255\n")
    Image.new("RGB", (3000, 1)).save(folder / "thin.png")
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    bomb = bytearray(good)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the size, which is read before any pixel
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bomb)
    return {
        **dict.fromkeys(("cut.png", "empty.jpg", "text.jpg", "zero.ppm"), "no readable image"),
        "thin.png": "3000x1 is too thin",
        "moving.gif": "holds several images",
        "bomb.png": "decompression bomb",
    }


@pytest.fixture
def bad_files(image_folder):
    """
    Files that cannot be read, or not to their end, in the folder of images: by name, a part of the
    reason. "print.jpg" and "deep.png" next to them can be read.
    """
    import av

    reasons = write_bad_images(image_folder)
    Image.fromarray(random_image(0)).convert("CMYK").save(image_folder / "print.jpg")
    Image.fromarray(np.full((60, 80), 30_000, np.uint16)).save(image_folder / "deep.png")
    (image_folder / "film.mp4").write_bytes(b"no film")
    film = image_folder / "cut.mkv"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.gop_size = 80, 60, 5
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(random_image(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    report = write_dicom(image_folder / "report.dcm")
    hollow = write_dicom(image_folder / "hollow.dcm", Rows=60, Columns=80)
    return {
        **reasons,
        "film.mp4": "cannot be decoded from the start",
        "cut.mkv": "frames",
        public_name(report): "without an image",
        public_name(hollow): "pixels",
    }
