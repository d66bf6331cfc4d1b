"""Which files are taken, and what they are called."""

import contextlib
import hashlib
import os
import shutil
import socket
import threading

import pytest

from imrcnn_d2.deploy.batch import predict_files
from imrcnn_d2.deploy.inputs import Source, find_inputs, read_frames
from imrcnn_d2.utils.files import BadInputError

DICOM = bytes(128) + b"DICM"
DICOM_NAME = f"dicom-{hashlib.sha256(DICOM).hexdigest()[:16]}.dcm"


@pytest.fixture
def tree(tmp_path):
    for name in (
        "x/a.JPG",
        "x/clip.mp4",
        "x/notes.txt",
        "x/.hidden.png",
        "x/deep/b.tif",
        "y/a.JPG",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "x" / "IM0001").write_bytes(DICOM)
    return tmp_path


def names(*inputs):
    return [(source.name, source.kind) for source in find_inputs(inputs)[1]]


def test_a_folder_gives_what_can_be_predicted_on(tree):
    assert names(tree / "x") == [
        ("a.JPG", "image"),
        ("clip.mp4", "video"),
        ("deep/b.tif", "image"),
        (DICOM_NAME, "dicom"),
    ]
    assert find_inputs([tree / "x"])[0] == tree / "x"


def test_files_and_patterns(tree):
    assert names(tree / "x" / "a.JPG") == [("a.JPG", "image")]
    assert names(tree / "x" / "notes.txt") == [("notes.txt", "image")], "it was named"
    assert names(f"{tree}/x/*.mp4") == [("clip.mp4", "video")]
    assert names(f"{tree}/**/a.JPG") == [("x/a.JPG", "image"), ("y/a.JPG", "image")]


def test_a_pattern_of_folders(tree):
    assert names(f"{tree}/[xy]") == names(tree / "x", tree / "y")


def test_outputs_are_no_inputs(tree):
    found = find_inputs([tree], leave_out=[tree / "x" / "deep" / ".." / "deep"])[1]
    assert {source.name for source in found} == {DICOM_NAME, "x/a.JPG", "x/clip.mp4", "y/a.JPG"}
    with pytest.raises(FileNotFoundError, match="No image"):
        find_inputs([tree / "x"], leave_out=[tree])


def test_each_file_once_under_a_name_of_its_own(tree):
    twice = names(tree / "x", tree / "x" / "a.JPG", tree / "y")
    assert [name for name, _ in twice].count("x/a.JPG") == 1
    assert ("y/a.JPG", "image") in twice


def test_a_link_has_its_own_name(tree):
    (tree / "z").mkdir()
    for name in ("one.jpg", "two.jpg"):
        (tree / "z" / name).symlink_to(tree / "x" / "a.JPG")
    (tree / "z" / "all").symlink_to(tree / "y")
    given = [tree / "z" / ".." / "z", tree / "z" / "all" / "a.JPG"]
    _, found = find_inputs(given, follow_links=True)
    assert [source.name for source in found] == ["all/a.JPG", "one.jpg", "two.jpg"]
    (tree / "z" / "three.jpg").write_bytes(b"-")
    (tree / "z" / "four.jpg").symlink_to("three.jpg")
    found = names(*given)
    assert [name for name, _ in found] == ["all/a.JPG", "four.jpg", "three.jpg"], "none leads out"


@pytest.mark.parametrize("name", ["Musterfrau.jpg", "a.mp4", "a.txt", "a.dcm"])
def test_dicom_is_told_by_its_content(tree, name):
    (tree / "x" / name).write_bytes(DICOM)
    assert names(tree / "x" / name) == [(DICOM_NAME, "dicom")]
    assert names(tree / "x").count((DICOM_NAME, "dicom")) == 1, "equal files are one"


def test_a_pipe_is_no_input(tree):
    for name in ("pipe", "pipe.dcm"):
        os.mkfifo(tree / "x" / name)
        with pytest.raises(ValueError, match=name):
            find_inputs([tree / "x" / name])
    assert len(names(tree / "x")) == 4


def test_a_link_to_no_file_does_not_name_a_patient(tree):
    (tree / "Musterfrau.dcm").symlink_to(tree / "none")
    (source,) = find_inputs([tree / "*.dcm"])[1]
    assert source.kind == "dicom" and "Musterfrau" not in source.name


def test_what_is_not_there_is_named(tree):
    for nothing in ("x/none.png", "x/*.bmp"):
        with pytest.raises(FileNotFoundError, match=nothing.replace("*", r"\*")):
            find_inputs([tree / nothing])
    (tree / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="No image, video or DICOM file under .*empty"):
        find_inputs([tree / "empty"])


def special_files(folder):
    """A pipe, a socket, a device, and links to these."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder / "socket"))
    for kind in ("pipe", "socket", "/dev/zero"):
        for suffix in ("", ".png", ".mp4", ".dcm"):
            (folder / f"link to {os.path.basename(kind)}{suffix}").symlink_to(folder / kind)
    return sorted(folder.iterdir())


def test_what_is_no_file_is_never_opened(predictor, image_folder, tmp_path):
    folder = tmp_path / "special"
    folder.mkdir()
    paths = special_files(folder)
    shutil.copy(image_folder / "a.png", folder)
    done = []

    def work():
        for path in paths:
            with contextlib.suppress(BadInputError):
                done.append(find_inputs([path, image_folder / "a.png"]))
        done.append(predict_files(predictor, [folder], tmp_path / "out"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)  # a pipe would block it for ever
    (found,) = done
    assert found.images == 1 and found.failed == [], "of a folder, only files are taken"
    for kind in ("image", "video", "dicom"):  # as of one that was replaced in the meantime
        with pytest.raises(BadInputError, match="special/pipe"):
            next(read_frames(Source(folder / "pipe", "pipe", kind)))
