"""progress.jsonl: what it says of the user's files, and what a stranger's can make of it."""

import contextlib
import hashlib
import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from mutations import damaged_json
from PIL import Image

from imrcnn_d2.deploy.batch import Journal, predict_files
from imrcnn_d2.deploy.inputs import Source
from imrcnn_d2.deploy.outputs import OUTPUTS

from .conftest import random_image

ALL = tuple(OUTPUTS)
RUN = {"classes": ["polyp"], "tau": 0.5}


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def dataset(image_folder):
    """A data set of the user's: images, and manual annotations."""
    root = image_folder.parent
    for name in ("masks/a.png", "labelme/a.json", "masks/b/c.png", "overlays/a.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"mine")
    return root


@pytest.mark.parametrize("save", [(), ALL])
@pytest.mark.parametrize("kept", ["masks", "labelme", "overlays", "predictions.csv"])
def test_a_folder_with_such_files_of_the_users_is_refused(predictor, dataset, save, kept):
    for kind in OUTPUTS.keys() - {kept}:
        shutil.rmtree(dataset / kind)
    if kept == "predictions.csv":
        (dataset / kept).write_bytes(b"mine")
    before = contents(dataset)
    for existing in (False, True):  # an empty journal says nothing either
        if existing:
            (dataset / Journal.FILE).touch()
        with pytest.raises(ValueError, match=kept):
            predict_files(predictor, [dataset / "images"], dataset, save=save)
    (dataset / Journal.FILE).unlink()
    assert contents(dataset) == before


def test_the_folder_of_the_images_itself(predictor, image_folder):
    before = contents(image_folder)
    for seed in (5, 6):
        done = predict_files(predictor, [image_folder], image_folder, save=ALL)
        assert not done.failed and not done.kept
        assert before.items() <= contents(image_folder).items()
        Image.fromarray(random_image(seed)).save(image_folder / "a.png")
        before[image_folder / "a.png"] = (image_folder / "a.png").read_bytes()


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_what_was_changed_by_hand_stays(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, [image_folder], output, save=ALL)
    corrected = [output / name for name in ("labelme/a.json", "masks/b/c.png")]
    for path in corrected:
        path.write_bytes(path.read_bytes() + b" ")
    overlay = output / "overlays" / "a.jpg"
    old = contents(output)
    overlay.unlink()
    for _ in range(2):
        for path in ("a.png", "b/c.jpg", "d.png"):
            touch(image_folder / path)
        done = predict_files(predictor, [image_folder], output, save=ALL)
        assert (done.images, sorted(done.kept)) == (3, corrected)
        assert overlay.read_bytes() == old[overlay]
        assert all(path.read_bytes() == old[path] for path in corrected)
    # A file that was put there before there was one of ours.
    Image.fromarray(random_image(7)).save(image_folder / "e.png")
    (output / "labelme" / "e.json").write_text("mine")
    assert predict_files(predictor, [image_folder], output, save=ALL).kept == [
        output / "labelme" / "e.json"
    ]
    assert (output / "labelme" / "e.json").read_text() == "mine"


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path / "a.png", "a.png", "image")


def write(journal, name, content=b"ours"):
    path = journal.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    journal.add_file(path, hashlib.sha256(content).hexdigest())
    path.write_bytes(content)
    return path


def opened(folder, run=RUN):
    return contextlib.closing(Journal(folder, run, OUTPUTS))


def test_what_a_kill_left_is_deleted_unless_it_was_changed(tmp_path, source):
    folder = tmp_path / "out"
    with opened(folder) as journal:
        journal.begin(source)
        left = write(journal, "masks/a.png")
        changed, frame = write(journal, "labelme/a.json"), write(journal, "labelme/a.png")
        changed.write_bytes(b"mine")
        write(journal, "overlays/a.jpg").unlink()
    with opened(folder):
        assert not left.exists() and changed.read_bytes() == b"mine"
        assert frame.exists(), "the corrected file is of it"


def test_through_a_link_nothing_is_written_or_deleted(predictor, image_folder, tmp_path, source):
    output, other = tmp_path / "out", tmp_path / "other"
    predict_files(predictor, [image_folder], output, save=ALL)
    (output / "masks").rename(other)
    (output / "masks").symlink_to(other)
    before = contents(other)
    touch(image_folder / "a.png")
    ((name, reason),) = predict_files(predictor, [image_folder], output, save=ALL).failed
    assert name == "a.png" and "link" in reason
    assert contents(other) == before
    for name in (Journal.FILE, ".lock"):
        (output / name).rename(other / "x")
        (output / name).symlink_to(other / "x")
        before = contents(other)
        with pytest.raises(ValueError, match=name):
            predict_files(predictor, [image_folder], output, save=ALL)
        assert contents(other) == before
        (output / name).unlink()
        os.mkfifo(output / name)
        with pytest.raises(ValueError, match=name):
            predict_files(predictor, [image_folder], output, save=ALL)
        (output / name).unlink()
        (other / "x").rename(output / name)


IMAGE = {"file_name": "a.png", "width": 80, "height": 60}
FOUND = {
    "category_id": 1,
    "bbox": [1.0, 2.0, 30.0, 40.0],
    "score": 0.75,
    "segmentation": {"size": [60, 80], "counts": "Pj4"},
    "area": 12.0,
}
FRAME = {"image": IMAGE, "annotations": [FOUND]}
FILE = {"file": "masks/a.png", "sha256": hashlib.sha256(b"mine").hexdigest()}
DONE = {"name": "a.png", "signature": [1, 2], "frames": 1, "error": None, "target": "a"}
LINES = [{"run": RUN}, FRAME, FILE, {"done": DONE}]


def write_lines(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / Journal.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def tables(folder):
    with opened(folder) as journal:
        journal.write_tables({**RUN, "weights_sha256": "ab", "version": "1"}, RUN["classes"])


@pytest.mark.parametrize(
    "number, lines",
    [
        (4, [*LINES[:3], {"done": {**DONE, "target": "../../a"}}]),
        (4, [*LINES[:3], {"done": {**DONE, "target": "/tmp/a"}}]),
        (4, [*LINES[:3], {"done": {**DONE, "name": "b/../../a"}}]),
        (4, [*LINES[:3], {"done": {**DONE, "name": 7}}]),
        (4, [*LINES[:3], {"done": {**DONE, "target": "a\0b"}}]),
        (4, [*LINES[:3], {"done": {**DONE, "frames": 2}}]),
        (4, [*LINES[:3], {"done": {**DONE, "signature": "x"}}]),
        (4, [*LINES[:3], {"done": {**DONE, "more": 1}}]),
        (4, [*LINES[:3], {"done": []}]),
        (3, [*LINES[:2], {**FILE, "file": "../mine.txt"}]),
        (3, [*LINES[:2], {**FILE, "file": "images/mine.txt"}]),
        (3, [*LINES[:2], {**FILE, "sha256": None}]),
        (2, [LINES[0], {**FRAME, "annotations": {}}]),
        (2, [LINES[0], {**FRAME, "annotations": [{**FOUND, "category_id": 2}]}]),
        (2, [LINES[0], {**FRAME, "annotations": [{**FOUND, "score": float("nan")}]}]),
        (2, [LINES[0], {**FRAME, "annotations": [{**FOUND, "score": []}]}]),
        (2, [LINES[0], {**FRAME, "annotations": [{**FOUND, "bbox": [0, 0, 1e9, 1e9]}]}]),
        (2, [LINES[0], {**FRAME, "image": {**IMAGE, "width": 10**9}}]),
        (2, [LINES[0], LINES[0]]),
        (1, [FRAME, {"done": DONE}]),
        (2, [LINES[0], "cut", *LINES[1:]]),
        (4, [LINES[0], {**FRAME, "image": {**IMAGE, "file_name": "../a.png"}}, *LINES[2:]]),
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
    with pytest.raises(ValueError, match=rf"{Journal.FILE}, line {number}\b"):
        Journal(folder, RUN, OUTPUTS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content", [b"my notes\n", b'{"step": 1}', b'{\n"run": 2\n}\n', b'{"run":{\n}}']
)
def test_a_file_of_its_name_that_another_program_wrote_stays(tmp_path, content):
    (tmp_path / Journal.FILE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{Journal.FILE}, line 1\b"):
        Journal(tmp_path, RUN, OUTPUTS)
    assert (tmp_path / Journal.FILE).read_bytes() == content
    for cut in (3, 15):  # by a kill
        (tmp_path / Journal.FILE).write_bytes(
            json.dumps(LINES[0], separators=(",", ":")).encode()[:cut]
        )
        Journal(tmp_path, RUN, OUTPUTS).close()


@pytest.mark.parametrize("counts", ["4@", "0", "Pj4" * 9, ""])
def test_a_mask_that_was_not_written_here_ends_nothing(tmp_path, counts):
    mask = {**FOUND, "segmentation": {"size": [60, 80], "counts": counts}}
    write_lines(tmp_path / "out", [LINES[0], {**FRAME, "annotations": [mask]}, *LINES[2:]])
    with pytest.raises(ValueError, match=Journal.FILE):
        tables(tmp_path / "out")


def test_what_an_earlier_version_wrote_is_refused(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, [image_folder], output)
    first, *_ = map(json.loads, (output / Journal.FILE).read_text().splitlines())
    del first["run"]["format"]
    done = {"key": "0123456789abcdef", **DONE, "frames": 0}
    write_lines(output, [first, {"done": done}])
    with pytest.raises(ValueError, match=r"format \(None, now 2\)"):
        predict_files(predictor, [image_folder], output)


@pytest.mark.fuzz
@pytest.mark.slow
@given(damaged_json(LINES))
@settings(
    max_examples=max(200, settings().max_examples),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_fuzz(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("journal")
    (root / "mine.txt").write_bytes(b"mine")
    try:
        lines = json.loads(data)
    except ValueError:
        lines = None
    folder = root / "out"
    if isinstance(lines, list):
        write_lines(folder, lines)
    else:
        folder.mkdir()
        (folder / Journal.FILE).write_bytes(data.replace(b", {", b"\n{"))
    with contextlib.suppress(ValueError):
        tables(folder)
    names = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    tables_of = {f"out/{name}" for name in ("predictions.json", "predictions.csv", "failed.csv")}
    assert names - tables_of == {"mine.txt", "out", f"out/{Journal.FILE}", "out/.lock"}
    shutil.rmtree(root)
