"""progress.jsonl: it protects the user's files, and a stranger's journal harms nothing."""

import contextlib
import hashlib
import json
import os
import re
import shutil

import pytest
from hypothesis import given
from mutations import damaged_json

from imrcnn_d2.deploy import predict_files
from imrcnn_d2.deploy.batch import FORMAT, Journal

from .conftest import ALL, save_image, some_hundred

RUN = {"classes": ["polyp"], "tau": 0.5}


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("save", [(), ALL])
@pytest.mark.parametrize(
    "kept", ["masks/a.png", "labelme/a.json", "overlays/a.jpg", "predictions.csv"]
)
def test_a_folder_with_such_files_of_the_users_is_refused(predictor, image_folder, save, kept):
    root = image_folder.parent
    (root / kept).parent.mkdir(exist_ok=True)
    (root / kept).write_bytes(b"mine")
    before = contents(root)
    for existing in (False, True):  # an empty journal does not make them ours
        if existing:
            (root / Journal.FILE).touch()
        with pytest.raises(ValueError, match=kept.split("/")[0]):
            predict_files(predictor, [image_folder], root, save=save)
    (root / Journal.FILE).unlink()
    assert contents(root) == before


def test_what_was_changed_by_hand_stays(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, [image_folder], output, save=ALL)
    corrected = [output / name for name in ("labelme/a.json", "masks/b/c.png")]
    for path in corrected:
        path.write_bytes(path.read_bytes() + b" ")
    overlay, old = output / "overlays" / "a.jpg", contents(output)
    overlay.unlink()
    for second in (1, 2):
        for name in ("a.png", "b/c.jpg", "d.png"):
            os.utime(image_folder / name, (0, second))
        done = predict_files(predictor, [image_folder], output, save=ALL)
        assert (done.images, sorted(done.kept)) == (3, corrected)
        assert all(path.read_bytes() == old[path] for path in (*corrected, overlay))
    # A file that was put there before there was one of ours.
    save_image(image_folder / "e.png", 7)
    mine = output / "labelme" / "e.json"
    mine.write_text("mine")
    assert predict_files(predictor, [image_folder], output, save=ALL).kept == [mine]
    assert mine.read_text() == "mine"


def opened(folder):
    return contextlib.closing(Journal(folder, RUN, ALL))


def test_what_a_kill_left_is_deleted_unless_it_was_changed(tmp_path):
    def write(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        journal.add_file(path, hashlib.sha256(b"ours").hexdigest())
        path.write_bytes(b"ours")
        return path

    with opened(tmp_path) as journal:
        journal.begin("a.png")
        left, changed = write("masks/a.png"), write("labelme/a.json")
        frame = write("labelme/a.png")
        changed.write_bytes(b"mine")
        write("overlays/a.jpg").unlink()
    with opened(tmp_path):
        assert not left.exists() and changed.read_bytes() == b"mine"
        assert frame.exists(), "the corrected file is of it"


def test_through_a_link_nothing_is_written_or_deleted(predictor, image_folder, tmp_path):
    output, other = tmp_path / "out", tmp_path / "other"
    predict_files(predictor, [image_folder], output, save=ALL)
    (output / "masks").rename(other)
    (output / "masks").symlink_to(other)
    before = contents(other)
    os.utime(image_folder / "a.png", (0, 0))
    ((name, reason),) = predict_files(predictor, [image_folder], output, save=ALL).failed
    assert name == "a.png" and "link" in reason
    assert contents(other) == before
    for name in (Journal.FILE, ".lock"):
        (output / name).rename(other / "x")
        before = contents(other)
        for make in (lambda path: path.symlink_to(other / "x"), os.mkfifo):
            make(output / name)
            with pytest.raises(ValueError, match=name):
                predict_files(predictor, [image_folder], output, save=ALL)
            (output / name).unlink()
        assert contents(other) == before
        (other / "x").rename(output / name)


IMAGE = {"file_name": "a.png", "width": 80, "height": 60}
LESION = {
    **{"category_id": 1, "bbox": [1.0, 2.0, 30.0, 40.0], "score": 0.75, "area": 12.0},
    "segmentation": {"size": [60, 80], "counts": "Pj4"},
}
FRAME = {"image": IMAGE, "annotations": [LESION]}
FILE = {"file": "masks/a.png", "sha256": hashlib.sha256(b"mine").hexdigest()}
DONE = {"name": "a.png", "signature": [1, 2], "frames": 1, "error": None, "target": "a"}
LINES = [{"run": RUN}, FRAME, FILE, {"done": DONE}]


def edited(part, **fields):
    """The lines, with other values in one part of them."""
    lines = json.loads(json.dumps(LINES))
    frame, file, end = lines[1:]
    parts = {"image": frame["image"], "lesion": frame["annotations"][0]}
    {**parts, "file": file, "done": end["done"]}[part].update(fields)
    return lines


def write_lines(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / Journal.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def tables(folder):
    with opened(folder) as journal:
        journal.write_tables({**RUN, "weights_sha256": "ab", "version": "1"}, RUN["classes"])


@pytest.mark.parametrize(
    "number, lines",
    [
        *((4, edited("done", target=target)) for target in ("../../a", "/tmp/a", "a\0b")),
        *((4, edited("done", name=name)) for name in ("b/../../a", 7)),
        *((4, edited("done", **f)) for f in ({"frames": 2}, {"signature": "x"}, {"more": 1})),
        (4, [*LINES[:3], {"done": []}]),
        *((3, edited("file", file=name)) for name in ("../mine.txt", "images/mine.txt")),
        (3, edited("file", sha256=None)),
        (2, [LINES[0], {**FRAME, "annotations": {}}]),
        *((2, edited("lesion", score=score)) for score in (float("nan"), [])),
        *((2, edited("lesion", **f)) for f in ({"category_id": 2}, {"bbox": [0, 0, 1e9, 1e9]})),
        (2, edited("image", width=10**9)),
        (4, edited("image", file_name="../a.png")),
        *((2, [LINES[0], LINES[0]]), (1, [FRAME, {"done": DONE}])),
        (2, [LINES[0], "cut", *LINES[1:]]),
    ],
)
def test_a_line_that_was_not_written_here_is_named(tmp_path, number, lines):
    folder = tmp_path / "out"
    write_lines(folder, LINES)
    with opened(folder) as journal:
        assert journal.targets() == {"a.png": "a"}
    write_lines(folder, lines)
    for name in ("mine.txt", "out/masks/a.png", "out/images/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    before = contents(tmp_path)
    pytest.raises(ValueError, Journal, folder, RUN, ALL).match(rf"{Journal.FILE}, line {number}\b")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content", [b"my notes\n", b'{"step": 1}', b'{\n"run": 2\n}\n', b'{"run":{\n}}']
)
def test_a_file_of_its_name_that_another_program_wrote_stays(tmp_path, content):
    journal = tmp_path / Journal.FILE
    journal.write_bytes(content)
    pytest.raises(ValueError, Journal, tmp_path, RUN, ALL).match(rf"{Journal.FILE}, line 1\b")
    assert journal.read_bytes() == content
    for cut in (3, 15):  # by a kill
        journal.write_bytes(json.dumps(LINES[0], separators=(",", ":")).encode()[:cut])
        Journal(tmp_path, RUN, ALL).close()


@pytest.mark.parametrize("counts", ["4@", "0", "Pj4" * 9, ""])
def test_a_mask_that_was_not_written_here_is_refused(tmp_path, counts):
    write_lines(tmp_path, edited("lesion", segmentation={"size": [60, 80], "counts": counts}))
    pytest.raises(ValueError, tables, tmp_path).match(re.escape(str(tmp_path / Journal.FILE)))


def test_what_an_earlier_version_wrote_is_refused(tmp_path):
    write_lines(tmp_path, [{"run": RUN}, {"done": {"key": "0123", **DONE, "frames": 0}}])
    with pytest.raises(ValueError, match=r"format \(None, now 2\)"):
        Journal(tmp_path, {**RUN, "format": FORMAT})


@some_hundred
@given(damaged_json(LINES))
def test_fuzz(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("journal")
    (root / "mine.txt").write_bytes(b"mine")
    folder, lines = root / "out", None
    folder.mkdir()
    (folder / Journal.FILE).write_bytes(data.replace(b", {", b"\n{"))
    with contextlib.suppress(ValueError):
        lines = json.loads(data)
    if isinstance(lines, list):
        write_lines(folder, lines)
    with contextlib.suppress(ValueError):
        tables(folder)
    names = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    tables_of = {f"out/{name}" for name in ("predictions.json", "predictions.csv", "failed.csv")}
    assert names - tables_of == {"mine.txt", "out", f"out/{Journal.FILE}", "out/.lock"}
    shutil.rmtree(root)
