"""Files of other runtimes are the model, for any number and size of images."""

import json
import zipfile
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from imrcnn_d2.cli import export
from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.deploy.runtimes import (
    EXPORT_VERSION,
    EXPORTS,
    OnnxRuntime,
    OpenVINORuntime,
    export_metadata,
)
from imrcnn_d2.deploy.runtimes.graph import METADATA_KEY
from imrcnn_d2.deploy.runtimes.openvino import OPENVINO_PARTS
from imrcnn_d2.utils.files import BadInputError
from imrcnn_d2.utils.safe_loading import UnsafeFileError, load_torch_file

from .conftest import TAU, picture

GRAPHS = ("onnx", "openvino")
SIZES = ((60, 80), (64, 64), (90, 64))


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return load_model(None, tiny_run / "model_best.pth")


@pytest.fixture(scope="module")
def files(loaded, predictor, tmp_path_factory):
    """A file of each format in fp32."""
    folder = tmp_path_factory.mktemp("graphs")
    for form in GRAPHS:
        example = predictor.prepare(picture(0))
        EXPORTS[form].export(loaded, folder / f"model.{form}", example=example)
    return folder


@pytest.mark.parametrize("form", GRAPHS)
def test_it_predicts_what_pytorch_does(files, predictor, form):
    other = Predictor(None, files / f"model.{form}")
    assert other.metadata == {**predictor.metadata, "runtime": EXPORTS[form].name}
    assert (other.tau, other.classes) == (TAU, ["polyp"])
    for height, width in SIZES:
        images = [picture(seed, height, width) for seed in range(3)]
        for batch_size in (1, 3):
            for one, two in zip(
                predictor(images, batch_size), other(images, batch_size), strict=True
            ):
                assert len(one) == len(two) > 1
                np.testing.assert_allclose(two.scores, one.scores, rtol=0, atol=1e-4)
                np.testing.assert_allclose(
                    two.pred_boxes.tensor, one.pred_boxes.tensor, rtol=0, atol=1e-2
                )
                assert (two.pred_masks != one.pred_masks).float().mean() < 1e-3


def test_bf16(loaded, predictor, tmp_path):
    path, example = tmp_path / "model.openvino", predictor.prepare(picture(0))
    OpenVINORuntime.export(loaded, path, example=example, precision="bf16")
    one, two = (each(picture(9)) for each in (predictor, Predictor(None, path)))
    assert abs(one.scores[0] - two.scores[0]) < 0.05  # fp32, where the processor has no bf16


def test_int8(loaded, predictor, tmp_path):
    calibration = [predictor.prepare(picture(seed)) for seed in range(4)]
    path = tmp_path / "model.openvino"
    OpenVINORuntime.export(
        loaded, path, example=calibration[0], precision="int8", calibration=calibration
    )
    with zipfile.ZipFile(path) as archive:
        graph = ElementTree.fromstring(archive.read(OPENVINO_PARTS[0]))
    quantised = {
        edge.get("to-layer")
        for edge in graph.iter("edge")
        for layer in graph.iter("layer")
        if layer.get("type") == "FakeQuantize" and edge.get("from-layer") == layer.get("id")
    }
    names = [layer.get("name") for layer in graph.iter("layer") if layer.get("id") in quantised]
    for part in ("/body/4/", "/fpn_output2", "/rpn_head/conv", "/box_head/", "/mask_fcn1"):
        assert any(part in name for name in names), part
    kept = (
        "cbam",
        "/body/conv_stem",
        "/body/0/",
        "/body/3/",
        "/rpn_head/Conv_1/",
        "/rpn_head/Conv_2/",
        "objectness_logits",
        "anchor_deltas",
        "cls_score",
    )
    assert not [name for name in names if any(part in name for part in kept)]
    assert all(
        name.startswith(("/backbone", "/rpn_head", "/box_head", "/mask_fcn")) for name in names
    )

    one, two = (each(picture(9)) for each in (predictor, Predictor(None, path)))
    assert not np.array_equal(one.scores, two.scores), "it was not quantised"
    # The tiny model's random weights make much of small differences.
    assert abs(one.scores[0] - two.scores[0]) < 0.4


def test_an_export_is_not_exported(files, tmp_path, capsys):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    command = ["--format", "safetensors", "--weights", files / "model.onnx"]
    command += ["--images", tmp_path / "a.png", "--output", tmp_path / "m.safetensors"]
    with pytest.raises(SystemExit):
        export.main([str(part) for part in command])
    assert "model.onnx is an export already" in capsys.readouterr().err


def test_what_cannot_be_had_is_said(loaded, predictor, tmp_path):
    example = predictor.prepare(picture(0))
    with pytest.raises(ValueError, match="no bf16 of onnx; choose of fp32"):
        OnnxRuntime.export(loaded, tmp_path / "m.onnx", example=example, precision="bf16")
    with pytest.raises(ValueError, match="int8 needs images of the training set"):
        OpenVINORuntime.export(loaded, tmp_path / "m.openvino", example=example, precision="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", GRAPHS)
def test_damaged_files_are_named(files, tmp_path, form):
    path = tmp_path / f"damaged.{form}"
    content = (files / f"model.{form}").read_bytes()
    for broken in (b"", content[: len(content) // 2], b"no model at all"):
        path.write_bytes(broken)
        with pytest.raises(BadInputError, match=f"damaged.{form}: cannot be opened"):
            Predictor(None, path)


def test_files_of_others_and_of_later_versions_are_refused(files, tmp_path):
    model = onnx.load(files / "model.onnx")
    about = json.loads(model.metadata_props[0].value)
    about["artifact"] = EXPORT_VERSION + 1
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(about)})
    onnx.save(model, tmp_path / "later.onnx")
    with pytest.raises(ValueError, match="later.onnx was written by a later version"):
        Predictor(None, tmp_path / "later.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(BadInputError, match="foreign.onnx: was not written by tools/export.py"):
        Predictor(None, tmp_path / "foreign.onnx")


def test_config_and_runtime_are_the_file_s(files, tiny_run):
    with pytest.raises(ValueError, match="brings its config along"):
        Predictor(tiny_run / "config.yaml", files / "model.onnx")
    with pytest.raises(ValueError, match="for the runtime onnxruntime and not for 'openvino'"):
        Predictor(None, files / "model.onnx", runtime="openvino")


def test_where_it_was_trained_is_nobody_s_business(files, tiny_run):
    for form in GRAPHS:
        path = files / f"model.{form}"
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        assert str(tiny_run).encode() not in content


class Evil(torch.nn.Module):
    """A program of TorchScript that makes a file when it is loaded, and another when it runs."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        return torch.from_file(self.path + "_by_running", True, 1) + x

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = bool(torch.from_file(self.path + "_by_loading", True, 1).sum() > 0)


def test_programs_are_not_loaded(tmp_path):
    path = tmp_path / "evil.torchscript"
    torch.jit.save(torch.jit.script(Evil(str(tmp_path / "made"))), path, {METADATA_KEY: "{}"})
    with pytest.raises(UnsafeFileError, match=r"evil.torchscript .*tools/export.py"):
        Predictor(None, path)
    with pytest.raises(ValueError, match="evil.pth "):
        load_torch_file(path.rename(tmp_path / "evil.pth"))
    assert [file.name for file in tmp_path.iterdir()] == ["evil.pth"]
    torch.jit.load(tmp_path / "evil.pth")(torch.ones(1))
    assert {file.name for file in tmp_path.iterdir()} > {"made_by_loading", "made_by_running"}


def small_onnx(*, nodes=(), weights=(), sparse=(), about="{}", **options):
    """y = x + w, of which `weights` may be the w."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"]), *nodes],
        "small",
        [value("x", onnx.TensorProto.FLOAT, [4])],
        [value("y", onnx.TensorProto.FLOAT, [4])],
        weights,
        sparse_initializer=sparse,
    )
    domains = [onnx.helper.make_opsetid(domain, 1) for domain in ("com.microsoft", "evil")]
    domains.append(onnx.helper.make_opsetid("", 17))
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=8, **options)
    onnx.helper.set_model_props(model, {METADATA_KEY: about})
    return model.SerializeToString()


def outside(name="w"):
    tensor = onnx.TensorProto(name=name, data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value="secret.bin")
    return tensor


def floats(name, *values):
    return onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [len(values)], values)


def sparse_tensor():
    at = onnx.helper.make_tensor("at", onnx.TensorProto.INT64, [1], [0])
    return onnx.helper.make_sparse_tensor(floats("w", 1.0), at, [4])


def in_a_branch():
    """The data of another file, deep in a graph of a graph."""
    value = onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, [4])
    constant = onnx.helper.make_node("Constant", [], ["o"], value=outside("c"))
    branch = onnx.helper.make_graph([constant], "branch", [], [value])
    true = onnx.helper.make_node(
        "Constant", [], ["t"], value=onnx.helper.make_tensor("t", onnx.TensorProto.BOOL, [], [True])
    )
    both = {"then_branch": branch, "else_branch": branch}
    return [true, onnx.helper.make_node("If", ["t"], ["i"], **both)]


W = floats("w", 1, 2, 3, 4)
ONNX = {
    "secret.bin": lambda: small_onnx(weights=[outside()]),
    "'c'.*secret.bin": lambda: small_onnx(nodes=in_a_branch(), weights=[W]),
    r"sparse tensor of shape \[4\]": lambda: small_onnx(sparse=[sparse_tensor()]),
    "evil.Call": lambda: small_onnx(
        nodes=[onnx.helper.make_node("Call", ["x"], ["z"], domain="evil")], weights=[W]
    ),
    "com.microsoft.Gelu": lambda: small_onnx(
        nodes=[onnx.helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft")], weights=[W]
    ),
}


@pytest.mark.parametrize("what", ONNX)
def test_an_onnx_file_is_all_in_one_and_of_onnx_s_operators(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)  # whose files ONNX Runtime would read
    (tmp_path / "secret.bin").write_bytes(np.ones(4, np.float32).tobytes())
    (tmp_path / "a.onnx").write_bytes(ONNX[what]())
    with pytest.raises(UnsafeFileError, match=f"a.onnx was refused: .*{what}"):
        OnnxRuntime.load(tmp_path / "a.onnx")
    with zipfile.ZipFile(tmp_path / "a.openvino", "w") as archive:  # OpenVINO reads ONNX too
        archive.writestr(OPENVINO_PARTS[0], ONNX[what]())
        archive.writestr(OPENVINO_PARTS[1], b"")
        archive.writestr(METADATA_KEY, '{"precision": "fp32"}')
    with pytest.raises(UnsafeFileError, match="a.openvino was refused: its model.xml"):
        OpenVINORuntime.load(tmp_path / "a.openvino")


def test_an_onnx_file_is_not_taken_for_one_of_onnx_runtime_s(tmp_path):
    (tmp_path / "a.onnx").write_bytes(small_onnx(weights=[W], producer_name="ORTM"))
    assert (tmp_path / "a.onnx").read_bytes()[4:8] == b"ORTM"  # how its other format is known
    assert OnnxRuntime.load(tmp_path / "a.onnx").name == "onnxruntime"


def rewritten(path, target, compression=zipfile.ZIP_STORED, **parts):
    """A copy of an OpenVINO file with other parts."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, parts.get(name, old.read(name)))
    return target


@pytest.mark.parametrize("form", GRAPHS)
def test_a_flipped_bit_and_a_compressed_part(files, loaded, tmp_path, form):
    path = tmp_path / f"flipped.{form}"
    content = bytearray((files / f"model.{form}").read_bytes())
    weight = loaded.model.state_dict()["roi_heads.mask_head.predictor.weight"]
    content[content.index(weight.numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=f"flipped.{form}: .*(checksum|CRC)"):
        Predictor(None, path)
    if form == "openvino":
        rewritten(files / "model.openvino", path, zipfile.ZIP_DEFLATED)
        with pytest.raises(BadInputError, match=r"flipped.openvino: .*compressed"):
            Predictor(None, path)


METADATA_VALUES = {
    "operating_point": [{"tau": float("nan"), "rule": "f1", "dataset": None}, [], {"tau": 0.5}],
    "classes": [[], "polyp", [1], ["a", "b"], [{}], ["\x1b[2J"], None],
    "artifact": ["1", None, [1]],
    "config": [None, 3],
    "model": [None, 3],
    "precision": [3],
    "weights_sha256": [3, {}],
}


@pytest.fixture(scope="module")
def about(loaded):
    return {**export_metadata(loaded, "fp32"), "format": "onnx"}


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, values in METADATA_VALUES.items() for v in values]
)
def test_what_a_file_says_about_itself_is_checked(about, tmp_path, key, value):
    path = tmp_path / "a.onnx"
    for changed in ({**about, key: value}, {k: v for k, v in about.items() if k != key}):
        text = json.dumps(changed).replace("NaN", "1e999")  # the one is no JSON
        path.write_bytes(small_onnx(weights=[W], about=text))
        with pytest.raises(BadInputError, match="a.onnx"):
            load_model(None, path)
    path.write_bytes(small_onnx(weights=[W], about=json.dumps(about)))
    assert load_model(None, path).tau == TAU


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "{", '{"precision": NaN}'])
def test_what_a_file_says_about_itself_is_json(tmp_path, text):
    (tmp_path / "a.onnx").write_bytes(small_onnx(weights=[W], about=text))
    with pytest.raises(BadInputError, match="a.onnx: cannot be opened"):
        load_model(None, tmp_path / "a.onnx")


IMAGE, BOXES, ONES = np.zeros(2, np.int64), np.ones((2, 4), np.float32), np.ones(2, np.float32)


@pytest.mark.parametrize(
    "outputs",
    [
        (IMAGE, BOXES[:1], ONES, IMAGE),
        (IMAGE, BOXES, ONES[:1], IMAGE),
        (IMAGE, BOXES, ONES, IMAGE + 1),
        (IMAGE, BOXES, ONES, IMAGE - 1),
        (IMAGE, BOXES, ONES, IMAGE, np.ones((2, 3, 4, 4), np.float32)),
        (IMAGE, BOXES, ONES, IMAGE, ONES),
        (np.ones((1, 2), np.float32),),
    ],
)
def test_what_a_graph_gives_is_checked(outputs):
    runtime = OnnxRuntime(lambda batch: outputs, {"classes": ["polyp"]})
    with pytest.raises(ValueError, match="The graph"):
        runtime([torch.zeros(3, 8, 8, dtype=torch.uint8)])
