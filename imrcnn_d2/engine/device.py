"""Which device a run uses, decided once."""

import os
from pathlib import Path

import torch

__all__ = ["choose_device"]

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device():
    """
    The device for MODEL.DEVICE where nobody named one.

    Returns:
        str: "cuda" where a usable NVIDIA card is, else "cpu". A card hidden with
            ``CUDA_VISIBLE_DEVICES=""`` counts as absent.

    Raises:
        RuntimeError: if a card is present but this torch cannot use it: training on the CPU unasked
            would cost days.
    """
    if torch.cuda.is_available():
        return "cuda"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if _NVIDIA_DRIVER.exists() and not hidden:
        driver = _NVIDIA_DRIVER.read_text().splitlines()[0]
        raise RuntimeError(
            f"An NVIDIA card is present ({driver}), but torch {torch.__version__} (built for CUDA "
            f"{torch.version.cuda}) cannot use it. Install a torch build for this driver "
            "(make install TORCH=...), update the driver, or ask for the CPU: MODEL.DEVICE cpu"
        )
    return "cpu"
