"""Whatever a file of weights holds, loading it ends in an error that names it, or in weights.

Some hundred damaged files each; ``pytest -m fuzz --hypothesis-profile minute`` gives more.
"""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_json
from safetensors.torch import save

from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.deploy.runtimes import export_metadata
from imrcnn_d2.deploy.runtimes.graph import METADATA_KEY
from imrcnn_d2.deploy.runtimes.openvino import OPENVINO_PARTS
from imrcnn_d2.evaluation.detection.results import OperatingPoint
from imrcnn_d2.utils.safe_loading import load_checkpoint_file

from .test_runtimes import W, small_onnx

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]
some_hundred = settings(
    max_examples=max(200, settings().max_examples),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

POINT = {"tau": 0.5, "rule": "f1", "dataset": "val"}
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2).half()}
ARRAYS = {name: value.numpy() for name, value in TENSORS.items()}
NET = b'<?xml version="1.0"?>\n<net name="a" version="11"/>'


def written(**options):
    buffer = io.BytesIO()
    torch.save({"model": TENSORS, "operating_point": POINT}, buffer, **options)
    return buffer.getvalue()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ZIP = written()
with zipfile.ZipFile(io.BytesIO(ZIP)) as archive:
    MEMBERS = {name: archive.read(name) for name in archive.namelist()}
(DATA_PKL,) = (name for name in MEMBERS if name.endswith("/data.pkl"))
METADATA = {"format": "pt", "operating_point": json.dumps(POINT), "classes": '["polyp"]'}
FILES = {
    "a.pth": ZIP,
    "legacy.pth": written(_use_new_zipfile_serialization=False),
    "b.pth": written(pickle_protocol=4),
    "a.pkl": pickle.dumps({"model": ARRAYS, "__author__": "x"}),
    "old.pkl": pickle.dumps({"blobs": ARRAYS}, protocol=0),
    "a.safetensors": save(TENSORS, METADATA),
}
damaged_files = st.sampled_from(sorted(FILES)).flatmap(
    lambda name: st.tuples(st.just(name), damaged_bytes(FILES[name]))
)


def check(path, content):
    """Weights by name, or a ValueError that names the file."""
    path.write_bytes(content)
    try:
        loaded = load_checkpoint_file(path)
        if loaded.get("operating_point") is not None:
            assert 0 <= OperatingPoint.of_file(loaded["operating_point"], path).tau <= 1
    except ValueError as error:
        assert path.name in str(error)
        return
    for name, value in loaded["model"].items():
        assert isinstance(name, str)
        if isinstance(value, torch.Tensor | np.ndarray):
            assert value.nbytes <= len(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@given(damaged_files)
@some_hundred
def test_weights(folder, file):
    name, content = file
    check(folder / name, content)


@given(damaged_bytes(MEMBERS[DATA_PKL]))
@some_hundred
def test_the_pickle_in_an_archive(folder, data):
    check(folder / "a.pth", zipped({**MEMBERS, DATA_PKL: data}))  # its checksum fits


GLOBALS = (
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch Size",
    "collections OrderedDict",
    "numpy.core.multiarray _reconstruct",
    "numpy.core.multiarray scalar",
    "numpy ndarray",
    "numpy dtype",
    "builtins bytearray",
    "builtins set",
    "_codecs encode",
)
STEPS = [
    *(bytes([code]) for code in pickle._Unpickler.dispatch),
    *(pickle.dumps(v, 2)[2:-1] for v in (3, -1, 2**40, "model", [1], (2, 3), {}, 1e9, b"ab")),
    *("c{}\n{}\n".format(*name.split()).encode() for name in GLOBALS),
]


@given(st.lists(st.sampled_from(STEPS), min_size=2, max_size=30), st.booleans())
@some_hundred
def test_any_pickle(folder, steps, in_a_zip):
    content = b"".join(steps) + b"."
    if in_a_zip:
        check(folder / "a.pth", zipped({**MEMBERS, DATA_PKL: content}))
    else:
        check(folder / "a.pkl", content)


@pytest.fixture(scope="module")
def about(tiny_run):
    return {
        **export_metadata(load_model(None, tiny_run / "model_best.pth"), "fp32"),
        "format": "onnx",
    }


def load(path, content):
    path.write_bytes(content)
    try:
        loaded = load_model(None, path)
    except ValueError as error:
        assert path.name in str(error)
        return
    assert loaded.tau is None or 0 <= loaded.tau <= 1
    assert all(isinstance(name, str) and name for name in loaded.classes)


@given(st.data())
@some_hundred
def test_what_a_file_says_about_itself(folder, about, data):
    text = data.draw(damaged_json({**about, "config": "VERSION: 2"})).decode("utf-8", "replace")
    load(folder / "a.onnx", small_onnx(weights=[W], about=text))


@given(st.data(), st.sampled_from(["onnx", "openvino"]))
@some_hundred
def test_graph_files(folder, about, data, form):
    text = json.dumps({**about, "config": "VERSION: 2"})
    content = {
        "onnx": small_onnx(weights=[W], about=text),
        "openvino": zipped(
            {OPENVINO_PARTS[0]: NET, OPENVINO_PARTS[1]: b"0123", METADATA_KEY: text}
        ),
    }[form]
    load(folder / f"b.{form}", data.draw(damaged_bytes(content)))
