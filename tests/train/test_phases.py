"""Phases: what learns is what is named, and a resume in any phase changes nothing."""

import copy
import logging

import pytest
import torch

from imrcnn_d2.engine import Trainer
from imrcnn_d2.engine.schedule import (
    Phase,
    check_phases,
    phases_in_iterations,
    read_phases,
    resolve_epochs,
)

HEAD = {"name": "one", "iterations": 2, "lr": 0.01, "trainable": "head"}
ALL = {"name": "two", "iterations": 2, "lr": 0.001, "trainable": "all"}


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def build(cfg, trainer=Trainer):
    torch.manual_seed(0)  # as SEED in the scripts
    return trainer(cfg)


def train(cfg):
    trainer = build(cfg)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    return start, trainer


def test_each_phase_changes_exactly_what_it_names(tiny_classifier_cfg, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    start, trainer = train(tiny_classifier_cfg)
    output = tmp_path / "output"
    middle, end = weights(output / "model_0000002.pth"), weights(output / "model_final.pth")

    assert changed(start, middle) == {"head.weight", "head.bias"}, "and no statistics of norms"

    # blocks.2 ends at stride 8: what comes after makes the maps of stride 16 and 32.
    below = ("backbone.conv_stem.", "backbone.bn1.", "backbone.blocks.0.", "backbone.blocks.1.")
    frozen = {n for n in start if n.startswith((*below, "backbone.blocks.2.", "pixel_"))}
    assert changed(middle, end) == set(start) - frozen
    assert "backbone.blocks.3.0.bn1.running_mean" in changed(middle, end)

    assert "'head' learns at learning rate 0.01, 0.00 of 3.37 million parameters: head.*" in (
        caplog.text
    )
    assert "'stages from 4' learns" in caplog.text


def test_every_phase_has_its_own_learning_rates(tiny_classifier_cfg):
    rates = []

    class Watching(Trainer):
        def run_step(self):
            rates.append({group["lr"] for group in self.optimizer.param_groups})
            super().run_step()

    tiny_classifier_cfg.SOLVER.WARMUP_ITERS = 0
    Watching(tiny_classifier_cfg).train()
    # Half a cosine over three iterations: 1, 3/4 and 1/4 of the phase's rate.
    expected = [0.01, 0.0075, 0.0025, 0.001, 0.00075, 0.00025]
    assert [rate for (rate,) in rates] == pytest.approx(expected)


@pytest.mark.parametrize("stop", [2, 3, 5])  # inside the first, between them, inside the second
def test_a_resumed_training_is_the_uninterrupted_one(tiny_classifier_cfg, tmp_path, stop):
    cfg = tiny_classifier_cfg
    cfg.SOLVER.EMA_DECAY = 0.5
    train(cfg)
    whole = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)

    class Stopping(Trainer):
        def run_step(self):
            if self.iter == stop:
                raise KeyboardInterrupt
            super().run_step()

    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        build(cfg, Stopping).train()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == stop
    trainer.train()
    resumed = torch.load(tmp_path / "stopped" / "model_final.pth", weights_only=True)
    assert not changed(whole["model"], resumed["model"])
    hooks = [state["trainer"]["hooks"] for state in (whole, resumed)]
    assert hooks[0]["LRScheduler"] == hooks[1]["LRScheduler"]
    assert not changed(hooks[0]["EMA"], hooks[1]["EMA"])
    states = [state["trainer"]["_trainer"]["optimizer"]["state"] for state in (whole, resumed)]
    for key, moments in states[0].items():
        assert not changed(moments, states[1][key])


def test_validation_leaves_frozen_statistics_alone(tiny_classifier_cfg, tmp_path):
    tiny_classifier_cfg.TEST.EVAL_PERIOD = 1  # evaluation puts the model back into training mode
    start, _ = train(tiny_classifier_cfg)
    middle = weights(tmp_path / "output" / "model_0000002.pth")
    assert changed(start, middle) == {"head.weight", "head.bias"}


def test_a_detector_trains_in_phases(tiny_cfg, tmp_path):
    tiny_cfg.SOLVER.PHASES = [HEAD, {**ALL, "trainable": "stages from 5"}]
    tiny_cfg.SOLVER.CHECKPOINTS_TO_KEEP = 9
    tiny_cfg.TEST.EVAL_PERIOD = 0
    tiny_cfg.DATASETS.VAL = ()
    start, trainer = train(tiny_cfg)
    output = tmp_path / "output"
    middle, end = weights(output / "model_0000001.pth"), weights(output / "model_final.pth")
    body = "backbone.bottom_up.body."
    moved = changed(start, middle)
    assert moved and not any(name.startswith(body) for name in moved)
    assert "backbone.fpn_lateral2.weight" in moved, "the pyramid is new as the heads are"
    later = {name for name in changed(middle, end) if name.startswith(body)}
    last = (f"{body}blocks.5.", f"{body}blocks.6.")
    assert later and all(name.startswith(last) for name in later)


def test_phases_in_epochs(tiny_classifier_cfg, tiny_class_datasets):
    # 8 images, 4 a batch: 2 iterations an epoch.
    first = {"name": "one", "epochs": 1.5, "lr": 0.01, "trainable": "head"}
    tiny_classifier_cfg.SOLVER.PHASES = [first, {**first, "name": "two", "epochs": 2}]
    cfg = resolve_epochs(tiny_classifier_cfg)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.MAX_EPOCHS) == (7, 0)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 2, "periods are in epochs as well"
    assert read_phases(cfg.SOLVER.PHASES) == [
        Phase("one", 0, 3, 0.01, "head"),
        Phase("two", 3, 4, 0.01, "head"),
    ]
    assert resolve_epochs(cfg) is cfg


def test_phases_end_where_their_epochs_do():
    def iterations(epochs):
        return -(-epochs * 10 // 4)  # 10 images, 4 a batch

    entries = [{"name": n, "epochs": 1, "lr": 1.0, "trainable": "all"} for n in "abc"]
    found = [p["iterations"] for p in phases_in_iterations(entries, iterations)]
    assert found == [3, 2, 3], "their sum is that of 3 epochs, 8, not three times 3"
    with pytest.raises(ValueError, match="0.1 epochs of phase 'b' are less than an iteration"):
        phases_in_iterations([entries[0], {**entries[1], "epochs": 0.1}], iterations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "1e-4"}, "phase 2: lr is '1e-4'; .* write 1.0e-4"),
        ({"lr": 0}, "lr is 0; give a number above 0"),
        ({"iterations": True}, "iterations is True"),
        ({"trainable": "stage 4"}, "phase 2: trainable is 'stage 4'; use 'head', 'stages from k'"),
        ({"freeze": 1}, "takes name, iterations, lr and trainable"),
        ({"name": "one"}, "several phases named 'one'"),
    ],
)
def test_a_wrong_phase_is_named(change, message):
    assert check_phases([HEAD, ALL]) == "iterations"
    with pytest.raises(ValueError, match=message):
        check_phases([HEAD, {**ALL, **change}])


def test_a_stage_that_is_not_there_is_named(tiny_classifier_cfg):
    tiny_classifier_cfg.SOLVER.PHASES = [{**HEAD, "trainable": "stages from 7"}]
    with pytest.raises(ValueError, match=r"the backbone has the stages \[1, 2, 3, 4, 5\]"):
        Trainer(tiny_classifier_cfg)


def test_scaling_by_the_number_of_processes_is_refused(tiny_classifier_cfg):
    tiny_classifier_cfg.SOLVER.REFERENCE_WORLD_SIZE = 4
    with pytest.raises(ValueError, match="REFERENCE_WORLD_SIZE is 4"):
        Trainer(tiny_classifier_cfg)
