"""What a prediction run has done so far, line by line on disk, to go on from after a kill."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from filelock import FileLock, Timeout

from imrcnn_d2.data.csv_files import csv_line
from imrcnn_d2.evaluation.files import atomic_file

from .identity import check_run, input_key, is_done
from .records import coco_head, counted

__all__ = ["FAILED", "PREDICTIONS", "TABLE", "Journal"]

PREDICTIONS, TABLE, FAILED = "predictions.json", "predictions.csv", "failed.csv"


@dataclass(frozen=True)
class _Input:
    """One that was done: its lines in the file are from byte ``start`` to ``end``."""

    name: str
    signature: list | None
    start: int
    end: int
    frames: int
    error: str | None
    target: str | None


class Journal:
    """
    ``progress.jsonl``: a line that says what the run is, then for each input a line a frame and one
    that says it is done. A kill costs the input at work, never more: what follows the last input
    that is done is cut off when the file is opened again.

    The tables of all results are made from it, a line in memory at a time.
    """

    FILE = "progress.jsonl"

    def __init__(self, folder, run):
        """
        Args:
            folder (Path): of the outputs; made if it does not exist.
            run (dict): what all results in the folder share, see :func:`run_record`.

        Raises:
            ValueError: the folder has the results of another run, or one is writing into it.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"Another run is writing into {folder}: wait for it, or choose another --output"
            ) from error
        self.run = run
        self._path = self.folder / self.FILE
        self._done = {}
        self._file = open(self._path, "a+b")  # noqa: SIM115  (closed by close)
        try:
            self._read()
        except ValueError:
            self.close()
            raise
        if not self._file.tell():
            self._append({"run": self.run})
            self._sync()
        self._start = self._file.tell()

    def _read(self):
        """Index what is there; the file is then cut and stands at its end."""
        self._file.seek(0)
        whole = start = 0
        for line in self._file:
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                content = None
            if content is None:  # cut off by a kill
                break
            end = start + len(line)
            if "run" in content:
                check_run(self.folder, content["run"], self.run)
                whole = end
            elif "done" in content:
                done = content["done"]
                key = done.pop("key")
                self._done[key] = _Input(**done, start=whole, end=end)
                whole = end
            start = end
        self._file.truncate(whole)
        self._file.seek(whole)

    def is_done(self, source):
        """
        Args:
            source (Source):

        Returns:
            bool: whether it was done without an error and has not been changed since.
        """
        return is_done(self._done.get(input_key(source.name)), source)

    def add(self, record, annotations):
        """
        Args:
            record (dict): COCO image record of a frame, without its id.
            annotations (list[dict]): what was found in it.
        """
        self._append({"image": record, "annotations": annotations})

    def targets(self):
        """
        Returns:
            dict[str, str]: by name, what the files of each input that is done are called.
        """
        return {done.name: done.target for done in self._done.values() if done.target}

    def finish(self, source, name, signature, frames, error=None, target=None):
        """
        Note that an input is done: it and its frames are now on disk.

        Args:
            source (Source):
            name (str): what outputs call it.
            signature (list or None): of the file as it was read, see :func:`signature`.
            frames (int): that were predicted.
            error (str or None): why it, or the rest of it, could not be.
            target (str or None): what its files are called, if there are any.
        """
        key = input_key(source.name)
        done = dict(name=name, signature=signature, frames=frames, error=error, target=target)
        self._append({"done": {"key": key, **done}})
        self._sync()
        end = self._file.tell()
        self._done[key] = _Input(**done, start=self._start, end=end)
        self._start = end

    def _append(self, content):
        self._file.write(json.dumps(content, separators=(",", ":")).encode() + b"\n")

    def _sync(self):
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self):
        """Close the file, and leave the folder to others."""
        self._file.close()
        self._lock.release()

    def frames(self):
        """
        Yields:
            tuple[dict, list[dict]]: image record with its ``id``, and the annotations, of all
            inputs by name.
        """
        number = 0
        with open(self._path, "rb") as file:
            for done in self._by_name():
                file.seek(done.start)
                for _ in range(done.frames):
                    line = json.loads(file.readline())
                    number += 1
                    yield {"id": number, **line["image"]}, line["annotations"]

    def _by_name(self):
        return sorted(self._done.values(), key=lambda done: done.name)

    def failed(self):
        """
        Returns:
            list[tuple[str, str]]: name and reason of each input that was not, or not wholly, read.
        """
        return [(done.name, done.error) for done in self._by_name() if done.error is not None]

    def write_tables(self, about, classes):
        """
        Write ``predictions.json``, ``predictions.csv`` and, if there are any, ``failed.csv``.

        Args:
            about (dict): of the :class:`Predictor`.
            classes (list[str]):
        """
        self._write_coco(about, classes)
        rows = (_row(image, found, about, classes) for image, found in self.frames())
        self._write_csv(TABLE, rows)
        failed = [{"file": name, "reason": reason} for name, reason in self.failed()]
        if failed:
            self._write_csv(FAILED, failed)
        else:
            (self.folder / FAILED).unlink(missing_ok=True)

    def _write_coco(self, about, classes):
        head = coco_head(about, classes)
        with atomic_file(self.folder / PREDICTIONS) as file:
            file.write(json.dumps(head)[:-1].encode() + b',\n"images": [')
            _write_list(file, (image for image, _ in self.frames()))
            file.write(b'],\n"annotations": [')
            _write_list(
                file,
                (
                    {"image_id": image["id"], **annotation}
                    for image, annotations in self.frames()
                    for annotation in annotations
                ),
                numbered=True,
            )
            file.write(b"]}\n")

    def _write_csv(self, file_name, rows):
        with atomic_file(self.folder / file_name) as file:
            columns = None
            for row in rows:
                lines = csv_line(row.values())
                if columns is None:
                    columns = list(row)
                    lines = csv_line(columns) + lines
                file.write(lines.encode("utf-8", "backslashreplace"))


def _write_list(file, records, numbered=False):
    for number, record in enumerate(records, 1):
        record = {"id": number, **record} if numbered else record
        file.write((b",\n" if number > 1 else b"\n") + json.dumps(record).encode())


def _row(image, annotations, about, classes):
    """What predictions.csv says of an image."""
    row = {key: image.get(key) for key in ("file_name", "frame", "time", "width", "height")}
    if annotations and "probabilities" in annotations[0]:
        best = annotations[0]
        row |= {"class": classes[best["category_id"] - 1], "score": best["score"]}
        row |= dict(zip((f"probability {c}" for c in classes), best["probabilities"], strict=True))
    else:
        shown = counted(annotations, about["tau"])
        row |= {"lesions": len(shown), "score": max((a["score"] for a in annotations), default=0)}
        row |= {"area_percent": _area_percent(shown, image)}
    return row | {key: about[key] for key in ("tau", "weights_sha256", "version")}


def _area_percent(annotations, image):
    """Of the image, what is outlined; of boxes where there are no masks."""
    size = image["height"], image["width"]
    masks = [a["segmentation"] for a in annotations if "segmentation" in a] or [
        mask_util.frPyObjects(np.array([a["bbox"]]), *size)[0] for a in annotations
    ]
    area = float(mask_util.area(mask_util.merge(masks))) if masks else 0.0
    return round(100 * area / np.prod(size), 4)
