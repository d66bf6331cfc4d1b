"""Evaluation and catalogue, ours against pycocotools and Detectron2, on synthetic data sets.

For benchmarks/benchmark.py, which runs this file as a script to measure each side in a process.
"""

import contextlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from machine import memory
from tqdm import tqdm

SIZE = 352  # of an image
DETECTIONS = 5  # per image
MASKS, VERSIONS = 60, 4  # masks to choose from, each with versions slightly displaced
WORKERS = 2  # that read a catalogue
READ = 20_000  # records that each of them reads, spread over the data set


def lesion_masks(rng: np.random.Generator) -> list[list[tuple[dict, list]]]:
    """(MASKS, 1 + VERSIONS) masks as (COCO segmentation, box): wavy ellipses, as lesions are."""
    y, x = np.mgrid[:SIZE, :SIZE]
    masks = []
    for _ in range(MASKS):
        center, radius = rng.uniform(80, SIZE - 80, 2), rng.uniform(25, 80, 2)
        waves, phase = rng.integers(3, 9), rng.uniform(0, 2 * np.pi)
        versions = []
        for version in range(1 + VERSIONS):
            moved = center + (rng.normal(0, 8, 2) if version else 0)
            angle = np.arctan2(y - moved[0], x - moved[1])
            edge = 1 + 0.1 * np.sin(waves * angle + phase)
            inside = np.hypot((y - moved[0]) / radius[0], (x - moved[1]) / radius[1]) < edge
            rle = mask_util.encode(np.asfortranarray(inside, dtype=np.uint8))
            box = mask_util.toBbox(rle).tolist()
            versions.append(({"size": [SIZE, SIZE], "counts": rle["counts"].decode()}, box))
        masks.append(versions)
    return masks


def write_evaluation(num_images: str, folder: str, seed: int = 0) -> None:
    """Write gt.json and dt.json, COCO ground truth and results as of a detector of polyps, image by
    image: 352x352 images, one in ten of them lesion-free, the others with one lesion or, one in
    ten, two; five detections per image, most of them false alarms of low score.
    """
    rng = np.random.default_rng(seed)
    masks = lesion_masks(rng)
    areas = [float(mask_util.area(versions[0][0])) for versions in masks]
    lesions = [
        rng.integers(MASKS, size=rng.choice(3, p=(0.1, 0.81, 0.09))) for _ in range(int(num_images))
    ]
    images = (
        {"id": i, "file_name": f"{i:07d}.png", "height": SIZE, "width": SIZE}
        for i in range(1, len(lesions) + 1)
    )
    numbers = itertools.count(1)
    with open(Path(folder, "gt.json"), "w", encoding="utf-8") as file:
        file.write('{"categories": [{"id": 1, "name": "lesion"}], "images": ')
        _write_list(file, images)
        file.write(', "annotations": ')
        records = (
            {
                "id": next(numbers),
                "iscrowd": 0,
                "area": areas[lesion],
                **_record(i, masks[lesion][0]),
            }
            for i, those in enumerate(lesions, 1)
            for lesion in those
        )
        _write_list(file, records)
        file.write("}")
    with open(Path(folder, "dt.json"), "w", encoding="utf-8") as file:
        _write_list(file, _detections(rng, masks, lesions))


def _detections(rng, masks, lesions):
    for i, those in enumerate(lesions, 1):
        for number in range(DETECTIONS):
            aims = number < len(those)
            mask_index = those[number] if aims else rng.integers(MASKS)
            score = rng.beta(5, 1.5) if aims else rng.beta(1, 5)
            region = masks[mask_index][rng.integers(1, 1 + VERSIONS)]
            yield _record(i, region) | {"score": round(float(score), 6)}


def _record(image_id, region):
    mask, box = region
    return {"image_id": image_id, "category_id": 1, "segmentation": mask, "bbox": box}


def _write_list(file, records):
    """Write a JSON list record by record: there may be millions."""
    for number, record in enumerate(records):
        file.write(", " if number else "[")
        file.write(json.dumps(record))
    file.write("]")


def write_coco(num_images: int, path: Path, seed: int = 0) -> None:
    """Write such a ground truth, image by image (there may be a million), five per patient."""
    rng = np.random.default_rng(seed)
    lesions = [lesion for versions in lesion_masks(rng) for lesion in versions]
    counts = rng.choice(3, num_images, p=(0.1, 0.81, 0.09))
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"images": [')
        for i in range(num_images):
            image = {"id": i + 1, "file_name": f"{i + 1:07d}.png", "height": SIZE, "width": SIZE}
            file.write(", " * (i > 0) + json.dumps({**image, "patient_id": f"p{i // 5:06d}"}))
        file.write('], "annotations": [')
        for number, i in enumerate(np.repeat(np.arange(num_images), counts).tolist()):
            mask, box = lesions[rng.integers(len(lesions))]
            annotation = {"id": number + 1, "image_id": i + 1, "category_id": 1, "bbox": box}
            annotation |= {"segmentation": mask, "area": box[2] * box[3], "iscrowd": 0}
            file.write(", " * (number > 0) + json.dumps(annotation))
        file.write('], "categories": [{"id": 1, "name": "lesion"}]}')


def evaluate_ours(gt: Path, dt: Path):
    """A function that evaluates with the default intervals, reading included, and returns the
    processor seconds of what COCOeval has no like of: boundaries, for hd95 and nsd."""
    from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
    from imrcnn_d2.evaluation.detection import counts

    agreement, seconds = counts.boundary_agreement, []

    def timed(*masks):
        start = time.process_time()
        values = agreement(*masks)
        seconds.append(time.process_time() - start)
        return values

    def run():
        counts.boundary_agreement = timed
        evaluate_lesions(gt, dt, bootstrap=Bootstrap())
        return sum(seconds)

    return run


def evaluate_coco(gt: Path, dt: Path):
    """A function that evaluates masks by COCOeval: evaluate and accumulate, without loading."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    import imrcnn_d2.evaluation  # noqa: F401  so that both processes hold the same libraries

    truth = COCO(str(gt))
    evaluation = COCOeval(truth, truth.loadRes(str(dt)), "segm")

    def run():
        evaluation.evaluate()
        evaluation.accumulate()
        return 0.0

    return run


def load_ours(json_file: Path):
    from imrcnn_d2.data.catalog import load_catalog

    return load_catalog(json_file, "images")


def load_detectron2(json_file: Path):
    from detectron2.data import DatasetFromList
    from detectron2.data.datasets import load_coco_json

    return DatasetFromList(load_coco_json(str(json_file), "images"))


EVALUATIONS = {"ours": evaluate_ours, "COCOeval": evaluate_coco}
CATALOGS = {"ours": load_ours, "Detectron2": load_detectron2}


def measure_catalog(side: str, json_file: str) -> dict[str, float]:
    """Time and memory of one side, in this process and its workers."""
    import imrcnn_d2.data.catalog  # noqa: F401  so that both hold the same libraries

    before = memory()
    start = time.process_time()
    dataset = CATALOGS[side](Path(json_file))
    measured = {
        "s": time.process_time() - start,
        "peak MiB": memory()["peak"],
        "MiB more, kept": memory()["now"] - before["now"],
        "MiB more, peak": memory()["peak"] - before["now"],
    }
    start = time.process_time()
    indices = range(0, len(dataset), max(len(dataset) // READ, 1))
    for index in indices:
        dataset[index]
    measured["us per record"] = 1e6 * (time.process_time() - start) / len(indices)
    pipes, workers = [], []
    for _ in range(WORKERS):
        ready, done = os.pipe(), os.pipe()
        worker = os.fork()
        if not worker:
            for index in indices:
                dataset[index]
            os.write(ready[1], b"1")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        workers.append(worker)
        pipes.append(done[1])
    measured["MiB of all, PSS"] = sum(memory(process)["PSS"] for process in ["self", *workers])
    for worker, pipe in zip(workers, pipes, strict=True):
        os.write(pipe, b"1")
        os.waitpid(worker, 0)
    return measured


def measure_evaluation(side: str, folder: str) -> dict[str, float]:
    """{processor seconds, those without boundaries, seconds, MiB} of one side, in this process;
    imports are not timed."""
    with contextlib.redirect_stdout(io.StringIO()):
        call = EVALUATIONS[side](Path(folder, "gt.json"), Path(folder, "dt.json"))
        start = time.process_time(), time.perf_counter()
        boundaries = call()
        seconds, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    measured = {"s": seconds, "s without boundaries": seconds - boundaries, "wall s": wall}
    return measured | {"MiB": memory()["peak"]}


def compare_evaluations(num_images: int, runs: int, baseline: bool = True) -> dict[str, float]:
    """Run ours, COCOeval, ours, COCOeval, ..., each in a process of its own, on the same files.

    Return medians of processor and wall seconds and the peak MiB of each; "ratio", the median over
    pairs of the ratio of processor times, and "ratio without boundaries", the same but for the time
    that hd95 and nsd take. Without `baseline`, those of ours alone.
    """
    sides = [*EVALUATIONS][: 1 + baseline]
    with tempfile.TemporaryDirectory() as folder:
        _in_a_process(write_evaluation, num_images, folder)
        pairs = [
            {side: _in_a_process(measure_evaluation, side, folder) for side in sides}
            for _ in tqdm(range(runs), desc=f"{num_images} images", leave=False)
        ]
    measured = {}
    for side in sides:
        for unit in ("s", "wall s"):
            measured[f"{side}, {unit}"] = statistics.median(pair[side][unit] for pair in pairs)
        measured[f"{side}, MiB"] = max(pair[side]["MiB"] for pair in pairs)
    for name in ("", " without boundaries") if baseline else ():
        ratios = (pair["ours"][f"s{name}"] / pair["COCOeval"]["s"] for pair in pairs)
        measured[f"ratio{name}"] = statistics.median(ratios)
    return measured


def compare_catalogs(num_images: int, baseline: bool) -> dict[str, dict[str, float]]:
    """Load a synthetic data set, each side in a process of its own; see `measure_catalog`.

    `baseline` includes Detectron2's side, where a million images take about 4 GiB.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_coco(num_images, json_file := Path(folder) / "coco.json")
        sides = list(CATALOGS)[: 1 + baseline]
        return {side: _in_a_process(measure_catalog, side, json_file) for side in sides}


def _in_a_process(function, *args):
    """Run a function of this module in a process of its own and return its result."""
    command = [sys.executable, __file__, function.__name__, *map(str, args)]
    # One thread: waiting threads of a busy machine would add processor time.
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
