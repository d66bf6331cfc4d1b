"""A film played at its speed stands for a camera."""

import json
import os
import re
import signal
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from imrcnn_d2.deploy.batch import Journal
from imrcnn_d2.deploy.inputs import VideoWriter, decode_video
from imrcnn_d2.deploy.live import LiveFrames, predict_live
from imrcnn_d2.utils.files import BadInputError

from .conftest import in_time, random_image, read_coco, write_video

FRAMES, RATE = 21, 20


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A second."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return str(write_video(path, FRAMES, aspect=Fraction(16, 11), rate=RATE))


def test_the_newest_frame_comes_and_older_ones_are_dropped(film):
    seen = []
    with LiveFrames(film) as frames:
        for image, number, _ in frames:
            assert abs(image.astype(int) - random_image(number)).mean() < 12
            seen.append(number)
            time.sleep(0.22)  # slower than the camera
    assert seen == sorted(set(seen)) and seen[-1] == FRAMES - 1
    assert 1 < len(seen) < FRAMES / 2
    assert frames.received == FRAMES and frames.dropped == FRAMES - len(seen)
    assert frames.error is None


def test_the_report(predictor, film, tmp_path):
    shown, output, started = [], tmp_path / "live", time.time()
    report = predict_live(predictor, film, output, show=shown.append)
    assert time.time() - started > (FRAMES - 2) / RATE, "it was played at its speed"
    assert report == json.loads((output / "live.json").read_text())
    assert report["received"] == FRAMES == report["predicted"] + report["dropped"]
    assert report["dropped_percent"] == round(100 * report["dropped"] / FRAMES, 2)
    latency = report["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    overlays = list(decode_video(output / "live.mp4", "live.mp4"))
    assert {frame.pixel_aspect for frame in overlays} == {Fraction(16, 11)}
    images = read_coco(output)["images"]
    assert len(shown) == len(overlays) == len(images) == report["predicted"]
    np.testing.assert_allclose([i["time"] for i in images], [float(f.time) for f in overlays])
    numbers = [image["frame"] for image in images]
    assert numbers == list(range(len(overlays))), "of the frames in live.mp4"
    pytest.raises(ValueError, predict_live, predictor, film, output).match(re.escape(str(output)))


SOURCES = "pipe", "file:pipe", "link", ".", "/dev/video99", "http://127.0.0.1:9/none"


@pytest.mark.parametrize("source", [*SOURCES, "none.mp4", "junk.mp4"])
def test_what_is_no_camera_is_named_and_not_waited_for(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    Path("junk.mp4").write_bytes(b"junk" * 100)
    caught = []
    in_time(lambda: caught.append(pytest.raises(BadInputError, LiveFrames, source)))
    assert caught[0].value.file == source


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal: shells ignore it in what they start in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
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


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_no_frame_comes(predictor, tmp_path):
    slow, started = write_video(tmp_path / "slow.mp4", 2, [Fraction(0), Fraction(60)]), time.time()
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert predict_live(predictor, str(slow), tmp_path / "live")["predicted"] == 1
    assert time.time() - started < 30


def test_an_error_keeps_what_was_written_before(predictor, film, tmp_path):
    shown = []

    def show(overlay):
        shown.append(overlay)
        if len(shown) == 2:
            raise OSError("no display")

    with pytest.raises(OSError, match="no display"):
        predict_live(predictor, film, tmp_path, show=show)
    assert json.loads((tmp_path / "live.json").read_text())["error"] == "OSError: no display"
    assert len(read_coco(tmp_path)["images"]) == 1
    assert len(list(decode_video(tmp_path / "live.mp4", "live.mp4"))) == 1


def test_sigterm_ends_it_as_ctrl_c_does(predictor, film, tmp_path):
    def show(overlay):
        os.kill(os.getpid(), signal.SIGTERM)

    assert predict_live(predictor, film, tmp_path, show=show)["predicted"] == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_without_a_frame_leaves_the_folder_to_the_next(
    predictor, film, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(LiveFrames, "__iter__", lambda self: iter(()))  # of a camera that sends none
        for _ in range(2):
            pytest.raises(BadInputError, predict_live, predictor, film, tmp_path).match(film)
            assert not (tmp_path / Journal.FILE).exists()
    assert predict_live(predictor, film, tmp_path)["received"] == FRAMES
