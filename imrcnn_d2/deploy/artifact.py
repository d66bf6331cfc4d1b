"""Models as one file that brings along what is needed to use them."""

import json
from importlib import metadata

import safetensors.torch
import torch

from imrcnn_d2.engine.provenance import config_sha256
from imrcnn_d2.evaluation.files import write_atomically
from imrcnn_d2.modeling.weight_files import CHECKSUM, tensors_checksum

from .loading import ARTIFACT_VERSION

__all__ = ["PRECISIONS", "describe", "write_safetensors"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


def write_safetensors(loaded, path, *, precision="fp32"):
    """
    Write a model's weights as a safetensors file, which MODEL.WEIGHTS takes wherever it is read and
    a :class:`Predictor` takes without a config.

    Its metadata are JSON texts: ``config`` (YAML), ``classes``, ``operating_point``, ``tau``,
    ``model``, ``backbone``, ``precision``, ``version``, ``config_sha256``, ``weights_sha256`` (of
    the file that the weights are from), ``artifact`` (the format's version) and ``crc32`` (of all
    of these and of the tensors).

    Args:
        loaded (LoadedModel):
        path (Path): ends with .safetensors; replaced at once, or not at all.
        precision (str): "fp32", or "fp16" for half the size: kernels and matrices are rounded,
            vectors such as the statistics of a norm are not.

    Raises:
        ValueError: a weight is too large for fp16; the error names it.
    """
    about = describe(loaded, precision)
    kernels = {name for name, tensor in loaded.model.named_parameters() if tensor.ndim > 1}
    tensors = {
        name: _rounded(name, tensor, PRECISIONS[precision] if name in kernels else tensor.dtype)
        for name, tensor in loaded.model.state_dict().items()
    }
    texts = {"format": "pt", **{key: json.dumps(value) for key, value in about.items()}}
    texts[CHECKSUM] = tensors_checksum(tensors, texts)
    write_atomically(path, safetensors.torch.save(tensors, texts))


def describe(loaded, precision):
    """
    Args:
        loaded (LoadedModel):
        precision (str): of the file.

    Returns:
        dict: what an exported file says about itself, see :func:`write_safetensors`; of JSON types.
    """
    cfg = loaded.cfg.clone()
    cfg.defrost()
    # Of the machine that it was trained on.
    cfg.OUTPUT_DIR, cfg.MODEL.DEVICE = "./output", "cpu"
    model, backbone = loaded.names
    point = loaded.weights.operating_point
    return {
        "artifact": ARTIFACT_VERSION,
        "version": metadata.version("imrcnn-d2"),
        "model": model,
        "backbone": backbone,
        "classes": loaded.classes,
        "tau": loaded.tau,
        "operating_point": point and vars(point),
        "precision": precision,
        "weights_sha256": loaded.weights.sha256,
        "config_sha256": config_sha256(cfg),
        "config": cfg.dump(),
    }


def _rounded(name, tensor, dtype):
    """A copy: safetensors refuses tensors that share their memory."""
    rounded = tensor.detach().cpu().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(rounded).all():
        largest = tensor.abs().max().item()
        raise ValueError(f"{name} has values up to {largest:g}, too large for fp16; take fp32")
    return rounded
