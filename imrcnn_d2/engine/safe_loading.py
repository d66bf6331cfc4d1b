"""Checkpoints of every format that Detectron2 knows, loaded so that none of them can run code."""

import logging
from pathlib import Path

import numpy as np

from imrcnn_d2.modeling.weight_files import (
    UnsafeFileError,
    load_pickle,
    load_safetensors,
    load_torch_file,
)

__all__ = ["UnsafeFileError", "load_checkpoint_file"]

logger = logging.getLogger(__name__)


def load_checkpoint_file(filename):
    """
    Read a checkpoint as Detectron2's ``DetectionCheckpointer`` does, but as data only.

    ========================== ====================================================================
    ``.pkl``                   Detectron2's model zoo, or Caffe2's and Detectron1's; by an unpickler
                               that admits containers, strings, numbers, numpy arrays and dtypes
    ``.pyth``                  pycls
    ``.safetensors``           the model's tensors; metadata such as ``operating_point`` as JSON
    ``.pth`` and anything else what ``torch.save`` wrote, with or without "model" around the weights
    ========================== ====================================================================

    Args:
        filename (str or Path): a local file.

    Returns:
        dict: "model" (dict[str, Tensor or ndarray]) and whatever else the file holds;
        "matching_heuristics" is True where the names of the weights have to be matched.

    Raises:
        UnsafeFileError: the file needs more than data to be loaded; the error names what.
        ValueError: the file is damaged or holds no weights.
    """
    suffix = Path(filename).suffix
    if suffix == ".pkl":
        return _from_pickle(filename)
    if suffix == ".pyth":
        return _from_pycls(filename)
    if suffix == ".safetensors":
        model, metadata = load_safetensors(filename)
        return {**metadata, "model": model}
    loaded = _dict(load_torch_file(filename), filename)
    loaded = loaded if "model" in loaded else {"model": loaded}
    return {**loaded, "model": _state(loaded["model"], filename)}


def _dict(loaded, filename):
    if not isinstance(loaded, dict):
        raise ValueError(f"{filename} holds a {type(loaded).__name__}, but a checkpoint is a dict")
    return loaded


def _state(weights: object, filename: str | Path) -> dict:
    """Weights by name; a state_dict stays one, with the versions of its modules."""
    if not all(isinstance(name, str) for name in _dict(weights, filename)):
        raise ValueError(f"{filename} holds weights that have no names")
    return weights


def _from_pickle(filename):
    data = _dict(load_pickle(filename), filename)
    if "model" in data and "__author__" in data:
        logger.info(f"Reading a file from '{data['__author__']}'")
        return {**data, "model": _plain_arrays(_state(data["model"], filename))}
    # Detectron1's models have "blobs", those for ImageNet don't.
    blobs = _plain_arrays(_state(data.get("blobs", data), filename))
    weights = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _from_pycls(filename):
    data = _dict(load_torch_file(filename), filename)
    if "model_state" not in data:
        raise ValueError(f"{filename} has no 'model_state', which a .pyth file of pycls has")
    state = _state(data["model_state"], filename).items()
    weights = {name: value for name, value in state if not name.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _plain_arrays(weights):
    return {k: np.asarray(v) if isinstance(v, np.ndarray) else v for k, v in weights.items()}
