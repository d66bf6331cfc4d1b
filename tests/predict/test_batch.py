"""A run over many inputs: whole outputs, bad inputs listed, nothing lost or done twice."""

import contextlib
import csv
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from dicoms import PATIENT, write_dicom
from PIL import Image, ImageDraw

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy import batch as pipeline
from imrcnn_d2.deploy.batch import Journal, predict_files
from imrcnn_d2.deploy.inputs import VideoWriter, decode_video, public_name
from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results

from .conftest import TAU, random_image

ALL = ("overlays", "masks", "labelme")


def read(output):
    return json.loads((output / "predictions.json").read_text())


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_files_of_a_folder(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    done = predict_files(predictor, [image_folder], output, save=ALL, batch_size=2)
    assert (done.images, done.skipped, done.failed) == (3, 0, [])
    coco = read(output)
    names = [image["file_name"] for image in coco["images"]]
    assert names == ["a.png", "b/c.jpg", "d.png"]
    assert coco["categories"] == [{"id": 1, "name": "polyp"}]
    assert coco["info"]["tau"] == TAU
    assert coco["info"]["weights_sha256"] == predictor.metadata["weights_sha256"]
    # in the same batches: else fp32 sums, and a mask's edge with them, could end otherwise
    found = predictor([image_folder / name for name in names], batch_size=2)
    assert len(coco["annotations"]) == sum(map(len, found)) > 3
    assert sorted(a["id"] for a in coco["annotations"]) == list(range(1, 1 + sum(map(len, found))))
    # the evaluation takes it
    gt = read_ground_truth({**coco, "annotations": []})
    assert len(read_results(coco, gt).score) == len(coco["annotations"])

    table = rows(output / "predictions.csv")
    for row, instances in zip(table, found, strict=True):
        above = instances.scores >= TAU
        assert int(row["lesions"]) == above.sum()
        assert float(row["score"]) == pytest.approx(instances.scores.max().item())
        area = instances.pred_masks[above].any(dim=0).float().mean() * 100
        assert float(row["area_percent"]) == pytest.approx(area.item(), abs=1e-3)
        assert (row["tau"], row["version"]) == (str(TAU), predictor.metadata["version"])

    for name, instances in zip(("a", "b/c", "d"), found, strict=True):
        with Image.open(output / "masks" / f"{name}.png") as file:
            mask = np.asarray(file)
            assert json.loads(file.text["Comment"])["version"] == predictor.metadata["version"]
        union = instances.pred_masks[instances.scores >= TAU].any(dim=0).numpy()
        assert set(np.unique(mask)) <= {0, 255} and ((mask == 255) == union).all()
        with Image.open(output / "overlays" / f"{name}.jpg") as overlay:
            assert overlay.size == (80, 60)
            assert json.loads(overlay.info["comment"])["tau"] == TAU
        labelme = json.loads((output / "labelme" / f"{name}.json").read_text())
        assert labelme["predicted_by"]["weights_sha256"] == predictor.metadata["weights_sha256"]
        original = output / "labelme" / f"{name}.json"
        assert (original.parent / labelme["imagePath"]).resolve().is_relative_to(image_folder)
        polygons = Image.new("1", (80, 60))
        for shape in labelme["shapes"]:
            assert shape["label"] == "polyp" and len(shape["points"]) > 2
            # as LabelMe makes a mask of it
            points = [tuple(point) for point in shape["points"]]
            ImageDraw.Draw(polygons).polygon(points, outline=1, fill=1)
        assert (np.asarray(polygons) & union).sum() > 0.9 * union.sum()
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]


def test_images_of_different_sizes_are_not_padded_to_each_other(predictor, tmp_path):
    (tmp_path / "images").mkdir()
    for seed in range(4):
        image = random_image(seed, 50, 90) if seed % 2 else random_image(seed, 80, 60)
        Image.fromarray(image).save(tmp_path / "images" / f"{seed}.png")
    scores = []
    for batch_size in (1, 4):
        output = tmp_path / str(batch_size)
        predict_files(predictor, [tmp_path / "images"], output, batch_size=batch_size)
        scores.append([annotation["score"] for annotation in read(output)["annotations"]])
    # fp32 sums of other batches are ordered otherwise: 1.7e-6 was seen with AMX
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_what_cannot_be_read_is_listed_and_the_others_go_on(
    predictor, image_folder, bad_files, tmp_path
):
    done = predict_files(predictor, [image_folder], tmp_path / "out", batch_size=2)
    reasons = dict(done.failed)
    assert reasons.keys() == bad_files.keys()
    for name, reason in bad_files.items():
        assert reason in reasons[name]
    names = [image["file_name"] for image in read(tmp_path / "out")["images"]]
    stills = [name for name in names if "#" not in name]
    assert stills == ["a.png", "b/c.jpg", "d.png", "deep.png", "print.jpg"], "those can be read"
    before_the_cut = [name for name in names if "#" in name]
    assert before_the_cut == [f"cut.mkv#{n:06d}" for n in range(len(before_the_cut))]
    assert 5 < len(before_the_cut) < 40
    assert {row["file"]: row["reason"] for row in rows(tmp_path / "out" / "failed.csv")} == reasons


def test_done_is_done_and_what_is_new_or_repaired_is_not(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    (image_folder / "e.png").write_bytes(b"not yet whole")
    first = predict_files(predictor, [image_folder], output, save=["masks"])
    assert (first.images, len(first.failed)) == (3, 1)
    before = (output / "masks" / "a.png").stat().st_mtime_ns
    Image.fromarray(random_image(7)).save(image_folder / "e.png")
    Image.fromarray(random_image(8, 50, 50)).save(image_folder / "d.png")
    Image.fromarray(random_image(9)).save(image_folder / "f.png")
    again = predict_files(predictor, [image_folder], output, save=["masks"])
    assert (again.images, again.skipped, again.failed) == (3, 2, [])
    assert (output / "masks" / "a.png").stat().st_mtime_ns == before
    assert not (output / "failed.csv").exists()
    coco = read(output)
    sizes = {image["file_name"]: image["width"] for image in coco["images"]}
    assert sizes == {"a.png": 80, "b/c.jpg": 80, "d.png": 50, "e.png": 80, "f.png": 80}
    assert [image["id"] for image in coco["images"]] == [1, 2, 3, 4, 5]
    assert predict_files(predictor, [image_folder], output, save=["masks"]).skipped == 5


def test_results_of_another_run_are_not_mixed_in(predictor, tiny_run, image_folder, tmp_path):
    predict_files(predictor, [image_folder], tmp_path / "out")
    other = Predictor(None, tiny_run / "model_best.pth", tau=0.25)
    with pytest.raises(ValueError, match=r"differs in tau \(0.5, now 0.25\). Choose another"):
        predict_files(other, [image_folder], tmp_path / "out")
    with pytest.raises(ValueError, match="differs in inputs"):
        predict_files(predictor, [image_folder / "b"], tmp_path / "out")


def test_a_line_cut_off_by_a_kill_costs_one_input(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, [image_folder], output)
    whole = (output / "predictions.json").read_bytes()
    journal = output / "progress.jsonl"
    size, first = journal.stat().st_size, len(journal.read_bytes().splitlines()[0])
    for cut in (1, size // 3, size - first - 5):  # of the last line, of others, of all but one
        (output / "predictions.json").unlink()
        os.truncate(journal, size - cut)
        predict_files(predictor, [image_folder], output)
        assert (output / "predictions.json").read_bytes() == whole


def test_a_video_and_its_frames(predictor, tmp_path):
    times = [Fraction(1001 * number, 30000) for number in (0, 1, 5, 6)]
    with VideoWriter(tmp_path / "v.mp4", time_base=Fraction(1, 30000)) as video:
        for number, moment in enumerate(times):
            video.write(random_image(number), moment, Fraction(16, 11))
    output = tmp_path / "out"
    predict_files(predictor, [tmp_path / "v.mp4"], output, save=ALL, batch_size=3)
    overlays = list(decode_video(output / "overlays" / "v.mp4", "v.mp4"))
    assert [frame.time for frame in overlays] == times
    assert {frame.pixel_aspect for frame in overlays} == {Fraction(16, 11)}
    images = read(output)["images"]
    assert [image["file_name"] for image in images] == [f"v.mp4#{n:06d}" for n in range(4)]
    assert [image["time"] for image in images] == [float(moment) for moment in times]
    assert len(list((output / "masks" / "v.mp4").iterdir())) == 4
    for path in (output / "labelme" / "v.mp4").glob("*.json"):
        document = json.loads(path.read_text())
        assert (path.parent / document["imagePath"]).is_file()


def test_no_identifier_of_a_patient_reaches_an_output(predictor, tmp_path):
    folder = tmp_path / "study" / "Musterfrau_19640812"
    folder.mkdir(parents=True)
    stills = "Musterfrau_Erika.jpg", "IM2.png", "IM3.mp4"
    write_dicom(folder / "Musterfrau_Erika.jpg", random_image(0))
    write_dicom(folder / "IM2.png", random_image(1), BurnedInAnnotation="YES")
    write_dicom(folder / "IM3.mp4", random_image(5), BurnedInAnnotation="UNKNOWN")
    write_dicom(
        folder / "KIS-4711.dcm", np.stack([random_image(2), random_image(3)]), FrameTime="40"
    )
    write_dicom(folder / "broken-ACC0815.dcm", random_image(4), Rows=1000)
    shutil.copy(folder / "KIS-4711.dcm", folder / "KIS-4711-2.dcm")
    output = tmp_path / "out"
    done = predict_files(predictor, [folder], output, save=ALL)
    assert (done.images, len(done.failed)) == (5, 1)
    words = [part for value in PATIENT.values() for part in value.split("^")]
    # What an attacker tries who knows how such files and folders are called.
    guesses = [path.name for path in folder.iterdir()] + [str(folder), folder.name]
    words += [hashlib.sha256(name.encode()).hexdigest()[:16] for name in guesses]
    for path in output.rglob("*"):
        texts = [str(path.relative_to(output)).encode()]
        if path.is_file():
            texts.append(path.read_bytes())
        for word, text in itertools.product(words, texts):
            assert word.lower().encode() not in text.lower(), (word, path)
    names = {image["file_name"].split("#")[0] for image in read(output)["images"]}
    shown, *hidden = (public_name(folder / name).removesuffix(".dcm") for name in stills)
    assert {f"{name}.dcm" for name in (shown, *hidden)} < names and len(names) == 4
    assert (output / "overlays" / f"{shown}.jpg").exists()
    for name in hidden:
        assert not (output / "overlays" / f"{name}.jpg").exists(), "its pixels show the name"
        assert not list(output.glob(f"labelme/{name}.*"))
        assert (output / "masks" / f"{name}.png").exists()


def test_dicom_is_gone_on_with_by_its_content(predictor, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write_dicom(folder / "a.dcm", random_image(0))
    broken = write_dicom(folder / "b.dcm", random_image(1), Rows=1000)
    assert len(predict_files(predictor, [folder], output).failed) == 1
    (folder / "a.dcm").rename(folder / "renamed.dcm")
    write_dicom(broken, random_image(1))
    done = predict_files(predictor, [folder], output, save=())
    assert (done.images, done.skipped, done.failed) == (1, 1, [])
    assert not (output / "failed.csv").exists()
    assert len(read(output)["images"]) == 2


@pytest.mark.parametrize(
    "names",
    [
        [f"{'a' * 248}.png", "b.png"],
        [f"{'ä' * 124}.png", f"{'ä' * 123}b.png", "b.png"],
        ["a.png", "a.jpg/b.png", "a.jpg/c.png"],
        ["a.png", "a.jpg/b.png", "a.png.json/b.png", "a.json/c.png"],
    ],
)
def test_no_name_stops_a_run(predictor, tmp_path, names):
    folder, output = tmp_path / "in", tmp_path / "out"
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_image(seed)).save(folder / name)
    done = predict_files(predictor, [folder], output, save=ALL)
    assert (done.images, done.failed, done.kept) == (len(names), [], [])
    for kind in ALL:
        assert len([path for path in (output / kind).rglob("*") if path.is_file()]) == len(names)
    assert predict_files(predictor, [folder], output, save=ALL).skipped == len(names)


def test_a_name_that_cannot_be_written_fails_its_input_alone(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, [image_folder / "d.png"], output, save=ALL)
    (output / "masks" / "a.png").mkdir()
    (output / "overlays" / "b").write_text("mine")
    done = predict_files(predictor, [image_folder], output, save=ALL)
    assert [name for name, _ in done.failed] == ["a.png", "b/c.jpg"]
    assert done.images == 2 and len(read(output)["images"]) == 3
    (output / "masks" / "a.png").rmdir()
    done = predict_files(predictor, [image_folder], output, save=ALL)
    assert [name for name, _ in done.failed] == ["b/c.jpg"]


def test_what_a_reader_raises_ends_its_input_alone(predictor, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        Image.fromarray(random_image(seed)).save(folder / f"{name}.png")
    whole = pipeline.read_frames

    def read_frames(source):
        if source.name == "b.png":
            raise TypeError("a float is not iterable")
        return whole(source)

    monkeypatch.setattr(pipeline, "read_frames", read_frames)
    done = predict_files(predictor, [folder], tmp_path / "out")
    assert done.images == 2
    assert done.failed == [("b.png", "cannot be predicted (TypeError: a float is not iterable)")]


def test_names_that_differ_in_their_suffix_alone(predictor, image_folder, tmp_path):
    Image.fromarray(random_image(5)).save(image_folder / "a.jpg")
    predict_files(predictor, [image_folder], tmp_path / "out", save=["masks"])
    masks = sorted(path.name for path in (tmp_path / "out" / "masks").iterdir())
    assert masks == ["a.jpg.png", "a.png.png", "b", "d.png"]
    # One whose own name would be another's file.
    Image.fromarray(random_image(6)).save(image_folder / "a.jpg.png")
    predict_files(predictor, [image_folder], tmp_path / "again", save=["masks"])
    masks = sorted(path.name for path in (tmp_path / "again" / "masks").iterdir())
    assert masks == ["a.jpg.png", "a.jpg.png.png", "a.png.png", "b", "d.png"]


def test_a_later_input_takes_no_other_inputs_files(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, [image_folder / "a.png"], output, save=ALL)
    before = {path: path.read_bytes() for path in output.glob("*/*")}
    assert {path.name for path in before} == {"a.png", "a.jpg", "a.json"}
    Image.fromarray(random_image(5)).save(image_folder / "a.jpg")
    predict_files(predictor, [image_folder / "a.jpg"], output, save=ALL)
    assert all(path.read_bytes() == content for path, content in before.items())
    added = {path.name for path in output.glob("*/*")} - {path.name for path in before}
    assert added == {"a.jpg.jpg", "a.jpg.png", "a.jpg.json"}
    # Changed, an input replaces its own files.
    Image.fromarray(random_image(6)).save(image_folder / "a.png")
    predict_files(predictor, [image_folder], output, save=ALL)
    assert (output / "masks" / "a.png").read_bytes() != before[output / "masks" / "a.png"]
    assert not (output / "masks" / "a.png.png").exists()


def test_files_of_what_an_input_was_are_deleted(predictor, tmp_path):
    film, output = tmp_path / "v.mp4", tmp_path / "out"
    for number in (3, 1):
        with VideoWriter(film, time_base=Fraction(1, 25)) as video:
            for n in range(number):
                video.write(random_image(n), Fraction(n, 25))
        predict_files(predictor, [film], output, save=ALL)
        assert len(list((output / "masks" / "v.mp4").glob("*.png"))) == number
        (output / "masks" / "v.mp4" / "mine.txt").touch()
    assert (output / "masks" / "v.mp4" / "mine.txt").exists()


def test_a_name_does_not_control_the_terminal(predictor, tmp_path, capfd):
    path = tmp_path / "\x1b]0;a\x07\n\u202eb.png"
    path.write_bytes(b"-")
    predict_files(predictor, [path], tmp_path / "out")
    printed = "".join(capfd.readouterr())
    assert r"\x1b]0;a\x07\n\u202eb.png: is no readable image" in printed
    assert "\x1b]" not in printed and "\u202e" not in printed


def test_one_run_at_a_time_writes_into_a_folder(predictor, image_folder, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, [image_folder], output)
    run = json.loads((output / "progress.jsonl").read_text().splitlines()[0])["run"]
    with contextlib.closing(Journal(output, run)):
        with pytest.raises(ValueError, match="Another run is writing into .*out"):
            predict_files(predictor, [image_folder], output)
    with pytest.raises(ValueError, match="differs in tau"):
        Journal(output, {**run, "tau": 0.1})
    assert predict_files(predictor, [image_folder], output).skipped


@pytest.mark.parametrize("where", ["found", ".", ".."])
def test_own_results_are_not_predicted_on(predictor, image_folder, where):
    output = image_folder / where
    for _ in range(2):
        predict_files(predictor, [image_folder], output, save=["overlays"])
        named = [image["file_name"] for image in read(output)["images"]]
        assert "a.png" in named and not [name for name in named if "overlays" in name]


def test_names_that_are_no_utf8(predictor, image_folder, tmp_path):
    for name in (b"\xff.png", b"\xfe-bad.png"):
        os.rename(image_folder / "a.png", os.fsencode(image_folder) + b"/" + name)
        (image_folder / "a.png").write_bytes(b"no image")
    output = tmp_path / "out"
    done = predict_files(predictor, [image_folder], output, save=["masks", "labelme"])
    assert (done.images, len(done.failed)) == (3, 2)
    assert [row["file_name"] for row in rows(output / "predictions.csv")][-1] == "\\udcff.png"
    assert {row["file"] for row in rows(output / "failed.csv")} == {"a.png", "\\udcfe-bad.png"}
    assert os.path.exists(os.fsencode(output) + b"/masks/\xff.png")
    assert predict_files(predictor, [image_folder], output, save=["masks", "labelme"]).skipped == 3


@pytest.mark.slow
def test_killed_and_run_again(tiny_run, predictor, tmp_path):
    folder, output = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    number = 60
    for seed in range(number):
        Image.fromarray(random_image(seed)).save(folder / f"{seed:03d}.png")
    command = [sys.executable, "-W", "ignore", "tools/predict.py", "--masks", "--input", folder]
    command += ["--weights", tiny_run / "model_best.pth", "--output", output]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    journal, deadline = output / "progress.jsonl", time.monotonic() + 600

    def done():
        return journal.read_text().count('{"done"') if journal.exists() else 0

    while done() < number // 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done()
    assert number // 4 <= before < number
    assert not (output / "predictions.json").exists()
    again = predict_files(predictor, [folder], output, save=["masks"])
    assert again.images + again.skipped == number and abs(again.skipped - before) <= 1
    images = read(output)["images"]
    assert [image["file_name"] for image in images] == [f"{n:03d}.png" for n in range(number)]
    assert len(list((output / "masks").glob("*.png"))) == number
    straight = tmp_path / "straight"
    predict_files(predictor, [folder], straight)
    assert read(straight)["annotations"] == read(output)["annotations"]
