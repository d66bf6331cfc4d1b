"""Runtimes, which run a model's network, and the files that each of them writes and reads.

`RUNTIMES` maps names to `Runtime` classes; a new runtime is a subclass in its own file and an entry
here. `EXPORTS` has those that write files, by the file's format, which is its suffix.
"""

import logging
import math
import statistics
import time

from torch import Tensor, nn

from imrcnn_d2.deploy.runtimes.base import EXPORT_VERSION, Runtime, export_metadata
from imrcnn_d2.deploy.runtimes.onnxruntime import OnnxRuntime
from imrcnn_d2.deploy.runtimes.openvino import OpenVINORuntime
from imrcnn_d2.deploy.runtimes.torch import TorchBF16Runtime, TorchRuntime

__all__ = [
    "EXPORTS",
    "EXPORT_VERSION",
    "RUNTIMES",
    "OnnxRuntime",
    "OpenVINORuntime",
    "Runtime",
    "TorchBF16Runtime",
    "TorchRuntime",
    "build_runtime",
    "export_metadata",
]

logger = logging.getLogger(__name__)

# "auto" tries them in this order.
RUNTIMES: dict[str, type[Runtime]] = {
    runtime.name: runtime
    for runtime in (TorchRuntime, OnnxRuntime, OpenVINORuntime, TorchBF16Runtime)
}
EXPORTS = {runtime.suffix[1:]: runtime for runtime in RUNTIMES.values() if runtime.suffix}
_TIMED = 3  # images that each runtime is timed with by "auto"


def build_runtime(name: str | None, model: nn.Module | Runtime, example: Tensor | None) -> Runtime:
    """
    Args:
        name: one of ``RUNTIMES``, or "auto" for the fastest one here, by a short timing of those
            that are installed: bf16 is slower than fp32 on processors without bf16 arithmetic.
            None for "torch", or the runtime of an exported file.
        model: on its device, in evaluation mode; or the runtime of an exported file.
        example: an image as the runtime will see it, (C, H, W) uint8.

    Raises:
        ValueError: there is no runtime of that name, or it cannot run this model.
        ModuleNotFoundError: it is not installed.
    """
    if isinstance(model, Runtime):
        if name not in (None, "auto", model.name):
            raise ValueError(f"The file is for the runtime {model.name} and not for {name!r}")
        return model
    name = name or "torch"
    if name in RUNTIMES:
        return RUNTIMES[name].from_model(model, example)
    if name != "auto":
        raise ValueError(f"There is no runtime {name!r}; choose of {', '.join(RUNTIMES)} and auto")
    seconds, built = {}, {}
    for candidate, runtime in RUNTIMES.items():
        try:
            built[candidate] = runtime.from_model(model, example)
        except (ModuleNotFoundError, ValueError) as error:
            logger.info("Runtime %s is left out: %s", candidate, error)
            continue
        best = min(seconds.values(), default=math.inf)
        seconds[candidate] = _median_seconds(built[candidate], example, best)
    fastest = min(seconds, key=seconds.get)
    timings = ", ".join(f"{candidate} {1000 * s:.0f} ms" for candidate, s in seconds.items())
    logger.info("Runtime %s: %s an image", fastest, timings)
    return built[fastest]


def _median_seconds(runtime: Runtime, example: Tensor, best: float) -> float:
    runtime([example])  # the first call sets up kernels
    seconds = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        runtime([example])
        seconds.append(time.perf_counter() - start)
        if seconds[-1] > 2 * best:  # without native bf16 it takes ten times as long
            break
    return statistics.median(seconds)
