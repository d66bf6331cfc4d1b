"""The command as users give it, from arguments to printed counts and exit status."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from dicoms import write_dicom
from PIL import Image
from recognition_runs import CLASSES, draw_classes, write_classifier

from imrcnn_d2.cli import compare, evaluate, report
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.utils.files import BadInputError, Rejects, for_terminal

SPLITS = ("train", "val", "test")


def test_errors(run, tmp_path, coco_folder, kvasir_original):
    out = tmp_path / "out"
    json_file, images = coco_folder(lambda c: c["annotations"][1].update(category_id=5))
    coco = "coco", "--annotations", json_file, "--images", images, "--out", out
    kvasir = "kvasir-seg", "--out", out, "--root"
    synthetic = "synthetic", "--out", out, "--num-images", 1, "--size", 64
    for args, message in (
        ((*kvasir, tmp_path / "none"), f"{tmp_path}/none: "),
        ((*kvasir, kvasir_original, "--split-by", "prefix"), "--split-by"),
        ((*synthetic, "--ratio", "3:1"), "'3:1'"),
        (coco, "2.png: annotation 2"),
        (coco, "--on-error reject"),
    ):
        assert message in run(*args, fails=True)
    assert not out.exists()
    printed = run(*coco, "--on-error", "reject", "--ratio", "1:0:1", "--split-by", "image")
    splits = json.loads((out / "splits.json").read_text())
    assert [len(splits[split]) for split in SPLITS] == [1, 0, 1]
    assert f"  {images}/2.png: annotation 2" in printed
    assert "2.png" in (out / "rejected.csv").read_text()


def test_reasons_are_given_and_only_what_helps_is_advised(run, tmp_path, kvasir_folder):
    root, out = kvasir_folder("abcde"), tmp_path / "out"
    for path in (root / "masks").iterdir():
        path.write_text("no image")
    kvasir = "kvasir-seg", "--root", root, "--out", out
    message = run(*kvasir, fails=True)
    assert "masks/a.png" in message and "--on-error reject" in message
    message = run(*kvasir, "--on-error", "reject", fails=True)
    assert str(out) in message and "(5)" in message and "--on-error" not in message
    assert all((f"masks/{name}.png: " in message) == (name in "abc") for name in "abcde")
    assert len([line for line in message.splitlines() if str(root) in line]) == 1
    # what concerns no single image cannot be left out
    (tmp_path / "no.json").write_text("[]")
    coco = "coco", "--annotations", tmp_path / "no.json", "--images", root, "--out", out
    for more in ((), ("--on-error", "reject")):
        message = run(*coco, *more, fails=True)
        assert "no.json" in message and "--on-error" not in message
    assert not out.exists()


def test_dicom_files_that_are_named_by_their_uid(run, tmp_path, noise):
    """Without a file type: the end of a UID is none."""
    images, masks, out = tmp_path / "images", tmp_path / "masks", tmp_path / "out"
    for folder in (images, masks):
        folder.mkdir()
    for i in (1, 2, 10):
        write_dicom(images / f"1.2.840.{i}", noise(40, 60, i), PatientID=f"p{i}")
        Image.new("L", (60, 40), 255).save(masks / f"1.2.840.{i}.png")
    names = [f"1.2.840.{i}.png" for i in (1, 10, 2)]
    run("masks", "--images", images, "--masks", masks, "--out", out, "--split-by", "image")
    assert sorted(path.name for path in (out / "images").iterdir()) == names
    again = "--splits", out / "splits.json"
    assert "are gone" not in run("lesion-free", "--root", images, "--out", tmp_path / "b", *again)
    assert sorted(path.name for path in (tmp_path / "b" / "images").iterdir()) == names
    options = "--patients-from-dicom", images, "--all-test", "--out", tmp_path / "c"
    run("lesion-free", "--root", images, *options)
    test = json.loads((tmp_path / "c" / "annotations" / "test.json").read_text())
    assert [image["patient_id"] for image in test["images"]] == ["p1", "p10", "p2"]


def test_names_in_another_encoding(run, tmp_path, noise):
    """As archives of old systems have them: no JSON file can hold them, so that no command could
    read the data set."""
    root = tmp_path / "root"
    root.mkdir()
    for name in (b"a.png", b"Gr\xf6\xdfe.png"):
        Image.fromarray(noise(40, 60, len(name))).save(root / os.fsdecode(name))
    key = "--deidentify", "--key", tmp_path / "key"
    for i, more in enumerate(((), key)):
        args = "lesion-free", "--root", root, "--out", tmp_path / f"out{i}", *more
        assert "Gr\\udcf6\\udcdfe.png: " in run(*args, fails=True)
        run(*args, "--on-error", "reject")
        assert len(list((tmp_path / f"out{i}" / "images").iterdir())) == 1
    for table in (tmp_path / "out0" / "rejected.csv", tmp_path / "key.out1.rejected.csv"):
        assert "Gr\\udcf6\\udcdfe.png" in table.read_text(encoding="utf-8")


def test_nothing_given_twice_is_dropped(run, tmp_path, kvasir_folder, kvasir_original, no_polyp):
    one, two = kvasir_folder("ab").rename(tmp_path / "one"), kvasir_folder("ab")
    for path in sorted((two / "images").iterdir()):  # other images of the same names
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    out, options = tmp_path / "out", ("--all-test", "--classes", "polyp", "--kind", "binary")
    roots = [(root / "images", root / "masks") for root in (one, two)]
    args = [arg for pair in roots for arg in zip(("--images", "--masks"), pair, strict=True)]
    args = "masks", *options, "--out", out, *(value for arg in args for value in arg)
    printed = run(*args, "--patient-pattern", "^[^/]+")
    test = json.loads((out / "annotations" / "test.json").read_text())
    patients = {image["file_name"]: image["patient_id"] for image in test["images"]}
    names = [root / "images" / f"{name}.png" for root in (one, two) for name in "ab"]
    assert list(patients.values()) == ["kvasir"] * 2 + ["one"] * 2
    for path in names:
        name = path.relative_to(tmp_path).as_posix()
        assert patients[name] == path.parts[-3]
        assert (out / "images" / name).samefile(path)
    assert "2 patients" in printed
    for wrong, named in (
        ((*args, "--masks", two), "3"),
        ((*args, "--images", one / "images", "--masks", one / "masks"), one / "images"),
        ((*args, "--negatives", one, "--negatives", two), "--negatives"),
        ((*args, "--seed", 0, "--seed", 1), "--seed"),
        ((*args, "--classes", "lesion"), "--classes"),
        (("kvasir-seg", "--root", one, "--root", two, "--out", out), "--root"),
        (("lesion-free", "--root", no_polyp, "--out", out, "--out", one), "--out"),
    ):
        assert str(named) in run(*wrong, fails=True)


@pytest.mark.parametrize("follow", [False, True])
def test_links_are_followed_where_they_are_named(run, tmp_path, kvasir_folder, no_polyp, follow):
    """The folder that is named may be a link; what links in it lead to may be anywhere."""
    root = kvasir_folder("abc")
    for name, target in (("set", root), ("healthy", no_polyp), ("images", root / "images")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "more").symlink_to(no_polyp)
    for args in (
        ("kvasir-seg", "--root", tmp_path / "set", "--negatives", tmp_path / "healthy"),
        ("masks", "--images", tmp_path / "images", "--masks", root / "masks"),
        ("lesion-free", "--root", tmp_path / "healthy"),
    ):
        assert run(*args, "--out", tmp_path / args[0]).endswith("written\n")
    args = "lesion-free", "--root", tmp_path / "found", "--out", tmp_path / "out"
    args += "--on-error", "reject"
    if follow:
        run(*args, "--follow-links")
        assert len(list((tmp_path / "out" / "images" / "more").iterdir())) == 10
    else:
        message = run(*args, fails=True)
        assert f"{tmp_path}/found/more: " in message and "--follow-links" in message


def test_a_share_of_nothing_gets_nothing(run, tmp_path, no_polyp):
    classes, sizes = (
        ("adenoma", "polyp"),
        {"1:0:0": [10, 0, 0], "0:1:0": [0, 10, 0], "0:0:1": [0, 0, 10]},
    )
    for args in (*(("--ratio", ratio) for ratio in sizes), ("--all-test",), ()):
        out = tmp_path / "_".join(("out", *args))
        run("lesion-free", "--root", no_polyp, "--out", out, *args, "--classes", *classes)
        coco = [json.loads((out / f"annotations/{split}.json").read_text()) for split in SPLITS]
        expected = sizes.get(args[-1] if args else "", [0, 0, 10])
        assert [len(content["images"]) for content in coco] == expected
        assert [category["name"] for category in coco[2]["categories"]] == [*classes]
    both = "lesion-free", "--root", no_polyp, "--out", tmp_path / "x", "--all-test", "--ratio"
    assert "--all-test" in run(*both, "1:0:0", fails=True)


def test_images_inside_labelme_files(run, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(Path(__file__).parent / "formats/labelme/embedded.json", tmp_path / "in")
    args = ("--root", tmp_path / "in", "--out", tmp_path / "out", "--ratio", "1:0:0")
    assert f"  {tmp_path / 'in' / 'embedded.json'}: " in run("labelme", *args)
    assert (tmp_path / "out" / "images" / "embedded.jpg").stat().st_size == 798


def test_patients_and_metadata(run, tmp_path, kvasir_original, no_polyp, monkeypatch):
    names = sorted(path.name for path in (kvasir_original / "images").iterdir())
    rows = [f"{name},p{i // 2}" for i, name in enumerate(names)]
    patients, devices, sites = (tmp_path / f"{n}.csv" for n in ("patients", "devices", "sites"))
    patients.write_text("\n".join(["file,patient_id", *rows]))
    devices.write_text("patient_id;age;device\np0;61,5;EVIS\np1;50;EVIS\n")
    sites.write_text(f"file,site\n{names[0]},antrum\nnone.jpg,cardia\n")
    common = ("kvasir-seg", "--root", kvasir_original, "--ratio", "1:0:0", "--out")
    assert "  5 patients\n" in run(*common, tmp_path / "pattern", "--patient-pattern", "^.*")
    tables = ("--metadata", devices, "--metadata", sites)
    printed = run(*common, tmp_path / "out", "--patients", patients, *tables)
    assert "  3 patients\n" in printed and "none.jpg (line 3)" in printed
    evaluation = evaluate_lesions(tmp_path / "out/annotations/train.json", [])
    rows = {row["file_name"]: row for row in evaluation.tables()["per_image.csv"][0]}
    columns = ("patient_id", "age", "device", "site")
    first, others, last = (("p0", 61.5, "EVIS"), ("p1", 50.0, "EVIS", None), ("p2", *[None] * 3))
    expected = [(*first, "antrum"), (*first, None), others, others, last]
    assert [tuple(rows[name].get(c) for c in columns) for name in names] == expected
    for wrong, message in (
        (("--patient-pattern", "^q"), "'^q'"),
        (("--patients", devices), str(devices)),
        (("--patients-from-dicom", tmp_path / "none"), str(tmp_path / "none")),
        (("--metadata", tmp_path / "none.csv"), "none.csv"),
    ):
        assert message in run(*common, tmp_path / "wrong", *wrong, fails=True)
    table = ("classification", "--root", tmp_path, "--csv", patients, "--patients", patients)
    assert "patient_id" in run(*table, "--out", tmp_path / "wrong", fails=True)
    assert not (tmp_path / "wrong").exists()
    # "." is a folder as others are, not the images themselves
    monkeypatch.chdir(tmp_path / "out" / "annotations")
    args = ("lesion-free", "--root", no_polyp, "--out", tmp_path / "wrong", "--patients-from-dicom")
    assert ".dcm in ." in run(*args, ".", fails=True) and ".dcm" not in run(*args, fails=True)


def test_rejects():
    error = pickle.loads(pickle.dumps(BadInputError("a, b.jpg", 'says "no"')))  # of a process
    rejects = Rejects()
    with pytest.raises(BadInputError, match='^a, b.jpg: says "no"$'), rejects.catch():
        raise error
    assert rejects.errors == []
    rejects = Rejects("reject")
    with rejects.catch():
        raise error
    assert (rejects.errors, error.file, error.reason) == ([error], "a, b.jpg", 'says "no"')
    with pytest.raises(ZeroDivisionError), rejects.catch():
        1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="'ignore'"):
        Rejects("ignore")


def test_a_terminal_gets_no_commands():
    """Names in files can hold the escapes that colour, erase and reverse what is shown."""
    name = "a\x1b[2J\x9b\u202egnp\udcff.jpg"
    assert for_terminal(f"é\n{name}") == r"é" + "\n" + r"a\x1b[2J\x9b\u202egnp\udcff.jpg"
    assert str(BadInputError(name, "is bad")) == r"a\x1b[2J\x9b\u202egnp\udcff.jpg: is bad"
    assert BadInputError(name, "is bad").file == name


def test_from_folders_to_the_report(run, tmp_path):
    out, scores, page = (tmp_path / n for n in ("gastric_recognition", "scores", "report.html"))
    args = "classification", "--root", draw_classes(tmp_path / "raw", (12, 14, 16), size=20)
    args += "--out", out, "--test-per-class", 4, "--val-percent", 20, "--classes", *CLASSES
    assert "--all-test" in run(*args, "--all-test", fails=True)
    printed = run(*args)
    rows = [line.split() for line in printed.splitlines()[:4]]
    assert rows[0][3:] == " ".join(CLASSES).split() and rows[3][3:] == ["4", "4", "4"]
    assert [row[1] for row in rows[1:]] == ["24", "6", "12"]
    assert "cancer: gastric cancer; all others are benign" in printed
    assert run(*args).endswith("already there, unchanged\n")

    gt = out / "annotations" / "test.json"
    trained = write_classifier(tmp_path / "resnet50", gt)
    results = trained / "inference" / "gastric_recognition_test" / "recognition_results.json"
    args = "--recognition", "--gt", gt, "--resamples", 40, "--output", scores, "--dt"
    printed = run(*args, results, command=evaluate)
    metrics = json.loads((scores / "metrics.json").read_text())["recognition"]
    assert f"{metrics['balanced_accuracy']:.2f}" in printed
    before = json.loads(results.with_name("metrics.json").read_text())["recognition"]
    keys = [key for key in before if not key.endswith("_ci")]
    assert [metrics[key] for key in keys] == [before[key] for key in keys]
    written = {"confusion_matrix.png", "roc_curve.png", "calibration.png", "per_image.csv"}
    assert written <= {path.name for path in scores.iterdir()}
    assert str(scores) in (out / "test_evaluations.csv").read_text()
    (tmp_path / "none.json").write_text("[]")
    assert "lack 12 of" in run(*args, tmp_path / "none.json", fails=True, command=evaluate)

    runs = trained, f"copy={scores}"
    printed = run(*runs, "--output", tmp_path / "comparison", "--resamples", 40, command=compare)
    assert "Accuracy of each class" in printed
    assert (tmp_path / "comparison" / "confusion.png").is_file()
    run(*runs, "--output", page, command=report)
    assert "copy" in page.read_text(encoding="utf-8")
    card = "--card", tmp_path / "card.md"
    assert "no model cards" in run(trained, "--output", page, *card, fails=True, command=report)


def test_prepare_from_a_table(run, tmp_path):
    root, table = draw_classes(tmp_path / "raw", (12, 14, 16), size=20), tmp_path / "labels.csv"
    files = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    split_of = {file: "train" if i // 2 % 3 else "test" for i, file in enumerate(files)}
    rows = [f"{file},{file.parts[0]},p{i // 2},{split_of[file]}" for i, file in enumerate(files)]
    table.write_text("\n".join(["file,label,patient_id,split", *rows]))
    args = "classification", "--root", root, "--csv", table, "--out", tmp_path / "out"
    assert "cancer: gastric ulcer" in run(*args, "--val-percent", 25, "--cancer", "gastric ulcer")
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert splits["test"] == [str(file) for file in files if split_of[file] == "test"]
    assert len(splits["val"]) == pytest.approx(len(rows) * 2 / 3 / 4, abs=2)
    message = run(*args, "--splits", tmp_path / "out" / "splits.json", fails=True)
    assert f"{table} has a split column" in message
