"""Epochs, optimizers and the learning rate of new layers."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from torch import nn

from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.engine.schedule import build_optimizer, new_layer_lr_factor, resolve_epochs


def test_epochs_become_iterations(tiny_cfg):
    tiny_cfg.merge_from_list(
        "SOLVER.MAX_EPOCHS 10 SOLVER.IMS_PER_BATCH 4 SOLVER.STEPS (5,8) SOLVER.WARMUP_ITERS 1 "
        "SOLVER.CHECKPOINT_PERIOD 3 TEST.EVAL_PERIOD 2".split()
    )
    tiny_cfg.freeze()
    cfg = resolve_epochs(tiny_cfg)
    # 6 images in batches of 4 are 1.5 iterations an epoch, rounded up once, at the end.
    assert cfg.SOLVER.MAX_ITER == 15
    assert cfg.SOLVER.STEPS == (8, 12)
    assert cfg.SOLVER.WARMUP_ITERS == 2
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 5
    assert cfg.TEST.EVAL_PERIOD == 3
    assert cfg.is_frozen()
    assert tiny_cfg.SOLVER.MAX_ITER == 4, "the caller's config was changed"
    assert resolve_epochs(cfg) is cfg, "resolving twice must change nothing"


def test_without_epochs_the_config_is_left_alone(tiny_cfg):
    assert resolve_epochs(tiny_cfg) is tiny_cfg


class Named(nn.Module):
    """A model whose parameters carry the names that the optimizer looks at."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(torch.ones(3)))


NEW = [
    "backbone.pan_down2.weight",
    "backbone.pan_output3.bias",
    "backbone.cbam4.channel.mlp.0.weight",
    "roi_heads.box_predictor.cls_score.weight",
    "roi_heads.box_predictor.bbox_pred.bias",
    "roi_heads.mask_head.predictor.weight",
    "head.cls_score.weight",
]
OLD = [
    "backbone.fpn_lateral2.weight",
    "backbone.bottom_up.stem.conv1.weight",
    "roi_heads.mask_head.mask_fcn1.weight",
    "roi_heads.box_head.fc1.weight",
    "proposal_generator.rpn_head.conv.weight",
    "head.bbox_pred.weight",
]


def solver_cfg(**keys):
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    for key, value in keys.items():
        cfg.SOLVER[key] = value
    return cfg


def test_new_layers_learn_faster():
    model = Named(NEW + OLD)
    cfg = solver_cfg(BASE_LR=0.5, NEW_LAYER_LR_FACTOR=4.0)
    rates = {p: g["lr"] for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert rates[parameter] == (2.0 if name in NEW else 0.5), name
    assert new_layer_lr_factor(4.0)("spandex.weight") == 1.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_steps_as_detectron2s(momentum):
    cfg = solver_cfg(BASE_LR=0.1, MOMENTUM=momentum, WEIGHT_DECAY=0.01)
    ours, theirs = Named(OLD), Named(OLD)
    for build, model in ((build_optimizer, ours), (detectron2_build_optimizer, theirs)):
        optimizer = build(cfg, model)
        for _ in range(3):
            optimizer.zero_grad()
            sum((p**2).sum() for p in model.parameters()).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_adamw_takes_the_step_of_its_formula():
    # First step of AdamW: p <- p (1 - lr wd) - lr g / (|g| + eps), here g = 2 p = 2.
    cfg = solver_cfg(OPTIMIZER="ADAMW", BASE_LR=0.1, WEIGHT_DECAY=0.01)
    model = Named(["backbone.weight"])
    optimizer = build_optimizer(cfg, model)
    (model.backbone.weight**2).sum().backward()
    optimizer.step()
    expected = torch.full((3,), 1 * (1 - 0.1 * 0.01) - 0.1)
    torch.testing.assert_close(model.backbone.weight.data, expected)


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_gradients_are_clipped(name):
    cfg = solver_cfg(OPTIMIZER=name, BASE_LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = Named(["backbone.weight"])
    optimizer = build_optimizer(cfg, model)
    (100 * model.backbone.weight).sum().backward()
    optimizer.step()
    assert model.backbone.weight.grad.norm() == pytest.approx(0.5, rel=1e-4)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is 'LION'"):
        build_optimizer(solver_cfg(OPTIMIZER="LION"), Named(OLD))
