"""Models as files of other runtimes: ONNX and OpenVINO, each whole in one file."""

import io
import json
import logging
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import safetensors.torch
import torch
from detectron2.structures import Boxes, Instances

from imrcnn_d2.deploy.runtimes.graph import ClassifierGraph, DetectorGraph
from imrcnn_d2.engine.run_record import config_sha256
from imrcnn_d2.modeling.classifier import ImageClassifier
from imrcnn_d2.utils.files import BadInputError, write_atomically
from imrcnn_d2.utils.safe_loading import (
    CHECKSUM,
    UnsafeFileError,
    open_stored,
    strict_loads,
    tensors_checksum,
)

__all__ = [
    "ABOUT",
    "ARTIFACT_VERSION",
    "FORMATS",
    "GRAPH_FORMATS",
    "INPUT",
    "OPENVINO_PARTS",
    "PRECISIONS",
    "WEIGHTS_PRECISIONS",
    "GraphRuntime",
    "describe",
    "graph_bytes",
    "onnx_checksum",
    "open_graph",
    "run_graph",
    "write_graph",
    "write_safetensors",
]

logger = logging.getLogger(__name__)


# Of the metadata that tools/export.py writes; a larger one is of a later version of this package.
ARTIFACT_VERSION = 1


# Endings of files, and the name of what runs them.
GRAPH_FORMATS = {"onnx": "onnxruntime", "openvino": "openvino"}

INPUT = "images"  # the graph's one input, (N, C, H, W) uint8
ABOUT = "imrcnn_d2"  # where a file keeps what it says about itself, as JSON
# An OpenVINO file of ours is a zip of these two and of ABOUT; unpacked, other programs read them.
OPENVINO_PARTS = ("model.xml", "model.bin")
# How the first begins: OpenVINO looks at the content and would read other formats too, of which
# some name further files.
_NET = b'<?xml version="1.0"?>\n<net '


class GraphRuntime:
    """
    Calls a graph as :class:`TorchRuntime` calls a model.

    Attributes:
        name (str): of the runtime.
        about (dict): what the file says about itself; empty where it was made for this run.
    """

    def __init__(self, name, run, about=None):
        """
        Args:
            name (str): see above.
            run (callable): images (N, C, H, W) uint8 array -> the arrays that
                :class:`DetectorGraph` or :class:`ClassifierGraph` returns.
            about (dict or None): see above.
        """
        self.name = name
        self._run = run
        self.about = about or {}

    def __call__(self, images):
        """
        Args:
            images (list[Tensor]): uint8, (C, H, W), of one size.

        Returns:
            list: see :class:`TorchRuntime`.
        """
        batch = torch.stack(images).contiguous()
        outputs = [torch.as_tensor(output) for output in self._run(batch.numpy())]
        classes = len(self.about.get("classes", ())) or None  # unknown where it was made just now
        if len(outputs) == 1:
            _check_outputs(outputs, [(len(images), classes)])
            return list(outputs[0])
        found, sides = len(outputs[0]), outputs[-1].shape[2:]
        _check_outputs(outputs, [(found,), (found, 4), (found,), (found,), (found, 1, *sides)])
        if classes and not ((outputs[3] >= 0) & (outputs[3] < classes)).all():
            raise ValueError(f"The graph names classes that are none of its {classes}")
        names = ("pred_boxes", "scores", "pred_classes", "pred_masks")
        found = []
        for i in range(len(images)):
            own = outputs[0] == i
            instances = Instances(tuple(batch.shape[2:]))
            for name, values in zip(names, outputs[1:], strict=False):
                instances.set(name, Boxes(values[own]) if name == "pred_boxes" else values[own])
            found.append(instances)
        return found


def open_graph(path):
    """
    Args:
        path (Path): a file of tools/export.py: .onnx or .openvino.

    Returns:
        GraphRuntime:

    Raises:
        BadInputError: it is no such file, or damaged.
        UnsafeFileError: it asks for more than its own content.
        ModuleNotFoundError: its runtime is not installed.
    """
    try:
        run, about = run_graph(path.read_bytes(), path.suffix[1:])
    except ModuleNotFoundError:
        raise
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path} was refused: {error}") from None
    except Exception as error:  # each runtime has its own
        text = " ".join(str(error).split())[:200]
        raise BadInputError(path, f"cannot be opened: {text}") from error
    if about is None:
        raise BadInputError(
            path, "was not written by tools/export.py: it does not say what its classes are"
        )
    return GraphRuntime(GRAPH_FORMATS[path.suffix[1:]], run, about)


def run_graph(content, format):
    """
    Args:
        content (bytes): of a file.
        format (str): "onnx" or "openvino".

    Returns:
        tuple[callable, dict or None]: what runs it, see :class:`GraphRuntime`, and what the file
        says about itself.

    Raises:
        UnsafeFileError: it asks for more than its own content.
        ValueError: it is damaged.
    """
    run, about = _RUNNERS[format](content)
    if not isinstance(about, dict | None):
        raise ValueError(f"its {ABOUT} is no JSON object")
    return run, about


def _check_outputs(outputs: list[torch.Tensor], shapes: list[tuple]) -> None:
    """A shape has None for a size that is not known."""
    for output, shape in zip(outputs, shapes, strict=False):
        known = [size for size, other in zip(output.shape, shape, strict=False) if other is None]
        expected = tuple(known.pop() if size is None else size for size in shape)
        if tuple(output.shape) != expected:
            raise ValueError(f"The graph gave {tuple(output.shape)} where {expected} is expected")


def _run_onnx(content):
    import onnx
    import onnxruntime

    model = onnx.load_from_string(content)
    _check_onnx(model)
    said = {entry.key: entry.value for entry in model.metadata_props}
    if said.get(CHECKSUM) not in (None, onnx_checksum(model)):
        raise ValueError(f"it is damaged: its checksum {said[CHECKSUM]} does not fit")
    # What was checked is what is run, whatever else another parser might see in the bytes.
    model.DiscardUnknownFields()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.load_model_format", "ONNX")
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    about = strict_loads(said[ABOUT]) if ABOUT in said else None
    return lambda batch: session.run(None, {INPUT: batch}), about


def onnx_checksum(model) -> str:
    """CRC-32 of an onnx.ModelProto, all but the checksum that it holds."""
    bare = type(model)()
    bare.CopyFrom(model)
    kept = [entry for entry in model.metadata_props if entry.key != CHECKSUM]
    del bare.metadata_props[:]
    bare.metadata_props.extend(kept)
    return str(zlib.crc32(bare.SerializeToString()))


def _check_onnx(model) -> None:
    """Refuse what reads other files, or takes memory that is not in the file."""
    for part in _messages(model):
        kind = part.DESCRIPTOR.name
        if kind == "TensorProto" and (part.external_data or part.data_location):
            location = {entry.key: entry.value for entry in part.external_data}.get("location")
            raise UnsafeFileError(f"its tensor {part.name!r} is in another file, {location!r}")
        if kind == "SparseTensorProto":
            raise UnsafeFileError(f"it holds a sparse tensor of shape {list(part.dims)}")
        if kind == "NodeProto" and part.domain not in ("", "ai.onnx"):
            raise UnsafeFileError(f"it holds the operator {part.domain}.{part.op_type}")


def _messages(message) -> Iterator:
    """A message of protobuf and all that are in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for inner in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _messages(inner)


def _run_openvino(content):
    import openvino

    with open_stored(io.BytesIO(content)) as archive:
        xml, weights = (archive.read(name) for name in OPENVINO_PARTS)
        about = strict_loads(archive.read(ABOUT)) if ABOUT in archive.namelist() else None
    if not xml.startswith(_NET):
        raise UnsafeFileError(f"its {OPENVINO_PARTS[0]} is of another format than OpenVINO's own")
    core = openvino.Core()
    model = core.read_model(xml, weights)
    hint = "bf16" if about and about["precision"] == "bf16" else "f32"
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        logger.warning("The file is for bf16, which this processor has not: it runs in fp32")
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )

    def run(batch):
        found = compiled(batch)
        return [found[output] for output in compiled.outputs]

    return run, about


_RUNNERS = {"onnx": _run_onnx, "openvino": _run_openvino}


WEIGHTS_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


def write_safetensors(loaded, path, *, precision="fp32"):
    """
    Write a model's weights as a safetensors file, which MODEL.WEIGHTS takes wherever it is read and
    a :class:`Predictor` takes without a config.

    Its metadata are JSON texts: ``config`` (YAML), ``classes``, ``operating_point``, ``tau``,
    ``model``, ``backbone``, ``precision``, ``version``, ``config_sha256``, ``weights_sha256`` (of
    the file that the weights are from), ``artifact`` (the format's version) and ``crc32`` (of all
    of these and of the tensors).

    Args:
        loaded (LoadedModel):
        path (Path): ends with .safetensors; replaced at once, or not at all.
        precision (str): "fp32", or "fp16" for half the size: kernels and matrices are rounded,
            vectors such as the statistics of a norm are not.

    Raises:
        ValueError: a weight is too large for fp16; the error names it.
    """
    about = describe(loaded, precision)
    kernels = {name for name, tensor in loaded.model.named_parameters() if tensor.ndim > 1}
    tensors = {
        name: _rounded(
            name, tensor, WEIGHTS_PRECISIONS[precision] if name in kernels else tensor.dtype
        )
        for name, tensor in loaded.model.state_dict().items()
    }
    texts = {"format": "pt", **{key: json.dumps(value) for key, value in about.items()}}
    texts[CHECKSUM] = tensors_checksum(tensors, texts)
    write_atomically(path, safetensors.torch.save(tensors, texts))


def describe(loaded, precision):
    """
    Args:
        loaded (LoadedModel):
        precision (str): of the file.

    Returns:
        dict: what an exported file says about itself, see :func:`write_safetensors`; of JSON types.
    """
    cfg = loaded.cfg.clone()
    cfg.defrost()
    # Of the machine that it was trained on.
    cfg.OUTPUT_DIR, cfg.MODEL.DEVICE = "./output", "cpu"
    model, backbone = loaded.names
    point = loaded.weights.operating_point
    return {
        "artifact": ARTIFACT_VERSION,
        "version": metadata.version("imrcnn-d2"),
        "model": model,
        "backbone": backbone,
        "classes": loaded.classes,
        "tau": loaded.tau,
        "operating_point": point and vars(point),
        "precision": precision,
        "weights_sha256": loaded.weights.sha256,
        "config_sha256": config_sha256(cfg),
        "config": cfg.dump(),
    }


def _rounded(name, tensor, dtype):
    """A copy: safetensors refuses tensors that share their memory."""
    rounded = tensor.detach().cpu().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(rounded).all():
        largest = tensor.abs().max().item()
        raise ValueError(f"{name} has values up to {largest:g}, too large for fp16; take fp32")
    return rounded


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
