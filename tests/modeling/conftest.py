"""CBAM computed with numpy and scipy alone, for whoever needs to check against it."""

import numpy as np
import pytest
from scipy.signal import correlate2d
from scipy.special import expit


def _cbam(x, weights, scale):
    """
    Equations 1 to 3 of Woo et al. (2018), image by image.

    Args:
        x (Tensor): (N, C, H, W).
        weights (dict[str, Tensor]): the state dict of a CBAM.
        scale (float): factor on each sigmoid.

    Returns:
        ndarray: (N, C, H, W).
    """
    first, second = (weights[f"channel.mlp.{i}.weight"].double().numpy() for i in (0, 2))
    kernel = weights["spatial.conv.weight"][0].double().numpy()

    def mlp(v):
        return second @ np.maximum(first @ v, 0)

    result = []
    for image in x.detach().double().numpy():
        flat = image.reshape(len(image), -1)
        refined = image * scale * expit(mlp(flat.mean(1)) + mlp(flat.max(1)))[:, None, None]
        pooled = (refined.mean(0), refined.max(0))
        logits = sum(correlate2d(p, k, mode="same") for p, k in zip(pooled, kernel, strict=True))
        result.append(refined * scale * expit(logits))
    return np.stack(result)


@pytest.fixture(scope="session")
def numpy_cbam():
    """The function above."""
    return _cbam
