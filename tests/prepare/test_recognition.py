"""The commands on images with a class each: preparing, scoring, comparing, reporting."""

import csv
import json

import pytest
from recognition_runs import CLASSES, draw_classes, write_classifier

from imrcnn_d2.cli import compare, evaluate, prepare_dataset, report


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with one folder a class, raw/, and the data set prepared of it by the command."""
    root = tmp_path_factory.mktemp("recognition_tools")
    draw_classes(root / "raw", (12, 14, 16), size=20)
    arguments = ["classification", "--root", root / "raw", "--out", root / "gastric_recognition"]
    arguments += ["--test-per-class", 4, "--val-percent", 20, "--classes", *CLASSES]
    prepare_dataset.main([str(argument) for argument in arguments])
    return root


def test_prepare(root, capsys):
    arguments = ["classification", "--root", root / "raw", "--out", root / "gastric_recognition"]
    arguments += ["--test-per-class", 4, "--val-percent", 20, "--classes", *CLASSES]
    prepare_dataset.main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out
    assert printed.endswith("already there, unchanged\n")
    rows = [line.split() for line in printed.splitlines()[:4]]
    assert rows[0][3:] == " ".join(CLASSES).split()
    assert rows[3] == ["test", "12", "-", "4", "4", "4"]
    assert [int(row[1]) for row in rows[1:]] == [24, 6, 12]
    assert "cancer: gastric cancer; all others are benign" in printed


def test_prepare_from_a_table(root, tmp_path, capsys):
    rows = [("file", "label", "patient_id", "split")]
    files = sorted(path.relative_to(root / "raw") for path in (root / "raw").rglob("*.png"))
    rows += [
        (file.as_posix(), file.parts[0], f"p{i // 2}", "test" if i // 2 % 3 == 0 else "train")
        for i, file in enumerate(files)
    ]
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    arguments = ["classification", "--root", root / "raw", "--csv", tmp_path / "labels.csv"]
    arguments = [str(argument) for argument in (*arguments, "--out", tmp_path / "out")]
    prepare_dataset.main([*arguments, "--val-percent", "25", "--cancer", "gastric ulcer"])
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert splits["test"] == sorted(row[0] for row in rows[1:] if row[3] == "test")
    assert len(splits["val"]) == pytest.approx(len(rows) * 2 / 3 / 4, abs=2)
    assert "cancer: gastric ulcer" in capsys.readouterr().out

    given = tmp_path / "given.json"
    given.write_text(json.dumps({split: splits[split] for split in ("train", "val", "test")}))
    with pytest.raises(SystemExit) as error:
        prepare_dataset.main([*arguments, "--splits", str(given)])
    assert "has a split column" in error.value.code
    (tmp_path / "labels.csv").write_text("file,label\nnone.png,ulcer\n")
    with pytest.raises(SystemExit) as error:
        prepare_dataset.main([*arguments[:-1], str(tmp_path / "new")])
    assert "--on-error reject" in error.value.code


def test_score_compare_and_report(root, tmp_path, capsys):
    gt = root / "gastric_recognition" / "annotations" / "test.json"
    trained = write_classifier(tmp_path / "resnet50", gt)
    probabilities = trained / "inference" / "gastric_recognition_test" / "recognition_results.json"
    scores = tmp_path / "scores"
    arguments = ["--recognition", "--gt", gt, "--dt", probabilities, "--resamples", 40]
    evaluate.main([str(a) for a in (*arguments, "--output", scores)])
    printed = capsys.readouterr().out
    figures = json.loads((scores / "metrics.json").read_text())
    assert f"{figures['recognition']['balanced_accuracy']:.2f}" in printed
    before = json.loads(probabilities.with_name("metrics.json").read_text())
    for key, value in before["recognition"].items():
        if not key.endswith("_ci"):
            assert figures["recognition"][key] == value
    assert {"confusion_matrix.png", "roc_curve.png", "calibration.png", "per_image.csv"} <= {
        path.name for path in scores.iterdir()
    }
    log = root / "gastric_recognition" / "test_evaluations.csv"
    assert str(scores) in log.read_text()

    runs = [str(trained), f"copy={scores}"]
    compare.main([*runs, "--output", str(tmp_path / "comparison"), "--resamples", "40"])
    assert "Accuracy of each class" in capsys.readouterr().out
    assert (tmp_path / "comparison" / "confusion.png").is_file()
    page = tmp_path / "report.html"
    report.main([*runs, "--output", str(page)])
    assert "copy" in page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main([runs[0], "--output", str(page), "--card", str(tmp_path / "card.md")])
    assert "no model cards of classifiers" in capsys.readouterr().err

    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(json.loads(probabilities.read_text())[1:]))
    arguments[arguments.index(probabilities)] = broken
    with pytest.raises(SystemExit):
        evaluate.main([str(a) for a in (*arguments, "--output", scores)])
    assert "lack 1 of the 12 images" in capsys.readouterr().err
