#!/usr/bin/env python
"""Time parts of the models, the evaluation and the data sets.

    benchmarks/benchmark.py neck [--case light_352] [--output neck.json]
    benchmarks/benchmark.py evaluate [--images 1000 10000] [--runs 3] [--output evaluate.json]
    benchmarks/benchmark.py catalogue [--images 10000 100000 1000000] [--output catalogue.json]
    benchmarks/benchmark.py video [--frames 300000 900000 2700000] [--masks] [--output video.json]
    benchmarks/benchmark.py train [--iterations 30] [--plot losses.png] [--output train.json]
                             [KEY VALUE ...]
    benchmarks/benchmark.py inference [--weights FILE] [--isa avx2] [--output inference.json]
                                 [KEY VALUE ...]

neck runs PAFPN + CBAM and the plain FPN in turns on the same features, and compares the ratio of
their times with the ratio of their multiply-adds. Exit status 1: over 1.15 times the latter.

evaluate runs our evaluation with its default intervals, reading included, and pycocotools' COCOeval
(masks; evaluate and accumulate) in turns on synthetic data with five detections per image. Exit
status 1: ours takes longer at 10,000 images.

catalogue loads synthetic data sets, ours and Detectron2's way (load_coco_json, DatasetFromList),
each in a process of its own with two workers that read. Exit status 1: ours adds more than 1 GB.

video runs `imrcnn evaluate --video` on generated procedures, the largest size that of REAL-Colon,
each in a process of its own. Exit status 1: one takes more than 5 minutes or 8 GiB.

train trains a model in turns, as its config says and with Detectron2's parts in fp32, from the same
weights on the same batches. Exit status 1: ours is less than 1.7 times as fast.

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
from detectron2.config import CfgNode
from inference_benchmark import ISA, STOCK, TORCHVISION, compare_predictions
from model_benchmark import (
    NECKS,
    choose_clock,
    compare_necks,
    compare_steps,
    native_precision,
    plot_losses,
)
from video_benchmark import measure_sizes

from imrcnn_d2.engine.config import choose_device, load_training_config, register_root
from imrcnn_d2.report.tables import metrics_table
from imrcnn_d2.utils.files import write_atomically

CONFIG = Path(__file__).parents[1] / "configs" / "imrcnn_lite.yaml"

NECK_BOUND = 1.15  # time over FPN's, divided by multiply-adds over FPN's
EVALUATION_BOUND, BOUND_IMAGES = 1.0, 10_000  # our time over COCOeval's, at so many images
CATALOGUE_BOUND = 1e9 / 2**20  # MiB that a data set may add to a process, loading included: 1 GB
VIDEO_BOUNDS = {"seconds": 300, "peak GiB": 8}
TRAIN_BOUND = 1.7  # Detectron2's training step over ours, in time
# Detectron2's prediction over our fastest, in time, without and with native bf16; and points of
# AP50_voc and iou that a runtime may lose.
INFERENCE_BOUNDS = {"": 3.0, "bf16": 5.0}
LOSS_BOUND, INT8_LOSS_BOUND = 0.3, 0.5


def write(document: dict, path: Path | None) -> None:
    if path:
        write_atomically(path, json.dumps(document, indent=2) + "\n")
        print(f"Written: {path}")


def neck(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    device = args.device or choose_device()
    clock = choose_clock(device, args.threads)
    results = {}
    for name in args.case or NECKS:
        *shape, channels_last = NECKS[name]
        if args.channels_last is not None:
            channels_last = args.channels_last
        results[name] = compare_necks(*shape, channels_last, device, args.runs, clock)
        results[name]["channels last"] = float(channels_last)
    print(metrics_table(results))
    worst = max(measured["measured / predicted"] for measured in results.values())
    print(f"\nMeasured / predicted is at most {worst:.2f}; the bound is {NECK_BOUND}.")
    machine = {"device": device, "threads": args.threads, "torch": torch.__version__}
    write({"necks": results, "bound": NECK_BOUND, "runs": args.runs, **machine}, args.output)
    return int(worst > NECK_BOUND)


def evaluate(args: argparse.Namespace) -> int:
    results = {f"{n} images": compare_evaluations(n, args.runs) for n in args.images}
    print(metrics_table(results))
    write({"evaluate": results, "bound": EVALUATION_BOUND, "runs": args.runs}, args.output)
    bounded = results.get(f"{BOUND_IMAGES} images")
    return int(bounded is not None and bounded["ratio"] > EVALUATION_BOUND)


def catalogue(args: argparse.Namespace) -> int:
    results = {f"{n} images": compare_catalogs(n, n <= args.baseline_up_to) for n in args.images}
    names = list(dict.fromkeys(name for measured in results.values() for name in measured))
    table = {
        size: {name: measured.get(name, math.nan) for name in names}
        for size, measured in results.items()
    }
    print(metrics_table(table))
    write({"catalogue": results, "bound": CATALOGUE_BOUND}, args.output)
    return int(max(m["ours, MiB more, peak"] for m in results.values()) > CATALOGUE_BOUND)


def video(args: argparse.Namespace) -> int:
    results = {f"{n} frames": measure_sizes(n, args.masks) for n in args.frames}
    print(metrics_table(results))
    write({"video": results, "bounds": VIDEO_BOUNDS, "masks": args.masks}, args.output)
    return int(any(m[key] > most for m in results.values() for key, most in VIDEO_BOUNDS.items()))


def load(config_file: Path, opts: list[str], eval_only: bool = False) -> CfgNode:
    """A config with its data set, by default Kvasir-SEG for the default config."""
    data = ["DATASETS.ROOT", "kvasir_seg"] if config_file == CONFIG else []
    cfg = load_training_config(config_file, [*data, *opts], eval_only)
    register_root(cfg)
    return cfg


def train(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    cfg = load(args.config_file, ["MODEL.DEVICE", args.device or choose_device(), *args.opts])
    precision = {None: native_precision(), "fp32": "", "bf16": "bf16"}[args.precision]
    measured, ours, theirs = compare_steps(cfg, args.iterations, precision)
    print(metrics_table({f"{precision or 'fp32'}, {args.threads} threads": measured}))
    if args.plot:
        plot_losses(ours, theirs, args.plot)
    document = {"train": measured, "losses": {"ours": ours, "Detectron2": theirs}}
    machine = {"threads": args.threads, "torch": torch.__version__, "precision": precision}
    document |= {"bound": TRAIN_BOUND, "config": str(args.config_file), **machine}
    write(document, args.output)
    return int(measured["times as fast"] < TRAIN_BOUND)


def inference(args: argparse.Namespace) -> int:
    cfg = load(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts], eval_only=True)
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
        "{G a second:.3g} G per second of a product of large matrices in fp32".format(**best)
    )
    bound = INFERENCE_BOUNDS[precision]
    machine = {"isa": args.isa, "threads": args.threads, "torch": torch.__version__}
    document = {"inference": results, "bound": bound, "limit": best, **machine}
    write({**document, "config": str(args.config_file)}, args.output)
    ours = {name: m for name, m in results.items() if name not in (STOCK, TORCHVISION)}
    loses = any(
        results[STOCK].get(key, 0) - measured.get(key, 0)
        > (INT8_LOSS_BOUND if "int8" in name else LOSS_BOUND)
        for name, measured in ours.items()
        for key in ("AP50_voc", "iou")
    )
    return int(loses or max(m["times as fast"] for m in ours.values()) < bound)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "--config-file", type=Path, default=CONFIG, help="default: IMR-CNN light on Kvasir-SEG"
    )
    model.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE")

    def add(run, help_text, parents=()):
        command = commands.add_parser(run.__name__, parents=parents, help=help_text)
        command.set_defaults(run=run)
        command.add_argument("--output", type=Path, help="JSON file for the results")
        return command.add_argument

    option = add(neck, "PAFPN + CBAM against FPN")
    option("--device", help="default: the CUDA device if there is one, else cpu")
    option(
        "--threads",
        type=int,
        default=1,
        help="on the CPU (1, for which processor time is measured, despite other load)",
    )
    option("--runs", type=int, default=25, help="times of each (25)")
    option("--case", nargs="+", choices=NECKS, help="default: all")
    option(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="default: as in the model's config",
    )

    option = add(evaluate, "the evaluation against COCOeval")
    sizes = {"nargs": "+", "type": int, "help": "sizes of the data set (%(default)s)"}
    option("--images", default=[1000, 10_000], **sizes)
    option("--runs", type=int, default=3, help="times of each (3)")

    option = add(catalogue, "memory and time of a data set's records")
    option("--images", default=[10_000, 100_000, 1_000_000], **sizes)
    option(
        "--baseline-up-to",
        type=int,
        default=100_000,
        help="largest size for Detectron2's side (100000); a million takes about 4 GiB",
    )

    option = add(video, "the evaluation of whole procedures")
    option("--frames", default=[300_000, 900_000, 2_700_000], **sizes)
    option("--masks", action="store_true", help="masks too, not boxes alone")

    option = add(train, "the training step against Detectron2's", [model])
    option("--device", help="default: the CUDA device if there is one, else cpu")
    option("--threads", type=int, default=2, help="on the CPU (2)")
    option("--iterations", type=int, default=30, help="steps of each (30)")
    option(
        "--precision",
        choices=["fp32", "bf16"],
        help="ours; default: bf16 if the processor has instructions for it, else fp32",
    )
    option("--plot", "--picture", type=Path, help="PNG or SVG file for the loss curves")

    option = add(inference, "a prediction against Detectron2's", [model])
    option("--weights", default="", help="default: random ones")
    option("--isa", choices=ISA, default="native", help="instructions that may be used (native)")
    option("--threads", type=int, default=2, help="of each (2)")
    option("--runs", type=int, default=25, help="images each is timed on (25)")
    option("--accuracy", type=int, metavar="IMAGES", help="to compare results on; default: all")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = argument_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
