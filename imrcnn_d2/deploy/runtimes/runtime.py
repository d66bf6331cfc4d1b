"""What runs the network: one class a runtime, the same in and out for all."""

import logging
import math
import statistics
import time

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler

from imrcnn_d2.deploy.runtimes.graph_files import (
    GRAPH_FORMATS,
    GraphRuntime,
    graph_bytes,
    run_graph,
)
from imrcnn_d2.modeling.roi_heads import FP32ROIPooler

__all__ = ["RUNTIMES", "TorchRuntime", "build_runtime"]

logger = logging.getLogger(__name__)


TIMED = 3  # images a candidate of "auto" is timed with


class TorchRuntime:
    """
    PyTorch, on the device that the model is on.

    A runtime is called with what the network sees and returns what it says, before anything is
    scaled to the original image: pre- and post-processing are the :class:`Predictor`'s, and so the
    same for all runtimes.
    """

    def __init__(self, model, precision="fp32"):
        """
        Args:
            model (nn.Module): in evaluation mode; changed in place.
            precision (str): "fp32", or "bf16" for autocast. ROI pooling stays in fp32, since boxes
                would move by a pixel, and so do scores, which would come in steps of 0.004.
        """
        self.model = model.to(memory_format=torch.channels_last)
        self.precision = precision
        heads = getattr(model, "roi_heads", None)
        if precision == "bf16" and heads is not None:
            _pool_in_fp32(heads)
            _run_in_fp32(heads.box_predictor)

    @torch.no_grad()  # not inference_mode: what comes out may be changed in place
    def __call__(self, images):
        """
        Args:
            images (list[Tensor]): uint8, (C, H, W), of one size.

        Returns:
            list: on the CPU, an item an image. Of a detector, ``Instances`` with ``pred_boxes``
            (N, 4) in pixels of what it saw, ``scores`` (N,), ``pred_classes`` (N,) and, where it
            has masks, ``pred_masks`` (N, 1, h, w), probabilities within the box. Of an image
            classifier, the classes' probabilities (K,), float32.
        """
        inputs = [{"image": image} for image in images]
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            if isinstance(self.model, GeneralizedRCNN):
                outputs = self.model.inference(inputs, do_postprocess=False)
            else:
                outputs = self.model(inputs)
        return [_to_cpu(output) for output in outputs]


def _pool_in_fp32(heads):
    for name in ("box_pooler", "mask_pooler"):
        if isinstance(getattr(heads, name, None), ROIPooler):
            setattr(heads, name, FP32ROIPooler(getattr(heads, name)))


def _run_in_fp32(module):
    forward = module.forward

    def in_fp32(x):
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    module.forward = in_fp32


def _to_cpu(output):
    """The instances, or the scores, of an output in the form that its model gives it."""
    if isinstance(output, dict):
        output = output["instances"] if "instances" in output else output["scores"].float()
    return output.to("cpu")


def _exported(format):
    """Builds the runtime of a format, by way of a file in memory."""

    def build(model, example):
        content = graph_bytes(model.to("cpu"), format, example)
        return GraphRuntime(GRAPH_FORMATS[format], run_graph(content, format)[0])

    return build


# "auto" tries them in this order.
RUNTIMES = {
    "torch": lambda model, example: TorchRuntime(model),
    "onnxruntime": _exported("onnx"),
    "openvino": _exported("openvino"),
    "torch-bf16": lambda model, example: TorchRuntime(model, "bf16"),
}


def build_runtime(name, model, example):
    """
    Args:
        name (str or None): one of ``RUNTIMES``, or "auto" for the one that is fastest here, by a
            short timing of those that are installed: bf16 is slower than fp32 where the processor
            has no such arithmetic. None for "torch", or what an exported file is for.
        model (nn.Module or GraphRuntime): on its device, in evaluation mode; or of an exported
            file.
        example (Tensor): an image as the runtime will see them, for the timing.

    Returns:
        tuple[str, callable]: the name of the runtime chosen, and the runtime.

    Raises:
        ValueError: there is no runtime of that name, or it does not run this model.
        ModuleNotFoundError: it is not installed.
    """
    if isinstance(model, GraphRuntime):
        if name not in (None, "auto", model.name):
            raise ValueError(f"The file is for the runtime {model.name} and not for {name!r}")
        return model.name, model
    name = name or "torch"
    if name in RUNTIMES:
        return name, RUNTIMES[name](model, example)
    if name != "auto":
        raise ValueError(f"There is no runtime {name!r}; choose of {', '.join(RUNTIMES)} and auto")
    seconds, built = {}, {}
    for candidate, build in RUNTIMES.items():
        try:
            built[candidate] = build(model, example)
        except (ModuleNotFoundError, ValueError) as error:
            logger.info("Runtime %s is left out: %s", candidate, error)
            continue
        best = min(seconds.values(), default=math.inf)
        seconds[candidate] = _median_time(built[candidate], example, best)
    fastest = min(seconds, key=seconds.get)
    timings = ", ".join(f"{candidate} {1000 * s:.0f} ms" for candidate, s in seconds.items())
    logger.info("Runtime %s: %s an image", fastest, timings)
    return fastest, built[fastest]


def _median_time(runtime, example, best):
    runtime([example])  # the first call sets up kernels
    taken = []
    for _ in range(TIMED):
        start = time.perf_counter()
        runtime([example])
        taken.append(time.perf_counter() - start)
        if taken[-1] > 2 * best:  # without native bf16 it takes ten times as long
            break
    return statistics.median(taken)
