"""CBAM and PAFPN against their formulas and Detectron2's FPN."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock

from imrcnn_d2.modeling import CBAM, PAFPN

CHANNELS = 32
LEVELS = (2, 3, 4, 5)
CBAM_ON = {"attention": "cbam"}
XAVIER = {"init": "xavier", "cbam_reduction": 4}


@pytest.mark.parametrize("gate, scale", [("sigmoid", 1), ("double_sigmoid", 2), ("residual", 1)])
@pytest.mark.parametrize("reduction, kernel_size", [(4, 3), (16, 7)])  # to 3 channels, and to 1
def test_cbam_agrees_with_the_paper_s_formulas(numpy_cbam, gate, scale, reduction, kernel_size):
    torch.manual_seed(0)
    cbam = CBAM(12, reduction=reduction, kernel_size=kernel_size, gate=gate).double()
    x = 3 * torch.randn(2, 12, 9, 14, dtype=torch.double)
    before = x.clone()
    expected = numpy_cbam(x, cbam.state_dict(), scale) + (x.numpy() if gate == "residual" else 0)
    np.testing.assert_allclose(cbam(x).detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(x, before), "the input was changed"


def build(cls, fuse_type="sum", norm="", top_block=None, levels=LEVELS, **options):
    """A neck on a ResNet of one narrow block per stage: 8, 16, 32, 64 channels."""
    torch.manual_seed(0)
    stages = [
        ResNet.make_stage(BasicBlock, 1, in_channels=a, out_channels=b, stride_per_block=[stride])
        for a, b, stride in ((8, 8, 1), (8, 16, 2), (16, 32, 2), (32, 64, 2))
    ]
    resnet = ResNet(BasicStem(out_channels=8), stages, out_features=[f"res{k}" for k in LEVELS])
    names = [f"res{k}" for k in levels]
    return cls(resnet, names, CHANNELS, norm, top_block or LastLevelMaxPool(), fuse_type, **options)


def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("before", [(), ("bottom_up",), ("top_down",), ("top_down", "bottom_up")])
@pytest.mark.parametrize("activation", ["", "relu"])
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_pafpn_agrees_with_its_formulas(numpy_cbam, before, activation, fuse_type):
    options = {"attention": "cbam", "attention_before": before} if before else {}
    neck = build(PAFPN, fuse_type, activation=activation, **options, **XAVIER)
    state = neck.state_dict()
    for name, value in state.items():
        if "pan_" in name and "bias" in name:
            value.normal_()

    def conv(name, x, **settings):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **settings)

    def cbam(name, x):
        weights = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
        return torch.from_numpy(numpy_cbam(x, weights, scale=2.0)).float()

    def act(x):
        return x.clamp(min=0) if activation == "relu" else x

    with torch.no_grad():
        features, expected, above = neck.bottom_up(images()), {}, None
        for level in reversed(LEVELS):
            path = conv(f"fpn_lateral{level}", features[f"res{level}"])
            if "top_down" in before:
                path = cbam(f"cbam_lateral{level}.", path)
            if above is not None:
                path = path + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
                path = path / 2 if fuse_type == "avg" else path
            above = path
            expected[level] = conv(f"fpn_output{level}", path, padding=1)
            if "bottom_up" in before:
                expected[level] = cbam(f"cbam{level}.", expected[level])
        for low, level in itertools.pairwise(LEVELS):
            down = act(conv(f"pan_down{low}", expected[low], stride=2, padding=1))
            expected[level] = act(conv(f"pan_output{level}", down + expected[level], padding=1))
        expected[6] = expected[5][:, :, ::2, ::2]
        pyramid = neck(images())

    assert list(pyramid) == ["p2", "p3", "p4", "p5", "p6"]
    for name, feature in pyramid.items():
        torch.testing.assert_close(feature, expected[int(name[1])], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, CBAM_ON, {**CBAM_ON, "attention_before": ("bottom_up", "top_down"), "cbam_reduction": 4}],
)
def test_identity_starts_as_the_fpn_and_yet_learns(options):
    fpn, neck = build(FPN), build(PAFPN, **options)
    missing, unexpected = neck.load_state_dict(fpn.state_dict(), strict=False)
    assert not unexpected
    x = images()
    with torch.no_grad():
        pyramid = neck(x)
        for name, feature in fpn(x).items():
            assert (pyramid[name] - feature).abs().max() <= 1e-5 * feature.abs().max(), name

    new = {k: v for k, v in neck.named_parameters() if k.startswith(("pan_", "cbam"))}
    assert set(new) == set(missing)
    optimizer, learned = torch.optim.SGD(new.values(), lr=1e-3), set()
    for _ in range(2):
        optimizer.zero_grad()
        # A loss with a random direction per value, so that no gradient cancels by symmetry.
        generator = torch.Generator().manual_seed(2)
        loss = sum((f * torch.randn(f.shape, generator=generator)).sum() for f in neck(x).values())
        loss.backward()
        learned |= {name for name, parameter in new.items() if parameter.grad.any()}
        optimizer.step()
    assert learned == set(new)


@pytest.mark.parametrize(
    "options, keys",
    [
        ({"activation": "relu", "pan_norm": "GN"}, "ACTIVATION 'relu'.*PAFPN.NORM 'GN'"),
        ({**CBAM_ON, "cbam_gate": "sigmoid"}, "CBAM.GATE 'sigmoid'"),
        ({"init": "zero"}, "PAFPN.INIT is 'zero'"),
        ({"activation": "gelu", "init": "xavier"}, "PAFPN.ACTIVATION is 'gelu'"),
        ({"attention": "se"}, "PAFPN.ATTENTION is 'se'"),
        *(({"attention_before": v}, "PAFPN.ATTENTION_BEFORE is") for v in (("fpn",), ())),
        ({**CBAM_ON, "cbam_gate": "tanh", "init": "xavier"}, "CBAM.GATE is 'tanh'"),
        ({**CBAM_ON, "cbam_kernel_size": 4}, "CBAM.KERNEL_SIZE is 4"),
        ({**CBAM_ON, "cbam_reduction": 0}, "CBAM.REDUCTION is 0"),
    ],
)
def test_options_that_cannot_be_are_named(options, keys):
    with pytest.raises(ValueError, match=keys):
        build(PAFPN, **options)
    build(PAFPN, attention="", cbam_gate="sigmoid")  # of an attention that is not used


def test_top_block_on_a_bottom_up_feature():
    block = LastLevelP6P7(64, CHANNELS)
    neck = build(PAFPN, top_block=block, levels=(3, 4, 5), attention="cbam", **XAVIER).eval()
    with torch.no_grad():
        pyramid = neck(images())
        p6 = block.p6(neck.bottom_up(images())["res5"])
        p7 = block.p7(p6.clamp(min=0))
    assert list(pyramid) == ["p3", "p4", "p5", "p6", "p7"]
    torch.testing.assert_close(pyramid["p6"], p6)
    torch.testing.assert_close(pyramid["p7"], p7)
    for name, shape in neck.output_shape().items():
        size = -(-64 // shape.stride), -(-96 // shape.stride)
        assert pyramid[name].shape == (2, shape.channels, *size) and shape.channels == CHANNELS


def test_a_deep_copy_shares_nothing_with_the_original():
    # FPN keeps its layers in plain lists too: a copy must run on its layers, not on the original's.
    neck = build(PAFPN, attention="cbam", attention_before=("bottom_up", "top_down"), **XAVIER)
    copied = copy.deepcopy(neck.eval())
    with torch.no_grad():
        before = neck(images())["p5"]
        for parameter in neck.parameters():
            parameter.zero_()
        assert torch.equal(copied(images())["p5"], before)
