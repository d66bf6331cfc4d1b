"""Faults planted into the annotations of a cross-validation are the most suspect."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.cli.annotation_suspects import main
from imrcnn_d2.report.label_errors import gather_label_errors

SIZE = 60, 60


def fold(root, write_run, index, faults):
    """A fold's data set, its ground truth with these faults, and runs of two models that find all
    lesions to a pixel. Image 10 * index + k of six has a lesion where k is not a multiple of 3.
    """
    gt = root / f"fold{index}" / "kvasir_seg" / "annotations" / "test.json"
    photos = gt.parent.parent / "images"
    gt.parent.mkdir(parents=True)
    photos.mkdir()
    images, annotations, dt = [], [], []
    rng = np.random.default_rng(index)
    for k in range(6):
        number, name = 10 * index + k, f"{index}_{k}.png"
        images.append({"id": number, "file_name": name, "height": 60, "width": 60})
        Image.fromarray(rng.integers(0, 255, (60, 60, 3), np.uint8)).save(photos / name)
        x, *box = 8 + k, 10, 24, 20
        fields = {"size": SIZE, "id": 100 + number}
        if k % 3:
            score = float(rng.uniform(0.9, 0.99))
            dt.append(rectangle(number, x + 1, *box, size=SIZE, score=score))
            if faults.get(k) != "forgotten":
                x += 14 if faults.get(k) == "moved" else 0
                annotations.append(rectangle(number, x, *box, **fields))
        elif faults.get(k) == "invented":
            annotations.append(rectangle(number, 40, 40, 12, 12, **fields))
    content = {"images": images, "categories": [{"id": 1, "name": "polyp"}]}
    gt.write_text(json.dumps({**content, "annotations": annotations}))
    for model in ("mrcnn", "imrcnn"):
        write_run(f"cv/{model}/fold{index}", gt, dt=dt, model=model, fold=(index, 2))


@pytest.fixture
def runs(tmp_path, write_run):
    fold(tmp_path, write_run, 0, {1: "forgotten", 3: "invented"})
    fold(tmp_path, write_run, 1, {2: "moved"})
    return tmp_path / "runs" / "cv"


def test_planted_faults_come_first(runs, tmp_path, capsys):
    out = tmp_path / "out"
    main(["--runs", str(runs), "--output", str(out), "--number", "3"])
    assert "4 runs" in capsys.readouterr().out
    with open(out / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = {row["file_name"]: (row["kind"], row["annotation_id"]) for row in rows[:3]}
    assert first == {
        "0_3.png": ("unmatched_outline", "103"),
        "0_1.png": ("unlabelled_lesion", ""),
        "1_2.png": ("badly_fitting_outline", "112"),
    }
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert scores[2] > 0.85 and max(scores[3:]) < 0.2
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
    assert {(row["test_set"], row["models"]) for row in rows} == {("fold0", "2"), ("fold1", "2")}

    document = json.loads((out / "suspects.json").read_text())
    assert len(document["runs"]) == 4
    images = [finding["images"] for finding in document["findings"]]
    assert images == [["0_3.png"], ["1_2.png"], ["0_1.png"]]
    assert min(Image.open(out / "suspects.png").size) > 300
    folder = out / "labelme"
    files = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    labels = {name: [shape["label"] for shape in file["shapes"]] for name, file in files.items()}
    mine, model = "polyp", "polyp (model)"
    assert labels == {"0_1.json": [model], "0_3.json": [mine], "1_2.json": [mine, model]}
    image = folder / files["1_2.json"]["imagePath"]
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


def test_runs_that_cannot_be_used(runs, tmp_path, write_run, capsys):
    run = runs / "mrcnn" / "fold0"
    finished = (run / "run.json").read_text()
    record = json.loads(finished)
    gt = tmp_path / "fold0" / "kvasir_seg" / "annotations" / "test.json"
    record["datasets"]["train"]["gt"] = str(gt)
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{run}.*0_0.png.*{gt}"):  # it saw its test images
        gather_label_errors(runs)
    (run / "run.json").write_text(finished)
    corrected = json.loads(gt.read_text())
    corrected["annotations"].pop()
    other = gt.with_name("corrected.json")
    other.write_text(json.dumps(corrected))
    write_run("cv/other", other, dt=[])
    with pytest.raises(ValueError, match="0_0.png.*test sets"):
        gather_label_errors(runs)
    with pytest.raises(SystemExit) as stop:
        main(["--runs", str(tmp_path / "fold0"), "--output", str(tmp_path / "out")])
    assert stop.value.code == 1 and "fold0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
