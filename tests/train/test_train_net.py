"""The training scripts as a user starts them, on a prepared data set."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine.launch import _find_free_port
from processes import run_script

from imrcnn_d2.cli import prepare_dataset, train
from imrcnn_d2.engine.launch import locked_output
from imrcnn_d2.evaluation.output import read_test_log

pytestmark = pytest.mark.slow

YAML = "configs/imrcnn_lite.yaml"
LAZY = "configs/lazy/imrcnn_lite.py"
TEST = "inference/synthetic_test"
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("DATASETS.ROOT", "synthetic", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""),
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "1"),
]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """An environment with the data sets synthetic and gastric_recognition: 60 images in three
    classes, 15 of them for the test.
    """
    folder = tmp_path_factory.mktemp("datasets")
    prepare = ["synthetic", "--out", str(folder / "synthetic"), "--num-images", "20"]
    prepare_dataset.main([*prepare, "--size", "96"])
    rng, source = np.random.default_rng(0), tmp_path_factory.mktemp("source")
    for channel, name in enumerate(("cancer", "ulcer", "gastritis")):
        (source / name).mkdir()
        for i in range(20):
            image = rng.integers(0, 120, (48, 48, 3), dtype=np.uint8)
            image[..., channel] += 100
            cv2.imwrite(str(source / name / f"{i}.png"), image)
    prepare = ["classification", "--root", str(source), "--out"]
    prepare_dataset.main([*prepare, str(folder / "gastric_recognition")])
    return {**os.environ, "IMRCNN_DATASETS": str(folder), "OMP_NUM_THREADS": "1"}


def start(env, *command, script="train_net.py", fails=False):
    done = run_script(f"tools/{script}", "--config-file", *command, env=env)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def processes(number):
    url = f"tcp://127.0.0.1:{_find_free_port()}"
    return ("--num-gpus", number, "--dist-url", url) if number > 1 else ()


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(env, tmp_path_factory):
    """The output folder and the log of a training run."""
    output = tmp_path_factory.mktemp("run")
    return output, start(env, YAML, *SMALL, "OUTPUT_DIR", output).stdout


@pytest.mark.story
def test_training_writes_what_it_found(trained, env):
    output, log = trained
    truth = json.loads(Path(env["IMRCNN_DATASETS"], "synthetic/annotations/test.json").read_text())
    metrics = read(output / TEST)
    with_lesion = {a["image_id"] for a in truth["annotations"]}
    assert metrics["image"]["TP"] + metrics["image"]["FN"] == len(with_lesion)
    assert metrics["meta"]["images"] == len(truth["images"]) == 5
    assert metrics["lesion"]["TP"] + metrics["lesion"]["FN"] == len(truth["annotations"])
    for name in ("per_image.csv", "pr_curve.png", "contact_sheet.png"):
        assert (output / TEST / name).stat().st_size > 0, name
    assert (output / "model_best.pth").is_file() and (output / "model_final.pth").is_file()
    assert "total_loss" in log


def test_eval_only_repeats_the_metrics(trained, env):
    output, log = trained
    best, again = output / "model_best.pth", output / "again"
    command = (YAML, "--eval-only", *SMALL, "MODEL.WEIGHTS", best, "OUTPUT_DIR", again)
    lines = re.findall(r"copypaste: .*", start(env, *command).stdout)  # Detectron2's of results
    assert len(lines) >= 12  # 4 groups of 3 lines
    assert lines == re.findall(r"copypaste: .*", log)[-len(lines) :]
    before, after = read(output / TEST), read(again / TEST)
    assert before["tau_val"]["dataset"] == "synthetic_val"
    assert before["tau_val"] == after["tau_val"]
    assert after["meta"]["checkpoint"] == str(best)
    logged = read_test_log(Path(env["IMRCNN_DATASETS"], "synthetic/annotations/test.json"))[-1]
    assert logged["sha256"] == after["meta"]["checkpoint_sha256"]
    assert logged["output"] == str(again / TEST)
    assert not (again / "run.json").exists(), "nothing was trained"

    impossible = ("TEST.EXPECTED_RESULTS", "[['lesion', 'fp_per_image', -5.0, 0.1]]")
    done = start(env, *command, *impossible, fails=True)
    assert "Result verification failed" in done.stdout


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_refused_is_one_line(env, tmp_path, number):
    refused = ("MODEL.LOAD_PROPOSALS", "True", "OUTPUT_DIR", tmp_path)
    done = start(env, YAML, *processes(number), *refused, fails=True)
    assert "train_net.py: MODEL.LOAD_PROPOSALS is True" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    nowhere = {**env, "IMRCNN_DATASETS": str(tmp_path)}
    done = start(nowhere, YAML, *processes(number), *SMALL, "OUTPUT_DIR", tmp_path, fails=True)
    assert str(tmp_path / "synthetic") in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("moment", "number"), [("config.yaml", signal.SIGINT), ("model_final.pth", signal.SIGTERM)]
)
def test_a_request_before_or_after_the_iterations(env, tmp_path, moment, number):
    command = (YAML, "--resume", *SMALL, "OUTPUT_DIR", str(tmp_path / "run"))
    log, script = tmp_path / "log.txt", ("tools/train_net.py", "--config-file")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *script, *command], env=env, stdout=file, stderr=file
        )
    while not (tmp_path / "run" / moment).exists():  # written before them, and after them
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(600) == 75, log.read_text()
    text = log.read_text()
    assert "--resume" in text and "Traceback" not in text, text
    metrics = tmp_path / "run" / TEST / "metrics.json"
    assert not metrics.exists()
    start(env, *command)
    assert metrics.is_file()


@pytest.mark.parametrize("config", [YAML, LAZY])
@pytest.mark.parametrize("arguments", [(), ("--resume",), ("--eval-only",)])
def test_a_folder_that_another_job_writes_to_is_left_alone(
    tmp_path, monkeypatch, config, arguments
):
    monkeypatch.setattr("imrcnn_d2.engine.launch.LOCK_TIMEOUT", 0)
    lazy = config == LAZY
    key = (f"train.output_dir={tmp_path}",) if lazy else ("OUTPUT_DIR", str(tmp_path))
    command = ["--config-file", config, "--data", "synthetic", *arguments, *key]
    args = train.argument_parser().parse_args(command)
    with locked_output(str(tmp_path)), pytest.raises(ValueError, match=str(tmp_path)):
        train.run(args)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_lazy_script_trains(env, tmp_path, lazy_opts):
    opts = [*lazy_opts, "train.max_iter=1", f"train.output_dir={tmp_path}"]
    start(env, LAZY, "--data", "synthetic", *opts, script="lazyconfig_train_net.py")
    for name in ("metrics.json", "pr_curve.png", "contact_sheet.png"):
        assert (tmp_path / TEST / name).is_file(), name
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["model"], run["backbone"]) == ("IMR-CNN", "tf_efficientnet_lite0")
    assert run["finished"] and run["device"] == "cpu"
    assert run["datasets"].keys() == {f"synthetic_{split}" for split in ("train", "val", "test")}


def test_a_classifier_trains_in_phases_in_two_processes(env, tmp_path):
    phase = "{{'name': '{}', 'iterations': 2, 'lr': 0.003, 'trainable': '{}'}}".format
    common = ("configs/efficientnet_lite0.yaml", "INPUT.SIZE", 48)
    common += ("DATASETS.ROOT", "gastric_recognition", "DATALOADER.NUM_WORKERS", 0)
    common += ("MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", "")
    common += ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0)
    common += ("SOLVER.PHASES", f"[{phase('one', 'head')}, {phase('two', 'all')}]")
    common += ("SOLVER.CHECKPOINTS_TO_KEEP", 9, "OUTPUT_DIR")
    output, again = tmp_path / "run", tmp_path / "again"
    start(env, *common[:1], *processes(2), *common[1:], output)
    first, second, third = (
        torch.load(output / f"model_{name}.pth", weights_only=True)["model"]
        for name in ("0000000", "0000001", "final")
    )
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved == {"head.weight", "head.bias"}
    for name in ("backbone.conv_stem.weight", "backbone.bn1.running_mean"):
        assert not torch.equal(second[name], third[name]), name

    # --eval-only in a single process finds the same.
    weights = ("MODEL.WEIGHTS", output / "model_best.pth")
    start(env, *common[:1], "--eval-only", *common[1:], again, *weights)
    test = Path("inference", "gastric_recognition_test")
    metrics, repeated = read(output / test), read(again / test)
    assert np.sum(metrics["confusion_matrix"]["counts"]) == 15, "each image counts once"
    assert repeated["confusion_matrix"] == metrics["confusion_matrix"]
    for key, value in metrics["recognition"].items():
        if isinstance(value, float):
            assert repeated["recognition"][key] == pytest.approx(value), key


@pytest.mark.parametrize("name", ["configs/kvasir_seg/imrcnn_lite.yaml", "imrcnn_lite.yaml"])
def test_the_config_that_detectron2_logs_is_there(tmp_path, monkeypatch, name):
    """An earlier path and a bare name are files elsewhere or none."""
    monkeypatch.chdir(tmp_path)
    logged = []

    def setup(cfg, args):
        logged.append(args.config_file)
        raise InterruptedError

    monkeypatch.setattr("detectron2.engine.default_setup", setup)
    options = ["--config-file", name, "--data", "kvasir_seg", "OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(InterruptedError):
        train.run(train.argument_parser().parse_args(options))
    assert all(not path or Path(path).is_file() for path in logged) and logged
