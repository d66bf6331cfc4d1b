"""A cross-validation as a user starts it: two folds, a few iterations, a run that breaks."""

import fcntl
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from processes import ROOT, run_script

from imrcnn_d2.cli import cross_validate, prepare_dataset
from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.cross_validation import FoldRun
from imrcnn_d2.evaluation.output import read_test_log
from imrcnn_d2.utils.files import read_rows

SUBMITIT = importlib.util.find_spec("submitit") is not None
MODEL = "imrcnn_lite"
OPTS = [
    *("INPUT.MIN_SIZE_TRAIN", "'(64,)'", "INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu"),
    *("MODEL.TIMM.WEIGHTS", "''", "MODEL.FPN.OUT_CHANNELS", "32", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "5"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "2"),
]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """An environment in which a small prepared data set is found."""
    folder = tmp_path_factory.mktemp("datasets")
    prepare = ["synthetic", "--out", str(folder / "synthetic"), "--num-images", "24"]
    prepare_dataset.main([*prepare, "--size", "64"])
    return {**os.environ, "IMRCNN_DATASETS": str(folder), "OMP_NUM_THREADS": "1"}


def command(output, models, *overrides, opts=OPTS):
    return [
        *("tools/cross_validate.py", f"model={models}", "dataset=synthetic", "folds=2"),
        *(f"output={output}", f"opts=[{','.join(opts)}]", *overrides),
    ]


def start(env, *line, **options):
    options |= {"stdout": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen([sys.executable, *line], env=env, **options)


def states(text):
    """{run: state} of the table at the end."""
    rows = [line.split() for line in text.splitlines() if line.startswith("synthetic/")]
    return {row[0]: row[1] for row in rows if not row[0].endswith(":")}


@pytest.fixture(scope="module")
def sweep(env, tmp_path_factory):
    """What a sweep of a sound and a broken model leaves, one run of which was finished before and
    another was killed: folder, process, the killed run.json."""
    output = tmp_path_factory.mktemp("cv")
    jobs = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=60") if SUBMITIT else ()
    done = run_script(*command(output, MODEL, "fold=1", *jobs), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(done.stdout) == {f"synthetic/{MODEL}/seed0/fold1": "finished"}

    fold = output / "synthetic" / MODEL / "seed0" / "fold0"
    process = start(env, *command(output, MODEL, "fold=0"))
    deadline = time.monotonic() + 1800
    while not (fold / "last_checkpoint").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, 9)
    process.wait()
    killed = json.loads((fold / "run.json").read_text())

    broken = output / "broken.yaml"
    broken.write_text('MODEL:\n  BACKBONE:\n    NAME: "build_no_such_backbone"\n')
    return output, run_script(*command(output, f"{broken},{MODEL}", "fold=0"), env=env), killed


def fold_run(output, env, fold, opts=OPTS):
    options = dict(dataset="synthetic", seed=0, fold=fold, folds=2, output=output, num_gpus=1)
    options["config_file"] = Path(f"configs/{MODEL}.yaml").resolve()
    options["opts"] = tuple(value.strip("'") for value in opts)
    return FoldRun(datasets=Path(env["IMRCNN_DATASETS"]), **options)


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.mark.slow
def test_the_broken_runs_are_named_and_the_others_go_on(sweep, env):
    output, done, killed = sweep
    model = output / "synthetic" / MODEL / "seed0"
    assert done.returncode == 1, done.stdout + done.stderr
    assert states(done.stdout) == {
        "synthetic/broken/seed0/fold0": "broken",
        f"synthetic/{MODEL}/seed0/fold0": "finished",
    }, done.stdout + done.stderr
    assert str(output / "synthetic/broken/seed0/fold0/console.log") in done.stdout
    assert "build_no_such_backbone" in done.stdout
    assert "1 of 2 runs are not finished" in done.stdout
    assert f"imrcnn compare {model / 'fold0'}" in done.stdout
    # The killed run was resumed.
    run = json.loads((model / "fold0/run.json").read_text())
    assert killed["finished"] is None and run["finished"] and run["started"] == killed["started"]
    log = (model / "fold0/log.txt").read_text()
    assert re.findall(r"Starting training from iteration (\d)", log) in (["0", "1"], ["0", "2"])
    # Each run sees its fold.
    tested = []
    for i in (0, 1):
        run = json.loads((model / f"fold{i}/run.json").read_text())
        assert run["fold"] == {"index": i, "of": 2}
        gt = Path(run["datasets"]["synthetic_test"]["gt"])
        assert gt.parents[2].name == f"fold{i}" and len(read_test_log(gt)) == 1
        tested += [image["file_name"] for image in json.loads(gt.read_text())["images"]]
    images = os.listdir(Path(env["IMRCNN_DATASETS"], "synthetic", "images"))
    assert sorted(tested) == sorted(images)


@pytest.mark.slow
def test_runs_that_are_not_run_again(sweep, env, caplog):
    """Finished, with other settings, and trained by another process."""
    output, _, _ = sweep
    caplog.set_level("INFO")
    run = fold_run(output, env, 1)
    other = fold_run(output, env, 0, [*OPTS, "SOLVER.BASE_LR", "0.1"])
    assert run.log.read_text().count("$ IMRCNN_DATASETS=") == 1
    before = modified(run.folder), modified(other.folder)
    run.train()
    assert "finished before, not run again" in caplog.text
    assert modified(run.folder) == before[0]
    assert other.state() == "broken"
    other.train()
    assert "trained with other settings or on other data" in caplog.text
    assert fold_run(output, env, 0).state() == "finished"
    changed = {path for path, time in modified(other.folder).items() if before[1][path] != time}
    assert changed == {other.log}
    with open(run.folder / "training.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run.state() == "running"
        run.train()
    assert "another process trains it" in caplog.text
    assert run.state() == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_request_lets_the_training_save(env, tmp_path, send):
    endless = [*OPTS, "SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "100000"]
    process = start(env, *command(tmp_path, MODEL, "fold=0", opts=endless))
    fold = tmp_path / "synthetic" / MODEL / "seed0" / "fold0"
    while not ((fold / "metrics.json").is_file() and (fold / "metrics.json").stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    send(process.pid, signal.SIGTERM)
    assert process.wait(600) == 75
    log = (fold / "console.log").read_text()
    assert "saved after iteration" in log, log
    assert (fold / "last_checkpoint").is_file()


@pytest.mark.slow
def test_each_centre_is_tested_by_the_model_that_had_not_seen_it(env, tmp_path):
    """At the threshold that this model has stored; the page is that of external validation."""
    data = tmp_path / "hospitals"
    folder = Path(env["IMRCNN_DATASETS"], "synthetic")
    table = tmp_path / "centres.csv"
    names = sorted(path.name for path in (folder / "images").iterdir())
    lines = [f"synthetic/{n},{'AB'[int(n[len('patient') :][:3]) % 2]}" for n in names]
    table.write_text("\n".join(["file,centre", *lines]))
    prepare = ["merge", str(folder), "--out", str(data), "--metadata", str(table)]
    prepare_dataset.main(prepare)
    line = command(tmp_path / "cv", MODEL, f"datasets={tmp_path}", "dataset=hospitals")
    line = [a for a in line if a not in ("dataset=synthetic", "folds=2")] + ["folds=centre"]
    done = run_script(*line, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    model = tmp_path / "cv" / "hospitals" / MODEL / "seed0"
    assert str(model / "centre" / "validation.html") in done.stdout
    rows = read_rows(model / "centre" / "centres.csv", ("centre", "figure", "cases"))
    for i, centre in enumerate("AB"):
        inference = model / f"fold{i}" / "inference" / "hospitals_test"
        metrics = json.loads((inference / "metrics.json").read_text())
        tau = (metrics.get("tau_val") or metrics["meta"])["tau"]
        detections = json.loads((inference / "coco_instances_results.json").read_text())
        above = sum(detection["score"] >= tau for detection in detections)
        (precision,) = [
            row for row in rows if row["centre"] == centre and row["figure"] == "lesion/precision"
        ]
        assert int(precision["cases"]) == above
        gt = json.loads(Path(metrics["meta"]["gt"]).read_text())
        assert {image["centre"] for image in gt["images"]} == {centre}


# Stands for `imrcnn train`: notes its process, and never ends by itself.
ENDLESS = """import os, pathlib, time
pathlib.Path("training.pid").write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.story)]
)
def test_no_training_outlives_the_cross_validation(env, tmp_path, number):
    (tmp_path / "imrcnn.py").write_text(ENDLESS)  # `python -m imrcnn` finds it here
    tool, *overrides = command(tmp_path / "cv", MODEL, "fold=0")
    process = start(env, str(ROOT / tool), *overrides, cwd=tmp_path)
    noted = tmp_path / "training.pid"
    while not (noted.is_file() and noted.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert process.wait(60) == (75 if number != signal.SIGKILL else -number)
    deadline = time.monotonic() + 10
    while Path("/proc", noted.read_text()).exists():
        assert time.monotonic() < deadline, "the training goes on"
        time.sleep(0.05)


@pytest.mark.slow
def test_jobs_went_through_submitit(sweep):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert list(sweep[0].glob("sweeps/*/.submitit/*/*_result.pkl"))


@pytest.fixture
def plan(env, tmp_path, monkeypatch):
    """Returns a function: overrides -> the runs that cross_validate.py would make of them."""
    monkeypatch.setenv("IMRCNN_DATASETS", env["IMRCNN_DATASETS"])

    def runs(*overrides):
        line = ["cross_validate.py", *overrides, "dataset=synthetic", f"output={tmp_path}"]
        monkeypatch.setattr(sys, "argv", line)
        return cross_validate.planned_runs()

    return runs


def test_models_seeds_and_folds_are_multiplied(plan, tmp_path):
    runs = plan("model=mrcnn_lite,imrcnn_R_50", "seed=0,3", "folds=3", "hydra/launcher=any")
    assert sorted(run.folder.relative_to(tmp_path).as_posix() for run in runs) == sorted(
        f"synthetic/{model}/seed{seed}/fold{fold}"
        for model in ("mrcnn_lite", "imrcnn_R_50")
        for seed in (0, 3)
        for fold in range(3)
    )
    assert [run.fold for run in plan("fold=2", "folds=3")] == [2]
    (run,) = plan("fold=0", "opts=[SOLVER.STEPS,[1,2],SOLVER.BASE_LR,1e-3]")
    assert load_config(str(run.config_file), run.opts).SOLVER.STEPS == (1, 2)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model=imrcnn_tiny"], "imrcnn_tiny.*mrcnn_R_50"),
        (["fold=5"], "fold=5"),
        (["opts=[SEED,1],[SEED,2]"], "synthetic/imrcnn_lite/seed0/fold0"),
    ],
)
def test_what_cannot_be_run_is_named_before_anything_runs(plan, overrides, named):
    with pytest.raises((FileNotFoundError, ValueError), match=named):
        plan(*overrides)


def test_options_of_hydra(plan, tmp_path, monkeypatch):
    """Those that show something start nothing; with the others it's a sweep as without."""
    folder = tmp_path / "own" / "length"
    folder.mkdir(parents=True)
    (folder / "short.yaml").write_text("# @package _global_\nopts: [SOLVER.MAX_ITER, 7]\n")
    (run,) = plan("--config-dir", str(folder.parent), "+length=short", "fold=0")
    assert load_config(str(run.config_file), run.opts).SOLVER.MAX_ITER == 7
    monkeypatch.setattr(cross_validate, "_cross_validate", swept := Mock())
    monkeypatch.setattr(cross_validate, "application", lambda action: shown)
    for argument, shows in (("--config-dir=x", False), ("-m", False), ("--cfg=job", True)):
        shown = Mock()
        cross_validate.main([argument])
        assert (shown.called, swept.called) == (shows, not shows), argument
        swept.reset_mock()
