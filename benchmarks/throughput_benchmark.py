"""`imrcnn predict` from a cold start, and on folders and videos. For benchmarks/benchmark.py."""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch

from imrcnn_d2.data.images import read_image
from imrcnn_d2.deploy import Predictor, batch, load_model, outputs, predict_files
from imrcnn_d2.deploy.inputs import VideoWriter, find_inputs
from imrcnn_d2.deploy.runtimes import EXPORTS
from imrcnn_d2.engine.train_step import keep_freed_memory

FORMATS = {"ONNX Runtime": "onnx", "OpenVINO": "openvino"}
RUNTIMES = ("torch", *FORMATS)
PROCESSES = 2  # that share a folder
# A process as `imrcnn predict` is one, which prints when each of its phases ended.
_COLD = """
import json, sys, time
ends = [time.time()]
from imrcnn_d2.cli import predict
from imrcnn_d2.deploy import Predictor, predict_files
ends.append(time.time())
weights, image, output = sys.argv[1:]
predictor = Predictor(None, weights)
ends.append(time.time())
predict_files(predictor, [image], output)
print(json.dumps([*ends, time.time()]))
"""


def compare_cold_starts(weights: str, image: Path, runs: int) -> dict[str, dict[str, float]]:
    """Seconds from nothing to the results of one image, by runtime, of OpenVINO also where it has
    compiled the graph before; medians.
    """
    with _files(weights, image, RUNTIMES) as files:
        cold = {(name, False): file for name, file in files.items()}
        cold["OpenVINO", True] = files["OpenVINO"]
        times = {row: [] for row in cold}
        for _ in range(runs):  # in turns; the start before the last one fills the cache
            for (name, is_cached), file in cold.items():
                times[name, is_cached].append(_cold_start(file, image, keep_cache=is_cached))
    rows = {}
    for (name, is_cached), measured in times.items():
        columns = zip(*measured, strict=True)
        names = ("Python", "imports", "model", "first image", "whole")
        row = f"{name}, compiled before" if is_cached else name
        rows[row] = {n: statistics.median(c) for n, c in zip(names, columns, strict=True)}
    return rows


def _cold_start(weights, image, keep_cache):
    """Seconds of each phase, and of the whole."""
    with tempfile.TemporaryDirectory() as output:
        cache = Path(tempfile.gettempdir(), f"imrcnn_d2-benchmark-{os.getpid()}")
        if not keep_cache:
            shutil.rmtree(cache, ignore_errors=True)
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        command = [sys.executable, "-W", "ignore", "-c", _COLD, str(weights), str(image), output]
        start = time.time()
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        ends = [start, *json.loads(done.stdout.splitlines()[-1])]
    return [*(b - a for a, b in itertools.pairwise(ends)), ends[-1] - start]


@contextlib.contextmanager
def _files(weights, image, runtimes):
    """The file that each runtime reads: the weights, or what is exported from them."""
    loaded = load_model(None, weights, device="cpu")
    example = Predictor(None, weights, device="cpu").prepare(read_image(image))
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name in runtimes:
            if name not in FORMATS:
                files[name] = weights
                continue
            files[name] = Path(folder, f"model.{FORMATS[name]}")
            EXPORTS[FORMATS[name]].export(loaded, files[name], example=example)
        yield files


def compare_throughput(
    weights: str, images: list[Path], runtimes: Sequence[str] = RUNTIMES
) -> dict[str, dict[str, float]]:
    """Milliseconds per image of the stages of `predict_files`, each alone, and of the whole, on a
    folder of these images and on a video of them, by runtime; and images per second of the folder
    in one process and in two, which share images and cores.

    The network's stage runs in the threads that it has in the whole, masks included.
    """
    rows = {}
    with _files(weights, images[0], runtimes) as files, tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stills, video = folder / "images", folder / "video.mp4"
        stills.mkdir()
        for number, image in enumerate(images):
            shutil.copyfile(image, stills / f"{number:05d}{image.suffix}")
        _write_video(video, images)
        for runtime, file in files.items():
            for inputs in (stills, video):
                row = f"{runtime}, {'folder' if inputs is stills else 'video'}"
                rows[row] = _in_a_process(_measure, str(file), str(inputs), len(images))
            seconds = _share(str(file), sorted(stills.iterdir()), PROCESSES)
            rows[f"{runtime}, folder"] |= {
                "images/s": 1000 / rows[f"{runtime}, folder"]["whole"],
                f"images/s, {PROCESSES} processes": len(images) / seconds,
            }
    return rows


def _write_video(path, images):
    first = read_image(images[0])
    with VideoWriter(path, time_base=Fraction(1, 25)) as video:
        for number, image in enumerate(images):
            frame = read_image(image)
            video.write(frame if frame.shape == first.shape else first, Fraction(number, 25))


def _in_a_process(function, *args):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def _measure(weights, inputs, number):
    keep_freed_memory()
    predictor = Predictor(None, weights, device="cpu")
    _, sources = find_inputs([inputs])
    pairs = [[pair] for pair in batch._read(sources, predictor)]
    annotated = partial(batch._annotated, predictor)
    for _ in batch.in_order(annotated, pairs[:4], is_on_cpu=True):
        pass  # warms each thread up
    columns = {}

    def stage(name, work):
        start = time.perf_counter()
        result = work()
        columns[name] = 1000 * (time.perf_counter() - start) / number
        return result

    stage("reading", lambda: sum(1 for _ in batch._read(sources, predictor)))
    results = stage("network", lambda: list(batch.in_order(annotated, pairs, is_on_cpu=True)))
    with tempfile.TemporaryDirectory() as folder:
        stage("writing", lambda: _write(predictor, results, Path(folder)))
    slowest = max(columns.values())
    with tempfile.TemporaryDirectory() as folder:
        stage("whole", lambda: predict_files(predictor, [inputs], Path(folder)))
    return columns | {"whole / slowest stage": columns["whole"] / slowest}


def _write(predictor, results, folder):
    """The files that `predict_files` makes of annotations."""
    run = batch.run_record(predictor, folder)
    with contextlib.closing(batch.Journal(folder, run)) as journal:
        images = 0
        for ((item, annotations),) in results:
            if item.frame is None:
                journal.finish(item.source.name, item.signature, images, None, None)
                images = 0
                continue
            journal.add(outputs.frame_record(item.source.name, item.frame), annotations)
            images += 1
        journal.write_tables(predictor.metadata, predictor.classes)


def _share(weights, images, processes):
    """Seconds that several processes, started before, take for the images."""
    context = multiprocessing.get_context("spawn")
    ready, threads = context.Barrier(processes + 1), max(1, torch.get_num_threads() // processes)
    workers = [
        context.Process(target=_predict_share, args=(weights, images[n::processes], ready, threads))
        for n in range(processes)
    ]
    for worker in workers:
        worker.start()
    ready.wait(120)
    start = time.perf_counter()
    ready.wait(120)
    seconds = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return seconds


def _predict_share(weights, images, ready, threads):
    torch.set_num_threads(threads)
    keep_freed_memory()
    predictor = Predictor(None, weights, device="cpu")
    predictor.forward([predictor.prepare(read_image(images[0]))])
    with tempfile.TemporaryDirectory() as output:
        ready.wait(120)
        predict_files(predictor, images, output)
        ready.wait(120)
