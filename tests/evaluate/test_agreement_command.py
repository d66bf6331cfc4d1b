import json

import numpy as np
import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.cli import agreement


@pytest.fixture
def files(tmp_path):
    """Paths of three annotators of three images, of a model's results, and of the images."""
    found = {"anna": (1, 2), "ben": (1, 3), "eva": (1, 2, 3)}
    for name, marked in found.items():
        images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2, 3)]
        if name == "anna":
            images.append({"id": 4, "file_name": "4.png", "height": 40, "width": 50})
        content = {
            "images": images,
            "categories": [{"id": 1, "name": "polyp"}],
            "annotations": [rectangle(i, 0, 0, 10, 10) for i in marked],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    results = [rectangle(2, 0, 0, 10, 8, score=0.9), rectangle(1, 0, 0, 10, 10, score=0.3)]
    (tmp_path / "dt.json").write_text(json.dumps(results))
    for i in (1, 2, 3):
        Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def run(files, *options, annotators=("anna", "ben", "eva")):
    paths = [files / f"{name}.json" for name in annotators]
    arguments = ["--annotations", *paths, "--output", files / "out", "--resamples", 50, *options]
    agreement.main([str(argument) for argument in arguments])
    return json.loads((files / "out" / "agreement.json").read_text())


def test_annotators_and_a_model(files, capsys):
    options = ("--dt", files / "dt.json", "--tau", 0.5, "--model-name", "net", "--images", files)
    document = run(files, *options)
    printed = capsys.readouterr().out
    pairs = document["agreement"]
    assert pairs["anna vs ben"]["f1"] == 50
    assert pairs["anna vs net"]["f1"] == pytest.approx(200 / 3)
    assert pairs["anna vs net"]["iou"] == pytest.approx(80)
    assert {"annotators", "model", "difference", "with_model"} <= set(pairs)
    assert document["missing"] == {"4.png": ["ben", "eva"]}  # the results are of Anna's images
    assert document["meta"]["tau"] == 0.5 and document["meta"]["lesions"]["net"] == 1
    assert "4.png: not in ben, eva" in printed and "| anna vs net" in printed
    for name in ("agreement.csv", "per_image.csv", "missing.csv", "agreement.png"):
        assert (files / "out" / name).stat().st_size and name in printed
    with Image.open(files / "out" / "disagreements.png") as image:
        image.load()


def test_two_alone(files, capsys):
    document = run(files, "--iou", 0.9, annotators=("ben", "eva"))
    assert list(document["agreement"]) == ["ben vs eva", "annotators"]
    assert "fleiss" not in capsys.readouterr().out
    assert not (files / "out" / "disagreements.png").exists()


def test_names(files):
    document = run(files, "--names", "A", "B", annotators=("anna", "ben"))
    assert "A vs B" in document["agreement"]
    for folder in ("one", "two"):
        (files / folder).mkdir()
        (files / folder / "labels.json").write_bytes((files / "ben.json").read_bytes())
    document = run(files, annotators=("one/labels", "two/labels"))
    assert document["meta"]["annotators"] == [f"{files}/one/labels", f"{files}/two/labels"]


@pytest.mark.parametrize(
    ("annotators", "options", "message"),
    [
        (("anna",), (), "between two or more"),
        (("anna", "none"), (), "No such file"),
        (("anna", "ben"), ("--names", "A"), "2 files, but 1 --names"),
        (("anna", "dt"), (), "dt.json"),
    ],
)
def test_errors_end_the_command_without_a_traceback(files, capsys, annotators, options, message):
    with pytest.raises(SystemExit) as stopped:
        run(files, *options, annotators=annotators)
    assert stopped.value.code == 1 and message in capsys.readouterr().err
    assert not (files / "out").exists()
