"""tools/predict.py, and what tools/export.py writes for it."""

import json
import os
import sys

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from imrcnn_d2.cli import export, predict
from imrcnn_d2.engine import load_config

from .conftest import OPTS, random_image


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Weights, and a folder with an image and a file that is none."""
    folder = tmp_path_factory.mktemp("predict")
    opts = [*OPTS, "MODEL.IMRCNN.SCORE_THRESH", 0.4]
    cfg = load_config("configs/kvasir_seg/imrcnn_lite.yaml", opts)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    (folder / "images").mkdir()
    Image.fromarray(random_image(0)).save(folder / "images" / "a.png")
    return folder


def run(tool, *arguments):
    tool.main([str(argument) for argument in arguments])


def failing(tool, capsys, *arguments):
    """(exit status, what it says) of a call that fails."""
    with pytest.raises(SystemExit) as stopped:
        run(tool, *arguments)
    return stopped.value.code, capsys.readouterr().err


def test_from_weights_to_results_and_back_through_an_export(case, tmp_path, capsys):
    (case / "images" / "bad.jpg").write_bytes(b"no image")
    common = ["--input", case / "images", "--overlays", "--masks", "--labelme"]
    run(predict, "--weights", case / "model.pth", "--output", tmp_path / "one", *common)
    printed = capsys.readouterr().out
    assert "1 images predicted; 1 inputs could not be read" in printed
    one = json.loads((tmp_path / "one" / "predictions.json").read_text())
    assert one["info"]["tau"] == 0.4
    assert [image["file_name"] for image in one["images"]] == ["a.png"]
    for name in ("overlays/a.jpg", "masks/a.png", "labelme/a.json", "failed.csv"):
        assert (tmp_path / "one" / name).is_file()

    exported = tmp_path / "model.safetensors"
    images = ["--images", case / "images" / "a.png"]
    run(export, "--format", "safetensors", "--weights", case / "model.pth", *images,
        "--output", exported)  # fmt: skip
    assert "largest difference of a score 0, of a box 0 %" in capsys.readouterr().out
    run(predict, "--weights", exported, "--output", tmp_path / "two", *common, "--batch-size", 2)
    two = json.loads((tmp_path / "two" / "predictions.json").read_text())
    assert two["annotations"] == one["annotations"]
    assert two["info"]["config_sha256"] == one["info"]["config_sha256"]


def test_corrected_files_stay_and_the_run_says_so(case, tmp_path, capsys):
    arguments = ["--weights", case / "model.pth", "--input", case / "images" / "a.png"]
    arguments += ["--output", tmp_path / "out", "--labelme"]
    run(predict, *arguments)
    labelme = tmp_path / "out" / "labelme" / "a.json"
    labelme.write_text("corrected")
    os.utime(case / "images" / "a.png", (0, 0))
    capsys.readouterr()
    run(predict, *arguments)
    assert "labelme/a.json" in capsys.readouterr().out and labelme.read_text() == "corrected"


def test_a_folder_of_the_users_is_refused(case, tmp_path, capsys):
    (tmp_path / "labelme").mkdir()
    (tmp_path / "labelme" / "a.json").write_text("mine")
    arguments = ["--weights", case / "model.pth", "--input", case / "images"]
    status, err = failing(predict, capsys, *arguments, "--output", tmp_path)
    assert status == 1 and f"{tmp_path} holds labelme" in err and "--output" in err
    assert (tmp_path / "labelme" / "a.json").read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == 2


def test_errors_are_a_line(case, tmp_path, capsys):
    inputs = ["--input", case / "images", "--output", tmp_path / "out"]
    (tmp_path / "odd.yaml").write_text("MODEL: {NOSUCH: 1}")
    for arguments, message in {
        ("--weights", "nothing"): "no weights named 'nothing'",
        ("--weights", case / "none.pth"): "none.pth: no such file of weights",
        ("--weights", case / "config.yaml"): "config.yaml cannot be read",
        ("--weights", case / "model.pth", "--config-file", "configs/kvasir_seg/mrcnn_lite.yaml"): (
            "another architecture"
        ),
        ("--weights", case / "model.pth", "--config-file", tmp_path / "none.yaml"): (
            "none.yaml: no such config file"
        ),
        ("--weights", case / "model.pth", "--config-file", tmp_path / "odd.yaml"): (
            "odd.yaml is no config of these models: Non-existent config key: MODEL.NOSUCH"
        ),
    }.items():
        status, err = failing(predict, capsys, *arguments, *inputs)
        assert status == 1 and message in err and "Traceback" not in err
    weights = ["--weights", case / "model.pth", "--output", tmp_path / "out"]
    assert failing(predict, capsys, *weights)[0] == 2, "neither --input nor --live"
    assert failing(predict, capsys, *weights, "--input", "a", "--tau", "7")[0] == 2
    ray = [*weights, "--input", "a", "--engine", "ray"]
    assert "no --overlays, --masks" in failing(predict, capsys, *ray, "--masks")[1]
    assert failing(predict, capsys, *ray, "--actors", 0)[0] == 2
    live = [*weights, "--live", "a.mp4"]
    for more in (["--masks"], ["--batch-size", 2]):
        assert "--live writes live.mp4: no" in failing(predict, capsys, *live, *more)[1]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "bad.png").write_bytes(b"")
    assert failing(predict, capsys, *weights, "--input", tmp_path / "only")[0] == 1


def test_what_the_ray_engine_needs_is_named(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "imrcnn_d2.deploy.ray", raising=False)
    status, err = failing(
        predict, capsys, "--engine", "ray", "--weights", case / "model.pth", "--input",
        case / "images", "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 1 and "this needs ray: pip install -e '.[ray]'" in err


def test_int8_is_fitted_to_images(case, tmp_path, capsys, monkeypatch):
    target, images = tmp_path / "model.openvino", case / "images"
    common = ["--format", "openvino", "--precision", "int8", "--weights", case / "model.pth"]
    common += ["--images", images / "a.png", "--output", target]
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path))
    status, err = failing(export, capsys, *common)
    assert status == 1 and "cannot be read" in err and "--calibration" in err
    (tmp_path / "none").mkdir()
    status, err = failing(export, capsys, *common, "--calibration", tmp_path / "none")
    assert status == 1 and f"under {tmp_path / 'none'}" in err


def test_an_export_that_differs_is_not_left(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(export.BOUNDS["fp16"], "score", -1)
    common = ["--format", "safetensors", "--weights", case / "model.pth", "--precision", "fp16"]
    target = tmp_path / "model.safetensors"
    images = ["--images", case / "images" / "a.png"]
    status, err = failing(export, capsys, *common, *images, "--output", target)
    assert status == 1 and "was not written: scores differ by" in err
    assert not list(tmp_path.iterdir())
    assert failing(export, capsys, *common, *images, "--output", tmp_path / "model.pth")[0] == 2
