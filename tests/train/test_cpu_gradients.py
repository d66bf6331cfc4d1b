"""Gradients against autograd's own, in double precision where that matters."""

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead

from imrcnn_d2.modeling import SeparableGradientROIAlign, SparseGradientRPNHead, cpu_gradients


def gradients(head, features, chosen):
    """Outputs, and gradients by features and parameters of a loss on the chosen anchors."""
    features = [f.clone().requires_grad_() for f in features]
    head.zero_grad()
    logits, deltas = head(features)
    loss = 0
    for level, mask in enumerate(chosen):
        loss = loss + (logits[level] * mask).pow(2).sum()
        loss = loss + (deltas[level].unflatten(1, (-1, 4)) * mask[:, :, None]).abs().sum()
    loss.backward()
    return [*logits, *deltas], [f.grad for f in features] + [p.grad for p in head.parameters()]


@pytest.fixture
def heads():
    torch.manual_seed(0)
    stock, ours = (
        cls(in_channels=12, num_anchors=3) for cls in (StandardRPNHead, SparseGradientRPNHead)
    )
    for name, parameter in stock.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if name.endswith("bias") else 0.1)
    ours.load_state_dict(stock.state_dict())
    return stock.double(), ours.double()


@pytest.mark.parametrize("share", [0, 0.02, 1])
def test_rpn_head(heads, share):
    # The border, where a position lacks neighbours, is most of the second map.
    features = [torch.randn(2, 12, *size).double() for size in ((16, 11), (2, 3))]
    chosen = [(torch.rand(2, 3, *f.shape[-2:]) < share).double() for f in features]
    (wanted, wanted_gradients), (got, got_gradients) = (
        gradients(head, features, chosen) for head in heads
    )
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got_gradients, wanted_gradients)


def test_rpn_head_multiplies_only_where_there_is_a_gradient(heads):
    features = [torch.randn(2, 12, 16, 11).double()]
    chosen = [torch.zeros(2, 3, 16, 11).double()]
    chosen[0][:, :, 4, 4] = 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(heads[1], features, chosen)
    names = {event.key for event in profile.key_averages()}
    assert "aten::convolution_backward" not in names
    assert "aten::conv2d" in names


def test_rpn_head_is_detectron2s_under_autocast_and_in_evaluation(heads):
    stock, ours = (head.float() for head in heads)
    features = [torch.randn(1, 12, 8, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = (head(features) for head in (stock, ours))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert got[0][0].grad_fn.name() == wanted[0][0].grad_fn.name()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(features), stock.eval()(features), rtol=0, atol=0)


def test_rpn_head_can_be_scripted(heads):
    features = [torch.randn(1, 12, 8, 8).double()]
    scripted = torch.jit.script(heads[1].eval())
    torch.testing.assert_close(scripted(features), heads[1](features))


@pytest.fixture
def boxes():
    """Inside, across the border, wholly outside, and of no area."""
    generator = torch.Generator().manual_seed(3)
    center = 90 * torch.rand(40, 2, generator=generator) - 5
    size = 60 * torch.rand(40, 2, generator=generator)
    size[0], center[1] = 0, -80
    image = torch.arange(40)[:, None] % 2
    return torch.cat([image, center - size / 2, center + size / 2], 1).double()


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(boxes, aligned, sampling_ratio):
    features = torch.randn(3, 5, 21, 17).double()  # the third image has no box
    weights = torch.randn(40, 5, 7, 4).double()
    results = []
    for cls in (ROIAlign, SeparableGradientROIAlign):
        x = features.clone().requires_grad_()
        pooled = cls((7, 4), 0.25, sampling_ratio, aligned)(x, boxes)
        (pooled * weights).sum().backward()
        results.append((pooled, x.grad))
    torch.testing.assert_close(results[1], results[0])


def test_roi_align_of_nothing(boxes):
    x = torch.randn(2, 5, 8, 8).double().requires_grad_()
    SeparableGradientROIAlign((7, 7), 0.25, 0)(x, boxes[:0]).sum().backward()
    assert x.grad is None or not x.grad.any()


def test_roi_align_leaves_large_maps_to_torchvision(boxes, monkeypatch):
    pool = SeparableGradientROIAlign((7, 7), 0.25, 0)
    x = torch.randn(2, 5, 8, 8).double().requires_grad_()
    ours = type(pool(x, boxes).grad_fn)
    monkeypatch.setattr(cpu_gradients, "_MAX_POSITIONS", 63)
    theirs = type(ROIAlign((7, 7), 0.25, 0)(x, boxes).grad_fn)
    assert type(pool(x, boxes).grad_fn) is theirs is not ours
