"""Mixed precision, distributed training on the CPU, memory, and the average of the weights."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from imrcnn_d2.engine import load_config, train_step
from imrcnn_d2.engine.hooks import EMA
from imrcnn_d2.engine.launch import leave_process_groups

from .conftest import load


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
    return storage


def train(model, steps, data=None, **options):
    step = make_step(model, data, **options)
    return step, run(step, range(steps))


def test_bf16_runs_on_the_cpu_and_agrees_with_fp32():
    torch.manual_seed(0)
    fp32 = Regression()
    bf16 = Regression(state=fp32.state_dict())
    assert train_step.distribute(fp32) is fp32, "a single process is not wrapped"
    train(fp32, 60)
    step, _ = train(bf16, 60, precision="bf16")
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


def test_precisions_that_cannot_work_are_refused():
    for precision, device in (("fp16", "cpu"), ("fp8", "cuda")):
        with pytest.raises(ValueError, match=f"SOLVER.AMP.PRECISION .*'{precision}'"):
            train_step.amp_dtype(precision, device)
    assert train_step.amp_dtype("fp16", "cuda") is torch.float16


def _train_half(rank, store, precision, state, result):
    torch.set_num_threads(1)
    group = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **group)
    comm.create_local_process_group(2)
    half = 4 * rank, 4 * rank + 4
    model = Regression(state=state)
    train(train_step.distribute(model), 5, batches(*half), precision=precision)
    if rank == 0:
        torch.save(model.state_dict(), result)

    # A batch whose loss is NaN in one process is skipped by both.
    model = Regression({1} if rank else (), state)
    step, _ = train(train_step.distribute(model), 4, batches(*half), max_skipped=1)
    weights = comm.all_gather(model.linear.weight.detach())
    assert torch.equal(*weights) and torch.isfinite(weights[0]).all() and step.skipped == 1
    leave_process_groups()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["", "bf16"])
def test_two_processes_train_as_one_with_the_double_batch(precision, tmp_path):
    torch.manual_seed(1)
    single, result = Regression(), str(tmp_path / "model.pth")
    arguments = (str(tmp_path / "store"), precision, copy.deepcopy(single.state_dict()), result)
    mp.start_processes(_train_half, arguments, nprocs=2, start_method="forkserver")
    train(single, 5, precision=precision)
    # Sums of two halves are rounded otherwise than those of the whole; to forget one process's
    # share changes the weights by far more.
    close = {"atol": 1e-2 if precision else 1e-5, "rtol": 0}
    torch.testing.assert_close(load(result), dict(single.state_dict()), **close)


def test_batches_are_skipped_up_to_the_number_allowed():
    plain = Regression()
    spoilt = Regression({1, 3}, plain.state_dict())
    step, storage = train(spoilt, 6, max_skipped=2)
    train(plain, 4)
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
        train(Regression({0}), 1)


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
    assert train_step.training_seed(3) == 3 and train_step.training_seed(-1) >= 0


def test_memory_errors_name_the_settings_to_change():
    model = Regression()
    model.forward = lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("9 GiB"))
    with pytest.raises(RuntimeError, match="9 GiB(?s:.*)SOLVER.AMP(?s:.*)SOLVER.IMS_PER_BATCH"):
        train(model, 1)


# Ten blocks of 64 MiB, one after the other, each page written; counts the pages that were cleared.
FAULTS = """
import resource, numpy as np
from imrcnn_d2.engine.train_step import keep_freed_memory
def cleared():
    np.ones(2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = cleared()
assert keep_freed_memory()
print(given_back, cleared())
"""


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
        ema.after_step()
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-6)

    resumed = EMA(model, decay=0.5)
    resumed.load_state_dict(ema.state_dict())
    resumed.before_train()  # does not start again
    assert torch.equal(resumed.model.weight, ema.model.weight)
    nn.init.constant_(model.weight, 2.0)
    resumed.after_step()
    assert resumed.model.weight.item() == pytest.approx(0.5 * expected + 1.0, rel=1e-6)
    for decay in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match=f"SOLVER.EMA_DECAY is {decay}"):
            EMA(model, decay)
