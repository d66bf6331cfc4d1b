"""A tiny IMR-CNN with random weights, which finds something everywhere, and files to find it in."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from dicoms import write_dicom
from hypothesis import HealthCheck, settings
from PIL import Image

from imrcnn_d2.deploy import Predictor, load_model
from imrcnn_d2.deploy.inputs import VideoWriter, public_name
from imrcnn_d2.deploy.runtimes import RUNTIMES, base, compiled_cache
from imrcnn_d2.engine import load_config

TAU, CLS_SCORE = 0.5, "roi_heads.box_predictor.cls_score"
MAP = {"slope": 1.5, "offset": -0.75, "dataset": "kvasir_seg_val"}
ALL = ("overlays", "masks", "labelme")
OPTS = [
    *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128, "MODEL.DEVICE", "cpu"),
    *("INPUT.CROP_TO_VIEW", False),  # test_view.py has it
    *("MODEL.TIMM.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.RPN.POST_NMS_TOPK_TEST", 10),
]
RETINANET = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", False),
    *("MODEL.BACKBONE.NAME", "build_retinanet_timm_pafpn_backbone"),
    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.RETINANET.NUM_CLASSES", 2),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "TEST.SCORE_THRESH", 0.0),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
    *("TEST.DETECTIONS_PER_IMAGE", 4, "DATALOADER.NUM_WORKERS", 0),
]


def config(*opts, model="imrcnn_lite"):
    return load_config(f"configs/{model}.yaml", ["DATASETS.ROOT", "kvasir_seg", *OPTS, *opts])


def random_model(cfg, std):
    """A model with random weights, of these modules larger ones, so that scores differ."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for name, value in std.items():
            model.get_submodule(name).weight.normal_(std=value)
    return model


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory):
    """Compiled graphs are not kept in the user's folder."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_cache, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder that a training leaves: config.yaml and model_best.pth."""
    folder, cfg = tmp_path_factory.mktemp("run"), config()
    cfg.OUTPUT_DIR = str(folder)
    (folder / "config.yaml").write_text(cfg.dump())
    model = random_model(cfg, {CLS_SCORE: 0.5, "roi_heads.mask_head.predictor": 10})
    point = {"tau": TAU, "rule": "f1", "dataset": "kvasir_seg_val"}
    content = {"model": model.state_dict(), "operating_point": point, "neck_form": "panet"}
    torch.save(content, folder / "model_best.pth")
    return folder


@pytest.fixture(scope="session")
def weights(tiny_run):
    return tiny_run / "model_best.pth"


@pytest.fixture(scope="session")
def predictor(weights):
    return Predictor(None, weights)


@pytest.fixture(scope="session")
def mapped_weights(tiny_run, weights):
    """The same weights, with a map of scores."""
    content = torch.load(weights, weights_only=True)
    torch.save({**content, "score_map": MAP}, path := tiny_run / "mapped.pth")
    return path


@pytest.fixture(scope="session")
def mapped(mapped_weights):
    return Predictor(None, mapped_weights)


@pytest.fixture(scope="session")
def classifier_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    opts = ["DATASETS.ROOT", "gastric_recognition", "MODEL.DEVICE", "cpu", "INPUT.SIZE", 64]
    cfg = load_config("configs/efficientnet_lite0.yaml", [*opts, "MODEL.TIMM.WEIGHTS", ""])
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": random_model(cfg, {"head": 1}).state_dict()}, folder / "model.pth")
    return folder / "model.pth"


@pytest.fixture(scope="session")
def classifier(classifier_weights):
    return Predictor(None, classifier_weights)


@pytest.fixture(scope="session")
def loaded(weights):
    return load_model(None, weights)


@pytest.fixture(scope="session")
def traced_once(tmp_path_factory):
    """A function that runs another one, for which the graph of a model of the same layers and
    weights is traced once in a session: it takes seconds."""
    folder, write_onnx = tmp_path_factory.mktemp("graphs"), base.write_onnx

    def write(model, example, path):
        digest = hashlib.sha256(str(model).encode())
        for tensor in model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        kept = folder / f"{digest.hexdigest()}.onnx"
        if not kept.exists():
            write_onnx(model, example, kept)
        shutil.copy(kept, path)

    def call(function, *args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "write_onnx", write)
            return function(*args, **options)

    return call


@pytest.fixture(scope="session")
def exported(loaded, predictor, traced_once, tmp_path_factory):
    """A function from runtime and precision to a file of the tiny detector."""
    folder = tmp_path_factory.mktemp("exports")
    images = [predictor.prepare(random_image(seed)) for seed in range(4)]

    def make(name, precision="fp32"):
        path = folder / f"{precision}{RUNTIMES[name].suffix}"
        if not path.exists():
            options = {"example": images[0], "precision": precision, "calibration": images}
            traced_once(RUNTIMES[name].export, loaded, path, **options)
        return path

    return make


@pytest.fixture(scope="session")
def metadata(loaded):
    """Of an exported file of the tiny detector, as JSON has them."""
    return json.loads(json.dumps(base.export_metadata(loaded, "fp32")))


def random_image(seed, height=60, width=80):
    """A coarse random pattern, (H, W, 3) uint8: JPEG and H.264 keep it nearly."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def same(result, expected, score=1e-4, box=1e-2):
    """Fails if detections differ by more than this."""
    assert result.image_size == expected.image_size
    assert torch.equal(result.pred_classes, expected.pred_classes)
    torch.testing.assert_close(result.scores, expected.scores, rtol=0, atol=score)
    boxes = result.pred_boxes.tensor, expected.pred_boxes.tensor
    torch.testing.assert_close(*boxes, rtol=0, atol=box)
    assert (result.pred_masks != expected.pred_masks).float().mean() < 1e-3


def save_image(path, seed, *size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_image(seed, *size)).save(path)
    return path


def write_video(path, images, times=None, aspect=None, rate=25):
    """A video of a number of random images, or of given ones, at ``times`` or a steady rate."""
    images = [random_image(n) for n in range(images)] if isinstance(images, int) else images
    times = times or [Fraction(n, rate) for n in range(len(images))]
    with VideoWriter(path, time_base=Fraction(1, 30000), comment="τ 0.5") as video:
        for image, moment in zip(images, times, strict=True):
            video.write(image, moment, aspect)
    return path


CODECS = {
    **dict.fromkeys(("mkv", "mp4"), ("mpeg4", "aac")),
    **dict.fromkeys(("mov", "flv", "ts", "m2ts"), ("libx264", "aac")),
    **{"webm": ("libvpx", "libopus"), "avi": ("mpeg4", "mp3"), "mpg": ("mpeg2video", "mp2")},
}


def film(path, times, sound=None, rate=20, **options):
    """Of mixed streams, as a camera with a microphone writes it; ``sound`` is its seconds."""
    import av

    kind, sound_kind = CODECS[path.suffix[1:]]
    with av.open(str(path), "w", options=options) as container:
        fast = {"preset": "veryfast", "deadline": "realtime", "cpu-used": "8"}
        video = container.add_stream(kind, rate=rate, options=fast)
        video.width, video.height, video.pix_fmt, video.gop_size = 80, 60, "yuv420p", 5
        video.time_base = video.codec_context.time_base = 1 / Fraction(rate)
        audio = container.add_stream(sound_kind, rate=48000, layout="mono") if sound else None
        noise = np.random.default_rng(0).standard_normal((1, 960)).astype(np.float32) / 10
        heard = 0
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(random_image(number), format="rgb24")
            frame.pts, frame.time_base = round(time * rate), 1 / Fraction(rate)
            container.mux(video.encode(frame))
            while sound and heard <= 48000 * (sound if time == times[-1] else min(sound, time)):
                chunk = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
                chunk.pts, chunk.sample_rate, chunk.time_base = heard, 48000, Fraction(1, 48000)
                heard += 960
                container.mux(audio.encode(chunk))
        for stream in container.streams:
            container.mux(stream.encode())
    return path


def some_hundred(test):
    """Marks a test of damaged files; ``pytest -m fuzz --hypothesis-profile minute`` gives more."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    examples = settings(max_examples=max(200, settings().max_examples), suppress_health_check=slow)
    return pytest.mark.fuzz(pytest.mark.slow(examples(test)))


def read_coco(output):
    return json.loads((output / "predictions.json").read_text())


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def image_folder(tmp_path):
    """Three images, one in a folder below."""
    for seed, name in enumerate(("a.png", "b/c.jpg", "d.png")):
        save_image(tmp_path / "images" / name, seed)
    return tmp_path / "images"


def write_bad_images(folder: Path) -> dict[str, str]:
    """Writes images that cannot be read; returns a part of the reason, by name."""
    good = save_image(folder / "cut.png", 0).read_bytes()
    bomb = bytearray(good)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the size, which is read before any pixel
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    unreadable = {"cut.png": good[: len(good) // 2], "empty.jpg": b"", "text.jpg": b"no image"}
    unreadable["zero.ppm"] = b"P6 0 0 255\n"
    for name, content in {**unreadable, "bomb.png": bomb}.items():
        (folder / name).write_bytes(content)
    save_image(folder / "thin.png", 0, 1, 3000)
    first, *others = (Image.fromarray(random_image(seed)) for seed in range(3))
    first.save(folder / "moving.gif", save_all=True, append_images=others)
    reasons = {"thin.png": "3000x1 is too thin", "moving.gif": "several images", "bomb.png": "bomb"}
    return {**dict.fromkeys(unreadable, "no readable image"), **reasons}


@pytest.fixture
def bad_files(image_folder):
    """Files that cannot be read, or not to their end, in the folder of images: by name, a part of
    the reason. "print.jpg" and "deep.png" next to them can be read."""
    reasons = write_bad_images(image_folder)
    Image.fromarray(random_image(0)).convert("CMYK").save(image_folder / "print.jpg")
    Image.fromarray(np.full((60, 80), 30_000, np.uint16)).save(image_folder / "deep.png")
    (image_folder / "film.mp4").write_bytes(b"no film")
    cut = film(image_folder / "cut.mkv", [Fraction(n, 20) for n in range(40)])
    os.truncate(cut, cut.stat().st_size // 2)
    report = write_dicom(image_folder / "report.dcm")
    hollow = write_dicom(image_folder / "hollow.dcm", Rows=60, Columns=80)
    reasons |= {"film.mp4": "cannot be decoded from the start", "cut.mkv": "frames"}
    return {**reasons, public_name(report): "without an image", public_name(hollow): "pixels"}


LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", None)
_hosts = []


def _note(event, arguments):
    """The hosts that this process connects to; an audit hook, which stays."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _hosts.append(arguments[1][0])
    elif event == "socket.getaddrinfo":
        _hosts.append(arguments[0])


sys.addaudithook(_note)


@contextlib.contextmanager
def serving(predictor):
    """The web page, its address, the folder of uploads, and how often the network ran."""
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    from imrcnn_d2.deploy.web import server_of

    forwards = []
    model = predictor._runtime.model
    hook = getattr(model, "backbone", model).register_forward_hook(lambda *_: forwards.append(1))
    with server_of(predictor, port=0) as (server, listening, url):
        import gradio.utils

        page = server.config.app.app.routes[-1].app
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            wait_for(lambda: server.started)
            site = SimpleNamespace(url=url, address=listening.getsockname()[0], forwards=forwards)
            site.folder = Path(gradio.utils.get_upload_folder())
            site.state = lambda: page.state_holder.session_data
            yield site
        finally:
            server.should_exit = True
            thread.join(60)
            hook.remove()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def site(predictor):
    """The tiny detector's page. At the end no upload is left, and no other computer was asked."""
    _hosts.clear()
    with serving(predictor) as site:
        yield site
        assert not list(site.folder.iterdir())
    assert not site.folder.exists() and set(_hosts) <= set(LOCAL)


def in_time(work):
    """Fails if this function does not return, as one that reads a pipe."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def wait_for(condition, seconds=60):
    """Until it is true; fails if it never is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {seconds} s"
        time.sleep(0.01)
