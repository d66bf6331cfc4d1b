"""Our evaluation with its default intervals against pycocotools' COCOeval: for benchmark.py.

Run as a script, it is the process that one of the two is timed in.
"""

import contextlib
import io
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
from tqdm import tqdm

__all__ = ["SIDES", "SIZE", "compare_evaluations", "outlines", "synthesise"]

SIZE = 352

# Detections an image.
DETECTIONS = 5

# Outlines to choose from, each with as many versions slightly displaced.
OUTLINES, VERSIONS = 60, 4


def outlines(rng):
    """
    Args:
        rng (np.random.Generator):

    Returns:
        list[list[tuple]]: (OUTLINES, 1 + VERSIONS) masks as (COCO segmentation, box): wavy
        ellipses, as lesions are.
    """
    y, x = np.mgrid[:SIZE, :SIZE]
    drawn = []
    for _ in range(OUTLINES):
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
        drawn.append(versions)
    return drawn


def synthesise(num_images, seed=0):
    """
    Lesions and detections as of a detector of polyps: 352x352 images, one in ten of them
    lesion-free, the others with one lesion or, one in ten, two; five detections an image, most of
    them false alarms of low score.

    Args:
        num_images (int):
        seed (int):

    Returns:
        tuple: COCO ground truth (dict) and COCO results (list[dict]).
    """
    rng = np.random.default_rng(seed)
    masks = outlines(rng)
    images, annotations, results = [], [], []
    for image_id in range(1, num_images + 1):
        name = f"{image_id:06d}.png"
        images.append({"id": image_id, "file_name": name, "height": SIZE, "width": SIZE})
        lesions = rng.integers(OUTLINES, size=rng.choice(3, p=(0.1, 0.81, 0.09)))
        for lesion in lesions:
            mask, box = masks[lesion][0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "segmentation": mask,
                    "bbox": box,
                    "area": float(mask_util.area(mask)),
                    "iscrowd": 0,
                }
            )
        for number in range(DETECTIONS):
            aims = number < len(lesions)
            outline = lesions[number] if aims else rng.integers(OUTLINES)
            mask, box = masks[outline][rng.integers(1, 1 + VERSIONS)]
            score = rng.beta(5, 1.5) if aims else rng.beta(1, 5)
            results.append(
                {
                    "image_id": image_id,
                    "category_id": 1,
                    "segmentation": mask,
                    "bbox": box,
                    "score": round(float(score), 6),
                }
            )
    dataset = {
        "images": images,
        "categories": [{"id": 1, "name": "lesion"}],
        "annotations": annotations,
    }
    return dataset, results


def time_ours(gt, dt):
    """
    Args:
        gt, dt (Path): COCO files.

    Returns:
        callable: evaluates them with the default intervals, reading included.
    """
    from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions

    return lambda: evaluate_lesions(gt, dt, bootstrap=Bootstrap())


def time_coco(gt, dt):
    """As :func:`time_ours`, for COCOeval's masks: evaluate and accumulate, all being loaded."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    import imrcnn_d2.evaluation  # noqa: F401  so that both processes hold the same libraries

    truth = COCO(str(gt))
    evaluation = COCOeval(truth, truth.loadRes(str(dt)), "segm")

    def run():
        evaluation.evaluate()
        evaluation.accumulate()

    return run


SIDES = {"ours": time_ours, "COCOeval": time_coco}


def _write(num_images, folder):
    for name, content in zip(("gt", "dt"), synthesise(num_images), strict=True):
        (folder / f"{name}.json").write_text(json.dumps(content))


def _peak():
    """MiB of memory that this process had at most. (ru_maxrss would count its parent's too.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _measure(side, folder):
    """{processor seconds, seconds, MiB} of one side, in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        call = SIDES[side](folder / "gt.json", folder / "dt.json")
        start = time.process_time(), time.perf_counter()
        call()
        end = time.process_time(), time.perf_counter()
    return {"s": end[0] - start[0], "wall s": end[1] - start[1], "MiB": _peak()}


def compare_evaluations(num_images, runs):
    """
    Run ours, COCOeval, ours, COCOeval, ..., each in a process of its own, on the same files.

    Args:
        num_images (int): of the synthesised data set.
        runs (int): times of each.

    Returns:
        dict[str, float]: medians of processor time and of elapsed time in seconds and largest peak
        of memory in MiB, of each; and "ratio", the median over pairs of the processor times'.
    """
    with tempfile.TemporaryDirectory() as name:
        _child("write", num_images, name)
        pairs = []
        for _ in tqdm(range(runs), desc=f"{num_images} images", leave=False):
            pairs.append({side: json.loads(_child(side, name)) for side in SIDES})
    figures = {}
    for side in SIDES:
        for unit in ("s", "wall s"):
            figures[f"{side}, {unit}"] = statistics.median(pair[side][unit] for pair in pairs)
        figures[f"{side}, MiB"] = max(pair[side]["MiB"] for pair in pairs)
    ratios = (pair["ours"]["s"] / pair["COCOeval"]["s"] for pair in pairs)
    return {**figures, "ratio": statistics.median(ratios)}


def _child(*args):
    command = [sys.executable, __file__, *map(str, args)]
    # One thread: what waits for others, on a busy machine, would count as processor time.
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


if __name__ == "__main__":
    job, *rest = sys.argv[1:]
    if job == "write":
        _write(int(rest[0]), Path(rest[1]))
    else:
        print(json.dumps(_measure(job, Path(rest[0]))))
