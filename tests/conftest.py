"""Fixtures that find the real images, which are not part of this repository.

They lie in the folder that IMRCNN_TEST_DATA names. Tests that need them are skipped where the
variable is unset or the folder missing, and fail instead under IMRCNN_REQUIRE_TEST_DATA=1.
"""

import os
from pathlib import Path

import pytest


def real_data(name):
    """Return the folder ``name`` (Path) of the test data, or skip or fail the test that asked."""
    root = os.environ.get("IMRCNN_TEST_DATA")
    if root:
        folder = Path(root) / name
        if folder.is_dir():
            return folder
        reason = f"IMRCNN_TEST_DATA={root} has no folder {name}"
    else:
        reason = f"IMRCNN_TEST_DATA is not set; it should name the folder that holds {name}"
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
