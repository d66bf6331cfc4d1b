"""Images without a lesion, all in the test part, and what can be wrong with them."""

import json

import pytest
from PIL import Image

from imrcnn_d2.data.formats import read_lesion_free
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.utils.files import BadInputError, Rejects


def test_real_images(no_polyp, tmp_path):
    rejects = Rejects()
    source = read_lesion_free(no_polyp, rejects)
    out = tmp_path / "lesion_free"
    prepare_dataset(source, out, SplitOptions(ratio=(0, 0, 1)), rejects)
    contents = {
        s: json.loads((out / "annotations" / f"{s}.json").read_text())
        for s in ("train", "val", "test")
    }
    assert [len(content["images"]) for content in contents.values()] == [0, 0, 10]
    assert not any(content["annotations"] for content in contents.values())
    for record in contents["test"]["images"]:
        with Image.open(no_polyp / record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])


def test_bad_files_are_listed(tmp_path, picture):
    root = tmp_path / "in" / "deeper"
    root.mkdir(parents=True)
    Image.fromarray(picture(8, 9)).save(root / "good.png")
    (root / "bad.png").write_bytes(b"no image")
    with pytest.raises(BadInputError, match=r"bad\.png"):
        list(read_lesion_free(root, Rejects()).samples)
    rejects = Rejects("reject")
    (sample,) = read_lesion_free(tmp_path / "in", rejects).samples
    assert (sample.file_name, sample.annotations, sample.has_lesion) == (
        "deeper/good.png",
        [],
        False,
    )
    assert [error.file for error in rejects.errors] == [str(root / "bad.png")]
