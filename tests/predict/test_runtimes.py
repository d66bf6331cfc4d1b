"""Every runtime and exported file predicts what PyTorch does; bad files are refused."""

import hashlib
import itertools
import json
import os
import re
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import onnx
import onnx.parser
import pycocotools.mask as mask_util
import pytest
import safetensors.torch
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads

from imrcnn_d2.cli import export
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.training_images import hash_image
from imrcnn_d2.deploy import Predictor, load_model
from imrcnn_d2.deploy.outputs import Differences, compare_records
from imrcnn_d2.deploy.runtimes import (
    EXPORTS,
    RUNTIMES,
    OnnxRuntime,
    OpenVINORuntime,
    TorchRuntime,
    build_runtime,
    compiled_cache,
)
from imrcnn_d2.deploy.runtimes.base import METADATA_KEY, DetectorGraph
from imrcnn_d2.deploy.runtimes.openvino import OPENVINO_PARTS, _core
from imrcnn_d2.engine import Trainer, load_config, load_weights
from imrcnn_d2.engine.checkpoint import Checkpointer
from imrcnn_d2.evaluation import ScoreMap, evaluate_lesions
from imrcnn_d2.modeling.roi_heads import FP32SeparableROIPooler
from imrcnn_d2.utils.files import BadInputError
from imrcnn_d2.utils.safe_loading import UnsafeFileError, load_torch_file

from .conftest import (
    CLS_SCORE,
    RETINANET,
    TAU,
    config,
    random_image,
    random_model,
    same,
    save_image,
)

CAPABILITIES = "OPTIMIZATION_CAPABILITIES"  # of a processor
SIZES = ((60, 80), (64, 64), (90, 64))
# Largest differences of scores and boxes (pixels): each runtime orders its sums in its own way.
# Random weights make much of the small differences of bf16 and int8.
TOLERANCES = {"fp32": (1e-4, 1e-2), "fp16": (0.02, 1), "bf16": (0.05, 2), "int8": (0.4, np.inf)}
EXPORTED = [(name.name, precision) for name in EXPORTS.values() for precision in name.precisions]
INT8 = ("openvino", "int8")
RARE = [case for case in EXPORTED if case[1] in ("bf16", "int8")] + [("onnxruntime", None)]
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if case in RARE else [])
    for case in (*((runtime, None) for runtime in RUNTIMES), *EXPORTED)  # None: of a checkpoint
]


@pytest.mark.parametrize("runtime, precision", CASES)
def test_detectors(exported, traced_once, predictor, weights, runtime, precision):
    expected, path = {**predictor.metadata, "runtime": runtime}, weights
    if precision is not None:
        path = exported(runtime, precision)
        assert str(weights.parent).encode() not in path.read_bytes(), "where it was trained"
        expected |= {
            "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "source_sha256": predictor.metadata["weights_sha256"],
        }
    other = traced_once(Predictor, None, path, runtime=runtime)
    sizes = SIZES if path != weights or runtime == "torch" else SIZES[:1]  # a graph is the file's
    precision = "bf16" if runtime.endswith("bf16") else precision or "fp32"
    expected["precision"] = precision
    if runtime == "openvino" and "BF16" not in _core().get_property("CPU", CAPABILITIES):
        expected["precision"] = precision.replace("bf16", "fp32")
    assert other.metadata == expected and other.classes == ["polyp"]
    if precision != "fp32":  # the best detection alone
        score, box = TOLERANCES[precision]
        reference, result = (each(random_image(9)) for each in (predictor, other))
        assert abs(result.scores[0] - reference.scores[0]) < score
        assert (abs(result.pred_boxes.tensor[0] - reference.pred_boxes.tensor[0]) < box).all()
        if precision != "bf16" or runtime == "torch-bf16":  # not every CPU has bf16
            assert not np.array_equal(result.scores, reference.scores), "it was not rounded"
        return
    for size, batch_size in itertools.product(sizes, (1, 3)):
        images = [random_image(seed, *size) for seed in range(3)]
        results = predictor(images, batch_size), other(images, batch_size)
        for reference, result in zip(*results, strict=True):
            assert len(result) > 1
            same(result, reference)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_residual_neck_with_attention_everywhere(tmp_path, runtime):
    places = ("backbone", "top_down", "both_inputs")
    neck = ["MODEL.PAFPN.ATTENTION_BEFORE", places, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    cfg, path = config(*neck, model="imrcnn_lite_residual"), tmp_path / "model.pth"
    outputs = dict.fromkeys((f"backbone.pan_output{level}" for level in (3, 4, 5)), 0.1)
    model = random_model(cfg, {CLS_SCORE: 0.5, **outputs})
    torch.save({"model": model.state_dict(), "neck_form": "residual"}, path)
    torch_predictor, exported = Predictor(cfg, path), tmp_path / f"model{RUNTIMES[runtime].suffix}"
    image = random_image(0)
    options = {"example": torch_predictor.prepare(image), "precision": "fp32"}
    RUNTIMES[runtime].export(load_model(cfg, path), exported, **options)
    other = Predictor(None, exported)
    assert other.metadata["model"] == "IMR-CNN (residual)" and len(other(image)) > 1
    same(other(image), torch_predictor(image))


@pytest.mark.parametrize("runtime, precision", [case for case in CASES if case.values != INT8])
def test_classifiers(classifier, classifier_weights, traced_once, tmp_path, runtime, precision):
    path = classifier_weights
    if precision:
        path = tmp_path / f"model{RUNTIMES[runtime].suffix}"
        options = {"example": classifier.prepare(random_image(0)), "precision": precision}
        original = load_model(None, classifier_weights)
        traced_once(RUNTIMES[runtime].export, original, path, **options)
    other = traced_once(Predictor, None, path, runtime=runtime)
    assert other.classes == classifier.classes and len(other.classes) == 3 and other.tau is None
    images = [random_image(seed) for seed in range(3)]
    atol = TOLERANCES["bf16" if runtime.endswith("bf16") else precision or "fp32"][0]
    for result, reference in zip(other(images, 3), classifier(images, 3), strict=True):
        assert result.dtype == torch.float32 and 0.99 < result.sum() < 1.01
        torch.testing.assert_close(result, reference, rtol=0, atol=atol)


def test_bf16_pools_and_scores_in_fp32(predictor, weights):
    """So do foreign heads."""
    other = Predictor(None, weights, runtime="torch-bf16")
    (result,) = other.forward([other.prepare(random_image(0))])
    fields = result.scores, result.pred_masks, result.pred_boxes.tensor
    assert {field.dtype for field in fields} == {torch.float32}
    assert not torch.equal(result.scores, result.scores.bfloat16().float()), "scores in steps"
    model = build_model(config(*FOREIGN[:4])).eval()
    assert isinstance(model.roi_heads.box_pooler, ROIPooler)
    runtime = RUNTIMES["torch-bf16"].from_model(model, None)
    for pooler in (model.roi_heads.box_pooler, model.roi_heads.mask_pooler):
        assert isinstance(pooler, FP32SeparableROIPooler)
    runtime([torch.zeros(3, 64, 64, dtype=torch.uint8)])


def test_safetensors(exported, loaded):
    expected = loaded.model.state_dict()
    exact = load_model(None, exported("torch")).model.state_dict()
    assert all(torch.equal(exact[name], tensor) for name, tensor in expected.items())
    path = exported("torch", "fp16")
    with safetensors.safe_open(path, "pt") as file:
        texts = file.metadata()
    assert texts.pop("format") == "pt"
    metadata = {key: json.loads(text) for key, text in texts.items()}
    facts = {"operating_point": vars(loaded.weights.operating_point), "precision": "fp16"}
    facts |= {"tau": 0.5, "classes": ["polyp"], "weights_sha256": loaded.weights.sha256}
    assert metadata.items() >= facts.items()
    model = Trainer.build_model(loaded.cfg)  # MODEL.WEIGHTS takes it
    assert load_weights(Checkpointer(model), str(path)).operating_point.tau == 0.5
    into = model.state_dict()
    for name, tensor in safetensors.torch.load_file(path).items():
        assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else expected[name].dtype)
        precision = {"rtol": 2**-11, "atol": 1e-7} if tensor.ndim > 1 else {"rtol": 0, "atol": 0}
        for value in (tensor.to(expected[name].dtype), into[name].cpu()):
            torch.testing.assert_close(value, expected[name], **precision)


def test_files_say_on_what_the_model_was_trained_but_not_where(
    tiny_run, weights, predictor, traced_once, tmp_path
):
    opts = ["DATASETS.ROOT", str(tmp_path / "data"), "OUTPUT_DIR", str(tmp_path / "out")]
    loaded = load_model(load_config(tiny_run / "config.yaml", opts), weights)
    hashes = ["0123456789abcdef" * 5, "fedcba9876543210" * 5]
    loaded = replace(loaded, metadata={"training_images": hashes})
    for form, runtime in EXPORTS.items():
        path = tmp_path / f"model.{form}"
        traced_once(runtime.export, loaded, path, example=predictor.prepare(random_image(0)))
        assert load_model(None, path).metadata["training_images"] == hashes
        content = path.read_bytes()
        assert b"data_train" in content, "the config can be read in the bytes"
        assert not [p for p in (tmp_path, tiny_run) if str(p).encode() in content]
        assert load_model(None, path).facts["config_sha256"] == loaded.facts["config_sha256"]


@pytest.mark.slow
def test_what_int8_leaves_alone(exported):
    with zipfile.ZipFile(exported(*INT8)) as archive:
        graph = ElementTree.fromstring(archive.read(OPENVINO_PARTS[0]))
    layers = list(graph.iter("layer"))
    fake = {layer.get("id") for layer in layers if layer.get("type") == "FakeQuantize"}
    edges = [(edge.get("from-layer"), edge.get("to-layer")) for edge in graph.iter("edge")]
    quantised = {end for start, end in edges if start in fake}
    names = [layer.get("name") for layer in layers if layer.get("id") in quantised]
    for part in ("/body/4/", "/fpn_output2", "/rpn_head/conv", "/box_head/", "/mask_fcn1"):
        assert any(part in name for name in names), part
    kept = "cbam /conv_stem /body/0/ /body/3/ Conv_1/ Conv_2/ objectness anchor_deltas cls_score"
    assert not [name for name in names if any(part in name for part in kept.split())]
    kinds = {layer.get("type") for layer in layers if "/fc1/" in layer.get("name")}
    assert "Convolution" in kinds and "MatMul" not in kinds
    parts = ("/backbone", "/rpn_head", "/box_head", "/mask_fcn")
    assert all(name.startswith(parts) for name in names)


def test_which_runtime_and_what_cannot_be_exported(
    exported, traced_once, predictor, tiny_run, weights, tmp_path, capsys, monkeypatch
):
    path = exported("onnxruntime")
    seconds = iter([[3], [1], [2], [4]])
    monkeypatch.setattr("timeit.repeat", lambda *_, **__: next(seconds))
    auto = traced_once(Predictor, None, weights, runtime="auto")  # the fastest
    assert auto.metadata["runtime"] == [*RUNTIMES][1] and len(auto(random_image(0)))
    for *arguments, runtime, match in (
        (None, weights, "tensorrt", "'tensorrt'.*onnxruntime"),
        (None, path, "openvino", "'openvino'"),
        (tiny_run / "config.yaml", path, None, re.escape(str(path))),
    ):
        pytest.raises(ValueError, Predictor, *arguments, runtime=runtime).match(match)
    model, example = load_model(None, weights), predictor.prepare(random_image(0))
    with torch.no_grad():
        model.model.backbone.fpn_lateral2.weight[0, 0] = 1e6
    for form, precision, match in (
        *((form, "int4", f"int4 of {form}") for form in EXPORTS),
        ("openvino", "int8", "int8 needs images"),
        ("safetensors", "fp16", r"backbone.fpn_lateral2.weight .*1e\+06"),
    ):
        with pytest.raises(ValueError, match=match):
            EXPORTS[form].export(model, tmp_path / "m", example=example, precision=precision)
    pytest.raises(ValueError, DetectorGraph, build_model(config(*RETINANET))).match("RetinaNet")
    heads = model.model.roi_heads
    for name, value in (("keypoint_on", True), ("mask_pooler", None)):
        with monkeypatch.context() as patch:
            patch.setattr(heads, name, value)
            pytest.raises(ValueError, DetectorGraph, model.model).match("GeneralizedRCNN")
    assert not list(tmp_path.iterdir())
    image = save_image(tmp_path / "a.png", 0)
    command = ["--format", "safetensors", "--weights", path, "--images", image]
    with pytest.raises(SystemExit):
        export.main([*map(str, command), "--output", str(tmp_path / "m.safetensors")])
    assert str(path) in capsys.readouterr().err


def test_auto_tries_each_runtime_on_a_model_of_its_own(monkeypatch):
    """A graph's goes to the CPU, and bf16 changes the heads."""
    given = []

    def leave_out(model, example):
        given.append(model)
        raise ValueError("not here")

    for runtime in (OnnxRuntime, OpenVINORuntime):
        monkeypatch.setattr(runtime, "from_model", leave_out)
    seconds = iter([[1], [2]])
    monkeypatch.setattr("timeit.repeat", lambda *_, **__: next(seconds))
    model = build_model(config(*FOREIGN[:4])).eval()
    runtime = build_runtime("auto", model, torch.zeros(3, 64, 64, dtype=torch.uint8))
    assert type(runtime) is TorchRuntime and len(given) == 2
    assert all(other is not runtime.model for other in given)
    assert isinstance(runtime.model.roi_heads.box_pooler, ROIPooler)
    assert "forward" not in vars(runtime.model.roi_heads.box_predictor)


@pytest.fixture
def prepared(predictor, tmp_path):
    """A prepared data set; every other detection of the predictor is a lesion of its val split."""
    paths = [save_image(tmp_path / "ours" / "images" / f"{n}.png", n) for n in range(4)]
    images, lesions = [], []
    for number, path in enumerate(paths, 1):
        detected = predictor(path)
        images.append({"id": number, "file_name": path.name, "height": 60, "width": 80})
        for mask in detected.pred_masks[::2].numpy():
            lesions.append(annotation_from_mask(mask, image_id=number) | {"id": len(lesions) + 1})
    (tmp_path / "ours" / "annotations").mkdir()
    for split in ("train", "val", "test"):
        of_split = {"images": images, "annotations": lesions} if split == "val" else {}
        content = {"images": [], "annotations": [], **of_split}
        content["categories"] = [{"id": 1, "name": "polyp"}]
        (tmp_path / "ours" / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return tmp_path / "ours"


@pytest.mark.slow
def test_a_map_of_scores_is_fitted_to_existing_weights(
    weights, loaded, predictor, prepared, tmp_path, capsys
):
    """Again with the result: as if it had none, so that another clinic's images can replace it."""
    path = tmp_path / "mapped.safetensors"
    command = ["--format", "safetensors", "--images", prepared / "images", "--weights", weights]
    export.main([*map(str, command), "--score-map", str(prepared), "--output", str(path)])
    assert "slope" in capsys.readouterr().out
    gt = json.loads((prepared / "annotations" / "val.json").read_text())
    results = []
    for image in gt["images"]:
        output = predictor(prepared / "images" / image["file_name"])
        results += instances_to_coco_json(output, image["id"])
    results = [{**result, "category_id": 1} for result in results]
    scores = evaluate_lesions(gt, results).metrics.calibration
    expected = ScoreMap.fit(scores.score, scores.hit)
    mapped = load_model(None, path)
    score_map, point = mapped.weights.score_map, mapped.weights.operating_point
    assert vars(score_map) == pytest.approx({**vars(expected), "dataset": "ours_val"}, abs=1e-4)
    # τ stays between the same detections.
    assert point == replace(loaded.weights.operating_point, tau=float(score_map(TAU)))
    assert mapped.metadata["weights_sha256"] == loaded.weights.sha256
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(mapped.model.state_dict()[name], tensor), name
    assert mapped.metadata["training_images"] is None, "not known, nor of these images alone"
    known = replace(mapped, metadata={"training_images": ["0123456789abcdef" * 5]})
    fitted = {hash_image(prepared / "images" / image["file_name"]) for image in gt["images"]}
    known = export.with_score_map(known, prepared).metadata["training_images"]
    assert known == sorted({"0123456789abcdef" * 5, *fitted})
    again = export.with_score_map(mapped, prepared).weights
    assert vars(again.score_map) == pytest.approx(vars(score_map))
    assert again.operating_point.tau == pytest.approx(point.tau)
    for split in ("train", "test"):  # without an image, and without a lesion
        content = json.loads((prepared / "annotations" / f"{split}.json").read_text())
        content |= {"images": gt["images"]} if split == "test" else {}
        (prepared / "annotations" / "val.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="ours_val"):
            export.with_score_map(loaded, prepared)


def test_programs_are_not_loaded(tmp_path):
    """Their code could do anything, when they are loaded or run."""
    path = tmp_path / "evil.torchscript"
    torch.jit.save(torch.jit.script(torch.nn.Identity()), path, {METADATA_KEY: "{}"})
    pytest.raises(UnsafeFileError, Predictor, None, path).match("evil.torchscript")
    with pytest.raises(ValueError, match="evil.pth "):
        load_torch_file(path.rename(tmp_path / "evil.pth"))
    # An ONNX file is not taken for one of ONNX Runtime's other format.
    (tmp_path / "a.onnx").write_bytes(small_onnx(producer_name="ORTM"))
    assert (tmp_path / "a.onnx").read_bytes()[4:8] == b"ORTM"  # how that one is known
    assert OnnxRuntime.load(tmp_path / "a.onnx").name == "onnxruntime"


FLOATS, ADD = "float[4] w = {1, 2, 3, 4}", "y = Add (x, w)"


def small_onnx(body=ADD, weights=FLOATS, *, sparse=(), metadata="{}", producer_name=""):
    """A model of ONNX's textual form; x is given, y is its output."""
    versions = 'ir_version: 8, opset_import: ["" : 17, "evil" : 1, "com.microsoft" : 1]'
    graph = f"small (float[4] x) => (float[4] y) <{weights}> {{ {body} }}"
    model = onnx.parser.parse_model(f"<{versions}> {graph}")
    model.graph.sparse_initializer.extend(sparse)
    model.producer_name = producer_name
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata})
    return model.SerializeToString()


BRANCH = 'g () => (float[4] o) {o = Constant <value = float[4] c = ["location": "secret.bin"]> ()}'
IF = f"i = If (t) <then_branch = {BRANCH}, else_branch = {BRANCH}>"
ONE = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
AT = onnx.helper.make_tensor("at", onnx.TensorProto.INT64, [1], [0])
SPARSE = onnx.helper.make_sparse_tensor(ONE, AT, [4])
ONNX = {
    "secret.bin": small_onnx(weights='float[4] w = ["location": "secret.bin"]'),
    "'c'.*secret.bin": small_onnx(f"{ADD} t = Constant <value = bool {{1}}> () {IF}"),
    r"sparse tensor of shape \[4\]": small_onnx(weights="", sparse=[SPARSE]),
    "evil.Call": small_onnx(f"{ADD} z = evil.Call (x)"),
    "com.microsoft.Gelu": small_onnx(f"{ADD} z = com.microsoft.Gelu (x)"),
}


def zipped(path, *contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in zip((*OPENVINO_PARTS, METADATA_KEY), contents, strict=True):
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("match", ONNX)
def test_an_onnx_file_is_all_in_one_and_of_onnx_s_operators(tmp_path, monkeypatch, match):
    monkeypatch.chdir(tmp_path)  # whose files ONNX Runtime would read
    (tmp_path / "secret.bin").write_bytes(np.ones(4, np.float32).tobytes())
    (tmp_path / "a.onnx").write_bytes(ONNX[match])
    with pytest.raises(UnsafeFileError, match=f"a.onnx was refused: .*{match}"):
        OnnxRuntime.load(tmp_path / "a.onnx")
    # OpenVINO reads ONNX too.
    path = zipped(tmp_path / "a.openvino", ONNX[match], b"", '{"precision": "fp32"}')
    pytest.raises(UnsafeFileError, OpenVINORuntime.load, path).match("a.openvino was refused")


@pytest.mark.parametrize("runtime", [runtime.name for runtime in EXPORTS.values()])
def test_damaged_files_are_named(exported, loaded, tmp_path, runtime):
    source = exported(runtime)
    path, content = tmp_path / f"damaged{source.suffix}", source.read_bytes()
    weight = loaded.model.state_dict()["roi_heads.mask_head.predictor.weight"].numpy().tobytes()
    flipped, other = bytearray(content), bytearray(content)
    flipped[content.index(weight) + 3] ^= 1
    other[re.search(rb'"tau": ?"?0.5', content).end() - 1] ^= 1
    for broken in (b"", content[: len(content) // 2], b"no model at all", flipped, other):
        path.write_bytes(broken)
        pytest.raises(ValueError, Predictor, None, path).match(re.escape(str(path)))
    if runtime == "openvino":
        with zipfile.ZipFile(source) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
        zipped(path, *parts, compression=zipfile.ZIP_DEFLATED)
        pytest.raises(BadInputError, Predictor, None, path).match("compressed")


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "{", '{"precision": NaN}', None])
def test_metadata_are_json(tmp_path, text):
    model = onnx.load_from_string(small_onnx(metadata=text or "{}"))
    if text is None:  # a file of another program
        del model.metadata_props[:]
    onnx.save(model, path := tmp_path / "a.onnx")
    pytest.raises(BadInputError, load_model, None, path).match("a.onnx")


IMAGE, BOXES, ONES = np.zeros(2, np.int64), np.ones((2, 4), np.float32), np.ones(2, np.float32)


@pytest.mark.parametrize(
    "outputs",
    [
        *((IMAGE, BOXES[:1], ONES, IMAGE), (IMAGE, BOXES, ONES[:1], IMAGE)),
        *((IMAGE, BOXES, ONES, IMAGE + 1), (IMAGE, BOXES, ONES, IMAGE - 1)),
        (IMAGE, BOXES, ONES, IMAGE, np.ones((2, 3, 4, 4), np.float32)),
        *((IMAGE, BOXES, ONES, IMAGE, ONES), (np.ones((1, 2), np.float32),)),
    ],
)
def test_what_a_graph_gives_is_checked(outputs):
    runtime = OnnxRuntime(lambda size: lambda batch: outputs, {"classes": ["polyp"]})
    pytest.raises(ValueError, runtime, [torch.zeros(3, 8, 8, dtype=torch.uint8)]).match("The graph")


def test_the_first_sizes_have_graphs_of_their_own():
    """Others share one: each takes as long to compile as many images take."""
    compiled = []

    def compile(size):
        compiled.append(size)
        return lambda batch: (np.float32([batch.shape[2:]]),)

    runtime = OnnxRuntime(compile, None)
    for height in (8, 9, 8, 10, 11, 9):
        (result,) = runtime([torch.zeros(3, height, 8, dtype=torch.uint8)])
        assert result.tolist() == [height, 8]
    assert compiled == [(8, 8), (9, 8), None]


THREE = "MODEL.ROI_HEADS.NUM_CLASSES", 3
FOREIGN = [
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
]
DETECTORS = {
    "one class": [],
    "three classes": THREE,
    "few of many": [*THREE, "MODEL.RPN.PRE_NMS_TOPK_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 4],
    "boxes for all classes": [*FOREIGN, *THREE],
    "masks for all classes": ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True],
    "no masks": ["MODEL.MASK_ON", False],
}


@pytest.mark.parametrize("case", DETECTORS)
@pytest.mark.parametrize("size", [(64, 85), (64, 64)])
def test_the_graph_equals_detectron2_s_model(case, size):
    parts = {CLS_SCORE: 0.5, "roi_heads.box_predictor.bbox_pred": 0.1}
    parts["proposal_generator.rpn_head.anchor_deltas"] = 0.1
    model = random_model(config(*DETECTORS[case]), parts)
    images = torch.tensor(np.stack([random_image(seed, *size) for seed in range(3)]))
    images = images.permute(0, 3, 1, 2).contiguous()
    expected = TorchRuntime(model)(list(images))
    with torch.no_grad():
        image, *outputs = DetectorGraph(model)(images)
    assert len(image) == sum(map(len, expected)) > 2
    for i, instances in enumerate(expected):
        boxes, scores, classes, *masks = (output[image == i] for output in outputs)
        # The same sums in another order, which processors differ in: 1.7e-6 was seen with AMX.
        torch.testing.assert_close(scores, instances.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(boxes, instances.pred_boxes.tensor, rtol=0, atol=1e-2)
        assert torch.equal(classes, instances.pred_classes)
        assert bool(masks) == instances.has("pred_masks")
        if masks:
            torch.testing.assert_close(masks[0], instances.pred_masks, rtol=0, atol=1e-4)
    model.roi_heads.box_predictor.test_score_thresh = 1.0
    with torch.no_grad():
        assert not any(map(len, DetectorGraph(model)(images)))


class Moved(SimpleNamespace):
    """A predictor whose boxes and scores are another's, moved by a known amount."""

    score = shift = left_out = classes = 0

    def forward(self, prepared):
        outputs = self.original.forward(prepared)
        for output in outputs:
            output.scores = output.scores - self.score
            output.pred_classes += self.classes
            output.pred_boxes.tensor[:, :2] += self.shift
        return [output[self.left_out :] for output in outputs]

    def __getattr__(self, name):
        return getattr(self.original, name)


def test_differences_of_a_file_and_its_original(predictor, tmp_path):
    paths = [save_image(tmp_path / f"{seed}.png", seed, 64, 85) for seed in range(2)]

    def check(**moved):
        return TorchRuntime.check(predictor, Moved(original=predictor, **moved), paths)

    assert not check().exceeded(lost=0, unmatched=0, score=0, box=0, mask_iou=1)
    score, box, mask_iou = check(score=0.01, shift=0.5).largest()
    assert score == pytest.approx(0.01, abs=1e-5) and mask_iou < 1
    # half a pixel of 85, as the network sees the image in its own size
    assert box == pytest.approx(100 * 0.5 / 85, rel=1e-3)
    fewer = check(left_out=1)
    assert fewer.unmatched == fewer.lost == 2
    for none in (check(left_out=100), check(classes=1)):
        assert none.unmatched == none.detections > 2


SAME = [
    *(((0.3, 0.1), 20, (1, 0, 0)), ((0.1, 0.3), 20, (1, 0, 0)), ((0.29, 0.1), 20, (0, 0, 0))),
    *(((0.5, 0.3), 21, (2, 2, 1)), ((0.49, 0.29), 21, (1, 1, 0))),
]


@pytest.mark.parametrize("scores, height, expected", SAME)
def test_what_is_the_same_detection(scores, height, expected):
    """With a box IoU of 0.5, if one of the scores is 0.3; of those without a partner, τ is lost."""
    boxes = [0, 0, 10, 10], [0, 0, 10, height]
    pairs = zip(boxes, scores, strict=True)
    records = [[[{"bbox": box, "category_id": 1, "score": score}]] for box, score in pairs]
    differences = compare_records(*records, [(40, 40)], 0.5)
    assert (differences.detections, differences.unmatched, differences.lost) == expected


def test_what_an_export_prints_is_bounded_or_named_as_not(scores=(0.01,) * 99 + (0.9,)):
    differences = Differences(9, 103, 3, 1, *map(np.array, (scores, scores, scores)))
    text = export.comparison(differences, export.BOUNDS["int8"])
    bounded, rest = text.splitlines()[-2:]
    assert {"95 %", "0.01", "0.25"} <= set(re.findall(r"[\d.]*\d(?: %)?", bounded))
    assert "not bounded" in rest and "0.9" in rest
    (everything,) = export.comparison(differences, export.BOUNDS["fp32"]).splitlines()[1:]
    assert "0.9 " in everything and "0.001" in everything


def test_bounds():
    def exceeded(unmatched, lost, *values):
        differences = Differences(9, 100, unmatched, lost, *(np.array([v]) for v in values))
        return differences.exceeded(lost=0, unmatched=3, score=0.02, box=1, mask_iou=0.97)

    assert exceeded(3, 0, 0.02, 1, 0.97) == []
    messages = exceeded(4, 1, 0.03, 1.5, 0.9)
    for part, message in zip(("1 ", "4 %", "0.03", "1.5 %", "0.9,"), messages, strict=True):
        assert part in message
    assert len(exceeded(0, 0, *[np.nan] * 3)) == 3, "NaN is beyond any bound"
    for first, second, iou in ((0, 0, 1), (1, 1, 1), (0, 1, 0), (1, 0, 0)):
        masks = [np.asfortranarray(np.full((8, 8), value, np.uint8)) for value in (first, second)]
        box = {"bbox": [1, 1, 4, 4], "category_id": 0, "score": 0.9}
        lesions = [[[{**box, "segmentation": mask_util.encode(mask)}]] for mask in masks]
        assert compare_records(*lesions, [(8, 8)], 0.5).mask_ious.tolist() == [iou]
    # Of a hundred, 95 differ by no more than 0.95; the quantile lies at the next one.
    steps = np.arange(1, 101) / 100
    differences = Differences(9, 100, 0, 1, steps, 100 * steps, 1 - steps)
    assert differences.largest() == pytest.approx((1, 100, 0))
    assert differences.largest(0.95) == pytest.approx((0.96, 96, 0.04))
    most = {"lost": 1, "unmatched": 0, "score": 0.96, "box": 96, "mask_iou": 0.039}
    for options, number in (({"share": 0.95}, 0), ({}, 3), ({"share": 0.95, "lost": 0}, 1)):
        assert len(differences.exceeded(**{**most, **options})) == number


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "openvino"
    monkeypatch.setattr(compiled_cache, "cache_folder", lambda: folder)
    return folder


def found(path):
    """What the graph finds in an image, without a predictor around it."""
    (result,) = OpenVINORuntime.load(path)([torch.from_numpy(random_image(0)).permute(2, 0, 1)])
    assert len(result) > 1
    return result


def test_a_compiled_graph_is_kept_and_gives_the_same(exported, cache, monkeypatch):
    path = exported("openvino")
    first = found(path)
    (entry,) = cache.iterdir()
    assert not cache.stat().st_mode & 0o077
    compiled = []
    monkeypatch.setattr(compiled_cache, "_keep", lambda *args: compiled.append(args))
    same(found(path), first, score=0, box=0)
    assert not compiled and list(cache.iterdir()) == [entry]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [5000, None])
def test_a_damaged_entry_is_made_anew(exported, cache, damage):
    path = exported("openvino")
    first = found(path)
    (entry,) = cache.iterdir()
    content = bytearray(entry.read_bytes())
    if damage is None:
        entry.write_bytes(content[: len(content) // 2])
    else:
        content[damage] ^= 1
        entry.write_bytes(content)
    same(found(path), first, score=0, box=0)
    repaired = entry.read_bytes()
    assert hashlib.sha256(repaired[32:]).digest() == repaired[:32]


@pytest.mark.slow
def test_no_entry_of_others_is_read(exported, cache, tmp_path):
    """A folder that others can write into, and a file in its place."""
    path = exported("openvino")
    first = found(path)
    (entry,) = cache.iterdir()
    cache.chmod(0o777)
    entry.write_bytes(b"planted")
    same(found(path), first, score=0, box=0)
    assert entry.read_bytes() == b"planted"
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    same(found(path), first, score=0, box=0)


def test_the_cache_stays_small(cache):
    for number in range(compiled_cache.KEPT + 2):
        compiled_cache._keep(cache / f"{number}.blob", b"graph")
        os.utime(cache / f"{number}.blob", (number, number))
    names = {int(entry.stem) for entry in cache.iterdir()}
    assert names == set(range(2, compiled_cache.KEPT + 2))


def test_a_cascade_is_named_as_what_cannot_be_exported():
    heads = Mock(spec=CascadeROIHeads, keypoint_on=False, mask_on=False)
    rpn = Mock(spec=RPN)
    model = Mock(spec=GeneralizedRCNN, proposal_generator=rpn, roi_heads=heads)
    with pytest.raises(ValueError, match="cascades"):
        DetectorGraph(model)
