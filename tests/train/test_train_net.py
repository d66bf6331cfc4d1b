"""The training scripts as a user starts them, on a prepared data set."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_script
from recognition_runs import draw_classes

from imrcnn_d2.cli import predict, prepare_dataset, report, train
from imrcnn_d2.engine.launch import locked_output
from imrcnn_d2.evaluation.output import read_test_log

from .conftest import changed, load

YAML = "configs/imrcnn_lite.yaml"
LAZY = "configs/lazy/imrcnn_lite.py"
TEST = "inference/synthetic_test"
CPU = ("MODEL.DEVICE", "cpu")
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("DATASETS.ROOT", "synthetic", "DATALOADER.NUM_WORKERS", "0"),
    *(*CPU, "MODEL.TIMM.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "1"),
]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """An environment with a small data set of lesions and one of classes."""
    folder, source = (tmp_path_factory.mktemp(name) for name in ("datasets", "source"))
    draw_classes(source, (20, 20, 20))
    synthetic = f"synthetic --out {folder}/synthetic --num-images 20 --size 96"
    classes = f"classification --root {source} --out {folder}/gastric_recognition"
    for command in (synthetic, classes):
        prepare_dataset.main(command.split())
    return {**os.environ, "IMRCNN_DATASETS": str(folder), "OMP_NUM_THREADS": "1"}


def start(env, *command, script="train_net.py", fails=False):
    done = run_script(f"tools/{script}", "--config-file", *command, env=env)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def training(env, tmp_path_factory):
    """A training run: its output folder, and what it printed."""
    output = tmp_path_factory.mktemp("run")
    return output, start(env, YAML, *SMALL, "OUTPUT_DIR", output).stdout


@pytest.fixture(scope="module")
def trained(training):
    return training[0]


@pytest.mark.slow
@pytest.mark.story
def test_training_writes_what_it_found(trained, env):
    truth = json.loads(Path(env["IMRCNN_DATASETS"], "synthetic/annotations/test.json").read_text())
    metrics = read(trained / TEST)
    with_lesion = {a["image_id"] for a in truth["annotations"]}
    for group, number in (("image", len(with_lesion)), ("lesion", len(truth["annotations"]))):
        assert metrics[group]["TP"] + metrics[group]["FN"] == number, group
    assert metrics["meta"]["images"] == len(truth["images"]) == 5
    for name in ("per_image.csv", "pr_curve.png", "contact_sheet.png"):
        assert (trained / TEST / name).stat().st_size > 0, name


@pytest.mark.slow
@pytest.mark.story
def test_the_end_of_a_training_is_what_to_look_at_and_run_next(training):
    output, printed = training
    for text in ("copypaste", "Running with full config", "GeneralizedRCNN("):
        assert text not in printed, text
    log = (output / "log.txt").read_text()
    assert "copypaste" in log and "MAX_ITER: 2" in log
    assert len(printed.splitlines()) < 60, printed
    # One line says what is trained; the losses follow, and a table of the metrics ends it.
    (first,) = (line for line in printed.splitlines() if "Training IMR-CNN" in line)
    for text in (
        "tf_efficientnet_lite0",
        "cpu",
        "fp32",
        "2 per iteration",
        "0 to 2",
        str(output),
    ):
        assert text in first, first
    metrics, end = read(output / TEST), printed.partition("synthetic_test: 5 images")[2]
    point = metrics["tau_val"]
    assert "synthetic_val" in end and f"{point['tau']:.3g}" in end
    low, high = point["lesion"]["recall_ci"]
    row = rf"lesion recall +{point['lesion']['recall']:.1f} +\[{low:.1f}, {high:.1f}\]"
    assert re.search(row, end), end
    for path in (output / "model_best.pth", (output / TEST).parent):
        assert str(path) in end
    commands = re.findall(r"imrcnn (\w+) (.*)", end)
    assert [name for name, _ in commands] == ["report", "predict"]
    report.argument_parser().parse_args(shlex.split(commands[0][1]))
    predict.argument_parser().parse_args(shlex.split(commands[1][1]))


@pytest.mark.slow
def test_eval_only_repeats_the_metrics(trained, env):
    best, again = trained / "model_best.pth", trained / "again"
    command = (YAML, "--eval-only", *SMALL, "MODEL.WEIGHTS", best, "OUTPUT_DIR", again)
    log = start(env, *command).stdout
    before, after = read(trained / TEST), read(again / TEST)
    assert f"score ≥ {before['tau_val']['tau']:.3g} (tau_val: stored in the weights" in log
    assert before["tau_val"]["dataset"] == "synthetic_val"
    assert after["meta"]["checkpoint"] == str(best)
    logged = read_test_log(Path(env["IMRCNN_DATASETS"], "synthetic/annotations/test.json"))[-1]
    assert logged["sha256"] == after["meta"]["checkpoint_sha256"]
    assert logged["output"] == str(again / TEST)
    assert not (again / "run.json").exists(), "nothing was trained"
    record = json.loads((trained / "run.json").read_text())
    for key in ("model", "backbone"):  # which the config names by their parts only
        assert after["meta"][key] == record[key]
    assert len(before) > 4 and {**before, "meta": None} == {**after, "meta": None}

    impossible = ("TEST.EXPECTED_RESULTS", "[['lesion', 'fp_per_image', -5.0, 0.1]]")
    assert "verification failed" in start(env, *command, *impossible, fails=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_what_is_refused_is_one_line(env, tmp_path, number):
    nowhere = {**env, "IMRCNN_DATASETS": str(tmp_path)}
    for where, opts, message in (
        (env, ("MODEL.LOAD_PROPOSALS", "True", *CPU), "train: MODEL.LOAD_PROPOSALS is True"),
        (env, ("DATASETS.TRAIN", "('kvasr_seg_train',)", *CPU), "'kvasr_seg_train'"),
        (env, (*SMALL, "MODEL.WEIGHTS", tmp_path / "none.pth"), str(tmp_path / "none.pth")),
        (nowhere, SMALL, str(tmp_path / "synthetic")),
        (env, (*SMALL, "MODEL.PAFPN.FORM", "affine"), "train: MODEL.PAFPN.FORM 'affine'"),
    ):
        done = start(where, YAML, "--num-gpus", number, *opts, "OUTPUT_DIR", tmp_path, fails=True)
        assert message in done.stderr and "Traceback" not in done.stderr + done.stdout
        assert "kvasir_seg_train" in done.stderr or "coco_2017_train" not in done.stderr


@pytest.mark.slow
def test_an_image_that_a_loader_s_worker_misses_is_one_line(env, tmp_path):
    data = tmp_path / "synthetic"
    shutil.copytree(Path(env["IMRCNN_DATASETS"], "synthetic"), data)
    for path in (data / "images").iterdir():
        path.unlink()
    env = {**env, "IMRCNN_DATASETS": str(tmp_path)}
    opts = [*SMALL, "DATALOADER.NUM_WORKERS", "1", "OUTPUT_DIR", tmp_path / "run"]
    done = start(env, YAML, *opts, fails=True)
    assert str(data / "images") in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
def test_a_training_of_version_0_1_is_evaluated_but_not_resumed(env, trained, tmp_path):
    text = (trained / "config.yaml").read_text()
    assert "    FORM: panet\n" in text and "    GATE: sigmoid\n" in text
    old = text.replace("    FORM: panet\n", "    ACTIVATION: ''\n    INIT: identity\n")
    old = old.replace("    GATE: sigmoid\n", "    GATE: double_sigmoid\n")
    weights = load(trained / "model_best.pth")
    for key in ("neck_form", "artifact", "config", "classes"):
        del weights[key]
    torch.save(weights, tmp_path / "model_best.pth")
    torch.save(weights, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(old)
    best = ("MODEL.WEIGHTS", tmp_path / "model_best.pth", "OUTPUT_DIR", tmp_path / "evaluated")
    start(env, tmp_path / "config.yaml", "--eval-only", *SMALL, *best)
    assert "FORM: affine" in (tmp_path / "evaluated" / "config.yaml").read_text()
    for config, named in ((YAML, f"{tmp_path}/config.yaml"), (tmp_path / "config.yaml", "affine")):
        done = start(env, config, "--resume", *SMALL, "OUTPUT_DIR", tmp_path, fails=True)
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("imrcnn train:"))
        assert named in line and "Traceback" not in done.stderr
    assert load(tmp_path / "model_final.pth").keys() == weights.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"), [("log.txt", signal.SIGINT), ("model_final.pth", signal.SIGTERM)]
)
def test_a_request_before_or_after_the_iterations(env, tmp_path, moment, number):
    command = (YAML, "--resume", *SMALL, "OUTPUT_DIR", str(tmp_path / "run"))
    log, script = tmp_path / "log.txt", ("tools/train_net.py", "--config-file", *command)
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *script], env=env, stdout=file, stderr=file)
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
def test_a_folder_of_another_job_is_left_alone(tmp_path, monkeypatch, config, arguments):
    monkeypatch.setattr("imrcnn_d2.engine.launch.LOCK_TIMEOUT", 0)
    key = (f"train.output_dir={tmp_path}",) if config == LAZY else ("OUTPUT_DIR", str(tmp_path))
    command = ["--config-file", config, "--data", "synthetic", *arguments, *key]
    args = train.argument_parser().parse_args(command)
    with locked_output(str(tmp_path)), pytest.raises(SystemExit, match=str(tmp_path)):
        train.run(args)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.slow
def test_the_lazy_script_trains(env, tmp_path, lazy_opts):
    opts = [*lazy_opts, "train.max_iter=1", f"train.output_dir={tmp_path}"]
    start(env, LAZY, "--data", "synthetic", *opts, script="lazyconfig_train_net.py")
    for name in ("metrics.json", "pr_curve.png", "contact_sheet.png"):
        assert (tmp_path / TEST / name).is_file(), name
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["model"], run["backbone"]) == ("IMR-CNN", "tf_efficientnet_lite0")
    assert run["finished"] and run["device"] == "cpu"
    assert run["datasets"].keys() == {f"synthetic_{split}" for split in ("train", "val", "test")}


@pytest.mark.slow
def test_a_classifier_trains_in_phases_in_two_processes(env, tmp_path):
    phase = "{{'name': '{}', 'iterations': 2, 'lr': 0.003, 'trainable': '{}'}}".format
    config = "configs/efficientnet_lite0.yaml"
    opts = [
        *("INPUT.SIZE", 48, "DATASETS.ROOT", "gastric_recognition", "DATALOADER.NUM_WORKERS", 0),
        *("MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", 8),
        *("SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINTS_TO_KEEP", 9),
        *("SOLVER.PHASES", f"[{phase('one', 'head')}, {phase('two', 'all')}]", "OUTPUT_DIR"),
    ]
    output, again = tmp_path / "run", tmp_path / "again"
    start(env, config, "--num-gpus", 2, *opts, output)
    names = "0000000", "0000001", "final"
    first, second, third = (load(output / f"model_{name}.pth")["model"] for name in names)
    assert changed(first, second) == {"head.weight", "head.bias"}
    assert changed(second, third) > {"backbone.conv_stem.weight", "backbone.bn1.running_mean"}
    seen = [load(path)["training_images"] for path in output.glob("*.pth")]
    assert len(seen) > 3 and all(images == seen[0] and images for images in seen)

    # --eval-only in a single process finds the same.
    start(env, config, "--eval-only", *opts, again, "MODEL.WEIGHTS", output / "model_best.pth")
    test = Path("inference", "gastric_recognition_test")
    metrics, repeated = read(output / test), read(again / test)
    assert np.sum(metrics["confusion_matrix"]["counts"]) == 15, "each image counts once"
    assert repeated["confusion_matrix"] == metrics["confusion_matrix"]
    for key, value in metrics["recognition"].items():
        if isinstance(value, float):
            assert repeated["recognition"][key] == pytest.approx(value), key


def test_who_asks_for_a_gpu_never_trains_without(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for config, option in ((YAML, CPU), (LAZY, ("train.device=cpu",))):

        def chosen(*arguments, config=config):
            args = train.argument_parser().parse_args(["--config-file", config, *arguments])
            train._choose_processes(args)
            return args.num_gpus, tuple(args.opts)

        assert chosen() == (1, ())
        assert chosen("--num-gpus", "0") == (1, option)
        assert chosen("--num-gpus", "2", *option) == (2, option)
        with pytest.raises(ValueError, match=f"--num-gpus 0.*{option[0]}"):
            chosen("--num-gpus", "1")


def test_a_misspelt_key_of_a_lazy_config():
    args = ["--config-file", LAZY, "--data", "synthetic", "train.device=cpu"]
    for text, named in (
        *(("train.max_iters=2", "max_iter"), ("trian.max_iter=2", "train")),
        *(("dataloader.trian.x=2", "train"), ("train.max_iter=[2", "'\\[2'")),
        *(("train.max_iter=1,2", "type"), ("~train.amp", "deletion")),
    ):
        with pytest.raises(ValueError, match=rf"^.*{re.escape(text)}: .*{named}[^\n]*$"):
            train._lazy_config(train.argument_parser().parse_args([*args, text]))
    added = "model.backbone.bottom_up.weights=''"
    cfg = train._lazy_config(train.argument_parser().parse_args([*args, added]))
    assert cfg.model.backbone.bottom_up.weights == ""
