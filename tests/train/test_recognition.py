"""Classifiers in the trainer: what timm and the data decide, and runs of all networks."""

import json
import math

import pytest
import torch

from imrcnn_d2.engine import Trainer, load_config
from imrcnn_d2.engine.config import resolve_class_weights

PHASES = [
    {"name": "one", "iterations": 1, "lr": 0.01, "trainable": "head"},
    # Two, since ResNet's residual branches begin with a factor of 0, and no gradient behind it.
    {"name": "two", "iterations": 2, "lr": 0.001, "trainable": "all"},
]


@pytest.mark.parametrize(
    ("config", "size", "mean"),
    [("inception_v3", 299, 127.5), ("resnet50", 224, 123.675), ("efficientnet_lite0", 224, 127.5)],
)
def test_timm_says_what_images_a_classifier_takes(config, size, mean):
    cfg = load_config(f"configs/{config}.yaml", ["MODEL.DEVICE", "cpu"])
    assert (cfg.INPUT.SIZE, cfg.INPUT.FORMAT) == (size, "RGB")
    assert cfg.MODEL.PIXEL_MEAN[0] == pytest.approx(mean)


def test_a_size_that_is_given_stays_and_detectors_are_left_alone():
    opts = [*("MODEL.DEVICE", "cpu"), *("INPUT.SIZE", 96)]
    assert load_config("configs/resnet50.yaml", opts).INPUT.SIZE == 96
    detector = load_config("configs/mrcnn_R_50.yaml", ["MODEL.DEVICE", "cpu"])
    assert (detector.INPUT.SIZE, detector.INPUT.FORMAT) == (0, "BGR")
    assert detector.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]


def test_balanced_weights_are_inverse_to_the_numbers_of_images(tiny_classifier_cfg):
    tiny_classifier_cfg.freeze()
    cfg = resolve_class_weights(tiny_classifier_cfg)
    # 8 images, of the classes 4, 2 and 2.
    assert cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS == pytest.approx([8 / 12, 8 / 6, 8 / 6])
    assert cfg.is_frozen() and tiny_classifier_cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS == "balanced"
    assert resolve_class_weights(cfg) is cfg


def test_a_wrong_number_of_classes_is_named(tiny_classifier_cfg):
    tiny_classifier_cfg.MODEL.CLASSIFIER.NUM_CLASSES = 4
    tiny_classifier_cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS = None
    with pytest.raises(ValueError, match="has 3 classes .*CLASSIFIER.NUM_CLASSES is 4; set it"):
        Trainer(tiny_classifier_cfg)


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
    opts = [*tiny_classifier_opts, *("INPUT.SIZE", size), *("SOLVER.PHASES", PHASES)]
    cfg = load_config(f"configs/{config}.yaml", opts)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    results = trainer.train()
    assert math.isfinite(results["recognition"]["balanced_accuracy"])
    output = tmp_path / "output"
    middle, end = (
        torch.load(output / f"model_{name}.pth", weights_only=True)["model"]
        for name in ("0000000", "final")
    )
    assert {n for n in start if not torch.equal(start[n], middle[n])} == {
        "head.weight",
        "head.bias",
    }
    constant = {"pixel_mean", "pixel_std"}
    assert {n for n in start if torch.equal(middle[n], end[n])} == constant

    run = json.loads((output / "run.json").read_text())
    assert (run["model"], run["backbone"]) == ("ImageClassifier", config)
    assert run["input"]["size"] == size and run["input"]["format"] == "RGB"
    assert [p["parameters"] for p in run["phases"]] == [
        sum(start[n].numel() for n in ("head.weight", "head.bias")),
        sum(p.numel() for p in trainer.model.parameters()),
    ]
    facts = run["datasets"][tiny_class_datasets["train"]]
    assert facts["classes"] == {"cancer": 4, "ulcer": 2, "gastritis": 2}
    metrics = output / "inference" / tiny_class_datasets["test"] / "metrics.json"
    meta = json.loads(metrics.read_text())["meta"]
    assert meta["checkpoint"].endswith("model_best.pth")


def test_the_best_checkpoint_is_that_of_balanced_accuracy(tiny_classifier_cfg, tmp_path):
    tiny_classifier_cfg.TEST.EVAL_PERIOD = 2
    tiny_classifier_cfg.SOLVER.AMP.ENABLED = True  # bf16, as for detectors
    torch.manual_seed(0)
    trainer = Trainer(tiny_classifier_cfg)
    trainer.train()
    output = tmp_path / "output"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    best = torch.load(output / "model_best.pth", weights_only=True)
    found = [line["recognition/balanced_accuracy"] for line in lines if "total_loss" in line]
    assert best["best_score"] == pytest.approx(max(found))
    assert best["operating_point"] is None
