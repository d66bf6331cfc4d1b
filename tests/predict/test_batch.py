"""A run over many inputs: whole outputs, bad inputs listed, nothing lost or done twice; reading,
the network and the caller work at once, in order and within bounds.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from dicoms import PATIENT, write_dicom
from PIL import Image, ImageDraw

from imrcnn_d2.deploy import Predictor, batch, predict_files
from imrcnn_d2.deploy.batch import Journal, predictions
from imrcnn_d2.deploy.inputs import Source, decode_video, public_name
from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results

from .conftest import ALL, random_image, read_coco, read_table, save_image, wait_for, write_video


def names(output):
    return [image["file_name"] for image in read_coco(output)["images"]]


def test_the_files_of_a_folder(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    done = predict_files(predictor, [image_folder], output, save=ALL, batch_size=2)
    assert (done.images, done.skipped, done.failed) == (3, 0, [])
    coco, metadata = read_coco(output), predictor.metadata
    assert names(output) == ["a.png", "b/c.jpg", "d.png"]
    assert coco["categories"] == [{"id": 1, "name": "polyp"}]
    assert coco["info"].items() >= metadata.items()
    # in the same batches: else fp32 sums, and a mask's edge with them, could end otherwise
    expected = predictor([image_folder / name for name in names(output)], batch_size=2)
    number = sum(map(len, expected))
    assert sorted(a["id"] for a in coco["annotations"]) == list(range(1, 1 + number))
    gt = read_ground_truth({**coco, "annotations": []})  # the evaluation takes it
    assert len(read_results(coco, gt).score) == number > 3

    rows = read_table(output / "predictions.csv")
    for name, row, instances in zip(("a", "b/c", "d"), rows, expected, strict=True):
        above = instances.scores >= predictor.tau
        union = instances.pred_masks[above].any(dim=0).numpy()
        assert int(row["lesions"]) == above.sum()
        assert float(row["score"]) == pytest.approx(instances.scores.max().item())
        assert float(row["area_percent"]) == pytest.approx(100 * union.mean(), abs=1e-3)
        assert (row["tau"], row["version"]) == (str(predictor.tau), metadata["version"])
        with Image.open(output / "masks" / f"{name}.png") as mask:
            assert json.loads(mask.text["Comment"]).items() >= metadata.items(), "so τ"
            assert (np.asarray(mask) == 255 * union).all()
        with Image.open(output / "overlays" / f"{name}.jpg") as overlay:
            assert overlay.size == (80, 60)
            assert json.loads(overlay.info["comment"])["tau"] == predictor.tau
        path = output / "labelme" / f"{name}.json"
        labelme = json.loads(path.read_text())
        assert labelme["predicted_by"] == metadata
        assert (path.parent / labelme["imagePath"]).resolve().is_relative_to(image_folder)
        polygons = Image.new("1", (80, 60))
        for shape in labelme["shapes"]:
            assert shape["label"] == "polyp" and len(shape["points"]) > 2
            # as LabelMe makes a mask of it
            points = [tuple(point) for point in shape["points"]]
            ImageDraw.Draw(polygons).polygon(points, outline=1, fill=1)
        assert (np.asarray(polygons) & union).sum() > 0.9 * union.sum()
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]


def test_bad_inputs_are_listed_and_the_others_go_on(
    predictor, image_folder, bad_files, tmp_path, monkeypatch, capfd
):
    whole, control = batch.read_frames, "\x1b]0;a\x07\n\u202eb.png"

    def read_frames(source):
        if source.name == "odd.png":
            raise TypeError("a float is not iterable")
        return whole(source)

    monkeypatch.setattr(batch, "read_frames", read_frames)
    bad_files |= {"odd.png": "(TypeError: a float is not iterable)", control: "image"}
    for name in ("odd.png", control):
        (image_folder / name).write_bytes(b"-")
    done = predict_files(predictor, [image_folder], tmp_path / "out", batch_size=2)
    printed = "".join(capfd.readouterr())
    assert r"\x1b]0;a\x07\n\u202eb.png: " in printed
    assert "\x1b]" not in printed and "\u202e" not in printed
    reasons, stills = dict(done.failed), ["a.png", "b/c.jpg", "d.png", "deep.png", "print.jpg"]
    assert reasons.keys() == bad_files.keys()
    assert all(reason in reasons[name] for name, reason in bad_files.items())
    table = read_table(tmp_path / "out" / "failed.csv")
    assert {row["file"]: row["reason"] for row in table} == reasons
    frames = [name for name in names(tmp_path / "out") if name not in stills]
    assert names(tmp_path / "out") == [*stills[:2], *frames, *stills[2:]]
    assert frames == [f"cut.mkv#{n:06d}" for n in range(len(frames))] and 5 < len(frames) < 40


def test_finished_inputs_are_not_redone(predictor, tiny_run, image_folder, tmp_path):
    output = tmp_path / "out"

    def predict(inputs=(image_folder,), predictor=predictor):
        return predict_files(predictor, inputs, output, save=["masks"])

    (image_folder / "e.png").write_bytes(b"not yet whole")
    first = predict()
    assert (first.images, len(first.failed)) == (3, 1)
    before = (output / "masks" / "a.png").stat().st_mtime_ns
    for name, size in (("e.png", ()), ("d.png", (50, 50)), ("f.png", ())):
        save_image(image_folder / name, 7, *size)
    again = predict()
    assert (again.images, again.skipped, again.failed) == (3, 2, [])
    assert (output / "masks" / "a.png").stat().st_mtime_ns == before
    assert not (output / "failed.csv").exists()
    images = [(image["id"], image["width"]) for image in read_coco(output)["images"]]
    assert images == [(1, 80), (2, 80), (3, 50), (4, 80), (5, 80)]
    assert predict().skipped == 5
    # Results of another run are not mixed in.
    other = Predictor(None, tiny_run / "model_best.pth", tau=0.25)
    pytest.raises(ValueError, predict, predictor=other).match(r"tau \(0.5, now 0.25\)")
    pytest.raises(ValueError, predict, [image_folder / "b"]).match("inputs")
    # One run at a time writes into a folder.
    run = json.loads((output / "progress.jsonl").read_text().splitlines()[0])["run"]
    with contextlib.closing(Journal(output, run, ALL)):
        pytest.raises(ValueError, predict).match(re.escape(str(output)))
    with pytest.raises(ValueError, match="tau"):  # and unlocks it
        Journal(output, {**run, "tau": 0.1}, ALL)
    assert predict().skipped == 5
    # A line that a kill cut off costs one input.
    whole, journal = (output / "predictions.json").read_bytes(), output / "progress.jsonl"
    first = len(journal.read_bytes().splitlines()[0])
    for left in (0.999, 0.7, 0):  # of the last line, of several, of all but the first
        (output / "predictions.json").unlink()
        os.truncate(journal, max(int(left * journal.stat().st_size), first + 5))
        predict()
        assert (output / "predictions.json").read_bytes() == whole


def test_a_video_and_its_frames(predictor, tmp_path):
    times = [Fraction(1001 * number, 30000) for number in (0, 1, 5, 6)]
    film = write_video(tmp_path / "v.mp4", 4, times, Fraction(16, 11))
    output = tmp_path / "out"
    predict_files(predictor, [film], output, save=ALL, batch_size=3)
    overlays = decode_video(output / "overlays" / "v.mp4", "v.mp4")
    aspect = Fraction(16, 11)
    assert [(f.time, f.pixel_aspect) for f in overlays] == [(time, aspect) for time in times]
    images = [(image["file_name"], image["time"]) for image in read_coco(output)["images"]]
    assert images == [(f"v.mp4#{n:06d}", float(time)) for n, time in enumerate(times)]
    assert len(list((output / "masks" / "v.mp4").iterdir())) == 4
    for path in (output / "labelme" / "v.mp4").glob("*.json"):
        assert (path.parent / json.loads(path.read_text())["imagePath"]).is_file()
    # The files of what an input was are deleted; those of the user stay.
    write_video(film, 1)
    (output / "masks" / "v.mp4" / "mine.txt").touch()
    predict_files(predictor, [film], output, save=ALL)
    remaining = {path.name for path in (output / "masks" / "v.mp4").iterdir()}
    assert remaining == {"000000.png", "mine.txt"}


def test_no_identifier_of_a_patient_reaches_an_output(predictor, tmp_path):
    folder, output = tmp_path / "study" / "Musterfrau_19640812", tmp_path / "out"
    folder.mkdir(parents=True)
    stills = "Musterfrau_Erika.jpg", "IM2.png", "IM3.mp4"
    burned_in = ({}, {"BurnedInAnnotation": "YES"}, {"BurnedInAnnotation": "UNKNOWN"})
    for seed, (name, fields) in enumerate(zip(stills, burned_in, strict=True)):
        write_dicom(folder / name, random_image(seed), **fields)
    two = np.stack([random_image(5), random_image(6)])
    write_dicom(folder / "KIS-4711.dcm", two, FrameTime="40")
    broken = write_dicom(folder / "broken-ACC0815.dcm", random_image(4), Rows=1000)
    shutil.copy(folder / "KIS-4711.dcm", folder / "KIS-4711-2.dcm")
    done = predict_files(predictor, [folder], output, save=ALL)
    assert (done.images, len(done.failed)) == (5, 1)
    words = [part for value in PATIENT.values() for part in value.split("^")]
    # What an attacker tries who knows how such files and folders are called.
    guesses = [path.name for path in folder.iterdir()] + [str(folder), folder.name]
    words += [hashlib.sha256(name.encode()).hexdigest()[:16] for name in guesses]
    for path in output.rglob("*"):
        text = str(path.relative_to(output)).encode()
        text += b"\n" + path.read_bytes() if path.is_file() else b""
        for word in words:
            assert word.lower().encode() not in text.lower(), (word, path)
    inputs = {name.split("#")[0] for name in names(output)}
    shown, *hidden = (public_name(folder / name).removesuffix(".dcm") for name in stills)
    assert {f"{name}.dcm" for name in (shown, *hidden)} < inputs and len(inputs) == 4
    assert (output / "overlays" / f"{shown}.jpg").exists()
    for name in hidden:
        assert not (output / "overlays" / f"{name}.jpg").exists(), "its pixels show the name"
        assert not list(output.glob(f"labelme/{name}.*"))
        assert (output / "masks" / f"{name}.png").exists()
    # They are known by their content.
    (folder / stills[0]).rename(folder / "renamed.dcm")
    write_dicom(broken, random_image(4))
    done = predict_files(predictor, [folder], output, save=ALL)
    assert (done.images, done.skipped, done.failed) == (1, 4, [])
    assert not (output / "failed.csv").exists() and len(names(output)) == 6


@pytest.mark.parametrize(
    "inputs",
    [
        [f"{'a' * 248}.png", "b.png"],
        [f"{'ä' * 124}.png", f"{'ä' * 123}b.png", "b.png"],
        ["a.png", "a.jpg/b.png", "a.jpg/c.png"],
        ["a.png", "a.jpg/b.png", "a.png.json/b.png", "a.json/c.png"],
    ],
)
def test_no_name_stops_a_run(predictor, tmp_path, inputs):
    folder, output = tmp_path / "in", tmp_path / "out"
    for seed, name in enumerate(inputs):
        save_image(folder / name, seed)
    done = predict_files(predictor, [folder], output, save=ALL)
    assert (done.images, done.failed, done.kept) == (len(inputs), [], [])
    for kind in ALL:
        assert sum(path.is_file() for path in (output / kind).rglob("*")) == len(inputs)
    assert predict_files(predictor, [folder], output, save=ALL).skipped == len(inputs)


def test_each_input_has_its_files(predictor, image_folder, tmp_path):
    # Of names that differ in their suffix alone, the second one's file would be another's.
    for name, files in {
        "a.jpg": ["a.jpg.png", "a.png.png", "b", "d.png"],
        "a.jpg.png": ["a.jpg.png", "a.jpg.png.png", "a.png.png", "b", "d.png"],
    }.items():
        save_image(image_folder / name, 5)
        predict_files(predictor, [image_folder], tmp_path / name, save=["masks"])
        assert sorted(path.name for path in (tmp_path / name / "masks").iterdir()) == files
    (image_folder / "a.jpg.png").unlink()
    # A later input takes no other input's files.
    output = tmp_path / "out"
    predict_files(predictor, [image_folder / "a.png"], output, save=ALL)
    before = {path: path.read_bytes() for path in output.glob("*/*")}
    assert {path.name for path in before} == {"a.png", "a.jpg", "a.json"}
    predict_files(predictor, [image_folder / "a.jpg"], output, save=ALL)
    assert all(path.read_bytes() == content for path, content in before.items())
    added = {path.name for path in output.glob("*/*")} - {path.name for path in before}
    assert added == {"a.jpg.jpg", "a.jpg.png", "a.jpg.json"}
    # Changed, an input replaces its own files.
    save_image(image_folder / "a.png", 6)
    predict_files(predictor, [image_folder], output, save=ALL)
    assert (output / "masks" / "a.png").read_bytes() != before[output / "masks" / "a.png"]
    assert not (output / "masks" / "a.png.png").exists()
    # A name that cannot be written fails its input alone.
    for name in ("e.png", "f/g.jpg", "h.png"):
        save_image(image_folder / name, 1)
    (output / "masks" / "e.png").mkdir()
    (output / "overlays" / "f").write_text("mine")
    for failed, images in ((["e.png", "f/g.jpg"], 3), (["f/g.jpg"], 2)):
        done = predict_files(predictor, [image_folder], output, save=ALL)
        assert ([name for name, _ in done.failed], done.images) == (failed, images)
        if (output / "masks" / "e.png").is_dir():
            (output / "masks" / "e.png").rmdir()


@pytest.mark.parametrize("where", ["found", ".", ".."])
def test_results_next_to_the_images(predictor, image_folder, where):
    """They are not predicted on, and the images stay as they are."""
    output, before = image_folder / where, {}
    for seed in (5, 6):
        save_image(image_folder / "a.png", seed)
        images = [path for path in image_folder.rglob("*.*g") if "out" not in path.parts]
        before = before or {path: path.read_bytes() for path in images}
        before[image_folder / "a.png"] = (image_folder / "a.png").read_bytes()
        done = predict_files(predictor, [image_folder], output, save=ALL)
        assert not done.failed and not done.kept
        assert names(output) == ["a.png", "b/c.jpg", "d.png"]
        assert all(path.read_bytes() == content for path, content in before.items())


def test_names_that_are_no_utf8(predictor, image_folder, tmp_path):
    for name in (b"\xff.png", b"\xfe-bad.png"):
        os.rename(image_folder / "a.png", os.fsencode(image_folder) + b"/" + name)
        (image_folder / "a.png").write_bytes(b"no image")
    output, save = tmp_path / "out", ["masks", "labelme"]
    done = predict_files(predictor, [image_folder], output, save=save)
    assert (done.images, len(done.failed)) == (3, 2)
    assert read_table(output / "predictions.csv")[-1]["file_name"] == "\\udcff.png"
    failed = {row["file"] for row in read_table(output / "failed.csv")}
    assert failed == {"a.png", "\\udcfe-bad.png"}
    assert os.path.exists(os.fsencode(output) + b"/masks/\xff.png")
    assert predict_files(predictor, [image_folder], output, save=save).skipped == 3


@pytest.mark.slow
def test_killed_and_run_again(tiny_run, predictor, tmp_path):
    folder, output, number = tmp_path / "images", tmp_path / "out", 60
    expected = [save_image(folder / f"{n:03d}.png", n).name for n in range(number)]
    command = [sys.executable, "-W", "ignore", "tools/predict.py", "--masks", "--input", folder]
    command += ["--weights", tiny_run / "model_best.pth", "--output", output]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    journal = output / "progress.jsonl"

    def done():
        return journal.read_text().count('{"done"') if journal.exists() else 0

    wait_for(lambda: done() >= number // 4 or process.poll() is not None, 600)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done()
    assert number // 4 <= before < number and not (output / "predictions.json").exists()
    again = predict_files(predictor, [folder], output, save=["masks"])
    assert again.images + again.skipped == number and abs(again.skipped - before) <= 1
    assert names(output) == sorted(path.name for path in output.glob("masks/*")) == expected
    predict_files(predictor, [folder], straight := tmp_path / "straight")
    assert read_coco(straight)["annotations"] == read_coco(output)["annotations"]


FRAMES = 40


@pytest.fixture
def video(tmp_path):
    return Source(write_video(tmp_path / "v.mp4", FRAMES), "v.mp4", "video")


@pytest.fixture
def network(predictor, monkeypatch):
    """Calls a function, None at first, before each run of the network; counts these. At the end no
    thread is left.
    """
    network, runtime = SimpleNamespace(before=None, runs=0), predictor._runtime
    threads = set(threading.enumerate())

    def run(images):
        network.runs += 1
        if network.before is not None:
            network.before()
        return runtime(images)

    monkeypatch.setattr(predictor, "_runtime", run)
    yield network
    left = set(threading.enumerate()) - threads
    assert not [thread for thread in left if not thread.name.startswith("tqdm")]


def test_the_network_and_the_reader_are_ahead_within_bounds(predictor, video, network, monkeypatch):
    threads, prepare = {threading.get_ident()}, predictor.prepare
    network.before = lambda: threads.add(threading.get_ident())

    def reading(*args):
        threads.add(threading.get_ident())
        return prepare(*args)

    monkeypatch.setattr(predictor, "prepare", reading)
    with contextlib.closing(predictions(predictor, [video], 2)) as items:
        first = next(items)
        wait_for(lambda: network.runs >= 2)
        time.sleep(0.3)
        assert network.runs <= 4, "it runs away"
        *rest, last = [item for item, _ in (first, *items)]
    assert [item.frame.number for item in rest] == list(range(FRAMES))
    assert last.frame is None and last.error is None
    assert network.runs == FRAMES / 2 and len(threads) == 3


def test_errors_of_the_network_surface_and_an_interrupted_run_is_continued(
    predictor, video, network, tmp_path
):
    def fail():
        if network.runs == 5:
            raise MemoryError("of the card")

    network.before, seen = fail, []
    with pytest.raises(MemoryError, match="of the card"):
        for item, _ in predictions(predictor, [video], 1):
            seen.append(item.frame.number)
    assert seen == [0, 1, 2, 3]

    network.before = lambda: network.runs == 10 and os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may have it ignored
    output = tmp_path / "out"
    try:
        with pytest.raises(KeyboardInterrupt):
            predict_files(predictor, [video.path], output, save=["overlays"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in output.rglob("*") if path.suffix] == ["progress.jsonl"]
    assert predict_files(predictor, [video.path], output, save=["overlays"]).images == FRAMES
    assert (output / "overlays" / "v.mp4").is_file()
