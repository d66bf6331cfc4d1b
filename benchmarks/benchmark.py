#!/usr/bin/env python
"""Measure the models, the evaluation and the data sets, and write docs/performance.md.

    benchmarks/benchmark.py all [--short] [--only NAME ...]
    benchmarks/benchmark.py page
    benchmarks/benchmark.py train [--config-file FILE] [--plot losses.png] [KEY VALUE ...]
    benchmarks/benchmark.py inference [--config-file FILE] [--weights FILE] [KEY VALUE ...]
    benchmarks/benchmark.py backbones [NAME ...]

all runs every benchmark, each in a process of its own, and keeps the rows of each in
benchmarks/results/MACHINE.json as soon as it ends: after an interruption it goes on with what is
missing; if nothing is, or with another version of a library, it measures all anew. Then it writes
docs/performance.md from the records of all machines, as page does alone. Images are those of
Kvasir-SEG where it is prepared, else synthetic ones. --short measures less
and writes to output/benchmark.

train compares the training step of another model with that of Detectron2's parts in fp32, and
inference its prediction in each runtime with Detectron2's DefaultPredictor.

backbones tries timm models as backbones, the named ones or one of each family, and puts them into
the table of docs/guide/backbones.md; no times are measured.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import backbones_benchmark
import cv2
import machine
import numpy as np
import peers_benchmark
import torch
from data_benchmark import compare_catalogs, compare_evaluations
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from inference_benchmark import ISA, compare_predictions, product_rate
from model_benchmark import NECKS, compare_necks, compare_steps, plot_losses
from page import Rows, page, table
from throughput_benchmark import compare_cold_starts, compare_throughput
from video_benchmark import measure_sizes

from imrcnn_d2.cli import prepare_dataset
from imrcnn_d2.data.catalog import prepared_folder
from imrcnn_d2.data.endoscope_view import find_crop
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.prepare.splits import check_prepared
from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.engine.config import choose_device, load_training_config, register_root
from imrcnn_d2.utils.files import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
SHORT = ROOT / "output" / "benchmark"
LITE, R50 = (ROOT / "configs" / f"imrcnn_{name}.yaml" for name in ("lite", "R_50"))
CORES = machine.describe()["cores"]
BF16 = machine.has_bf16(machine.describe()["instructions"])


def rate(short: bool) -> Rows:
    """Multiply-adds of a product of large matrices: what a network can reach at most."""
    types = {"fp32": torch.float32, **({"bf16": torch.bfloat16} if BF16 else {})}
    return {
        name: {"G multiply-adds a second": product_rate(dtype, CORES) / 1e9}
        for name, dtype in types.items()
    }


def prediction(short: bool) -> Rows:
    names = ["yolo11s-seg"] if short else ["yolo11n-seg", "yolo11s-seg"]
    peers, failure = {}, {f"{' and '.join(names)}: PyPI could not be reached": {}}
    if peers_benchmark.install():
        sizes, failure = [352] if short else [352, 640], {}
        peers = peers_benchmark.peers(names, sizes, BF16)
    runs, accuracy = (2, 10) if short else (8, None)
    return _predict(None, "demo", [], runs, accuracy, peers) | failure


def prediction_r50(short: bool) -> Rows:
    size = ["INPUT.MIN_SIZE_TEST", "800"]
    return {} if short else _predict(R50, "", size, runs=1, accuracy=2)


def _predict(config_file, weights, opts, runs, accuracy, peers=None):
    rows, best = compare_predictions(
        load_for_prediction(config_file, weights, opts),
        weights,
        isa="native",
        bf16=BF16,
        threads=CORES,
        runs=runs,
        accuracy=accuracy,
        peers=peers,
    )
    text = f"the network's {best['G multiply-adds']:.3g} G multiply-adds at the rate above"
    return rows | {text: {"ms": best["ms at best"]}}


def cold_start(short: bool) -> Rows:
    return compare_cold_starts("demo", test_images()[0], runs=1 if short else 3)


def view(short: bool) -> Rows:
    """The endoscope's view, found and cropped to, on one thread."""
    cv2.setNumThreads(1)
    images, rows = [read_image(path) for path in test_images()[: 10 if short else 50]], {}
    for size in ((352, 352), (1920, 1080)):
        times = []
        for image in 3 * [cv2.resize(image, size) for image in images]:
            start = time.perf_counter()
            crop = find_crop(image)
            times.append([time.perf_counter() - start] * 2)
            if crop is not None:
                crop.crop(image)
            times[-1][1] = time.perf_counter() - start
        found, cropped = 1000 * np.median(times, axis=0)
        rows["{}x{}".format(*size)] = {"found, ms": found, "found and cropped, ms": cropped}
    return rows


def files(short: bool) -> Rows:
    if short:
        return compare_throughput("demo", test_images()[:12], ["OpenVINO"])
    return compare_throughput("demo", test_images()[:40])


def training(short: bool) -> Rows:
    torch.set_num_threads(CORES)
    cfg = load(LITE, ["MODEL.DEVICE", "cpu"])
    measured, _, _ = compare_steps(cfg, 4 if short else 30)
    return {"IMR-CNN light": measured}


def evaluation(short: bool) -> Rows:
    sizes = {1000: 1} if short else {1000: 3, 10_000: 3, 100_000: 1, 1_000_000: 1}
    return {
        f"{n:,} images": compare_evaluations(n, runs, baseline=n <= 100_000)
        for n, runs in sizes.items()
    }


def procedures(short: bool) -> Rows:
    sizes = [30_000] if short else [2_700_000]
    return {f"{n:,} frames": measure_sizes(n) for n in sizes}


def catalogue(short: bool) -> Rows:
    return {
        f"{n:,} images, {side}": values
        for n in ([10_000] if short else [10_000, 100_000, 1_000_000])
        for side, values in compare_catalogs(n, baseline=n <= 100_000).items()
    }


def neck(short: bool) -> Rows:
    torch.set_num_threads(1)
    return {
        name: compare_necks(*shape, 5 if short else 9)
        for name, shape in NECKS.items()
        if not (short and "800" in name)
    }


BENCHMARKS = {
    run.__name__: run
    for run in (
        rate,
        prediction,
        prediction_r50,
        cold_start,
        view,
        files,
        training,
        evaluation,
        procedures,
        catalogue,
        neck,
    )
}


def load(config_file: Path, opts: list[str], eval_only: bool = False) -> CfgNode:
    """A config with its data set, unless `opts` name one: Kvasir-SEG, else synthetic images."""
    data = [] if "DATASETS.ROOT" in opts else ["DATASETS.ROOT", str(data_set())]
    cfg = load_training_config(config_file, [*data, *opts], eval_only)
    register_root(cfg)
    return cfg


def load_for_prediction(config_file: Path | None, weights: str, opts: list[str]) -> CfgNode:
    """Without a config file, the config in the weights' file, else that of the light model.
    Whole frames: Detectron2 does not crop them.
    """
    cfg = load(config_file or LITE, ["MODEL.DEVICE", "cpu", *opts], eval_only=True)
    if weights and not config_file:
        datasets, cfg = cfg.DATASETS, load_model(None, weights, device="cpu").cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(opts)
        cfg.DATASETS = datasets
    cfg.defrost()
    cfg.INPUT.CROP_TO_VIEW = False
    return cfg


def test_images() -> list[Path]:
    cfg = load(LITE, [], eval_only=True)
    return [Path(record["file_name"]) for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])]


def data_set() -> Path:
    """Folder of Kvasir-SEG if it is prepared, else of synthetic images, written if need be."""
    try:
        check_prepared(folder := prepared_folder("kvasir_seg"))
    except FileNotFoundError:
        folder = SHORT / "synthetic"
        if not folder.is_dir():
            options = ["--out", str(folder), "--num-images", "100", "--size", "352"]
            prepare_dataset.main(["synthetic", *options])
    return folder


def measure_all(only: list[str], short: bool) -> int:
    """Run what `only` names, else what is missing, else all; return 1 if any failed."""
    folder, described = SHORT if short else RESULTS, machine.describe()
    described["images"] = data_set().name
    path, measured = folder / f"{described['name']}.json", {}
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        measured = record["benchmarks"] if record["machine"] == described else {}
    missing = [name for name in BENCHMARKS if name not in measured]
    failed = []
    for name in only or missing or BENCHMARKS:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            rows = in_a_process(BENCHMARKS[name], short)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        minutes = (time.perf_counter() - start) / 60
        measured[name] = {"date": str(datetime.date.today()), "commit": commit()}
        measured[name] |= {"minutes": round(minutes, 1), "rows": finite(rows)}
        record = {
            "machine": described,
            "benchmarks": {k: measured[k] for k in BENCHMARKS if k in measured},
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        print(f"{table(measured[name]['rows'])}\n{minutes:.1f} minutes\n", flush=True)
    write_page(folder)
    print(*(f"{name} failed" for name in failed), sep="\n", file=sys.stderr)
    return int(bool(failed))


def in_a_process(run: Callable[[bool], Rows], short: bool) -> Rows:
    """`run(short)` in a new process, in which waiting threads leave the cores to others."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, short).result()


def finite(rows: Rows) -> Rows:
    """The rows without undefined values: JSON has no NaN."""
    return {
        name: {column: value for column, value in row.items() if not math.isnan(value)}
        for name, row in rows.items()
    }


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()


def write_page(folder: Path) -> None:
    """docs/performance.md of the records in benchmarks/results; those of the short form get a page
    next to them.
    """
    path = PAGE if folder == RESULTS else folder / PAGE.name
    write_atomically(path, page(folder))
    print(f"Written: {path}")


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(CORES)
    cfg = load(args.config_file or LITE, ["MODEL.DEVICE", choose_device(), *args.opts])
    measured, ours, theirs = compare_steps(cfg, args.iterations)
    print(table({"training step": measured}))
    if args.plot:
        plot_losses(ours, theirs, args.plot)


def inference(args: argparse.Namespace) -> None:
    rows, best = compare_predictions(
        load_for_prediction(args.config_file, args.weights, args.opts),
        args.weights,
        isa=args.isa,
        bf16=BF16 and args.isa == "native",
        threads=CORES,
        runs=args.runs,
        accuracy=args.accuracy,
    )
    print(table(rows), table({"the network alone": best}), sep="\n\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("all", help="every benchmark, and the page")
    command.add_argument("--short", action="store_true", help="fewer runs and smaller sizes")
    text = "benchmarks to run (again); default: what the record of this machine lacks, else all"
    command.add_argument("--only", nargs="+", choices=BENCHMARKS, default=[], help=text)
    commands.add_parser("page", help="docs/performance.md of the records")
    model = argparse.ArgumentParser(add_help=False)
    text = "the model; default: the one in --weights, else IMR-CNN light"
    model.add_argument("--config-file", type=Path, help=text)
    model.add_argument("opts", nargs="*", default=[], metavar="KEY VALUE")
    command = commands.add_parser("train", parents=[model], help="the training step of a model")
    option = command.add_argument
    option("--iterations", type=int, default=20, help="steps of each side (20)")
    option("--plot", type=Path, help="PNG or SVG file for the loss curves")
    command = commands.add_parser("inference", parents=[model], help="the prediction of a model")
    option = command.add_argument
    option("--weights", default="", help="default: random ones")
    option("--isa", choices=ISA, default="native", help="instructions that may be used (native)")
    option("--runs", type=int, default=8, help="turns of each side, of four images each (8)")
    option("--accuracy", type=int, metavar="IMAGES", help="to compare results on; default: all")
    command = commands.add_parser("backbones", help="timm models as backbones")
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="timm models; default: the table's"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = argument_parser().parse_args(argv)
    if args.command == "all":
        return measure_all(args.only, args.short)
    if args.command == "page":
        write_page(RESULTS)
    elif args.command == "backbones":
        backbones_benchmark.write_page(args.names)
    else:
        {"train": train, "inference": inference}[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
