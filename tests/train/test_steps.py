"""Epochs, optimizers, phases, mixed precision, distributed training, and averaged weights."""

import copy
import json
import logging
import math
import multiprocessing
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.engine import Trainer, load_config, schedule, train_step
from imrcnn_d2.engine.hooks import EMA
from imrcnn_d2.engine.launch import leave_process_groups
from imrcnn_d2.modeling import ImageClassifier

from .conftest import changed, load
from .test_chaos import facts

HEAD = {"name": "one", "iterations": 2, "lr": 0.01, "trainable": "head"}
ALL = {"name": "two", "iterations": 2, "lr": 0.001, "trainable": "all"}


def test_epochs_become_iterations(tiny_cfg):
    assert schedule.resolve_epochs(tiny_cfg) is tiny_cfg
    opts = "SOLVER.MAX_EPOCHS 10 SOLVER.IMS_PER_BATCH 4 SOLVER.STEPS (5,8) SOLVER.WARMUP_ITERS 1"
    tiny_cfg.merge_from_list(f"{opts} SOLVER.CHECKPOINT_PERIOD 3 TEST.EVAL_PERIOD 2".split())
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
    tiny_classifier_cfg.SOLVER.update(PHASES=phases, IMS_PER_BATCH=3, STEPS=(0.5, 1))
    cfg = schedule.resolve_epochs(tiny_classifier_cfg)
    # 8 images: 3 epochs are 8 iterations, and each phase ends where its epochs do.
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.CHECKPOINT_PERIOD) == (8, 0, 3)
    spans = {"a": (0, 3), "b": (3, 3), "c": (6, 2)}
    expected = [schedule.Phase(name, *span, 0.01, "head") for name, span in spans.items()]
    assert schedule.read_phases(cfg.SOLVER.PHASES) == expected
    solvers = [schedule.phase_solver(cfg, phase).SOLVER for phase in expected]
    assert [(s.MAX_ITER, s.STEPS) for s in solvers] == [(3, (2,)), (3, (2,)), (2, ())]
    assert schedule.resolve_epochs(cfg) is cfg
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


def stepped(build, steps=1, **solver):
    """A layer of ones and a norm after steps, down their square, of the optimizer of these keys."""
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.merge_from_list([x for key, value in solver.items() for x in (f"SOLVER.{key}", value)])
    model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[0].bias)
    optimizer = build(cfg, model)
    for _ in range(steps):
        optimizer.zero_grad()
        (nn.utils.parameters_to_vector(model.parameters()) ** 2).sum().backward()
        optimizer.step()
    return model


def test_optimizers_step_as_detectron2s_and_by_their_formula_and_clip():
    keys, build = {"BASE_LR": 0.1, "WEIGHT_DECAY": 0.01}, schedule.build_optimizer
    other = {"WEIGHT_DECAY_NORM": 0.3, "BIAS_LR_FACTOR": 2.0, "WEIGHT_DECAY_BIAS": 0.2}
    clip = {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 2.5}
    clips = [{f"CLIP_GRADIENTS.{key}": value for key, value in clip.items()}]
    clips.append({**clips[0], "CLIP_GRADIENTS.NORM_TYPE": 1.0})
    clips.append({**clips[0], "CLIP_GRADIENTS.CLIP_TYPE": "value"})
    for more in ({"MOMENTUM": 0.0}, {"NESTEROV": True, **other}, *clips):
        models = (stepped(b, 3, **keys, **more) for b in (build, detectron2_build_optimizer))
        torch.testing.assert_close(*(model.state_dict() for model in models))
    # First step of AdamW: p <- p (1 - lr wd) - lr g / (|g| + eps), here g = 2 p = 2.
    weight = stepped(build, OPTIMIZER="ADAMW", **keys)[0].weight
    assert weight.tolist() == [pytest.approx([1 * (1 - 0.1 * 0.01) - 0.1] * 3)]
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER .*'LION'"):
        stepped(build, OPTIMIZER="LION")
    clip = {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 0.5}
    keys = {f"CLIP_GRADIENTS.{key}": value for key, value in clip.items()}
    for name in ("SGD", "ADAMW"):
        weight = stepped(build, OPTIMIZER=name, **keys)[0].weight
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
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):  # as Detectron2 has it
            return super().build_evaluator(cfg, dataset_name, output_folder)

        def run_step(self):
            rates.extend({group["lr"] for group in self.optimizer.param_groups})
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
    assert rates == pytest.approx(expected)
    (tested,) = (tmp_path / "output" / "inference").glob("*test/metrics.json")
    tested = json.loads(tested.read_text())
    assert tested["meta"]["checkpoint_sha256"] and tested["meta"]["bootstrap"]["resamples"]


def test_the_workers_of_a_training_end_with_it(tiny_classifier_cfg, monkeypatch):
    """Also while it is not freed; they ignore signals, and a process waits for them at its end."""
    tiny_classifier_cfg.DATALOADER.NUM_WORKERS = 1
    trainer = Trainer(tiny_classifier_cfg)
    trainer.train()
    assert multiprocessing.active_children() == []

    def stopped(step, *args):
        assert step._next_batches(1) and multiprocessing.active_children()
        raise KeyboardInterrupt

    monkeypatch.setattr(train_step.TrainStep, "choose_precision", stopped)
    tiny_classifier_cfg.OUTPUT_DIR += "/stopped"
    trainer = Trainer(tiny_classifier_cfg)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert multiprocessing.active_children() == []


# Between the phases, and inside the second.
@pytest.mark.parametrize("stop", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_resumed_training_is_the_uninterrupted_one(tiny_classifier_cfg, tmp_path, stop):
    class Stopping(Trainer):
        def run_step(self):
            if self.iter == stop:
                raise KeyboardInterrupt
            super().run_step()

    cfg = tiny_classifier_cfg
    cfg.SOLVER.EMA_DECAY = 0.5
    train(cfg)
    whole = facts(load(tmp_path / "output" / "model_final.pth"))
    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, Stopping)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == stop
    trainer.train()
    assert facts(load(tmp_path / "stopped" / "model_final.pth")) == whole


WRONG = {  # in the second phase: what an error names
    **{"2: lr is '1e-4'": {"lr": "1e-4"}, "2: lr is 0": {"lr": 0}},
    **{"2: iterations is True": {"iterations": True}, "2: iterations is -1": {"iterations": -1}},
    **{f"2: trainable is {t!r}": {"trainable": t} for t in ("stages from", "", 4, None)},
    **{"phase 2 .*'freeze': 1": {"freeze": 1}, "PHASES .*'one'": {"name": "one"}},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_phase_is_refused(message):
    assert schedule.check_phases([HEAD, ALL]) == "iterations" and schedule.check_phases([]) == ""
    with pytest.raises(ValueError, match=message):
        schedule.check_phases([HEAD, {**ALL, **WRONG[message]}])


def test_what_does_not_fit_the_model_or_job_is_refused(tiny_classifier_cfg):
    solver = tiny_classifier_cfg.SOLVER
    solver.REFERENCE_WORLD_SIZE = 4
    with pytest.raises(ValueError, match="REFERENCE_WORLD_SIZE is 4"):
        Trainer(tiny_classifier_cfg)
    solver.update(REFERENCE_WORLD_SIZE=0, PHASES=[{**HEAD, "trainable": "stages from 7"}])
    with pytest.raises(ValueError, match=r"stages \[1, 2, 3, 4, 5\]"):
        Trainer(tiny_classifier_cfg)
    solver.PHASES = []
    trainer = Trainer(tiny_classifier_cfg)
    state = trainer.state_dict()
    assert state["images_per_batch"] == solver.IMS_PER_BATCH
    with pytest.raises(ValueError, match="99 images.*IMS_PER_BATCH"):
        trainer.load_state_dict({**state, "images_per_batch": 99})


def named(model, *prefixes):
    return {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(prefixes)}


R50 = {"head": [], "stages from 5": ["res5"], "stages from 4": ["res4", "res5"], "all": [""]}
R50["stages from 2"] = ["res3", "res4", "res5"]  # stem and res2 are frozen
STAGES = [("mrcnn_R_50", *item) for item in R50.items()] + [("imrcnn_lite", "head", [])]
STAGES += [("imrcnn_lite", "stages from 5", ["body.blocks.5.", "body.blocks.6."])]


@pytest.mark.parametrize(("config", "trainable", "stages"), STAGES)
def test_stages_of_detectors(tiny_opts, config, trainable, stages):
    frozen = ["MODEL.BACKBONE.FREEZE_AT", 2]  # of the ResNet; the light config has its own
    model = build_model(load_config(f"configs/{config}.yaml", [*tiny_opts, *frozen]))
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


class Regression(nn.Module):
    """Squared error of a linear map that begins as given; NaN in the calls of these numbers."""

    def __init__(self, nan_calls=(), state=None):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        if state is not None:
            self.load_state_dict(state)
        self.nan_calls, self.calls, self.dtype, self.random = nan_calls, 0, None, None

    def forward(self, batch):
        x, y = (torch.stack([sample[key] for sample in batch]) for key in "xy")
        prediction = self.linear(x)
        self.dtype, self.random = prediction.dtype, tuple(torch.rand(3).tolist())
        loss = ((prediction.float().squeeze(1) - y) ** 2).mean()
        self.calls += 1
        return {"loss": loss * float("nan") if self.calls - 1 in self.nan_calls else loss}


def batches(start=0, stop=8):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    while True:
        yield [{"file_name": f"{i}.png", "x": x[i], "y": x[i].sum()} for i in range(start, stop)]


def make_step(model, data=None, lr=0.1, seed=0, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return train_step.TrainStep(model, data or batches(), optimizer, seed=seed, **options)


def run(step, iterations):
    with EventStorage() as storage:
        for step.iter in iterations:
            step.run_step()
    return step, storage


def fit(model, steps, data=None, **options):
    return run(make_step(model, data, **options), range(steps))


def test_bf16_runs_on_the_cpu_and_agrees_with_fp32():
    torch.manual_seed(0)
    fp32 = Regression()
    bf16 = Regression(state=fp32.state_dict())
    assert train_step.distribute(fp32) is fp32, "a single process is not wrapped"
    fit(fp32, 60)
    step, _ = fit(bf16, 60, precision="bf16")
    assert bf16.dtype == torch.bfloat16 and fp32.dtype == torch.float32
    assert bf16.linear.weight.dtype == torch.float32
    torch.testing.assert_close(bf16.linear.weight, fp32.linear.weight, atol=0.03, rtol=0)
    step.load_state_dict(step.state_dict())


def test_fp16_scaling_leaves_the_gradient_true():
    # GradScaler works on the CPU too; only our refusal of fp16 there has to be avoided.
    model, seen = Regression(), []
    step = make_step(model, lr=0.0, precision="bf16")
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step.after_backward = lambda: seen.append(model.linear.weight.grad.clone())
    run(step, [0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(next(batches()))["loss"]
    true = torch.autograd.grad(loss, model.linear.weight)[0]
    torch.testing.assert_close(seen[0], true, rtol=1e-2, atol=1e-3)
    step.load_state_dict(make_step(Regression()).state_dict())  # of a training in fp32
    assert step.grad_scaler.get_scale() == 1024.0
    other = make_step(Regression())
    other.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step.load_state_dict(other.state_dict())
    assert step.grad_scaler.get_scale() == 8.0


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_a_step_whose_scaled_gradient_overflows_changes_nothing(monkeypatch, name):
    # What nobody has written to is not a number.
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.SOLVER.update(OPTIMIZER=name, BASE_LR=0.01)
    plain = Regression()
    model = Regression(state=plain.state_dict())
    data = batches()
    for each, scale, steps in ((plain, None, 3), (model, 2.0, 4)):
        step = train_step.TrainStep(each, data, schedule.build_optimizer(cfg, each), seed=0)
        if scale:  # the first of the four overflows
            each.linear.weight.register_hook(lambda g: g / min(model.calls - 1, 1))
            step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run(step, range(steps))
    torch.testing.assert_close(model.linear.weight, plain.linear.weight)


def _skip_together(rank, store):
    torch.set_num_threads(1)
    group = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **group)
    comm.create_local_process_group(2)
    model = train_step.distribute(Regression({1} if rank else ()))
    step, _ = fit(model, 4, batches(4 * rank, 4 * rank + 4), max_skipped=1)
    weights = comm.all_gather(model.module.linear.weight.detach())
    assert torch.equal(*weights) and torch.isfinite(weights[0]).all() and step.skipped == 1
    norm = nn.BatchNorm1d(1)
    norm(torch.full((4, 1), float(rank)))
    assert norm.running_mean.item() == pytest.approx(0.1 * rank)
    train_step.share_buffers(norm)
    assert norm.running_mean.item() == 0
    leave_process_groups()


@pytest.mark.slow
def test_a_batch_whose_loss_is_nan_in_one_process_is_skipped_by_both(tmp_path):
    mp.start_processes(_skip_together, (tmp_path / "store",), nprocs=2, start_method="forkserver")


def test_batches_are_skipped_up_to_the_number_allowed_and_errors_name_the_remedy():
    plain = Regression()
    spoilt = Regression({1, 3}, plain.state_dict())
    step, storage = fit(spoilt, 6, max_skipped=2)
    fit(plain, 4)
    assert torch.equal(spoilt.linear.weight, plain.linear.weight)
    assert step.state_dict()["skipped"] == storage.latest()["skipped_batches"][0] == 2
    # The number is that of the whole training: it goes into the checkpoint.
    model = Regression({0}, plain.state_dict())
    resumed = make_step(model, max_skipped=2)
    resumed.load_state_dict(step.state_dict())
    with pytest.raises(FloatingPointError, match="iteration 0") as error:
        run(resumed, [0])
    for part in ("'0.png'", "'7.png'", "'loss': nan", "SOLVER.MAX_SKIPPED_BATCHES", "now 2"):
        assert part in str(error.value), part
    assert torch.equal(model.linear.weight, plain.linear.weight)
    with pytest.raises(FloatingPointError):
        fit(Regression({0}), 1)
    model.forward = lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("9 GiB"))
    with pytest.raises(RuntimeError, match="9 GiB(?s:.*)SOLVER.AMP(?s:.*)SOLVER.IMS_PER_BATCH"):
        fit(model, 1)


class Diverging(Regression):
    """With a batch norm, which sees infinity in the calls that Regression has NaN in; these end in
    a NaN loss or, as in Detectron2's RPN, before there is one."""

    def __init__(self, nan_calls=(), raises=False):
        super().__init__(nan_calls)
        self.norm, self.raises = nn.BatchNorm1d(4), raises

    def forward(self, batch):
        fails = self.calls in self.nan_calls
        self.norm(torch.stack([sample["x"] for sample in batch]) * (math.inf if fails else 1))
        losses = super().forward(batch)
        if fails and self.raises:
            raise FloatingPointError("Predicted boxes are not finite.")
        return losses


@pytest.mark.parametrize("raises", [False, True])
def test_a_skipped_batch_leaves_no_trace_in_batch_norms(raises):
    plain, spoilt = Diverging(), Diverging({1, 3}, raises)
    spoilt.load_state_dict(plain.state_dict())
    start = plain.norm.running_mean.clone()
    fit(spoilt, 6, max_skipped=2)
    fit(plain, 4)
    assert not torch.equal(plain.norm.running_mean, start)
    assert all(map(torch.equal, spoilt.buffers(), plain.buffers()))
    assert torch.equal(spoilt.linear.weight, plain.linear.weight)
    with pytest.raises(FloatingPointError, match="boxes" if raises else "nan") as error:
        fit(Diverging({0}, raises), 1)
    assert "'0.png'" in str(error.value) and "SOLVER.MAX_SKIPPED_BATCHES" in str(error.value)


def test_a_step_repeats_its_random_numbers():
    def numbers(iteration, seed):
        model = Regression()
        torch.rand(5)  # what came before does not matter
        step = make_step(model, seed=7)
        step.load_state_dict(make_step(model, seed=seed).state_dict())  # keeps the first seed
        run(step, [iteration])
        return model.random

    assert numbers(3, 0) == numbers(3, 0)
    assert len({numbers(3, 0), numbers(4, 0), numbers(3, 1)}) == 3
    assert train_step.training_seed(0) == 0 and train_step.training_seed(-1) >= 0


# Ten blocks of 64 MiB, one after the other, each page written; counts the pages that were cleared.
FAULTS = """
import resource, numpy as np
from imrcnn_d2.engine.train_step import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for keep in (bool, keep_freed_memory):
    keep()
    np.ones(2**23)
    before = faults()
    for _ in range(10):
        np.ones(2**23)
    print(faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    command = [sys.executable, "-W", "ignore", "-c", FAULTS]
    given_back, kept = map(int, subprocess.check_output(command, text=True).split())
    assert given_back >= 10 * 2**26 / 2**21  # each page once, huge ones or not
    assert kept < given_back / 10


def test_channels_last_on_a_cpu_is_for_what_lies_below_the_pyramid():
    opts = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""]
    backbone = build_model(load_config("configs/imrcnn_lite.yaml", opts)).eval().backbone
    layers = nn.ModuleDict({"backbone": copy.deepcopy(backbone)})
    other = train_step.use_channels_last(layers).backbone
    whole = train_step.use_channels_last(nn.Conv2d(3, 4, 3))  # without a pyramid
    weights = other.bottom_up.body.conv_stem.weight, other.fpn_output2.weight, whole.weight
    layouts = [w.is_contiguous(memory_format=torch.channels_last) for w in weights]
    assert layouts == [True, False, True]
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(other(image), backbone(image), rtol=1e-4, atol=1e-4)
        assert all(feature.is_contiguous() for feature in other.bottom_up(image).values())
    assert backbone.state_dict().keys() == other.state_dict().keys()


def test_the_average_of_the_weights_is_exponential_with_a_warm_up():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.5)
    nn.init.constant_(model.weight, 8.0)  # loaded after the hook was made
    ema.before_train()
    expected = 8.0
    for n, value in enumerate((1.0, 3.0, -2.0, 5.0, 0.0, 1.0, 4.0, 2.0, 7.0, 1.0), start=1):
        nn.init.constant_(model.weight, value)
        if n == 4:  # resumed, it does not start again
            state, ema = ema.state_dict(), EMA(model, decay=0.5)
            ema.load_state_dict(state)
            ema.before_train()
        ema.after_step()
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-6)
    for decay in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match=f"SOLVER.EMA_DECAY is {decay}"):
            EMA(model, decay)
