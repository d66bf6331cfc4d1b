"""Files of other runtimes are the model, for any number and size of images."""

import json
import zipfile
from xml.etree import ElementTree

import export
import numpy as np
import onnx
import pytest
from PIL import Image

from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.graph_files import FORMATS, PRECISIONS, write_graph
from imrcnn_d2.deploy.graph_runtimes import ABOUT, GRAPH_FORMATS, OPENVINO_PARTS
from imrcnn_d2.deploy.loading import ARTIFACT_VERSION, load_model

from .conftest import TAU, picture

SIZES = ((60, 80), (64, 64), (90, 64))


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return load_model(None, tiny_run / "model_best.pth")


@pytest.fixture(scope="module")
def files(loaded, predictor, tmp_path_factory):
    """A file of each format in fp32."""
    folder = tmp_path_factory.mktemp("graphs")
    for form in FORMATS:
        example = predictor.prepare(picture(0))
        write_graph(loaded, folder / f"model.{form}", form, example=example)
    return folder


@pytest.mark.parametrize("form", FORMATS)
def test_it_predicts_what_pytorch_does(files, predictor, form):
    other = Predictor(None, files / f"model.{form}")
    assert other.about == {**predictor.about, "runtime": GRAPH_FORMATS[form]}
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
    write_graph(loaded, path, "openvino", example=example, precision="bf16")
    one, two = (each(picture(9)) for each in (predictor, Predictor(None, path)))
    assert abs(one.scores[0] - two.scores[0]) < 0.05  # fp32, where the processor has no bf16


def test_int8(loaded, predictor, tmp_path):
    calibration = [predictor.prepare(picture(seed)) for seed in range(4)]
    path = tmp_path / "model.openvino"
    write_graph(
        loaded, path, "openvino", example=calibration[0], precision="int8", calibration=calibration
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
        write_graph(loaded, tmp_path / "m.onnx", "onnx", example=example, precision="bf16")
    with pytest.raises(ValueError, match="int8 needs images of the training set"):
        write_graph(loaded, tmp_path / "m.openvino", "openvino", example=example, precision="int8")
    assert not list(tmp_path.iterdir())
    assert set(PRECISIONS) == set(FORMATS) == set(GRAPH_FORMATS)


@pytest.mark.parametrize("form", FORMATS)
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
    about["artifact"] = ARTIFACT_VERSION + 1
    onnx.helper.set_model_props(model, {ABOUT: json.dumps(about)})
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
    for form in FORMATS:
        path = files / f"model.{form}"
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        assert str(tiny_run).encode() not in content
