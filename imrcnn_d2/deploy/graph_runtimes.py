"""What runs an exported model: ONNX Runtime, OpenVINO or TorchScript, all with the same in and out.

The packages are those of the extra [deploy].
"""

import io
import json
import logging
import zipfile

import torch
from detectron2.structures import Boxes, Instances

from imrcnn_d2.data.rejects import BadInputError

__all__ = [
    "ABOUT",
    "GRAPH_FORMATS",
    "INPUT",
    "OPENVINO_PARTS",
    "GraphRuntime",
    "open_graph",
    "run_graph",
]

logger = logging.getLogger(__name__)

# Endings of files, and the name of what runs them.
GRAPH_FORMATS = {"onnx": "onnxruntime", "openvino": "openvino", "torchscript": "torchscript"}

INPUT = "images"  # the graph's one input, (N, C, H, W) uint8
ABOUT = "imrcnn_d2"  # where a file keeps what it says about itself, as JSON
# An OpenVINO file of ours is a zip of these two and of ABOUT; unpacked, other programs read them.
OPENVINO_PARTS = ("model.xml", "model.bin")


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
        if len(outputs) == 1:
            return list(outputs[0])
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
        path (Path): a file of tools/export.py: .onnx, .openvino or .torchscript.

    Returns:
        GraphRuntime:

    Raises:
        BadInputError: it is no such file, or damaged.
        ModuleNotFoundError: its runtime is not installed.
    """
    try:
        run, about = run_graph(path.read_bytes(), path.suffix[1:])
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each runtime has its own
        text = " ".join(str(error).split())[:200]
        raise BadInputError(path, f"cannot be opened: {text}") from error
    if about is None:
        raise BadInputError(
            path, "was not written by tools/export.py: it does not say what its classes are"
        )
    return GraphRuntime(GRAPH_FORMATS[path.suffix[1:]], run, json.loads(about))


def run_graph(content, format):
    """
    Args:
        content (bytes): of a file.
        format (str): "onnx", "openvino" or "torchscript".

    Returns:
        tuple[callable, str or None]: what runs it, see :class:`GraphRuntime`, and what the file
        says about itself, as JSON.
    """
    return _RUNNERS[format](content)


def _run_onnx(content):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map.get(ABOUT)
    return lambda batch: session.run(None, {INPUT: batch}), about


def _run_openvino(content):
    import openvino

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        xml, weights = (archive.read(name) for name in OPENVINO_PARTS)
        about = archive.read(ABOUT).decode() if ABOUT in archive.namelist() else None
    core = openvino.Core()
    model = core.read_model(xml, weights)
    hint = "bf16" if about and json.loads(about)["precision"] == "bf16" else "f32"
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


def _run_torchscript(content):
    extra = {ABOUT: ""}
    module = torch.jit.load(io.BytesIO(content), map_location="cpu", _extra_files=extra).eval()

    @torch.no_grad()
    def run(batch):
        return module(torch.from_numpy(batch))

    return run, extra[ABOUT].decode() if extra[ABOUT] else None


_RUNNERS = {"onnx": _run_onnx, "openvino": _run_openvino, "torchscript": _run_torchscript}
