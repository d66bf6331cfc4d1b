"""A film played at its speed stands for a camera."""

import json
import os
import re
import signal
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from imrcnn_d2.deploy.batch import Journal
from imrcnn_d2.deploy.inputs import VideoWriter, decode_video
from imrcnn_d2.deploy.live import LiveFrames, predict_live
from imrcnn_d2.utils.files import BadInputError

from .conftest import random_image, read_coco, write_video

FRAMES, RATE = 20, 20


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A second of 20 frames."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return str(write_video(path, FRAMES, aspect=Fraction(16, 11), rate=RATE))


def test_the_newest_frame_comes_and_older_ones_are_dropped(film):
    seen, waited = [], []
    with LiveFrames(film) as frames:
        for image, number, arrived in frames:
            assert abs(image.astype(int) - random_image(number)).mean() < 12
            seen.append(number)
            waited.append(time.perf_counter() - arrived)
            time.sleep(0.22)  # slower than the camera
    assert seen == sorted(set(seen)) and seen[-1] == FRAMES - 1
    assert 1 < len(seen) < FRAMES / 2
    assert frames.received == FRAMES and frames.dropped == FRAMES - len(seen)
    assert frames.error is None


def test_the_report(predictor, film, tmp_path):
    shown, output, started = [], tmp_path / "live", time.perf_counter()
    report = predict_live(predictor, film, output, show=shown.append)
    assert time.perf_counter() - started > (FRAMES - 2) / RATE, "it was played at its speed"
    assert report == json.loads((output / "live.json").read_text())
    assert report["received"] == FRAMES == report["predicted"] + report["dropped"]
    assert report["dropped_percent"] == 100 * report["dropped"] / FRAMES
    latency = report["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    overlays = list(decode_video(output / "live.mp4", "live.mp4"))
    assert {frame.pixel_aspect for frame in overlays} == {Fraction(16, 11)}
    images = read_coco(output)["images"]
    assert len(shown) == len(overlays) == len(images) == report["predicted"]
    np.testing.assert_allclose([i["time"] for i in images], [float(f.time) for f in overlays])
    numbers = [image["frame"] for image in images]
    assert numbers == sorted(set(numbers))
    pytest.raises(ValueError, predict_live, predictor, film, output).match(re.escape(str(output)))


SOURCES = "pipe", "file:pipe", "link", ".", "/dev/video99", "http://127.0.0.1:9/none"


@pytest.mark.parametrize("source", [*SOURCES, "none.mp4", "junk.mp4"])
def test_what_is_no_camera_is_named_and_not_waited_for(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    Path("junk.mp4").write_bytes(b"junk" * 100)
    failed = []

    def work():
        failed.append(pytest.raises(BadInputError, LiveFrames, source).value.file)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert failed == [source]


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("kind, name", [(VideoWriter, "write"), (Journal, "add")])
def test_ctrl_c_at_any_place_keeps_what_was_shown(
    predictor, film, tmp_path, monkeypatch, presses, kind, name
):
    """Between showing a frame and writing it, and before it is in the journal."""
    done, shown, write = [], [], getattr(kind, name)

    def interrupted(self, *args):
        done.append(None)
        for _ in range(presses if len(done) == 2 else 0):
            signal.raise_signal(signal.SIGINT)
        return write(self, *args)

    monkeypatch.setattr(kind, name, interrupted)
    before = signal.getsignal(signal.SIGINT)
    report = predict_live(predictor, film, tmp_path, show=shown.append)
    assert signal.getsignal(signal.SIGINT) is before
    # The first press lets the frame be finished, the second costs it.
    assert (len(shown), report["predicted"]) == (2, 3 - presses)
    assert report == json.loads((tmp_path / "live.json").read_text())
    assert report["predicted"] + report["dropped"] == report["received"]
    images = read_coco(tmp_path)["images"]
    assert len(images) == report["predicted"]
    assert len(list(decode_video(tmp_path / "live.mp4", "live.mp4"))) >= len(images)


def test_ctrl_c_while_no_frame_comes(predictor, tmp_path):
    slow = write_video(tmp_path / "slow.mp4", 2, [Fraction(0), Fraction(60)])
    press = threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT))
    started = time.perf_counter()
    press.start()
    assert predict_live(predictor, str(slow), tmp_path / "live")["predicted"] == 1
    assert time.perf_counter() - started < 30


def test_a_run_without_a_frame_leaves_the_folder_to_the_next(predictor, film, tmp_path):
    silent, output = tmp_path / "silent.mp4", tmp_path / "live"
    parts = {"movflags": "empty_moov+frag_keyframe"}
    with av.open(film) as source, av.open(str(silent), "w", options=parts) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    data = silent.read_bytes()
    silent.write_bytes(data[: data.index(b"moof") - 4])  # it says that it holds video
    for _ in range(2):
        with pytest.raises(BadInputError, match=re.escape(str(silent))):
            predict_live(predictor, str(silent), output)
        assert not (output / Journal.FILE).exists()
    assert predict_live(predictor, film, output)["received"] == FRAMES
