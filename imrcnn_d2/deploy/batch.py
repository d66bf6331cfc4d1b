"""Many inputs, one after the other: what fails is listed, what is done is not done again."""

import contextlib
import json
import math
import os
import queue
import reprlib
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pycocotools.mask as mask_util
from torch import Tensor
from tqdm import tqdm

from imrcnn_d2.data.endoscope_view import View
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
    coco_head,
    counted,
    frame_record,
    output_folders,
    records,
)
from imrcnn_d2.utils.files import BadInputError, atomic_file, csv_line, file_sha256, lock_folder

__all__ = [
    "FAILED",
    "PREDICTIONS",
    "TABLE",
    "Item",
    "Journal",
    "Summary",
    "ahead",
    "check_run",
    "in_utf8",
    "is_done",
    "outdated",
    "predict_files",
    "predictions",
    "printable",
    "run_record",
    "signature",
]


# Of the records that are read back. 1 knew DICOM files by their names, and not what was written.
FORMAT = 2


def run_record(predictor, root, save=()):
    """
    Args:
        predictor (Predictor):
        root (Path): folder that the names of inputs are relative to.
        save (iterable of str): of ``OUTPUTS``.

    Returns:
        dict: what all results in a folder of outputs share, of JSON types.
    """
    run = {
        **predictor.about,
        "runtime": predictor.asked_runtime,  # "auto" may find another the next time
        "classes": predictor.classes,
        "outputs": sorted(save),
        # Names are relative to it. Its path may hold a patient's name, which even a hash of it
        # would give away to whoever guesses: its number in the file system does not.
        "inputs": os.stat(root).st_ino,
        "format": FORMAT,
    }
    return json.loads(json.dumps(run))  # as it is read back


def check_run(folder, there, now):
    """
    Args:
        folder (Path): of outputs.
        there, now (dict): of the results in it and of those to come, see :func:`run_record`.

    Raises:
        ValueError: they are not of one run; the error says what differs.
    """
    differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if differing:
        raise ValueError(
            f"{folder} holds the predictions of another run: it differs in "
            + ", ".join(
                f"{printable(k)} ({reprlib.repr(there.get(k))}, now {reprlib.repr(now.get(k))})"
                for k in sorted(differing)
            )
            + ". Choose another --output"
        )


def in_utf8(name):
    """str: a file's name as UTF-8 has it, where the file system's is none."""
    return name.encode(errors="backslashreplace").decode()


def printable(name):
    """str: a name for a terminal, which obeys control characters; these are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def signature(source):
    """
    Args:
        source (Source):

    Returns:
        list[int] or None: what changes when the file does; None where it is gone.
    """
    try:
        status = source.path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def is_done(there, source):
    """
    Args:
        there (object or None): what is on record of an input, with ``error`` and ``signature``.
        source (Source): the input.

    Returns:
        bool: whether it was done without an error and has not been changed since.
    """
    return there is not None and there.error is None and there.signature == signature(source)


def outdated(records, sources):
    """
    Find the DICOM files that failed and are gone. Known by their content, they are others once they
    are repaired; by their name, another input takes its own place.

    Args:
        records (iterable of object): what is on record of inputs, with ``error`` and ``name``.
        sources (iterable of Source): all inputs there are.

    Returns:
        list: those of the records.
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
    ``progress.jsonl``: a line that says what the run is, then for each input a line a frame, one
    for each file written, and one that says it is done. A kill costs the input at work, never more:
    what follows the last input that is done is cut off when the file is opened again.

    The tables of all results are made from it, a line in memory at a time. It also tells the files
    that were written from those of the user, which are never deleted or overwritten: a file is ours
    as long as it is in the journal, with the content that it was written with.
    """

    FILE = "progress.jsonl"

    def __init__(self, folder, run, others=()):
        """
        Args:
            folder (Path): of the outputs; made if it does not exist.
            run (dict): what all results in the folder share, see :func:`run_record`.
            others (iterable of str): what is written into the folder besides the tables: names of
                files, and of folders of files.

        Raises:
            ValueError: the folder has the results of another run, or files of these names that no
                run wrote; one is writing into it; or its journal is damaged.
        """
        self.folder, self.run, self._others = Path(folder), run, set(others)
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
        """Of a folder without a journal, or with an empty one."""
        names = sorted({PREDICTIONS, TABLE, FAILED, *self._others})
        foreign = [name for name in names if os.path.lexists(self.folder / name)]
        if foreign:
            raise ValueError(
                f"{self.folder} holds {', '.join(foreign)}, and no {self.FILE} that says that they "
                "were written here: they may be yours. Choose another --output"
            )

    def _read(self):
        """Index what is there; the file is then cut and stands at its end."""
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
            elif broken and "done" in content:  # what a kill cuts off has nothing behind it
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
                        if PurePosixPath(name).parts[0] not in self._others:
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
                self._done[name] = _Input(name, signature, start, end, frames, error, target)
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

    def is_done(self, source):
        """
        Args:
            source (Source):

        Returns:
            bool: whether it was done without an error and has not been changed since.
        """
        return is_done(self._done.get(source.name), source)

    def begin(self, source):
        """
        Delete the files of what an input was before it changed, but for those that the user has
        changed.

        Args:
            source (Source):
        """
        if source.name in self._done:
            self._delete(self._files(self._done[source.name]))

    def _files(self, done):
        """Path -> SHA-256 of each file that was written of an input that is done."""
        lines = [line for line in self._lines(done) if "file" in line]
        return {self.folder / line["file"]: line["sha256"] for line in lines}

    def _delete(self, files):
        """
        Delete files that are as they were written; others stay, and so does what has their name in
        their folder: the frame that a corrected LabelMe file is of.

        Args:
            files (dict[Path, str]): -> SHA-256 of what was written.
        """
        there = {path: digest for path, digest in files.items() if os.path.lexists(path)}
        ours = {path for path, digest in there.items() if self._is_as_written(path, digest)}
        changed = {path.with_suffix("") for path in there.keys() - ours}
        for path in ours:
            if path.with_suffix("") not in changed:
                path.unlink()

    def _is_as_written(self, path, digest):
        is_file = self.holds(path) and path.is_file() and not path.is_symlink()
        return is_file and file_sha256(path) == digest

    def holds(self, path):
        """
        Args:
            path (Path): in the folder, by its name.

        Returns:
            bool: whether no link leads it elsewhere.
        """
        return path.parent.resolve().is_relative_to(self.folder.resolve())

    def _lines(self, done):
        with open(self._path, "rb") as file:
            file.seek(done.start)
            while file.tell() < done.end:
                yield json.loads(file.readline())

    def add(self, record, annotations):
        """
        Args:
            record (dict): COCO image record of a frame, without its id.
            annotations (list[dict]): what was found in it.
        """
        self._append({"image": record, "annotations": annotations})

    def add_file(self, path, digest):
        """
        Note a file of the input at work, before it takes its name.

        Args:
            path (Path): in the folder.
            digest (str): SHA-256 of its content.
        """
        name = path.relative_to(self.folder).as_posix()
        self._append({"file": name, "sha256": digest})
        self._file.flush()

    def targets(self):
        """
        Returns:
            dict[str, str]: by name, what the files of each input that is done are called.
        """
        return {done.name: done.target for done in self._done.values() if done.target}

    def forget_outdated(self, sources):
        """
        Args:
            sources (iterable of Source): all inputs there are, see :func:`outdated`.
        """
        for done in outdated(self._done.values(), sources):
            self._delete(self._files(done))
            del self._done[done.name]

    def finish(self, source, signature, frames, error=None, target=None):
        """
        Note that an input is done: it and its frames are now on disk.

        Args:
            source (Source):
            signature (list or None): of the file as it was read, see :func:`signature`.
            frames (int): that were predicted.
            error (str or None): why it, or the rest of it, could not be.
            target (str or None): what its files are called, if there are any.
        """
        name = source.name
        done = dict(name=name, signature=signature, frames=frames, error=error, target=target)
        self._append({"done": done})
        self._sync()
        end = self._file.tell()
        self._done[name] = _Input(**done, start=self._start, end=end)
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
        for done in self._by_name():
            for line in self._lines(done):
                if "image" in line:
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
        self._write_csv(TABLE, self._rows(about, classes))
        failed = [{"file": name, "reason": reason} for name, reason in self.failed()]
        if failed:
            self._write_csv(FAILED, failed)
        else:
            (self.folder / FAILED).unlink(missing_ok=True)

    def _rows(self, about, classes):
        for image, found in self.frames():
            try:
                yield _row(image, found, about, classes)
            except ValueError as error:  # a mask that was not written here
                raise BadInputError(self._path, f"of {image['file_name']!r}, {error}") from error

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
    masks = [to_rle(a["segmentation"], *size) for a in annotations if "segmentation" in a] or [
        mask_util.frPyObjects(np.array([a["bbox"]]), *size)[0] for a in annotations
    ]
    area = float(mask_util.area(mask_util.merge(masks))) if masks else 0.0
    return round(100 * area / np.prod(size), 4)


def _is_start(line):
    """Whether it can be what a kill left of a journal's first line."""
    start = b'{"run":{'
    return line.startswith(start) or start.startswith(line)


def _parsed(line):
    """What a line holds, a dict; None if it is none, or not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _input_name(image):
    """Of the input that a frame is of, see :func:`frame_record`."""
    number = image.get("frame")
    return image["file_name"].removesuffix(f"#{number:06d}" if isinstance(number, int) else "")


def _is_frame(content, classes):
    """Whether it is what :meth:`Journal.add` writes of a model with so many classes."""
    match content:
        case {"image": {"file_name": str(), "width": int(w), "height": int(h)} as image} if (
            0 < w <= LONGEST_SIDE and 0 < h <= LONGEST_SIDE and w * h <= MOST_PIXELS
        ):
            others = [value for key, value in image.items() if key != "file_name"]
            found = content["annotations"]
        case _:
            return False
    lists = [value if isinstance(value, list) else [value] for value in others if value is not None]
    if not all(map(_are_numbers, lists)):
        return False
    return isinstance(found, list) and all(_is_annotation(a, w, h, classes) for a in found)


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
    """Whether all of a list are finite."""
    try:
        return all(type(value) in (int, float) and math.isfinite(value) for value in values)
    except OverflowError:  # an integer beyond what a float can be
        return False


@dataclass(frozen=True)
class Item:
    """
    A frame on its way, or the end of its input.

    Attributes:
        source (Source): what it is of.
        signature (list[int] or None): of the file when reading began, see :func:`signature`.
        pictures (bool): False if its pixels must not reach an output.
        frame (Frame or None): None at the end of an input.
        view (View or None): what of the frame the network sees; None for all.
        prepared (Tensor or None): what the network sees.
        error (str or None): at the end of an input, why it, or the rest of it, could not be read.
    """

    source: Source
    signature: list | None
    pictures: bool = True
    frame: Frame | None = None
    view: View | None = None
    prepared: Tensor | None = None
    error: str | None = None


def predictions(predictor, sources, batch_size):
    """
    Predict on inputs in turn. While the caller works on what it was given, the network is at the
    next frames and the decoder at those after them: the whole takes as long as the slowest of the
    three. What waits in between does not grow with the inputs.

    Args:
        predictor (Predictor):
        sources (iterable of Source):
        batch_size (int): images that the network sees at once, where they are of one size to it.

    Yields:
        tuple[Item, list[dict] or None]: each frame with what is found in it, see :func:`records`,
        and behind the last frame of an input its end, with None. An input that cannot be read has
        its end alone.
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
                yield item, records(predictor, output, *size, item.view)


def _read(sources, predictor):
    """Yields the items of all sources in turn."""
    for source in sources:
        item = Item(source, signature(source))
        try:
            if source.kind == "dicom":
                item = replace(item, pictures=not may_show_patient(source.path))
            views = predictor.views()
            for frame in read_frames(source):
                view = views(frame.image)
                prepared = predictor.prepare(frame.image, view)
                yield replace(item, frame=frame, view=view, prepared=prepared)
        except BadInputError as error:
            item = replace(item, error=error.reason)
        except ModuleNotFoundError as error:  # of the extra [deploy]
            item = replace(item, error=f"needs {error.name}: pip install {error.name}")
        except Exception as error:  # readers raise nearly anything on damaged files
            # What an unknown error quotes of a DICOM file may be the patient's.
            said = "" if source.kind == "dicom" else f": {error}"
            item = replace(item, error=f"cannot be predicted ({type(error).__name__}{said})")
        yield item


def ahead(items, number):
    """
    Make items in a thread of their own, while those before are worked on.

    Args:
        items (iterable):
        number (int): of them that may wait.

    Yields:
        what ``items`` yields; what it raises is raised here.
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
        images (int): images and frames predicted now.
        skipped (int): inputs that an earlier call had done.
        failed (list[tuple[str, str]]): name and reason of each input that could not be read, or not
            to its end.
        kept (list[Path]): files that the user has changed or put there: they were left as they are.
    """

    images: int
    skipped: int
    failed: list
    kept: list = field(default_factory=list)


def predict_files(predictor, inputs, output, *, save=(), batch_size=1, follow_links=False):
    """
    Predict on images, videos and DICOM files, and write the tables of :meth:`Journal.write_tables`
    and what else is wished. An input that cannot be read is listed and the others go on. Called
    again with the same output, it goes on where it was interrupted.

    Args:
        predictor (Predictor):
        inputs (list[str or Path]): see :func:`find_inputs`.
        output (str or Path): folder; made if it does not exist.
        save (iterable of str): of ``OUTPUTS``.
        batch_size (int): images that the network sees at once, where they are of one size to it.
        follow_links (bool): see :func:`find_inputs`.

    Returns:
        Summary:

    Raises:
        FileNotFoundError: there is no such input.
        ValueError: the folder has the results of another run, files that no run wrote, or one is
            writing into it; or masks are asked for of a model that gives none.
        OSError: something cannot be written. What is done stays done.
    """
    if "masks" in save and not predictor.outlines:
        raise ValueError(f"{predictor.about['model']} outlines nothing: it gives no masks")
    output = Path(output)
    root, sources = find_inputs(inputs, leave_out=output_folders(output), follow_links=follow_links)
    run = run_record(predictor, root, save)
    with contextlib.closing(Journal(output, run, OUTPUTS)) as journal:
        journal.forget_outdated(sources)
        todo = [source for source in sources if not journal.is_done(source)]
        names = [source.name for source in sources]
        to = OutputFolder(
            output, save, predictor.about, predictor.classes, names, taken=journal.targets()
        )
        images = _predict(predictor, todo, to, journal, batch_size)
        journal.write_tables(predictor.about, predictor.classes)
        return Summary(images, len(sources) - len(todo), journal.failed(), to.kept)


def _predict(predictor, sources, to, journal, batch_size):
    """Number of images predicted."""
    stills = all(source.kind == "image" for source in sources)
    found_in = predictions(predictor, sources, batch_size)
    outputs, number, images = None, 0, 0
    with (
        contextlib.closing(found_in),
        contextlib.ExitStack() as files,
        tqdm(desc="Predicting", unit="image", total=len(sources) if stills else None) as bar,
    ):
        for item, found in found_in:
            source = item.source
            if outputs is None:
                outputs = files.enter_context(
                    InputOutputs(to, source, journal, pictures=item.pictures)
                )
            if item.frame is not None:
                outputs.add(item.frame, found)
                journal.add(frame_record(source.name, item.frame, item.view), found)
                number += 1
                bar.update()
                continue
            files.close()  # its files are whole before it is noted as done
            target = to.target(source.name) if number else None
            error = item.error or outputs.error
            journal.finish(source, item.signature, number, error, target)
            if error:
                tqdm.write(printable(f"{source.name}: {error}"))
            outputs, number, images = None, 0, images + number
    return images
