"""A detector as one graph of tensor operations, for the runtimes that are not PyTorch.

Detectron2 loops over the images of a batch and passes objects between its parts; a traced loop has
a fixed length. Here the same computation works on all images at once, so that batch and image size
stay free.
"""

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes
from torch import nn
from torch.nn import functional as F
from torchvision.ops import nms

__all__ = ["OUTPUTS", "ClassifierGraph", "DetectorGraph"]


# Names of what a detector's graph returns, in this order; the last one only where it has masks.
OUTPUTS = ("image", "boxes", "scores", "classes", "masks")


class DetectorGraph(nn.Module):
    """
    ``GeneralizedRCNN.inference`` of a batch of images of one size, up to rounding.

    Attributes:
        outputs (tuple[str, ...]): names of what it returns.
    """

    def __init__(self, model):
        """
        Args:
            model (GeneralizedRCNN): with an RPN and StandardROIHeads, in evaluation mode.

        Raises:
            ValueError: it has other parts than these.
        """
        super().__init__()
        heads = getattr(model, "roi_heads", None)
        if (
            not isinstance(model, GeneralizedRCNN)
            or not isinstance(model.proposal_generator, RPN)
            or not isinstance(heads, StandardROIHeads)
            or heads.keypoint_on
            or (heads.mask_on and heads.mask_pooler is None)
        ):
            raise ValueError(
                f"{type(model).__name__} cannot be exported: only detectors with an RPN and "
                "StandardROIHeads for boxes and masks can, and image classifiers"
            )
        self.model = model
        self.outputs = OUTPUTS if heads.mask_on else OUTPUTS[:-1]

    def forward(self, images):
        """
        Args:
            images (Tensor): uint8, (N, C, H, W), in INPUT.FORMAT.

        Returns:
            tuple[Tensor, ...]: of D detections, by image and then by falling score: the image's
            index (D,), boxes (D, 4) in pixels, scores (D,), classes (D,) and, where the model has
            masks, their probabilities within the box (D, 1, h, w).
        """
        height, width = images.shape[2:]
        features = self.model.backbone(self._normalised(images))
        rois = self._proposals(features, height, width)
        rois, scores, classes = self._detections(features, rois, height, width)
        found = rois[:, 0].to(torch.int64), rois[:, 1:], scores, classes
        return (*found, self._masks(features, rois, classes)) if len(self.outputs) == 5 else found

    def _normalised(self, images):
        """Padded at the right and at the bottom to what the backbone divides by."""
        x = (images.to(self.model.pixel_mean.dtype) - self.model.pixel_mean) / self.model.pixel_std
        divisor = self.model.backbone.size_divisibility
        height, width = x.shape[2:]
        return F.pad(x, (0, -width % divisor, 0, -height % divisor)) if divisor > 1 else x

    def _proposals(self, features, height, width):
        """RPN.forward: (R, 5) of image index and xyxy, by image and then by falling score."""
        rpn = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(maps)
        anchors = rpn.anchor_generator(maps)
        number = maps[0].shape[0]
        boxes, scores, levels = [], [], []
        for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
            # (N, A, H, W) -> (N, H W A), and (N, A 4, H, W) -> (N, H W A, 4)
            score = logit.permute(0, 2, 3, 1).flatten(1)
            delta = delta.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            score, best = score.topk(_at_most(rpn.pre_nms_topk[False], score.shape[1]), dim=1)
            delta = delta.gather(1, best[..., None].expand(-1, -1, 4)).flatten(0, 1)
            box = rpn.box2box_transform.apply_deltas(delta, anchor.tensor[best.flatten()])
            boxes.append(box.reshape(number, -1, 4))
            scores.append(score)
            levels.append(torch.full_like(best, level))
        levels, boxes, scores = (
            torch.cat(each, dim=1).flatten(0, 1) for each in (levels, boxes, scores)
        )
        images = torch.arange(number, device=boxes.device).repeat_interleave(
            scores.shape[0] // number
        )
        boxes = _clip(boxes, height, width)
        usable = ((boxes[:, 2:] - boxes[:, :2]) > rpn.min_box_size).all(dim=1) & scores.isfinite()
        levels, images, boxes, scores = (each[usable] for each in (levels, images, boxes, scores))
        kept = _suppress(boxes, scores, images * len(maps) + levels, rpn.nms_thresh, height, width)
        kept = kept[_first_of_each(images[kept], number, rpn.post_nms_topk[False])]
        return torch.cat([images[kept, None].to(boxes.dtype), boxes[kept]], dim=1)

    def _detections(self, features, rois, height, width):
        """The box head on R ROIs: D of them as (D, 5), scores (D,) and classes (D,)."""
        heads = self.model.roi_heads
        predictor = heads.box_predictor
        maps = [features[name] for name in heads.box_in_features]
        scores, deltas = predictor(heads.box_head(_pool(heads.box_pooler, maps, rois)))
        scores = scores.softmax(dim=1)[:, :-1]
        boxes = predictor.box2box_transform.apply_deltas(deltas, rois[:, 1:])
        boxes = _clip(boxes.reshape(-1, 4), height, width).reshape(-1, deltas.shape[1] // 4, 4)
        roi, classes = (scores > predictor.test_score_thresh).nonzero().unbind(1)
        one_for_all = boxes.shape[1] == 1
        boxes = boxes[roi, 0] if one_for_all else boxes[roi, classes]
        scores, images = scores[roi, classes], rois[roi, 0].to(torch.int64)
        groups = images * predictor.num_classes + classes
        kept = _suppress(boxes, scores, groups, predictor.test_nms_thresh, height, width)
        number = maps[0].shape[0]
        kept = kept[_first_of_each(images[kept], number, predictor.test_topk_per_image)]
        rois = torch.cat([images[kept, None].to(boxes.dtype), boxes[kept]], dim=1)
        return rois, scores[kept], classes[kept]

    def _masks(self, features, rois, classes):
        """Probabilities (D, 1, h, w) within the boxes of D detections."""
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.mask_in_features]
        logits = heads.mask_head.layers(_pool(heads.mask_pooler, maps, rois))
        if logits.shape[1] > 1:  # else one mask for all classes
            chosen = classes[:, None, None, None].expand(-1, -1, *logits.shape[2:])
            logits = logits.gather(1, chosen)
        return logits.sigmoid()


class ClassifierGraph(nn.Module):
    """An image classifier as a graph: uint8 images (N, C, H, W) in, probabilities (N, K) out."""

    outputs = ("probabilities",)

    def __init__(self, model):
        """
        Args:
            model (ImageClassifier): in evaluation mode.
        """
        super().__init__()
        self.model = model

    def forward(self, images):
        pixels = images.to(self.model.pixel_mean.dtype)
        logits = self.model.logits((pixels - self.model.pixel_mean) / self.model.pixel_std)
        return (logits.softmax(dim=1),)


def _at_most(limit, size):
    """The smaller one; a size is a tensor in tracing, and stays one."""
    return size.clamp(max=limit) if isinstance(size, torch.Tensor) else min(size, limit)


def _clip(boxes, height, width):
    """Boxes (B, 4) xyxy, within the image."""
    x = boxes[:, 0::2].clamp(min=0).minimum(torch.as_tensor(width).to(boxes))
    y = boxes[:, 1::2].clamp(min=0).minimum(torch.as_tensor(height).to(boxes))
    return torch.stack([x, y], dim=2).flatten(1)


def _suppress(boxes, scores, groups, threshold, height, width):
    """
    Non-maximum suppression of clipped boxes within each group: indices by falling score. Groups are
    moved apart, which rounds coordinates to some thousandths of a pixel.
    """
    apart = torch.as_tensor(height + width).to(boxes) * groups.to(boxes.dtype)
    moved = (boxes + apart[:, None]).reshape(-1, 4)  # OpenVINO wants to know that there are four
    return nms(moved, scores, threshold)


def _first_of_each(images, number, limit):
    """Positions of the first `limit` entries of each of the `number` images, by image."""
    own = images[:, None] == torch.arange(number, device=images.device)
    rank = own.to(torch.int64).cumsum(0).gather(1, images[:, None])[:, 0]
    positions = (rank <= limit).nonzero()[:, 0]
    return positions[(images[positions] * images.shape[0] + positions).argsort()]


def _pool(pooler, maps, rois):
    """ROIPooler.forward for ROIs (R, 5) of image index and xyxy."""
    pooler = getattr(pooler, "pooler", pooler)  # of FP32ROIPooler
    level = assign_boxes_to_levels(
        [Boxes(rois[:, 1:])],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
    pooled = rois.new_zeros(rois.shape[0], maps[0].shape[1], *pooler.output_size)
    for i, (pool, x) in enumerate(zip(pooler.level_poolers, maps, strict=True)):
        here = (level == i).nonzero()[:, 0]
        pooled = pooled.index_put((here,), pool(x.float(), rois[here]))
    return pooled
