"""Folders of inputs to files, and the journal that lets a run go on."""

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
import pycocotools.mask as mask_util
import pytest
from dicoms import PATIENT, write_dicom
from hypothesis import given
from mutations import damaged_json
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from imrcnn_d2.deploy import Predictor, batch, outputs, predict_files
from imrcnn_d2.deploy.batch import Journal, predictions
from imrcnn_d2.deploy.inputs import Source, decode_video, public_name
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results
from imrcnn_d2.utils.files import read_json

from .conftest import (
    ALL,
    random_image,
    read_coco,
    read_table,
    save_image,
    some_hundred,
    wait_for,
    write_video,
)


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
    paths = [image_folder / name for name in names(output)]
    expected = predictor(paths, batch_size=2)
    number = sum(map(len, expected))
    assert sorted(a["id"] for a in coco["annotations"]) == list(range(1, 1 + number))
    gt = read_ground_truth({**coco, "annotations": []})  # the evaluation takes it
    assert len(read_results(coco, gt).score) == number > 3
    rows, records = read_table(output / "predictions.csv"), iter(coco["annotations"])
    for path, row, instances in zip(paths, rows, expected, strict=True):
        name = path.relative_to(image_folder).with_suffix("")
        detections = instances.scores, instances.pred_boxes.tensor.tolist(), instances.pred_masks
        for score, (x0, y0, x1, y1), mask in zip(*detections, strict=True):
            record = next(records)
            assert (record["score"], record["category_id"]) == (score, 1)
            assert record["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])
            assert (mask_util.decode(record["segmentation"]) == mask.numpy()).all()
            assert record["area"] == mask.sum()
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
        labelme_path = output / "labelme" / f"{name}.json"
        labelme = json.loads(labelme_path.read_text())
        assert labelme["predicted_by"] == metadata
        assert path.samefile(labelme_path.parent / labelme["imagePath"])
        assert {shape["label"] for shape in labelme["shapes"]} == {"polyp"}
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]


def test_bad_inputs_are_listed_and_the_others_go_on(
    predictor, image_folder, bad_files, tmp_path, monkeypatch, capfd
):
    output, whole, control = tmp_path / "out", batch.read_frames, "\x1b]0;a\x07\n\u202eb.png"

    def read_frames(source):
        if source.name == "odd.png":
            raise TypeError("a float is not iterable")
        return whole(source)

    monkeypatch.setattr(batch, "read_frames", read_frames)
    bad_files |= {"odd.png": "(TypeError: a float is not iterable)", control: "image"}
    for name in ("odd.png", control):
        (image_folder / name).write_bytes(b"-")
    reasons = dict(predict_files(predictor, [image_folder], output, batch_size=2).failed)
    printed = "".join(capfd.readouterr())
    assert r"\x1b]0;a\x07\n\u202eb.png: " in printed
    assert "\x1b]" not in printed and "\u202e" not in printed
    assert reasons.keys() == bad_files.keys()
    assert all(reason in reasons[name] for name, reason in bad_files.items())
    assert {row["file"]: row["reason"] for row in read_table(output / "failed.csv")} == reasons
    frames = [f"cut.mkv#{n:06d}" for n in range(len(names(output)) - 5)]
    assert names(output) == ["a.png", "b/c.jpg", *frames, "d.png", "deep.png", "print.jpg"]
    assert 5 < len(frames) < 40
    no_names = (output / "progress.jsonl").read_text().count('"target":null')
    assert no_names == len(reasons) - 1, "without a frame no names are taken"


def test_finished_inputs_are_not_redone(predictor, weights, image_folder, caplog):
    output = image_folder  # whose outputs are no inputs

    def predict(inputs=(image_folder,), predictor=predictor):
        return predict_files(predictor, inputs, output, save=["masks"])

    (image_folder / "e.png").write_bytes(b"not yet whole")
    first = predict()
    assert (first.images, len(first.failed)) == (3, 1)
    assert predict().skipped == 3, "what failed is tried again"
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
    other = Predictor(None, weights, tau=0.25)
    pytest.raises(ValueError, predict, predictor=other).match(r"tau \(0.5, now 0.25\)")
    pytest.raises(ValueError, predict, [image_folder / "b"]).match("inputs")
    # One run at a time writes into a folder.
    whole, journal = (output / "predictions.json").read_bytes(), output / "progress.jsonl"
    first = journal.read_bytes().splitlines()[0]
    run = json.loads(first)["run"]
    assert run["format"] == batch.FORMAT, "results of earlier versions are not gone on with"
    with contextlib.closing(Journal(output, run, ALL)):
        pytest.raises(ValueError, predict).match(re.escape(str(output)))
    with pytest.raises(ValueError, match="tau"):  # and unlocks it
        Journal(output, {**run, "tau": 0.1}, ALL)
    # A line that a kill cut off costs one input.
    for left in (1, 0.999, 0.7, 0):  # all, but of the last line, of several, of all but the first
        (output / "predictions.json").unlink()
        os.truncate(journal, max(int(left * journal.stat().st_size), len(first) + 5))
        assert (predict().skipped == 5) == (left == 1)
        assert (output / "predictions.json").read_bytes() == whole
    assert "not among these" not in caplog.text
    (image_folder / "f.png").unlink()  # or it's another stick of that name
    assert predict().skipped == 4 and "that are not among these (1): f.png" in caplog.text
    assert (output / "predictions.json").read_bytes() == whole


# What is predicted first, then what is not mixed in: runtime and precision of a file, None for the
# checkpoint.
OTHERS = [
    (("onnxruntime", "fp32"), ("torch", None), {"weights_sha256", "runtime"}),
    (("torch", None), ("torch-bf16", None), {"runtime", "precision"}),
    (("torch", "fp16"), ("torch", "fp32"), {"weights_sha256", "precision"}),
]


@pytest.mark.parametrize("first, second, differing", OTHERS)
def test_other_files_precisions_and_runtimes_are_not_mixed_in(
    weights, exported, image_folder, tmp_path, first, second, differing
):
    before, now = (
        Predictor(
            None,
            exported(name, precision) if precision else weights,
            runtime=name if name.endswith("bf16") else None,
        )
        for name, precision in (first, second)
    )
    predict_files(before, [image_folder], tmp_path / "out")
    coco, path = read_coco(tmp_path / "out"), exported(*first) if first[1] else weights
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = {"weights_sha256": digest, "runtime": first[0], "precision": first[1] or "fp32"}
    assert coco["info"].items() >= expected.items()
    save_image(image_folder / "new.png", 5)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "out"))) as error:
        predict_files(now, [image_folder], tmp_path / "out")
    for key in differing:
        assert all(each.metadata[key][:10] in str(error.value) for each in (before, now)), key
    assert read_coco(tmp_path / "out") == coco


def test_results_for_pycocotools(predictor, image_folder, tmp_path):
    """COCO's evaluation of results.json is ours of predictions.json; ids are matched by names."""
    predict_files(predictor, [image_folder], output := tmp_path / "out")
    coco = read_coco(output)
    truth = {key: coco[key] for key in ("images", "categories")}
    truth["annotations"] = [{**a, "iscrowd": 0} for a in coco["annotations"][::2]]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    gt = COCO(str(tmp_path / "gt.json"))
    evaluation = COCOeval(gt, gt.loadRes(str(output / "results.json")), "segm")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    expected = evaluate_lesions(truth, output / "predictions.json").segm
    assert 100 * evaluation.stats[:3] == pytest.approx(
        [expected[k] for k in ("AP", "AP50", "AP75")]
    )
    assert 0 < evaluation.stats[0] < 1
    results = json.loads((output / "results.json").read_text())
    keys = {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert all(result.keys() >= keys for result in results)
    for image in truth["images"]:
        image["id"] = 4 - image["id"]
    for annotation in truth["annotations"]:
        annotation["image_id"] = 4 - annotation["image_id"]
    numbered_otherwise = evaluate_lesions(truth, output / "results.json")
    assert numbered_otherwise.segm == pytest.approx(expected, nan_ok=True)


def test_a_video_and_its_frames(predictor, weights, tmp_path):
    times = [Fraction(1001 * number, 30000) for number in (0, 1, 5, 6)]
    film = write_video(tmp_path / "v.mp4", 4, times, Fraction(16, 11))
    predict_files(predictor, [film], output := tmp_path / "out", save=ALL, batch_size=3)
    overlays = decode_video(output / "overlays" / "v.mp4", "v.mp4")
    assert [(f.time, f.pixel_aspect) for f in overlays] == [(t, Fraction(16, 11)) for t in times]
    images = [(image["file_name"], image["time"]) for image in read_coco(output)["images"]]
    assert images == [(f"v.mp4#{n:06d}", float(time)) for n, time in enumerate(times)]
    assert len(list((output / "masks" / "v.mp4").iterdir())) == 4
    documents = list((output / "labelme" / "v.mp4").glob("*.json"))
    assert documents
    for path in documents:
        assert (path.parent / json.loads(path.read_text())["imagePath"]).is_file()
    # The files of what an input was are deleted; those of the user stay.
    write_video(film, 1)
    (output / "masks" / "v.mp4" / "mine.txt").touch()
    predict_files(predictor, [film], output, save=ALL)
    remaining = {path.name for path in (output / "masks" / "v.mp4").iterdir()}
    assert remaining == {"000000.png", "mine.txt"}
    # Of a video, LabelMe files without a detection are left out.
    sure, inputs = Predictor(None, weights, tau=1), [film, save_image(tmp_path / "a.png", 0)]
    predict_files(sure, inputs, tmp_path / "sure", save=["labelme"])
    (document,) = (tmp_path / "sure").glob("labelme/**/*.json")
    assert document.name == "a.json" and not json.loads(document.read_text())["shapes"]


def test_no_identifier_of_a_patient_reaches_an_output(predictor, tmp_path):
    folder, output = tmp_path / "study" / "Musterfrau_19640812", tmp_path / "out"
    folder.mkdir(parents=True)
    stills = "Musterfrau_Erika.jpg", "IM2.png", "IM3.mp4"
    for seed, (name, text) in enumerate(zip(stills, ("", "YES", "UNKNOWN"), strict=True)):
        write_dicom(folder / name, random_image(seed), BurnedInAnnotation=text)
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
    stems = [public_name(folder / name).removesuffix(".dcm") for name in stills]
    assert {f"{stem}.dcm" for stem in stems} < inputs and len(inputs) == 4
    for stem, kinds in zip(stems, (ALL, ["masks"], ["masks"]), strict=True):
        kinds_with_it = {path.parent.name for path in output.glob(f"*/{stem}.*")}
        assert kinds_with_it == set(kinds), "the others' pixels show the name"
    # They are known by their content.
    (folder / stills[0]).rename(folder / "renamed.dcm")
    write_dicom(broken, random_image(4))
    done = predict_files(predictor, [folder], output, save=ALL)
    assert (done.images, done.skipped, done.failed) == (1, 4, [])
    assert not (output / "failed.csv").exists() and len(names(output)) == 6


LONGEST = f"{'l' * 246}.png"  # of names that are kept
INPUTS = (
    *([f"{'a' * 248}.png", LONGEST], [f"{'ä' * 124}.png", f"{'ä' * 123}b.png", LONGEST]),
    *(["a.png", "a.jpg/b.png", "a.jpg/c.png"], [os.fsdecode(b"\xff.png"), "b.png"]),
    ["a.png", "a.jpg/b.png", "a.png.json/b.png", "a.json/c.png"],
)


@pytest.mark.parametrize("inputs", INPUTS)
def test_no_name_stops_a_run(predictor, tmp_path, inputs):
    folder, output = tmp_path / "in", tmp_path / "out"
    for seed, name in enumerate(inputs):
        save_image(folder / name, seed)
    (bad := folder / os.fsdecode(b"\xfe.png")).touch()
    done = predict_files(predictor, [folder], output, save=ALL)
    assert (done.images, len(done.failed), done.kept) == (len(inputs), 1, [])
    bad.unlink()
    for kind in ALL:
        assert sum(path.is_file() for path in (output / kind).rglob("*")) == len(inputs)
    assert (output / "masks" / LONGEST).is_file() == (LONGEST in inputs)
    assert predict_files(predictor, [folder], output, save=ALL).skipped == len(inputs)


def test_a_name_that_is_no_utf8_is_escaped(predictor, tmp_path):
    """So that other programs can read the tables."""
    for seed, name in enumerate((b"\xff.png", b"b.png")):
        save_image(tmp_path / "in" / os.fsdecode(name), seed)
    for skipped in (0, 2):
        assert predict_files(predictor, [tmp_path / "in"], output := tmp_path / "out").skipped == (
            skipped
        )
        assert names(output) == ["b.png", r"\udcff.png"]
        assert isinstance(read_json(output / "predictions.json"), dict)
        file_names = {record["file_name"] for record in read_json(output / "results.json")}
        assert file_names == set(names(output))


def test_an_overlay_that_its_format_cannot_hold_fails_its_input_alone(
    predictor, image_folder, tmp_path, monkeypatch
):
    save_image(image_folder / "a.png", 0, 50, 50)
    write_video(image_folder / "v.mp4", [random_image(n, 40, 40) for n in range(2)])
    too_wide, whole = {50: 66_000, 40: 17_000}, outputs.draw_overlay  # for JPEG, for H.264

    def draw(image, *args):
        width = too_wide.get(len(image))
        return np.zeros((2, width, 3), np.uint8) if width else whole(image, *args)

    monkeypatch.setattr(outputs, "draw_overlay", draw)
    done = predict_files(predictor, [image_folder], output := tmp_path / "out", save=["overlays"])
    assert done.images == 5
    (still, why), (film, why_too) = done.failed
    assert (still, film) == ("a.png", "v.mp4") and "50x50" in why and "40x40" in why_too
    written = {path.name for path in (output / "overlays").rglob("*") if path.is_file()}
    assert written == {"c.jpg", "d.jpg"}


def test_each_input_has_its_files(predictor, image_folder, tmp_path):
    # Of names that differ in their suffix alone, the second one's file would be another's.
    files = {"a.png.png", "b", "d.png"}
    for name, more in {"a.jpg": "a.jpg.png", "a.jpg.png": "a.jpg.png.png"}.items():
        save_image(image_folder / name, 5)
        predict_files(predictor, [image_folder], tmp_path / name, save=["masks"])
        files.add(more)
        assert {path.name for path in (tmp_path / name / "masks").iterdir()} == files
    # A later input takes no other input's files.
    for inputs in (image_folder / "a.jpg.png", image_folder):
        predict_files(predictor, [inputs], tmp_path / "later", save=["masks"])
    assert len(list((tmp_path / "later" / "masks").glob("*.png"))) == len(files) - 1
    (image_folder / "a.jpg.png").unlink()
    output = tmp_path / "out"
    predict_files(predictor, [image_folder / "a.png"], output, save=ALL)
    before = {path: path.read_bytes() for path in output.glob("*/*")}
    assert {path.name for path in before} == {"a.png", "a.jpg", "a.json"}
    predict_files(predictor, [image_folder / "a.jpg"], output, save=ALL)
    assert all(path.read_bytes() == content for path, content in before.items())
    added = {path.name for path in {*output.glob("*/*")} - before.keys()}
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
        if images == 3:
            (output / "masks" / "e.png").rmdir()


@pytest.mark.slow
def test_killed_and_run_again(weights, predictor, tmp_path):
    folder, output, number = tmp_path / "images", tmp_path / "out", 60
    expected = [save_image(folder / f"{n:03d}.png", n).name for n in range(number)]
    command = [sys.executable, "-W", "ignore", "tools/predict.py", "--masks", "--input", folder]
    command += ["--weights", weights, "--output", output]
    process = subprocess.Popen(map(str, command), stderr=subprocess.DEVNULL)
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
    """Calls ``before`` before each of its ``runs``. At the end no thread is left."""
    network, runtime = SimpleNamespace(before=lambda: None, runs=0), predictor._runtime
    threads = set(threading.enumerate())

    def run(images):
        network.runs += 1
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
    assert network.runs == FRAMES / 2 and len(threads) == 4


def test_many_images_at_once_are_as_one_by_one(predictor, tmp_path, monkeypatch):
    """The first to be predicted is the last to be finished."""
    sizes = [(60, 80), (80, 60), (50, 90), (64, 64)] * 3
    for seed, size in enumerate(sizes):
        save_image(tmp_path / "images" / f"{seed:02d}.png", seed, *size)
    (tmp_path / "images" / "05.png").write_bytes(b"no image")
    forward, first = predictor.forward, threading.Event()

    def slow_at_first(images):
        outputs = forward(images)
        if first.is_set():
            time.sleep(0.02)
        else:
            first.set()
            time.sleep(0.2)
        return outputs

    monkeypatch.setattr(predictor, "forward", slow_at_first)
    output = tmp_path / "out"
    assert predict_files(predictor, [tmp_path / "images"], output).images == 11
    monkeypatch.undo()
    assert [row["file"] for row in read_table(output / "failed.csv")] == ["05.png"]
    content = read_coco(output)
    assert [i["file_name"] for i in content["images"]] == [
        f"{n:02d}.png" for n in range(12) if n != 5
    ]
    expected = []
    for image in content["images"]:
        array = np.asarray(Image.open(tmp_path / "images" / image["file_name"]))
        (network_output,) = predictor.forward([predictor.prepare(array)])
        annotations = outputs.records(predictor, network_output, *array.shape[:2])
        expected += [{"image_id": image["id"], **annotation} for annotation in annotations]
    assert len(expected) > 11
    assert [{k: v for k, v in a.items() if k != "id"} for a in content["annotations"]] == expected


def test_an_image_that_the_network_cannot_take_is_named(predictor, network, image_folder, tmp_path):
    def fail():
        if network.runs == 2:
            raise RuntimeError("not enough memory: you tried to allocate 9 bytes")

    network.before = fail
    with pytest.raises(ValueError, match=r"c\.jpg.*you tried to allocate 9 bytes"):
        predict_files(predictor, [image_folder], tmp_path / "out")
    done = [json.loads(line) for line in open(tmp_path / "out" / Journal.FILE)]
    assert [line["done"]["name"] for line in done if "done" in line] == ["a.png"]


def test_errors_of_the_network_surface_and_an_interrupted_run_is_continued(
    predictor, video, network, tmp_path
):
    def fail():
        if network.runs == 5:
            raise MemoryError("of the card")

    network.before, seen = fail, []
    with pytest.raises(MemoryError, match="of the card"):
        seen.extend(item.frame.number for item, _ in predictions(predictor, [video], 1))
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


RUN = {"classes": ["polyp"], "tau": 0.5}


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("save", [(), ALL])
@pytest.mark.parametrize("kept", ["masks/a.png", "labelme/a", "overlays/a.jpg", "predictions.csv"])
def test_a_folder_with_such_files_of_the_users_is_refused(predictor, image_folder, save, kept):
    root, before = image_folder.parent, None
    (root / kept).parent.mkdir(exist_ok=True)
    (root / kept).write_bytes(b"mine")
    for _ in range(2):
        with pytest.raises(ValueError, match=kept.split("/")[0]):
            predict_files(predictor, [image_folder], root, save=save)
        assert contents(root) == (before or contents(image_folder) | {root / kept: b"mine"})
        (root / Journal.FILE).touch()  # an empty journal does not make them ours
        before = contents(root)


def test_what_was_changed_by_hand_stays(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, [image_folder], output, save=ALL)
    corrected = [output / name for name in ("labelme/a.json", "masks/b/c.png")]
    for path in corrected:
        path.write_bytes(path.read_bytes() + b" ")
    overlay, old = output / "overlays" / "a.jpg", contents(output)
    overlay.unlink()
    for second in (1, 2):
        for path in contents(image_folder):
            os.utime(path, (0, second))
        done = predict_files(predictor, [image_folder], output, save=ALL)
        assert (done.images, sorted(done.kept)) == (3, corrected)
        assert all(path.read_bytes() == old[path] for path in (*corrected, overlay))
    # A file that was put there before there was one of ours.
    save_image(image_folder / "e.png", 7)
    (mine := output / "labelme" / "e.json").write_text("mine")
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
        moved = (output / name).rename(other / "x")
        before = contents(other)
        for make in (lambda path: path.symlink_to(other / "x"), os.mkfifo):
            make(output / name)
            with pytest.raises(ValueError, match=name):
                predict_files(predictor, [image_folder], output, save=ALL)
            (output / name).unlink()
        assert contents(other) == before
        moved.rename(output / name)


# A box may exceed the image by the rounding of a pixel.
IMAGE = {"file_name": "a.png", "width": 80, "height": 60}
LESION = {"category_id": 1, "bbox": [0.0, 0.0, 81.0, 61.0], "score": 0.75, "area": 12.0}
LESION["segmentation"] = {"size": [60, 80], "counts": "Pj4"}
FRAME = {"image": IMAGE, "annotations": [LESION]}
FILE = {"file": "masks/a.png", "sha256": hashlib.sha256(b"mine").hexdigest()}
DONE = {"name": "a.png", "signature": [1, 2], "frames": 1, "error": None, "target": "a"}
LINES = [{"run": RUN}, FRAME, FILE, {"done": DONE}]
PARTS = {"image": IMAGE, "lesion": LESION, "file": FILE, "done": DONE}
TABLES = "predictions.json", "results.json", "predictions.csv"
BOXES = (
    [-0.5, 2, 30, 40],
    [2, -0.5, 30, 40],
    [2, 2, -0.5, 4],
    [2, 2, 3],
    [0, 0, 81.5, 1],
    [0, 0, 1, 62],
)


def edited(part, **fields):
    """The lines, with other values in one part of them."""
    image, lesion, file, done = (
        {**values, **(fields if name == part else {})} for name, values in PARTS.items()
    )
    return [LINES[0], {"image": image, "annotations": [LESION, lesion]}, file, {"done": done}]


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
        *((2, edited("lesion", score=score)) for score in (float("nan"), [], 10**400, True)),
        *((2, edited("lesion", category_id=number)) for number in (0, 2)),
        *((2, edited("lesion", bbox=box)) for box in BOXES),
        *((2, edited("image", **f)) for f in ({"width": 2**20 + 1}, {"height": 0}, {"time": "x"})),
        (2, edited("image", width=2**15, height=2**14)),
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


def test_the_rows_of_a_table(tmp_path):
    """Of boxes, of integers too, those below the threshold left out; and of no detection."""
    box = {key: value for key, value in LESION.items() if key != "segmentation"}
    boxes = [{**box, "bbox": [0, 0, 40, 30], "score": score} for score in (0.75, 0.5)]
    boxes.append({**box, "score": 0.49})
    lines = [LINES[0]]
    for name, annotations in (("a.png", boxes), ("b.png", [])):
        image = {"image": {**IMAGE, "file_name": name}, "annotations": annotations}
        lines += [image, {"done": {**DONE, "name": name}}]
    write_lines(tmp_path, lines)
    tables(tmp_path)
    rows = read_table(tmp_path / "predictions.csv")
    values = [(row["lesions"], row["score"], row["area_percent"]) for row in rows]
    assert values == [("2", "0.75", "25.0"), ("0", "0", "0.0")]


@pytest.mark.parametrize("counts", ["4@", "0", "Pj4" * 9, ""])
def test_a_mask_that_was_not_written_here_is_refused(tmp_path, counts):
    write_lines(tmp_path, edited("lesion", segmentation={"size": [60, 80], "counts": counts}))
    pytest.raises(ValueError, tables, tmp_path).match(re.escape(str(tmp_path / Journal.FILE)))


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
    tables_of = {f"out/{name}" for name in (*TABLES, "failed.csv")}
    assert names - tables_of == {"mine.txt", "out", f"out/{Journal.FILE}", "out/.lock"}
    shutil.rmtree(root)
