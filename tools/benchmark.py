#!/usr/bin/env python
"""Time parts of the models, and the evaluation.

    tools/benchmark.py neck [--case light_352] [--output neck.json]
    tools/benchmark.py evaluate [--images 1000 10000] [--runs 3] [--output evaluate.json]
    tools/benchmark.py catalogue [--images 10000 100000 1000000] [--output catalogue.json]
    tools/benchmark.py train [--iterations 30] [--picture losses.png] [--output train.json]
                             [KEY VALUE ...]

neck runs PAFPN + CBAM and the plain FPN in turns on the same features, and compares how much longer
the former takes with what its extra multiply-adds predict. Exit status 1: over 1.15 times that.

evaluate runs our evaluation with its default intervals, reading included, and pycocotools' COCOeval
(masks; evaluate and accumulate) in turns on synthesised data with five detections an image. Exit
status 1: ours takes longer at 10,000 images.

catalogue loads synthesised data sets, ours and Detectron2's way (load_coco_json, DatasetFromList),
each in a process of its own with two workers that read. Exit status 1: ours adds more than 1 GB.

train trains a model, ours as its config has it and of Detectron2's own parts in fp32, from the same
weights on the same batches in turns. Exit status 1: ours is less than 1.7 times as fast.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from catalogue_benchmark import compare_catalogues
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from evaluation_benchmark import compare_evaluations
from fvcore.nn import FlopCountAnalysis
from tqdm import tqdm
from train_benchmark import compare_steps, draw_losses, native_precision

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.device import choose_device
from imrcnn_d2.evaluation.files import write_atomically
from imrcnn_d2.modeling import PAFPN
from imrcnn_d2.report.tables import figures_table

CONFIG = Path(__file__).parents[1] / "configs" / "kvasir_seg" / "imrcnn_lite.yaml"

# Our evaluation's time over COCOeval's, at so many images.
EVALUATION_BOUND, BOUND_IMAGES = 1.0, 10_000

# MiB that a data set may add to a process, reading included: 1 GB.
CATALOGUE_BOUND = 1e9 / 2**20

# Detectron2's training step over ours, in time.
TRAIN_BOUND = 1.7

# Time over FPN's time may exceed multiply-adds over FPN's by this factor.
BOUND = 1.15

# Channels of res2 to res5, channels of the pyramid, size of the image, memory format: the shipped
# models at the sizes they run at.
NECKS = {
    "light_352": ((24, 40, 112, 320), 128, 352, True),
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


def neck(args):
    torch.set_num_threads(args.threads)
    device = args.device or choose_device()
    clock = choose_clock(device, args.threads)
    results = {}
    for name in args.case or NECKS:
        channels, out_channels, size, channels_last = NECKS[name]
        if args.channels_last is not None:
            channels_last = args.channels_last
        results[name] = compare_necks(
            channels, out_channels, size, channels_last, device, args.runs, clock
        )
        results[name]["channels last"] = float(channels_last)
    print(figures_table(results))
    worst = max(figures["measured / predicted"] for figures in results.values())
    print(f"\nMeasured / predicted is at most {worst:.2f}; the bound is {BOUND}.")
    if args.output:
        machine = {"device": device, "threads": args.threads, "torch": torch.__version__}
        document = {"necks": results, "bound": BOUND, "runs": args.runs, **machine}
        write_atomically(args.output, json.dumps(document, indent=2) + "\n")
        print(f"Written: {args.output}")
    return int(worst > BOUND)


def evaluate(args):
    results = {f"{n} images": compare_evaluations(n, args.runs) for n in args.images}
    print(figures_table(results))
    if args.output:
        document = {"evaluate": results, "bound": EVALUATION_BOUND, "runs": args.runs}
        write_atomically(args.output, json.dumps(document, indent=2) + "\n")
        print(f"Written: {args.output}")
    bounded = results.get(f"{BOUND_IMAGES} images")
    return int(bounded is not None and bounded["ratio"] > EVALUATION_BOUND)


def catalogue(args):
    results = {}
    for n in args.images:
        results[f"{n} images"] = compare_catalogues(n, n <= args.baseline_up_to)
    # Figures that one data set lacks are shown as missing.
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    table = {
        size: {name: figures.get(name, math.nan) for name in names}
        for size, figures in results.items()
    }
    print(figures_table(table))
    if args.output:
        document = {"catalogue": results, "bound": CATALOGUE_BOUND}
        write_atomically(args.output, json.dumps(document, indent=2) + "\n")
        print(f"Written: {args.output}")
    return int(max(f["ours, MiB more, peak"] for f in results.values()) > CATALOGUE_BOUND)


def train(args):
    torch.set_num_threads(args.threads)
    opts = ["MODEL.DEVICE", args.device or choose_device(), *args.opts]
    cfg = load_config(str(args.config_file), opts)
    precision = {None: native_precision(), "fp32": "", "bf16": "bf16"}[args.precision]
    figures, ours, theirs = compare_steps(cfg, args.iterations, precision)
    print(figures_table({f"{precision or 'fp32'}, {args.threads} threads": figures}))
    if args.picture:
        draw_losses(ours, theirs, args.picture)
    if args.output:
        document = {"train": figures, "losses": {"ours": ours, "Detectron2": theirs}}
        machine = {"threads": args.threads, "torch": torch.__version__, "precision": precision}
        document |= {"bound": TRAIN_BOUND, "config": str(args.config_file), **machine}
        write_atomically(args.output, json.dumps(document, indent=2) + "\n")
        print(f"Written: {args.output}")
    return int(figures["times as fast"] < TRAIN_BOUND)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", help="default: the CUDA device if there is one, else cpu")
    common.add_argument(
        "--threads",
        type=int,
        default=1,
        help="on the CPU (1, and processor time is measured, which a busy machine leaves alone)",
    )
    common.add_argument("--runs", type=int, default=25, help="times of each (25)")
    common.add_argument("--output", type=Path, help="JSON file for the figures")

    command = commands.add_parser("neck", parents=[common], help="PAFPN + CBAM against FPN")
    command.add_argument("--case", nargs="+", choices=NECKS, help="default: all")
    command.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="default: as the model's config has it",
    )
    command.set_defaults(run=neck)

    command = commands.add_parser("evaluate", help="the evaluation against COCOeval")
    command.add_argument(
        "--images",
        nargs="+",
        type=int,
        default=[1000, 10_000],
        help="sizes of the data set (1000 10000)",
    )
    command.add_argument("--runs", type=int, default=3, help="times of each (3)")
    command.add_argument("--output", type=Path, help="JSON file for the figures")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("catalogue", help="memory and time of a data set's records")
    command.add_argument(
        "--images",
        nargs="+",
        type=int,
        default=[10_000, 100_000, 1_000_000],
        help="sizes of the data set (10000 100000 1000000)",
    )
    command.add_argument(
        "--baseline-up-to",
        type=int,
        default=100_000,
        help="largest size for Detectron2's side (100000); a million takes some 4 GiB",
    )
    command.add_argument("--output", type=Path, help="JSON file for the figures")
    command.set_defaults(run=catalogue)

    command = commands.add_parser("train", help="the training step against Detectron2's")
    command.add_argument(
        "--config-file", type=Path, default=CONFIG, help="default: IMR-CNN light on Kvasir-SEG"
    )
    command.add_argument("--device", help="default: the CUDA device if there is one, else cpu")
    command.add_argument("--threads", type=int, default=2, help="on the CPU (2)")
    command.add_argument("--iterations", type=int, default=30, help="steps of each (30)")
    command.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="ours; default: bf16 where the processor has instructions for it, else fp32",
    )
    command.add_argument("--picture", type=Path, help="PNG or SVG file for the loss curves")
    command.add_argument("--output", type=Path, help="JSON file for the figures")
    command.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE")
    command.set_defaults(run=train)

    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
