"""OpenVINO, and its files: zips of a graph, its weights and metadata."""

import functools
import hashlib
import io
import logging
import os
import threading
import zipfile

import numpy as np
import torch

from imrcnn_d2.deploy.runtimes.base import INPUT, METADATA_KEY, GraphRuntime
from imrcnn_d2.deploy.runtimes.compiled_cache import compile_model
from imrcnn_d2.utils.safe_loading import UnsafeFileError, open_stored, strict_loads

logger = logging.getLogger(__name__)

# A file of ours is a zip of these two and of METADATA_KEY; unpacked, other programs read them.
OPENVINO_PARTS = ("model.xml", "model.bin")
# How the first begins: OpenVINO looks at the content and would read other formats too, of which
# some name further files.
_NET = b'<?xml version="1.0"?>\n<net '
# Nodes of the graph that int8 leaves alone: coordinates and gates, which need more than 256 steps;
# of the RPN the last layers; and of the backbone the first ones: with them in int8 the light
# IMR-CNN lost 1.4 points of AP50 on Kvasir-SEG's validation images, and was no faster.
_NOT_QUANTISED = [
    r"^(?!/(backbone|rpn_head|box_head|mask_fcn)).*",
    r".*/cbam.*",
    r".*rpn_head/Conv_(1|2|4|5|7|8|10|11)/.*",
    r".*rpn_head/(objectness_logits|anchor_deltas)/.*",
    r".*/bottom_up/(body/conv_stem|body/[0-3]/|stem/).*",
]


@functools.cache
def _core():
    """One for the process: OpenVINO's stack for signal handlers is freed with its core and stays
    registered, so that the next signal, such as Ctrl-C, would crash the process.
    """
    import openvino

    return openvino.Core()


class OpenVINORuntime(GraphRuntime):
    name = "openvino"
    suffix = ".openvino"
    precisions = ("fp32", "bf16", "int8")

    @classmethod
    def _open(cls, content):
        with open_stored(io.BytesIO(content)) as archive:
            xml, weights = (archive.read(name) for name in OPENVINO_PARTS)
            in_archive = METADATA_KEY in archive.namelist()
            metadata = strict_loads(archive.read(METADATA_KEY)) if in_archive else None
        if not xml.startswith(_NET):
            raise UnsafeFileError(f"its {OPENVINO_PARTS[0]} is not of OpenVINO's own format")
        core, digest = _core(), hashlib.sha256(content).hexdigest()
        model = core.read_model(xml, weights)
        hint = "bf16" if metadata and metadata["precision"] == "bf16" else "f32"
        if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            logger.warning("The file is for bf16, which this processor has not: it runs in fp32")
            metadata["precision"] = "fp32"
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
        }

        def compile(size):
            shaped, shape = model.clone(), model.input(0).partial_shape
            shape[0] = 1
            for axis, length in zip((2, 3), size or (-1, -1), strict=True):
                shape[axis] = length
            shaped.reshape(shape)
            compiled = compile_model(core, shaped, digest, options)
            thread = threading.local()  # a request is of one thread

            def run(batch):
                if not hasattr(thread, "request"):
                    thread.request = compiled.create_infer_request()
                results = thread.request.infer(batch, share_inputs=True)
                return [results[output] for output in compiled.outputs]

            return run

        return compile, metadata

    @classmethod
    def _convert(cls, path, calibration):
        import openvino

        model = _core().read_model(path)  # convert_model reports its use to its makers
        if len(calibration):
            model = _quantised(model, calibration)
        xml, weights = (path.with_name(name) for name in OPENVINO_PARTS)
        openvino.save_model(model, xml, compress_to_fp16=False)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for part in (xml, weights):
                archive.write(part, part.name)
        return buffer.getvalue()

    @classmethod
    def _with_metadata(cls, content, metadata):
        buffer = io.BytesIO(content)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(METADATA_KEY, metadata)
        return buffer.getvalue()


def _quantised(model, calibration):
    """Post-training quantisation of weights and activations by NNCF."""
    _convolve_linear_layers(model)
    os.environ["NNCF_CI"] = "1"  # else it reports its use to its makers
    import nncf

    nncf.set_log_level(logging.WARNING)
    dataset = nncf.Dataset([image[None].numpy() for image in calibration], lambda x: {INPUT: x})
    ignored = nncf.IgnoredScope(patterns=_NOT_QUANTISED, validate=False)
    return nncf.quantize(model, dataset, subset_size=len(calibration), ignored_scope=ignored)


def _convolve_linear_layers(model):
    """Makes the box head's linear layers 1x1 convolutions over a column of ROIs: of these OpenVINO
    has kernels for int8 on any processor, which take half the time.
    """
    from openvino import opset13 as ops

    for layer in model.get_ops():
        name = layer.get_friendly_name()
        if layer.get_type_name() != "MatMul" or not name.startswith("/box_head/"):
            continue
        x, weight = layer.input_value(0), layer.input_value(1).get_node().data
        if not layer.get_attributes()["transpose_b"]:
            weight = weight.T
        kernel = ops.constant(np.ascontiguousarray(weight[:, :, None, None]))  # (K, C, 1, 1)
        column = ops.unsqueeze(ops.transpose(x, [1, 0]), [0, 3])  # (R, C) -> (1, C, R, 1)
        result = ops.convolution(column, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
        result.set_friendly_name(name)
        rows = ops.transpose(ops.squeeze(result, [0, 3]), [1, 0])
        layer.output(0).replace(rows.output(0))
