"""Which parts of an image a classifier's score comes from."""

import torch
from torch import nn

__all__ = ["grad_cam"]


class _Logits(nn.Module):
    """What the grad-cam package takes: images in, logits out."""

    def __init__(self, model):
        super().__init__()
        self._model = model

    def forward(self, images):
        return self._model.logits(images)


def grad_cam(model, batched_inputs, classes):
    """
    Grad-CAM (Selvaraju et al., 2017) at the backbone's last feature map, by the grad-cam package.

    Args:
        model (ImageClassifier): left in evaluation mode.
        batched_inputs (list[dict]): N images, as the model takes them.
        classes (list[int]): (N,), the class whose score is explained, image by image.

    Returns:
        ndarray: (N, H, W) float32 of the images' size, from 0 to 1 in each image; all 0 where
        nothing speaks for the class.

    Raises:
        ImportError: the package is not installed.
        ValueError: the backbone has no feature map of (N, C, H, W).
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ImportError("Grad-CAM needs a package: pip install grad-cam") from error
    model.eval()
    maps = model.trace_features()
    last = max(maps, default=None)
    if last is None or maps[last].ndim != 4:
        raise ValueError(
            f"Grad-CAM needs a feature map of (N, C, H, W), which timm model {model.name!r} does "
            "not have"
        )
    # Gradients are wanted even where all weights are frozen.
    images = model.preprocess_image(batched_inputs).requires_grad_()
    targets = [ClassifierOutputTarget(index) for index in classes]
    with torch.enable_grad(), GradCAM(_Logits(model), [model.feature_layers()[last]]) as cam:
        return cam(input_tensor=images, targets=targets)
