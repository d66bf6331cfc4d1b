"""The split that a file name states."""

import pytest

from imrcnn_d2.data.prepare.splits import splits_from_prefixes


def test_prefixes():
    names = ["val_b.png", "train_2.jpg", "a/test_1.jpg", "train_1.jpg", "valid_a.png"]
    assert splits_from_prefixes(names) == {
        "train": ["train_1.jpg", "train_2.jpg"],
        "val": ["val_b.png", "valid_a.png"],
        "test": ["a/test_1.jpg"],
    }


@pytest.mark.parametrize("name", ["image.jpg", "testing.jpg", "train", "test_a/image.jpg"])
def test_names_without_one(name):
    with pytest.raises(ValueError, match=f"{name}: states no split .*--split-by"):
        splits_from_prefixes(["train_1.jpg", name])


def test_the_published_split_of_the_real_copy(kvasir_352):
    splits = splits_from_prefixes(path.name for path in (kvasir_352 / "images").iterdir())
    assert [len(names) for names in splits.values()] == [800, 100, 100]
