"""A film played at its speed stands for a camera."""

import json
import time
from fractions import Fraction

import numpy as np
import pytest

from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.deploy.live import LiveFrames, predict_live
from imrcnn_d2.deploy.video import VideoWriter, decode_video

from .conftest import picture

FRAMES, STEP = 20, Fraction(1, 20)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A second of 20 frames."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with VideoWriter(path, time_base=STEP) as video:
        for number in range(FRAMES):
            video.write(picture(number), number * STEP)
    return path


def test_the_newest_frame_comes_and_older_ones_are_dropped(film):
    seen, waited = [], []
    with LiveFrames(str(film)) as frames:
        for image, number, arrived in frames:
            assert abs(image.astype(int) - picture(number)).mean() < 12
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
    drawn = list(decode_video(output / "live.mp4", "live.mp4"))
    images = json.loads((output / "predictions.json").read_text())["images"]
    assert len(drawn) == len(images) == report["predicted"]
    np.testing.assert_allclose([i["time"] for i in images], [float(f.time) for f in drawn])
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
