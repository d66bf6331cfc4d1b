"""What runs an exported model: ONNX Runtime or OpenVINO, both with the same in and out.

The packages are those of the extra [deploy].
"""

import io
import logging
import zlib
from collections.abc import Iterator

import torch
from detectron2.structures import Boxes, Instances

from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.modeling.weight_files import CHECKSUM, UnsafeFileError, open_stored, strict_loads

__all__ = [
    "ABOUT",
    "GRAPH_FORMATS",
    "INPUT",
    "OPENVINO_PARTS",
    "GraphRuntime",
    "onnx_checksum",
    "open_graph",
    "run_graph",
]

logger = logging.getLogger(__name__)

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
