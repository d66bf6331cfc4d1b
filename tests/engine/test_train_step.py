"""Mixed precision and distributed training on the CPU."""

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.engine import SimpleTrainer
from detectron2.engine.launch import _find_free_port
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from imrcnn_d2.engine.train_step import AMPTrainer, amp_dtype, build_train_step, distribute


class Regression(nn.Module):
    """Squared error of a linear map."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.seen_dtype = None

    def forward(self, batch):
        prediction = self.linear(batch["x"])
        self.seen_dtype = prediction.dtype
        return {"loss": ((prediction.float() - batch["y"]) ** 2).mean()}


def batches(start=0, stop=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, generator=generator)[start:stop]
    while True:
        yield {"x": x, "y": x.sum(dim=1, keepdim=True)}


def train(model, precision, steps=60, data=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = build_train_step(model, data or batches(), optimizer, precision)
    with EventStorage():
        for trainer.iter in range(steps):
            trainer.run_step()
    return trainer


def test_bf16_runs_on_the_cpu_and_agrees_with_fp32():
    torch.manual_seed(0)
    fp32, bf16 = Regression(), Regression()
    bf16.load_state_dict(fp32.state_dict())
    assert type(train(fp32, "")) is SimpleTrainer
    trainer = train(bf16, "bf16")
    assert isinstance(trainer, AMPTrainer)
    assert bf16.seen_dtype == torch.bfloat16 and fp32.seen_dtype == torch.float32
    assert bf16.linear.weight.dtype == torch.float32
    torch.testing.assert_close(bf16.linear.weight, fp32.linear.weight, atol=0.03, rtol=0)
    trainer.load_state_dict(trainer.state_dict())


def test_fp16_scaling_leaves_the_gradient_true(monkeypatch):
    # GradScaler works on the CPU too; only our refusal of fp16 there has to be stepped around.
    model = Regression()
    trainer = AMPTrainer(
        model, batches(), torch.optim.SGD(model.parameters(), lr=0.0), "cpu", "bf16"
    )
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


def _train_half(rank, port, precision, state, result):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    model = Regression()
    model.load_state_dict(state)
    train(distribute(model), precision, steps=5, data=batches(4 * rank, 4 * rank + 4))
    if rank == 0:
        torch.save(model.state_dict(), result)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["", "bf16"])
def test_two_processes_train_as_one_with_the_double_batch(precision, tmp_path):
    torch.manual_seed(1)
    single = Regression()
    state = {k: v.clone() for k, v in single.state_dict().items()}
    result = tmp_path / "model.pth"
    mp.spawn(_train_half, (_find_free_port(), precision, state, str(result)), nprocs=2)
    train(single, precision, steps=5)
    tolerance = 1e-2 if precision else 1e-6
    for name, value in torch.load(result).items():
        torch.testing.assert_close(value, single.state_dict()[name], atol=tolerance, rtol=0)


def test_a_single_process_is_not_wrapped():
    model = Regression()
    assert distribute(model) is model
