"""
One training step on any device; Detectron2's DDP and AMPTrainer need CUDA, and its step cannot be
repeated.
"""

import contextlib
import ctypes
import logging
import time

import torch
from detectron2.engine import SimpleTrainer, create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.nn.modules.batchnorm import _NormBase

from imrcnn_d2.data.loader import ResumableBatchSampler, seed_generators

__all__ = [
    "TrainStep",
    "amp_dtype",
    "distribute",
    "keep_freed_memory",
    "training_seed",
    "use_channels_last",
]

logger = logging.getLogger(__name__)


def use_channels_last(model):
    """
    Put a detector into channels-last memory format (MODEL.CHANNELS_LAST).

    On a CPU only what lies below the pyramid, whose depthwise convolutions gain: the gradient by
    the weights of a dense 3x3 convolution, as in pyramid and heads, takes three times as long in
    that format.

    Args:
        model (nn.Module): on the device that it is to run on; changed in place.

    Returns:
        nn.Module: ``model``.
    """
    bottom_up = getattr(getattr(model, "backbone", None), "bottom_up", None)
    if bottom_up is None or next(model.parameters()).device.type != "cpu":
        return model.to(memory_format=torch.channels_last)
    bottom_up.to(memory_format=torch.channels_last)
    bottom_up.register_forward_hook(_back_to_channels_first)
    return model


def _back_to_channels_first(module, inputs, features: dict[str, torch.Tensor]):
    return {name: feature.contiguous() for name, feature in features.items()}


# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory():
    """
    Let glibc keep the large blocks that are freed, for the whole process.

    By default it gives them back to the system, and a network on the CPU takes the same ones again
    in the next step or image, each page cleared first: a tenth of a light training step's time. The
    process keeps what it needed at most, as it does on a GPU. To be called by programs, not by
    modules.

    Returns:
        bool: whether it was done; other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Older versions refuse more than 32 MiB.
    kept = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


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
    # Where batch norms learn statistics, all processes go on with those of the first, which
    # checkpoints store.
    learns = any(isinstance(m, _NormBase) and m.track_running_stats for m in model.modules())
    return create_ddp_model(model, **{"broadcast_buffers": learns, **kwargs})


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


def training_seed(seed):
    """
    Args:
        seed (int): SEED of the config.

    Returns:
        int: ``seed``; where that is negative, one that is drawn and the same in all processes.
    """
    if seed < 0:
        seed = comm.shared_random_seed()
        logger.info("SEED is not set: training with seed %d", seed)
    return seed


class TrainStep(SimpleTrainer):
    """
    :class:`SimpleTrainer` in any precision, whose step is a function of the weights, the optimizer,
    the seed and the iteration alone: a training resumed from its checkpoint goes on exactly.

    A loss that is not finite stops the training before it reaches the weights, or is skipped.
    """

    def __init__(self, model, data_loader, optimizer, *, seed, precision="", max_skipped=0):
        """
        Args:
            model, optimizer: as in :class:`SimpleTrainer`.
            data_loader (iterable): of batches; :func:`build_train_loader`'s is resumed exactly.
            seed (int): >= 0, of the whole training.
            precision (str): "" for fp32, "bf16" or, on CUDA, "fp16", whose gradients are scaled.
            max_skipped (int): batches whose loss is not finite to leave out before the training
                stops.
        """
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self.skipped = 0
        self._max_skipped = max_skipped
        self._device_type = next(model.parameters()).device.type
        self._dtype = amp_dtype(precision, self._device_type) if precision else None
        self.grad_scaler = torch.amp.GradScaler(
            self._device_type, enabled=self._dtype == torch.float16
        )

    @property
    def _data_loader_iter(self):
        if self._data_loader_iter_obj is None:
            sampler = getattr(self.data_loader, "batch_sampler", None)
            if isinstance(sampler, ResumableBatchSampler):
                sampler.start_at(self.seed, self.iter)
            elif self.iter > 0:
                logger.warning("This data loader starts anew: the training is not resumed exactly")
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def run_step(self):
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        seed_generators(self.seed, 1, self.iter, comm.get_rank())
        with _advice_if_out_of_memory():
            with self._autocast():
                loss_dict = self.model(data)
                losses = sum(loss_dict.values())
            self.optimizer.zero_grad()
            self.grad_scaler.scale(losses).backward()
        # Not before: a GPU would wait for the answer with nothing to do.
        if not self._all_finite(losses, loss_dict, data):
            return
        # Clipping happens inside optimizer.step(): it must see true gradients.
        self.grad_scaler.unscale_(self.optimizer)
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _autocast(self):
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=self._dtype)

    def _all_finite(self, losses, loss_dict, data):
        """Whether to go on with this batch; all processes decide alike."""
        mine = None
        if not torch.isfinite(losses):
            values = {name: value.item() for name, value in loss_dict.items()}
            mine = f"images {[sample.get('file_name') for sample in data]}, losses {values}"
        found = [text for text in comm.all_gather(mine) if text is not None]
        if not found:
            return True
        where = f"Loss is not finite at iteration {self.iter}: " + "; ".join(found)
        if self.skipped >= self._max_skipped:
            raise FloatingPointError(
                f"{where}. Weights and checkpoints are as before this batch. Look at these images "
                "and their annotations, lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, enable "
                "SOLVER.CLIP_GRADIENTS, or leave out such batches: SOLVER.MAX_SKIPPED_BATCHES "
                f"(now {self._max_skipped}, all used)"
            )
        self.skipped += 1
        get_event_storage().put_scalar("skipped_batches", self.skipped)
        logger.warning(
            "%s. Left out; %d of at most %d such batches", where, self.skipped, self._max_skipped
        )
        return False

    def state_dict(self):
        return {
            **super().state_dict(),
            "seed": self.seed,
            "skipped": self.skipped,
            "grad_scaler": self.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if state_dict.get("seed", self.seed) != self.seed:
            logger.warning(
                "The training goes on with the seed it began with, %d, not %d",
                state_dict["seed"],
                self.seed,
            )
        self.seed = state_dict.get("seed", self.seed)
        self.skipped = state_dict.get("skipped", 0)
        self.grad_scaler.load_state_dict(state_dict.get("grad_scaler", {}))


@contextlib.contextmanager
def _advice_if_out_of_memory():
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"{error}\nThe GPU's memory does not suffice. In the order of what it costs: "
            "SOLVER.AMP.ENABLED True, a smaller SOLVER.IMS_PER_BATCH (and SOLVER.BASE_LR in "
            "proportion), smaller INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN, fewer "
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE; or more GPUs: --num-gpus"
        ) from error
