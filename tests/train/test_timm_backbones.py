"""Transformers of timm as backbones, against timm's weights maps, PyTorch and Detectron2."""

import re
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.utils.events import EventStorage
from timm.models import _registry
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from imrcnn_d2.engine import load_config, schedule
from imrcnn_d2.engine.checkpoint import Checkpointer
from imrcnn_d2.engine.train_step import use_channels_last
from imrcnn_d2.modeling import ImageClassifier, TimmBackbone
from imrcnn_d2.modeling.timm_backbone import fold_frozen_norms

from .conftest import changed, sample

SWIN, SWIN2, HIERA = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "hiera_tiny_224"
VIT, DINO2, DINO3 = (f"vit_small_patch{p}" for p in ("16_224", "14_dinov2", "16_dinov3"))
MAMBAOUT, BEIT, EFFICIENTNET = "mambaout_femto", "beit_base_patch16_224", "test_efficientnet"
STAGES = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
NARROW = {"embed_dim": 32, "depth": 8, "num_heads": 2}
SMALLER = {
    SWIN: STAGES,
    SWIN2: STAGES,
    HIERA: {"embed_dim": 16, "stages": (1, 1, 2, 1)},
    VIT: NARROW,
    DINO2: NARROW,
    DINO3: NARROW,
    BEIT: {"embed_dim": 32, "depth": 3, "num_heads": 2},
    MAMBAOUT: {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)},
}
FAMILIES = [SWIN, SWIN2, HIERA, VIT, DINO2, DINO3, MAMBAOUT, EFFICIENTNET]
SIZE = (96, 160)  # no multiple of a window of 7, and in no model's position embeddings


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """timm's models of these names, but with fewer and narrower layers."""
    torch.manual_seed(0)
    for name, options in SMALLER.items():
        model = partial(_registry._model_entrypoints[name], **options)
        monkeypatch.setitem(_registry._model_entrypoints, name, model)


def random_backbone(name, **options):
    """With weights that all matter: timm starts layer scales, norms and biases near 0 or 1."""
    model = TimmBackbone(name, **options)
    with torch.no_grad():
        for parameter in model.body.parameters():
            if parameter.ndim == 1 or parameter.shape[0] == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def timm_model(model, **options):
    """timm's model of that name with the weights of a backbone."""
    ret = timm.create_model(model.name, **options).eval()
    names = {key.removeprefix("model."): value for key, value in model.body.state_dict().items()}
    weights = {re.sub("^(layers|stages)_", r"\1.", key): value for key, value in names.items()}
    state = {key: weights.get(key, value) for key, value in ret.state_dict().items()}
    assert len(state.keys() & weights.keys()) == len(weights)
    ret.load_state_dict(state)
    return ret


def last_map(model, images):
    """What a plain ViT's pyramid is made of."""
    maps = []
    handle = model.simple_pyramid.register_forward_pre_hook(lambda _, x: maps.append(x[0]))
    model(images)
    handle.remove()
    return maps


def imrcnn(name, *opts):
    """A narrow IMR-CNN with this backbone."""
    opts = ["MODEL.TIMM.NAME", name, "MODEL.TIMM.WEIGHTS", "", "MODEL.DEVICE", "cpu", *opts]
    opts += ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
    return build_model(load_config("configs/imrcnn_lite.yaml", opts))


@pytest.mark.parametrize("name", [SWIN, SWIN2, HIERA, MAMBAOUT, VIT, DINO3])
def test_maps_are_timm_s(name):
    model = random_backbone(name).eval()
    images = torch.randn(2, *timm.models.get_pretrained_cfg(name).input_size)
    with torch.no_grad():
        expected = timm_model(model).forward_intermediates(images, intermediates_only=True)
        if model.simple_pyramid is None:
            maps = list(model(images).values())
        else:
            maps, expected = last_map(model, images), expected[-1:]
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("name", [VIT, HIERA])
def test_position_embeddings_are_resized_to_the_image(name):
    """timm's model made for that size, with position embeddings that PyTorch resized."""
    model = random_backbone(name).eval()
    native = model.body.model
    old = [14, 14] if name == VIT else native.tokens_spatial_shape
    new = [side * number // 224 for side, number in zip(SIZE, old, strict=True)]
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        prefix, grid = native.pos_embed.split([int(name == VIT), old[0] * old[1]], dim=1)
        grid = grid.unflatten(1, old).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
        resized = torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)
        maps = last_map(model, images) if name == VIT else list(model(images).values())
        native.pos_embed = nn.Parameter(resized)
        reference = timm_model(model, img_size=SIZE)
        expected = reference.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(maps, expected[-len(maps) :])
    assert native.blocks is not reference.blocks


def test_patches_of_14_pixels_become_16():
    model = random_backbone(DINO2).eval()
    vit = model.body.model
    assert vit.patch_embed.proj.kernel_size == vit.patch_embed.proj.stride == (16, 16)
    assert vit.pos_embed.shape[1] == 1 + 37 * 37  # still of images of 518 pixels
    assert last_map(model, torch.randn(1, 3, *SIZE))[0].shape == (1, 32, 6, 10)
    # A patch that is enlarged to 16 pixels is embedded as the original one.
    torch.manual_seed(0)
    original = timm.create_model(DINO2).patch_embed.proj
    torch.manual_seed(0)
    resampled = TimmBackbone(DINO2).body.model.patch_embed.proj
    patch = torch.randn(1, 3, 14, 14)
    enlarged = F.interpolate(patch, (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(resampled(enlarged), original(patch), rtol=1e-3, atol=1e-4)


def test_a_plain_vit_s_pyramid():
    model = TimmBackbone(VIT, vit_channels=24).eval()
    maps = model(torch.randn(2, 3, *SIZE))
    assert list(maps) == list(model.output_shape()) == ["res2", "res3", "res4", "res5"]
    for k, (name, shape) in enumerate(model.output_shape().items(), 2):
        assert (shape.channels, shape.stride) == (24, 2**k)
        assert maps[name].shape == (2, 24, SIZE[0] // 2**k, SIZE[1] // 2**k)
    with pytest.raises(ValueError, match=f"NAME '{BEIT}'"):
        TimmBackbone(BEIT)


def count_kept(model, images):
    """A model's maps, and the number of tensors that are kept for the gradient."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        return model(images), len(kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_and_gradient_checkpointing(name):
    """Frozen are those parameters that only frozen maps need; with checkpoints the others have the
    same gradients, of less that is kept.
    """
    images, gradients, sizes = torch.randn(2, 3, 64, 96), [], []
    options = {"freeze_at": 3, "norm": "FrozenBN", "vit_channels": 16}
    state = random_backbone(name, **options).state_dict()
    for grad_checkpointing in (False, True):
        model = TimmBackbone(name, grad_checkpointing=grad_checkpointing, **options)
        model.load_state_dict(state)
        maps, number = count_kept(model.train(), images)
        sum((m**2).mean() for m in maps.values() if m.requires_grad).backward()
        sizes.append(number)
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
        assert all(gradient is not None for gradient in gradients[-1].values())
    torch.testing.assert_close(*gradients)
    assert sizes[1] < sizes[0]
    frozen = {key for key, p in model.body.named_parameters() if not p.requires_grad}
    assert frozen and gradients[0]
    if model.simple_pyramid is not None:  # half of 8 blocks, and what is before them
        blocks = {int(key.split(".")[2]) for key in frozen if ".blocks." in key}
        assert blocks == {0, 1, 2, 3} and "model.patch_embed.proj.weight" in frozen
        assert not any(".norm" in key and ".blocks." not in key for key in frozen)
    else:
        assert [m.requires_grad for m in maps.values()][-2:] == [True, True]
        assert not maps["res3"].requires_grad


def test_layer_wise_learning_rates():
    cfg = load_config("configs/imrcnn_lite.yaml", ["MODEL.TIMM.NAME", VIT, "MODEL.DEVICE", "cpu"])
    cfg.MODEL.TIMM.update(WEIGHTS="", FREEZE_AT=0)
    cfg.SOLVER.update(LAYER_LR_DECAY=0.5, BASE_LR=1.0, NEW_LAYER_LR_FACTOR=4.0)
    model = build_model(cfg)
    groups = schedule.build_optimizer(cfg, model).param_groups
    rates = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    for name, p in model.named_parameters():
        rate, weight_decay = rates[id(p)]
        if ".body." in name:
            # Detectron2's ViT has no class token, of which its function knows nothing.
            expected = get_vit_lr_decay_rate(name, 0.5, num_layers=8)
            assert rate == (0.5**9 if "cls_token" in name else expected), name
            assert not ("pos_embed" in name and weight_decay)
        else:
            new = any(part in name for part in (".simfp_", ".pan_", ".cbam", "predictor"))
            assert rate == (4.0 if new else 1.0), name
    # A hierarchical model, by hand: 4 + 5 layers, of which the norm is the last.
    factors = TimmBackbone(SWIN).layer_lr_factors(0.5)
    assert factors["patch_embed.proj.weight"] == 0.5**6
    blocks = [f"layers_{s}.blocks.{b}.norm1.weight" for s, b in ((0, 0), (1, 0), (2, 0), (2, 1))]
    assert [factors[block] for block in blocks] == [0.5**5, 0.5**4, 0.5**3, 0.5**2]
    cfg.SOLVER.LAYER_LR_DECAY = 1.5
    with pytest.raises(ValueError, match="LAYER_LR_DECAY is 1.5"):
        schedule.build_optimizer(cfg, model)
    cfg.SOLVER.LAYER_LR_DECAY = 0.5
    with pytest.raises(ValueError, match="no timm backbone"):
        schedule.build_optimizer(cfg, nn.Linear(2, 2))


@pytest.mark.parametrize("name", [SWIN, HIERA, DINO2])
def test_imrcnn_trains_and_its_phases_are_the_backbone_s(name):
    model = use_channels_last(imrcnn(name, "MODEL.TIMM.GRAD_CHECKPOINTING", True)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    with EventStorage():
        losses = model([sample(70, 90, [[10, 12, 60, 50]]), sample(64, 64)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(losses.values()).backward()
    optimizer.step()
    moved = changed(before, model.state_dict())
    assert moved <= learning and {key for key in moved if ".body." in key}
    head = schedule.trainable_parameters(model, "head")
    assert not any(".body." in key for key in head)
    assert any(".simfp_" in key for key in head) is (name == DINO2)
    later = schedule.trainable_parameters(model, "stages from 4")
    assert head < later < learning
    if name == DINO2:
        blocks = {int(key.split(".")[5]) for key in later if ".blocks." in key}
        assert blocks == {4, 5, 6, 7}


def test_a_detector_starts_from_a_vit_classifier(tmp_path):
    classifier = ImageClassifier(VIT, 3)
    Checkpointer(classifier, str(tmp_path)).write("classifier")
    model = imrcnn(VIT)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Checkpointer(model).load(str(tmp_path / "classifier.pth"))
    moved = changed(before, model.state_dict())
    assert moved and all(".body." in key for key in moved)
    weights, theirs = model.backbone.bottom_up.body.model, classifier.backbone
    for key, value in weights.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


class ReadTwice(nn.Module):
    """Maps before a norm that more than the norm reads, and a convolution that is run twice."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(FrozenBatchNorm2d(3) for _ in range(4))

    def forward(self, x):
        x = self.norms[0](self.convs[0](x))
        before = self.convs[1](x)
        x = self.norms[1](before) + before.relu()
        return [x, self.norms[3](self.convs[2](self.norms[2](self.convs[2](x))))]


def test_a_convolution_keeps_its_norm_where_something_else_reads_its_map():
    model, image = ReadTwice(), torch.randn(1, 3, 8, 8)
    for norm in model.norms:
        for buffer in norm.buffers():
            buffer.uniform_(0.5, 1.5)
    expected = model(image)
    fold_frozen_norms(model, torch.zeros(1, 3, 8, 8))
    torch.testing.assert_close(model(image), expected)
    assert ["forward" in vars(norm) for norm in model.norms] == [True, False, False, False]
