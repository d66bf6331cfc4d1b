"""How fast a prediction could be at best on this machine: for benchmarks/benchmark.py."""

import statistics
import time
import warnings

import torch
from detectron2.utils.analysis import FlopCountAnalysis

__all__ = ["limit"]

SIDE = 2048  # of the matrices
PRODUCTS = 7


def limit(model, image, threads):
    """
    Args:
        model (nn.Module): a detector on the CPU, in evaluation mode.
        image (Tensor): as the network sees it, (C, H, W) uint8.
        threads (int): that may work.

    Returns:
        dict[str, float]: multiply-adds of the network for the image, in G; those a second of a
        product of large matrices in fp32, in G; and the ms that the former take at that rate.
        Reading, resizing and pasting masks come on top.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counted = FlopCountAnalysis(model, ([{"image": image}],))
            counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            needed = counted.total() / 1e9
            rate = SIDE**3 / _product_seconds() / 1e9
    finally:
        torch.set_num_threads(before)
    return {"G multiply-adds": needed, "G a second": rate, "ms at best": 1000 * needed / rate}


def _product_seconds():
    matrix = torch.rand(SIDE, SIDE)
    seconds = []
    for _ in range(PRODUCTS + 2):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])  # the first ones set up
