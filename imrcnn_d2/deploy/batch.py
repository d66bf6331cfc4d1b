"""Predictions on many inputs: failed inputs are listed, finished ones are not predicted again."""

import contextlib
import json
import math
import os
import queue
import reprlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.deploy.inputs import (
    DICOM_NAME,
    Frame,
    Source,
    find_inputs,
    may_show_patient,
    read_frames,
)
from imrcnn_d2.deploy.outputs import (
    OUTPUTS,
    InputOutputs,
    OutputFolder,
    above_threshold,
    coco_head,
    frame_record,
    output_folders,
    records,
)
from imrcnn_d2.deploy.predictor import Predictor
from imrcnn_d2.utils.files import (
    BadInputError,
    atomic_file,
    csv_line,
    file_sha256,
    for_terminal,
    lock_folder,
)

__all__ = [
    "FAILED",
    "PREDICTIONS",
    "TABLE",
    "Item",
    "Journal",
    "Summary",
    "ahead",
    "check_run",
    "is_done",
    "outdated",
    "predict_files",
    "predictions",
    "run_record",
    "signature",
]


# Of journals. Format 1 had DICOM files by their names, and not the files that were written.
FORMAT = 2


def run_record(predictor: Predictor, root: Path, save: Iterable[str] = ()) -> dict:
    """
    What all results in a folder of outputs share, of JSON types.

    Args:
        root: folder that the names of inputs are relative to.
        save: of ``OUTPUTS``.
    """
    run = {
        **predictor.metadata,
        "runtime": predictor.requested_runtime,  # "auto" may choose another the next time
        "classes": predictor.classes,
        "outputs": sorted(save),
        # Names are relative to it. Its path may contain a patient's name, which could be guessed
        # even from a hash of it, but not from its number in the file system.
        "inputs": os.stat(root).st_ino,
        "format": FORMAT,
    }
    return json.loads(json.dumps(run))  # as it is read back


def check_run(folder: Path, previous: dict, current: dict) -> None:
    """
    Raises:
        ValueError: the previous results in a folder and the current ones are not of one run, see
            `run_record`; the error names the differences.
    """
    differences = [
        f"{for_terminal(key)} ({reprlib.repr(previous.get(key))}, "
        f"now {reprlib.repr(current.get(key))})"
        for key in sorted({**previous, **current})
        if previous.get(key) != current.get(key)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds the predictions of another run: it differs in "
            f"{', '.join(differences)}. Choose another --output"
        )


def signature(source: Source) -> list[int] | None:
    """Changes when the file does; None if it is gone."""
    try:
        status = source.path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def is_done(record, source: Source) -> bool:
    """
    Whether an input was done without an error and has not been changed since; ``record`` has its
    ``error`` and ``signature``, or is None.
    """
    return record is not None and record.error is None and record.signature == signature(source)


def outdated(records: Iterable, sources: Iterable[Source]) -> list:
    """
    The records, with ``error`` and ``name``, of DICOM files that failed and are not among the
    sources any more. Their names are from their content, and change once they are repaired.
    """
    names, prefix = {source.name for source in sources}, DICOM_NAME.partition("{")[0]
    return [
        record
        for record in records
        if record.error is not None and record.name.startswith(prefix) and record.name not in names
    ]


PREDICTIONS, TABLE, FAILED = "predictions.json", "predictions.csv", "failed.csv"
LONGEST_LINE = 2**26  # bytes; a frame's has a few hundred detections
LONGEST_SIDE, MOST_PIXELS = 2**20, 2**28  # of a frame


@dataclass(frozen=True)
class _DoneInput:
    """Its lines in the journal are from byte ``start`` to ``end``."""

    name: str
    signature: list | None
    start: int
    end: int
    frames: int
    error: str | None
    target: str | None


class Journal:
    """
    ``progress.jsonl``: one line for the run, then for each input one line per frame, one per file
    written, and one that says it is done. A kill costs the current input, never more: lines after
    the last finished input are cut off when the file is opened again.

    The tables of all results are made from it, one line in memory at a time. It also distinguishes
    the files that were written from those of the user, which are never deleted or overwritten: a
    file is ours as long as it is in the journal, with the content that it was written with.
    """

    FILE = "progress.jsonl"

    def __init__(self, folder: str | Path, run: dict, others: Iterable[str] = ()):
        """
        Args:
            folder: of the outputs; made if it does not exist.
            run: what all results in the folder share, see `run_record`.
            others: names of the files and folders that are written into it besides the tables.

        Raises:
            ValueError: the folder has the results of another run, or files of these names that no
                run wrote; another run is writing into it; or its journal is damaged.
        """
        self.folder, self.run, self._other_names = Path(folder), run, set(others)
        self._path = self.folder / self.FILE
        for name in (self.FILE, ".lock"):  # through a link, another file would be cut
            path = self.folder / name
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise ValueError(f"{path} is no file of ours. Choose another --output")
        if not self._path.exists():
            self._check_new()
        self._lock = lock_folder(self.folder, "--output")
        self._done = {}
        self._file = open(self._path, "a+b")  # noqa: SIM115  (closed by close)
        try:
            self._read()
            if not self._file.tell():
                self._check_new()
                self._append({"run": self.run})
                self._sync()
        except ValueError:
            self.close()
            raise
        self._start = self._file.tell()

    def _check_new(self):
        """A folder without a journal, or with an empty one, must not have files of our names."""
        names = sorted({PREDICTIONS, TABLE, FAILED, *self._other_names})
        foreign = [name for name in names if os.path.lexists(self.folder / name)]
        if foreign:
            raise ValueError(
                f"{self.folder} holds {', '.join(foreign)}, and no {self.FILE} that says that they "
                "were written here: they may be yours. Choose another --output"
            )

    def _read(self):
        """Index the inputs that are done; the file is then cut and stands at its end."""
        self._file.seek(0)
        whole = start = number = frames = broken = 0
        files, names = {}, set()
        while line := self._file.readline(LONGEST_LINE):
            number += 1
            end = start + len(line)
            content = _parsed(line)
            if broken == 1 or (content is None and number == 1 and not _is_start(line)):
                raise self._damaged(1)  # another program's file, which is not to be cut
            if content is None:
                broken = broken or number
            elif broken and "done" in content:  # a kill cuts off the last line only
                raise self._damaged(broken)
            elif not broken:
                match content:
                    case {"run": dict(run)} if number == 1:
                        check_run(self.folder, run, self.run)
                        whole = end
                    case {"image": _, "annotations": _} if number > 1:
                        if not _is_frame(content, len(self.run["classes"])):
                            raise self._damaged(number)
                        frames += 1
                        names.add(_input_name(content["image"]))
                    case {"file": str(name), "sha256": str(digest)} if number > 1:
                        self._check_name(name, number)
                        if PurePosixPath(name).parts[0] not in self._other_names:
                            raise self._damaged(number, f"{name!r} is no file that is written here")
                        files[self.folder / name] = digest
                    case {"done": dict(done)} if number > 1:
                        self._add_done(done, whole, end, frames, number)
                        if not names <= {done["name"]}:
                            raise self._damaged(number)
                        whole, frames, files, names = end, 0, {}, set()
                    case _:
                        raise self._damaged(number)
            start = end
        self._delete(files)  # of the input that a kill cost
        self._file.truncate(whole)
        self._file.seek(whole)

    def _add_done(self, done, start, end, frames, number):
        match done:
            case {
                "name": str(name),
                "signature": None | [int(), int()] as signature,
                "frames": int(),
                "error": None | str() as error,
                "target": None | str() as target,
            } if done["frames"] == frames and len(done) == 5:
                self._check_name(name, number)
                self._check_name(target or name, number)
                self._done[name] = _DoneInput(name, signature, start, end, frames, error, target)
            case _:
                raise self._damaged(number)

    def _check_name(self, name, number):
        path = PurePosixPath(name)
        leads_out = path.is_absolute() or ".." in path.parts or Path(name).drive
        if leads_out or not path.parts or "\0" in name:
            raise self._damaged(number, f"{name!r} leads out of the folder")

    def _damaged(self, number, reason="is no line that was written here"):
        return ValueError(
            f"{self._path}, line {number}: {reason}. Choose another --output, and do not trust "
            "the results in this one"
        )

    def is_done(self, source: Source) -> bool:
        """Whether an input was done without an error and has not been changed since."""
        return is_done(self._done.get(source.name), source)

    def begin(self, source: Source) -> None:
        """Deletes an input's files of before it changed, except those that the user has changed."""
        if source.name in self._done:
            self._delete(self._files(self._done[source.name]))

    def _files(self, done):
        """Path -> SHA-256 of each file that was written for an input that is done."""
        lines = [line for line in self._lines(done) if "file" in line]
        return {self.folder / line["file"]: line["sha256"] for line in lines}

    def _delete(self, files: dict[Path, str]):
        """
        Deletes files that still have the SHA-256 that was written. The others stay, and so do files
        that differ from them in the suffix only: the frame of a corrected LabelMe file.
        """
        existing = {path: digest for path, digest in files.items() if os.path.lexists(path)}
        ours = {path for path, digest in existing.items() if self._is_as_written(path, digest)}
        changed = {path.with_suffix("") for path in existing.keys() - ours}
        for path in ours:
            if path.with_suffix("") not in changed:
                path.unlink()

    def _is_as_written(self, path, digest):
        is_file = self.holds(path) and path.is_file() and not path.is_symlink()
        return is_file and file_sha256(path) == digest

    def holds(self, path: Path) -> bool:
        """Whether a path in the folder, by its name, is not led elsewhere by a link."""
        return path.parent.resolve().is_relative_to(self.folder.resolve())

    def _lines(self, done):
        with open(self._path, "rb") as file:
            file.seek(done.start)
            while file.tell() < done.end:
                yield json.loads(file.readline())

    def add(self, record: dict, annotations: list[dict]) -> None:
        """Adds the COCO image record of a frame, without an id, and its predictions."""
        self._append({"image": record, "annotations": annotations})

    def add_file(self, path: Path, digest: str) -> None:
        """Adds a file of the current input, with the SHA-256 of its content, before it exists."""
        name = path.relative_to(self.folder).as_posix()
        self._append({"file": name, "sha256": digest})
        self._file.flush()

    def targets(self) -> dict[str, str]:
        """Names of the inputs that are done -> names of their files, see `OutputFolder.target`."""
        return {done.name: done.target for done in self._done.values() if done.target}

    def forget_outdated(self, sources: Iterable[Source]) -> None:
        """Deletes the files and records of `outdated` inputs, which are not among all sources."""
        for done in outdated(self._done.values(), sources):
            self._delete(self._files(done))
            del self._done[done.name]

    def finish(
        self,
        name: str,
        signature: list[int] | None,
        frames: int,
        error: str | None = None,
        target: str | None = None,
    ) -> None:
        """
        Notes that an input is done: it and its frames are now on disk.

        Args:
            name: of the input.
            signature: of the file as it was read, see `signature`.
            frames: number predicted.
            error: why it, or the rest of it, could not be predicted.
            target: the name of its files, if there are any.
        """
        done = dict(name=name, signature=signature, frames=frames, error=error, target=target)
        self._append({"done": done})
        self._sync()
        end = self._file.tell()
        self._done[name] = _DoneInput(**done, start=self._start, end=end)
        self._start = end

    def _append(self, content):
        self._file.write(json.dumps(content, separators=(",", ":")).encode() + b"\n")

    def _sync(self):
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self):
        """Closes the file and unlocks the folder."""
        self._file.close()
        self._lock.release()

    def frames(self) -> Iterator[tuple[dict, list[dict]]]:
        """Yields the image record with its ``id``, and the annotations, of all inputs by name."""
        number = 0
        for done in self._by_name():
            for line in self._lines(done):
                if "image" in line:
                    number += 1
                    yield {"id": number, **line["image"]}, line["annotations"]

    def _by_name(self):
        return sorted(self._done.values(), key=lambda done: done.name)

    def failed(self) -> list[tuple[str, str]]:
        """Name and reason of each input that was not, or not wholly, read."""
        return [(done.name, done.error) for done in self._by_name() if done.error is not None]

    def write_tables(self, metadata: dict, classes: list[str]) -> None:
        """
        Writes ``predictions.json``, ``predictions.csv`` and, on failures, ``failed.csv``, with the
        metadata and classes of the `Predictor`.
        """
        self._write_coco(coco_head(metadata, classes))
        self._write_csv(TABLE, self._rows(metadata, classes))
        failed = [{"file": name, "reason": reason} for name, reason in self.failed()]
        if failed:
            self._write_csv(FAILED, failed)
        else:
            (self.folder / FAILED).unlink(missing_ok=True)

    def _rows(self, metadata, classes):
        for image, annotations in self.frames():
            try:
                yield _row(image, annotations, metadata, classes)
            except ValueError as error:  # a mask that was not written here
                raise BadInputError(self._path, f"of {image['file_name']!r}, {error}") from error

    def _write_coco(self, head):
        with atomic_file(self.folder / PREDICTIONS) as file:
            file.write(json.dumps(head)[:-1].encode() + b',\n"images": [')
            _write_list(file, (image for image, _ in self.frames()))
            file.write(b'],\n"annotations": [')
            annotations = (
                {"image_id": image["id"], **annotation}
                for image, annotations in self.frames()
                for annotation in annotations
            )
            _write_list(file, annotations)
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


def _write_list(file, records):
    for number, record in enumerate(records, 1):
        line = json.dumps({"id": number, **record})
        file.write((b",\n" if number > 1 else b"\n") + line.encode())


def _row(image, annotations, metadata, classes):
    """Of an image in predictions.csv."""
    row = {key: image.get(key) for key in ("file_name", "frame", "time", "width", "height")}
    if annotations and "probabilities" in annotations[0]:
        best = annotations[0]
        row |= {"class": classes[best["category_id"] - 1], "score": best["score"]}
        row |= dict(zip((f"probability {c}" for c in classes), best["probabilities"], strict=True))
    else:
        shown = above_threshold(annotations, metadata["tau"])
        row |= {"lesions": len(shown), "score": max((a["score"] for a in annotations), default=0)}
        row |= {"area_percent": _area_percent(shown, image)}
    return row | {key: metadata[key] for key in ("tau", "weights_sha256", "version")}


def _area_percent(annotations, image):
    """The share of the image that the masks cover, or the boxes if there are no masks."""
    size = image["height"], image["width"]
    masks = [to_rle(a["segmentation"], *size) for a in annotations if "segmentation" in a] or [
        mask_util.frPyObjects(np.array([a["bbox"]]), *size)[0] for a in annotations
    ]
    area = float(mask_util.area(mask_util.merge(masks))) if masks else 0.0
    return round(100 * area / np.prod(size), 4)


def _is_start(line):
    """Whether it can be the first line of a journal, cut off by a kill."""
    start = b'{"run":{'
    return line.startswith(start) or start.startswith(line)


def _parsed(line):
    """The dict in a line; None if it is none, or not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _input_name(image):
    """Of a frame's input, see `frame_record`."""
    number = image.get("frame")
    return image["file_name"].removesuffix(f"#{number:06d}" if isinstance(number, int) else "")


def _is_frame(content, classes):
    """Whether `Journal.add` writes such a line for a model with so many classes."""
    match content:
        case {"image": {"file_name": str(), "width": int(w), "height": int(h)} as image} if (
            0 < w <= LONGEST_SIDE and 0 < h <= LONGEST_SIDE and w * h <= MOST_PIXELS
        ):
            others = [value for key, value in image.items() if key != "file_name"]
            annotations = content["annotations"]
        case _:
            return False
    lists = [value if isinstance(value, list) else [value] for value in others if value is not None]
    if not all(map(_are_numbers, lists)):
        return False
    return isinstance(annotations, list) and all(
        _is_annotation(annotation, w, h, classes) for annotation in annotations
    )


def _is_annotation(annotation, width, height, classes):
    match annotation:
        case {"category_id": int(category), "score": score} if 1 <= category <= classes:
            if not _are_numbers([score]):
                return False
        case _:
            return False
    match annotation:
        case {"probabilities": list(values)}:
            return len(values) == classes and _are_numbers(values)
        case {"bbox": [_, _, _, _] as box, "area": area} if _are_numbers([*box, area]):
            x, y, w, h = box
            inside = x >= 0 and y >= 0 and w >= 0 and h >= 0 and x + w <= width + 1
            mask = annotation.get("segmentation", {"size": [], "counts": ""})
            return inside and y + h <= height + 1 and isinstance(mask, dict)
    return False


def _are_numbers(values):
    """Whether all values are finite numbers."""
    try:
        return all(type(value) in (int, float) and math.isfinite(value) for value in values)
    except OverflowError:  # an integer beyond what a float can be
        return False


@dataclass(frozen=True)
class Item:
    """
    A frame of an input, or the input's end.

    Attributes:
        signature: of the file when reading began, see `signature`.
        show_pixels: False if its pixels must not reach an output.
        frame: None at the end of an input.
        error: at the end of an input, why it, or the rest of it, could not be read.
    """

    source: Source
    signature: list[int] | None
    show_pixels: bool = True
    frame: Frame | None = None
    error: str | None = None


def predictions(
    predictor: Predictor, sources: Iterable[Source], batch_size: int
) -> Iterator[tuple[Item, list[dict] | None]]:
    """
    Predicts on inputs in turn. While the caller works on one frame, the network is at the next and
    the decoder at those after them: all takes as long as the slowest of the three. The number of
    waiting frames is bounded.

    Args:
        batch_size: images that the network sees at once, if they are of one size to it.

    Yields:
        Each frame with its annotations, see `records`, and after the last frame of an input its
        end, with None. An input that cannot be read has an end only.
    """
    room = 2 * batch_size
    with (
        contextlib.closing(ahead(_read(sources, predictor), room)) as items,
        contextlib.closing(ahead(predictor.in_batches(items, batch_size), room)) as outputs,
    ):
        for item, output in outputs:
            if item.frame is None:
                yield item, None
            else:
                size = item.frame.image.shape[:2]
                yield item, records(predictor, output, *size, item.frame.view)


def _read(sources, predictor):
    """Yields the items of all sources in turn, each with the network's image, or None."""
    for source in sources:
        item = Item(source, signature(source))
        try:
            if source.kind == "dicom":
                item = replace(item, show_pixels=not may_show_patient(source.path))
            views = predictor.views()
            for frame in read_frames(source):
                frame = frame._replace(view=views(frame.image))
                yield replace(item, frame=frame), predictor.prepare(frame.image, frame.view)
        except BadInputError as error:
            item = replace(item, error=error.reason)
        except ModuleNotFoundError as error:  # of the extra [deploy]
            item = replace(item, error=f"needs {error.name}: pip install {error.name}")
        except Exception as error:  # readers raise nearly anything on damaged files
            # An unknown error may quote a patient's data from a DICOM file.
            message = "" if source.kind == "dicom" else f": {error}"
            item = replace(item, error=f"cannot be predicted ({type(error).__name__}{message})")
        yield item, None


def ahead(items: Iterable, number: int) -> Iterator:
    """
    Yields items that another thread makes while the caller works on the previous ones; at most
    ``number`` of them wait. What ``items`` raises is raised here.
    """
    waiting, end, stop = queue.Queue(number), object(), threading.Event()

    def put(item):
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return waiting.put(item, timeout=0.1)

    def work():
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class Summary:
    """
    Attributes:
        images: images and frames predicted now.
        skipped: inputs that an earlier call had done.
        failed: name and reason of each input that could not be read, or not to its end.
        kept: files that the user has changed or put there: they were left as they are.
    """

    images: int
    skipped: int
    failed: list[tuple[str, str]]
    kept: list[Path] = field(default_factory=list)


def predict_files(
    predictor: Predictor,
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    save: Iterable[str] = (),
    batch_size: int = 1,
    follow_links: bool = False,
) -> Summary:
    """
    Predicts on images, videos and DICOM files, and writes the tables of `Journal.write_tables` and
    the requested outputs. An input that cannot be read is listed and the others go on. Called again
    with the same output, it goes on where it was interrupted.

    Args:
        inputs, follow_links: see `find_inputs`.
        output: folder; made if it does not exist.
        save: of ``OUTPUTS``.
        batch_size: images that the network sees at once, if they are of one size to it.

    Raises:
        FileNotFoundError: there is no such input.
        ValueError: the folder has the results of another run, files that no run wrote, or another
            run is writing into it; or masks are requested from a model without masks.
        OSError: something cannot be written. Finished inputs stay finished.
    """
    if "masks" in save and not predictor.has_masks:
        raise ValueError(f"{predictor.metadata['model']} gives no masks")
    output = Path(output)
    root, sources = find_inputs(inputs, leave_out=output_folders(output), follow_links=follow_links)
    run = run_record(predictor, root, save)
    with contextlib.closing(Journal(output, run, OUTPUTS)) as journal:
        journal.forget_outdated(sources)
        todo = [source for source in sources if not journal.is_done(source)]
        names = [source.name for source in sources]
        folder = OutputFolder(
            output, save, predictor.metadata, predictor.classes, names, taken=journal.targets()
        )
        images = _predict(predictor, todo, folder, journal, batch_size)
        journal.write_tables(predictor.metadata, predictor.classes)
        return Summary(images, len(sources) - len(todo), journal.failed(), folder.kept)


def _predict(predictor, sources, folder, journal, batch_size) -> int:
    """Returns the number of images predicted."""
    stills = all(source.kind == "image" for source in sources)
    outputs, number, images = None, 0, 0
    with (
        contextlib.closing(predictions(predictor, sources, batch_size)) as items,
        contextlib.ExitStack() as files,
        tqdm(desc="Predicting", unit="image", total=len(sources) if stills else None) as bar,
    ):
        for item, annotations in items:
            name = item.source.name
            if outputs is None:
                outputs = files.enter_context(
                    InputOutputs(folder, item.source, journal, show_pixels=item.show_pixels)
                )
            if item.frame is not None:
                outputs.add(item.frame, annotations)
                journal.add(frame_record(name, item.frame), annotations)
                number += 1
                bar.update()
                continue
            files.close()  # its files are whole before it is noted as done
            target = folder.target(name) if number else None
            error = item.error or outputs.error
            journal.finish(name, item.signature, number, error, target)
            if error:
                tqdm.write(for_terminal(f"{name}: {error}", one_line=True))
            outputs, number, images = None, 0, images + number
    return images
