"""A training run from its first iteration to its metrics, on a few small images."""

import hashlib
import json
import math
import os
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from imrcnn_d2.engine import Trainer
from imrcnn_d2.engine.run_record import config_sha256

from .conftest import changed, load
from .test_chaos import facts
from .test_checkpoint import flip_a_bit


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def weights(output):
    """A function: stem of a file -> the state of a model in it."""
    return lambda stem: load(output / f"{stem}.pth")["model"]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def scripted(tiny_cfg):
    """A function: a trainer whose validations give these scores, and whose test gives 0."""

    def make(*scores, resume=False):
        remaining = list(scores)

        class ScriptedTrainer(Trainer):
            @classmethod
            def evaluate(cls, given, model, split, weights=None):
                return {"lesion": {"selection": remaining.pop(0) if split == "val" else 0.0}}, {}

        trainer = ScriptedTrainer(tiny_cfg)
        trainer.resume_or_load(resume)
        trainer.remaining = remaining
        return trainer

    return make


def test_what_a_run_leaves(tiny_cfg, tiny_datasets, output, weights):
    evaluated = []

    class Watching(Trainer):
        @classmethod
        def build_test_loader(cls, cfg, dataset_name):
            evaluated.append(dataset_name)
            return super().build_test_loader(cfg, dataset_name)

    trainer = Watching(tiny_cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()

    assert set(results) >= {"bbox", "segm", "lesion", "image"}
    assert all(type(v) is float for group in results.values() for v in group.values())
    assert evaluated.count(tiny_datasets["test"]) == 1 and evaluated[-1] == tiny_datasets["test"]
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    test_folder = output / "inference" / tiny_datasets["test"]
    for name in ("per_image.csv", "pr_curve.csv"):
        assert (test_folder / name).is_file(), name
    metrics = read(test_folder / "metrics.json")
    assert metrics["image"]["TN"] + metrics["image"]["FP"] == 1, "image 3 of 5 has no lesion"
    assert not changed(weights("model_best"), trainer.model.state_dict())
    logged = (output / "metrics.json").read_text()
    assert "lesion/selection" in logged and "total_loss" in logged
    events = EventAccumulator(str(output), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"], "no sample predictions for TensorBoard"

    run = read(output / "run.json")
    expected = {"model": "IMR-CNN", "backbone": "tf_efficientnet_lite0", "seed": 0}
    expected |= {"device": "cpu", "iterations": 4, "config_sha256": config_sha256(tiny_cfg)}
    expected |= {"splits_sha256": None, "fold": None}
    assert {key: run[key] for key in expected} == expected
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run["command"].startswith("python ") and sys.argv[-1] in run["command"]
    start, end = (datetime.fromisoformat(run[key]) for key in ("started", "finished"))
    assert 0 < run["hours"] * 3600 <= (end - start).total_seconds() + 1
    counts = {"train": (6, 2, 4), "val": (4, 1, 3), "test": (5, 1, 4)}  # a disc in two of three
    assert list(run["datasets"]) == [tiny_datasets[split] for split in counts]
    for split, expected in counts.items():
        data = run["datasets"][tiny_datasets[split]]
        assert (data["images"], data["lesion_free_images"], data["lesions"]) == expected
        assert data["gt_sha256"] == hashlib.sha256(Path(data["gt"]).read_bytes()).hexdigest()
        assert data["patients"] is data["rejected"] is None


@pytest.mark.parametrize(
    ("scores", "kept"),
    [((50.0, 40.0), 1), ((40.0, 50.0), 3), ((25.0, 25.0), 3), ((math.nan, math.nan), None)],
)
def test_the_best_weights_are_kept_and_tested(scripted, output, weights, scores, kept):
    output.mkdir()
    (output / "model_best.pth").write_bytes(b"of an earlier run")
    trainer = scripted(*scores)
    trainer.train()
    saved = {i: weights(f"model_000000{i}") for i in (1, 3)}
    assert changed(saved[1], saved[3])
    assert not changed(saved[kept or 3], trainer.model.state_dict()), "other weights were tested"
    if kept:
        assert not changed(weights("model_best"), saved[kept])
    final = load(output / "model_final.pth")
    assert not changed(final["model"], saved[3])
    state = {"best_score": max(scores) if kept else None, "best_iter": kept}
    assert final["trainer"]["hooks"]["BestCheckpointer"] == state


@pytest.mark.slow
def test_a_resume_keeps_the_best_and_adds_its_hours(scripted, tiny_cfg, output, weights):
    tiny_cfg.SOLVER.MAX_ITER = 2
    scripted(50.0).train()
    first, run = weights("model_best"), read(output / "run.json")
    state = load(output / "model_final.pth")
    record = state["trainer"]["hooks"]["RunRecord"]
    assert record["started"] == run["started"] and 0 < record["hours"] <= run["hours"]
    record.update(started="2000-01-01T00:00:00+00:00", hours=5.0)
    torch.save(state, output / "model_final.pth")

    tiny_cfg.SOLVER.MAX_ITER = 4
    trainer = scripted(45.0, resume=True)
    assert trainer.start_iter == 2
    trainer.train()
    assert not changed(weights("model_best"), first), "a worse validation is kept"
    assert not changed(first, trainer.model.state_dict())
    run = read(output / "run.json")
    assert run["started"] == "2000-01-01T00:00:00+00:00"
    assert 5 < run["hours"] < 5.1 and run["iterations"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [flip_a_bit, os.remove])
@pytest.mark.parametrize("more", [0, 2])
def test_lost_checkpoints(scripted, tiny_cfg, output, weights, caplog, spoil, more):
    scripted(50.0, 40.0).train()
    final = output / "model_final.pth"
    expected = facts(load(final))
    spoil(final)
    scripted(resume=True).train()
    assert facts(load(final)) == expected, "it is written anew"
    spoil(output / "model_best.pth")
    tiny_cfg.SOLVER.MAX_ITER += more
    trainer = scripted(30.0, resume=True)
    trainer.train()
    assert not trainer.remaining, "no validation chose"
    assert "model_best.pth" in caplog.text
    best = load(output / "model_best.pth")
    assert (best["best_score"], best["best_iter"]) == (30.0, 3 + more)
    assert not changed(best["model"], weights("model_final"))
    assert (output / "model_best.pth.damaged").is_file() == (spoil is flip_a_bit)


def test_bf16_and_channels_last_train_on_the_cpu(tiny_cfg):
    tiny_cfg.SOLVER.AMP.ENABLED = tiny_cfg.MODEL.CHANNELS_LAST = True
    tiny_cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(tiny_cfg)
    backbone = trainer.model.backbone
    weight, before = backbone.fpn_output2.weight, backbone.fpn_output2.weight.detach().clone()
    stem = backbone.bottom_up.body.conv_stem.weight
    assert stem.is_contiguous(memory_format=torch.channels_last)
    trainer.train()
    assert torch.isfinite(weight).all() and not torch.equal(before, weight)


def test_the_average_of_the_weights_is_validated_kept_and_tested(
    scripted, tiny_cfg, output, weights
):
    tiny_cfg.SOLVER.EMA_DECAY = 0.5
    trainer = scripted(40.0, 50.0)
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    final, averaged = load(output / "model_final.pth"), weights("model_best")
    assert changed(start, final["model"]) == changed(averaged, final["model"]) != set()
    state = final["trainer"]["hooks"]["EMA"]
    assert not changed(averaged, {k: state[f"module.{k}"] for k in averaged})
    assert not (output / "model_ema.pth").exists()


def test_without_validation_the_last_average_is_tested_and_written(tiny_cfg, output, weights):
    tiny_cfg.SOLVER.EMA_DECAY = 0.5
    tiny_cfg.DATASETS.VAL = ()
    assert "lesion" in Trainer(tiny_cfg).train()
    assert not (output / "model_best.pth").exists()
    assert changed(weights("model_ema"), weights("model_final"))
    (metrics,) = output.glob("inference/*/metrics.json")
    assert read(metrics)["meta"]["checkpoint"].endswith("model_ema.pth")


def test_a_run_that_breaks_has_no_end(tiny_cfg, output):
    class Breaking(Trainer):
        def run_step(self):
            raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        Breaking(tiny_cfg).train()
    run = read(output / "run.json")
    assert run["started"] and run["finished"] is None


@pytest.mark.parametrize(
    ("config", "key", "number", "fitting"),
    [("tiny_cfg", "ROI_HEADS", 80, 1), ("tiny_classifier_cfg", "CLASSIFIER", 4, 3)],
)
def test_a_wrong_number_of_classes_is_reported(request, config, key, number, fitting):
    cfg = request.getfixturevalue(config)
    cfg.MODEL[key].NUM_CLASSES = number
    cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS = None
    with pytest.raises(ValueError, match=f"{key}.NUM_CLASSES is {number}; .* {fitting}$"):
        Trainer(cfg)
