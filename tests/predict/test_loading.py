"""Whatever a file holds, loading it ends in an error that names it, or in all of its weights."""

import io
import json
import pickle
import shutil
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.config import CfgNode
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_json

from imrcnn_d2.deploy import Predictor, load_model, predict_files, pretrained
from imrcnn_d2.deploy.runtimes.base import export_metadata
from imrcnn_d2.deploy.runtimes.torch import TorchRuntime
from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.checkpoint import METADATA_VERSION
from imrcnn_d2.evaluation import OperatingPoint, ScoreMap
from imrcnn_d2.utils.files import BadInputError
from imrcnn_d2.utils.safe_loading import load_checkpoint_file

from .conftest import TAU, config, some_hundred
from .test_runtimes import small_onnx, zipped

NAN = float("nan")


def test_config_and_threshold(tiny_run, weights, tmp_path):
    loaded = load_model(None, weights)  # the config is next to the weights
    assert loaded.cfg.INPUT.MIN_SIZE_TEST == 64
    assert loaded.tau == TAU and not loaded.model.training
    alone, plain = shutil.copy(weights, tmp_path), tmp_path / "plain.pth"
    for path in (alone, tmp_path / "nowhere.pth"):
        pytest.raises(FileNotFoundError, load_model, None, path).match(str(path))
    torch.save({"model": torch.load(alone, weights_only=True)["model"]}, plain)
    assert load_model(tiny_run / "config.yaml", plain).tau == 0.7
    # Configs before version 0.3.0 had the raw score's default, 0.7, or another one.
    old = load_config(tiny_run / "config.yaml")
    del old.TEST["SCORE_THRESH"], old.TEST["TAU_RULE"]
    for score in (0.7, 0.6):
        old.MODEL.IMRCNN = CfgNode({"SCORE_THRESH": score, "TAU_RULE": "f1"})
        (tmp_path / "old.yaml").write_text(old.dump())
        assert load_model(tmp_path / "old.yaml", plain).tau == score
        assert load_model(tmp_path / "old.yaml", weights).tau == TAU
    for score in (0.0, 1.0, NAN, -0.01, 1.01):
        cfg = load_config(tiny_run / "config.yaml", ["TEST.SCORE_THRESH", score])
        cfg.TEST.DETECTIONS_PER_IMAGE = 1000  # the most
        if score in (0, 1):
            assert load_model(cfg, plain).tau == score
            continue
        with pytest.raises(BadInputError, match=r"plain.pth.*TEST.SCORE_THRESH"):
            load_model(cfg, plain)


def test_a_file_of_weights_is_read_once(tiny_run, weights, monkeypatch):
    reader = Mock(wraps=load_checkpoint_file)
    for module in ("imrcnn_d2.deploy.loading", "imrcnn_d2.engine.checkpoint"):
        monkeypatch.setattr(f"{module}.load_checkpoint_file", reader)
    load_model(tiny_run / "config.yaml", weights)
    assert reader.call_count == 1


def test_class_names_are_those_of_the_data_set(tiny_run, weights, tmp_path):
    for name in ("annotations", "images"):
        (tmp_path / name).mkdir()
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "early cancer"}]}
    (tmp_path / "annotations" / "test.json").write_text(json.dumps(coco))
    names = {(str(tmp_path), f"{tmp_path.name}_test"): "early cancer", ("", "none"): "lesion"}
    for (root, test), name in names.items():
        opts = ["DATASETS.ROOT", root, "DATASETS.TEST", (test,)]
        cfg = load_config(tiny_run / "config.yaml", opts)
        cfg.DATASETS.VAL = cfg.DATASETS.TRAIN = ()
        assert load_model(cfg, weights).classes == [name]


LATERAL = "backbone.fpn_lateral2.weight"


OTHER_MODELS = [
    *((model, [], "not this model's, such as .*cbam") for model in ("mrcnn_lite", "ibmrcnn_lite")),
    ("imrcnn_lite", ["MODEL.ROI_BOX_HEAD.FC_DIM", 24], r"\d of another shape"),
    ("imrcnn_lite", ["MODEL.ROI_BOX_HEAD.FC_DIM", 10_000_000], "not a byte for each of the 10"),
]


@pytest.mark.parametrize("model, opts, match", OTHER_MODELS)
def test_weights_of_another_model_are_refused(weights, model, opts, match):
    with pytest.raises(ValueError, match=f"model_best.pth.*{match}"):
        load_model(config(*opts, model=model), weights)


POINT = {"tau": 0.5, "rule": "f1", "dataset": "val"}
POINTS = [
    *({**POINT, "tau": tau} for tau in (NAN, -0.1, 1.1, "0.5")),
    *({**POINT, "rule": 3}, {**POINT, "more": 1}, {"tau": 0.5, "rule": "f1"}, 0.5, []),
]
MAP = {"slope": 0.5, "offset": -1.0, "dataset": "val"}
MAPS = [
    *({**MAP, "slope": slope} for slope in (NAN, 0, -0.5, "1")),
    *({**MAP, "offset": NAN}, {**MAP, "dataset": 3}, {**MAP, "more": 1}, {"slope": 1.0}, 0.5, []),
    *({**MAP, "slope": 10**400}, {**MAP, "offset": True}, [1.0] * 10**5, {"slope": [1] * 10**5}),
]
EDITS = [
    (lambda file: file["model"].pop(LATERAL), f"1 missing, such as {LATERAL}"),
    (lambda file: file["model"].update({"\x1b]0;x\x07\ny": torch.zeros(1)}), r"\\x1b]0;x"),
    (lambda file: file["model"][LATERAL][0, 0].fill_(NAN), f"{LATERAL} holds NaN"),
    (lambda file: file.update(operating_point=POINTS[1]), "operating_point"),
    (lambda file: file.update(score_map=MAPS[1]), "score_map"),
    (lambda file: file.update(score_map={**MAP, "slope": 10**5000}), "number"),  # not printable
]


@pytest.mark.parametrize("edit, match", EDITS)
def test_checkpoints_are_whole(tiny_run, weights, tmp_path, edit, match):
    checkpoint = torch.load(weights, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path := tmp_path / "a.pth")
    with pytest.raises(ValueError, match=match) as refused:
        load_model(tiny_run / "config.yaml", path)
    assert str(path) in str(refused.value) and str(refused.value).isprintable()


def test_the_score_map_of_weights_goes_where_they_go(tiny_run, weights, tmp_path):
    file = torch.load(weights, weights_only=True)
    for score_map, expected in ((MAP, ScoreMap(0.5, -1.0, "val")), (None, None)):
        torch.save({**file, "score_map": score_map}, path := tmp_path / "a.pth")
        loaded = load_model(tiny_run / "config.yaml", path)
        assert loaded.weights.score_map == expected
        assert loaded.weights.evaluator_arguments()["score_map"] == expected
        metadata = json.loads(json.dumps(export_metadata(loaded, "fp32")))
        assert metadata["score_map"] == score_map
        TorchRuntime.export(loaded, exported := tmp_path / "a.safetensors")
        assert load_model(None, exported).weights.score_map == expected


SUFFIXES = ".onnx", ".openvino", ".safetensors"
# Of OpenVINO, a graph that returns its input.
NET = b"""<?xml version="1.0"?>
<net name="a" version="11"><layers><layer id="0" name="x" type="Parameter" version="opset1">
<data shape="4" element_type="f32"/><output><port id="0" precision="FP32"><dim>4</dim></port>
</output></layer><layer id="1" name="y" type="Result" version="opset1"><input>
<port id="0" precision="FP32"><dim>4</dim></port></input></layer></layers><edges>
<edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>"""


def write_export(path, metadata, tensors=None):
    """Writes an exported file with these metadata, as JSON, and next to nothing else."""
    if path.suffix == ".onnx":
        path.write_bytes(small_onnx(metadata=metadata))
    elif path.suffix == ".openvino":
        zipped(path, NET, b"", metadata)
    else:
        texts = {key: json.dumps(value) for key, value in json.loads(metadata).items()}
        tensors = tensors or {"w": torch.zeros(1)}
        safetensors.torch.save_file(tensors, path, {**texts, "format": "pt"})
    return path


URL = "http://127.0.0.1:9/a"
TIMM = "MODEL: {BACKBONE: {NAME: build_timm_backbone}, TIMM: {NAME: 'hf-hub:x/y'}}"
VALUES = {
    **{"operating_point": POINTS, "score_map": MAPS},
    "training_images": ["0123456789abcdef" * 5, [3], ["0123456789abcdef"], {}],
    **{"model": [None, 3], "precision": [3], "weights_sha256": [3, {}]},
    "classes": [[], "polyp", [1], ["a", "b"], [{}], ["\x1b[2J"], [""], ["a" * 201], None],
    "artifact": [METADATA_VERSION + 1, "1", None, [1]],
    "config": [
        *(None, ["x"], "MODEL: {NOVEL: 1}\nVERSION: 2\n"),
        *(f"_BASE_: {URL}", "_BASE_: /etc/hostname", TIMM, f"DATASETS: {{TRAIN: ['{URL}']}}"),
    ],
}
OF_WEIGHTS = "artifact", "classes", "config", "operating_point", "precision", "weights_sha256"
OF_WEIGHTS += ("score_map", "training_images")


# All values of the format that takes least time; the others are checked by the same function.
WRONG = [
    (suffix, key, value)
    for suffix in SUFFIXES
    for key, values in VALUES.items()
    for value in (values if suffix == ".onnx" else values[:2])
]


@pytest.mark.parametrize("suffix, key, value", WRONG)
def test_metadata_are_checked(exported, metadata, tmp_path, suffix, key, value):
    path, tensors = tmp_path / f"a{suffix}", safetensors.torch.load_file(exported("torch"))
    documents = [{**metadata, key: value}, {k: v for k, v in metadata.items() if k != key}]
    if suffix == ".safetensors":  # which may be another program's
        documents = documents[: key in OF_WEIGHTS]
    if key in ("score_map", "training_images"):  # files of earlier versions have none
        documents = documents[:1]
    for document in documents:
        text = json.dumps(document).replace("NaN", "1e999")  # the one is no JSON
        write_export(path, text, tensors)
        match = rf"{path.name}.*({key}|imrcnn-d2 {metadata['version']})"
        pytest.raises(ValueError, load_model, None, path).match(match)


@pytest.mark.parametrize(
    "suffix, artifact", [*zip(SUFFIXES, (0, METADATA_VERSION, 0), strict=True)]
)
def test_earlier_versions_are_read(exported, metadata, tmp_path, suffix, artifact):
    path, tensors = tmp_path / f"a{suffix}", safetensors.torch.load_file(exported("torch"))
    later = ("score_map", "training_images")
    metadata = {key: value for key, value in metadata.items() if key not in later}
    text = json.dumps({**metadata, "classes": ["a" * 200], "artifact": artifact})
    loaded = load_model(None, write_export(path, text, tensors))
    assert (loaded.tau, loaded.weights.score_map) == (TAU, None)
    assert loaded.metadata.get("training_images") is None


DEMANDS = {
    **{"MODEL.ROI_MASK_HEAD.NUM_CONV": 101, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 113},
    **{"MODEL.RPN.PRE_NMS_TOPK_TEST": 100_001, "TEST.DETECTIONS_PER_IMAGE": 1001},
    "INPUT.MIN_SIZE_TEST": 3001,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8.0] * 101],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0] * 101],
}


@pytest.mark.parametrize("key, value", DEMANDS.items())
def test_what_a_config_demands_is_bounded(tiny_run, weights, metadata, tmp_path, key, value):
    cfg = load_config(tiny_run / "config.yaml", [key, value])
    pytest.raises(ValueError, load_model, cfg, weights).match(f"model_best.pth: .*{key}")
    text = json.dumps({**metadata, "config": cfg.dump()})
    for suffix in SUFFIXES:
        path = write_export(tmp_path / f"a{suffix}", text)
        pytest.raises(ValueError, load_model, None, path).match(f"a{suffix}: .*{key}")


NO_MODELS = {
    **{"MODEL.META_ARCHITECTURE": "Nope", "MODEL.TIMM.NAME": "nope", "MODEL.FPN.NORM": "XX"},
    **{"MODEL.FPN.OUT_CHANNELS": -5, "MODEL.PIXEL_MEAN": [1.0]},
}


@pytest.mark.parametrize("key, value", NO_MODELS.items())
def test_a_config_of_no_model_is_refused(tiny_run, weights, key, value):
    cfg = load_config(tiny_run / "config.yaml", [key, value])
    with pytest.raises(ValueError, match="model_best.pth") as refused:
        load_model(cfg, weights)
    assert isinstance(value, list) or str(value) in str(refused.value)


def test_nothing_is_written_where_a_config_says(
    tiny_run, weights, exported, metadata, image_folder, tmp_path
):
    cfg = load_config(tiny_run / "config.yaml", ["OUTPUT_DIR", str(tmp_path / "elsewhere")])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    text, other = json.dumps({**metadata, "config": cfg.dump()}), tmp_path / "model.safetensors"
    write_export(other, text, safetensors.torch.load_file(exported("torch")))
    for path in (shutil.copy(weights, tmp_path / "model.pth"), other):
        before, output = set(tmp_path.rglob("*")), tmp_path / f"of_{path.name}"
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
    torch.save({"model": TENSORS, "operating_point": POINT, "score_map": MAP}, buffer, **options)
    return buffer.getvalue()


with zipfile.ZipFile(io.BytesIO(written())) as archive:
    MEMBERS = {name: archive.read(name) for name in archive.namelist()}
(DATA_PKL,) = (name for name in MEMBERS if name.endswith("/data.pkl"))
METADATA = {"format": "pt", "operating_point": json.dumps(POINT), "classes": '["polyp"]'}
METADATA["score_map"] = json.dumps(MAP)
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
pickles = st.lists(st.sampled_from(STEPS), min_size=2, max_size=30).map(
    lambda s: b"".join(s) + b"."
)
KINDS = {
    **{name: damaged_bytes(content) for name, content in FILES.items()},
    "a.pth, its pickle damaged": damaged_bytes(MEMBERS[DATA_PKL]).map(with_pickle),
    **{"a.pth, any pickle": pickles.map(with_pickle), "a.pkl, any pickle": pickles},
}


@pytest.mark.parametrize("kind", KINDS)
@some_hundred
@given(st.data())
def test_any_weights(folder, kind, data):
    name, content = kind.split(",")[0], data.draw(KINDS[kind])
    (folder / name).write_bytes(content)
    try:
        loaded = load_checkpoint_file(folder / name)
        if loaded.get("operating_point") is not None:
            assert 0 <= OperatingPoint.of_file(loaded["operating_point"], folder / name).tau <= 1
        if loaded.get("score_map") is not None:
            assert ScoreMap.of_file(loaded["score_map"], folder / name).slope > 0
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
    path = folder / ("a.openvino" if form == "openvino" else "a.onnx")
    if form == "metadata":
        metadata = damaged_json({**metadata, "config": "VERSION: 2"})
        write_export(path, data.draw(metadata).decode("utf-8", "replace"))
    else:
        content = write_export(path, json.dumps(metadata)).read_bytes()
        path.write_bytes(data.draw(damaged_bytes(content)))
    try:
        loaded = load_model(None, path)
    except ValueError as error:
        assert path.name in str(error)
        return
    assert loaded.tau is None or 0 <= loaded.tau <= 1
    assert all(isinstance(name, str) and name for name in loaded.classes)
