"""Near-duplicates and patients make groups together."""

import shutil

import pytest

from imrcnn_d2.data.prepare.splits import group_images


@pytest.fixture
def folder(kvasir_352, tmp_path):
    """a.jpg and b.jpg are of one frame; c to g are others."""
    names = ["test_0033", "test_0051", *(f"train_{i:04d}" for i in (5, 65, 125, 185, 245))]
    for name, new in zip(names, "abcdefg", strict=True):
        shutil.copyfile(kvasir_352 / "images" / f"{name}.jpg", tmp_path / f"{new}.jpg")
    return tmp_path


def test_groups(folder):
    names = [f"{letter}.jpg" for letter in "abcdefg"]
    # b, c and d are joined by patient 1, and a to b by the picture; f and g are of one each
    groups, listed = group_images(folder, names, [None, 1, 1, 1, None, 2, 3])
    assert groups == {f"{letter}.jpg": 1 for letter in "abcd"}
    assert listed["groups"] == [["a.jpg", "b.jpg", "c.jpg", "d.jpg"]]
    (pair,) = listed["pairs"]
    assert pair["images"] == ["a.jpg", "b.jpg"]
    assert listed["min_correlation"] < pair["correlation"] <= 1
