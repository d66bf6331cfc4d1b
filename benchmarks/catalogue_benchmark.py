"""Our catalogue of a data set against Detectron2's list of dicts: for benchmarks/benchmark.py.

Run as a script, it is the process that one of the two is measured in.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from evaluation_benchmark import SIZE, outlines
from tqdm import tqdm

__all__ = ["SIDES", "compare_catalogs", "write_coco"]

WORKERS = 2

# Records that each worker reads, all over the data set.
READ = 20_000


def write_coco(num_images, path, seed=0):
    """
    A COCO file of 352x352 images, one in ten of them lesion-free, the others with one lesion or,
    one in ten, two; five images a patient. Written image by image, as there may be a million.

    Args:
        num_images (int):
        path (Path):
        seed (int):
    """
    rng = np.random.default_rng(seed)
    lesions = [lesion for versions in outlines(rng) for lesion in versions]
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


def load_ours(json_file):
    """
    Args:
        json_file (Path): COCO instance JSON.

    Returns:
        Dataset: of its records.
    """
    from imrcnn_d2.data.catalog import load_catalog

    return load_catalog(json_file, "images")


def load_theirs(json_file):
    """As :func:`load_ours`, by what Detectron2's loaders do."""
    from detectron2.data import DatasetFromList
    from detectron2.data.datasets import load_coco_json

    return DatasetFromList(load_coco_json(str(json_file), "images"))


SIDES = {"ours": load_ours, "Detectron2": load_theirs}


def _memory(process="self"):
    """MiB: resident now, resident at most, and resident with shared pages divided (PSS)."""
    status = Path(f"/proc/{process}/status").read_text()
    rss, peak = (int(status.split(f"{key}:")[1].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    return rss, peak, int(rollup.split("\nPss:")[1].split()[0]) / 1024


def _measure(side, json_file):
    """Figures of one side, in this process and its workers."""
    import imrcnn_d2.data.catalog  # noqa: F401  so that both hold the same libraries

    before = _memory()
    start = time.process_time(), time.perf_counter()
    dataset = SIDES[side](json_file)
    figures = {
        "s": time.process_time() - start[0],
        "wall s": time.perf_counter() - start[1],
        "MiB before": before[0],
        "peak MiB": _memory()[1],
        "MiB more, kept": _memory()[0] - before[0],
        "MiB more, peak": _memory()[1] - before[0],
    }
    start = time.process_time()
    some = range(0, len(dataset), max(len(dataset) // READ, 1))
    for index in some:
        dataset[index]
    figures["us a record"] = 1e6 * (time.process_time() - start) / len(some)
    pipes, workers = [], []
    for _ in range(WORKERS):
        ready, done = os.pipe(), os.pipe()
        worker = os.fork()
        if not worker:
            for index in some:
                dataset[index]
            os.write(ready[1], b"1")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        workers.append(worker)
        pipes.append(done[1])
    memory = [_memory(process) for process in ["self", *workers]]
    figures["MiB of workers, PSS"] = max(pss for _, _, pss in memory[1:])
    figures["MiB of all, PSS"] = sum(pss for _, _, pss in memory)
    for worker, pipe in zip(workers, pipes, strict=True):
        os.write(pipe, b"1")
        os.waitpid(worker, 0)
    return figures


def compare_catalogs(num_images, baseline):
    """
    Load a synthesised data set, each side in a process of its own.

    Args:
        num_images (int):
        baseline (bool): Detectron2's side too; a million images take some 4 GiB there.

    Returns:
        dict[str, float]: seconds (processor and elapsed), MiB before and more, and of two workers.
    """
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder) / "coco.json"
        write_coco(num_images, json_file)
        figures["file, MiB"] = json_file.stat().st_size / 2**20
        for side in tqdm(list(SIDES)[: 1 + baseline], leave=False):
            command = [sys.executable, __file__, side, str(json_file)]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            measured = json.loads(run.stdout.splitlines()[-1])
            figures |= {f"{side}, {key}": value for key, value in measured.items()}
    return figures


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], Path(sys.argv[2]))))
