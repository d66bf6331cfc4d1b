"""PAFPN with CBAM against the plain FPN, and our training step against Detectron2's.

For benchmarks/benchmark.py.
"""

import itertools
import statistics
import tempfile
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
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from matplotlib import pyplot as plt
from sides import environment, started
from torch import nn
from tqdm import tqdm

from imrcnn_d2.data.loader import build_train_loader, seed_generators
from imrcnn_d2.engine.config import register_root
from imrcnn_d2.engine.schedule import build_optimizer
from imrcnn_d2.engine.train_step import TrainStep, keep_freed_memory
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


def time_in_turns(calls: list[Callable], runs: int) -> list[list[float]]:
    """Milliseconds of processor time, which other load changes least, of each call, run A B A B ...
    after two for warming up.
    """
    times = [[] for _ in calls]
    for run in tqdm(range(-2, runs), leave=False):
        for call, milliseconds in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            if run >= 0:
                milliseconds.append(1000 * (time.process_time() - start))
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
    runs: int,
) -> dict[str, float]:
    """Median ms and multiply-adds of both necks for images of `size` pixels, and their ratios.

    `channels` are those of the features below the neck, from stride 4 on; the ratio of the times is
    the median over pairs of runs.
    """
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [
        torch.randn(1, c, size // 2**k, size // 2**k, generator=generator).to(memory_format=layout)
        for k, c in enumerate(channels, start=2)
    ]
    names = [f"res{k}" for k, _ in enumerate(channels, start=2)]
    necks = [
        cls(GivenFeatures(channels), names, out_channels, top_block=LastLevelMaxPool(), **options)
        .eval()
        .to(memory_format=layout)
        for cls, options in ((FPN, {}), (PAFPN, {"attention": "cbam"}))
    ]
    fpn_adds, pafpn_adds = (count_multiply_adds(neck, features) for neck in necks)
    with torch.no_grad():
        fpn, pafpn = time_in_turns([lambda n=n: n(features) for n in necks], runs)
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


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config of the same model with Detectron2's parts and memory format."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CHANNELS_LAST = False
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    return cfg


def build_stock_model(cfg: CfgNode) -> nn.Module:
    """The same model of Detectron2's and timm's parts, in training mode."""
    model = build_model(stock_config(cfg)).train()
    for module in model.modules():
        vars(module).pop("forward", None)  # that of `fold_frozen_norms`
    return model


def build_stock_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW as torch has them by default, with Detectron2's clipping."""
    groups = [{**group, "fused": None} for group in build_optimizer(cfg, model).param_groups]
    optimizer = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}[cfg.SOLVER.OPTIMIZER]
    return maybe_add_gradient_clipping(cfg, optimizer(groups, lr=cfg.SOLVER.BASE_LR))


class _Training:
    """A model in training, ours or Detectron2's, from the weights in a file."""

    def __init__(self, build: Callable, cfg: CfgNode, weights: Path, iterations: int):
        register_root(cfg)
        loader = build_train_loader(cfg)
        loader.batch_sampler.start_at(max(cfg.SEED, 0), 0)
        batches = list(itertools.islice(iter(loader), iterations + 1))
        self._cfg, self._trainer = cfg, build(cfg, torch.load(weights), batches)
        self._scheduler = build_lr_scheduler(cfg, self._trainer.optimizer)

    def step(self, iteration: int) -> tuple[float, float, float]:
        """One step of the schedule, with the same random numbers as the other side: seconds,
        seconds of processor time, and the loss.
        """
        self._trainer.iter = iteration
        with EventStorage(iteration) as storage:
            seed_generators(max(self._cfg.SEED, 0), 1, iteration, 0)
            start = time.perf_counter(), time.process_time()
            self._trainer.run_step()
            seconds = time.perf_counter() - start[0], time.process_time() - start[1]
            self._scheduler.step()
            return *seconds, storage.latest()["total_loss"][0]

    def bits(self) -> int:
        return 32 if self._trainer.precision == "fp32" else 16

    def data_share(self, iterations: int) -> float:
        """Percent of the step that our trainer waits for one worker, the first batch left out."""
        cfg, trainer = self._cfg.clone(), self._trainer
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


def _ours(cfg, weights, batches):
    """As `imrcnn train` does it."""
    keep_freed_memory()
    model = Trainer.build_model(cfg)
    model.load_state_dict(weights)
    amp = cfg.SOLVER.AMP
    trainer = TrainStep(
        model.train(),
        batches,
        build_optimizer(cfg, model),
        seed=cfg.SEED,
        precision=amp.PRECISION if amp.ENABLED else "fp32",
    )
    trainer.choose_precision(0, cfg.SOLVER.MAX_ITER)
    return trainer


def _stock(cfg, weights, batches):
    model = build_stock_model(cfg)
    model.load_state_dict(weights)
    return SimpleTrainer(model, batches, build_stock_optimizer(cfg, model))


def compare_steps(
    cfg: CfgNode, iterations: int
) -> tuple[dict[str, float], list[float], list[float]]:
    """Train both sides from the same weights on the same batches with the same random numbers, each
    in a process of its own with as many threads as this one, taking turns step by step; ours as
    `imrcnn train` does it, in the precision of a training with this config.

    The first step of each is not timed. Return metrics and the losses of ours and of Detectron2's.
    """
    names = ("ours", "Detectron2")
    steps = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, environment(torch.get_num_threads()):
        torch.save(build_stock_model(cfg).state_dict(), weights := Path(folder) / "weights.pth")
        builders = (_ours, _stock)
        args = cfg, weights, iterations
        hows = {n: (_Training, build, *args) for n, build in zip(names, builders, strict=True)}
        with started(hows) as sides:
            for iteration in tqdm(range(iterations + 1), leave=False):
                for name in names if iteration % 2 else reversed(names):
                    steps[name].append(sides[name].ask("step", iteration))
            metrics = {
                "bits": sides["ours"].ask("bits"),
                "data time, % of ours": sides["ours"].ask("data_share", iterations),
            }
    ours, theirs = (np.array(steps[name]).T for name in names)
    for name, (seconds, processor, _) in zip(names, (ours, theirs), strict=True):
        metrics[f"{name}, s"] = float(np.median(seconds[1:]))
        metrics[f"{name}, processor s"] = float(np.median(processor[1:]))
    fast, less, _ = np.median(theirs[:, 1:] / ours[:, 1:], axis=1)
    metrics["times as fast"], metrics["times less processor time"] = float(fast), float(less)
    losses = ours[2].tolist(), theirs[2].tolist()
    metrics["first loss, relative difference"] = abs(losses[0][0] / losses[1][0] - 1)
    smooth = [_smooth(curve) for curve in losses]
    difference = np.abs(smooth[0] - smooth[1]).mean() / smooth[1].mean()
    metrics["loss curves, mean relative difference"] = float(difference)
    return metrics, *losses


def _smooth(losses):
    width = min(SMOOTHING, len(losses))
    return np.convolve(losses, np.ones(width) / width, mode="valid")


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
