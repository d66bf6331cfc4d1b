"""Public data sets that are laid out otherwise, half there, renamed, or still packed."""

import shutil
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imrcnn_d2.data.formats import FORMATS, PublicDataSet
from imrcnn_d2.data.images import list_files
from imrcnn_d2.utils.files import BadInputError, Rejects

PUBLIC = [name for name, form in FORMATS.items() if isinstance(form, PublicDataSet)]
NAMES = ("a", "b", "c", "d", "e")


def download(root, names=NAMES):
    """PolypGen's hospital C1 and a sequence without polyps."""
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 5:25] = 255
    for name in names:
        pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (20, 30, 3))
        files = {f"data_C1/images_C1/{name}.jpg": pixels.astype(np.uint8)}
        files[f"data_C1/masks_C1/{name}_mask.jpg"] = mask
        files[f"sequenceData/negativeOnly/seq1_neg/n{name}_1.jpg"] = 255 - pixels.astype(np.uint8)
        for file, values in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / file)
    return root


def read(root, on_error="raise", form="polypgen"):
    rejects = Rejects(on_error)
    source = FORMATS[form].read_folder(root, rejects)
    return [sample.file_name for sample in source.samples], source.notes, rejects.errors


@pytest.mark.parametrize("form", PUBLIC)
def test_a_folder_of_something_else(form, tmp_path):
    """The message says what is there, what is expected, and where it is downloaded."""
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(BadInputError) as error:
        FORMATS[form].check_layout(tmp_path)
    message, public = str(error.value), FORMATS[form]
    parts = [part for layout in public.layouts for part in layout]
    assert all(text in message for text in ("holiday.txt", public.title, public.url, *parts))
    with pytest.raises(FileNotFoundError, match=public.url):
        public.check_layout(tmp_path / "absent")


@pytest.mark.parametrize("folder", [".", "v3/data_C1", "v3/data_C1/images_C1", "v3/sequenceData"])
def test_a_folder_above_or_below(folder, tmp_path):
    root = download(tmp_path / "v3")
    with pytest.raises(BadInputError) as error:
        read(tmp_path / folder)
    assert f"give --root {root}" in str(error.value)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".rar", ".7z"])
def test_an_archive(suffix, tmp_path):
    archive = tmp_path / f"PolypGen2021_MultiCenterData_v3{suffix}"
    archive.write_bytes(b"Rar!")
    for root in (archive, tmp_path):
        with pytest.raises(BadInputError) as error:
            read(root)
        assert "extract" in str(error.value) and archive.name in str(error.value)
    with pytest.raises(FileNotFoundError, match=f"{archive.name}: is an archive"):
        list_files(archive)


def test_half_a_download(tmp_path):
    _, notes, _ = read(download(tmp_path))
    counts = [note for note in notes if note.startswith("Warning")]
    assert any("5 images" in note and "256" in note for note in counts)
    assert any("5 images" in note and "4275" in note for note in counts)


def test_masks_that_are_missing(tmp_path):
    root = download(tmp_path)
    for name in "ab":
        (root / f"data_C1/masks_C1/{name}_mask.jpg").unlink()
    with pytest.raises(BadInputError) as error:
        read(root)
    expected = ("images_C1/a.jpg", "a_mask", "2 of 5 images", FORMATS["polypgen"].url)
    assert all(text in str(error.value) for text in expected)
    names, _, errors = read(root, "reject")
    assert len(names) == 8 and len(errors) == 2
    shutil.rmtree(root / "data_C1/masks_C1")
    with pytest.raises(BadInputError, match="masks_C1.*syn26376615"):
        read(root)


def test_masks_of_other_names(tmp_path):
    root = download(tmp_path)
    for path in sorted((root / "data_C1/masks_C1").iterdir()):
        path.rename(path.with_name(path.name.replace("_mask", "_seg")))
    with pytest.raises(BadInputError) as error:
        read(root)
    expected = ("a_mask", "5 of 5 images", "a_seg, b_seg, c_seg and 2 more")
    assert all(text in str(error.value) for text in expected)


DAMAGES = {
    "remove": lambda path: path.unlink(),
    "rename": lambda path: path.rename(path.with_name(f"copy of {path.name}")),
    "as text": lambda path: path.rename(path.with_suffix(".txt")),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "hidden": lambda path: path.rename(path.with_name(f".{path.name}")),
    "twice": lambda path: shutil.copy(path, path.with_suffix(".png")),
}


DAMAGE = st.tuples(st.integers(0, 8), st.sampled_from(sorted(DAMAGES)))


@given(damages=st.lists(DAMAGE, min_size=1, max_size=4))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_damaged_each_file_is_read_or_listed(damages, tmp_path_factory):
    """Every image of the download is a sample or a reject, and no lesion becomes healthy."""
    root = download(tmp_path_factory.mktemp("broken"), "abc")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for number, kind in damages:
        if files[number].is_file():
            DAMAGES[kind](files[number])
    rejects = Rejects("reject")
    try:
        samples = list(FORMATS["polypgen"].read_folder(root, rejects).samples)
    except BadInputError as error:
        samples = []
        assert FORMATS["polypgen"].url in str(error)
    listed = {error.file for error in rejects.errors}
    paths = {str(sample.image.path) for sample in samples}
    images = [*root.glob("data_C1/images_C1/*.*g"), *root.glob("sequenceData/*/*/*.*g")]
    images = {str(path) for path in images if path.is_file() and path.name[0] != "."}
    masks_at_fault = {path for path in listed if "masks_C1" in path}
    assert not paths & listed and paths <= images
    assert len(images - paths - listed) <= len(masks_at_fault)  # listed by their masks
    for sample in samples:
        assert bool(sample.annotations) == sample.file_name.startswith("C1/")
