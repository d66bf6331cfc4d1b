"""Prediction in the endoscope's view only, its results in the coordinates of the whole frame."""

import numpy as np
import torch.nn.functional as F
from detectron2.structures import Instances

from imrcnn_d2.data.endoscope_view import find_view

__all__ = ["FrameViews", "in_whole_frame"]

FIRST_FRAMES = 10


class FrameViews:
    """
    The view of an image, or of the frames of a video in turn.

    It is found anew in each of the first ten frames, by what any of them shows so far, and then
    kept: a view does not move, and single frames may be dark.
    """

    def __init__(self):
        self._brightest, self._view, self._left = None, None, FIRST_FRAMES

    def __call__(self, image):
        """
        Args:
            image (np.ndarray): (H, W, 3) RGB, uint8.

        Returns:
            View or None: of the frame; None where nothing has been lit so far.
        """
        if self._brightest is None or self._brightest.shape != image.shape:
            self.__init__()
            self._brightest = np.zeros_like(image)
        if self._left or self._view is None:
            self._brightest = np.maximum(self._brightest, image)
            view = find_view(self._brightest)
            self._view = None if view.is_empty else view
            self._left = max(0, self._left - 1)
        return self._view


def in_whole_frame(instances, box, height, width):
    """
    Args:
        instances (Instances): of what ``box`` shows, in its coordinates.
        box (Box): where it lies in the frame.
        height, width (int): of the frame.

    Returns:
        Instances: of the frame; nothing in them lies outside the box.
    """
    ret = Instances((height, width), **instances.get_fields())
    ret.pred_boxes = instances.pred_boxes.clone()
    ret.pred_boxes.tensor += ret.pred_boxes.tensor.new_tensor([box.x0, box.y0, box.x0, box.y0])
    if instances.has("pred_masks"):
        around = box.x0, width - box.x1, box.y0, height - box.y1
        ret.pred_masks = F.pad(instances.pred_masks, around)
    return ret
