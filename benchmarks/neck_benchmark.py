"""PAFPN with CBAM against the plain FPN: for benchmarks/benchmark.py."""

import statistics
import time

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from fvcore.nn import FlopCountAnalysis
from tqdm import tqdm

from imrcnn_d2.modeling import PAFPN

__all__ = [
    "NECKS",
    "GivenFeatures",
    "choose_clock",
    "compare_necks",
    "count_multiply_adds",
    "time_in_turns",
]

# Channels of res2 to res5, channels of the pyramid, size of the image, memory format: the shipped
# models at the sizes they run at.
NECKS = {
    "light_352": ((24, 40, 112, 320), 64, 352, True),
    "R_50_352": ((256, 512, 1024, 2048), 256, 352, False),
    "R_50_800": ((256, 512, 1024, 2048), 256, 800, False),
}


class GivenFeatures(Backbone):
    """Stands below a neck and hands on the features that it is given."""

    def __init__(self, channels):
        """
        Args:
            channels (tuple[int]): of res2, res3, ...
        """
        super().__init__()
        self._shapes = {
            f"res{k}": ShapeSpec(channels=c, stride=2**k) for k, c in enumerate(channels, start=2)
        }

    def forward(self, features):
        """
        Args:
            features (list[Tensor]): one for each level.

        Returns:
            dict[str, Tensor]
        """
        return dict(zip(self._shapes, features, strict=True))

    def output_shape(self):
        return self._shapes


def choose_clock(device, threads):
    """
    Args:
        device (str):
        threads (int): on the CPU.

    Returns:
        callable: gives seconds. For one thread those that it ran itself, whatever else the machine
            does; else those that passed, with all work on the device done.
    """
    if torch.device(device).type == "cuda":

        def clock():
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return clock
    return time.process_time if threads == 1 else time.perf_counter


def time_in_turns(calls, runs, clock):
    """
    Run A B A B ..., so that what else the machine does falls on both alike.

    Args:
        calls (list[callable]): what to time; each is called twice beforehand to warm up.
        runs (int): times of each.
        clock (callable): gives seconds.

    Returns:
        list[list[float]]: milliseconds, for each call.
    """
    times = [[] for _ in calls]
    for run in tqdm(range(-2, runs), leave=False):
        for call, milliseconds in zip(calls, times, strict=True):
            start = clock()
            call()
            end = clock()
            if run >= 0:
                milliseconds.append(1000 * (end - start))
    return times


def count_multiply_adds(model, features):
    """
    Args:
        model (nn.Module):
        features (list[Tensor]): its input.

    Returns:
        int: of convolutions and linear layers; one for each value of an upsampled map.
    """
    analysis = FlopCountAnalysis(model, (features,))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.total()


def compare_necks(channels, out_channels, size, channels_last, device, runs, clock):
    """
    Args:
        channels (tuple[int]): of the features below the neck, from stride 4 on.
        out_channels (int): of the pyramid.
        size (int): side of the image in pixels.
        channels_last (bool): memory format.
        device (str):
        runs (int): times of each neck.
        clock (callable): gives seconds.

    Returns:
        dict[str, float]: milliseconds (medians), multiply-adds in 10^9, the ratios of both (that of
            the times is the median over pairs of runs) and the quotient of the two.
    """
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [
        torch.randn(1, c, size // 2**k, size // 2**k, generator=generator)
        .to(device)
        .to(memory_format=layout)
        for k, c in enumerate(channels, start=2)
    ]
    names = [f"res{k}" for k, _ in enumerate(channels, start=2)]
    necks = [
        cls(GivenFeatures(channels), names, out_channels, top_block=LastLevelMaxPool(), **options)
        .eval()
        .to(device)
        .to(memory_format=layout)
        for cls, options in ((FPN, {}), (PAFPN, {"attention": "cbam"}))
    ]
    fpn_adds, pafpn_adds = (count_multiply_adds(neck, features) for neck in necks)
    with torch.no_grad():
        fpn, pafpn = time_in_turns([lambda n=n: n(features) for n in necks], runs, clock)
    ratio = statistics.median(b / a for a, b in zip(fpn, pafpn, strict=True))
    return {
        "FPN, ms": statistics.median(fpn),
        "PAFPN + CBAM, ms": statistics.median(pafpn),
        "FPN, 10^9 multiply-adds": fpn_adds / 1e9,
        "PAFPN + CBAM, 10^9 multiply-adds": pafpn_adds / 1e9,
        "times longer": ratio,
        "times more multiply-adds": pafpn_adds / fpn_adds,
        "measured / predicted": ratio / (pafpn_adds / fpn_adds),
    }
