"""Checkpoints of every format that Detectron2 knows, loaded so that none of them can run code."""

import logging
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np

from imrcnn_d2.modeling.weight_files import (
    UnsafeFileError,
    load_safetensors,
    load_torch_file,
    refusal,
    unreadable,
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
    return loaded if "model" in loaded else {"model": loaded}


def _dict(loaded, filename):
    if not isinstance(loaded, dict):
        raise ValueError(f"{filename} holds a {type(loaded).__name__}, but a checkpoint is a dict")
    return loaded


def _from_pickle(filename):
    data = _dict(load_pickle(filename), filename)
    if "model" in data and "__author__" in data:
        logger.info(f"Reading a file from '{data['__author__']}'")
        return {**data, "model": _plain_arrays(data["model"])}
    # Detectron1's models have "blobs", those for ImageNet don't.
    blobs = _plain_arrays(_dict(data.get("blobs", data), filename))
    weights = {name: value for name, value in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _from_pycls(filename):
    data = _dict(load_torch_file(filename), filename)
    if "model_state" not in data:
        raise ValueError(f"{filename} has no 'model_state', which a .pyth file of pycls has")
    state = data["model_state"].items()
    weights = {name: value for name, value in state if not name.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _plain_arrays(weights):
    return {k: np.asarray(v) if isinstance(v, np.ndarray) else v for k, v in weights.items()}


def load_pickle(filename):
    """
    Unpickle containers, strings, numbers, numpy arrays and dtypes, of Python 2 or 3, of any numpy.

    Args:
        filename (str or Path): of any extension.

    Returns:
        object: what the file holds.

    Raises:
        UnsafeFileError: the file asks for anything else; the error names it.
        ValueError: the file is damaged, or no pickle.
    """
    with open(filename, "rb") as file:
        try:
            return _DataUnpickler(file, encoding="latin1").load()
        except _Refused as refused:
            raise refusal(filename, refused) from None
        except Exception as error:  # whatever an unpickler stumbles over in a damaged file
            raise unreadable(filename, "pickle of weights", error) from error


class _Refused(Exception):
    """Names what a pickle asked for and does not get."""


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


class _StandIn:
    """
    What a pickle gets for a function: it can be called, but not changed. numpy's own are not
    handed out, since a forged dtype makes numpy take numbers for pointers.
    """

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise _Refused("a change of a function")


class _Dtype:
    """A dtype on its way in: its name is known, its byte order comes with its state."""

    __slots__ = ("dtype",)

    def __init__(self, name, align=False, copy=False):
        if not isinstance(name, str) or not re.fullmatch(r"[biufcSU]\d+", name):
            raise _Refused(f"numpy.dtype({name!r})")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        byte_order, parts = state[1], state[2:5]
        if any(part is not None for part in parts):
            raise _Refused("a numpy.dtype with fields")
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array(np.ndarray):
    """An array whose content comes with its state."""

    def __setstate__(self, state):
        version, shape, dtype, is_fortran, data = state
        if isinstance(data, str):  # Python 2 has no bytes
            data = data.encode("latin1")
        values = _array(data, dtype, shape, "F" if is_fortran else "C")
        # numpy checks neither; what it gets has just been made by itself.
        super().__setstate__((1, values.shape, values.dtype, bool(is_fortran), bytes(data)))


def _array(data, dtype, shape, order, axis_order=None):
    """numpy's _frombuffer."""
    values = np.frombuffer(data, dtype.dtype)
    if order == "K" and axis_order is not None:
        return values.reshape(shape, order="C").transpose(axis_order)
    return values.reshape(shape, order=order)


def _scalar(dtype, data):
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.dtype, count=1)[0]


def _reconstruct(kind, shape, dtype):
    if kind is not _NDARRAY:
        raise _Refused("a subclass of numpy.ndarray")
    return _Array((0,), np.int8)


def _encode(text, encoding):
    """How bytes are pickled for Python 2."""
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode(…, {encoding!r})")
    return text.encode("latin1")


_NDARRAY = _StandIn(None)
_ADMITTED = {
    ("_codecs", "encode"): _StandIn(_encode),
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("numpy", "ndarray"): _NDARRAY,
    **{
        (builtins, kind.__name__): kind
        for builtins in ("builtins", "__builtin__")
        for kind in (set, frozenset, bytes, bytearray, complex)
    },
    **{
        (f"numpy.{core}.{module}", name): _StandIn(function)
        for core in ("core", "_core")  # numpy 1 and 2
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array),
        )
    },
}
