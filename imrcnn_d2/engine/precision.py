"""The precision of a training: fp32, or 16 bits where these are measurably faster."""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from imrcnn_d2.data.loader import seed_generators

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCHES = 3  # that are timed, after a warm-up on the first
MAX_SHARE = 0.9  # of fp32's time, for 16 bits to be chosen: noise does not change the choice
# Of a training that gains from a choice: the eight passes of a timing are repaid at that margin.
MIN_ITERATIONS = 100


def amp_dtype(precision: str, device_type: str) -> torch.dtype | None:
    """The type of autocast for "fp32" (None), "bf16" or "fp16" on "cpu" or "cuda".

    Raises:
        ValueError: for an unknown precision, and for fp16 on a CPU.
    """
    if precision not in _DTYPES:
        known = ", ".join(["auto", *_DTYPES])
        raise ValueError(f"SOLVER.AMP.PRECISION is {precision!r}; use one of {known}")
    if precision == "fp16" and device_type == "cpu":
        raise ValueError("SOLVER.AMP.PRECISION 'fp16' needs CUDA; use 'bf16' on a CPU")
    return _DTYPES[precision]


@contextlib.contextmanager
def autocast(precision: str, device_type: str) -> Iterator[None]:
    """Within, a model computes in a precision of `amp_dtype`."""
    dtype = amp_dtype(precision, device_type)
    on_cpu = dtype is not None and device_type == "cpu"
    with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
        with _DepthwiseInFP32() if on_cpu else contextlib.nullcontext():
            yield


class _DepthwiseInFP32(TorchFunctionMode):
    """Depthwise convolutions stay in fp32: no processor multiplies matrices for them, and with AMX
    the gradients of those in bf16 cost more than all other layers gain."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.conv2d and len(args) > 1:
            x, weight, *rest = args
            if weight.shape[1] == 1 < x.shape[1]:
                with torch.autocast("cpu", enabled=False):
                    return func(x.float(), weight, *rest, **kwargs)
        return func(*args, **kwargs)


def native_16_bits(device: torch.device) -> str | None:
    """ "bf16" or "fp16", which this device may be faster in; None where torch emulates both."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported
    return "bf16" if supported and supported() else None


def choose_precision(
    model: nn.Module,
    next_batches: Callable[[int], list],
    iterations: int,
    learning: Collection[str] | None = None,
) -> tuple[str, dict[str, float | None] | None]:
    """The faster precision for this many iterations, the same in all processes, and the seconds of
    a batch in each: medians of the slowest process, None for what does not fit into the memory.
    Without a timing, they are None and the precision is fp32.

    Args:
        model: in training mode, not wrapped by DistributedDataParallel. A copy is timed.
        next_batches: a number -> that many batches of the training.
        learning: names of the parameters that learn; None: those that need gradients now.
    """
    short = comm.all_gather(native_16_bits(next(model.parameters()).device))
    if iterations < MIN_ITERATIONS:
        reason = f"{iterations} iterations, fewer than {MIN_ITERATIONS}, do not repay a timing"
    elif None in short:
        reason = "this processor has no bf16"
    elif len(set(short)) > 1:
        reason = f"the processes have different types of 16 bits: {', '.join(short)}"
    else:
        return _faster(model, next_batches(BATCHES), short[0], learning)
    logger.info("Precision fp32: %s", reason)
    return "fp32", None


def _faster(model, batches, short, learning):
    model = copy.deepcopy(model)
    if learning is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in learning
    seconds = {"fp32": [], short: []}
    for batch in [batches[0], *batches]:
        for precision, times in seconds.items():
            times.append(_time_pass(model, batch, precision))
    rows = comm.all_gather(seconds)  # in training, the processes wait for the slowest
    slowest = {name: np.max([row[name] for row in rows], axis=0)[1:] for name in seconds}
    medians = {name: float(np.median(times)) for name, times in slowest.items()}
    chosen = short if medians[short] < MAX_SHARE * medians["fp32"] else "fp32"
    logger.info(
        f"Precision {chosen}: forward and backward pass of a batch take {medians['fp32']:.3g} s "
        f"in fp32 and {medians[short]:.3g} s in {short}, medians of {len(batches)} batches; "
        f"{short} is chosen below {MAX_SHARE:.0%} of fp32's time"
    )
    return chosen, {name: m if math.isfinite(m) else None for name, m in medians.items()}


def _time_pass(model: nn.Module, batch: list, precision: str) -> float:
    """Seconds of a forward and a backward pass, with the same random numbers each time; infinity
    where the memory does not suffice, the model refuses what it computes or a part of it has no 16
    bits."""
    device = next(model.parameters()).device
    seed_generators(0)
    model.zero_grad()
    start = _now(device)
    try:
        # The storage is not that of the training.
        with EventStorage(), autocast(precision, device.type):
            losses = sum(model(batch).values())
        losses.backward()
    except (RuntimeError, FloatingPointError) as error:  # torch.OutOfMemoryError is the former
        if precision == "fp32" and not isinstance(error, torch.OutOfMemoryError):
            raise
        logger.info("A batch in %s failed: %s", precision, error)
        return math.inf
    return _now(device) - start


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
