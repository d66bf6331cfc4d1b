"""One training step on any device; Detectron2's DDP and AMPTrainer need CUDA."""

import time

import torch
from detectron2.engine import SimpleTrainer, create_ddp_model

__all__ = ["AMPTrainer", "amp_dtype", "build_train_step", "distribute"]


def distribute(model, **kwargs):
    """
    Detectron2's ``create_ddp_model`` for models on any device.

    Args:
        model (nn.Module): with its parameters on the device it trains on.
        kwargs: of ``create_ddp_model``.

    Returns:
        nn.Module: ``model`` itself in a single process, else wrapped.
    """
    if next(model.parameters()).device.type != "cuda":
        kwargs["device_ids"] = None  # DDP refuses device_ids for a model on the CPU
    return create_ddp_model(model, **{"broadcast_buffers": False, **kwargs})


def build_train_step(model, data_loader, optimizer, precision=""):
    """
    Args:
        model, data_loader, optimizer: as in :class:`SimpleTrainer`.
        precision (str): "" for fp32, else see :class:`AMPTrainer`.

    Returns:
        SimpleTrainer
    """
    if not precision:
        return SimpleTrainer(model, data_loader, optimizer)
    device_type = next(model.parameters()).device.type
    return AMPTrainer(model, data_loader, optimizer, device_type, precision)


def amp_dtype(precision, device_type):
    """
    Args:
        precision (str): SOLVER.AMP.PRECISION.
        device_type (str): "cpu" or "cuda".

    Returns:
        torch.dtype

    Raises:
        ValueError: for an unknown precision, and for fp16 on a CPU.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"SOLVER.AMP.PRECISION is {precision!r}; use one of {sorted(dtypes)}")
    if precision == "fp16" and device_type == "cpu":
        raise ValueError("SOLVER.AMP.PRECISION 'fp16' needs CUDA; use 'bf16' on a CPU")
    return dtypes[precision]


class AMPTrainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` under autocast; gradients are scaled for fp16, bf16 needs no scaling.
    """

    def __init__(self, model, data_loader, optimizer, device_type, precision):
        """
        Args:
            model, data_loader, optimizer: as in :class:`SimpleTrainer`.
            device_type (str): "cpu" or "cuda".
            precision (str): "bf16" or, on CUDA, "fp16".
        """
        super().__init__(model, data_loader, optimizer)
        self.device_type = device_type
        self.dtype = amp_dtype(precision, device_type)
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=self.dtype == torch.float16)

    def run_step(self):
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        with torch.autocast(self.device_type, dtype=self.dtype):
            loss_dict = self.model(data)
            losses = sum(loss_dict.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(losses).backward()
        # Clipping happens inside optimizer.step(): it must see true gradients.
        self.grad_scaler.unscale_(self.optimizer)
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self):
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
