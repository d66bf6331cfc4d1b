import cv2
import numpy as np
import pytest
import torch

from imrcnn_d2.modeling import ImageClassifier
from imrcnn_d2.modeling.classifier import grad_cam

pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")


@pytest.mark.parametrize("frozen", [False, True])
def test_on_a_pooled_map_it_is_the_class_activation_map(frozen):
    # Between ResNet's last map and the logits lie a mean and a linear layer, so the gradient is the
    # linear layer's weight, and Grad-CAM is what Zhou et al. (2016) computed without gradients.
    torch.manual_seed(0)
    model = ImageClassifier("resnet18", 3).eval().requires_grad_(not frozen)
    torch.nn.init.uniform_(model.head.weight, -0.5, 1)  # so that something speaks for each class
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    found = grad_cam(model, [{"image": torch.from_numpy(p)} for p in pixels], [2, 0])
    assert found.shape == (2, 96, 96)
    with torch.no_grad():
        maps = model.backbone.forward_features(
            (torch.from_numpy(pixels) - model.pixel_mean) / model.pixel_std
        ).numpy()
    for heat, features, label in zip(found, maps, (2, 0), strict=True):
        weight = model.head.weight[label].detach().numpy()
        cam = np.maximum(np.tensordot(weight, features, 1), 0)
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        np.testing.assert_allclose(heat, cv2.resize(cam, (96, 96)), atol=0.01)
    assert not any(layer._forward_hooks for layer in model.modules()), "hooks were left behind"


def test_tokens_are_no_map():
    model = ImageClassifier("vit_tiny_patch16_224", 3)
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224' does not have"):
        grad_cam(model, [{"image": torch.zeros(3, 224, 224, dtype=torch.uint8)}], [0])
