import csv
import json

import numpy as np
import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.cli.annotation_suspects import main
from imrcnn_d2.report.label_errors import gather_label_errors

SIZE = 60, 60


def fold(root, write_run, index, faults=()):
    """
    A fold's data set, its ground truth with these faults, and runs of two models that find all
    lesions to a pixel. Image 10 * index + k of six has a lesion where k is not a multiple of 3.
    """
    gt = root / f"fold{index}" / "kvasir_seg" / "annotations" / "test.json"
    gt.parent.mkdir(parents=True)
    (gt.parent.parent / "images").mkdir()
    images, annotations, found = [], [], []
    rng = np.random.default_rng(index)
    for k in range(6):
        number, name = 10 * index + k, f"{index}_{k}.png"
        images.append({"id": number, "file_name": name, "height": 60, "width": 60})
        Image.fromarray(rng.integers(0, 255, (60, 60, 3), np.uint8)).save(
            gt.parent.parent / "images" / name
        )
        box = 8 + k, 10, 24, 20
        if k % 3:
            score = float(rng.uniform(0.9, 0.99))
            found.append(rectangle(number, box[0] + 1, *box[1:], size=SIZE, score=score))
            if faults.get(k) != "forgotten":
                moved = {"moved": (box[0] + 14, *box[1:])}.get(faults.get(k), box)
                annotations.append(rectangle(number, *moved, size=SIZE, id=100 + number))
        elif faults.get(k) == "invented":
            annotations.append(rectangle(number, 40, 40, 12, 12, size=SIZE, id=100 + number))
    categories = [{"id": 1, "name": "polyp"}]
    gt.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    for model in ("mrcnn", "imrcnn"):
        name = f"cv/kvasir_seg/{model}/seed0/fold{index}"
        write_run(name, gt, dt=found, model=model, fold=(index, 2))
    return gt


@pytest.fixture
def runs(tmp_path, write_run):
    fold(tmp_path, write_run, 0, {1: "forgotten", 3: "invented"})
    fold(tmp_path, write_run, 1, {2: "moved"})
    return tmp_path / "runs" / "cv"


def test_planted_faults_come_first(runs, tmp_path, capsys):
    main(["--runs", str(runs), "--output", str(tmp_path / "out"), "--number", "3"])
    assert "4 runs" in capsys.readouterr().out
    with open(tmp_path / "out" / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["file_name"]: (row["kind"], row["annotation_id"]) for row in rows[:3]}
    assert found == {
        "0_3.png": ("unmatched_outline", "103"),
        "0_1.png": ("unlabelled_lesion", ""),
        "1_2.png": ("badly_fitting_outline", "112"),
    }
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert scores[2] > 0.85 and max(scores[3:]) < 0.2
    assert [row["rank"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    assert {row["test_set"] for row in rows} == {"fold0", "fold1"}
    assert {row["models"] for row in rows} == {"2"}


def test_the_first_are_findings_a_picture_and_labelme_files(runs, tmp_path):
    main(["--runs", str(runs), "--output", str(tmp_path / "out"), "--number", "3"])
    document = json.loads((tmp_path / "out" / "suspects.json").read_text())
    assert len(document["runs"]) == 4
    images = [f["images"] for f in document["findings"]]
    assert images == [["0_3.png"], ["1_2.png"], ["0_1.png"]]
    assert {f["severity"] for f in document["findings"]} == {"warning"}
    with Image.open(tmp_path / "out" / "suspects.png") as sheet:
        assert min(sheet.size) > 300
    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("*.json")}
    assert files.keys() == {"suspects.json", "0_3.json", "0_1.json", "1_2.json"}
    shapes = {name: [s["label"] for s in files[name]["shapes"]] for name in sorted(files)[:3]}
    assert shapes == {
        "0_1.json": ["polyp (model)"],
        "0_3.json": ["polyp"],
        "1_2.json": ["polyp", "polyp (model)"],
    }
    image = tmp_path / "out" / "labelme" / files["1_2.json"]["imagePath"]
    assert image.resolve() == tmp_path / "fold1" / "kvasir_seg" / "images" / "1_2.png"


def test_corrected_files_stay(runs, tmp_path, caplog):
    arguments = ["--runs", str(runs), "--output", str(tmp_path / "out"), "--number"]
    main([*arguments, "2"])
    first, second = sorted((tmp_path / "out" / "labelme").iterdir())
    first.write_text("corrected")
    as_written = second.read_text()
    main([*arguments, "3"])
    assert first.read_text() == "corrected" and str(first) in caplog.text
    assert second.read_text() == as_written and str(second) not in caplog.text
    assert len(list((tmp_path / "out" / "labelme").iterdir())) == 3


def test_a_model_that_saw_its_test_images_is_refused(tmp_path, write_run, runs):
    run = runs / "kvasir_seg" / "mrcnn" / "seed0" / "fold0"
    record = json.loads((run / "run.json").read_text())
    gt = tmp_path / "fold0" / "kvasir_seg" / "annotations" / "test.json"
    record["datasets"]["train"]["gt"] = str(gt)
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="0_0.png.*was trained on"):
        gather_label_errors(runs)


def test_images_of_two_different_test_sets_are_refused(tmp_path, write_run, runs):
    gt = tmp_path / "fold0" / "kvasir_seg" / "annotations" / "test.json"
    corrected = json.loads(gt.read_text())
    corrected["annotations"].pop()
    other = gt.with_name("corrected.json")
    other.write_text(json.dumps(corrected))
    write_run("cv/other", other, dt=[])
    with pytest.raises(ValueError, match="0_0.png is in the test sets of"):
        gather_label_errors(runs)


def test_no_runs_are_said(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--runs", str(tmp_path), "--output", str(tmp_path / "out")])
    assert stop.value.code == 1 and "no run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
