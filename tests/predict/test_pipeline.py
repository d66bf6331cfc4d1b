"""Reading, the network and the caller work at once, in order and within bounds."""

import contextlib
import os
import signal
import threading
import time
from fractions import Fraction

import pytest

from imrcnn_d2.deploy.batch import ahead, predict_files, predictions
from imrcnn_d2.deploy.inputs import Source, VideoWriter

from .conftest import random_image

FRAMES = 40


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "v.mp4"
    with VideoWriter(path, time_base=Fraction(1, 25)) as writer:
        for number in range(FRAMES):
            writer.write(random_image(number), Fraction(number, 25))
    return path


@pytest.fixture
def network(predictor, monkeypatch):
    """Calls a function, None at first, before each run of the network; counts these."""

    class Network:
        before, runs = None, 0

    runtime = predictor._runtime

    def run(images):
        Network.runs += 1
        if Network.before is not None:
            Network.before()
        return runtime(images)

    monkeypatch.setattr(predictor, "_runtime", run)
    return Network


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and not t.name.startswith("tqdm")]
    assert not left


def source(video):
    return Source(video, video.name, "video")


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_while_the_caller_works_the_network_is_ahead_within_bounds(predictor, video, network):
    with contextlib.closing(predictions(predictor, [source(video)], 2)) as found_in:
        item, _ = next(found_in)
        assert item.frame.number == 0
        assert wait_until(lambda: network.runs >= 2), "it waits for the caller"
        time.sleep(0.3)
        assert network.runs <= 4, "it runs away"
        rest = [item for item, _ in found_in]
    assert [item.frame.number for item in rest[:-1]] == list(range(1, FRAMES))
    assert rest[-1].frame is None and rest[-1].error is None
    assert network.runs == FRAMES / 2


def test_each_has_a_thread_of_its_own(predictor, video, network, monkeypatch):
    threads = set()
    network.before = lambda: threads.add(("network", threading.get_ident()))
    prepare = predictor.prepare

    def reading(*args):
        threads.add(("reader", threading.get_ident()))
        return prepare(*args)

    monkeypatch.setattr(predictor, "prepare", reading)
    for _ in predictions(predictor, [source(video)], 1):
        threads.add(("caller", threading.get_ident()))
    assert len(threads) == len({thread for _, thread in threads}) == 3


def test_an_error_of_the_network_surfaces(predictor, video, network):
    def fail():
        if network.runs == 5:
            raise MemoryError("of the card")

    network.before = fail
    seen = []
    with pytest.raises(MemoryError, match="of the card"):
        for item, _ in predictions(predictor, [source(video)], 1):
            seen.append(item.frame.number)
    assert seen == [0, 1, 2, 3]


def test_an_interruption_ends_cleanly_and_is_gone_on_from(predictor, video, network, tmp_path):
    def interrupt():
        if network.runs == 5:
            os.kill(os.getpid(), signal.SIGINT)

    network.before = interrupt
    output = tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            predict_files(predictor, [video], output, save=["overlays"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in output.rglob("*") if path.suffix] == ["progress.jsonl"]
    assert predict_files(predictor, [video], output, save=["overlays"]).images == FRAMES
    assert (output / "overlays" / "v.mp4").is_file()


def test_ahead():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number
            if number == 50:
                raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        list(ahead(items(), 4))
    assert list(ahead(range(100), 4)) == list(range(100))
    made.clear()
    few = ahead(items(), 4)
    assert next(few) == 0
    time.sleep(0.2)
    few.close()
    assert len(made) <= 7, "it does not run away"
