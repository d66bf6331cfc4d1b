"""Checkpoints read as data, so that no file runs code; downloads that stay in their folder."""

import contextlib
import io
import json
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
from fvcore.common.file_io import HTTPURLHandler, get_cache_dir
from safetensors import safe_open

CHECKSUM = "crc32"  # key in a safetensors file's metadata, see tensors_checksum

# A pickle may take twice its file's size plus _SPARE bytes; each of its steps costs _STEP of these.
_SPARE = 2**30
_STEP = 256


class UnsafeFileError(ValueError):
    """A file was refused: it needs more than data to be loaded."""


@contextlib.contextmanager
def _read(filename: str | Path, kind: str) -> Iterator[BinaryIO]:
    """Open a file; whatever goes wrong in reading it becomes an error that names it."""
    with open(filename, "rb") as file:
        try:
            yield file
        except _Refused as refused:
            raise UnsafeFileError(
                f"{filename} was refused: it holds {refused}, which could run any code when "
                "loaded. If you trust its source, load it once in a separate program and save the "
                "tensors with safetensors.torch.save_file(tensors, 'weights.safetensors')"
            ) from None
        except Exception as error:  # damaged files make unpicklers raise anything
            raise ValueError(
                f"{filename} cannot be read as a {kind} ({error!r}): it is damaged or of another "
                "format"
            ) from error


def open_stored(file: BinaryIO) -> zipfile.ZipFile:
    """Open a zip archive of uncompressed members, as torch.save and ``imrcnn export`` write it.

    Reading a member checks its CRC-32.

    Raises:
        BadZipFile: no zip archive, or its members are compressed or longer than the file.
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


def load_torch_file(filename: str | Path) -> object:
    """Read a file of ``torch.save``, of any extension: tensors (on the CPU), numbers, strings and
    containers of these. ``torch.load`` ignores checksums and allocates whatever a pickle names.

    Raises:
        UnsafeFileError: the file holds anything else, which the error names.
        ValueError: the file is damaged, or not torch's.
    """
    with _read(filename, "file of torch.save") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        return _from_zip(file) if zipped else _from_legacy(file)


def _from_zip(file: BinaryIO) -> object:
    """The format since torch 1.6: a zip of data.pkl and one member per storage."""
    budget = _Budget(file)
    with open_stored(file) as archive:
        (pickled,) = (name for name in archive.namelist() if re.fullmatch("[^/]+/data.pkl", name))
        folder = pickled.removesuffix("data.pkl")
        with contextlib.suppress(KeyError):
            if archive.read(f"{folder}byteorder").decode() != sys.byteorder:
                raise ValueError("it was written on a machine of another byte order")

        def storage(key, size):
            content = bytearray(archive.read(f"{folder}data/{key}"))
            return torch.frombuffer(content or bytearray(1), dtype=torch.uint8)[: len(content)]

        return _TorchUnpickler(io.BytesIO(archive.read(pickled)), budget, storage).load()


def _from_legacy(file: BinaryIO) -> object:
    """The format before: three pickles, the pickle that counts, and the content of its storages."""
    budget, storages = _Budget(file), {}
    file.seek(0)
    content = io.BytesIO(file.read())

    def storage(key, size):
        budget.spend(size)
        return storages.setdefault(key, torch.empty(size, dtype=torch.uint8))

    def load():
        return _TorchUnpickler(content, budget, storage).load()

    if (load(), load()) != (0x1950A86A20F9469CFC6C, 1001):
        raise ValueError("it lacks the magic number of torch.save")
    if not load()["little_endian"] or sys.byteorder != "little":
        raise ValueError("it was written on a machine of another byte order")
    loaded, keys = load(), load()
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        content.seek(8, io.SEEK_CUR)  # the length, which is known
        if content.readinto(storages[key].numpy()) != len(storages[key]):
            raise EOFError("it is cut off")
    return loaded


def load_pickle(filename: str | Path) -> object:
    """As :func:`load_torch_file`, of a pickle of numpy arrays, of Python 2 or 3, of any numpy."""
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


def _check_keys(keys: Iterable) -> None:
    """Nested tuples overflow the stack when they are hashed; chosen numbers collide."""
    for key in keys:
        number = isinstance(key, int)
        if not isinstance(key, str | bytes | int | None) or (number and abs(key) >= 2**32):
            raise _Refused(f"a {type(key).__name__} or too large a number as a key")


# Python's unpickler in Python: the one in C allocates any memo that a pickle names.
class _DataUnpickler(pickle._Unpickler):
    """Replaces the globals that a pickle names by those of ``ADMITTED``; it gets hold of no class.

    numpy's own functions are not among them: a forged dtype makes numpy take numbers for pointers.
    """

    ADMITTED = {}  # filled below

    def __init__(self, file: BinaryIO, budget: _Budget):
        super().__init__(file, encoding="latin1")
        self.budget = budget

    def find_class(self, module, name):
        try:
            admitted = self.ADMITTED[module, name]
        except (KeyError, TypeError):
            raise _Refused(f"{module}.{name}") from None

        def function(*args):
            self.budget.spend_on_copies(args)
            return admitted(*args)

        return function if callable(admitted) else admitted

    def load_long4(self):
        raise _Refused("a number of over 600 digits")

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
                (name, {"version": module["version"]})
                for name, module in metadata.items()
                if isinstance(module.get("version"), int)
            )


class _Dtype:
    """A dtype being unpickled: created with its name, then given a state with its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, name, align=False, copy=False):
        if not isinstance(name, str) or not re.fullmatch(r"[biufcSU]\d+", name):
            raise _Refused(f"numpy.dtype({name!r})")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        if any(part is not None for part in state[2:5]):
            raise _Refused("a numpy.dtype with fields")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array being unpickled: created empty, then given a state with its content."""

    def __setstate__(self, state):
        version, shape, dtype, is_fortran, data = state
        if isinstance(data, str):  # Python 2 has no bytes
            data = data.encode("latin1")
        values = _array(data, dtype, shape, "F" if is_fortran else "C")
        # numpy checks neither shape nor dtype; these are of an array that it made itself.
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
    """Not from a number, which would be a length."""
    return bytearray(_encode(data, encoding) if isinstance(data, str) else b"".join([data]))


def _container(kind):
    """Built from a container's items; those of a text or an array take more memory than it."""

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
_BUILTINS = {
    "set": _container(set),
    "frozenset": _container(frozenset),
    "bytes": lambda: b"",  # others are pickled as texts, see _encode
    "bytearray": _bytearray,
    "complex": complex,
}
_NUMPY = {
    "multiarray._reconstruct": _reconstruct,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _array,
}
_DataUnpickler.ADMITTED = {
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _container(OrderedDict),
    ("collections", "Counter"): _container(Counter),
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NDARRAY,
    **{
        (module, name): _BUILTINS[name]
        for module in ("builtins", "__builtin__")
        for name in _BUILTINS
    },
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")  # numpy 1 and 2
        for (module, name), function in ((key.split("."), _NUMPY[key]) for key in _NUMPY)
    },
}

# Steps that change an object: where it lies, and the kinds that may be changed.
_CHANGED = {
    pickle.SETITEM[0]: (lambda self: self.stack[-3], dict),
    pickle.SETITEMS[0]: (lambda self: self.metastack[-1][-1], dict),
    pickle.APPEND[0]: (lambda self: self.stack[-2], list),
    pickle.APPENDS[0]: (lambda self: self.metastack[-1][-1], list),
    pickle.ADDITEMS[0]: (lambda self: self.metastack[-1][-1], set),
    pickle.BUILD[0]: (lambda self: self.stack[-2], (OrderedDict, _Array, _Dtype)),
}
# Steps that put keys into a dict or a set: where the keys lie.
_KEYS = {
    pickle.SETITEM[0]: lambda self: self.stack[-2:-1],
    pickle.SETITEMS[0]: lambda self: self.stack[::2],
    pickle.DICT[0]: lambda self: self.stack[::2],
    pickle.ADDITEMS[0]: lambda self: self.stack,
    pickle.FROZENSET[0]: lambda self: self.stack,
}


def _within_bounds(code: int, step: Callable) -> Callable:
    """A step of the unpickler that costs memory and is checked by the tables above."""
    place, kinds = _CHANGED.get(code, (None, None))
    keys = _KEYS.get(code, lambda self: ())

    def bounded(self):
        self.budget.spend(_STEP)
        if place is not None and not isinstance(place(self), kinds):
            raise _Refused(f"a change of a {type(place(self)).__name__.strip('_').lower()}")
        _check_keys(keys(self))
        step(self)

    return bounded


_DataUnpickler.dispatch = {
    code: _within_bounds(code, step)
    for code, step in {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _DataUnpickler.load_bytearray8,
        pickle.LONG4[0]: _DataUnpickler.load_long4,
        pickle.BUILD[0]: _DataUnpickler.load_build,
    }.items()
}


class _TorchUnpickler(_DataUnpickler):
    """Unpickles tensors too; ``storage(key, size)`` gives the bytes (uint8) of their storages."""

    def __init__(self, file: BinaryIO, budget: _Budget, storage: Callable):
        super().__init__(file, budget)
        self._storage, self._storages = storage, {}

    def persistent_load(self, pid):
        kind, dtype, key, _, number, *view = pid
        plain = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not plain or any(view):
            raise ValueError(f"{pid} is no storage")
        size = number * dtype.itemsize
        if key not in self._storages:
            self._storages[key] = self._storage(key, size)
        if len(self._storages[key]) != size:
            raise ValueError(f"storage {key} does not hold {number} numbers")
        return _Storage(self._storages[key].view(dtype), self.budget)


class _Storage:
    """What a pickle gets as a storage."""

    __slots__ = ("_budget", "_values")

    def __init__(self, values: torch.Tensor, budget: _Budget):
        self._values, self._budget = values, budget

    def tensor(self, offset, shape, stride, grad, hooks, bits=None) -> torch.Tensor:
        """torch's _rebuild_tensor_v2, but no larger than the storage, as a stride of 0 makes it."""
        if bits:
            raise ValueError(f"a tensor with {bits}")
        number = math.prod(shape)
        reach = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
        least = min(offset, *shape, *stride, 0)
        if least < 0 or max(number, reach if number else 0) > len(self._values):
            raise ValueError(f"a tensor of shape {tuple(shape)} is larger than its storage")
        self._budget.spend(number * self._values.itemsize)
        return self._values.as_strided(shape, stride, offset)


_STORAGES = dict(
    pair.split(":")
    for pair in (
        "Float:float32 Double:float64 Half:float16 BFloat16:bfloat16 Byte:uint8 Char:int8 "
        "Short:int16 Int:int32 Long:int64 Bool:bool ComplexFloat:complex64 ComplexDouble:complex128"
    ).split()
)
_TorchUnpickler.ADMITTED = {
    **_DataUnpickler.ADMITTED,
    ("torch._utils", "_rebuild_tensor_v2"): _Storage.tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *others: tensor,
    ("torch", "Size"): _container(torch.Size),
    ("torch", "device"): torch.device,
    **{("torch", f"{name}Storage"): getattr(torch, dtype) for name, dtype in _STORAGES.items()},
    **{("torch", dtype): getattr(torch, dtype) for dtype in _STORAGES.values()},
}


def load_safetensors(filename: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Return the tensors, on the CPU, and the metadata, parsed where they are JSON.

    Raises:
        ValueError: the file is damaged, or no safetensors file.
    """
    with (
        _read(filename, "safetensors file"),
        safe_open(filename, framework="pt", device="cpu") as file,
    ):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    checksum = metadata.pop(CHECKSUM, None)
    if checksum not in (None, tensors_checksum(tensors, metadata)):
        raise ValueError(f"{filename} is damaged: its checksum {checksum} does not fit")
    for name, text in metadata.items():
        with contextlib.suppress(ValueError):
            metadata[name] = strict_loads(text)
    return tensors, metadata


def tensors_checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """CRC-32 of the content of a safetensors file; the format itself has no checksum."""
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), crc)
    return str(crc)


def strict_loads(text: str | bytes) -> object:
    """Parse JSON as the standard has it, without NaN and Infinity.

    Raises:
        ValueError: the text is no JSON, or is nested too deeply.
    """

    def refuse(name):
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def load_checkpoint_file(filename: str | Path) -> dict:
    """Read a local checkpoint as Detectron2's ``DetectionCheckpointer`` does, but as data only.

    ========================== ====================================================================
    ``.pkl``                   Detectron2's model zoo, or Caffe2's and Detectron1's
    ``.pyth``                  pycls
    ``.safetensors``           the model's tensors; metadata such as ``operating_point`` as JSON
    ``.pth`` and anything else what ``torch.save`` wrote, with or without "model" around the weights
    ========================== ====================================================================

    Return the weights by name as "model", and whatever else the file holds; "matching_heuristics"
    is True where the names of the weights have to be matched.

    Raises:
        UnsafeFileError: the file needs more than data to be loaded, which the error names.
        ValueError: the file is damaged or holds no weights.
    """
    suffix = Path(filename).suffix
    if suffix == ".safetensors":
        model, metadata = load_safetensors(filename)
        return {**metadata, "model": model}
    loaded = load_pickle(filename) if suffix == ".pkl" else load_torch_file(filename)
    content, author, no_weight = _dict(loaded, filename), None, None
    if suffix == ".pyth":
        if "model_state" not in content:
            raise ValueError(f"{filename} has no 'model_state', which a .pyth file of pycls has")
        weights, author, no_weight = content["model_state"], "pycls", "num_batches_tracked"
    elif suffix == ".pkl" and not {"model", "__author__"} <= content.keys():
        # Detectron1's models have "blobs", those for ImageNet don't.
        weights, author, no_weight = content.get("blobs", content), "Caffe2", "_momentum"
    else:
        content = content if "model" in content else {"model": content}
        weights = content["model"]  # a state_dict stays one, with the versions of its modules
    if not all(isinstance(name, str) for name in _dict(weights, filename)):
        raise ValueError(f"{filename} holds weights that have no names")
    if suffix == ".pkl":  # plain arrays in place of _Array
        weights = {k: np.asarray(v) if isinstance(v, np.ndarray) else v for k, v in weights.items()}
    if author is None:
        return {**content, "model": weights}
    weights = {name: value for name, value in weights.items() if not name.endswith(no_weight)}
    return {"model": weights, "__author__": author, "matching_heuristics": True}


def _dict(loaded: object, filename: str | Path) -> dict:
    if not isinstance(loaded, dict):
        raise ValueError(f"{filename} holds a {type(loaded).__name__}, but a checkpoint is a dict")
    return loaded


MODEL_ZOO = "https://dl.fbaipublicfiles.com/"
_DOWNLOADS = "~/.torch/iopath_cache"  # Detectron2's, where $FVCORE_CACHE names no other folder


class DownloadHandler(HTTPURLHandler):
    """Keeps http://HOST/a/b as HOST/a/b in the folder of downloads, and the model zoo's as a/b.

    The handler of iopath goes where ``..`` leads, and takes a file of one host for another's.
    """

    def _get_local_path(
        self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any
    ) -> str:
        address = urlparse(path)
        if ".." in (address.netloc, *address.path.split("/"), path.split("/")[-1]):
            raise ValueError(
                f"{path!r} was not downloaded: '..' would lead out of the folder of downloads; "
                "give the address without it, or a local file"
            )
        if not path.startswith(MODEL_ZOO):
            folder = cache_dir or os.path.expanduser(os.getenv("FVCORE_CACHE", _DOWNLOADS))
            cache_dir = os.path.join(get_cache_dir(folder), address.netloc)
        return super()._get_local_path(path, force, cache_dir, **kwargs)


PathManager.register_handler(DownloadHandler())  # detectron2:// and catalog:// use it too
