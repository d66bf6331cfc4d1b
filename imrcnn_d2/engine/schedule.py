"""Epochs into iterations, and the optimizer."""

import logging
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from detectron2.engine import HookBase, hooks
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch.nn.modules.batchnorm import _NormBase

from imrcnn_d2.data.catalog import load_datasets
from imrcnn_d2.engine.train_step import distribute
from imrcnn_d2.modeling.classifier import ImageClassifier
from imrcnn_d2.modeling.timm_backbone import graph_leaves

__all__ = [
    "LRScheduler",
    "Phase",
    "Phases",
    "build_optimizer",
    "check_phases",
    "check_trainable",
    "frozen_norms",
    "new_layer_lr_factor",
    "phase_solver",
    "phases_in_iterations",
    "read_phases",
    "resolve_epochs",
    "trainable_parameters",
]

logger = logging.getLogger(__name__)


_STAGES = re.compile(r"stages from (\d+)")


def check_trainable(text):
    """
    Args:
        text (str): ``trainable`` of a phase.

    Returns:
        int or None: k of "stages from k", else None.

    Raises:
        ValueError: it is none of "head", "stages from k" and "all".
    """
    match = _STAGES.fullmatch(text) if isinstance(text, str) else None
    if match is None and text not in ("head", "all"):
        raise ValueError(f"trainable is {text!r}; use 'head', 'stages from k' (such as 4) or 'all'")
    return int(match[1]) if match else None


def trainable_parameters(model, trainable):
    """
    The parameters that a phase of a training names, of those that have ``requires_grad`` now.

    Args:
        model (nn.Module): an ImageClassifier, or a detector of Detectron2 with a ``backbone``.
        trainable (str): "head", all outside the backbone (for a backbone with a pyramid, outside
            its ``bottom_up``); "stages from k", besides these all of the backbone but what its
            feature maps of stride 2^(k-1) and less are made by (k = 4 for ResNet: res4 and res5);
            or "all".

    Returns:
        set[str]: names of parameters.

    Raises:
        ValueError: for another ``trainable``, and for a stage that the backbone does not have.
    """
    first = check_trainable(trainable)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainable == "all":
        return set(learning)
    prefix = "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."
    head = {name for name in learning if not name.startswith(prefix)}
    if trainable == "head":
        return head
    maps = _feature_maps(model)
    if first not in maps:
        raise ValueError(
            f"trainable is {trainable!r}, but the backbone has the stages {sorted(maps)} "
            "(k makes the feature map of stride 2^k)"
        )
    below = graph_leaves(feature for level, feature in maps.items() if level < first)
    return head | {name for name, p in learning.items() if id(p) not in below}


def _feature_maps(model):
    """The backbone's feature maps of an empty image: k -> that of stride 2^k."""
    if isinstance(model, ImageClassifier):
        return model.trace_features()
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    shapes = bottom_up.output_shape()
    size = 4 * max(shape.stride for shape in shapes.values())
    channels = len(model.pixel_mean)
    image = next(bottom_up.parameters()).new_zeros(1, channels, size, size)
    was_training = bottom_up.training
    bottom_up.eval()
    features = bottom_up(image)
    bottom_up.train(was_training)
    return {shapes[name].stride.bit_length() - 1: features[name] for name in shapes}


def frozen_norms(model):
    """
    Args:
        model (nn.Module): with ``requires_grad`` as it trains.

    Returns:
        list[nn.Module]: its layers that keep running statistics of their inputs and have no
        parameter that learns.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase)
        and module.track_running_stats
        and not any(p.requires_grad for p in module.parameters())
    ]


@dataclass(frozen=True)
class Phase:
    """
    Attributes:
        name (str): such as "fine-tuning".
        start (int): its first iteration.
        iterations (int): how many, at least 1.
        lr (float): its SOLVER.BASE_LR.
        trainable (str): see :func:`trainable_parameters`.
    """

    name: str
    start: int
    iterations: int
    lr: float
    trainable: str


def check_phases(entries):
    """
    Args:
        entries (list[dict]): SOLVER.PHASES.

    Returns:
        str: "epochs" or "iterations", in which their lengths are given; "" for no phases.

    Raises:
        ValueError: a phase lacks a key or has one too many, or a value makes no sense.
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
                    f"{where}: {key} is {value!r}; give a number above 0 (1e-4 is text in YAML: "
                    "write 1.0e-4)"
                )
        try:
            check_trainable(entry["trainable"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    twice = [name for name, n in Counter(entry["name"] for entry in entries).items() if n > 1]
    if twice:
        raise ValueError(f"SOLVER.PHASES has several phases named {twice[0]!r}; rename all but one")
    return unit


def phases_in_iterations(entries, iterations):
    """
    Args:
        entries (list[dict]): SOLVER.PHASES with ``epochs``.
        iterations (callable): epochs -> iterations.

    Returns:
        list[dict]: the same with ``iterations``; a phase ends where the sum of epochs up to its own
        does.

    Raises:
        ValueError: a phase is shorter than an iteration.
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


def read_phases(entries):
    """
    Args:
        entries (list[dict]): SOLVER.PHASES with ``iterations``.

    Returns:
        list[Phase]: without gaps from iteration 0 on.
    """
    starts = accumulate((entry["iterations"] for entry in entries), initial=0)
    return [Phase(**entry, start=start) for entry, start in zip(entries, starts, strict=False)]


class Phases(HookBase):
    """
    Switches a training from phase to phase: what learns, with which optimizer and schedule.

    A phase starts with a new optimizer, so without the momentum of the one before. Batch norms
    whose weights do not learn keep their running statistics as well. A checkpoint belongs to the
    phase of its iteration: :meth:`start_at` has to come before its state is loaded.

    Put it first, on every rank.
    """

    def __init__(self, phases, model, build_solver):
        """
        Args:
            phases (list[Phase]): at least one.
            model (nn.Module): as it was built, not wrapped by DistributedDataParallel; what needs
                no gradient now will not learn in any phase. Left as the first phase has it.
            build_solver (callable): (Phase) -> (optimizer, scheduler) for the model's parameters
                that need gradients.

        Raises:
            ValueError: the model has no such stage.
        """
        self._phases, self._model, self._build_solver = phases, model, build_solver
        self._learning = [trainable_parameters(model, phase.trainable) for phase in phases]
        self._current, self._norms = None, []
        self.optimizer, self.scheduler = self._start(0)

    def _start(self, index):
        """Set what learns; returns the phase's optimizer and scheduler."""
        phase, names = self._phases[index], self._learning[index]
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad = name in names
            if name not in names:
                parameter.grad = None
        for norm in self._norms:  # of the phase before
            norm.train(self._model.training)
        self._norms = frozen_norms(self._model)
        self._current = index
        sizes = {name: p.numel() for name, p in self._model.named_parameters()}
        logger.info(
            "Phase %d of %d, %r, from iteration %d on, %d iterations: %r learns at learning rate "
            "%g, %.2f of %.2f million parameters: %s",
            index + 1,
            len(self._phases),
            phase.name,
            phase.start,
            phase.iterations,
            phase.trainable,
            phase.lr,
            sum(sizes[name] for name in names) / 1e6,
            sum(sizes.values()) / 1e6,
            ", ".join(_summary(sizes, names)),
        )
        return self._build_solver(phase)

    def start_at(self, iteration):
        """
        Put model, optimizer and schedule in the state that an iteration's phase begins with.

        Args:
            iteration (int): from 0; any after the last phase belongs to that.
        """
        index = self._index(iteration)
        if index == self._current:
            return
        optimizer, scheduler = self._start(index)
        trainer = self.trainer
        trainer.optimizer, trainer.scheduler = optimizer, scheduler
        if trainer.model is not self._model:
            # DistributedDataParallel waits for the gradients that it was built with.
            trainer.model = distribute(self._model)

    def _index(self, iteration):
        started = [i for i, phase in enumerate(self._phases) if phase.start <= iteration]
        return started[-1]

    def before_step(self):
        self.start_at(self.trainer.iter)
        # Each time: whoever evaluates the model puts all of it back into training mode.
        for norm in self._norms:
            norm.eval()

    def describe(self):
        """list[dict]: the phases, for run.json, with the number of ``parameters`` that learn."""
        sizes = {name: p.numel() for name, p in self._model.named_parameters()}
        return [
            {**asdict(phase), "parameters": sum(sizes[name] for name in names)}
            for phase, names in zip(self._phases, self._learning, strict=True)
        ]


def _summary(names, chosen, prefix=""):
    """The chosen of some parameters, "layer4.*" where that is all of a part."""
    mine = [name for name in names if name.startswith(prefix)]
    if all(name in chosen for name in mine):
        return [f"{prefix}*" if len(mine) > 1 else mine[0]]
    found = []
    for part in dict.fromkeys(name[len(prefix) :].split(".")[0] for name in mine):
        whole = prefix + part
        if whole in mine:
            found += [whole] * (whole in chosen)
        elif any(name.startswith(f"{whole}.") for name in chosen):
            found += _summary(names, chosen, f"{whole}.")
    return found


class LRScheduler(hooks.LRScheduler):
    """Detectron2's, for an optimizer that is another one from some iteration on."""

    def before_step(self):
        if self._optimizer is not self.trainer.optimizer:
            self._optimizer = None
            self.before_train()


_NEW_LAYER = re.compile(
    r"(^|\.)(pan_|cbam)|box_predictor\.|mask_head\.predictor\.|\.cls_score\.|^head\.(weight|bias)$"
)


def resolve_epochs(cfg):
    """
    Turn a schedule in epochs into one in iterations.

    With SOLVER.MAX_EPOCHS above 0, MAX_ITER becomes ceil(epochs * images / IMS_PER_BATCH), and
    SOLVER.STEPS, SOLVER.WARMUP_ITERS, SOLVER.CHECKPOINT_PERIOD and TEST.EVAL_PERIOD, given in
    epochs, become iterations in the same way. SOLVER.PHASES, where there are any, take the place
    of MAX_EPOCHS.

    Args:
        cfg (CfgNode): not changed.

    Returns:
        CfgNode: ``cfg`` itself where nothing is in epochs, else a copy in which nothing is.

    Raises:
        ValueError: see :func:`check_phases`.
    """
    entries = cfg.SOLVER.PHASES
    unit = check_phases(entries)
    epochs = sum(entry["epochs"] for entry in entries) if unit == "epochs" else 0
    if not unit:
        epochs = cfg.SOLVER.MAX_EPOCHS
    if epochs <= 0:
        return _with_length_of_phases(cfg)
    images = len(load_datasets(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS))

    def iterations(epochs):
        return math.ceil(epochs * images / cfg.SOLVER.IMS_PER_BATCH)

    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = iterations(epochs)
    cfg.SOLVER.STEPS = tuple(iterations(s) for s in cfg.SOLVER.STEPS)
    cfg.SOLVER.WARMUP_ITERS = iterations(cfg.SOLVER.WARMUP_ITERS)
    cfg.SOLVER.CHECKPOINT_PERIOD = iterations(cfg.SOLVER.CHECKPOINT_PERIOD)
    cfg.TEST.EVAL_PERIOD = iterations(cfg.TEST.EVAL_PERIOD)
    logger.info(
        "%g epochs of %d images in batches of %d: %d iterations, steps at %s, warm-up %d, "
        "a checkpoint every %d, validation every %d",
        epochs,
        images,
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.MAX_ITER,
        cfg.SOLVER.STEPS,
        cfg.SOLVER.WARMUP_ITERS,
        cfg.SOLVER.CHECKPOINT_PERIOD,
        cfg.TEST.EVAL_PERIOD,
    )
    cfg.SOLVER.MAX_EPOCHS = 0
    cfg.SOLVER.PHASES = phases_in_iterations(entries, iterations)
    if frozen:
        cfg.freeze()
    return cfg


def _with_length_of_phases(cfg):
    total = sum(entry["iterations"] for entry in cfg.SOLVER.PHASES)
    if total in (0, cfg.SOLVER.MAX_ITER):
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = total
    if frozen:
        cfg.freeze()
    return cfg


def phase_solver(cfg, phase):
    """
    Args:
        cfg (CfgNode): in iterations; not changed.
        phase (Phase): one of its phases.

    Returns:
        CfgNode: a copy with the phase's learning rate and length; SOLVER.WARMUP_ITERS and STEPS
        count from its beginning.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR = phase.lr
    cfg.SOLVER.MAX_ITER = phase.iterations
    cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step < phase.iterations)
    return cfg


def new_layer_lr_factor(factor):
    """
    The ``lr_factor_func`` of Detectron2's ``get_default_optimizer_params`` for the layers that no
    Mask R-CNN checkpoint brings along.

    Args:
        factor (float): SOLVER.NEW_LAYER_LR_FACTOR.

    Returns:
        callable: parameter name -> ``factor`` for pan_*, cbam* and the class predictors of the box,
            mask and one-stage heads and of classifiers, 1 for all others.
    """
    return lambda name: factor if _NEW_LAYER.search(name) else 1.0


def build_optimizer(cfg, model):
    """
    SGD or AdamW with Detectron2's parameter groups and SOLVER.NEW_LAYER_LR_FACTOR.

    Args:
        cfg (CfgNode): SOLVER is read.
        model (nn.Module): parameters that need no gradient are left out.

    Returns:
        torch.optim.Optimizer: clips gradients where SOLVER.CLIP_GRADIENTS is enabled.

    Raises:
        ValueError: for an unknown SOLVER.OPTIMIZER.
    """
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=new_layer_lr_factor(solver.NEW_LAYER_LR_FACTOR),
    )
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(
            params, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **common
        )
    elif solver.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(params, **common)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; use 'SGD' or 'ADAMW'")
    return maybe_add_gradient_clipping(cfg, optimizer)
