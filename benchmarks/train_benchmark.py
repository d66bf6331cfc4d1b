"""IMR-CNN's training step, ours against Detectron2's own: for benchmarks/benchmark.py."""

import itertools
import statistics
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage
from matplotlib import pyplot as plt
from tqdm import tqdm

from imrcnn_d2.data.loader import build_train_loader, seed_generators
from imrcnn_d2.engine.schedule import build_optimizer
from imrcnn_d2.engine.train_step import TrainStep
from imrcnn_d2.engine.trainer import Trainer

__all__ = ["compare_steps", "draw_losses", "native_precision", "stock_config"]

# Losses are compared after a mean over so many iterations.
SMOOTHING = 10


def native_precision():
    """
    Returns:
        str: "bf16" where this machine's processor multiplies in it, else "" (fp32): emulated, bf16
            is slower than fp32.
    """
    flags = Path("/proc/cpuinfo")
    known = flags.read_text().split() if flags.is_file() else []
    return "bf16" if {"amx_bf16", "avx512_bf16"} & set(known) else ""


def stock_config(cfg):
    """
    Args:
        cfg (CfgNode): of one of our models.

    Returns:
        CfgNode: the same model of Detectron2's own parts, in its memory format.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CHANNELS_LAST = False
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    return cfg


class Side:
    """A model in training."""

    def __init__(self, cfg, trainer):
        """
        Args:
            cfg (CfgNode): SOLVER and SEED are read.
            trainer (SimpleTrainer):
        """
        self.trainer, self.losses, self.seconds, self.processor = trainer, [], [], []
        self._seed = max(cfg.SEED, 0)
        self._scheduler = build_lr_scheduler(cfg, trainer.optimizer)

    def step(self, iteration):
        """One step of the schedule; the draws are those of the other side."""
        self.trainer.iter = iteration
        with EventStorage(iteration) as storage:
            seed_generators(self._seed, 1, iteration, 0)
            start = time.perf_counter(), time.process_time()
            self.trainer.run_step()
            self.seconds.append(time.perf_counter() - start[0])
            self.processor.append(time.process_time() - start[1])
            self._scheduler.step()
            self.losses.append(storage.latest()["total_loss"][0])


def compare_steps(cfg, iterations, precision):
    """
    Train both sides from the same weights on the same batches, in turns.

    Args:
        cfg (CfgNode): of one of our models, with data set and solver.
        iterations (int): steps of each; one more of each before is not timed.
        precision (str): ours, "" or "bf16".

    Returns:
        tuple: figures (dict[str, float]) and the losses of ours and of Detectron2's (lists).
    """
    loader = build_train_loader(cfg)
    loader.batch_sampler.start_at(max(cfg.SEED, 0), 0)
    batches = list(itertools.islice(iter(loader), iterations + 1))
    theirs = build_model(stock_config(cfg))
    model = Trainer.build_model(cfg)
    model.load_state_dict(theirs.state_dict())
    ours = TrainStep(
        model.train(), batches, build_optimizer(cfg, model), seed=cfg.SEED, precision=precision
    )
    theirs = SimpleTrainer(theirs.train(), batches, build_optimizer(cfg, theirs))
    sides = Side(cfg, ours), Side(cfg, theirs)
    for iteration in tqdm(range(iterations + 1), leave=False):
        # Who comes second finds the batch in the cache: they take turns in that too.
        for side in sides if iteration % 2 else reversed(sides):
            side.step(iteration)
    figures = {}
    for name, side in zip(("ours", "Detectron2"), sides, strict=True):
        figures[f"{name}, s"] = statistics.median(side.seconds[1:])
        figures[f"{name}, processor s"] = statistics.median(side.processor[1:])
    ours, theirs = sides
    figures["times as fast"] = _ratio(theirs.seconds, ours.seconds)
    figures["times less processor time"] = _ratio(theirs.processor, ours.processor)
    figures["first loss, relative difference"] = abs(ours.losses[0] / theirs.losses[0] - 1)
    smooth = [_smooth(side.losses) for side in sides]
    difference = np.abs(smooth[0] - smooth[1]).mean() / smooth[1].mean()
    figures["loss curves, mean relative difference"] = float(difference)
    figures["data time, % of ours"] = _data_share(cfg, ours.trainer, iterations)
    return figures, ours.losses, theirs.losses


def _ratio(numerators, denominators):
    pairs = zip(numerators[1:], denominators[1:], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _smooth(losses):
    width = min(SMOOTHING, len(losses))
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def _data_share(cfg, trainer, iterations):
    """Percent of the step that our trainer waits for one worker, the first batch left out."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 1
    loader = build_train_loader(cfg)
    loader.batch_sampler.start_at(max(cfg.SEED, 0), 0)
    trainer.data_loader, trainer._data_loader_iter_obj = loader, iter(loader)
    waited, taken = [], []
    for iteration in range(iterations + 1):
        trainer.iter = iteration
        with EventStorage(iteration) as storage:
            start = time.perf_counter()
            trainer.run_step()
            taken.append(time.perf_counter() - start)
            waited.append(storage.latest()["data_time"][0])
    return 100 * sum(waited[1:]) / sum(taken[1:])


def draw_losses(ours, theirs, path):
    """
    Args:
        ours, theirs (list[float]): loss of each iteration.
        path (Path): PNG or SVG.
    """
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for losses, color, name in ((theirs, "tab:gray", "Detectron2"), (ours, "tab:blue", "ours")):
        axes.plot(losses, color=color, alpha=0.3, linewidth=0.8)
        smooth = _smooth(losses)
        axes.plot(
            np.arange(len(smooth)) + len(losses) - len(smooth), smooth, color=color, label=name
        )
    axes.set(xlabel="iteration", ylabel="total loss", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
