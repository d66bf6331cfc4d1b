"""Predictions on many inputs: failed inputs are listed, finished ones are not predicted again."""

import collections
import contextlib
import itertools
import json
import logging
import math
import os
import queue
import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import torch

from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.deploy import outputs
from imrcnn_d2.deploy.inputs import (
    DICOM_NAME,
    Frame,
    Source,
    find_inputs,
    may_show_patient,
    read_frames,
)
from imrcnn_d2.deploy.predictor import Predictor, batches
from imrcnn_d2.evaluation.alarms import Alarms
from imrcnn_d2.utils.files import (
    BadInputError,
    as_utf8,
    atomic_file,
    csv_line,
    few,
    file_sha256,
    for_terminal,
    install_extra,
    lock_folder,
)
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)

# Of journals. Format 1 had DICOM files by their names, and not the files that were written.
FORMAT = 2
PREDICTIONS, RESULTS = "predictions.json", "results.json"
TABLE, FAILED = "predictions.csv", "failed.csv"
_START = b'{"run":{'  # of a journal
LONGEST_LINE = 2**26  # bytes; a frame's line has a few hundred detections
MOST_THREADS = 4  # that run the network, each on a batch of its own
LONGEST_SIDE, MOST_PIXELS = 2**20, 2**28  # of a frame


def run_record(predictor: Predictor, root: Path, save: Iterable[str] = ()) -> dict:
    """What all results in a folder of outputs share; inputs are named relative to ``root``."""
    run = {
        **predictor.metadata,
        "classes": predictor.classes,
        "outputs": sorted(save),
        # The path may contain a patient's name, which could be guessed even from a hash of it, but
        # not from its number in the file system.
        "inputs": os.stat(root).st_ino,
        "format": FORMAT,
    }
    return json.loads(json.dumps(run))  # as it is read back


def check_run(folder: Path, previous: dict, current: dict) -> None:
    """Raises a ValueError that names the differences of two results of `run_record`, if any."""
    pairs = {key: (previous.get(key), current.get(key)) for key in sorted({**previous, **current})}
    differences = [
        "the folder of the inputs"  # which its number does not tell
        if key == "inputs"
        else f"{for_terminal(key)} ({reprlib.repr(before)}, now {reprlib.repr(now)})"
        for key, (before, now) in pairs.items()
        if before != now
    ]
    if differences:
        raise ValueError(
            f"{folder} holds the predictions of another run: it differs in "
            f"{', '.join(differences)}. Choose another --output, or predict as it did"
        )


def signature(source: Source) -> list[int] | None:
    """Changes when the file does; None if it is gone."""
    try:
        status = source.path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def is_done(record, source: Source) -> bool:
    """Whether an input, with the ``error`` and ``signature`` of a record or None, is done."""
    return record is not None and record.error is None and record.signature == signature(source)


def outdated(records: Iterable, sources: Iterable[Source]) -> list:
    """The records of DICOM files that failed and are gone: names change with the content."""
    names, prefix = {source.name for source in sources}, DICOM_NAME.partition("{")[0]
    failed = [record for record in records if record.error is not None]
    return [each for each in failed if each.name.startswith(prefix) and each.name not in names]


class Journal:
    """``progress.jsonl``: one line for the run, then for each input one line per frame, one per
    file written, and one at its end. A kill costs the current input: lines after the last finished
    input are cut off when the file is opened again. The tables are made from it line by line.

    Files of the user are never deleted or overwritten: a file is ours as long as it is in the
    journal, with the content that it was written with.
    """

    FILE = "progress.jsonl"

    def __init__(self, folder: str | Path, run: dict, others: Iterable[str] = ()):
        """Opens the journal of a `run_record`; ``others`` are names of files and folders that are
        written into the folder next to the tables.

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
                self._append({"run": self.run}, sync=True)
        except ValueError:
            self.close()
            raise
        self._start = self._file.tell()

    def _check_new(self):
        """A folder without a journal, or with an empty one, must not have files of our names."""
        names = sorted({PREDICTIONS, RESULTS, TABLE, FAILED, *self._other_names})
        foreign = [name for name in names if os.path.lexists(self.folder / name)]
        if foreign:
            raise ValueError(
                f"{self.folder} holds {', '.join(foreign)}, which may be yours: no {self.FILE} "
                "says that they were written here. Choose another --output"
            )

    def _read(self):
        """Indexes the inputs that are done, and cuts the file after the last of them."""
        self._file.seek(0)
        whole = end = frames = broken = 0
        files, names = {}, set()
        lines = iter(lambda: self._file.readline(LONGEST_LINE), b"")
        for number, line in enumerate(lines, 1):
            end += len(line)
            content = _parsed(line)
            # Another program's file is not to be cut, a first line that a kill cut off is.
            is_cut = line.startswith(_START) or _START.startswith(line)
            if broken == 1 or (content is None and number == 1 and not is_cut):
                raise self._damaged(1)
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
                        if not _is_frame(content, self.run):
                            raise self._damaged(number)
                        frames += 1
                        name, frame = content["image"]["file_name"], content["image"].get("frame")
                        suffix = f"#{frame:06d}" if isinstance(frame, int) else ""
                        names.add(name.removesuffix(suffix))  # as `frame_record` has it
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
        self._delete(files)  # of the input that a kill cost
        self._file.truncate(whole)
        self._file.seek(whole)

    def _add_done(self, done, start, end, frames, number):
        match done:
            case {
                "name": str(name),
                "signature": None | [int(), int()],
                "frames": int(),
                "error": None | str(),
                "target": None | str() as target,
            } if done["frames"] == frames and len(done) == 5:
                self._check_name(name, number)
                self._check_name(target or name, number)
                self._done[name] = SimpleNamespace(**done, start=start, end=end)  # bytes
            case _:
                raise self._damaged(number)

    def _check_name(self, name, number):
        path = PurePosixPath(name)
        leads_out = path.is_absolute() or ".." in path.parts or Path(name).drive
        if leads_out or not path.parts or "\0" in name:
            raise self._damaged(number, f"{name!r} leads out of the folder")

    def _damaged(self, number, reason="is no line that was written here"):
        advice = "Choose another --output, and do not trust the results in this one"
        return ValueError(f"{self._path}, line {number}: {reason}. {advice}")

    def is_done(self, source: Source) -> bool:
        return is_done(self._done.get(source.name), source)

    def begin(self, name: str) -> None:
        """Deletes an input's files of before it changed, except those that the user has changed."""
        lines = self._lines(self._done[name]) if name in self._done else ()
        self._delete({self.folder / li["file"]: li["sha256"] for li in lines if "file" in li})

    def _delete(self, files: dict[Path, str]):
        """Deletes files that still have the SHA-256 that was written. The others stay, and so do
        files that differ from them in the suffix only: the frame of a corrected LabelMe file.
        """
        ours, changed = [], set()
        for path in filter(os.path.lexists, files):
            is_file = self.holds(path) and path.is_file() and not path.is_symlink()
            if is_file and file_sha256(path) == files[path]:
                ours.append(path)
            else:
                changed.add(path.with_suffix(""))
        for path in ours:
            if path.with_suffix("") not in changed:
                path.unlink()

    def holds(self, path: Path) -> bool:
        """Whether no link leads a path in the folder elsewhere."""
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

    def warn_of_others(self, sources: Iterable[Source]) -> None:
        """Log which inputs that are done are not among these; their predictions stay. Another
        medium in the place of the first may have the same number of the folder."""
        names = {source.name for source in sources}
        predicted = [name for name, done in self._done.items() if done.frames]
        if others := [name for name in predicted if name not in names]:
            logger.warning(
                "%s also holds the predictions of inputs that are not among these (%d): %s. If "
                "they are another patient's, choose another --output",
                *(self.folder, len(others), few([for_terminal(name) for name in others], 3)),
            )

    def forget_outdated(self, sources: Iterable[Source]) -> None:
        """Deletes the files and records of inputs that are `outdated` among all sources."""
        for done in outdated(self._done.values(), sources):
            self.begin(done.name)
            del self._done[done.name]

    def finish(
        self, name: str, signature: list | None, frames: int, error: str | None, target: str | None
    ) -> None:
        """Notes that an input is done: it, its frames and the files of its target are on disk."""
        done = dict(name=name, signature=signature, frames=frames, error=error, target=target)
        self._append({"done": done}, sync=True)
        end = self._file.tell()
        self._done[name] = SimpleNamespace(**done, start=self._start, end=end)
        self._start = end

    def _append(self, content, sync=False):
        self._file.write(json.dumps(content, separators=(",", ":")).encode() + b"\n")
        if sync:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self):
        """Closes the file and unlocks the folder."""
        self._file.close()
        self._lock.release()

    def frames(self) -> Iterator[tuple[dict, list[dict]]]:
        """Yields the image record with its ``id``, and the annotations, of all inputs by name."""
        lines = (line for _, done in sorted(self._done.items()) for line in self._lines(done))
        for number, line in enumerate((line for line in lines if "image" in line), 1):
            texts = {k: as_utf8(v) for k, v in line["image"].items() if isinstance(v, str)}
            yield {"id": number, **line["image"], **texts}, line["annotations"]

    def failed(self) -> list[tuple[str, str]]:
        """Name and reason of each input that was not, or not wholly, read."""
        return [(n, done.error) for n, done in sorted(self._done.items()) if done.error is not None]

    def write_tables(self, metadata: dict, classes: list[str]) -> None:
        """Writes ``predictions.json``, ``predictions.csv``, of a detector ``results.json``, and on
        failures ``failed.csv``.
        """
        with atomic_file(self.folder / PREDICTIONS) as file:
            file.write(
                json.dumps(outputs.coco_head(metadata, classes))[:-1].encode() + b',\n"images": ['
            )
            _write_list(file, (image for image, _ in self.frames()))
            file.write(b'],\n"annotations": [')
            _write_list(file, ({"id": n, **a} for n, a in enumerate(self._annotations(), 1)))
            file.write(b"]}\n")
        if metadata["tau"] is not None:
            with atomic_file(self.folder / RESULTS) as file:
                file.write(b"[")
                _write_list(file, self._annotations("file_name"))
                file.write(b"]\n")
        self._write_csv(TABLE, self._rows(metadata, classes))
        if failed := self.failed():
            self._write_csv(FAILED, ({"file": name, "reason": why} for name, why in failed))
        else:
            (self.folder / FAILED).unlink(missing_ok=True)

    def _annotations(self, *keys):
        """Yields all annotations with the id, and values of other keys, of their image."""
        for image, annotations in self.frames():
            shared = {"image_id": image["id"], **{key: image[key] for key in keys}}
            yield from ({**shared, **annotation} for annotation in annotations)

    def _rows(self, metadata, classes):
        for image, annotations in self.frames():
            try:
                yield _row(image, annotations, metadata, classes)
            except ValueError as error:  # a mask that was not written here
                raise BadInputError(self._path, f"of {image['file_name']!r}, {error}") from error

    def _write_csv(self, file_name, rows):
        with atomic_file(self.folder / file_name) as file:
            for number, row in enumerate(rows):
                header = "" if number else csv_line(row)
                file.write((header + csv_line(row.values())).encode("utf-8", "backslashreplace"))


def _write_list(file, records):
    for number, record in enumerate(records):
        file.write((b",\n" if number else b"\n") + json.dumps(record).encode())


def _row(image, annotations, metadata, classes):
    """The row of an image in predictions.csv."""
    row = {key: image.get(key) for key in ("file_name", "frame", "time", "width", "height")}
    if annotations and "probabilities" in annotations[0]:
        best = annotations[0]
        row |= {"class": classes[best["category_id"] - 1], **_best_score(annotations, metadata)}
        row |= dict(zip((f"probability {c}" for c in classes), best["probabilities"], strict=True))
    else:
        shown = outputs.above_threshold(annotations, metadata["tau"])
        row |= {"lesions": len(shown), **_best_score(annotations, metadata)}
        row |= {"area_percent": _area_percent(shown, image)}
        if "alarm_rule" in metadata:
            is_video = image.get("time") is not None
            row["alarms"] = sum(a["alarm"] for a in annotations) if is_video else None
    return row | {key: metadata[key] for key in ("tau", "weights_sha256", "version")}


def _best_score(annotations, metadata):
    """The highest scores in an image."""
    return {key: max((a[key] for a in annotations), default=0) for key in _score_keys(metadata)}


def _score_keys(metadata):
    """The keys of an annotation's scores."""
    return ("score", "raw_score") if "score_map" in metadata else ("score",)


def _area_percent(annotations, image):
    """What the masks cover of the image, or the boxes if there are no masks."""
    size = image["height"], image["width"]
    masks = [to_rle(a["segmentation"], *size) for a in annotations if "segmentation" in a] or [
        mask_util.frPyObjects(np.array([a["bbox"]], float), *size)[0] for a in annotations
    ]
    area = float(mask_util.area(mask_util.merge(masks))) if masks else 0.0
    return round(100 * area / np.prod(size), 4)


def _parsed(line):
    """The dict in a line; None if it is none, or not whole."""
    if not line.endswith(b"\n"):
        return None
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(line)
        return content if isinstance(content, dict) else None


def _is_frame(content, run):
    """Whether `Journal.add` writes such a line in a run."""
    match content:
        case {
            "image": {"file_name": str(), "width": int(w), "height": int(h)} as image,
            "annotations": list(annotations),
        } if 0 < w <= LONGEST_SIDE and 0 < h <= LONGEST_SIDE and w * h <= MOST_PIXELS:
            texts = "file_name", "sequence_id"
            others = [value for key, value in image.items() if key not in texts]
            lists = [v if isinstance(v, list) else [v] for v in others if v is not None]
            is_named = isinstance(image.get("sequence_id", ""), str)
            return (
                is_named
                and all(map(_are_numbers, lists))
                and all(_is_annotation(annotation, w, h, run) for annotation in annotations)
            )
    return False


def _is_annotation(annotation, width, height, run):
    classes = len(run["classes"])
    match annotation:
        case {"category_id": int(category), "probabilities": list(values)}:
            fits = len(values) == classes and _are_numbers(values)
        case {"category_id": int(category), "bbox": [x, y, w, h], "area": area} if _are_numbers(
            [x, y, w, h, area]
        ):
            inside = min(x, y, w, h) >= 0 and x + w <= width + 1 and y + h <= height + 1
            fits = inside and isinstance(annotation.get("segmentation", {}), dict)
            if "alarm_rule" in run:
                kinds = type(annotation.get("track_id", 1)), type(annotation.get("alarm", True))
                fits = fits and kinds == (int, bool)
        case _:
            return False
    scores = map(annotation.get, _score_keys(run))
    return fits and 1 <= category <= classes and _are_numbers(scores)


def _are_numbers(values):
    """Whether all values are finite numbers."""
    try:
        return all(type(value) in (int, float) and math.isfinite(value) for value in values)
    except OverflowError:  # an integer beyond what a float can be
        return False


@dataclass(frozen=True)
class Item:
    """A frame of an input, or the input's end, where ``frame`` is None and ``error`` says why it,
    or the rest of it, could not be read. Pixels reach an output only if ``show_pixels``.
    """

    source: Source
    signature: list[int] | None  # of the file when reading began
    show_pixels: bool = True
    frame: Frame | None = None
    error: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its frame."""
        return self.frame.image.shape[:2]


def predictions(
    predictor: Predictor, sources: Iterable[Source], batch_size: int
) -> Iterator[tuple[Item, list[dict] | None]]:
    """Yields each frame of the inputs in turn with its annotations, see `outputs.records`, and at
    the end of an input None. While the caller works on one frame, the network is at the next ones
    and the decoder at those after them; the number of waiting frames is bounded.

    Raises:
        ValueError: the network cannot run on an image, which is named.
    """
    alarms, is_on_cpu = None, predictor.cfg.MODEL.DEVICE == "cpu"
    with (
        contextlib.closing(ahead(_read(sources, predictor), 2 * batch_size)) as items,
        contextlib.closing(
            in_order(partial(_annotated, predictor), batches(items, batch_size), is_on_cpu)
        ) as results,
    ):
        for item, annotations in itertools.chain.from_iterable(results):
            frame = item.frame
            if frame is not None and predictor.alarm_rule is not None and frame.time is not None:
                alarms = Alarms(predictor.alarm_rule) if frame.number == 0 else alarms
                alarms.annotate(annotations, frame.time)
            yield item, annotations


def _annotated(predictor, batch):
    """The items of a batch, each with the annotations of its frame, or None."""
    try:
        return [
            (item, None)
            if item.frame is None
            else (item, outputs.records(predictor, output, *item.size, item.frame.view))
            for item, output in predictor.predict(batch)
        ]
    except BadInputError:  # names the graph's file
        raise
    except (RuntimeError, ValueError) as error:  # of too little memory, of a graph's output
        names = ", ".join(item.source.name for item, image in batch if image is not None)
        raise ValueError(f"{names}: the network failed: {error}") from error


def in_order(function: Callable, items: Iterable, is_on_cpu: bool) -> Iterator:
    """Yields the function's value of each item in turn, which several threads compute at once, on a
    CPU each on its share of the cores: a network of small layers does not keep two of them busy.
    """
    cores = torch.get_num_threads()
    number = max(2, min(MOST_THREADS, cores)) if is_on_cpu else 2
    share = max(1, cores // number)
    waiting = collections.deque()
    pool = ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(share,))
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


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
        except Exception as error:  # readers raise nearly anything on damaged files
            item = replace(item, error=reason_of(error, source.kind == "dicom"))
        yield item, None


def reason_of(error: Exception, is_dicom: bool) -> str:
    """Why an input cannot be predicted."""
    if isinstance(error, BadInputError):
        return error.reason
    if isinstance(error, ModuleNotFoundError):
        return f"needs {error.name}: {install_extra('deploy')}"
    # An unknown error may quote a patient's data from a DICOM file.
    message = "" if is_dicom else f": {error}"
    return f"cannot be predicted ({type(error).__name__}{message})"


def ahead(items: Iterable, number: int) -> Iterator:
    """Yields items that another thread makes ahead; at most ``number`` of them wait."""
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
    """What a call of `predict_files` did."""

    images: int  # images and frames predicted now
    skipped: int  # inputs that an earlier call had done
    failed: list[tuple[str, str]]  # name and reason of each input not read, or not to its end
    kept: list[Path] = field(default_factory=list)  # files of the user, left as they are


def predict_files(
    predictor: Predictor,
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    save: Iterable[str] = (),
    batch_size: int = 1,
    follow_links: bool = False,
) -> Summary:
    """Predicts on images, videos and DICOM files of `find_inputs`, and writes the tables of
    `Journal.write_tables` and those of ``OUTPUTS`` that ``save`` names. An input that cannot be
    read is listed and the others go on. Called again with the same output, it goes on where it was
    interrupted. The network sees ``batch_size`` images at once, if they are of one size to it.

    Raises:
        FileNotFoundError, ValueError: see `find_inputs` and `Journal`; or masks are requested from
            a model without masks.
        OSError: something cannot be written. Finished inputs stay finished.
    """
    if "masks" in save and not predictor.has_masks:
        raise ValueError(f"{predictor.metadata['model']} gives no masks")
    output = Path(output)
    leave_out = [output / kind for kind in outputs.OUTPUTS]
    root, sources = find_inputs(inputs, leave_out=leave_out, follow_links=follow_links)
    run = run_record(predictor, root, save)
    with contextlib.closing(Journal(output, run, outputs.OUTPUTS)) as journal:
        journal.forget_outdated(sources)
        journal.warn_of_others(sources)
        todo = [source for source in sources if not journal.is_done(source)]
        names = [source.name for source in sources]
        folder = outputs.OutputFolder(output, save, names, journal.targets(), predictor)
        images = _predict_and_write(predictor, todo, folder, journal, batch_size)
        journal.write_tables(predictor.metadata, predictor.classes)
        return Summary(images, len(sources) - len(todo), journal.failed(), folder.kept)


def _predict_and_write(predictor, sources, folder, journal, batch_size) -> int:
    """Returns the number of images predicted."""
    stills = all(source.kind == "image" for source in sources)
    written, number, images = None, 0, 0
    with (
        contextlib.closing(predictions(predictor, sources, batch_size)) as items,
        contextlib.ExitStack() as files,
        tqdm(desc="Predicting", unit="image", total=len(sources) if stills else None) as bar,
    ):
        for item, annotations in items:
            name = item.source.name
            if written is None:
                written = outputs.InputOutputs(folder, item.source, journal, item.show_pixels)
                files.enter_context(written)
            if item.frame is not None:
                written.add(item.frame, annotations)
                journal.add(outputs.frame_record(name, item.frame), annotations)
                number += 1
                bar.update()
                continue
            files.close()  # its files are whole before it is noted as done
            target = folder.target(name) if number else None
            error = item.error or written.error
            journal.finish(name, item.signature, number, error, target)
            if error:
                tqdm.write(for_terminal(f"{name}: {error}", one_line=True))
            written, number, images = None, 0, images + number
    return images
