"""One training step on any device; Detectron2's DDP and AMPTrainer need CUDA, and its step cannot
be repeated.
"""

import contextlib
import ctypes
import itertools
import logging
import math
import time
from collections.abc import Collection, Iterable

import torch
from detectron2.engine import SimpleTrainer, create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from imrcnn_d2.data.loader import ResumableBatchSampler, seed_generators
from imrcnn_d2.engine.precision import amp_dtype, autocast, choose_precision

logger = logging.getLogger(__name__)

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def use_channels_last(model: nn.Module) -> nn.Module:
    """Put a detector, in place, into channels-last memory format (MODEL.CHANNELS_LAST).

    On a CPU only what lies below the pyramid, whose depthwise convolutions gain: the gradient of
    the weights of a dense 3x3 convolution takes three times as long in that format.
    """
    bottom_up = getattr(getattr(model, "backbone", None), "bottom_up", None)
    if bottom_up is None or next(model.parameters()).device.type != "cpu":
        return model.to(memory_format=torch.channels_last)
    bottom_up.to(memory_format=torch.channels_last)
    bottom_up.register_forward_hook(_back_to_channels_first)
    return model


def _back_to_channels_first(module, inputs, features: dict[str, torch.Tensor]):
    return {name: feature.contiguous() for name, feature in features.items()}


def keep_freed_memory() -> bool:
    """Let glibc keep the large blocks that are freed, for the whole process; False where the C
    library is another one. For programs to call, not for modules.

    By default it returns them to the system, and a network on the CPU takes the same ones again in
    the next step or image, each page cleared first: a tenth of a light training step's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Older versions refuse more than 32 MiB.
    kept = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def distribute(model: nn.Module, **kwargs) -> nn.Module:
    """Detectron2's ``create_ddp_model``, with its arguments, for a model on any device."""
    if next(model.parameters()).device.type != "cuda":
        kwargs["device_ids"] = None  # DDP refuses device_ids for a model on the CPU
    # Where batch norms learn statistics, all processes take over those of the first, which
    # checkpoints store.
    learns = bool(_statistics(model))
    return create_ddp_model(model, **{"broadcast_buffers": learns, **kwargs})


def _statistics(model):
    """The buffers of batch norms, which each forward pass in training changes."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _NormBase) and module.track_running_stats
        for buffer in module.buffers(recurse=False)
    ]


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's statistics of batch norms, which checkpoints store. After
    a training step each process has those of its own last batch."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def training_seed(seed: int) -> int:
    """SEED; where that is negative, a random one, the same in all processes."""
    if seed < 0:
        seed = comm.shared_random_seed()
        logger.info("SEED is not set: training with seed %d", seed)
    return seed


class TrainStep(SimpleTrainer):
    """`SimpleTrainer` whose step is a function of the weights, the optimizer, the seed and the
    iteration alone: a training with `build_train_loader`'s loader is resumed exactly. A loss that
    is not finite stops it before it reaches the weights, or is skipped.

    Args:
        seed: >= 0, of the whole training.
        precision: "fp32", "bf16" or, on CUDA, "fp16", whose gradients are scaled; "auto" is fp32
            until `choose_precision` or the checkpoint that is resumed says otherwise.
        max_skipped: batches with a loss that is not finite to skip before the training stops.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        precision: str = "fp32",
        max_skipped: int = 0,
    ):
        super().__init__(model, data_loader, optimizer)
        self.seed, self.skipped, self._max_skipped = seed, 0, max_skipped
        self._device_type = next(model.parameters()).device.type
        self._statistics = _statistics(model)
        self.precision_seconds: dict[str, float | None] | None = None
        self._set_precision(None if precision == "auto" else precision)

    def _set_precision(self, precision: str | None):
        self.precision = precision
        scales = amp_dtype(precision or "fp32", self._device_type) == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self._device_type, enabled=scales)

    def choose_precision(
        self, start: int, stop: int, learning: Collection[str] | None = None
    ) -> None:
        """Decide on precision "auto" for iterations start to stop, unless the training that is
        resumed has; what is trained is the same as if the config named the chosen one.

        Args:
            learning: names of the parameters to train, in most iterations; None: those that
                require gradients now.
        """
        if self.precision is not None:
            return
        self.iter = start
        model = getattr(self.model, "module", self.model)
        chosen = choose_precision(model, self._next_batches, stop - start, learning)
        precision, self.precision_seconds = chosen
        self._set_precision(precision)

    def _next_batches(self, number):
        """The steps to come are given them too."""
        with _files_of_workers_named():
            batches = list(itertools.islice(self._data_loader_iter, number))
        self._data_loader_iter_obj = itertools.chain(batches, self._data_loader_iter_obj)
        return batches

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

    def stop_loading(self) -> None:
        """End the loader's workers. They ignore signals, so that a process that still has them at
        its end, as one of a training that a circle of references keeps, would wait for them."""
        self._data_loader_iter_obj = None

    def run_step(self):
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        with _files_of_workers_named():
            data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        seed_generators(self.seed, 1, self.iter, comm.get_rank())
        may_skip = self.skipped < self._max_skipped
        before = [buffer.clone() for buffer in self._statistics if may_skip]
        with _advice_if_out_of_memory():
            try:
                with autocast(self.precision or "fp32", self._device_type):
                    loss_dict = self.model(data)
                    losses = sum(loss_dict.values())
            except FloatingPointError as error:  # an RPN's, before there is a loss
                problem = f"{str(error).rstrip('.')}, {_images(data)}"
                # Other processes wait for this one's gradients.
                self._refuse_or_skip(problem, can_skip=comm.get_world_size() == 1)
                self._restore(before)
                return
            self.optimizer.zero_grad()
            self.grad_scaler.scale(losses).backward()
        # Not before, and all at once: a GPU has nothing to do until its values are here.
        values = torch.stack([loss.detach() for loss in loss_dict.values()]).cpu()
        loss_dict = dict(zip(loss_dict, values, strict=True))
        if not self._all_finite(loss_dict, data):
            self._restore(before)
            return
        # Clipping happens inside optimizer.step(): it must see true gradients.
        self.grad_scaler.unscale_(self.optimizer)
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _all_finite(self, loss_dict, data):
        """Whether to go on with this batch; all processes decide alike."""
        problem = None
        values = {name: value.item() for name, value in loss_dict.items()}
        if not math.isfinite(sum(values.values())):
            problem = f"{_images(data)}, losses {values}"
        problems = [text for text in comm.all_gather(problem) if text is not None]
        if problems:
            self._refuse_or_skip("; ".join(problems))
        return not problems

    def _refuse_or_skip(self, problem, can_skip=True):
        text = f"Loss is not finite at iteration {self.iter}: {problem}"
        if self.skipped >= self._max_skipped or not can_skip:
            raise FloatingPointError(
                f"{text}. Weights and checkpoints are as before this batch. Look at these images "
                "and their annotations, lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, enable "
                "SOLVER.CLIP_GRADIENTS, or skip such batches: SOLVER.MAX_SKIPPED_BATCHES "
                f"(now {self._max_skipped}; what fails before its loss, in a single process only)"
            )
        self.skipped += 1
        get_event_storage().put_scalar("skipped_batches", self.skipped)
        logger.warning("%s. Skipped, %d of at most %d", text, self.skipped, self._max_skipped)

    def _restore(self, statistics):
        for buffer, value in zip(self._statistics, statistics, strict=True):
            buffer.copy_(value)

    def state_dict(self):
        return {
            **super().state_dict(),
            "seed": self.seed,
            "skipped": self.skipped,
            "precision": self.precision,
            "precision_seconds": self.precision_seconds,
            "grad_scaler": self.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        seed = state_dict.get("seed", self.seed)
        if seed != self.seed:
            logger.warning(
                "SEED is %d, but the training goes on with its first, %d", self.seed, seed
            )
        self.seed, self.skipped = seed, state_dict.get("skipped", 0)
        if self.precision is None:
            self.precision_seconds = state_dict.get("precision_seconds")
            self._set_precision(state_dict.get("precision"))
        if scale := state_dict.get("grad_scaler"):  # else the training had no fp16 before
            self.grad_scaler.load_state_dict(scale)


def _images(data):
    return f"images {[sample.get('file_name') for sample in data]}"


@contextlib.contextmanager
def _files_of_workers_named():
    """torch quotes a worker's traceback in the error: where a file failed, its last line does."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        *traceback, last = str(error).strip().splitlines() or [""]
        if not traceback or not (isinstance(error, OSError) or "BadInputError: " in last):
            raise
        raise OSError(last) from error


@contextlib.contextmanager
def _advice_if_out_of_memory():
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"{error}\nThe GPU's memory does not suffice. In the order of what it costs: "
            "SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION bf16, a smaller SOLVER.IMS_PER_BATCH "
            "(and SOLVER.BASE_LR in proportion), smaller INPUT.MIN_SIZE_TRAIN and "
            "INPUT.MAX_SIZE_TRAIN, fewer "
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE; or more GPUs: --num-gpus"
        ) from error
