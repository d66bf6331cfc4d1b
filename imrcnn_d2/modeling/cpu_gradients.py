"""Gradients and proposals that a CPU computes faster, the same up to rounding."""

import math

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

# On larger maps torchvision's gradient needs fewer multiplications and less memory.
_MAX_POSITIONS = 128 * 128
_FAST_COLUMNS = 3  # of a depthwise kernel


@RPN_HEAD_REGISTRY.register()
class SparseGradientRPNHead(StandardRPNHead):
    """:class:`StandardRPNHead` whose gradient is computed where it is not zero.

    The loss looks at RPN.BATCH_SIZE_PER_IMAGE anchors of an image, a few hundred of ten thousand
    positions; autograd multiplies by the zeros of all others, a seventh of the light model's step.
    """

    def forward(self, features: list[torch.Tensor]):
        """Return logits (N, A, H_l, W_l) and deltas (N, 4 A, H_l, W_l) of maps (N, C, H_l, W_l)."""
        logits, deltas = [], []
        for x in features:
            if self._has_sparse_gradient(x):
                layers = self.conv, self.objectness_logits, self.anchor_deltas
                parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
                outputs = _SparseGradientHead.apply(x, *parameters)
            else:
                hidden = self.conv(x)
                outputs = self.objectness_logits(hidden), self.anchor_deltas(hidden)
            logits.append(outputs[0])
            deltas.append(outputs[1])
        return logits, deltas

    def _has_sparse_gradient(self, x):
        one_conv = isinstance(self.conv, torch.nn.Conv2d)  # MODEL.RPN.CONV_DIMS may ask for more
        plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return one_conv and plain and self.training and torch.is_grad_enabled()


class _SparseGradientHead(torch.autograd.Function):
    """ReLU of a 3x3 convolution, and two 1x1 convolutions of that."""

    @staticmethod
    def forward(ctx, x, weight, bias, logits_weight, logits_bias, deltas_weight, deltas_bias):
        hidden = F.conv2d(x, weight, bias, padding=1).relu_()
        ctx.save_for_backward(x, hidden, weight, logits_weight, deltas_weight)
        outputs = F.conv2d(hidden, logits_weight, logits_bias)
        return outputs, F.conv2d(hidden, deltas_weight, deltas_bias)

    @staticmethod
    def backward(ctx, grad_logits, grad_deltas):
        x, hidden, weight, logits_weight, deltas_weight = ctx.saved_tensors
        active = grad_logits.ne(0).any(1) | grad_deltas.ne(0).any(1)
        n, i, j = active.nonzero(as_tuple=True)  # K positions
        hidden = hidden[n, :, i, j]
        grad_logits, grad_deltas = grad_logits[n, :, i, j], grad_deltas[n, :, i, j]
        grad = grad_logits @ logits_weight.flatten(1) + grad_deltas @ deltas_weight.flatten(1)
        grad *= hidden > 0

        # The 9 neighbours of each position; those beyond the border are zeros.
        height, width = x.shape[2:]
        offsets = torch.arange(9)
        i, j = i[:, None] + offsets // 3 - 1, j[:, None] + offsets % 3 - 1
        inside = ((i >= 0) & (i < height) & (j >= 0) & (j < width))[..., None]
        places = n[:, None], i.clamp(0, height - 1), j.clamp(0, width - 1)
        kernel = weight.permute(0, 2, 3, 1)
        neighbours = x.permute(0, 2, 3, 1)[places] * inside  # (K, 9, C)
        grad_weight = (grad.T @ neighbours.flatten(1)).view(kernel.shape).permute(0, 3, 1, 2)
        grad_x = torch.zeros_like(x)
        shares = (grad @ kernel.flatten(1)).view_as(neighbours) * inside
        grad_x.permute(0, 2, 3, 1).index_put_(places, shares, accumulate=True)
        return (
            grad_x,
            grad_weight.contiguous(),
            grad.sum(0),
            (grad_logits.T @ hidden).view_as(logits_weight),
            grad_logits.sum(0),
            (grad_deltas.T @ hidden).view_as(deltas_weight),
            grad_deltas.sum(0),
        )


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """:func:`torch.nn.functional.conv2d`; on a CPU the weight's gradient of a depthwise convolution
    with a kernel wider than 3 is computed three columns at a time: for these oneDNN has a fast
    kernel, and none for wider ones, which take 10 to 20 times as long.
    """
    learns = torch.is_grad_enabled() and weight.requires_grad and x.device.type == "cpu"
    is_wide = groups == len(weight) and weight.shape[1] == 1 and weight.shape[3] > _FAST_COLUMNS
    if not (learns and is_wide):
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)
    with torch.autocast("cpu", enabled=False):
        return _DepthwiseConv.apply(x.to(weight.dtype), weight, bias, stride, padding)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors

        def gradient(index, x, weight, padding):
            settings = ctx.stride, padding, (1, 1), False, (0, 0), len(weight)
            needed = index == 0, index == 1, False
            return torch.ops.aten.convolution_backward(grad, x, weight, None, *settings, needed)[
                index
            ]

        grad_x = gradient(0, x, weight, ctx.padding) if ctx.needs_input_grad[0] else None
        columns, first = [], 0
        for kernel in weight.tensor_split(math.ceil(weight.shape[-1] / _FAST_COLUMNS), dim=-1):
            width = (grad.shape[-1] - 1) * ctx.stride[1] + kernel.shape[-1]
            left = ctx.padding[1] - first
            read = F.pad(x, (left, width - left - x.shape[-1]))  # what these columns read
            columns.append(gradient(1, read, kernel, (ctx.padding[0], 0)))
            first += kernel.shape[-1]
        # With the sum for the bias, oneDNN would compute the weight's gradient once more.
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return grad_x, torch.cat(columns, dim=-1), grad_bias, None, None


@PROPOSAL_GENERATOR_REGISTRY.register()
class EarlyStopRPN(RPN):
    """:class:`RPN` whose non-maximum suppression, in training, ends at RPN.POST_NMS_TOPK_TRAIN
    proposals: whether one is kept depends on those with higher scores alone. The others are not
    even decoded.
    """

    @torch.no_grad()
    def predict_proposals(self, anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes):
        """The proposals of each image, by falling score: "proposal_boxes", "objectness_logits".

        Args: of each level: anchors (R, 4), logits (N, R) and deltas (N, R, 4).

        Raises:
            FloatingPointError: a box or score is not finite.
        """
        predictions = pred_objectness_logits, pred_anchor_deltas
        if not self.training or predictions[0][0].device.type != "cpu":
            return super().predict_proposals(anchors, *predictions, image_sizes)
        scores, boxes, levels = [], [], []
        for level, (anchor, logits, deltas) in enumerate(zip(anchors, *predictions, strict=True)):
            count = min(self.pre_nms_topk[True], logits.shape[1])
            best, places = logits.topk(count, dim=1)
            deltas = deltas.gather(1, places[..., None].expand(-1, -1, 4)).flatten(0, 1)
            decoded = self.box2box_transform.apply_deltas(deltas, anchor.tensor[places.flatten()])
            scores.append(best)
            boxes.append(decoded.view(len(best), count, 4))
            levels.append(torch.full((count,), level))
        scores, order = torch.cat(scores, dim=1).sort(dim=1, descending=True, stable=True)
        boxes, levels = torch.cat(boxes, dim=1), torch.cat(levels)
        if not (boxes.isfinite().all() and scores.isfinite().all()):
            raise FloatingPointError("Predicted boxes or scores are not finite: training diverged")
        images = zip(boxes, scores, order, image_sizes, strict=True)
        return [self._best(*image, levels) for image in images]

    def _best(self, boxes, scores, order, image_size, levels):
        boxes, levels = Boxes(boxes[order]), levels[order]
        boxes.clip(image_size)
        large = boxes.nonempty(threshold=self.min_box_size)
        boxes, scores, levels = boxes.tensor[large], scores[large], levels[large]
        needed, looked_at, kept = self.post_nms_topk[True], 0, []
        while len(kept) < needed and looked_at < len(boxes):
            looked_at = 2 * (looked_at or needed)
            is_kept = torch.zeros_like(levels[:looked_at], dtype=torch.bool)
            for level in levels.unique():
                (places,) = (levels[:looked_at] == level).nonzero(as_tuple=True)
                is_kept[places[nms(boxes[places], scores[places], self.nms_thresh)]] = True
            kept = is_kept.nonzero(as_tuple=True)[0][:needed]
        fields = {"proposal_boxes": Boxes(boxes[kept]), "objectness_logits": scores[kept]}
        return Instances(image_size, **fields)


class SeparableGradientROIAlign(ROIAlign):
    """:class:`ROIAlign` whose gradient is two matrix products.

    A pooled value is a sum over rows of a sum over columns, with weights that depend on the row and
    on the column alone. torchvision's gradient adds up single corners of samples, in one thread.
    """

    def forward(self, input: torch.Tensor, rois: torch.Tensor):
        """Return (M, C, output_size, output_size) of the map (N, C, H, W).

        Args:
            rois: (M, 5): image, x0, y0, x1, y1 in pixels of the image.
        """
        rois = rois.to(dtype=input.dtype)
        settings = self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        small = input.shape[2] * input.shape[3] <= _MAX_POSITIONS
        learning = self.training and input.requires_grad and len(rois) > 0
        if small and learning and input.device.type == "cpu":
            return _SeparableGradientROIAlign.apply(input, rois, *settings)
        return roi_align(input, rois, *settings)


class _SeparableGradientROIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, rois, *settings):
        ctx.save_for_backward(rois)
        ctx.shape, ctx.settings = features.shape, settings
        return roi_align(features, rois, *settings)

    @staticmethod
    def backward(ctx, grad):
        (rois,) = ctx.saved_tensors
        (rows, columns), scale, sampling_ratio, aligned = ctx.settings
        images, channels, height, width = ctx.shape
        x0, y0, x1, y1 = (rois[:, 1:] * scale - 0.5 * aligned).unbind(1)
        sizes = [y1 - y0, x1 - x0] if aligned else [(y1 - y0).clamp(1), (x1 - x0).clamp(1)]
        by_row = _axis_weights(y0, sizes[0], rows, height, sampling_ratio)
        by_column = _axis_weights(x0, sizes[1], columns, width, sampling_ratio)
        grad_features = grad.new_zeros(images, channels, height, width)
        for image in range(images):
            (boxes,) = (rois[:, 0] == image).nonzero(as_tuple=True)
            if len(boxes):
                # (M, rows, C, columns) x (M, columns, W), then (H, M rows) x (M rows, C W)
                pooled = grad[boxes].transpose(1, 2).reshape(len(boxes), rows * channels, columns)
                lines = (pooled @ by_column[boxes]).view(len(boxes) * rows, channels * width)
                maps = by_row[boxes].flatten(0, 1).T @ lines
                grad_features[image] = maps.view(height, channels, width).transpose(0, 1)
        return grad_features, None, None, None, None, None


def _axis_weights(start, size, bins, length, sampling_ratio):
    """The weight of each row (or column) of a map in each bin of each box: (M, bins, length).

    As in ROIAlign, a bin's value is the mean of equally spaced samples, which are interpolated
    between the two cells around them; outside the map by more than a cell they are zero.
    """
    counts = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else (size / bins).ceil()
    counts, widths = counts[:, None, None], (size / bins)[:, None, None]
    steps = torch.arange(int(counts.max()), dtype=size.dtype)
    places = (torch.arange(bins)[:, None] + (steps + 0.5) / counts.clamp(1)) * widths
    places = places + start[:, None, None]
    inside = (places >= -1) & (places <= length) & (steps < counts)
    distances = places.clamp(0, length - 1)[..., None] - torch.arange(length)
    weights = (1 - distances.abs()).clamp(min=0) * inside[..., None]
    return weights.sum(2) / counts.clamp(1)
