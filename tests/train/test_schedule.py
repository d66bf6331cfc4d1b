"""Epochs, optimizers, and phases: what learns is what is named, and a resume changes nothing."""

import copy
import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from torch import nn

from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.engine import Trainer, load_config, schedule
from imrcnn_d2.modeling import ImageClassifier

from .conftest import changed, load
from .test_chaos import facts

HEAD = {"name": "one", "iterations": 2, "lr": 0.01, "trainable": "head"}
ALL = {"name": "two", "iterations": 2, "lr": 0.001, "trainable": "all"}


def test_epochs_become_iterations(tiny_cfg):
    assert schedule.resolve_epochs(tiny_cfg) is tiny_cfg
    tiny_cfg.merge_from_list(
        "SOLVER.MAX_EPOCHS 10 SOLVER.IMS_PER_BATCH 4 SOLVER.STEPS (5,8) SOLVER.WARMUP_ITERS 1 "
        "SOLVER.CHECKPOINT_PERIOD 3 TEST.EVAL_PERIOD 2".split()
    )
    tiny_cfg.freeze()
    cfg = schedule.resolve_epochs(tiny_cfg)
    # 6 images in batches of 4 are 1.5 iterations an epoch, rounded up once, at the end.
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (15, (8, 12), 2)
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (5, 3)
    assert cfg.is_frozen() and tiny_cfg.SOLVER.MAX_ITER == 4
    assert schedule.resolve_epochs(cfg) is cfg
    assert Trainer(tiny_cfg).max_iter == 15


def test_phases_in_epochs(tiny_classifier_cfg):
    phases = [{"name": n, "epochs": 1, "lr": 0.01, "trainable": "head"} for n in "abc"]
    tiny_classifier_cfg.SOLVER.update(PHASES=phases, IMS_PER_BATCH=3)
    cfg = schedule.resolve_epochs(tiny_classifier_cfg)
    # 8 images: 3 epochs are 8 iterations, and each phase ends where its epochs do.
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.CHECKPOINT_PERIOD) == (8, 0, 3)
    spans = {"a": (0, 3), "b": (3, 3), "c": (6, 2)}
    expected = [schedule.Phase(name, *span, 0.01, "head") for name, span in spans.items()]
    assert (
        schedule.read_phases(cfg.SOLVER.PHASES) == expected and schedule.resolve_epochs(cfg) is cfg
    )
    phases[1]["epochs"] = 0.1
    with pytest.raises(ValueError, match="0.1 epochs of phase 'b'"):
        schedule.resolve_epochs(tiny_classifier_cfg)


def test_new_layers_learn_faster(tiny_cfg):
    tiny_cfg.merge_from_list(["SOLVER.BASE_LR", 0.5, "SOLVER.NEW_LAYER_LR_FACTOR", 4.0])
    model = build_model(tiny_cfg)
    groups = schedule.build_optimizer(tiny_cfg, model).param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    new = ("backbone.pan_", "backbone.cbam", "roi_heads.box_predictor.")
    new += ("roi_heads.mask_head.predictor.",)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[parameter] == (2.0 if name.startswith(new) else 0.5), name
    factor = schedule.new_layer_lr_factor(4.0)
    others = ("head.cls_score.weight", "head.weight", "head.bbox_pred.weight", "spandex.weight")
    assert [factor(name) for name in others] == [4.0, 4.0, 1.0, 1.0]


def stepped(build, loss, steps=1, **solver):
    """A layer of ones after steps of the optimizer that is built with these SOLVER keys."""
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.merge_from_list([x for key, value in solver.items() for x in (f"SOLVER.{key}", value)])
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = build(cfg, model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model.weight).backward()
        optimizer.step()
    return model.weight


def square(weight):
    return (weight**2).sum()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_steps_as_detectron2s(momentum):
    keys = {"BASE_LR": 0.1, "MOMENTUM": momentum, "WEIGHT_DECAY": 0.01}
    built = schedule.build_optimizer, detectron2_build_optimizer
    assert torch.equal(*(stepped(build, square, 3, **keys) for build in built))


def test_adamw_takes_the_step_of_its_formula():
    # First step of AdamW: p <- p (1 - lr wd) - lr g / (|g| + eps), here g = 2 p = 2.
    keys = {"OPTIMIZER": "ADAMW", "BASE_LR": 0.1, "WEIGHT_DECAY": 0.01}
    weight = stepped(schedule.build_optimizer, square, **keys)
    assert weight.tolist() == [pytest.approx([1 * (1 - 0.1 * 0.01) - 0.1] * 3)]
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER .*'LION'"):
        stepped(schedule.build_optimizer, square, OPTIMIZER="LION")


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_gradients_are_clipped(name):
    clip = {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 0.5}
    keys = {f"CLIP_GRADIENTS.{key}": value for key, value in clip.items()}
    weight = stepped(
        schedule.build_optimizer, lambda weight: (100 * weight).sum(), OPTIMIZER=name, **keys
    )
    assert weight.grad.norm() == pytest.approx(0.5, rel=1e-4)


def train(cfg, trainer_class=Trainer):
    """The initial state, after the training."""
    torch.manual_seed(0)  # as SEED in the scripts
    trainer = trainer_class(cfg)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    return start


def test_each_phase_changes_exactly_what_it_names(tiny_classifier_cfg, tmp_path, caplog):
    rates = []

    class Watching(Trainer):
        def run_step(self):
            rates.append({group["lr"] for group in self.optimizer.param_groups})
            super().run_step()

    caplog.set_level(logging.INFO)
    tiny_classifier_cfg.SOLVER.WARMUP_ITERS = 0
    tiny_classifier_cfg.TEST.EVAL_PERIOD = 1  # an evaluation puts all back into training mode
    start = train(tiny_classifier_cfg, Watching)
    files = (tmp_path / "output" / f"model_{name}.pth" for name in ("0000002", "final"))
    middle, end = (load(file)["model"] for file in files)
    assert changed(start, middle) == {"head.weight", "head.bias"}, "and no statistics of norms"
    # blocks.2 ends at stride 8: what comes after makes the maps of stride 16 and 32.
    below = ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.", "blocks.2.")
    frozen = {n for n in start if n.startswith((*(f"backbone.{part}" for part in below), "pixel_"))}
    assert changed(middle, end) == set(start) - frozen
    assert "backbone.blocks.3.0.bn1.running_mean" in changed(middle, end)
    assert "0.00 of 3.37 million parameters" in caplog.text
    # Half a cosine over three iterations: 1, 3/4 and 1/4 of the phase's rate.
    expected = [0.01, 0.0075, 0.0025, 0.001, 0.00075, 0.00025]
    assert [rate for (rate,) in rates] == pytest.approx(expected)


@pytest.mark.parametrize("stop", [2, 3, 5])  # inside the first, between them, inside the second
def test_a_resumed_training_is_the_uninterrupted_one(tiny_classifier_cfg, tmp_path, stop):
    class Stopping(Trainer):
        def run_step(self):
            if self.iter == stop:
                raise KeyboardInterrupt
            super().run_step()

    cfg = tiny_classifier_cfg
    cfg.SOLVER.EMA_DECAY = 0.5
    train(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, Stopping)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == stop
    trainer.train()
    whole, resumed = (load(tmp_path / f"{n}/model_final.pth") for n in ("output", "stopped"))
    assert facts(whole) == facts(resumed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "1e-4"}, "2: lr is '1e-4'"),
        ({"lr": 0}, "2: lr is 0"),
        ({"iterations": True}, "2: iterations is True"),
        *[({"trainable": t}, f"2: trainable is {t!r}") for t in ("stages from", "", 4, None)],
        ({"freeze": 1}, "phase 2 .*'freeze': 1"),
        ({"name": "one"}, "PHASES .*'one'"),
    ],
)
def test_a_wrong_phase_is_refused(change, message):
    assert schedule.check_phases([HEAD, ALL]) == "iterations"
    with pytest.raises(ValueError, match=message):
        schedule.check_phases([HEAD, {**ALL, **change}])


def test_what_does_not_fit_the_model_or_job_is_refused(tiny_classifier_cfg):
    solver = tiny_classifier_cfg.SOLVER
    solver.REFERENCE_WORLD_SIZE = 4
    with pytest.raises(ValueError, match="REFERENCE_WORLD_SIZE is 4"):
        Trainer(tiny_classifier_cfg)
    solver.update(REFERENCE_WORLD_SIZE=0, PHASES=[{**HEAD, "trainable": "stages from 7"}])
    with pytest.raises(ValueError, match=r"stages \[1, 2, 3, 4, 5\]"):
        Trainer(tiny_classifier_cfg)


def named(model, *prefixes):
    return {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(prefixes)}


R50, LITE = "mrcnn_R_50", "imrcnn_lite"


@pytest.mark.parametrize(
    ("config", "trainable", "stages"),
    [
        (R50, "head", []),
        (R50, "stages from 5", ["res5"]),
        (R50, "stages from 4", ["res4", "res5"]),
        (R50, "stages from 2", ["res3", "res4", "res5"]),  # stem and res2 are frozen
        (R50, "all", [""]),
        (LITE, "head", []),
        (LITE, "stages from 5", ["body.blocks.5.", "body.blocks.6."]),
    ],
)
def test_stages_of_detectors(tiny_opts, config, trainable, stages):
    model = build_model(load_config(f"configs/{config}.yaml", tiny_opts))
    neck = tuple(f"backbone.{part}" for part in ("fpn_", "pan_", "cbam"))  # new as the heads are
    backbone = (f"backbone.bottom_up.{stage}" for stage in stages)
    expected = named(model, *neck, "proposal_generator.", "roi_heads.", *backbone)
    assert schedule.trainable_parameters(model, trainable) == expected


@pytest.mark.parametrize(
    ("name", "below", "first"),
    [
        # The layers in the order in which an image passes them; those below stage 4, then one more.
        ("resnet18", ["conv1", "bn1", "layer1", "layer2"], "layer3"),
        ("convnext_atto", ["stem", "stages.0", "stages.1"], "stages.2"),
        ("densenet121", ["features.conv0", "features.norm0", "features.denseblock1"], None),
    ],
)
def test_stages_of_classifiers(name, below, first):
    model = ImageClassifier(name, 3)
    chosen = schedule.trainable_parameters(model, "stages from 4")
    frozen = named(model, *(f"backbone.{layer}." for layer in below))
    assert frozen and not frozen & chosen and named(model, "head.") < chosen
    if first:
        assert named(model, f"backbone.{first}.") <= chosen
        assert frozen == named(model, "") - chosen
