"""Checkpoints of every format; Python's own unpickler, on harmless files, is the reference."""

import collections
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import save_file

from imrcnn_d2.utils.safe_loading import UnsafeFileError, load_checkpoint_file, load_pickle

from .conftest import changed

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    np.arange(6, dtype=">f4"),  # another machine's
    np.zeros((0, 3), np.float16),
    np.array(3),
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1),
    np.arange(8)[::2],
    *(np.array(v) for v in ([True, False], [1 + 2j], ["ab", "c"], [b"ab", b"c"])),
]


class Calls:
    """Pickled as a call of any function, whose result may then be given a state."""

    def __init__(self, function, *arguments, state=()):
        self.call = function, arguments, *state

    def __reduce__(self):
        return self.call


def dump(folder, content, protocol=2, name="model.pkl"):
    (folder / name).write_bytes(pickle.dumps(content, protocol))
    return folder / name


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickled_data_are_as_pickle_reads_them(tmp_path, protocol):
    scalars = [value.flat[0] for value in ARRAYS if value.size]
    plain = [(1, 2.5), {3}, frozenset({4}), collections.OrderedDict(a=None, b=True), 1 << 80]
    plain += [*scalars, 2 + 1j, b"", b"\xff\x00", bytearray(b"abc")]
    file = dump(tmp_path, [ARRAYS, np.dtype(">f4"), plain], protocol)
    arrays, dtype, ours = load_pickle(file)
    for array, expected in zip(arrays, pickle.loads(file.read_bytes())[0], strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected, strict=True)
    assert np.dtype(dtype.dtype) == np.dtype(">f4")
    assert ours == plain and list(map(type, ours)) == list(map(type, plain))


def test_a_pickle_of_python_2(tmp_path):
    # conv1 as Python 2 wrote it: its bytes are a string, here of all 256 values.
    raw = bytes(range(256))
    string = "".join(f"\\x{byte:02x}" for byte in raw)
    data = (
        "(dp0\nS'blobs'\np1\n(dp2\nS'conv1_w'\np3\n"
        "cnumpy.core.multiarray\n_reconstruct\np4\n(cnumpy\nndarray\np5\n(I0\ntp6\nS'b'\np7\n"
        "tp8\nRp9\n(I1\n(I8\nI8\ntp10\ncnumpy\ndtype\np11\n(S'f4'\np12\nI0\nI1\ntp13\nRp14\n"
        "(I3\nS'<'\np15\nNNNI-1\nI-1\nI0\ntp16\nbI00\n"
        f"S'{string}'\np17\ntp18\nbsS'conv1_w_momentum'\np19\nI1\nss."
    )
    file = tmp_path / "R-50.pkl"
    file.write_bytes(data.encode("ascii"))
    expected = pickle.loads(file.read_bytes(), encoding="latin1")["blobs"]["conv1_w"]
    loaded = load_checkpoint_file(file)
    assert loaded["__author__"] == "Caffe2" and loaded["matching_heuristics"] is True
    assert list(loaded["model"]) == ["conv1_w"], "momentum is no weight"
    assert loaded["model"]["conv1_w"].tobytes() == expected.tobytes() == raw
    assert loaded["model"]["conv1_w"].shape == (8, 8)


def test_every_format_is_loaded_into_a_model(tmp_path):
    """Detectron2's checkpointer, with the files that it reads itself, is the reference."""
    state = torch.nn.Linear(3, 2).state_dict()
    arrays = {name: value.numpy() for name, value in state.items()}
    point = {"tau": 0.4, "rule": "f1", "dataset": "val"}
    torch.save({"model": state, "iteration": 7}, tmp_path / "a.pth")
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model_state": {**state, "bn.num_batches_tracked": 3}}, tmp_path / "a.pyth")
    dump(tmp_path, {"model": arrays, "__author__": "Detectron2 Model Zoo"}, name="a.pkl")
    dump(tmp_path, arrays, name="caffe2.pkl")
    # Metadata that are no JSON stay texts, and none replaces the tensors.
    texts = {"format": "pt", "deep": "[" * 100_000, "nan": "NaN", "long": "9" * 5000}
    metadata = {**texts, "operating_point": json.dumps(point), "model": '{"w": 0}'}
    save_file(state, tmp_path / "a.safetensors", metadata=metadata)
    loaded = {p.name: load_checkpoint_file(p) for p in tmp_path.iterdir()}
    for name, checkpoint in loaded.items():
        model = {key: torch.as_tensor(value) for key, value in checkpoint.pop("model").items()}
        assert model.keys() == state.keys() and not changed(model, state), name
    for name in ("a.pkl", "a.pth"):
        reference = DetectionCheckpointer(torch.nn.Linear(3, 2)).load(str(tmp_path / name))
        assert loaded[name] == reference, name
    assert loaded["a.safetensors"] == texts | {"operating_point": point}
    matched = {name for name in loaded if loaded[name].get("matching_heuristics")}
    assert matched == {"a.pyth", "caffe2.pkl"}


REFUSED = {
    "posix.mkdir": lambda marker: Calls(os.mkdir, marker),
    "builtins.eval": lambda marker: Calls(eval, f"__import__('os').mkdir({marker!r})"),
    "types.SimpleNamespace": lambda marker: types.SimpleNamespace(a=1),
    "torch._utils._rebuild_tensor_v2": lambda marker: torch.ones(2),
    "numpy.dtype('O8')": lambda marker: np.array([None]),
    "numpy.dtype('V8')": lambda marker: np.zeros(1, [("a", "f8")]),
    "numpy.dtype('M8')": lambda marker: np.array("2020", "datetime64[s]"),
    "numpy.matrix": lambda marker: np.matrix([[1.0]]),
    "numpy.random._pickle.__generator_ctor": lambda marker: np.random.default_rng(0),
    "'rot13'": lambda marker: Calls(__import__("_codecs").encode, "abc", "rot13"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_is_refused_by_name(tmp_path, what, protocol):
    marker = tmp_path / "marker"
    file = dump(tmp_path, {"model": {"w": REFUSED[what](str(marker))}}, protocol)
    names = {what, what.replace("builtins", "__builtin__"), what.replace("_generator", "generator")}
    with pytest.raises(UnsafeFileError, match=re.escape(str(file))) as error:
        load_checkpoint_file(file)
    assert any(name in str(error.value) for name in names), error.value
    assert not marker.exists()


def test_forged_objects_are_refused(tmp_path):
    # numpy's own dtype accepts these flags; an "array of objects" then holds any addresses.
    fields = (3, "|", None, ("a",), {"a": 1}, 8, 8, 0)
    forged = Calls(np.dtype, "f8", False, True, state=[fields])
    with pytest.raises(UnsafeFileError, match="dtype with fields"):
        load_pickle(dump(tmp_path, forged))
    reconstruct = np.zeros(1).__reduce__()[0]
    data, dtype = b"\0" * 16, np.dtype("f8")
    for state in (  # the first has too few bytes
        *((1, shape, dtype, False, data) for shape in ((3,), (-1, -2))),
        *((1, (2,), dtype, False, [1, 2]), (1, (2,), None, False, data)),
    ):
        forged = Calls(reconstruct, np.ndarray, (0,), b"b", state=[state])
        with pytest.raises(ValueError, match="model.pkl"):
            load_pickle(dump(tmp_path, forged))
    # BUILD sets attributes of anything, by (None, {name: value}): here of numpy's _reconstruct,
    file = tmp_path / "a.pkl"
    file.write_bytes(b"cnumpy.core.multiarray\n_reconstruct\n(N}U\x01xK\x01stb.")
    with pytest.raises(UnsafeFileError, match="a.pkl"):
        load_pickle(file)
    # and here of a method of state_dicts that all who read weights call.
    file.write_bytes(b"ccollections\nOrderedDict\n)R}U\x05itemsNsb.")
    assert callable(load_pickle(file).items)


WITHOUT_WEIGHTS = {
    "a.pth": ([1, 2], {"model": 3}, {"model": {1: 2}}),
    "a.pyth": ({}, {"model_state": "text"}),
    "a.pkl": ([1], {"model": {1: 2}, "__author__": "x"}),
    "a.safetensors": (),
}


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_what_is_damaged_or_holds_no_weights_is_named(tmp_path, name):
    for content in (b"", b"no checkpoint", b"...", b"PK\x03\x04 half a zip"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} .*(damaged|refused)"):
            load_checkpoint_file(tmp_path / name)
    for content in WITHOUT_WEIGHTS[name]:
        if name == "a.pkl":
            dump(tmp_path, content, name=name)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_checkpoint_file(tmp_path / name)


def test_one_flipped_bit(tmp_path):
    values, file = torch.arange(1, 1000.0), tmp_path / "a.pth"
    torch.save({"model": {"w": values}}, file)
    content = file.read_bytes()
    start, size = content.index(values.numpy().tobytes()), values.nbytes
    for place in (start, start + size // 2, start + size - 1, content.index(b"model")):
        flipped = bytearray(content)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"a.pth .*CRC"):
            load_checkpoint_file(file)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_s_files_are_as_torch_reads_them(tmp_path, legacy, protocol):
    tied = torch.arange(24.0).reshape(2, 3, 4)
    tensors = [tied, tied[:, 1:].transpose(0, 2), torch.empty(0, 3), torch.tensor(3)]
    tensors += [tied.to(t) for t in (torch.bfloat16, torch.bool, torch.int8, torch.complex64)]
    data = [torch.Size([2]), torch.float16, torch.device("cpu"), b"ab", {1, 2}, 1 << 70]
    content = {
        "model": torch.nn.BatchNorm2d(3).state_dict(),
        "tensors": [*tensors, torch.nn.Parameter(tied.half())],
        "data": [*data, collections.Counter([1, 1, 2])],
    }
    options = {"_use_new_zipfile_serialization": not legacy, "pickle_protocol": protocol}
    torch.save(content, tmp_path / "a.pth", **options)
    ours = load_checkpoint_file(tmp_path / "a.pth")
    # Harmless, and weights_only does not know each protocol
    reference = torch.load(tmp_path / "a.pth", weights_only=False)
    for tensor, expected in zip(ours["tensors"], reference["tensors"], strict=True):
        assert (tensor.dtype, tensor.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(tensor, expected)
    assert ours["tensors"][0].data_ptr() == ours["tensors"][1].data_ptr() - 16, "they are tied"
    assert ours["data"] == reference["data"]
    assert ours["model"]._metadata == reference["model"]._metadata


def from_torch(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def rezipped(content, change=bytes, compression=zipfile.ZIP_STORED):
    """The same archive with its members changed, or compressed."""
    buffer, old = io.BytesIO(), zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)))
    return buffer.getvalue()


def bombs():
    """Files by name that would take much memory, or overflow the stack."""
    many = 2_000_000_000
    number = b"\x8a\x08" + struct.pack("<q", many)
    four = from_torch(torch.zeros(4))  # in files that name more
    legacy = from_torch(torch.zeros(4), _use_new_zipfile_serialization=False)
    text = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
    copies = 3000 * b"h\x00h\x01h\x02\x86R"
    nested = b")" + b"\x85" * 10**6  # a tuple in a tuple, whose hash overflows the stack
    keys = {
        "dict": b"\x80\x02}" + nested + b"K\x01s.",
        "items": b"\x80\x02}(" + nested + b"K\x01u.",
        "marked dict": b"(" + nested + b"K\x01d.",
        "set": b"\x80\x04\x8f(" + nested + b"\x90.",
        "frozenset": b"\x80\x04(" + nested + b"\x91.",
        "OrderedDict": b"ccollections\nOrderedDict\n(((" + nested + b"K\x01tltR.",
        "Counter": b"ccollections\nCounter\n((" + nested + b"ltR.",
        "number": b"\x80\x02}\x8a\x09" + (2**61 - 1).to_bytes(9, "little") + b"K\x01s.",
        "storage": b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + nested + b"NK\x01tQ.",
    }
    return {
        **dict.fromkeys(("length.pkl", "length.pth"), b"cbuiltins\nbytearray\n(I%d\ntR." % many),
        "bytes.pkl": b"c__builtin__\nbytes\n(I%d\ntR." % many,
        "new.pkl": b"cbuiltins\nbytes\n(I%d\nt\x81." % many,
        "memo.pkl": b"Nr" + struct.pack("<I", 2**27) + b"r" + struct.pack("<I", 1) + b"0.",
        "blob.pkl": b"\x96" + struct.pack("<Q", many) + b".",
        "copies.pkl": b"(c_codecs\nencode\nq\x00%bq\x01U\x06latin1q\x02%bl." % (text, copies),
        "deflated.pth": rezipped(from_torch({"w": torch.zeros(10**7)}), compression=8),
        "stride.pth": from_torch({"w": torch.zeros(1).expand(many)}),
        "beyond.pth": rezipped(four, lambda data: data.replace(b"K\x04", b"K\x05", 1)),
        "much_beyond.pth": rezipped(four, lambda data: data.replace(b"K\x04", number, 1)),
        "legacy.pth": legacy.replace(b"K\x04N", number + b"N", 1),
        "sparse.pth": from_torch(torch.eye(2).to_sparse()),
        "tensor.pth": b"ctorch\nTensor\n(I50000\nI50000\ntR.",
        **{f"{k}.pth": rezipped(four, lambda data, v=v: v) for k, v in keys.items()},
    }


LOADER = """
import json, os, resource, sys, torch
from imrcnn_d2.utils.safe_loading import load_checkpoint_file

def load(path):
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, outcome = peak(), "loaded"
    try:
        for weight in load_checkpoint_file(path)["model"].values():
            weight + 1  # as whoever loads it would
    except ValueError as error:
        outcome = f"{type(error).__name__} {error}"
    print(json.dumps([os.path.basename(path), outcome, peak() - before]), flush=True)

limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (3 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    if not os.fork():
        load(path)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_memory_and_stack_are_bounded(tmp_path):
    """Each file in a process of its own, which an overflow of the stack would end."""
    files = bombs()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", LOADER, *(tmp_path / name for name in files)]
    child = subprocess.run(command, stdout=subprocess.PIPE)
    outcomes = list(map(json.loads, child.stdout.splitlines()))
    assert [name for name, *_ in outcomes] == list(files)
    for name, outcome, peak in outcomes:
        assert re.match(rf"(ValueError|UnsafeFileError) .*{name}", outcome)
        assert peak < 1_300_000, name
