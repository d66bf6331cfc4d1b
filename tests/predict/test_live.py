"""A film played at its speed stands for a camera."""

import json
import os
import signal
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from imrcnn_d2.deploy.batch import Journal
from imrcnn_d2.deploy.inputs import VideoWriter, decode_video
from imrcnn_d2.deploy.live import LiveFrames, predict_live
from imrcnn_d2.utils.files import BadInputError

from .conftest import random_image

FRAMES, STEP = 20, Fraction(1, 20)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A second of 20 frames."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with VideoWriter(path, time_base=STEP) as video:
        for number in range(FRAMES):
            video.write(random_image(number), number * STEP)
    return path


def test_the_newest_frame_comes_and_older_ones_are_dropped(film):
    seen, waited = [], []
    with LiveFrames(str(film)) as frames:
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
    shown, output = [], tmp_path / "live"
    started = time.perf_counter()
    report = predict_live(predictor, str(film), output, show=shown.append)
    assert time.perf_counter() - started > float((FRAMES - 2) * STEP), "it was played at its speed"
    assert report == json.loads((output / "live.json").read_text())
    assert report["received"] == FRAMES
    assert report["predicted"] + report["dropped"] == FRAMES
    assert report["predicted"] == len(shown)
    assert report["dropped_percent"] == 100 * report["dropped"] / FRAMES
    latency = report["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    overlays = list(decode_video(output / "live.mp4", "live.mp4"))
    images = json.loads((output / "predictions.json").read_text())["images"]
    assert len(overlays) == len(images) == report["predicted"]
    np.testing.assert_allclose([i["time"] for i in images], [float(f.time) for f in overlays])
    numbers = [image["frame"] for image in images]
    assert numbers == sorted(set(numbers))
    with pytest.raises(ValueError, match="another run"):
        predict_live(predictor, str(film), output)


def test_what_cannot_be_opened_is_named(predictor, tmp_path):
    for source in ("/dev/video99", str(tmp_path / "none.mp4"), "http://127.0.0.1:9/none"):
        with pytest.raises(BadInputError, match=f"{source}: cannot be opened"):
            predict_live(predictor, source, tmp_path / "live")
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 100)
    with pytest.raises(BadInputError, match="junk.mp4: cannot be opened"):
        predict_live(predictor, str(tmp_path / "junk.mp4"), tmp_path / "live")


@pytest.mark.parametrize("source", ["pipe", "file:pipe", "link", "."])
def test_what_is_no_camera_is_not_waited_for(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    failed = []

    def work():
        with pytest.raises(BadInputError) as error:
            LiveFrames(source)
        failed.append(error.value.file)

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
        if len(done) == 2:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        return write(self, *args)

    monkeypatch.setattr(kind, name, interrupted)
    before = signal.getsignal(signal.SIGINT)
    report = predict_live(predictor, str(film), tmp_path, show=shown.append)
    assert signal.getsignal(signal.SIGINT) is before
    # The first press lets the frame be finished, the second costs it.
    assert (len(shown), report["predicted"]) == (2, 3 - presses)
    assert report == json.loads((tmp_path / "live.json").read_text())
    assert report["predicted"] + report["dropped"] == report["received"]
    images = json.loads((tmp_path / "predictions.json").read_text())["images"]
    assert len(images) == report["predicted"]
    assert len(list(decode_video(tmp_path / "live.mp4", "live.mp4"))) >= len(images)


def test_ctrl_c_while_no_frame_comes(predictor, tmp_path):
    with VideoWriter(tmp_path / "slow.mp4", time_base=STEP) as video:
        for number, when in enumerate((0, 60)):
            video.write(random_image(number), Fraction(when))
    previous = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    started = time.perf_counter()
    try:
        signal.setitimer(signal.ITIMER_REAL, 3)
        report = predict_live(predictor, str(tmp_path / "slow.mp4"), tmp_path / "live")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert report["predicted"] == 1
    assert time.perf_counter() - started < 30


def test_a_run_without_a_frame_leaves_the_folder_to_the_next(predictor, film, tmp_path):
    silent, output = tmp_path / "silent.mp4", tmp_path / "live"
    parts = {"movflags": "empty_moov+frag_keyframe"}
    with av.open(str(film)) as source, av.open(str(silent), "w", options=parts) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    data = silent.read_bytes()
    silent.write_bytes(data[: data.index(b"moof") - 4])  # it says that it holds video
    for _ in range(2):
        with pytest.raises(BadInputError, match="silent.mp4: gave no frame"):
            predict_live(predictor, str(silent), output)
        assert not (output / Journal.FILE).exists()
    assert predict_live(predictor, str(film), output)["received"] == FRAMES


def test_the_pixels_keep_their_shape(predictor, tmp_path):
    with VideoWriter(tmp_path / "pal.mp4", time_base=STEP) as video:
        video.write(random_image(0), Fraction(0), Fraction(16, 11))
    predict_live(predictor, str(tmp_path / "pal.mp4"), tmp_path / "live")
    with av.open(str(tmp_path / "live" / "live.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 11)
