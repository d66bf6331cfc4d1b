"""PAFPN with CBAM against the plain FPN, and our training step against Detectron2's.

For benchmarks/benchmark.py.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from matplotlib import pyplot as plt
from torch import nn
from tqdm import tqdm

from imrcnn_d2.data.loader import build_train_loader, seed_generators
from imrcnn_d2.engine.schedule import build_optimizer
from imrcnn_d2.engine.train_step import TrainStep
from imrcnn_d2.engine.trainer import Trainer
from imrcnn_d2.modeling import PAFPN

SMOOTHING = 10  # iterations that losses are averaged over before they are compared

# Channels of res2 to res5, channels of the pyramid, size of the image, memory format: the shipped
# models at the sizes they run at.
NECKS = {
    "light_352": ((24, 40, 112, 320), 64, 352, True),
    "R_50_352": ((256, 512, 1024, 2048), 256, 352, False),
    "R_50_800": ((256, 512, 1024, 2048), 256, 800, False),
}


class GivenFeatures(Backbone):
    """A backbone that returns its input: one feature map per level, res2, res3, ..."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self._shapes = {
            f"res{k}": ShapeSpec(channels=c, stride=2**k) for k, c in enumerate(channels, start=2)
        }

    def forward(self, features: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(self._shapes, features, strict=True))

    def output_shape(self):
        return self._shapes


def choose_clock(device: str, threads: int) -> Callable[[], float]:
    """Processor time for one CPU thread, which ignores other load; else wall time, synchronised."""
    if torch.device(device).type == "cuda":

        def clock():
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return clock
    return time.process_time if threads == 1 else time.perf_counter


def time_in_turns(calls: list[Callable], runs: int, clock: Callable) -> list[list[float]]:
    """Milliseconds of each call, run A B A B ... so that other load affects all; two warm-ups."""
    times = [[] for _ in calls]
    for run in tqdm(range(-2, runs), leave=False):
        for call, milliseconds in zip(calls, times, strict=True):
            start = clock()
            call()
            end = clock()
            if run >= 0:
                milliseconds.append(1000 * (end - start))
    return times


def count_multiply_adds(model: nn.Module, features: list[torch.Tensor]) -> int:
    """Multiply-adds of convolutions and linear layers, and one per value of an upsampled map."""
    analysis = FlopCountAnalysis(model, (features,))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.total()


def compare_necks(
    channels: Sequence[int],
    out_channels: int,
    size: int,
    channels_last: bool,
    device: str,
    runs: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Median ms and multiply-adds of both necks for images of `size` pixels, and their ratios.

    `channels` are those of the features below the neck, from stride 4 on; the ratio of the times is
    the median over pairs of runs.
    """
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [
        torch.randn(1, c, size // 2**k, size // 2**k, generator=generator)
        .to(device)
        .to(memory_format=layout)
        for k, c in enumerate(channels, start=2)
    ]
    names = [f"res{k}" for k, _ in enumerate(channels, start=2)]
    necks = [
        cls(GivenFeatures(channels), names, out_channels, top_block=LastLevelMaxPool(), **options)
        .eval()
        .to(device)
        .to(memory_format=layout)
        for cls, options in ((FPN, {}), (PAFPN, {"attention": "cbam"}))
    ]
    fpn_adds, pafpn_adds = (count_multiply_adds(neck, features) for neck in necks)
    with torch.no_grad():
        fpn, pafpn = time_in_turns([lambda n=n: n(features) for n in necks], runs, clock)
    ratio = statistics.median(b / a for a, b in zip(fpn, pafpn, strict=True))
    return {
        "FPN, ms": statistics.median(fpn),
        "PAFPN + CBAM, ms": statistics.median(pafpn),
        "FPN, 10^9 multiply-adds": fpn_adds / 1e9,
        "PAFPN + CBAM, 10^9 multiply-adds": pafpn_adds / 1e9,
        "times longer": ratio,
        "times more multiply-adds": pafpn_adds / fpn_adds,
        "measured / predicted": ratio / (pafpn_adds / fpn_adds),
    }


def native_precision() -> str:
    """ "bf16" if the processor multiplies in it, else "" (fp32): emulated bf16 is slower."""
    flags = Path("/proc/cpuinfo")
    known = flags.read_text().split() if flags.is_file() else []
    return "bf16" if {"amx_bf16", "avx512_bf16"} & set(known) else ""


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config of the same model with Detectron2's parts and memory format."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CHANNELS_LAST = False
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    return cfg


class Side:
    """A model in training."""

    def __init__(self, cfg: CfgNode, trainer: SimpleTrainer):
        self.trainer, self.losses, self.seconds, self.processor = trainer, [], [], []
        self._seed = max(cfg.SEED, 0)
        self._scheduler = build_lr_scheduler(cfg, trainer.optimizer)

    def step(self, iteration: int) -> None:
        """One step of the schedule, with the same random numbers as the other side."""
        self.trainer.iter = iteration
        with EventStorage(iteration) as storage:
            seed_generators(self._seed, 1, iteration, 0)
            start = time.perf_counter(), time.process_time()
            self.trainer.run_step()
            self.seconds.append(time.perf_counter() - start[0])
            self.processor.append(time.process_time() - start[1])
            self._scheduler.step()
            self.losses.append(storage.latest()["total_loss"][0])


def compare_steps(
    cfg: CfgNode, iterations: int, precision: str
) -> tuple[dict[str, float], list[float], list[float]]:
    """Train both sides from the same weights on the same batches, in turns.

    The first step of each is not timed. Return metrics and the losses of ours and of Detectron2's.
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
        # The second side finds the batch in the cache: they take turns in that too.
        for side in sides if iteration % 2 else reversed(sides):
            side.step(iteration)
    metrics = {}
    for name, side in zip(("ours", "Detectron2"), sides, strict=True):
        metrics[f"{name}, s"] = statistics.median(side.seconds[1:])
        metrics[f"{name}, processor s"] = statistics.median(side.processor[1:])
    ours, theirs = sides
    metrics["times as fast"] = _ratio(theirs.seconds, ours.seconds)
    metrics["times less processor time"] = _ratio(theirs.processor, ours.processor)
    metrics["first loss, relative difference"] = abs(ours.losses[0] / theirs.losses[0] - 1)
    smooth = [_smooth(side.losses) for side in sides]
    difference = np.abs(smooth[0] - smooth[1]).mean() / smooth[1].mean()
    metrics["loss curves, mean relative difference"] = float(difference)
    metrics["data time, % of ours"] = _data_share(cfg, ours.trainer, iterations)
    return metrics, ours.losses, theirs.losses


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


def plot_losses(ours: list[float], theirs: list[float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for losses, color, name in ((theirs, "tab:gray", "Detectron2"), (ours, "tab:blue", "ours")):
        axes.plot(losses, color=color, alpha=0.3, linewidth=0.8)
        smooth = _smooth(losses)
        iterations = np.arange(len(losses) - len(smooth), len(losses))
        axes.plot(iterations, smooth, color=color, label=name)
    axes.set(xlabel="iteration", ylabel="total loss", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
