"""Downloads of Detectron2's tools, which stay in their folder. Importing this sees to it."""

import contextlib
import io
import json
import logging
import math
import os
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler, get_cache_dir
from safetensors import SafetensorError, safe_open

__all__ = [
    "CHECKSUM",
    "DownloadHandler",
    "UnsafeFileError",
    "load_checkpoint_file",
    "load_pickle",
    "load_safetensors",
    "load_torch_file",
    "open_stored",
    "refusal",
    "strict_loads",
    "tensors_checksum",
    "unreadable",
]

logger = logging.getLogger(__name__)


CHECKSUM = "crc32"  # the key among a safetensors file's metadata, see tensors_checksum

# A pickle may take twice its file's size, a GiB more for what a file of weights holds besides
# tensors, and of these at most so many bytes for each of its steps.
_SPARE = 2**30
_STEP = 256


class UnsafeFileError(ValueError):
    """A file was refused: it needs more than data to be loaded."""


def refusal(filename, what):
    """
    Args:
        filename (str or Path): the file.
        what (str): what it asks for, such as "posix.system".

    Returns:
        UnsafeFileError:
    """
    return UnsafeFileError(
        f"{filename} was refused: it holds {what}, and to load that could run any code. Weights "
        "are tensors, numbers, strings and containers of these. If you trust the file's source, "
        "load it once in a program of your own and save its tensors alone, with "
        "safetensors.torch.save_file(tensors, 'weights.safetensors')"
    )


def unreadable(filename, kind, error):
    """
    Args:
        filename (str or Path): the file.
        kind (str): what it should be.
        error (Exception): what its reader said.

    Returns:
        ValueError:
    """
    return ValueError(
        f"{filename} cannot be read as a {kind} ({error!r}): it is damaged or of another format"
    )


@contextlib.contextmanager
def _read(filename: str | Path, kind: str) -> Iterator[BinaryIO]:
    """The open file; whatever goes wrong in reading it becomes an error that names it."""
    with open(filename, "rb") as file:
        try:
            yield file
        except _Refused as refused:
            raise refusal(filename, refused) from None
        except Exception as error:  # whatever an unpickler stumbles over in a damaged file
            raise unreadable(filename, kind, error) from error


def open_stored(file: BinaryIO) -> zipfile.ZipFile:
    """
    Open a zip archive, each of whose members is checked against its CRC-32 when it is read.

    Raises:
        BadZipFile: it is none, or its members are compressed or longer than the file, as none is
            that torch.save or tools/export.py writes.
    """
    size = file.seek(0, io.SEEK_END)
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    stored = all(
        member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
        for member in members
    )
    if not stored or sum(member.file_size for member in members) > size:
        raise zipfile.BadZipFile("members are compressed, or longer than the file")
    return archive


def load_torch_file(filename):
    """
    Read what ``torch.save`` wrote, on the CPU. Not by ``torch.load``, which doesn't look at the
    checksums and makes tensors and buffers of any size that a pickle names.

    Args:
        filename (str or Path): of any extension.

    Returns:
        object: tensors, numbers, strings and containers of these.

    Raises:
        UnsafeFileError: the file holds anything else; the error names it.
        ValueError: the file is damaged, or not torch's.
    """
    with _read(filename, "file of torch.save") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        return _from_zip(file) if zipped else _from_legacy(file)


def _from_zip(file: BinaryIO) -> object:
    """The format since torch 1.6: a zip of data.pkl and of a member per storage."""
    budget = _Budget(file)
    with open_stored(file) as archive:
        (pickled,) = (name for name in archive.namelist() if re.fullmatch("[^/]+/data.pkl", name))
        folder = pickled.removesuffix("data.pkl")
        with contextlib.suppress(KeyError):
            if archive.read(f"{folder}byteorder").decode() != sys.byteorder:
                raise ValueError("it is of a machine of another byte order")

        def storage(key, size):
            content = bytearray(archive.read(f"{folder}data/{key}"))
            return torch.frombuffer(content, dtype=torch.uint8) if content else _no_bytes(0)

        return _TorchUnpickler(io.BytesIO(archive.read(pickled)), budget, storage).load()


def _from_legacy(file: BinaryIO) -> object:
    """The format before: three pickles ahead of the one that counts, its storages behind it."""
    budget = _Budget(file)
    file.seek(0)
    content = io.BytesIO(file.read())
    storages = {}

    def storage(key, size):
        budget.spend(size)
        return storages.setdefault(key, _no_bytes(size))

    def load():
        return _TorchUnpickler(content, budget, storage).load()

    if (load(), load()) != (0x1950A86A20F9469CFC6C, 1001):
        raise ValueError("it has not the magic number of torch.save")
    if not load()["little_endian"] or sys.byteorder != "little":
        raise ValueError("it is of a machine of another byte order")
    loaded, keys = load(), load()
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those that its tensors are of")
    for key in keys:
        content.seek(8, io.SEEK_CUR)  # its length, which is known
        if content.readinto(storages[key].numpy()) != len(storages[key]):
            raise EOFError("it is cut off")
    return loaded


def _no_bytes(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


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
    with _read(filename, "pickle of weights") as file:
        budget = _Budget(file)
        file.seek(0)
        return _DataUnpickler(io.BytesIO(file.read()), budget).load()


class _Refused(Exception):
    """Names what a pickle asked for and does not get."""


class _Budget:
    """The memory that the content of a file may take; 35 bytes of a pickle can ask for any."""

    def __init__(self, file: BinaryIO):
        self._left = 2 * file.seek(0, io.SEEK_END) + _SPARE

    def spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError("it asks for far more memory than its size")

    def spend_on_copies(self, arguments: tuple) -> None:
        for value in arguments:
            if isinstance(value, bytes | bytearray | str):
                self.spend(len(value))
            elif isinstance(value, np.ndarray):
                self.spend(value.nbytes)
            elif isinstance(value, list | tuple | dict | set | frozenset):
                self.spend(_STEP * len(value))


def _within_bounds(code: int, step: Callable) -> Callable:
    """A step of the unpickler that costs, and that changes containers only, by their own kind."""
    place, kinds = _CHANGED.get(code, (None, None))
    keys = _KEYS.get(code, lambda self: ())

    def bounded(self):
        self.budget.spend(_STEP)
        if place is not None and not isinstance(place(self), kinds):
            raise _Refused(f"a change of a {type(place(self)).__name__.strip('_').lower()}")
        _check_keys(keys(self))
        step(self)

    return bounded


def _check_keys(keys: Iterable) -> None:
    """Nested tuples overflow the stack when they are hashed; chosen numbers collide."""
    for key in keys:
        if not isinstance(key, str | bytes | int | None) or (
            isinstance(key, int) and abs(key) >= 2**32
        ):
            raise _Refused(f"a {type(key).__name__} or too large a number as a key")


# Python's own unpickler in Python: the one in C makes room for any memo that a pickle names.
class _DataUnpickler(pickle._Unpickler):
    """Gives what `ADMITTED` makes of the globals, as stand-ins: no class gets into its hands."""

    ADMITTED = {}  # filled below

    def __init__(self, file: BinaryIO, budget: _Budget):
        super().__init__(file, encoding="latin1")
        self.budget = budget

    def find_class(self, module, name):
        try:
            found = self.ADMITTED[module, name]
        except (KeyError, TypeError):
            raise _Refused(f"{module}.{name}") from None
        return _Function(found, self.budget) if callable(found) else found

    def load_bytearray8(self):
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, OrderedDict):
            self.budget.spend_on_copies(state)
            target.__setstate__(state)
        elif metadata := state.get("_metadata"):  # of a state_dict: the versions of its modules
            target._metadata = OrderedDict(
                (name, {"version": about["version"]})
                for name, about in metadata.items()
                if isinstance(about.get("version"), int)
            )


class _Function:
    """
    What a pickle gets for a function: it can be called, but not changed. numpy's own are not
    handed out, since a forged dtype makes numpy take numbers for pointers.
    """

    __slots__ = ("_budget", "_function")

    def __init__(self, function: Callable, budget: _Budget):
        self._function, self._budget = function, budget

    def __call__(self, *args):
        self._budget.spend_on_copies(args)
        return self._function(*args)


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
    if encoding.replace("-", "") != "latin1":
        raise _Refused(f"_codecs.encode(…, {encoding!r})")
    return text.encode("latin1")


def _bytearray(data=b"", encoding="latin1"):
    """Not of a number, which would be a length."""
    return bytearray(_encode(data, encoding) if isinstance(data, str) else b"".join([data]))


def _container(kind):
    """Makes it of a container's items, not of a text's or an array's, which are shorter."""

    def make(items=()):
        if not isinstance(items, list | tuple | dict):
            raise TypeError(f"a {kind.__name__} of a {type(items).__name__}")
        if kind is OrderedDict and not isinstance(items, dict):
            _check_keys(key for key, _ in items)
        elif kind is not torch.Size:
            _check_keys(items)
        return kind(items)

    return make


_NDARRAY = object()
_DataUnpickler.ADMITTED = {
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _container(OrderedDict),
    ("collections", "Counter"): _container(Counter),
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NDARRAY,
    **{
        (builtins, name): function
        for builtins in ("builtins", "__builtin__")
        for name, function in {
            "set": _container(set),
            "frozenset": _container(frozenset),
            "bytes": lambda: b"",  # others come as texts, see _encode
            "bytearray": _bytearray,
            "complex": complex,
        }.items()
    },
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")  # numpy 1 and 2
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array),
        )
    },
}

# Steps that change an object: where it lies, and of what kind it has to be.
_CHANGED = {
    pickle.SETITEM[0]: (lambda self: self.stack[-3], dict),
    pickle.SETITEMS[0]: (lambda self: self.metastack[-1][-1], dict),
    pickle.APPEND[0]: (lambda self: self.stack[-2], list),
    pickle.APPENDS[0]: (lambda self: self.metastack[-1][-1], list),
    pickle.ADDITEMS[0]: (lambda self: self.metastack[-1][-1], set),
    pickle.BUILD[0]: (lambda self: self.stack[-2], (OrderedDict, _Array, _Dtype)),
}
# Steps that put keys into a dict or a set: where they lie.
_KEYS = {
    pickle.SETITEM[0]: lambda self: self.stack[-2:-1],
    pickle.SETITEMS[0]: lambda self: self.stack[::2],
    pickle.DICT[0]: lambda self: self.stack[::2],
    pickle.ADDITEMS[0]: lambda self: self.stack,
    pickle.FROZENSET[0]: lambda self: self.stack,
}
_DataUnpickler.dispatch = {
    code: _within_bounds(code, step)
    for code, step in {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _DataUnpickler.load_bytearray8,
        pickle.BUILD[0]: _DataUnpickler.load_build,
    }.items()
}


class _TorchUnpickler(_DataUnpickler):
    """Of tensors too."""

    def __init__(self, file: BinaryIO, budget: _Budget, storage: Callable):
        """
        Args:
            storage: key, size in bytes -> its content, uint8.
        """
        super().__init__(file, budget)
        self._storage, self._storages = storage, {}

    def persistent_load(self, pid):
        kind, dtype, key, _, number, *view = pid
        wanted = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not wanted or any(view):
            raise ValueError(f"{pid} is no storage")
        size = number * dtype.itemsize
        if key not in self._storages:
            self._storages[key] = self._storage(key, size)
        if len(self._storages[key]) != size:
            raise ValueError(f"storage {key} is not of {number} numbers")
        return _Storage(self._storages[key].view(dtype), self.budget)


class _Storage:
    """A storage in a pickle's hands."""

    __slots__ = ("_budget", "_values")

    def __init__(self, values: torch.Tensor, budget: _Budget):
        self._values, self._budget = values, budget

    def tensor(self, offset, shape, stride, grad, hooks, bits=None) -> torch.Tensor:
        """torch's _rebuild_tensor_v2; none that is larger than its storage, with a stride of 0."""
        if bits:
            raise ValueError(f"a tensor with {bits}")
        number = math.prod(shape)
        reach = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
        least = min(offset, *shape, *stride, 0)
        if least < 0 or max(number, reach if number else 0) > len(self._values):
            raise ValueError(f"a tensor of shape {tuple(shape)} is larger than its storage")
        self._budget.spend(number * self._values.itemsize)
        return self._values.as_strided(shape, stride, offset)


_DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_TorchUnpickler.ADMITTED = {
    **_DataUnpickler.ADMITTED,
    ("torch._utils", "_rebuild_tensor_v2"): _Storage.tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *others: tensor,
    ("torch", "Size"): _container(torch.Size),
    ("torch", "device"): torch.device,
    **{("torch", f"{name}Storage"): dtype for name, dtype in _DTYPES.items()},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES.values()},
}


def load_safetensors(filename):
    """
    Args:
        filename (str or Path): a .safetensors file.

    Returns:
        tuple[dict[str, Tensor], dict[str, object]]: the tensors, on the CPU; the metadata, parsed
        where they are JSON, else as strings.

    Raises:
        ValueError: the file is damaged, or no safetensors file.
    """
    try:
        with safe_open(filename, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise unreadable(filename, "safetensors file", error) from error
    checksum = metadata.pop(CHECKSUM, None)
    if checksum not in (None, tensors_checksum(tensors, metadata)):
        raise ValueError(f"{filename} is damaged: its checksum {checksum} does not fit")
    return tensors, {name: _parsed(text) for name, text in metadata.items()}


def tensors_checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """CRC-32 of all that a safetensors file holds, which the format itself has none of."""
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), crc)
    return str(crc)


def _parsed(text):
    try:
        return strict_loads(text)
    except ValueError:
        return text


def strict_loads(text: str | bytes) -> object:
    """
    Parse JSON as the standard has it: without NaN and Infinity.

    Raises:
        ValueError: it is none, or nested too deeply.
    """

    def refuse(name):
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


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


MODEL_ZOO = "https://dl.fbaipublicfiles.com/"


class DownloadHandler(HTTPURLHandler):
    """
    Puts http://HOST/a/b at HOST/a/b in the folder of downloads, and the model zoo's at a/b. That of
    iopath goes where ``..`` leads, and takes a file of one host for another's.
    """

    def _get_local_path(
        self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any
    ) -> str:
        address = urlparse(path)
        if ".." in (address.netloc, *address.path.split("/"), path.split("/")[-1]):
            raise ValueError(
                f"{path!r} was not downloaded: '..' in an address would lead out of the folder of "
                "downloads. Give the address without it, or a local file"
            )
        if not path.startswith(MODEL_ZOO):
            cache_dir = os.path.join(get_cache_dir(cache_dir), address.netloc)
        return super()._get_local_path(path, force, cache_dir, **kwargs)


PathManager.register_handler(DownloadHandler())  # of detectron2:// and catalog:// too
