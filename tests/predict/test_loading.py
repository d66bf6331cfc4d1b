"""Weights are loaded whole or not at all, with the config that is theirs. Whatever a file holds,
loading it ends in an error that names it, or in weights.
"""

import io
import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_json

from imrcnn_d2.deploy import Predictor, load_model, predict_files, pretrained
from imrcnn_d2.deploy.runtimes.base import EXPORT_VERSION
from imrcnn_d2.engine import load_config
from imrcnn_d2.evaluation import OperatingPoint
from imrcnn_d2.utils.files import BadInputError
from imrcnn_d2.utils.safe_loading import CHECKSUM, load_checkpoint_file

from .conftest import TAU, config, some_hundred
from .test_runtimes import small_onnx, zipped

NAN = float("nan")


def test_config_and_threshold(tiny_run, tmp_path):
    loaded = load_model(None, tiny_run / "model_best.pth")  # the config is next to the weights
    assert loaded.cfg.INPUT.MIN_SIZE_TEST == 64
    assert loaded.tau == TAU and not loaded.model.training
    alone, plain = shutil.copy(tiny_run / "model_best.pth", tmp_path), tmp_path / "plain.pth"
    for weights in (alone, tmp_path / "nowhere.pth"):
        pytest.raises(FileNotFoundError, load_model, None, weights).match(str(weights))
    torch.save({"model": torch.load(alone, weights_only=True)["model"]}, plain)
    assert load_model(tiny_run / "config.yaml", plain).tau == 0.7
    for score in (NAN, 2.0):
        cfg = load_config(str(tiny_run / "config.yaml"), ["MODEL.IMRCNN.SCORE_THRESH", score])
        with pytest.raises(BadInputError, match=r"plain.pth.*MODEL.IMRCNN.SCORE_THRESH"):
            load_model(cfg, plain)


def test_class_names_are_those_of_the_data_set(tiny_run, tmp_path):
    for name in ("annotations", "images"):
        (tmp_path / name).mkdir()
    categories = [{"id": 1, "name": "early cancer"}]
    content = json.dumps({"images": [], "annotations": [], "categories": categories})
    (tmp_path / "annotations" / "test.json").write_text(content)
    for root, test, name in (
        (tmp_path, f"{tmp_path.name}_test", "early cancer"),
        ("", "nobody_knows", "lesion"),
    ):
        opts = ["DATASETS.ROOT", str(root), "DATASETS.TEST", (test,)]
        cfg = load_config(str(tiny_run / "config.yaml"), opts)
        cfg.DATASETS.VAL = cfg.DATASETS.TRAIN = ()
        assert load_model(cfg, tiny_run / "model_best.pth").classes == [name]


LATERAL = "backbone.fpn_lateral2.weight"


@pytest.mark.parametrize(
    "model, opts, match",
    [
        ("mrcnn_lite", [], "not this model's, such as .*cbam"),
        ("ibmrcnn_lite", [], "not this model's, such as .*cbam"),
        ("imrcnn_lite", ["MODEL.ROI_BOX_HEAD.FC_DIM", 24], r"\d of another shape"),
        ("imrcnn_lite", ["MODEL.ROI_BOX_HEAD.FC_DIM", 10_000_000], "not a byte for each of the 10"),
        ("imrcnn_lite", ["INPUT.MIN_SIZE_TEST", 100_000], "INPUT.MIN_SIZE_TEST"),
    ],
)
def test_weights_of_another_model_are_refused(tiny_run, model, opts, match):
    with pytest.raises(ValueError, match=f"model_best.pth.*{match}"):
        load_model(config(*opts, model=model), tiny_run / "model_best.pth")


POINT = {"tau": 0.5, "rule": "f1", "dataset": "val"}
POINTS = [
    *({**POINT, "tau": tau} for tau in (NAN, -0.1, 1.1, "0.5")),
    *({**POINT, "rule": 3}, {**POINT, "more": 1}, {"tau": 0.5, "rule": "f1"}, 0.5, []),
]


EDITS = [
    (lambda file: file["model"].pop(LATERAL), f"1 missing, such as {LATERAL}"),
    (lambda file: file["model"].update({"\x1b]0;x\x07\ny": torch.zeros(1)}), r"\\x1b]0;x"),
    (lambda file: file["model"][LATERAL][0, 0].fill_(NAN), f"{LATERAL} holds NaN"),
    *((lambda file, p=p: file.update(operating_point=p), "operating_point") for p in POINTS),
]


@pytest.mark.parametrize("edit, match", EDITS)
def test_checkpoints_are_whole(tiny_run, tmp_path, edit, match):
    checkpoint = torch.load(tiny_run / "model_best.pth", weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path := tmp_path / "a.pth")
    with pytest.raises(ValueError, match=match) as refused:
        load_model(tiny_run / "config.yaml", path)
    assert str(path) in str(refused.value) and str(refused.value).isprintable()


def changed(path, target, **fields):
    """A copy of an artifact with other metadata."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() | {key: json.dumps(value) for key, value in fields.items()}
    del metadata[CHECKSUM]
    safetensors.torch.save_file(safetensors.torch.load_file(path), target, metadata)
    return target


METADATA_ERRORS = [
    ("9.9", {"artifact": EXPORT_VERSION + 1, "version": "9.9"}),
    ("NOVEL", {"config": "MODEL: {NOVEL: 1}\nVERSION: 2\n"}),
    *(("config", {"config": ["x"]}), ("classes", {"classes": ["a", "b"]})),
    *(("artifact", {"artifact": "1"}), ("classes", {"classes": "polyp"})),
]
DEMANDS = {
    **{"MODEL.ROI_MASK_HEAD.NUM_CONV": 10**7, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 10**4},
    "TEST.DETECTIONS_PER_IMAGE": 10**6,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8.0] * 1000],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0] * 1000],
}


@pytest.mark.parametrize("match, fields", [*METADATA_ERRORS, *DEMANDS.items()])
def test_metadata_and_what_a_config_demands_are_checked(
    tiny_run, exported, tmp_path, match, fields
):
    if match in DEMANDS:
        cfg = load_config(str(tiny_run / "config.yaml"), [match, fields])
        with pytest.raises(ValueError, match=f"model_best.pth: .*{match}"):
            load_model(cfg, tiny_run / "model_best.pth")
        fields = {"config": cfg.dump()}
    path = changed(exported("torch"), tmp_path / "a.safetensors", **fields)
    pytest.raises(ValueError, load_model, None, path).match(f"a.safetensors.*{match}")


def test_nothing_is_written_where_a_config_says(tiny_run, exported, image_folder, tmp_path):
    cfg = load_config(tiny_run / "config.yaml", ["OUTPUT_DIR", str(tmp_path / "elsewhere")])
    (tmp_path / "sent").mkdir()
    weights = shutil.copy(tiny_run / "model_best.pth", tmp_path / "sent" / "model.pth")
    (tmp_path / "sent" / "config.yaml").write_text(cfg.dump())
    other = changed(exported("torch"), tmp_path / "sent" / "model.safetensors", config=cfg.dump())
    for path, output in ((weights, tmp_path / "a"), (other, tmp_path / "b")):
        before = set(tmp_path.rglob("*"))
        predict_files(Predictor(None, path), [image_folder], output, save=["masks"])
        assert all(new.is_relative_to(output) for new in set(tmp_path.rglob("*")) - before)


def test_names_of_weights_of_the_package(tmp_path):
    (tmp_path / "demo.safetensors").touch()
    assert pretrained("demo", tmp_path) == tmp_path / "demo.safetensors"
    pytest.raises(FileNotFoundError, pretrained, "other", tmp_path).match("'other'.* demo")
    pytest.raises(FileNotFoundError, pretrained, "demo", tmp_path / "nothing").match("none")


TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2).half()}
ARRAYS = {name: value.numpy() for name, value in TENSORS.items()}


def written(**options):
    buffer = io.BytesIO()
    torch.save({"model": TENSORS, "operating_point": POINT}, buffer, **options)
    return buffer.getvalue()


with zipfile.ZipFile(io.BytesIO(written())) as archive:
    MEMBERS = {name: archive.read(name) for name in archive.namelist()}
(DATA_PKL,) = (name for name in MEMBERS if name.endswith("/data.pkl"))
METADATA = {"format": "pt", "operating_point": json.dumps(POINT), "classes": '["polyp"]'}
FILES = {
    "a.pth": written(),
    "legacy.pth": written(_use_new_zipfile_serialization=False),
    "b.pth": written(pickle_protocol=4),
    "a.pkl": pickle.dumps({"model": ARRAYS, "__author__": "x"}),
    "old.pkl": pickle.dumps({"blobs": ARRAYS}, protocol=0),
    "a.safetensors": safetensors.torch.save(TENSORS, METADATA),
}


def with_pickle(data):
    """An archive of torch.save with another pickle, to which its checksum fits."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {**MEMBERS, DATA_PKL: data}.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


GLOBALS = (
    *("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch Size", "numpy ndarray"),
    *("collections OrderedDict", "numpy.core.multiarray _reconstruct", "builtins bytearray"),
    *("numpy.core.multiarray scalar", "numpy dtype", "builtins set", "_codecs encode"),
)
STEPS = [
    *(bytes([code]) for code in pickle._Unpickler.dispatch),
    *(pickle.dumps(v, 2)[2:-1] for v in (3, -1, 2**40, "model", [1], (2, 3), {}, 1e9, b"ab")),
    *("c{}\n{}\n".format(*name.split()).encode() for name in GLOBALS),
]
pickles = st.lists(st.sampled_from(STEPS), min_size=2, max_size=30).map(b"".join)
damaged_files = st.sampled_from(sorted(FILES)).flatmap(
    lambda name: st.tuples(st.just(name), damaged_bytes(FILES[name]))
)


@pytest.mark.parametrize(
    "files",
    [
        damaged_files,
        damaged_bytes(MEMBERS[DATA_PKL]).map(lambda data: ("a.pth", with_pickle(data))),
        pickles.map(lambda steps: ("a.pth", with_pickle(steps + b"."))),
        pickles.map(lambda steps: ("a.pkl", steps + b".")),
    ],
)
@some_hundred
@given(st.data())
def test_any_weights(folder, files, data):
    name, content = data.draw(files)
    (folder / name).write_bytes(content)
    try:
        loaded = load_checkpoint_file(folder / name)
        if loaded.get("operating_point") is not None:
            assert 0 <= OperatingPoint.of_file(loaded["operating_point"], folder / name).tau <= 1
    except ValueError as error:
        assert name in str(error)
        return
    assert all(isinstance(key, str) for key in loaded["model"])
    for value in loaded["model"].values():
        assert not isinstance(value, torch.Tensor | np.ndarray) or value.nbytes <= len(content)


@pytest.mark.parametrize("form", ["metadata", "onnx", "openvino"])
@some_hundred
@given(st.data())
def test_any_graph(folder, metadata, form, data):
    metadata = {**metadata, "config": "VERSION: 2"}
    path = folder / ("a.openvino" if form == "openvino" else "a.onnx")
    if form == "metadata":
        text = data.draw(damaged_json(metadata)).decode("utf-8", "replace")
        path.write_bytes(small_onnx(metadata=text))
    elif form == "onnx":
        content = small_onnx(metadata=json.dumps(metadata))
        path.write_bytes(data.draw(damaged_bytes(content)))
    else:
        net = b'<?xml version="1.0"?>\n<net name="a" version="11"/>'
        content = zipped(path, net, b"0123", json.dumps(metadata)).read_bytes()
        path.write_bytes(data.draw(damaged_bytes(content)))
    try:
        loaded = load_model(None, path)
    except ValueError as error:
        assert path.name in str(error)
        return
    assert loaded.tau is None or 0 <= loaded.tau <= 1
    assert all(isinstance(name, str) and name for name in loaded.classes)
