"""How the tests share a machine, and fixtures that find the real images.

These lie in the folder that IMRCNN_TEST_DATA names, outside of this repository. Without it tests
are skipped, or fail under IMRCNN_REQUIRE_TEST_DATA=1."""

import gc
import logging
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import pytest
from processes import PRELOAD

# One thread in each process, the ones that tests start included: several workers share the cores.
# Set before torch, OpenCV and numpy are imported.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

# Of the files without many slow tests those that take longest, longest first.
LONGEST = ("test_runtimes.py", "test_trainer.py", "test_loading.py", "test_predictor.py")
MINUTE = 5_000  # damaged files that a reader is given in one
WORKER_GIB = 3  # a worker with the processes that its tests start


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Workers of ``-n auto``: one a core, as far as memory goes; more than 8 have nothing to do."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return int(os.environ["PYTEST_XDIST_AUTO_NUM_WORKERS"])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / WORKER_GIB), 8))


def pytest_configure(config):
    from hypothesis import settings

    gc.disable()
    # A busy machine is no failure. In CI the same examples every time.
    settings.register_profile("ours", deadline=None, derandomize="CI" in os.environ)
    # For tests/prepare/test_fuzz.py: about a minute a test.
    settings.register_profile("minute", deadline=None, max_examples=MINUTE)
    settings.load_profile(config.getoption("--hypothesis-profile") or "ours")
    multiprocessing.set_forkserver_preload(PRELOAD)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files that take long first, so that no worker is left with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    places = {name: place for place, name in enumerate(LONGEST)}
    # stable
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), -slow[item.path]))


def pytest_collection_finish():
    """What was imported stays: to search its millions of objects for garbage takes seconds."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _loggers_of_one_test():
    """What commands log goes to the streams of their test, which pytest closes after it."""
    from detectron2.utils.logger import setup_logger  # imports torch

    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "imrcnn_d2", "timm")]
    yield
    for logger in loggers:
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
    setup_logger.cache_clear()  # which otherwise adds none again


@pytest.fixture
def real_plots():
    """For tests that look at plots."""


@pytest.fixture(autouse=True)
def _blank_plots(request, monkeypatch):
    """Plots are blank, as PNG, but in tests of reports, in slow ones and with `real_plots`: they
    would take most of the time of an evaluation."""
    is_slow = request.node.get_closest_marker("slow")
    if request.path.parent.name == "report" or is_slow or "real_plots" in request.fixturenames:
        return
    from matplotlib.figure import Figure
    from PIL import Image

    draw = Figure.savefig

    def savefig(figure, file, *, format, **options):
        if format == "png":
            Image.new("L", (8, 6)).save(file, format)
        else:
            draw(figure, file, format=format, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)


def real_data(name):
    """Return the folder ``name`` (Path) of the test data, or skip or fail the test that asked."""
    root = os.environ.get("IMRCNN_TEST_DATA")
    if root and (Path(root) / name).is_dir():
        return Path(root) / name
    reason = f"IMRCNN_TEST_DATA={root} is not set to a folder that holds {name}"
    if os.environ.get("IMRCNN_REQUIRE_TEST_DATA") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def kvasir_352():
    """Kvasir-SEG, all 1,000 images and masks at 352x352: images/NAME.jpg and masks/NAME.jpg."""
    return real_data("kvasir-seg-352")


@pytest.fixture(scope="session")
def kvasir_original():
    """Five images and masks of Kvasir-SEG at their original sizes, laid out in the same way."""
    return real_data("kvasir-seg-original-5")


@pytest.fixture(scope="session")
def no_polyp():
    """Ten endoscopic images without a polyp, of different sizes."""
    return real_data("no-polyp-10")


@pytest.fixture(scope="session")
def polypgen_4():
    """PolypGen's single frames of hospitals C1 to C4 in its own layout, 119 of 1,241 without a
    polyp; one image of C2 is there twice."""
    return real_data("polypgen-4-centres")
