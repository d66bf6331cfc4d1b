"""Epochs into iterations, phases of a training, and the optimizer."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from imrcnn_d2.data.catalog import load_datasets
from imrcnn_d2.engine.train_step import distribute
from imrcnn_d2.modeling.classifier import ImageClassifier
from imrcnn_d2.modeling.pafpn import NEW_LAYERS
from imrcnn_d2.modeling.timm_backbone import TimmBackbone, graph_leaves

logger = logging.getLogger(__name__)

_STAGES = re.compile(r"stages from (\d+)")
_PREDICTOR = r"box_predictor\.|mask_head\.predictor\.|\.cls_score\.|^head\.(weight|bias)$"


def check_trainable(text: str) -> int | None:
    """The k of "stages from k"; None for "head" and "all".

    Raises:
        ValueError: for any other `trainable` of a phase.
    """
    match = _STAGES.fullmatch(text) if isinstance(text, str) else None
    if match is None and text not in ("head", "all"):
        raise ValueError(f"trainable is {text!r}; use 'head', 'stages from k' (such as 4) or 'all'")
    return int(match[1]) if match else None


def trainable_parameters(model: nn.Module, trainable: str) -> set[str]:
    """Names of the parameters that a phase trains, of those that have ``requires_grad`` now.

    "head" is all outside the backbone (outside the ``bottom_up`` of one with a pyramid, in a timm
    model's the ``body``); "stages from k" is also all of the backbone that the feature maps of
    stride 2^(k-1) and less do not depend on (k = 4 for ResNet: res4 and res5; for a plain ViT see
    :meth:`TimmBackbone.first_parameters`); "all" is all.

    Raises:
        ValueError: for another ``trainable``, and for a stage that the backbone does not have.
    """
    first = check_trainable(trainable)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainable == "all":
        return set(learning)
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    is_timm = isinstance(bottom_up, TimmBackbone)
    backbone = {id(p) for p in (bottom_up.body if is_timm else bottom_up).parameters()}
    head = {name for name, p in learning.items() if id(p) not in backbone}
    if trainable == "head":
        return head
    if is_timm:
        stages = [shape.stride.bit_length() - 1 for shape in bottom_up.output_shape().values()]
        below = bottom_up.first_parameters(first - 1)
    else:
        maps = stages = _feature_maps(model)
        below = graph_leaves(feature for level, feature in maps.items() if level < first)
    if first not in stages:
        raise ValueError(
            f"trainable is {trainable!r}, but the backbone has the stages {sorted(stages)} "
            "(k makes the feature map of stride 2^k)"
        )
    return head | {name for name, p in learning.items() if id(p) not in below}


def _feature_maps(model):
    """The backbone's feature maps of an empty image: k -> that of stride 2^k."""
    if isinstance(model, ImageClassifier):
        return model.trace_features()
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    shapes = bottom_up.output_shape()
    size = 4 * max(shape.stride for shape in shapes.values())
    image = next(bottom_up.parameters()).new_zeros(1, len(model.pixel_mean), size, size)
    was_training = bottom_up.training
    bottom_up.eval()
    features = bottom_up(image)
    bottom_up.train(was_training)
    return {shapes[name].stride.bit_length() - 1: features[name] for name in shapes}


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Layers that keep running statistics of their inputs and have no parameter that learns."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase)
        and module.track_running_stats
        and not any(p.requires_grad for p in module.parameters())
    ]


@dataclass(frozen=True)
class Phase:
    """One of SOLVER.PHASES."""

    name: str
    start: int  # its first iteration
    iterations: int
    lr: float  # its SOLVER.BASE_LR
    trainable: str  # see `trainable_parameters`


def check_phases(entries: list[dict]) -> str:
    """The unit of their lengths, "epochs" or "iterations"; "" for no phases.

    Raises:
        ValueError: a phase lacks a key or has an unknown one, or a value is out of range.
    """
    unit = ""
    for number, entry in enumerate(entries, 1):
        where = f"SOLVER.PHASES, phase {number}"
        keys = set(entry) if isinstance(entry, dict) else set()
        unit = unit or ("iterations" if "iterations" in keys else "epochs")
        if keys != {"name", unit, "lr", "trainable"}:
            raise ValueError(f"{where} is {entry!r}; it takes name, {unit}, lr and trainable")
        for key in (unit, "lr"):
            value = entry[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(
                    f"{where}: {key} is {value!r}; give a number above 0 (YAML reads 1e-4 as text: "
                    "write 1.0e-4)"
                )
        try:
            check_trainable(entry["trainable"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    for name, count in Counter(entry["name"] for entry in entries).items():
        if count > 1:
            raise ValueError(f"SOLVER.PHASES has several phases named {name!r}; rename all but one")
    return unit


def phases_in_iterations(entries: list[dict], iterations: Callable[[float], int]) -> list[dict]:
    """SOLVER.PHASES with ``iterations`` in place of ``epochs``: a phase ends where the sum of
    epochs so far does. A phase shorter than an iteration is a ValueError.
    """
    ret, start, epochs = [], 0, 0
    for entry in entries:
        epochs += entry["epochs"]
        end = iterations(epochs)
        if end <= start:
            raise ValueError(
                f"SOLVER.PHASES: {entry['epochs']} epochs of phase {entry['name']!r} are less than "
                "an iteration"
            )
        rest = {key: value for key, value in entry.items() if key != "epochs"}
        ret.append({**rest, "iterations": end - start})
        start = end
    return ret


def read_phases(entries: list[dict]) -> list[Phase]:
    """SOLVER.PHASES with ``iterations``, one after the other from iteration 0 on."""
    starts = accumulate((entry["iterations"] for entry in entries), initial=0)
    return [Phase(**entry, start=start) for entry, start in zip(entries, starts, strict=False)]


class Phases(HookBase):
    """Switches a training from phase to phase: what learns, with which optimizer and schedule.

    A phase starts with a new optimizer, so without the momentum of the previous one. Batch norms
    whose weights do not learn keep their running statistics. A checkpoint belongs to the phase of
    its iteration: call `start_at` before its state is loaded. Register it first, on every rank.

    Args:
        model: not wrapped by DistributedDataParallel; what needs no gradient now never learns.
        build_solver: (Phase) -> (optimizer, scheduler) of the parameters that need gradients.

    Raises:
        ValueError: the model has no such stage.
    """

    def __init__(self, phases: list[Phase], model: nn.Module, build_solver: Callable):
        self._phases, self._model, self._build_solver = phases, model, build_solver
        self._learning = [trainable_parameters(model, phase.trainable) for phase in phases]
        self._sizes = {name: p.numel() for name, p in model.named_parameters()}
        self._current, self._norms = None, []
        self.optimizer, self.scheduler = self._start(0)

    def _start(self, index):
        """Set what learns; returns the phase's optimizer and scheduler."""
        phase, names = self._phases[index], self._learning[index]
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad = name in names
            if name not in names:
                parameter.grad = None
        for norm in self._norms:  # of the previous phase
            norm.train(self._model.training)
        self._norms = frozen_norms(self._model)
        self._current = index
        learning, total = (n / 1e6 for n in (self._count(names), self._count(self._sizes)))
        logger.info(
            f"Phase {index + 1} of {len(self._phases)}, {phase.name!r}, from iteration "
            f"{phase.start} on, {phase.iterations} iterations: {phase.trainable!r} learns at "
            f"learning rate {phase.lr:g}, {learning:.2f} of {total:.2f} million parameters"
        )
        return self._build_solver(phase)

    def _count(self, names):
        return sum(self._sizes[name] for name in names)

    def start_at(self, iteration: int) -> None:
        """Put model, optimizer and schedule in the state that an iteration's phase begins with."""
        index = [i for i, phase in enumerate(self._phases) if phase.start <= iteration][-1]
        if index == self._current:
            return
        trainer = self.trainer
        trainer.optimizer, trainer.scheduler = self._start(index)
        if trainer.model is not self._model:
            # DistributedDataParallel waits for the gradients that it was built with.
            trainer.model = distribute(self._model)

    def before_step(self):
        self.start_at(self.trainer.iter)
        # Each time: an evaluation puts the whole model back into training mode.
        for norm in self._norms:
            norm.eval()

    def of_longest(self) -> set[str]:
        """Names of the parameters that learn in the longest phase."""
        pairs = zip(self._phases, self._learning, strict=True)
        return max(pairs, key=lambda pair: pair[0].iterations)[1]

    def describe(self) -> list[dict]:
        """The phases, for run.json, with the number of ``parameters`` that learn."""
        pairs = zip(self._phases, self._learning, strict=True)
        return [{**asdict(phase), "parameters": self._count(names)} for phase, names in pairs]


class LRScheduler(hooks.LRScheduler):
    """Detectron2's, for an optimizer that another one replaces at some iteration."""

    def before_step(self):
        if self._optimizer is not self.trainer.optimizer:
            self._optimizer = None
            self.before_train()


def resolve_epochs(cfg: CfgNode) -> CfgNode:
    """A copy of the config with all in iterations; `cfg` itself where nothing is in epochs.

    With SOLVER.MAX_EPOCHS above 0, MAX_ITER becomes ceil(epochs * images / IMS_PER_BATCH), and
    SOLVER.STEPS, SOLVER.WARMUP_ITERS, SOLVER.CHECKPOINT_PERIOD and TEST.EVAL_PERIOD, given in
    epochs, become iterations in the same way. SOLVER.PHASES, if any, replace MAX_EPOCHS.

    Raises:
        ValueError: see `check_phases`.
    """
    entries = cfg.SOLVER.PHASES
    unit = check_phases(entries)
    epochs = 0 if unit == "iterations" else cfg.SOLVER.MAX_EPOCHS
    if unit == "epochs":
        epochs = sum(entry["epochs"] for entry in entries)
    length = sum(entry["iterations"] for entry in entries) if unit == "iterations" else 0
    if epochs <= 0 and length in (0, cfg.SOLVER.MAX_ITER):
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    if epochs <= 0:
        solver.MAX_ITER = length
    else:
        images = len(load_datasets(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS))

        def iterations(epochs):
            return math.ceil(epochs * images / solver.IMS_PER_BATCH)

        solver.MAX_ITER = iterations(epochs)
        solver.STEPS = tuple(iterations(step) for step in solver.STEPS)
        solver.WARMUP_ITERS = iterations(solver.WARMUP_ITERS)
        solver.CHECKPOINT_PERIOD = iterations(solver.CHECKPOINT_PERIOD)
        cfg.TEST.EVAL_PERIOD = iterations(cfg.TEST.EVAL_PERIOD)
        solver.MAX_EPOCHS = 0
        solver.PHASES = phases_in_iterations(entries, iterations)
        logger.info(
            f"{epochs:g} epochs of {images} images in batches of {solver.IMS_PER_BATCH}: "
            f"{solver.MAX_ITER} iterations, steps at {solver.STEPS}, warm-up "
            f"{solver.WARMUP_ITERS}, a checkpoint every {solver.CHECKPOINT_PERIOD}, validation "
            f"every {cfg.TEST.EVAL_PERIOD}"
        )
    if frozen:
        cfg.freeze()
    return cfg


def phase_solver(cfg: CfgNode, phase: Phase) -> CfgNode:
    """A copy of a config in iterations with the learning rate and length of one of its phases;
    SOLVER.WARMUP_ITERS and STEPS count from the phase's beginning.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = phase.lr, phase.iterations
    cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step < phase.iterations)
    return cfg


def new_layer_lr_factor(factor: float) -> Callable[[str], float]:
    """Detectron2's ``lr_factor_func``: `factor` for the layers that no Mask R-CNN checkpoint has
    (NEW_LAYERS and the class predictors of all heads and of classifiers), 1 for all others.
    """
    new_layer = re.compile(rf"(^|\.)({'|'.join(NEW_LAYERS)})|{_PREDICTOR}")
    return lambda name: factor if new_layer.search(name) else 1.0


def layer_lr_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """SOLVER.LAYER_LR_DECAY's factors of the learning rates of a timm backbone's parameters, by
    their names in the model, see :meth:`TimmBackbone.layer_lr_factors`; empty for a decay of 1.

    Raises:
        ValueError: the decay is not in (0, 1], or the model has no such backbone.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"SOLVER.LAYER_LR_DECAY is {decay}; give a number above 0, at most 1")
    if decay == 1:
        return {}
    for name, module in model.named_modules():
        if isinstance(module, TimmBackbone):
            factors = module.layer_lr_factors(decay)
            return {f"{name}.body.{key}": factor for key, factor in factors.items()}
    raise ValueError(
        f"SOLVER.LAYER_LR_DECAY is {decay}, but the model has no timm backbone, whose layers have "
        "an order: set it to 1.0"
    )


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW with Detectron2's parameter groups, SOLVER.NEW_LAYER_LR_FACTOR,
    SOLVER.LAYER_LR_DECAY and, where SOLVER.CLIP_GRADIENTS is enabled, clipped gradients.

    Raises:
        ValueError: for an unknown SOLVER.OPTIMIZER; see :func:`layer_lr_factors`.
    """
    solver = cfg.SOLVER
    new_layer = new_layer_lr_factor(solver.NEW_LAYER_LR_FACTOR)
    factors = layer_lr_factors(model, solver.LAYER_LR_DECAY)
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: new_layer(name) * factors.get(name, 1.0),
        overrides={"pos_embed": {"weight_decay": 0.0}},  # as ViTDet
    )
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "fused": True}
    if solver.OPTIMIZER == "SGD":
        common |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        optimizer = torch.optim.SGD(params, **common)
        # GradScaler then skips a step that overflows in fp16. Left to the fused kernel, the first
        # one would leave momentum that nobody has written.
        optimizer._step_supports_amp_scaling = False
    elif solver.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(params, **common)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; use 'SGD' or 'ADAMW'")
    clip = solver.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_TYPE != "norm":
        return maybe_add_gradient_clipping(cfg, optimizer)
    optimizer.register_step_pre_hook(lambda *_: _clip_norms(optimizer, clip))
    return optimizer


def _clip_norms(optimizer, clip):
    """Clip the norm of each parameter's gradient, as Detectron2 does one after the other."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients, clip.NORM_TYPE))
    factors = (clip.CLIP_VALUE / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, factors.unbind())
