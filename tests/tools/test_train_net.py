"""The training scripts as a user starts them, on a prepared data set."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import prepare_dataset
import pytest
from detectron2.engine.launch import _find_free_port
from processes import run_script

from imrcnn_d2.evaluation.test_log import read_test_log

pytestmark = pytest.mark.slow

SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""),
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "1"),
]
YAML = "configs/synthetic/imrcnn_lite.yaml"


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
    for split in ("train", "val", "test"):
        overrides.append(f"dataloader.{split}.dataset.names=synthetic_{split}")
    for split in ("val", "test"):
        overrides.append(f"dataloader.{split}.num_workers=0")
        overrides.append(f"dataloader.{split}.mapper.augmentations.0.short_edge_length=96")
        overrides.append(f"dataloader.{split}_evaluator.dataset_name=synthetic_{split}")
    config = ("--config-file", "configs/lazy/imrcnn_lite.py")
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
