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

SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("DATASETS.ROOT", "synthetic", "MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""),
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "1"),
]
YAML = "configs/imrcnn_lite.yaml"


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """An environment in which the prepared data sets are found."""
    folder = tmp_path_factory.mktemp("datasets")
    prepare = ["synthetic", "--out", str(folder / "synthetic"), "--num-images", "20"]
    prepare_dataset.main([*prepare, "--size", "96"])
    return {**os.environ, "IMRCNN_DATASETS": str(folder), "OMP_NUM_THREADS": "1"}


def start(env, *command):
    return run_script(*command, env=env)


def figures(log):
    """The lines in which Detectron2 prints results, without their time stamps."""
    return re.findall(r"copypaste: .*", log)


@pytest.fixture(scope="module")
def trained(env, tmp_path_factory):
    """The output folder and the log of a training run."""
    output = tmp_path_factory.mktemp("run")
    command = [sys.executable, "tools/train_net.py", "--config-file", YAML, *SMALL]
    command += ["OUTPUT_DIR", str(output)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


@pytest.mark.story
def test_training_writes_what_it_found(trained, env):
    output, log = trained
    truth = json.loads(Path(env["IMRCNN_DATASETS"], "synthetic/annotations/test.json").read_text())
    with_lesion = {a["image_id"] for a in truth["annotations"]}
    test = output / "inference" / "synthetic_test"
    metrics = json.loads((test / "metrics.json").read_text())
    assert metrics["image"]["TP"] + metrics["image"]["FN"] == len(with_lesion)
    assert metrics["meta"]["images"] == len(truth["images"]) == 5
    assert metrics["lesion"]["TP"] + metrics["lesion"]["FN"] == len(truth["annotations"])
    for name in ("per_image.csv", "pr_curve.png", "contact_sheet.png"):
        assert (test / name).stat().st_size > 0, name
    assert (output / "model_best.pth").is_file() and (output / "model_final.pth").is_file()
    assert "eta:" in log or "total_loss" in log


def evaluate(trained, env, *opts):
    output, _ = trained
    weights = ("MODEL.WEIGHTS", str(output / "model_best.pth"))
    again = ("OUTPUT_DIR", str(output / "again"))
    command = ("tools/train_net.py", "--config-file", YAML, "--eval-only")
    return start(env, *command, *SMALL, *weights, *again, *opts)


def test_eval_only_repeats_the_figures(trained, env):
    done = evaluate(trained, env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = figures(done.stdout)
    assert len(lines) >= 12  # 4 groups of 3 lines
    assert lines == figures(trained[1])[-len(lines) :]

    before, after = (
        json.loads((folder / "inference/synthetic_test/metrics.json").read_text())
        for folder in (trained[0], trained[0] / "again")
    )
    assert before["tau_val"]["dataset"] == "synthetic_val"
    assert before["tau_val"] == after["tau_val"]
    assert after["meta"]["checkpoint"] == str(trained[0] / "model_best.pth")
    log = read_test_log(Path(env["IMRCNN_DATASETS"], "synthetic/annotations/test.json"))
    assert log[-1]["sha256"] == after["meta"]["checkpoint_sha256"]
    assert log[-1]["output"] == str(trained[0] / "again/inference/synthetic_test")
    assert not (trained[0] / "again" / "run.json").exists(), "nothing was trained"


def test_expected_results_are_verified(trained, env):
    impossible = ("TEST.EXPECTED_RESULTS", "[['lesion', 'fp_per_image', -5.0, 0.1]]")
    done = evaluate(trained, env, *impossible)
    assert done.returncode != 0
    assert "Result verification failed" in done.stdout


def test_two_processes_train_and_evaluate(trained, env, tmp_path):
    url = f"tcp://127.0.0.1:{_find_free_port()}"
    command = ("tools/train_net.py", "--num-gpus", "2", "--dist-url", url, "--config-file", YAML)
    done = start(env, *command, *SMALL, "OUTPUT_DIR", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "inference/synthetic_test/metrics.json").read_text())
    image = metrics["image"]
    assert image["TP"] + image["FP"] + image["FN"] + image["TN"] == 5, "each image counts once"


def test_a_missing_data_set_names_the_command_that_makes_it(env, tmp_path):
    nowhere = {**env, "IMRCNN_DATASETS": str(tmp_path)}
    done = start(nowhere, "tools/train_net.py", "--config-file", YAML, *SMALL)
    assert done.returncode != 0
    assert str(tmp_path) in done.stderr and "prepare_dataset.py synthetic" in done.stderr


@pytest.mark.parametrize(
    ("moment", "number"), [("config.yaml", signal.SIGINT), ("model_final.pth", signal.SIGTERM)]
)
def test_a_request_before_or_after_the_iterations(env, tmp_path, moment, number):
    command = ("tools/train_net.py", "--config-file", YAML, "--resume", *SMALL)
    command += ("OUTPUT_DIR", str(tmp_path / "run"))
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], env=env, stdout=file, stderr=file)
    while not (tmp_path / "run" / moment).exists():  # written before them, and after them
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(600) == 75, log.read_text()
    text = log.read_text()
    assert "--resume" in text and "Traceback" not in text, text
    metrics = tmp_path / "run" / "inference/synthetic_test/metrics.json"
    assert not metrics.exists()
    done = start(env, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics.is_file()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_what_is_refused_is_one_line(env, tmp_path, processes):
    command = ["tools/train_net.py", "--config-file", YAML, "--num-gpus", processes]
    refused = start(env, *command, "MODEL.LOAD_PROPOSALS", "True", "OUTPUT_DIR", str(tmp_path))
    assert refused.returncode == 1
    assert "train_net.py: MODEL.LOAD_PROPOSALS is True" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout


@pytest.mark.parametrize("config", [YAML, "configs/lazy/imrcnn_lite.py"])
@pytest.mark.parametrize("arguments", [(), ("--resume",), ("--eval-only",)])
def test_a_folder_that_another_job_writes_to_is_left_alone(
    env, tmp_path, monkeypatch, config, arguments
):
    monkeypatch.setattr("imrcnn_d2.engine.launch.LOCK_TIMEOUT", 0)
    lazy = config.endswith(".py")
    key = (f"train.output_dir={tmp_path}",) if lazy else ("OUTPUT_DIR", str(tmp_path))
    args = train.argument_parser().parse_args(
        ["--config-file", config, "--data", "synthetic", *arguments, *key]
    )
    with locked_output(str(tmp_path)), pytest.raises(ValueError, match=str(tmp_path)):
        train.run(args)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_lazy_script_trains(env, tmp_path):
    overrides = [
        "train.max_iter=1",
        f"train.output_dir={tmp_path}",
        "train.device=cpu",
        "model.backbone.bottom_up.weights=''",
        "dataloader.train.num_workers=0",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[96]",
    ]
    for split in ("val", "test"):
        overrides.append(f"dataloader.{split}.num_workers=0")
        overrides.append(f"dataloader.{split}.mapper.augmentations.0.short_edge_length=96")
    config = ("--config-file", "configs/lazy/imrcnn_lite.py", "--data", "synthetic")
    done = start(env, "tools/lazyconfig_train_net.py", *config, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("metrics.json", "pr_curve.png", "contact_sheet.png"):
        assert (tmp_path / "inference/synthetic_test" / name).is_file(), name
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["model"], run["backbone"]) == ("IMR-CNN", "tf_efficientnet_lite0")
    assert (
        run["finished"]
        and run["device"] == "cpu"
        and run["datasets"].keys() == {f"synthetic_{split}" for split in ("train", "val", "test")}
    )


@pytest.fixture(scope="module")
def recognition_env(tmp_path_factory):
    """An environment with a data set of 60 images in three classes, 15 of them for the test."""
    folder = tmp_path_factory.mktemp("recognition")
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("cancer", "ulcer", "gastritis")):
        (folder / "source" / name).mkdir(parents=True)
        for i in range(20):
            image = rng.integers(0, 120, (48, 48, 3), dtype=np.uint8)
            image[..., channel] += 100
            cv2.imwrite(str(folder / "source" / name / f"{i}.png"), image)
    prepare = ["classification", "--root", str(folder / "source"), "--out"]
    prepare_dataset.main([*prepare, str(folder / "gastric_recognition")])
    return {**os.environ, "IMRCNN_DATASETS": str(folder), "OMP_NUM_THREADS": "1"}


def test_a_classifier_trains_in_phases_in_two_processes(recognition_env, tmp_path):
    phase = "{{'name': '{}', 'iterations': 2, 'lr': 0.003, 'trainable': '{}'}}".format
    common = ("--config-file", "configs/efficientnet_lite0.yaml", "INPUT.SIZE", 48)
    common += ("DATASETS.ROOT", "gastric_recognition")
    common += ("MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", "", "DATALOADER.NUM_WORKERS", 0)
    common += ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0)
    common += ("SOLVER.PHASES", f"[{phase('one', 'head')}, {phase('two', 'all')}]")
    common += ("SOLVER.CHECKPOINTS_TO_KEEP", 9, "OUTPUT_DIR")
    two = ("--num-gpus", 2, "--dist-url", f"tcp://127.0.0.1:{_find_free_port()}")
    output = tmp_path / "run"
    done = start(recognition_env, "tools/train_net.py", *two, *common, output)
    assert done.returncode == 0, done.stdout + done.stderr

    weights = [
        torch.load(output / f"model_{name}.pth", weights_only=True)["model"]
        for name in ("0000000", "0000001", "final")
    ]
    moved = [
        {name for name in a if not torch.equal(a[name], b[name])}
        for a, b in zip(weights, weights[1:], strict=False)
    ]
    assert moved[0] == {"head.weight", "head.bias"}
    assert "backbone.conv_stem.weight" in moved[1] and "backbone.bn1.running_mean" in moved[1]
    test = Path("inference", "gastric_recognition_test")
    metrics = json.loads((output / test / "metrics.json").read_text())
    figures_found = {k: v for k, v in metrics["recognition"].items() if isinstance(v, float)}
    assert np.sum(metrics["confusion_matrix"]["counts"]) == 15, "each image counts once"

    # --eval-only in a single process finds the same.
    again = (*common, tmp_path / "again", "MODEL.WEIGHTS", output / "model_best.pth")
    done = start(recognition_env, "tools/train_net.py", "--eval-only", *again)
    assert done.returncode == 0, done.stdout + done.stderr
    second = json.loads((tmp_path / "again" / test / "metrics.json").read_text())
    assert {k: second["recognition"][k] for k in figures_found} == pytest.approx(figures_found)
    assert second["confusion_matrix"] == metrics["confusion_matrix"]


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
    with pytest.raises((InterruptedError, SystemExit)):
        train.run(train.argument_parser().parse_args(options))
    assert all(not path or Path(path).is_file() for path in logged) and logged
