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

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
ARRAYS = {
    "matrix": np.arange(6.0).reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "another machine's": np.arange(6, dtype=">f4"),
    "empty": np.zeros((0, 3), np.float16),
    "no axis": np.array(3),
    "axes moved": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1),
    "every other": np.arange(8)[::2],
    "booleans": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "texts": np.array(["ab", "c"]),
    "bytes": np.array([b"ab", b"c"]),
}


class Calls:
    """Pickled as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Changes(Calls):
    """Pickled as a call whose result is then given a state."""

    def __init__(self, function, arguments, state):
        self.call = function, arguments, state


def dump(folder, content, protocol=2, name="model.pkl"):
    (folder / name).write_bytes(pickle.dumps(content, protocol))
    return folder / name


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickled_data_are_as_pickle_reads_them(tmp_path, protocol):
    content = {
        "arrays": ARRAYS,
        "scalars": [value.flat[0] for value in ARRAYS.values() if value.size],
        "dtype": np.dtype(">f4"),
        "containers": [(1, 2.5), {3}, frozenset({4}), collections.OrderedDict(a=None, b=True)],
        "numbers": [1 << 80, 2 + 1j],
        "bytes": [b"", b"\xff\x00", bytearray(b"abc")],
    }
    file = dump(tmp_path, content, protocol)
    ours, reference = load_pickle(file), pickle.loads(file.read_bytes())
    for name, expected in reference["arrays"].items():
        assert ours["arrays"][name].dtype == expected.dtype, name
        np.testing.assert_array_equal(ours["arrays"][name], expected, err_msg=name, strict=True)
    for value, expected in zip(ours["scalars"], reference["scalars"], strict=True):
        assert type(value) is type(expected) and value == expected
    assert np.dtype(ours["dtype"].dtype) == reference["dtype"]
    for name in ("containers", "numbers", "bytes"):
        assert ours[name] == reference[name]
        assert list(map(type, ours[name])) == list(map(type, reference[name]))


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


@pytest.mark.parametrize("content", [{"w": ARRAYS["matrix"]}, {"blobs": {"w": ARRAYS["matrix"]}}])
def test_caffe2_with_and_without_blobs(tmp_path, content):
    loaded = load_checkpoint_file(dump(tmp_path, content))
    np.testing.assert_array_equal(loaded["model"]["w"], ARRAYS["matrix"])
    assert loaded["matching_heuristics"] is True


def test_every_format_is_loaded_into_a_model(tmp_path):
    """Detectron2's own checkpointer, with the files that it reads itself, is the reference."""
    source = torch.nn.Linear(3, 2)
    state = source.state_dict()
    arrays = {name: value.numpy() for name, value in state.items()}
    point = {"tau": 0.4, "rule": "f1", "dataset": "val"}
    torch.save({"model": state, "iteration": 7}, tmp_path / "a.pth")
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model_state": {**state, "bn.num_batches_tracked": 3}}, tmp_path / "a.pyth")
    dump(tmp_path, {"model": arrays, "__author__": "Detectron2 Model Zoo"}, name="a.pkl")
    metadata = {"operating_point": '{"tau": 0.4, "rule": "f1", "dataset": "val"}', "format": "pt"}
    save_file(state, tmp_path / "a.safetensors", metadata=metadata)
    loaded = {p.name: load_checkpoint_file(p) for p in sorted(tmp_path.iterdir())}
    assert loaded["a.pth"]["iteration"] == 7
    assert loaded["a.safetensors"]["operating_point"] == point
    assert loaded["a.safetensors"]["format"] == "pt"
    assert loaded["a.pyth"]["matching_heuristics"] is True
    for name in ("a.pkl", "a.pth"):
        reference = DetectionCheckpointer(torch.nn.Linear(3, 2)).load(str(tmp_path / name))
        assert {k: v for k, v in loaded[name].items() if k != "model"} == reference, name
    for name, checkpoint in loaded.items():
        assert checkpoint["model"].keys() == state.keys(), name
        for key, value in checkpoint["model"].items():
            assert torch.equal(torch.as_tensor(value), state[key]), (name, key)


def test_a_model_among_the_metadata_does_not_replace_the_tensors(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"model": '{"w": 0}'})
    loaded = load_checkpoint_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["model"]["w"], torch.ones(2))


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
    with pytest.raises(UnsafeFileError) as error:
        load_checkpoint_file(file)
    assert str(file) in str(error.value) and "safetensors" in str(error.value)
    assert any(name in str(error.value) for name in names), error.value
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("save", [torch.save, None])
@pytest.mark.parametrize("suffix", [".pth", ".pyth", ".pt"])
def test_torch_files_are_refused_by_name_too(tmp_path, suffix, save, protocol):
    marker, file = tmp_path / "marker", tmp_path / f"model{suffix}"
    content = {"model": {"w": Calls(os.mkdir, str(marker))}}
    if save:
        save(content, file, pickle_protocol=protocol)
    else:
        dump(tmp_path, content, protocol, file.name)
    with pytest.raises(UnsafeFileError, match=r"posix\.mkdir.*could run any code.*safetensors"):
        load_checkpoint_file(file)
    assert not marker.exists()
    assert "weights_only" not in str(pytest.raises(ValueError, load_checkpoint_file, file).value)


def test_a_forged_dtype_is_refused(tmp_path):
    # numpy's own dtype accepts these flags; an "array of objects" then holds any addresses.
    forged = Changes(np.dtype, ("f8", False, True), (3, "|", None, ("a",), {"a": 1}, 8, 8, 0))
    with pytest.raises(UnsafeFileError, match="dtype with fields"):
        load_pickle(dump(tmp_path, forged))


@pytest.mark.parametrize(
    "state",
    [
        (1, (3,), np.dtype("f8"), False, b"\0" * 16),  # too few bytes
        (1, (-1, -2), np.dtype("f8"), False, b"\0" * 16),
        (1, (2,), np.dtype("f8"), False, [1, 2]),
        (1, (2,), None, False, b"\0" * 16),
    ],
)
def test_a_forged_array_is_refused(tmp_path, state):
    reconstruct = np.zeros(1).__reduce__()[0]
    forged = Changes(reconstruct, (np.ndarray, (0,), b"b"), state)
    with pytest.raises(ValueError, match="cannot be read as a pickle of weights"):
        load_pickle(dump(tmp_path, forged))


NESTED = b")" + b"\x85" * 10**6  # a tuple in a tuple, whose hash overflows the stack
KEYS = {
    "dict": b"\x80\x02}" + NESTED + b"K\x01s.",
    "items": b"\x80\x02}(" + NESTED + b"K\x01u.",
    "marked dict": b"(" + NESTED + b"K\x01d.",
    "set": b"\x80\x04\x8f(" + NESTED + b"\x90.",
    "frozenset": b"\x80\x04(" + NESTED + b"\x91.",
    "OrderedDict": b"ccollections\nOrderedDict\n(((" + NESTED + b"K\x01tltR.",
    "Counter": b"ccollections\nCounter\n((" + NESTED + b"ltR.",
    "number": b"\x80\x02}\x8a\x09" + (2**61 - 1).to_bytes(9, "little") + b"K\x01s.",
    "storage": b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + NESTED + b"NK\x01tQ.",
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_cost_no_more_than_others(tmp_path, name):
    """In a process of its own, which an overflow of the stack would end."""
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("model/data.pkl", KEYS[name])
    code = "import sys; from imrcnn_d2.utils.safe_loading import load_torch_file as load\n"
    code += "try: load(sys.argv[1])\nexcept ValueError as error: assert 'model.pth' in str(error)\n"
    code += "else: sys.exit('loaded')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pth")], check=True)


def test_what_a_pickle_gets_for_a_function_cannot_be_changed(tmp_path):
    # BUILD on numpy's _reconstruct: (None, {name: value}) sets attributes of anything.
    data = b"cnumpy.core.multiarray\n_reconstruct\n(N}U\x09_functionK\x01stb."
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(UnsafeFileError, match="change of a function"):
        load_pickle(tmp_path / "a.pkl")
    assert load_pickle(dump(tmp_path, np.ones(2))).tolist() == [1, 1]


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pyth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"...", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_named(tmp_path, suffix, content):
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged{suffix} .*(damaged|refused)"):
        load_checkpoint_file(file)


def test_what_holds_no_weights(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {}}, tmp_path / "other.pyth")
    with pytest.raises(ValueError, match="list.pth holds a list"):
        load_checkpoint_file(tmp_path / "list.pth")
    with pytest.raises(ValueError, match="other.pyth has no 'model_state'"):
        load_checkpoint_file(tmp_path / "other.pyth")


def flipped(content, at):
    """One bit of it."""
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("place", ["first", "middle", "last", "pickle"])
def test_one_flipped_bit(tmp_path, place):
    values = torch.arange(1, 1000.0)
    torch.save({"model": {"w": values}}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    start, size = content.index(values.numpy().tobytes()), values.nbytes
    at = {"first": start, "middle": start + size // 2, "last": start + size - 1}
    at["pickle"] = content.index(b"model")
    (tmp_path / "flipped.pth").write_bytes(flipped(content, at[place]))
    with pytest.raises(ValueError, match=r"flipped.pth .*CRC"):
        load_checkpoint_file(tmp_path / "flipped.pth")
    assert torch.equal(load_checkpoint_file(tmp_path / "a.pth")["model"]["w"], values)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_s_files_are_as_torch_reads_them(tmp_path, legacy, protocol):
    tied = torch.arange(24.0).reshape(2, 3, 4)
    model = torch.nn.BatchNorm2d(3)
    torch.save(
        {
            "model": model.state_dict(),
            "tensors": [
                tied,
                tied[:, 1:].transpose(0, 2),
                torch.empty(0, 3),
                torch.tensor(3),
                torch.nn.Parameter(tied.half()),
                *(tied.to(t) for t in (torch.bfloat16, torch.bool, torch.int8, torch.complex64)),
            ],
            "data": [torch.Size([2]), torch.float16, torch.device("cpu"), b"ab", {1, 2}, 1 << 70],
            "counter": collections.Counter([1, 1, 2]),
        },
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=protocol,
    )
    ours = load_checkpoint_file(tmp_path / "a.pth")
    # Harmless, and weights_only does not know each protocol
    reference = torch.load(tmp_path / "a.pth", weights_only=False)
    for found, expected in zip(ours["tensors"], reference["tensors"], strict=True):
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(found, expected)
    assert ours["tensors"][0].data_ptr() == ours["tensors"][1].data_ptr() - 16, "they are tied"
    assert ours["data"] == reference["data"] and ours["counter"] == reference["counter"]
    assert ours["model"]._metadata == reference["model"]._metadata


def from_torch(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def deflated(content):
    """Its members compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def of_declared_length(number, **options):
    """torch's file of four numbers, said to be of `number`."""
    four = b"K\x04" + (b"N" if options else b"")
    content = from_torch(torch.zeros(4), **options)
    longer = b"\x8a\x08" + struct.pack("<q", number) + four[2:]
    if options:
        return content.replace(four, longer, 1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(four, longer, 1))
    return buffer.getvalue()


MANY = 2_000_000_000
TEXT = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
COPIES = (
    b"(c_codecs\nencode\nq\x00" + TEXT + b"q\x01U\x06latin1q\x02"
    + 3000 * b"h\x00h\x01h\x02\x86R" + b"l."
)  # fmt: skip
BOMBS = {
    "length.pkl": lambda: b"cbuiltins\nbytearray\n(I%d\ntR." % MANY,
    "bytes.pkl": lambda: b"c__builtin__\nbytes\n(I%d\ntR." % MANY,
    "new.pkl": lambda: b"cbuiltins\nbytes\n(I%d\nt\x81." % MANY,
    "memo.pkl": lambda: b"Nr" + struct.pack("<I", 2**27) + b"r" + struct.pack("<I", 1) + b"0.",
    "blob.pkl": lambda: b"\x96" + struct.pack("<Q", MANY) + b".",
    "copies.pkl": lambda: COPIES,
    "length.pth": lambda: b"cbuiltins\nbytearray\n(I%d\ntR." % MANY,
    "deflated.pth": lambda: deflated(from_torch({"w": torch.zeros(10**7)})),
    "stride.pth": lambda: from_torch({"w": torch.zeros(1).expand(MANY)}),
    "beyond.pth": lambda: of_declared_length(5),
    "much_beyond.pth": lambda: of_declared_length(MANY),
    "legacy.pth": lambda: of_declared_length(MANY, _use_new_zipfile_serialization=False),
    "sparse.pth": lambda: from_torch(torch.eye(2).to_sparse()),
    "tensor.pth": lambda: b"ctorch\nTensor\n(I50000\nI50000\ntR.",
}
LOADER = """
import json, os, resource, sys, torch
from imrcnn_d2.utils.safe_loading import load_checkpoint_file

def load(path):
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, said = peak(), "loaded"
    try:
        for weight in load_checkpoint_file(path)["model"].values():
            weight + 1  # as whoever loads it would
    except ValueError as error:
        said = f"{type(error).__name__} {error}"
    print(json.dumps([os.path.basename(path), said, peak() - before]), flush=True)

limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (3 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    if not os.fork():
        load(path)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def loaded_bombs(tmp_path_factory):
    """By name, what the loader said and how many KiB it took, each in a process of its own."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, content in BOMBS.items():
        (folder / name).write_bytes(content())
    paths = [folder / name for name in BOMBS]
    child = subprocess.run([sys.executable, "-c", LOADER, *paths], stdout=subprocess.PIPE)
    return {name: rest for name, *rest in map(json.loads, child.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded(loaded_bombs, name):
    said, peak = loaded_bombs[name]
    assert re.match(rf"(ValueError|UnsafeFileError) .*{name}", said)
    assert peak < 1_300_000


def test_a_state_dict_s_items_are_its_own(tmp_path):
    # BUILD sets attributes: here the method that all who read weights call.
    data = b"ccollections\nOrderedDict\n)R}U\x05itemsNsb."
    (tmp_path / "a.pkl").write_bytes(data)
    assert callable(load_pickle(tmp_path / "a.pkl").items)


@pytest.mark.parametrize("content", [{"model": 3}, {"model": {1: 2}}, {"model": "text"}])
def test_weights_without_names(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    dump(tmp_path, {**content, "__author__": "x"}, name="a.pkl")
    for name in ("a.pth", "a.pkl"):
        with pytest.raises(ValueError, match=f"{name} holds"):
            load_checkpoint_file(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", "9" * 5000])
def test_metadata_that_are_no_json_stay_texts(tmp_path, text):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"tau": text})
    assert load_checkpoint_file(tmp_path / "a.safetensors")["tau"] == text
