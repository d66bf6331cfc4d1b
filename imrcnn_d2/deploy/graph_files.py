"""Models as files of other runtimes: ONNX and OpenVINO, each whole in one file."""

import io
import json
import logging
import os
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch

from imrcnn_d2.evaluation.files import write_atomically
from imrcnn_d2.modeling.classifier import ImageClassifier
from imrcnn_d2.modeling.weight_files import CHECKSUM

from .artifact import describe
from .graph import ClassifierGraph, DetectorGraph
from .graph_runtimes import ABOUT, INPUT, OPENVINO_PARTS, onnx_checksum

__all__ = ["FORMATS", "PRECISIONS", "graph_bytes", "write_graph"]

# ONNX Runtime has no bf16 on CPUs, and NNCF no way with ROIAlign in ONNX.
PRECISIONS = {
    "onnx": ("fp32",),
    "openvino": ("fp32", "bf16", "int8"),
}
FORMATS = tuple(PRECISIONS)
_OPSET = 17

# What int8 leaves alone, names of the graph's nodes: coordinates and gates, which need more than
# 256 steps; of the RPN the last layers; and of the backbone the first ones: with them in int8 the
# light IMR-CNN lost 1.4 points of AP50 on Kvasir-SEG's validation images, and was no faster.
_KEPT = [
    r"^(?!/(backbone|rpn_head|box_head|mask_fcn)).*",
    r".*/cbam.*",
    r".*rpn_head/Conv_(1|2|4|5|7|8|10|11)/.*",
    r".*rpn_head/(objectness_logits|anchor_deltas)/.*",
    r".*/bottom_up/(body/conv_stem|body/[0-3]/|stem/).*",
]


def write_graph(loaded, path, format, *, example, precision="fp32", calibration=()):
    """
    Write a model as one file that its runtime, and a :class:`Predictor`, take as it is. Batch and
    image size stay free.

    Args:
        loaded (LoadedModel): a detector with an RPN, or an image classifier.
        path (Path): replaced at once, or not at all.
        format (str): one of ``FORMATS``.
        example (Tensor): an image as the network sees it, (C, H, W) uint8.
        precision (str): one of ``PRECISIONS`` of the format.
        calibration (sequence of Tensor): such images, of the training set, for the ranges of int8;
            a few hundred are enough.

    Raises:
        ValueError: the model or the precision cannot be had in this format.
        ModuleNotFoundError: a package of the extra [deploy] is missing.
    """
    content = graph_bytes(loaded.model, format, example, precision, calibration)
    about = json.dumps({**describe(loaded, precision), "format": format})
    write_atomically(path, _with_about(content, format, about))


def graph_bytes(model, format, example, precision="fp32", calibration=()):
    """
    Args:
        model (nn.Module): in evaluation mode.
        format, example, precision, calibration: see :func:`write_graph`.

    Returns:
        bytes: the file, but for what it says about itself.
    """
    if precision not in PRECISIONS[format]:
        known = ", ".join(PRECISIONS[format])
        raise ValueError(f"There is no {precision} of {format}; choose of {known}")
    if precision == "int8" and not len(calibration):
        raise ValueError("int8 needs images of the training set, for the ranges of its values")
    graph = ClassifierGraph(model) if isinstance(model, ImageClassifier) else DetectorGraph(model)
    # Two images: with one, an axis of length 1 could be taken for fixed.
    batch = torch.stack([example, example.flip(-1)])
    with torch.no_grad():
        traced = torch.jit.trace(graph.eval(), (batch,), check_trace=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _export_onnx(traced, graph.outputs, batch, path)
        if format == "openvino":
            return _openvino_bytes(path, calibration if precision == "int8" else ())
        return path.read_bytes()


def _export_onnx(traced, outputs, batch, path):
    import onnx  # noqa: F401  what torch needs to write it

    free = {name: {0: "detections"} for name in outputs}
    with warnings.catch_warnings():
        # The exporter by tracing is the one that knows torchvision's operators.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            traced,
            (batch,),
            str(path),
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_axes={INPUT: {0: "images", 2: "height", 3: "width"}, **free},
            opset_version=_OPSET,
            dynamo=False,
        )


def _openvino_bytes(path, calibration):
    import openvino

    model = openvino.Core().read_model(path)  # convert_model reports its use to its makers
    if len(calibration):
        model = _quantised(model, calibration)
    xml, weights = (path.with_name(name) for name in OPENVINO_PARTS)
    openvino.save_model(model, xml, compress_to_fp16=False)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for part in (xml, weights):
            archive.write(part, part.name)
    return buffer.getvalue()


def _quantised(model, calibration):
    """Post-training quantisation of weights and activations by NNCF."""
    os.environ["NNCF_CI"] = "1"  # else it reports its use to its makers
    import nncf

    nncf.set_log_level(logging.WARNING)
    dataset = nncf.Dataset([image[None].numpy() for image in calibration], lambda x: {INPUT: x})
    kept = nncf.IgnoredScope(patterns=_KEPT, validate=False)
    return nncf.quantize(model, dataset, subset_size=len(calibration), ignored_scope=kept)


def _with_about(content, format, about):
    """The file's bytes with what it says about itself."""
    if format == "onnx":
        import onnx

        model = onnx.load_from_string(content)
        onnx.helper.set_model_props(model, {ABOUT: about})
        model.metadata_props.add(key=CHECKSUM, value=onnx_checksum(model))
        return model.SerializeToString()
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(ABOUT, about)
    return buffer.getvalue()
