"""Epochs into iterations, and the optimizer."""

import logging
import math
import re

import torch
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping

from imrcnn_d2.data.register import load_datasets

from .phases import check_phases, phases_in_iterations

__all__ = ["build_optimizer", "new_layer_lr_factor", "phase_solver", "resolve_epochs"]

logger = logging.getLogger(__name__)

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
