"""A training run from its first iteration to its figures, on a few small images."""

import json
import math
import os
from collections import OrderedDict

import pytest
import torch
from detectron2.engine import hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from imrcnn_d2.engine import Trainer
from imrcnn_d2.engine.hooks import BestCheckpointer, EvalHook

from .chaos import facts
from .test_checkpoint import flip_a_bit


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


class ScriptedEvaluator(DatasetEvaluator):
    """Gives the next score of a list, whatever the model predicts."""

    def __init__(self, scores):
        self.scores = scores

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return OrderedDict(lesion={"selection": self.scores.pop(0)})


def scripted_trainer(cfg, scores):
    """A trainer whose validations give the scores, and whose test gives 0."""

    class ScriptedTrainer(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, weights=None):
            return ScriptedEvaluator(scores if dataset_name in cfg.DATASETS.VAL else [0.0])

    return ScriptedTrainer(cfg)


def test_a_run_leaves_weights_figures_and_pictures(tiny_cfg, tiny_datasets, tmp_path):
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()

    output = tmp_path / "output"
    assert set(results) >= {"bbox", "segm", "lesion", "image"}
    assert all(type(v) is float for group in results.values() for v in group.values())
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    test_folder = output / "inference" / tiny_datasets["test"]
    for name in ("metrics.json", "per_image.csv", "pr_curve.csv"):
        assert (test_folder / name).is_file(), name
    metrics = json.loads((test_folder / "metrics.json").read_text())
    assert metrics["image"]["TN"] + metrics["image"]["FP"] == 1, "image 3 of 5 has no lesion"

    # The weights evaluated are the best on the validation set.
    best = weights(output / "model_best.pth")
    assert equal(best, {k: v for k, v in trainer.model.state_dict().items() if k in best})

    logged = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert any("lesion/selection" in line for line in logged)
    assert any("total_loss" in line for line in logged)
    events = EventAccumulator(str(output), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"], "no sample predictions for TensorBoard"


def test_the_best_weights_are_those_of_the_best_validation(tiny_cfg, tmp_path):
    trainer = scripted_trainer(tiny_cfg, [50.0, 40.0])
    trainer.train()
    output = tmp_path / "output"
    after_two = weights(output / "model_0000001.pth")
    assert equal(weights(output / "model_best.pth"), after_two)
    assert not equal(weights(output / "model_final.pth"), after_two)
    assert equal(after_two, trainer.model.state_dict()), "the test saw other than the best weights"
    assert (output / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.slow
def test_the_last_iteration_can_be_the_best(tiny_cfg, tmp_path):
    scripted_trainer(tiny_cfg, [40.0, 50.0]).train()
    output = tmp_path / "output"
    assert equal(weights(output / "model_best.pth"), weights(output / "model_final.pth"))
    state = torch.load(output / "model_final.pth", weights_only=True)["trainer"]["hooks"]
    assert state["BestCheckpointer"] == {"best_score": 50.0, "best_iter": 3}


@pytest.mark.slow
def test_the_best_survives_a_resume(tiny_cfg, tmp_path):
    tiny_cfg.SOLVER.MAX_ITER = 2
    scripted_trainer(tiny_cfg, [50.0]).train()
    output = tmp_path / "output"
    first = weights(output / "model_best.pth")

    tiny_cfg.SOLVER.MAX_ITER = 4
    trainer = scripted_trainer(tiny_cfg, [45.0])
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    trainer.train()
    assert equal(weights(output / "model_best.pth"), first), "a worse validation replaced the best"
    assert equal(first, trainer.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [flip_a_bit, os.remove])
@pytest.mark.parametrize("more", [0, 2])
def test_lost_best_weights_are_chosen_anew(tiny_cfg, tmp_path, caplog, spoil, more):
    scripted_trainer(tiny_cfg, [50.0, 40.0]).train()
    output = tmp_path / "output"
    spoil(output / "model_best.pth")
    tiny_cfg.SOLVER.MAX_ITER += more
    scores = [30.0]
    trainer = scripted_trainer(tiny_cfg, scores)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert not scores, "no validation chose"
    assert "model_best.pth" in caplog.text
    best = torch.load(output / "model_best.pth", weights_only=True)
    assert (best["best_score"], best["best_iter"]) == (30.0, 3 + more)
    assert equal(best["model"], weights(output / "model_final.pth"))
    if spoil is flip_a_bit:
        assert (output / "model_best.pth.damaged").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [flip_a_bit, os.remove])
def test_a_lost_final_checkpoint_is_written_anew(tiny_cfg, tmp_path, spoil):
    scripted_trainer(tiny_cfg, [50.0, 40.0]).train()
    final = tmp_path / "output" / "model_final.pth"
    expected = facts(torch.load(final, weights_only=True))
    spoil(final)
    trainer = scripted_trainer(tiny_cfg, [])
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert facts(torch.load(final, weights_only=True)) == expected


@pytest.mark.slow
def test_another_runs_best_weights_are_not_taken(tiny_cfg, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "model_best.pth").write_bytes(b"of an earlier run")
    trainer = scripted_trainer(tiny_cfg, [math.nan, math.nan])
    trainer.train()
    assert equal(weights(output / "model_final.pth"), trainer.model.state_dict())


def test_validation_comes_before_the_checkpoint(tiny_cfg):
    with EventStorage():
        order = [type(h) for h in Trainer(tiny_cfg)._hooks]
    expected = [EvalHook, BestCheckpointer, hooks.PeriodicCheckpointer, hooks.PeriodicWriter]
    assert [h for h in order if h in expected] == expected


@pytest.mark.slow
def test_the_test_set_is_not_touched_before_the_end(tiny_cfg, tiny_datasets):
    seen = []

    class Watching(Trainer):
        @classmethod
        def build_test_loader(cls, cfg, dataset_name):
            seen.append(dataset_name)
            return super().build_test_loader(cfg, dataset_name)

    Watching(tiny_cfg).train()
    assert seen.count(tiny_datasets["test"]) == 1
    assert seen[-1] == tiny_datasets["test"]


@pytest.mark.slow
def test_without_a_validation_set_the_last_weights_are_tested(tiny_cfg, tmp_path):
    tiny_cfg.DATASETS.VAL = ()
    results = Trainer(tiny_cfg).train()
    assert "lesion" in results
    assert not (tmp_path / "output" / "model_best.pth").exists()


def test_bf16_and_channels_last_train_on_the_cpu(tiny_cfg):
    tiny_cfg.SOLVER.AMP.ENABLED = True
    tiny_cfg.MODEL.CHANNELS_LAST = True
    tiny_cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(tiny_cfg)
    below = trainer.model.backbone.bottom_up.body.conv_stem.weight
    assert below.is_contiguous(memory_format=torch.channels_last)
    weight = trainer.model.backbone.fpn_output2.weight
    before = weight.detach().clone()
    trainer.train()
    assert torch.isfinite(weight).all()
    assert not torch.equal(before, trainer.model.backbone.fpn_output2.weight)


def test_epochs_set_the_length_of_the_run(tiny_cfg):
    tiny_cfg.SOLVER.MAX_EPOCHS = 2  # 6 images, 2 a batch
    tiny_cfg.SOLVER.WARMUP_ITERS = 0
    assert Trainer(tiny_cfg).max_iter == 6


def test_a_wrong_number_of_classes_is_named(tiny_cfg, tiny_datasets):
    tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(ValueError, match="has 1 classes .*NUM_CLASSES is 80; set it to 1"):
        Trainer(tiny_cfg)


@pytest.mark.slow
def test_resuming_a_finished_run_evaluates_it_again(tiny_cfg):
    results = Trainer(tiny_cfg).train()
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    again = trainer.train()
    for group, figures in results.items():
        assert again[group] == pytest.approx(figures, nan_ok=True), group


@pytest.mark.slow
def test_of_equal_validations_the_later_is_kept(tiny_cfg, tmp_path):
    scripted_trainer(tiny_cfg, [25.0, 25.0]).train()
    output = tmp_path / "output"
    assert equal(weights(output / "model_best.pth"), weights(output / "model_final.pth"))


def test_the_average_of_the_weights_is_validated_kept_and_tested(tiny_cfg, tmp_path):
    tiny_cfg.SOLVER.EMA_DECAY = 0.5
    trainer = scripted_trainer(tiny_cfg, [40.0, 50.0])
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    output = tmp_path / "output"
    live, averaged = weights(output / "model_final.pth"), weights(output / "model_best.pth")
    moved = [k for k in live if not torch.equal(live[k], start[k])]
    assert moved and all(not torch.equal(averaged[k], live[k]) for k in moved)
    state = torch.load(output / "model_final.pth", weights_only=True)["trainer"]["hooks"]["EMA"]
    assert equal(averaged, {k: state[f"module.{k}"] for k in averaged})
    assert not (output / "model_ema.pth").exists()


def test_without_validation_the_average_is_left_as_a_file(tiny_cfg, tmp_path):
    tiny_cfg.SOLVER.EMA_DECAY = 0.5
    tiny_cfg.DATASETS.VAL = ()
    Trainer(tiny_cfg).train()
    output = tmp_path / "output"
    assert not equal(weights(output / "model_ema.pth"), weights(output / "model_final.pth"))
    notes = list(output.glob("inference/*/metrics.json"))
    assert json.loads(notes[0].read_text())["meta"]["checkpoint"].endswith("model_ema.pth")
