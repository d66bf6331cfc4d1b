"""Mixed precision and distributed training on the CPU."""

import functools

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from imrcnn_d2.engine.launch import leave_process_groups
from imrcnn_d2.engine.train_step import TrainStep, amp_dtype, distribute, training_seed


class Regression(nn.Module):
    """Squared error of a linear map."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.seen_dtype = None

    def forward(self, batch):
        x, y = (torch.stack([sample[key] for sample in batch]) for key in "xy")
        prediction = self.linear(x)
        self.seen_dtype = prediction.dtype
        return {"loss": ((prediction.float().squeeze(1) - y) ** 2).mean()}


def batches(start=0, stop=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, generator=generator)[start:stop]
    while True:
        yield [
            {"file_name": f"{start + i}.png", "x": row, "y": row.sum()} for i, row in enumerate(x)
        ]


def train(model, precision, steps=60, data=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = TrainStep(model, data or batches(), optimizer, seed=0, precision=precision)
    with EventStorage():
        for trainer.iter in range(steps):
            trainer.run_step()
    return trainer


def test_bf16_runs_on_the_cpu_and_agrees_with_fp32():
    torch.manual_seed(0)
    fp32, bf16 = Regression(), Regression()
    bf16.load_state_dict(fp32.state_dict())
    train(fp32, "")
    trainer = train(bf16, "bf16")
    assert bf16.seen_dtype == torch.bfloat16 and fp32.seen_dtype == torch.float32
    assert bf16.linear.weight.dtype == torch.float32
    torch.testing.assert_close(bf16.linear.weight, fp32.linear.weight, atol=0.03, rtol=0)
    trainer.load_state_dict(trainer.state_dict())


def test_fp16_scaling_leaves_the_gradient_true(monkeypatch):
    # GradScaler works on the CPU too; only our refusal of fp16 there has to be stepped around.
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = TrainStep(model, batches(), optimizer, seed=0, precision="bf16")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []
    trainer.after_backward = lambda: seen.append(model.linear.weight.grad.clone())
    with EventStorage():
        trainer.iter = 0
        trainer.run_step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(next(batches()))["loss"]
    true = torch.autograd.grad(loss, model.linear.weight)[0]
    torch.testing.assert_close(seen[0], true, rtol=1e-2, atol=1e-3)


def test_precisions_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="needs CUDA"):
        amp_dtype("fp16", "cpu")
    with pytest.raises(ValueError, match="SOLVER.AMP.PRECISION is 'fp8'"):
        amp_dtype("fp8", "cuda")
    assert amp_dtype("fp16", "cuda") is torch.float16


def _train_half(rank, store, precision, state, result):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    model = Regression()
    model.load_state_dict(state)
    train(distribute(model), precision, steps=5, data=batches(4 * rank, 4 * rank + 4))
    if rank == 0:
        torch.save(model.state_dict(), result)

    # A batch that is spoilt in one process is left out by both.
    spoilt = Spoilt({1})
    spoilt.load_state_dict(state)
    data = batches(4 * rank, 4 * rank + 4)
    run_steps(distribute(spoilt), 4, max_skipped=1, data=data)
    weights = comm.all_gather(spoilt.linear.weight.detach())
    assert torch.equal(*weights) and torch.isfinite(weights[0]).all()
    leave_process_groups()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["", "bf16"])
def test_two_processes_train_as_one_with_the_double_batch(precision, tmp_path):
    torch.manual_seed(1)
    single = Regression()
    state = {k: v.clone() for k, v in single.state_dict().items()}
    result = tmp_path / "model.pth"
    mp.start_processes(
        _train_half,
        (str(tmp_path / "store"), precision, state, str(result)),
        nprocs=2,
        start_method="forkserver",
    )
    train(single, precision, steps=5)
    # Sums of two halves are rounded otherwise than those of the whole; to forget one process's
    # share changes the weights by far more.
    tolerance = 1e-2 if precision else 1e-5
    for name, value in torch.load(result).items():
        torch.testing.assert_close(value, single.state_dict()[name], atol=tolerance, rtol=0)


def test_a_single_process_is_not_wrapped():
    model = Regression()
    assert distribute(model) is model


class Spoilt(Regression):
    """Its loss is NaN at some iterations, and in one process only."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.spoilt = 0, calls

    def forward(self, batch):
        self.calls += 1
        factor = float("nan") if self.calls - 1 in self.spoilt and comm.get_rank() == 0 else 1.0
        return {"loss": factor * super().forward(batch)["loss"]}


def run_steps(model, steps, max_skipped, data=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = TrainStep(model, data or batches(), optimizer, seed=0, max_skipped=max_skipped)
    with EventStorage() as storage:
        for trainer.iter in range(steps):
            trainer.run_step()
    return trainer, storage


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = Spoilt({0})
    before = model.linear.weight.detach().clone()
    with pytest.raises(FloatingPointError) as caught:
        run_steps(model, 1, max_skipped=0)
    for part in ("iteration 0", "'0.png'", "'7.png'", "'loss': nan", "SOLVER.MAX_SKIPPED_BATCHES"):
        assert part in str(caught.value), part
    assert torch.equal(model.linear.weight, before)


def test_batches_are_left_out_up_to_the_number_allowed():
    spoilt, plain = Spoilt({1, 3}), Regression()
    plain.load_state_dict(spoilt.state_dict())
    trainer, storage = run_steps(spoilt, 6, max_skipped=2)
    train(plain, "", steps=4)
    assert torch.equal(spoilt.linear.weight, plain.linear.weight)
    assert trainer.state_dict()["skipped"] == 2
    assert storage.latest()["skipped_batches"][0] == 2

    # The number is that of the whole training: it goes into the checkpoint.
    resumed = TrainStep(
        Spoilt({0}),
        batches(),
        torch.optim.SGD(spoilt.parameters(), lr=0.1),
        seed=0,
        max_skipped=2,
    )
    resumed.load_state_dict(trainer.state_dict())
    with EventStorage(), pytest.raises(FloatingPointError, match="now 2, all used"):
        resumed.run_step()


def test_a_step_repeats_its_random_draws():
    class Draws(Regression):
        def forward(self, batch):
            self.drawn = torch.rand(3).tolist()
            return super().forward(batch)

    def drawn(iteration, seed):
        model = Draws()
        step = TrainStep(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1), seed=seed)
        torch.rand(5)  # what came before does not matter
        with EventStorage():
            step.iter = iteration
            step.run_step()
        return tuple(model.drawn)

    assert drawn(3, 0) == drawn(3, 0)
    assert len({drawn(3, 0), drawn(4, 0), drawn(3, 1)}) == 3


def test_a_resumed_training_keeps_its_seed(caplog):
    model = Regression()
    make = functools.partial(
        TrainStep, model, batches(), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    resumed = make(seed=7)
    resumed.load_state_dict(make(seed=5).state_dict())
    assert resumed.seed == 5
    assert "the seed it began with, 5, not 7" in caplog.text
    assert training_seed(3) == 3
    assert training_seed(-1) >= 0


def test_memory_errors_name_the_settings_to_change():
    class Greedy(Regression):
        def forward(self, batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with pytest.raises(RuntimeError, match="Tried to allocate 9 GiB") as caught:
        run_steps(Greedy(), 1, max_skipped=0)
    assert "SOLVER.IMS_PER_BATCH" in str(caught.value)
    assert "SOLVER.AMP.ENABLED" in str(caught.value)
