"""The commands predict, export and demo-app."""

import os
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image

from imrcnn_d2.cli import demo_app, export, predict

from .conftest import ALL, read_coco, save_image


@pytest.fixture
def weights(tiny_run):
    return tiny_run / "model_best.pth"


def run(tool, *arguments):
    tool.main([str(argument) for argument in arguments])


def failing(tool, capsys, *arguments):
    """(exit status, message) of a call that fails."""
    with pytest.raises(SystemExit) as stopped:
        run(tool, *arguments)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return stopped.value.code, error


def test_from_weights_to_results_and_back_through_an_export(weights, tmp_path, capsys):
    image, exported = save_image(tmp_path / "in" / "a.png", 0), tmp_path / "model.safetensors"
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    common = ["--input", tmp_path / "in", *(f"--{kind}" for kind in ALL)]
    first = ["--weights", weights, "--output", tmp_path / "a", *common, "--tau", 0.4]
    run(predict, *first)
    assert "1 images predicted; 1 inputs could not be read" in capsys.readouterr().out
    coco = read_coco(tmp_path / "a")
    assert coco["info"]["tau"] == 0.4
    for name in ("overlays/a.jpg", "masks/a.png", "labelme/a.json", "failed.csv"):
        assert (tmp_path / "a" / name).is_file()

    options = ["--format", "safetensors", "--weights", weights, "--images", image]
    run(export, *options, "--output", exported)
    assert "largest difference of a score 0, of a box 0 %" in capsys.readouterr().out
    run(predict, "--weights", exported, "--output", tmp_path / "b", *common, "--batch-size", 2)
    other = read_coco(tmp_path / "b")
    assert (other["annotations"], other["images"]) == (coco["annotations"], coco["images"])
    assert other["info"]["config_sha256"] == coco["info"]["config_sha256"]

    # Corrected files stay, and the run names them.
    labelme = tmp_path / "a" / "labelme" / "a.json"
    labelme.write_text("corrected")
    os.utime(image, (0, 0))
    run(predict, *first)
    assert "labelme/a.json" in capsys.readouterr().out and labelme.read_text() == "corrected"


def test_errors_are_a_line(weights, tiny_run, image_folder, tmp_path, capsys, monkeypatch):
    odd, none, bad = tmp_path / "odd.yaml", tmp_path / "none.yaml", tmp_path / "bad.png"
    odd.write_text("MODEL: {NOSUCH: 1}")
    bad.touch()
    given, output = ["--weights", weights], ["--output", tmp_path / "out"]
    inputs = [*output, "--input", image_folder]
    ray, live = [*inputs, "--engine", "ray"], [*output, "--live", "a.mp4"]
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "imrcnn_d2.deploy.ray", raising=False)
    paths = {none: none, odd: odd, "configs/mrcnn_lite.yaml": weights}
    wrong = ["--masks"], ["--batch-size", 2]
    names = "nothing", "none.pth", tiny_run / "config.yaml"
    for tool, arguments, expected, message in (
        *((predict, ["--weights", name, *inputs], 1, name) for name in names),
        *((predict, [*given, *inputs, "--config-file", p], 1, paths[p]) for p in paths),
        *((predict, [*given, *live, *more], 2, "--live") for more in wrong),
        (predict, [*given, *output], 2, "--input"),
        (predict, [*given, *inputs, "--tau", 7], 2, "--tau"),
        (predict, [*given, *ray, "--masks"], 2, "--masks"),
        (predict, [*given, *ray, "--actors", 0], 2, "--actors"),
        (predict, [*given, *ray], 1, "pip install -e '.[ray]'"),
        (predict, [*given, *output, "--input", bad], 1, ""),
        (demo_app, ["--weights", "none.pth"], 1, "none.pth"),
        (demo_app, ["--port", 70000], 2, "--port"),
    ):
        status, error = failing(tool, capsys, *arguments)
        assert status == expected and str(message) in error, arguments


def test_exports_are_checked(weights, image_folder, tmp_path, capsys, monkeypatch):
    target, none = tmp_path / "exports", tmp_path / "none"
    target.mkdir()
    none.mkdir()
    common = ["--weights", weights, "--images", image_folder / "a.png"]
    int8 = [
        *common,
        "--format",
        "openvino",
        "--precision",
        "int8",
        "--output",
        target / "m.openvino",
    ]
    fp16 = [*common, "--format", "safetensors", "--precision", "fp16", "--output"]
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path))
    monkeypatch.setitem(export.BOUNDS["fp16"], "score", -1)
    for arguments, expected, message in (
        (int8, 1, "--calibration"),
        ([*int8, "--calibration", none], 1, str(none)),
        ([*fp16, target / "m.safetensors"], 1, "scores differ by"),
        ([*fp16, target / "m.pth"], 2, "m.pth"),
    ):
        status, error = failing(export, capsys, *arguments)
        assert status == expected and message in error
    assert not list(target.iterdir())


@pytest.mark.slow
def test_the_page_is_served_until_it_is_ended(weights, tmp_path, monkeypatch):
    """A process of its own, which leaves nothing in the folder for temporary files."""
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    gradio_client = pytest.importorskip("gradio_client")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = [sys.executable, "-W", "ignore", "tools/demo_app.py", "--port", "0", "--weights"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, str(weights)], **options)
    try:
        lines = iter(process.stdout.readline, "")
        url = next(m[1] for line in lines if (m := re.search(r"Open (http://127\.\S+)", line)))
        client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
        assert list(tmp_path.glob("imrcnn-uploads-*"))
        for size, text in ((7000, "7000x7000"), (70, "<figure")):
            Image.new("L", (size, size)).save(tmp_path / "a.png")
            files = [gradio_client.handle_file(str(tmp_path / "a.png"))]
            assert text in client.predict(files, 0.5, api_name="/look")[1]
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert not list(tmp_path.glob("imrcnn-uploads-*"))
    finally:
        process.kill()
