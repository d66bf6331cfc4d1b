"""Every runtime and exported file predicts what PyTorch does; bad files are refused."""

import json
import zipfile
from xml.etree import ElementTree

import numpy as np
import onnx
import pycocotools.mask as mask_util
import pytest
import safetensors.torch
import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from PIL import Image

from imrcnn_d2.cli import export
from imrcnn_d2.deploy import Predictor, load_model
from imrcnn_d2.deploy.runtimes import (
    EXPORT_VERSION,
    EXPORTS,
    RUNTIMES,
    OnnxRuntime,
    OpenVINORuntime,
    TorchRuntime,
    build_runtime,
    export_metadata,
)
from imrcnn_d2.deploy.runtimes.check import Differences, compare_predictors, compare_records
from imrcnn_d2.deploy.runtimes.graph import METADATA_KEY, DetectorGraph
from imrcnn_d2.deploy.runtimes.openvino import OPENVINO_PARTS
from imrcnn_d2.engine import Trainer, load_config, load_weights
from imrcnn_d2.engine.checkpoint import Checkpointer
from imrcnn_d2.modeling.roi_heads import FP32ROIPooler
from imrcnn_d2.utils.files import BadInputError
from imrcnn_d2.utils.safe_loading import UnsafeFileError, load_torch_file

from .conftest import OPTS, TAU, random_image

GRAPHS = ("onnx", "openvino")
SIZES = ((60, 80), (64, 64), (90, 64))


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return load_model(None, tiny_run / "model_best.pth")


@pytest.fixture(scope="module")
def files(loaded, predictor, tmp_path_factory):
    """A file of each format in fp32."""
    folder = tmp_path_factory.mktemp("exports")
    for form, runtime in EXPORTS.items():
        runtime.export(loaded, folder / f"model.{form}", example=predictor.prepare(random_image(0)))
    return folder


@pytest.mark.parametrize("form", EXPORTS)
def test_a_file_predicts_what_its_original_does(files, predictor, tiny_run, form):
    path = files / f"model.{form}"
    other = Predictor(None, path)
    shared = other.metadata.keys() - ({"weights_sha256"} if form == "safetensors" else set())
    expected = {**predictor.metadata, "runtime": EXPORTS[form].name}
    assert {key: other.metadata[key] for key in shared} == {key: expected[key] for key in shared}
    assert (other.tau, other.classes) == (TAU, ["polyp"])
    for height, width in SIZES:
        images = [random_image(seed, height, width) for seed in range(3)]
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
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(tiny_run).encode() not in content, "where it was trained is nobody's business"


@pytest.mark.parametrize("form", EXPORTS)
def test_damaged_files_are_named(files, tmp_path, form):
    path = tmp_path / f"damaged.{form}"
    content = (files / f"model.{form}").read_bytes()
    for broken in (b"", content[: len(content) // 2], b"no model at all"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"damaged.{form}"):
            Predictor(None, path)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_others_run_a_checkpoint(predictor, tiny_run, name):
    other = Predictor(None, tiny_run / "model_best.pth", runtime=name)
    assert other.metadata["runtime"] == name
    torch.testing.assert_close(
        other(random_image(0)).scores, predictor(random_image(0)).scores, rtol=0, atol=1e-4
    )


def test_bf16_is_near_fp32(predictor, tiny_run):
    other = Predictor(None, tiny_run / "model_best.pth", runtime="torch-bf16")
    assert other.metadata["runtime"] == "torch-bf16"
    image = other.prepare(random_image(0))
    (one,), (two,) = predictor.forward([image]), other.forward([image])
    assert two.scores.dtype == two.pred_masks.dtype == two.pred_boxes.tensor.dtype == torch.float32
    assert not torch.equal(two.scores, two.scores.bfloat16().float()), "scores in steps"
    assert not torch.equal(one.scores, two.scores), "it was not run in bf16"
    assert abs(one.scores[0] - two.scores[0]) < 0.05
    assert abs(one.pred_boxes.tensor[0] - two.pred_boxes.tensor[0]).max() < 2


def test_foreign_heads_pool_in_fp32_too(tiny_run):
    cfg = load_model(None, tiny_run / "model_best.pth").cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    model = build_model(cfg).eval()
    assert isinstance(model.roi_heads.box_pooler, ROIPooler)
    runtime = build_runtime("torch-bf16", model, None)
    assert isinstance(model.roi_heads.box_pooler, FP32ROIPooler)
    assert isinstance(model.roi_heads.mask_pooler, FP32ROIPooler)
    runtime([torch.zeros(3, 64, 64, dtype=torch.uint8)])


def test_auto_is_one_of_them(tiny_run):
    predictor = Predictor(None, tiny_run / "model_best.pth", runtime="auto")
    assert predictor.metadata["runtime"] in RUNTIMES
    assert len(predictor(random_image(0)))


def test_another_is_named(tiny_run):
    with pytest.raises(
        ValueError, match="'tensorrt'; choose of torch, onnxruntime, openvino, torch-bf16"
    ):
        Predictor(None, tiny_run / "model_best.pth", runtime="tensorrt")


def test_metadata_of_safetensors(loaded, tiny_run, tmp_path):
    TorchRuntime.export(loaded, tmp_path / "model.safetensors", precision="fp16")
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        texts = file.metadata()
    assert texts.pop("format") == "pt"
    metadata = {key: json.loads(text) for key, text in texts.items()}
    assert metadata["operating_point"] == {"tau": TAU, "rule": "f1", "dataset": "kvasir_seg_val"}
    assert (metadata["tau"], metadata["classes"], metadata["precision"]) == (TAU, ["polyp"], "fp16")
    assert metadata["weights_sha256"] == loaded.weights.sha256
    assert str(tiny_run) not in " ".join(texts.values()), (
        "where it was trained is nobody's business"
    )


def test_fp32_keeps_every_bit(loaded, files):
    exported = load_model(None, files / "model.safetensors").model.state_dict()
    expected = loaded.model.state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def test_fp16_rounds_kernels_alone(loaded, tmp_path):
    path = tmp_path / "model.safetensors"
    TorchRuntime.export(loaded, path, precision="fp16")
    for name, tensor in safetensors.torch.load_file(path).items():
        original = loaded.model.state_dict()[name]
        if original.ndim < 2:
            assert tensor.dtype == original.dtype and torch.equal(tensor, original)
        else:
            assert tensor.dtype == torch.float16
            torch.testing.assert_close(tensor.float(), original, rtol=2**-11, atol=1e-7)


def test_what_fp16_cannot_hold_is_named(tiny_run, tmp_path):
    loaded = load_model(None, tiny_run / "model_best.pth")
    with torch.no_grad():
        loaded.model.backbone.fpn_lateral2.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"backbone.fpn_lateral2.weight has values up to 1e\+06"):
        TorchRuntime.export(loaded, tmp_path / "model.safetensors", precision="fp16")
    assert not list(tmp_path.iterdir())


def test_model_weights_takes_it(loaded, tmp_path):
    path = tmp_path / "model.safetensors"
    TorchRuntime.export(loaded, path, precision="fp16")
    model = Trainer.build_model(loaded.cfg)
    weights = load_weights(Checkpointer(model), str(path))
    assert weights.operating_point.tau == TAU
    name = "backbone.fpn_lateral2.weight"
    found, expected = model.state_dict()[name], loaded.model.state_dict()[name]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=2**-11, atol=1e-7)


def test_bf16(loaded, predictor, tmp_path):
    path, example = tmp_path / "model.openvino", predictor.prepare(random_image(0))
    OpenVINORuntime.export(loaded, path, example=example, precision="bf16")
    one, two = (each(random_image(9)) for each in (predictor, Predictor(None, path)))
    assert abs(one.scores[0] - two.scores[0]) < 0.05  # fp32, where the processor has no bf16


def test_int8(loaded, predictor, tmp_path):
    calibration = [predictor.prepare(random_image(seed)) for seed in range(4)]
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

    one, two = (each(random_image(9)) for each in (predictor, Predictor(None, path)))
    assert not np.array_equal(one.scores, two.scores), "it was not quantised"
    # The tiny model's random weights make much of small differences.
    assert abs(one.scores[0] - two.scores[0]) < 0.4


def test_an_export_is_not_exported(files, tmp_path, capsys):
    Image.fromarray(random_image(0)).save(tmp_path / "a.png")
    command = ["--format", "safetensors", "--weights", files / "model.onnx"]
    command += ["--images", tmp_path / "a.png", "--output", tmp_path / "m.safetensors"]
    with pytest.raises(SystemExit):
        export.main([str(part) for part in command])
    assert "model.onnx is an export already" in capsys.readouterr().err


def test_what_cannot_be_had_is_said(loaded, predictor, tmp_path):
    example = predictor.prepare(random_image(0))
    for form, runtime in EXPORTS.items():
        with pytest.raises(ValueError, match=f"int4 of {form}"):
            runtime.export(loaded, tmp_path / f"m.{form}", example=example, precision="int4")
    with pytest.raises(ValueError, match="int8 needs images of the training set"):
        OpenVINORuntime.export(loaded, tmp_path / "m.openvino", example=example, precision="int8")
    assert not list(tmp_path.iterdir())


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


FOREIGN = [
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 3),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
]
CASES = {
    "one class": [],
    "three classes": ["MODEL.ROI_HEADS.NUM_CLASSES", 3],
    "few of many": [
        *("MODEL.ROI_HEADS.NUM_CLASSES", 3),
        *("MODEL.RPN.PRE_NMS_TOPK_TEST", 20),
        *("TEST.DETECTIONS_PER_IMAGE", 4),
    ],
    "boxes for all classes": FOREIGN,
    "masks for all classes": ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True],
    "no masks": ["MODEL.MASK_ON", False],
}


def detector(opts):
    torch.manual_seed(0)
    model = build_model(load_config("configs/kvasir_seg/imrcnn_lite.yaml", [*OPTS, *opts])).eval()
    with torch.no_grad():  # surer of itself, so that scores differ
        model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.5)
        model.roi_heads.box_predictor.bbox_pred.weight.normal_(std=0.1)
        model.proposal_generator.rpn_head.anchor_deltas.weight.normal_(std=0.1)
    return model


def batch(number, height=64, width=85):
    images = [torch.from_numpy(random_image(i, height, width).copy()) for i in range(number)]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(64, 85), (64, 64)])
def test_it_equals_detectron2_s(case, size):
    model, images = detector(CASES[case]), batch(3, *size)
    expected = TorchRuntime(model)(list(images))
    with torch.no_grad():
        image, boxes, scores, classes, *masks = DetectorGraph(model)(images)
    assert len(boxes) == sum(map(len, expected)) and len(boxes) > 2
    for i, instances in enumerate(expected):
        own = image == i
        # The same sums in another order, which processors differ in: 1.7e-6 was seen with AMX.
        torch.testing.assert_close(scores[own], instances.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(boxes[own], instances.pred_boxes.tensor, rtol=0, atol=1e-2)
        assert torch.equal(classes[own], instances.pred_classes)
        assert bool(masks) == instances.has("pred_masks")
        if masks:
            torch.testing.assert_close(masks[0][own], instances.pred_masks, rtol=0, atol=1e-4)


def test_nothing_found():
    model = detector([])
    model.roi_heads.box_predictor.test_score_thresh = 1.0
    with torch.no_grad():
        found = DetectorGraph(model)(batch(2))
    assert [tuple(each.shape) for each in found] == [(0,), (0, 4), (0,), (0,), (0, 1, 28, 28)]


def test_other_models_are_refused():
    opts = [
        *("MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_timm_pafpn_backbone"),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
        *("MODEL.MASK_ON", False),
    ]
    model = build_model(load_config("configs/kvasir_seg/imrcnn_lite.yaml", [*OPTS, *opts])).eval()
    with pytest.raises(ValueError, match="RetinaNet cannot be exported"):
        DetectorGraph(model)


BOUNDS = {"lost": 0, "unmatched": 3, "score": 0.02, "box": 1, "mask_iou": 0.97}


class Moved:
    """A predictor whose boxes and scores are another's, moved by a known amount."""

    def __init__(self, predictor, *, score=0.0, shift=0.0, left_out=0, classes=0):
        self._predictor, self._score, self._shift = predictor, score, shift
        self._left_out, self._classes = left_out, classes
        self.prepare, self.finish = predictor.prepare, predictor.finish
        self.is_classifier, self.tau = False, predictor.tau

    def forward(self, prepared):
        outputs = self._predictor.forward(prepared)
        for output in outputs:
            output.scores = output.scores - self._score
            output.pred_classes += self._classes
            output.pred_boxes.tensor[:, :2] += self._shift
        return [output[self._left_out :] for output in outputs]


@pytest.fixture
def paths(tmp_path):
    for seed in range(2):
        Image.fromarray(random_image(seed, 64, 85)).save(tmp_path / f"{seed}.png")
    return sorted(tmp_path.iterdir())


def test_one_agrees_with_itself(predictor, paths):
    differences = compare_predictors(predictor, predictor, paths)
    assert differences.images == 2 and differences.detections > 2
    assert (differences.unmatched, *differences.largest()) == (0, 0, 0, 1)
    assert not differences.exceeded(lost=0, unmatched=0, score=0, box=0, mask_iou=1)


def test_the_largest_difference_is_found(predictor, paths):
    differences = compare_predictors(predictor, Moved(predictor, score=0.01, shift=0.5), paths)
    score, box, mask_iou = differences.largest()
    assert score == pytest.approx(0.01, abs=1e-5)
    # half a pixel of 85, as the network sees the image in its own size
    assert box == pytest.approx(100 * 0.5 / 85, rel=1e-3)
    assert mask_iou < 1


def test_what_is_missing_is_counted(predictor, paths):
    differences = compare_predictors(predictor, Moved(predictor, left_out=1), paths)
    assert differences.unmatched == differences.lost == 2
    nothing = compare_predictors(predictor, Moved(predictor, left_out=100), paths)
    assert nothing.unmatched == nothing.detections > 2


def test_another_class_is_no_match(predictor, paths):
    differences = compare_predictors(predictor, Moved(predictor, classes=1), paths)
    assert differences.unmatched == differences.detections > 2


def test_bounds_are_named():
    good = Differences(9, 100, 3, 0, *(np.array([v]) for v in (0.02, 1, 0.97)))
    assert good.exceeded(**BOUNDS) == []
    bad = Differences(9, 100, 4, 1, *(np.array([v]) for v in (0.03, 1.5, 0.9)))
    message = "; ".join(bad.exceeded(**BOUNDS))
    for part in ("1 detections above", "4 %", "0.03, more than 0.02", "1.5 %", "0.9, less"):
        assert part in message


def test_nan_is_beyond_any_bound():
    nothing = Differences(9, 100, 0, 0, *(np.array([np.nan]) for _ in range(3)))
    assert len(nothing.exceeded(**BOUNDS)) == 3


def test_a_bound_may_be_for_most_detections():
    steps = np.arange(1, 101) / 100
    differences = Differences(9, 100, 0, 1, steps, 100 * steps, 1 - steps)
    assert differences.largest() == pytest.approx((1, 100, 0))
    # Of a hundred, 95 differ by no more than 0.95; the quantile lies at the next one.
    assert differences.largest(0.95) == pytest.approx((0.96, 96, 0.04))
    bounds = {"lost": 1, "unmatched": 0, "score": 0.96, "box": 96, "mask_iou": 0.039}
    assert differences.exceeded(**bounds, share=0.95) == []
    assert len(differences.exceeded(**bounds)) == 3
    assert len(differences.exceeded(**{**bounds, "lost": 0}, share=0.95)) == 1


def test_two_empty_masks_are_equal():
    empty, full = (
        mask_util.encode(np.asfortranarray(np.full((8, 8), value, np.uint8))) for value in (0, 1)
    )
    box = {"bbox": [1, 1, 4, 4], "category_id": 0, "score": 0.9}

    def differences(one, two):
        found = ([[{**box, "segmentation": mask}]] for mask in (one, two))
        return compare_records(*found, [(8, 8)], 0.5).mask_ious.tolist()

    assert differences(empty, empty) == differences(full, full) == [1]
    assert differences(empty, full) == differences(full, empty) == [0]
