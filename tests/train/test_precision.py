"""Precision "auto": the faster one is chosen, and the training is that of the chosen one."""

import itertools
import json
import logging
import math
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch import nn

from imrcnn_d2 import model_zoo
from imrcnn_d2.engine import Trainer, precision
from imrcnn_d2.engine.launch import leave_process_groups

from .conftest import changed, load
from .test_chaos import facts
from .test_steps import Regression, batches, make_step, run


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, precision.__name__)


def scripted(monkeypatch, passes=(), **seconds):
    """Let bf16 be native, a training of any length be timed, and each pass be made but take as long
    as given; returns the model of each pass and its precision, in their order."""
    made, time_pass = [], precision._time_pass
    remaining = list(passes)

    def timed(model, batch, name):
        assert math.isfinite(time_pass(model, batch, name))
        made.append((model, name))
        return remaining.pop(0) if passes else seconds[name]

    monkeypatch.setattr(precision, "native_16_bits", lambda device: "bf16")
    monkeypatch.setattr(precision, "MIN_ITERATIONS", 1)
    monkeypatch.setattr(precision, "_time_pass", timed)
    return made


@pytest.mark.parametrize(
    ("passes", "chosen", "seconds"),
    [
        # A warm-up, then three batches: fp32, bf16, fp32, ...; one of each is disturbed.
        ([1, 9, 2.0, 1.5, 2, 9, 9, 1.5], "bf16", (2, 1.5)),
        ([9, 1, 2.0, 1.9, 2, 1, 1, 1.9], "fp32", (2, 1.9)),
        ([9, 1, 2.0, 2.6, 2, 1, 1, 2.6], "fp32", (2, 2.6)),
        ([math.inf, 1] * 4, "bf16", (None, 1)),
        ([math.inf, math.inf] * 4, "fp32", (None, None)),
    ],
)
def test_16_bits_are_chosen_where_they_are_clearly_faster(
    monkeypatch, caplog, passes, chosen, seconds
):
    made = scripted(monkeypatch, passes)
    step = make_step(Regression(), precision="auto")
    step.choose_precision(0, 9)
    assert step.precision == chosen and f"Precision {chosen}" in caplog.text
    expected = dict(zip(("fp32", "bf16"), seconds, strict=True))
    assert step.precision_seconds == step.state_dict()["precision_seconds"] == expected
    assert [name for _, name in made] == ["fp32", "bf16"] * 4
    assert step.model.calls == 0 and all(model is not step.model for model, _ in made)


def test_what_does_not_fit_into_the_memory_takes_forever(monkeypatch):
    class Large(Regression):
        def forward(self, batch):
            if not torch.is_autocast_enabled("cpu"):
                raise torch.OutOfMemoryError
            return super().forward(batch)

    monkeypatch.setattr(precision, "native_16_bits", lambda device: "bf16")
    step = make_step(Large(), precision="auto")
    step.choose_precision(0, precision.MIN_ITERATIONS)
    assert step.precision == "bf16" and step.precision_seconds["fp32"] is None


def test_what_needs_no_timing(monkeypatch, caplog):
    def refuse(number):
        raise AssertionError("a batch was asked for")

    choose = partial(precision.choose_precision, Regression(), refuse)
    for native, iterations, reason in (
        ("bf16", precision.MIN_ITERATIONS - 1, f"{precision.MIN_ITERATIONS - 1} iterations"),
        (None, 10**6, "no bf16"),
    ):
        monkeypatch.setattr(precision, "native_16_bits", lambda device, native=native: native)
        assert choose(iterations) == ("fp32", None) and reason in caplog.text
    for name in ("fp32", "bf16"):
        step = make_step(Regression(), precision=name)
        step.choose_precision(0, 10**6)
        assert (step.precision, step.precision_seconds) == (name, None)
    for name, device in (("fp16", "cpu"), ("fp8", "cuda"), ("", "cpu")):
        with pytest.raises(ValueError, match=f"SOLVER.AMP.PRECISION .*'{name}'.*bf16"):
            precision.amp_dtype(name, device)
    assert precision.amp_dtype("fp16", "cuda") is torch.float16


def test_bf16_on_a_cpu_is_for_all_but_depthwise_convolutions():
    depthwise, dense = nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)
    grouped, grey = nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(1, 2, 3)
    x = torch.randn(1, 4, 9, 9, requires_grad=True)
    with precision.autocast("bf16", "cpu"):
        hidden = depthwise(x)
        outputs = [dense(hidden), grouped(hidden), grey(x[:, :1])]
        again = depthwise(outputs[1][:, :4])
    assert torch.equal(hidden, depthwise(x)) and hidden.dtype == again.dtype == torch.float32
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    (outputs[0].sum() + again.sum()).backward()
    assert depthwise.weight.grad.isfinite().all() and x.grad.dtype == torch.float32
    with precision.autocast("fp32", "cpu"):
        assert dense(hidden).dtype == torch.float32


def test_the_16_bits_of_devices(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for expected in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock(return_value=expected))
        assert precision.native_16_bits(cuda) == ("bf16" if expected else "fp16")
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", Mock(return_value=expected)
        )
        assert precision.native_16_bits(cpu) == ("bf16" if expected else None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision.native_16_bits(cpu) is None


class Learning(nn.Module):
    """Sees the batch's images through batch norm and dropout; has state that is no tensor, too."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.scale = nn.BatchNorm1d(4), nn.Linear(4, 1), 1.0

    def forward(self, batch):
        x, y = (torch.stack([sample[key] for sample in batch]) for key in "xy")
        self.scale *= 1.1  # as RetinaNet's normaliser of the loss
        prediction = nn.functional.dropout(self.linear(self.norm(x))).squeeze(1)
        return {"loss": self.scale * ((prediction.float() - y) ** 2).mean()}


@pytest.mark.parametrize("chosen", ["bf16", "fp32"])
def test_a_timed_training_is_the_one_of_the_named_precision(monkeypatch, chosen):
    def train(name):
        torch.manual_seed(0)
        data = (batch[i : i + 4] for i, batch in enumerate(batches()))  # all different
        step = make_step(Learning(), itertools.islice(data, 5), precision=name)
        step.choose_precision(0, 5)
        return run(step, range(5))[0]

    scripted(monkeypatch, **{"fp32": 1.0, "bf16": 1.0, chosen: 0.5})
    timed, named = train("auto"), train(chosen)
    assert timed.precision_seconds and not named.precision_seconds
    assert facts(timed.model.state_dict()) == facts(named.model.state_dict())
    assert timed.model.scale == named.model.scale == pytest.approx(1.1**5)
    other = train("fp32" if chosen == "bf16" else "bf16")
    assert changed(timed.model.state_dict(), other.model.state_dict()) >= {"linear.weight"}


def test_a_resumed_training_keeps_its_precision(monkeypatch):
    made = scripted(monkeypatch, fp32=1.0, bf16=0.5)
    step = make_step(Regression(), precision="auto")
    step.choose_precision(0, 9)
    assert made and step.precision == "bf16"
    made = scripted(monkeypatch, fp32=0.5, bf16=1.0)
    state = step.state_dict()
    for named, expected in (("auto", "bf16"), ("fp32", "fp32")):
        resumed = make_step(Regression(), precision=named)
        resumed.load_state_dict(state)
        resumed.choose_precision(4, 9)
        assert resumed.precision == expected and not made
    assert run(resumed, [4])[0].model.dtype == torch.float32
    del state["precision"], state["precision_seconds"]  # as of earlier versions
    resumed = make_step(Regression(), precision="auto")
    resumed.load_state_dict(state)
    resumed.choose_precision(4, 9)
    assert made and resumed.precision == "fp32"


class Stopping(Trainer):
    """Is killed at an iteration."""

    def run_step(self):
        if self.iter == 4:
            raise KeyboardInterrupt
        super().run_step()


@pytest.mark.slow
def test_a_timed_training_in_phases_that_is_killed_and_resumed_where_fp32_is_faster(
    tiny_classifier_cfg, tmp_path, monkeypatch
):
    def train(name, trainer_class=Trainer, resume=False):
        cfg.SOLVER.AMP.PRECISION, cfg.OUTPUT_DIR = name, str(tmp_path / name)
        torch.manual_seed(0)
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume)
        trainer.train()
        return facts(load(tmp_path / name / "model_final.pth")["model"])

    cfg = tiny_classifier_cfg
    cfg.MODEL.CLASSIFIER.DROPOUT = 0.5
    cfg.SOLVER.PHASES[1]["iterations"] += 1
    named = train("bf16")
    made = scripted(monkeypatch, fp32=1.0, bf16=0.5)
    with pytest.raises(KeyboardInterrupt):
        train("auto", Stopping)
    learning = {name for name, p in made[0][0].named_parameters() if p.requires_grad}
    assert {"head.weight", "backbone.conv_head.weight"} < learning, "it is timed as in phase 1"
    made = scripted(monkeypatch, fp32=0.5, bf16=1.0)
    assert train("auto", resume=True) == named and not made
    record = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert record["precision"] == "bf16"
    assert record["precision_seconds"] == {"fp32": 1.0, "bf16": 0.5}


def _choose_together(rank, store):
    torch.set_num_threads(1)
    group = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **group)
    comm.create_local_process_group(2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Of the slowest in each precision, bf16 takes 0.8 of fp32's time; of process 1 alone, 1.6.
        scripted(monkeypatch, **({"fp32": 1.0, "bf16": 0.2}, {"fp32": 0.5, "bf16": 0.8})[rank])
        step = make_step(Regression(), precision="auto")
        step.choose_precision(0, 9)
        assert (step.precision, step.precision_seconds) == ("bf16", {"fp32": 1.0, "bf16": 0.8})
        monkeypatch.setattr(precision, "native_16_bits", lambda device: [None, "bf16"][rank])
        step = make_step(Regression(), precision="auto")
        step.choose_precision(0, 9)
        assert (step.precision, step.precision_seconds) == ("fp32", None)
    leave_process_groups()


@pytest.mark.slow
def test_processes_choose_alike(tmp_path):
    mp.start_processes(_choose_together, (tmp_path / "store",), nprocs=2, start_method="forkserver")


def test_shipped_configs_choose_but_for_those_of_the_paper():
    for name in model_zoo.list():
        cfg = model_zoo.get_config(name, device="cpu")
        amp = cfg.train.amp if "train" in cfg else cfg.SOLVER.AMP
        enabled, precision = amp.values()
        assert (enabled, precision) == ("_paper." not in name, "auto"), name
