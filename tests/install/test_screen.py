"""What a command shows of its libraries: no warning, and no bar in a log."""

import io
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from processes import ROOT

from imrcnn_d2.utils import progress

SMALL = (
    """INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 MODEL.DEVICE cpu SOLVER.MAX_ITER 2
    SOLVER.IMS_PER_BATCH 2 MODEL.TIMM.WEIGHTS""".split()
    + [""]
)


def imrcnn(*command, options=(), **variables):
    """Run a command as a user does, in a new interpreter."""
    start = [sys.executable, *options, "-m", "imrcnn", *map(str, command)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(start, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_no_warning_from_preparing_to_comparing(tmp_path):
    data, run = tmp_path / "synthetic", tmp_path / "run"
    gt, scored = data / "annotations/test.json", run / "inference/synthetic_test"
    for command in (
        ("prepare-dataset", "synthetic", "--out", data, "--num-images", 20, "--size", 96),
        ("audit-dataset", "--dataset", "synthetic", "--output", tmp_path / "audit"),
        ("train", "--config-file", "imrcnn_lite.yaml", "--data", data, *SMALL, "OUTPUT_DIR", run),
        ("train", "--config-file", "imrcnn_lite.yaml", "--data", data, "--num-gpus", 2, *SMALL)
        + ("SEED", 1, "OUTPUT_DIR", tmp_path / "second"),
        ("predict", "--weights", run / "model_best.pth", "--input", data / "images")
        + ("--output", tmp_path / "found"),
        ("evaluate", "--gt", gt, "--dt", scored / "coco_instances_results.json")
        + ("--output", tmp_path / "scores"),
        ("robustness", "--weights", run / "model_best.pth", "--dataset", "synthetic_test")
        + ("--distortions", "jpeg", "--num-images", 2, "--output", tmp_path / "robustness"),
        ("report", run, "--output", tmp_path / "report.html", "--card", tmp_path / "card.md"),
        ("compare", run, tmp_path / "second", "--output", tmp_path / "comparison"),
    ):
        done = imrcnn(*command, IMRCNN_DATASETS=str(tmp_path))
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        for text in ("Warning", "warnings.warn", "deprecated", "torch/fx", "%|"):
            assert text not in done.stdout + done.stderr, (command, done.stderr)


@pytest.mark.slow
def test_who_asks_for_warnings_sees_them():
    for options, variables in (((), {"PYTHONWARNINGS": "default"}), (("-W", "default"), {})):
        done = imrcnn("compare", options=options, **variables)
        assert done.returncode == 2 and "Warning" in done.stderr, done.stderr


@pytest.mark.slow
def test_the_import_of_the_package_leaves_filters_alone():
    code = """import warnings, detectron2.engine, PIL.Image, sklearn, pycocotools, timm, cv2
before = set(warnings.filters)
import imrcnn_d2, os
print([f for f in warnings.filters if f not in before], os.environ.get("PYTHONWARNINGS"))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("('ignore'") == done.stdout.count("pydicom") == 1, done.stdout
    assert "None]" not in done.stdout and done.stdout.endswith("] None\n"), done.stdout


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("seconds", "lines"), [(59, 0), (61, 1), (200, 3)])
def test_a_log_gets_a_line_a_minute(monkeypatch, seconds, lines):
    clock = itertools.count()  # a second at each look
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    written = progress._Log()
    while next(clock) < seconds:
        written.write("Looking")
    assert log.getvalue().count("Looking\n") == lines, log.getvalue()


def test_a_log_has_no_bar(monkeypatch):
    monkeypatch.setattr(progress._Log, "PERIOD", 0)
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    for _ in (bar := progress.tqdm(range(100), desc="Looking", mininterval=0)):
        bar.set_postfix(found=1)
    lines = log.getvalue().splitlines()
    assert len(lines) > 99 and "\r" not in log.getvalue()
    assert all(line.startswith("Looking") for line in lines)


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    list(progress.tqdm(range(10), mininterval=0))
    assert terminal.getvalue().count("\r") > 5
