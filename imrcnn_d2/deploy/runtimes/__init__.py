"""Runtimes, which run a model's network, and the files that each of them writes and reads.

`RUNTIMES` maps names to `Runtime` classes; a new runtime is a subclass in its own file and an entry
here. `EXPORTS` has those that write files, by the file's format, which is its suffix.
"""

import copy
import logging
import statistics
import timeit

from torch import Tensor, nn

from imrcnn_d2.deploy.runtimes.base import Runtime
from imrcnn_d2.deploy.runtimes.onnxruntime import OnnxRuntime
from imrcnn_d2.deploy.runtimes.openvino import OpenVINORuntime
from imrcnn_d2.deploy.runtimes.torch import TorchBF16Runtime, TorchRuntime

logger = logging.getLogger(__name__)

# "auto" tries them in this order.
RUNTIMES: dict[str, type[Runtime]] = {
    runtime.name: runtime
    for runtime in (TorchRuntime, OnnxRuntime, OpenVINORuntime, TorchBF16Runtime)
}
EXPORTS = {runtime.suffix[1:]: runtime for runtime in RUNTIMES.values() if runtime.suffix}
_TIMED = 3  # images that each runtime is timed with by "auto"


def build_runtime(name: str | None, model: nn.Module | Runtime, example: Tensor | None) -> Runtime:
    """The runtime of a model in evaluation mode, or of an exported file, which brings its runtime
    along; ``example`` is an image as it will see it, (C, H, W) uint8.

    Args:
        name: one of ``RUNTIMES``; "auto" for the fastest of those that are installed, by a short
            timing: bf16 is slower on processors without such arithmetic; None for "torch".

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
    seconds = {}
    for candidate, runtime in RUNTIMES.items():
        try:
            # A copy each: graphs are traced on the CPU, and bf16 changes the heads.
            built = runtime.from_model(copy.deepcopy(model), example)
        except (ModuleNotFoundError, ValueError) as error:
            logger.info("Runtime %s is left out: %s", candidate, error)
            continue
        built([example])  # the first call sets up kernels
        times = timeit.repeat(lambda built=built: built([example]), number=1, repeat=_TIMED)
        seconds[built] = statistics.median(times)
    fastest = min(seconds, key=seconds.get)
    timings = ", ".join(f"{built.name} {1000 * s:.0f} ms" for built, s in seconds.items())
    logger.info("Runtime %s: %s per image", fastest.name, timings)
    return fastest
