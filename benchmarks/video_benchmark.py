"""The evaluation of procedures of the size of REAL-Colon (60 videos, 2.7 million frames, 350,000
boxes), generated.

For benchmarks/benchmark.py, which runs this file as a script to measure in a process.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util

PROCEDURES, LESIONS = 60, 132  # of REAL-Colon
FRAMES, BOXES = 2_700_000, 350_000  # at full size
WIDTH, HEIGHT, FPS = 1350, 1080, 30
FALSE_PER_FRAME = 0.5  # detections of low score mostly
MASK_SHAPES = 500


def write_procedures(num_frames: int, folder: Path, masks: bool = False, seed: int = 0) -> None:
    """Write gt.json and dt.json (as `imrcnn predict` has it) of procedures whose lesions move, with
    the share of lesion frames of REAL-Colon: 80 % of their boxes are hit, and false detections stay
    for some frames. With ``masks`` they are ellipses."""
    rng = np.random.default_rng(seed)
    lesion_frames = round(num_frames * BOXES / FRAMES)
    per_lesion = rng.multinomial(lesion_frames, rng.dirichlet(np.full(LESIONS, 2.0)))
    per_procedure = np.diff(np.linspace(0, num_frames, PROCEDURES + 1).round().astype(int))
    shapes = _shapes(rng) if masks else None
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "gt.json", "w") as gt, open(folder / "dt.json", "w") as dt:
        for file, info in ((gt, {}), (dt, {"weights_sha256": "0", "tau": 0.5})):
            head = {"info": info, "categories": [{"id": 1, "name": "polyp"}]}
            videos = [{"id": f"{p:03d}", "fps": FPS} for p in range(PROCEDURES)]
            file.write(json.dumps({**head, "videos": videos})[:-1] + ', "images": [')
        image_id, annotations, detections = 0, _Lines(folder / "gt.tmp"), _Lines(folder / "dt.tmp")
        for procedure, frames in enumerate(per_procedure.tolist()):
            name = f"{procedure:03d}"
            lesions = range(procedure, LESIONS, PROCEDURES)
            starts = {k: int(rng.integers(max(1, frames - per_lesion[k]))) for k in lesions}
            false = {}  # box and score -> frames that it stays
            for frame in range(frames):
                image_id += 1
                record = {"id": image_id, "file_name": f"{name}/{frame:06d}.jpg", "frame": frame}
                record |= {"sequence_id": name, "width": WIDTH, "height": HEIGHT}
                gt.write(", " * (image_id > 1) + json.dumps({**record, "centre": name[-1]}))
                dt.write(", " * (image_id > 1) + json.dumps(record))
                for k in lesions:
                    if not 0 <= frame - starts[k] < per_lesion[k]:
                        continue
                    angle = frame / 50 + k
                    x, y = 500 + 300 * np.cos(angle), 400 + 250 * np.sin(1.3 * angle)
                    box = [round(float(v), 1) for v in (x, y, 120 + k, 100 + k)]
                    fields = {"lesion_id": f"{name}_{k}", "size_mm": 2 + k % 20}
                    annotations.add(image_id, box, shapes, rng, **fields)
                    if rng.random() < 0.8:
                        moved = [box[0] + rng.normal(0, 9), box[1] + rng.normal(0, 9), *box[2:]]
                        score = round(float(rng.beta(4, 2)), 5)
                        detections.add(image_id, moved, shapes, rng, score=score)
                while rng.random() < FALSE_PER_FRAME / 5:
                    box = [*rng.uniform(0, 900, 2), *rng.uniform(40, 200, 2)]
                    false[tuple(box)] = float(rng.beta(1, 6)), int(rng.geometric(0.25))
                for box, (score, left) in list(false.items()):
                    noisy = min(max(score + rng.normal(0, 0.05), 0.01), 1)
                    detections.add(image_id, list(box), shapes, rng, score=round(float(noisy), 5))
                    false[box] = score, left - 1
                    if left <= 1:
                        del false[box]
        for file, lines in ((gt, annotations), (dt, detections)):
            file.write('], "annotations": [')
            lines.move_to(file)
            file.write("]}")


class _Lines:
    """Annotations, which come after all images in the file."""

    def __init__(self, path):
        self.path, self.number, self.file = path, 0, open(path, "w")

    def add(self, image_id, box, shapes, rng, **fields):
        self.number += 1
        box = [round(float(v), 2) for v in box]
        record = {"id": self.number, "image_id": image_id, "category_id": 1, "bbox": box, **fields}
        if shapes:
            record["segmentation"] = shapes[int(rng.integers(len(shapes)))]
        self.file.write(", " * (self.number > 1) + json.dumps(record))

    def move_to(self, file):
        self.file.close()
        with open(self.path) as lines:
            while text := lines.read(1 << 20):
                file.write(text)
        self.path.unlink()


def _shapes(rng):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    shapes = []
    for _ in range(MASK_SHAPES):
        centre, radius = rng.uniform(300, 700, 2), rng.uniform(40, 110, 2)
        inside = np.hypot((x - centre[0]) / radius[0], (y - centre[1]) / radius[1]) < 1
        rle = mask_util.encode(np.asfortranarray(inside, dtype=np.uint8))
        shapes.append({"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()})
    return shapes


def measure_sizes(num_frames: int, masks: bool = False) -> dict[str, float]:
    """:func:`measure_video` of procedures that are written for it, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_procedures(num_frames, Path(folder), masks)
        command = [sys.executable, __file__, folder]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure_video(folder: str) -> dict[str, float]:
    """{seconds, processor seconds, peak GiB} of `imrcnn evaluate --video` with its defaults, groups
    of lesions included."""
    from imrcnn_d2.cli.evaluate import main

    start = time.perf_counter(), time.process_time()
    files = [f"--gt={folder}/gt.json", f"--dt={folder}/dt.json", f"--output={folder}/scores"]
    main(["--video", "--by=size_mm:6,10", *files])
    seconds, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "processor seconds": processor, "peak GiB": peak}


if __name__ == "__main__":
    print(json.dumps(measure_video(sys.argv[1])))
