"""The command as users give it, from arguments to printed counts and exit status."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from recognition_runs import CLASSES, draw_classes, write_classifier

from imrcnn_d2.cli import compare, evaluate, prepare_dataset, report
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.utils.files import BadInputError, Rejects, for_terminal, read_rows

SPLITS = ("train", "val", "test")


@pytest.fixture
def run(capsys):
    """A function: what a command prints, with how it ends where it fails."""

    def call(*args, command=prepare_dataset, fails=False):
        if not fails:
            command.main([str(arg) for arg in args])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as error:
            command.main([str(arg) for arg in args])
        return f"{error.value.code}{capsys.readouterr().err}"

    return call


def refused(run, *args):
    return run(*args, fails=True)


def test_errors(run, tmp_path, coco_folder, kvasir_original):
    out = "--out", tmp_path / "out"
    assert f"{tmp_path}/none/images" in refused(
        run, "kvasir-seg", "--root", tmp_path / "none", *out
    )
    synthetic = "synthetic", *out, "--num-images", 1, "--size", 64
    assert "'3:1'" in refused(run, *synthetic, "--ratio", "3:1")
    args = "kvasir-seg", "--root", kvasir_original, *out
    assert "--split-by" in refused(run, *args, "--split-by", "prefix")
    json_file, images = coco_folder(lambda c: c["annotations"][1].update(category_id=5))
    args = ("coco", "--annotations", json_file, "--images", images, *out)
    message = refused(run, *args)
    assert "2.png: annotation 2" in message and "--on-error reject" in message
    assert not (tmp_path / "out").exists()
    printed = run(*args, "--on-error", "reject", "--ratio", "1:0:1", "--split-by", "image")
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert [len(splits[split]) for split in SPLITS] == [1, 0, 1]
    assert f"  {images}/2.png: annotation 2" in printed
    assert "2.png" in (tmp_path / "out" / "rejected.csv").read_text()


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
    common = ("kvasir-seg", "--root", kvasir_original, "--ratio", "1:1:1", "--out")
    assert "  5 patients\n" in run(*common, tmp_path / "pattern", "--patient-pattern", "^.*")
    tables = ("--metadata", devices, "--metadata", sites)
    printed = run(*common, tmp_path / "out", "--patients", patients, *tables)
    assert "  3 patients\n" in printed and "none.jpg (line 3)" in printed
    rows = {}
    for split in SPLITS:
        path = tmp_path / "out" / "annotations" / f"{split}.json"
        in_split, _ = evaluate_lesions(path, []).tables()["per_image.csv"]
        rows |= {row["file_name"]: row for row in in_split}
    columns = ("patient_id", "age", "device", "site")
    assert [[rows[name].get(c) for c in columns] for name in names] == [
        ["p0", 61.5, "EVIS", "antrum"],
        ["p0", 61.5, "EVIS", None],
        *[["p1", 50.0, "EVIS", None]] * 2,
        ["p2", None, None, None],
    ]
    for wrong, message in (
        (("--patient-pattern", "^q"), "'^q'"),
        (("--patients", devices), str(devices)),
        (("--patients-from-dicom", tmp_path / "none"), str(tmp_path / "none")),
        (("--metadata", tmp_path / "none.csv"), "none.csv"),
    ):
        assert message in refused(run, *common, tmp_path / "wrong", *wrong)
    table = ("classification", "--root", tmp_path, "--csv", patients, "--patients", patients)
    assert "patient_id" in refused(run, *table, "--out", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    # "." is a folder as others are, not the images themselves
    monkeypatch.chdir(tmp_path / "out" / "annotations")
    args = ("lesion-free", "--root", no_polyp, "--out", tmp_path / "wrong", "--patients-from-dicom")
    assert ".dcm in ." in refused(run, *args, ".") and ".dcm" not in refused(run, *args)


def test_rejects(tmp_path):
    rejects = Rejects("raise")
    with pytest.raises(BadInputError, match="^a.jpg: is cut$"), rejects.catch():
        raise BadInputError("a.jpg", "is cut")
    assert rejects.errors == []
    rejects = Rejects("reject")
    with rejects.catch():
        raise BadInputError("a, b.jpg", 'says "no"')
    rejects.write_csv(tmp_path / "rejected.csv")
    assert read_rows(tmp_path / "rejected.csv", []) == [{"file": "a, b.jpg", "reason": 'says "no"'}]
    with pytest.raises(ZeroDivisionError), rejects.catch():
        1 / 0  # noqa: B018
    with pytest.raises(ValueError, match="'ignore'"):
        Rejects("ignore")
    error = pickle.loads(pickle.dumps(BadInputError("a.jpg", "is cut")))  # from another process
    assert (error.file, error.reason, str(error)) == ("a.jpg", "is cut", "a.jpg: is cut")


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
    printed = run(*args)
    rows = [line.split() for line in printed.splitlines()[:4]]
    assert rows[0][3:] == " ".join(CLASSES).split() and rows[3] == ["test", "12", "-", *"444"]
    assert [int(row[1]) for row in rows[1:]] == [24, 6, 12]
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
    (tmp_path / "broken.json").write_text(json.dumps(json.loads(results.read_text())[1:]))
    message = run(*args, tmp_path / "broken.json", fails=True, command=evaluate)
    assert "lack 1 of the 12 images" in message

    runs = trained, f"copy={scores}"
    printed = run(*runs, "--output", tmp_path / "comparison", "--resamples", 40, command=compare)
    assert "Accuracy of each class" in printed
    assert (tmp_path / "comparison" / "confusion.png").is_file()
    run(*runs, "--output", page, command=report)
    assert "copy" in page.read_text(encoding="utf-8")
    card = "--card", tmp_path / "card.md"
    assert "no model cards" in run(trained, "--output", page, *card, fails=True, command=report)


def test_prepare_from_a_table(run, tmp_path):
    root = draw_classes(tmp_path / "raw", (12, 14, 16), size=20)
    files = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    split_of = {file: "train" if i // 2 % 3 else "test" for i, file in enumerate(files)}
    rows = [f"{file},{file.parts[0]},p{i // 2},{split_of[file]}" for i, file in enumerate(files)]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file,label,patient_id,split", *rows]))
    args = "classification", "--root", root, "--csv", table, "--out", tmp_path / "out"
    options = "--val-percent", 25, "--cancer", "gastric ulcer"
    assert "cancer: gastric ulcer" in run(*args, *options)
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert splits["test"] == [str(file) for file in files if split_of[file] == "test"]
    assert len(splits["val"]) == pytest.approx(len(rows) * 2 / 3 / 4, abs=2)
    given = "--splits", tmp_path / "out" / "splits.json"
    message = run(*args, *given, fails=True)
    assert f"{table} has a split column" in message
    table.write_text("file,label\nnone.png,ulcer\n")
    message = run(*args[:-1], tmp_path / "new", fails=True)
    assert "labels.csv" in message and "--on-error reject" in message
