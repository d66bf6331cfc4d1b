#!/usr/bin/env python
"""Time parts of the models, and the evaluation.

    benchmarks/benchmark.py neck [--case light_352] [--output neck.json]
    benchmarks/benchmark.py evaluate [--images 1000 10000] [--runs 3] [--output evaluate.json]
    benchmarks/benchmark.py catalogue [--images 10000 100000 1000000] [--output catalogue.json]
    benchmarks/benchmark.py train [--iterations 30] [--picture losses.png] [--output train.json]
                             [KEY VALUE ...]
    benchmarks/benchmark.py inference [--weights FILE] [--isa avx2] [--output inference.json]
                                 [KEY VALUE ...]

neck runs PAFPN + CBAM and the plain FPN in turns on the same features, and compares how much longer
the former takes with what its extra multiply-adds predict. Exit status 1: over 1.15 times that.

evaluate runs our evaluation with its default intervals, reading included, and pycocotools' COCOeval
(masks; evaluate and accumulate) in turns on synthetic data with five detections per image. Exit
status 1: ours takes longer at 10,000 images.

catalogue loads synthetic data sets, ours and Detectron2's way (load_coco_json, DatasetFromList),
each in a process of its own with two workers that read. Exit status 1: ours adds more than 1 GB.

train trains a model, ours as its config has it and of Detectron2's own parts in fp32, from the same
weights on the same batches in turns. Exit status 1: ours is less than 1.7 times as fast.

inference predicts on the images of the test set, from file to masks: Detectron2's DefaultPredictor,
torchvision's maskrcnn_resnet50_fpn, and ours in each runtime, in turns, each in a process of its
own. Without --weights they are random, and results are compared with Detectron2's instead of with
the truth. Exit status 1: the fastest of ours is less than 3 times as fast as Detectron2, 5 times
where the processor has bf16, or a runtime loses more than 0.3 points (int8: 0.5) of AP50 or IoU.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from data_benchmark import compare_catalogs, compare_evaluations
from inference_benchmark import ISA, STOCK, TORCHVISION, compare_predictions
from model_benchmark import (
    NECKS,
    choose_clock,
    compare_necks,
    compare_steps,
    native_precision,
    plot_losses,
)

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.config import choose_device
from imrcnn_d2.report.tables import metrics_table
from imrcnn_d2.utils.files import write_atomically

CONFIG = Path(__file__).parents[1] / "configs" / "kvasir_seg" / "imrcnn_lite.yaml"

# Our evaluation's time over COCOeval's, at so many images.
EVALUATION_BOUND, BOUND_IMAGES = 1.0, 10_000

# MiB that a data set may add to a process, reading included: 1 GB.
CATALOGUE_BOUND = 1e9 / 2**20

# Detectron2's training step over ours, in time.
TRAIN_BOUND = 1.7

# Detectron2's prediction over our fastest, in time, without and with native bf16; and points of
# AP50_voc and iou that a runtime may lose.
INFERENCE_BOUNDS = {"": 3.0, "bf16": 5.0}
LOSS_BOUND, INT8_LOSS_BOUND = 0.3, 0.5

# Time over FPN's time may exceed multiply-adds over FPN's by this factor.
NECK_BOUND = 1.15


def write(document, path):
    """
    Args:
        document (dict): of JSON values.
        path (Path or None): nothing is written without one.
    """
    if path:
        write_atomically(path, json.dumps(document, indent=2) + "\n")
        print(f"Written: {path}")


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
    print(metrics_table(results))
    worst = max(measured["measured / predicted"] for measured in results.values())
    print(f"\nMeasured / predicted is at most {worst:.2f}; the bound is {NECK_BOUND}.")
    machine = {"device": device, "threads": args.threads, "torch": torch.__version__}
    write({"necks": results, "bound": NECK_BOUND, "runs": args.runs, **machine}, args.output)
    return int(worst > NECK_BOUND)


def evaluate(args):
    results = {f"{n} images": compare_evaluations(n, args.runs) for n in args.images}
    print(metrics_table(results))
    write({"evaluate": results, "bound": EVALUATION_BOUND, "runs": args.runs}, args.output)
    bounded = results.get(f"{BOUND_IMAGES} images")
    return int(bounded is not None and bounded["ratio"] > EVALUATION_BOUND)


def catalogue(args):
    results = {}
    for n in args.images:
        results[f"{n} images"] = compare_catalogs(n, n <= args.baseline_up_to)
    # Metrics that one data set lacks are shown as missing.
    names = list(dict.fromkeys(name for measured in results.values() for name in measured))
    table = {
        size: {name: measured.get(name, math.nan) for name in names}
        for size, measured in results.items()
    }
    print(metrics_table(table))
    write({"catalogue": results, "bound": CATALOGUE_BOUND}, args.output)
    return int(max(f["ours, MiB more, peak"] for f in results.values()) > CATALOGUE_BOUND)


def train(args):
    torch.set_num_threads(args.threads)
    opts = ["MODEL.DEVICE", args.device or choose_device(), *args.opts]
    cfg = load_config(str(args.config_file), opts)
    precision = {None: native_precision(), "fp32": "", "bf16": "bf16"}[args.precision]
    measured, ours, theirs = compare_steps(cfg, args.iterations, precision)
    print(metrics_table({f"{precision or 'fp32'}, {args.threads} threads": measured}))
    if args.picture:
        plot_losses(ours, theirs, args.picture)
    document = {"train": measured, "losses": {"ours": ours, "Detectron2": theirs}}
    machine = {"threads": args.threads, "torch": torch.__version__, "precision": precision}
    document |= {"bound": TRAIN_BOUND, "config": str(args.config_file), **machine}
    write(document, args.output)
    return int(measured["times as fast"] < TRAIN_BOUND)


def inference(args):
    cfg = load_config(str(args.config_file), ["MODEL.DEVICE", "cpu", *args.opts])
    precision = native_precision() if args.isa == "native" else ""
    results, best = compare_predictions(
        cfg,
        args.weights,
        isa=args.isa,
        bf16=bool(precision),
        threads=args.threads,
        runs=args.runs,
        accuracy=args.accuracy,
    )
    print(metrics_table(results))
    print(
        "\nThe network's {G multiply-adds:.3g} G multiply-adds take {ms at best:.0f} ms at the "
        "{G a second:.3g} G a second of a product of large matrices in fp32".format(**best)
    )
    bound = INFERENCE_BOUNDS[precision]
    document = {"inference": results, "bound": bound, "isa": args.isa, "threads": args.threads}
    document["limit"] = best
    document |= {"torch": torch.__version__, "config": str(args.config_file)}
    write(document, args.output)
    ours = {name: f for name, f in results.items() if name not in (STOCK, TORCHVISION)}
    lost = {
        name: max(results[STOCK].get(key, 0) - measured.get(key, 0) for key in ("AP50_voc", "iou"))
        for name, measured in ours.items()
    }
    too_much = [
        name
        for name, points in lost.items()
        if points > (INT8_LOSS_BOUND if "int8" in name else LOSS_BOUND)
    ]
    return int(max(f["times as fast"] for f in ours.values()) < bound or bool(too_much))


def argument_parser() -> argparse.ArgumentParser:
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
    common.add_argument("--output", type=Path, help="JSON file for the results")

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
    command.add_argument("--output", type=Path, help="JSON file for the results")
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
    command.add_argument("--output", type=Path, help="JSON file for the results")
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
    command.add_argument("--output", type=Path, help="JSON file for the results")
    command.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE")
    command.set_defaults(run=train)

    command = commands.add_parser("inference", help="a prediction against Detectron2's")
    command.add_argument(
        "--config-file", type=Path, default=CONFIG, help="default: IMR-CNN light on Kvasir-SEG"
    )
    command.add_argument("--weights", default="", help="default: random ones")
    command.add_argument(
        "--isa", choices=ISA, default="native", help="instructions that may be used (native)"
    )
    command.add_argument("--threads", type=int, default=2, help="of each (2)")
    command.add_argument("--runs", type=int, default=25, help="images each is timed on (25)")
    command.add_argument(
        "--accuracy", type=int, metavar="IMAGES", help="to compare results on; default: all"
    )
    command.add_argument("--output", type=Path, help="JSON file for the results")
    command.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE")
    command.set_defaults(run=inference)

    return parser


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser()
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
