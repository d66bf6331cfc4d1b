"""Predictions as Parquet files, a row an image, that several processes write into one folder."""

import contextlib
import hashlib
import json
import uuid
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # of the extra [ray]
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imrcnn_d2.evaluation.files import atomic_file

from .identity import check_run, in_utf8, input_key, is_done, outdated
from .records import frame_record

__all__ = ["PARTS", "Parts", "image_row", "input_row", "write_part"]

PARTS = "predictions.parquet"
ROWS = 1024  # in memory at a time
_META = b"imrcnn_d2"
_RLE = pa.struct({"size": pa.list_(pa.int32(), 2), "counts": pa.string()})
_SCHEMA = pa.schema(
    {
        "file_name": pa.string(),
        "frame": pa.int32(),
        "time": pa.float64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "view": pa.list_(pa.int32()),
        "boxes": pa.list_(pa.list_(pa.float64(), 4)),
        "scores": pa.list_(pa.float64()),
        "classes": pa.list_(pa.string()),
        "masks": pa.list_(_RLE),
        "areas": pa.list_(pa.float64()),
        "probabilities": pa.list_(pa.float64()),
        "error": pa.string(),
        "tau": pa.float64(),
        "weights_sha256": pa.string(),
        "config_sha256": pa.string(),
        "version": pa.string(),
        "input": pa.string(),
        "signature": pa.list_(pa.int64()),
    }
)
# Column -> what COCO calls it, of each detection.
_DETECTION = {"boxes": "bbox", "masks": "segmentation", "areas": "area"}


def image_row(item, annotations, classes):
    """
    Args:
        item (Item): of a frame.
        annotations (list[dict]): what was found in it, see :func:`records`.
        classes (list[str]): names.

    Returns:
        dict: a row, but for what all rows share. ``boxes`` (xywh in pixels), ``scores``,
        ``classes``, ``masks`` (compressed RLE) and ``areas`` have an item a detection, by falling
        score, down to MODEL.ROI_HEADS.SCORE_THRESH_TEST. Of a recognition model, the likeliest
        class and its score, and the ``probabilities`` of all.
    """
    row = {**_of_input(item), **frame_record(item.source.name, item.frame, item.view)}
    row["scores"] = [a["score"] for a in annotations]
    row["classes"] = [classes[a["category_id"] - 1] for a in annotations]
    for column, key in _DETECTION.items():
        if not annotations or key in annotations[0]:
            row[column] = [a[key] for a in annotations]
    if annotations and "probabilities" in annotations[0]:
        row["probabilities"] = annotations[0]["probabilities"]
    return row


def input_row(item):
    """dict: a row of an input that has no image, or not all of them; ``error`` says why."""
    return {**_of_input(item), "file_name": item.source.name, "error": item.error}


def _of_input(item):
    return {"input": input_key(item.source.name), "signature": item.signature}


def write_part(folder, run, sources, rows):
    """
    Write a file of the folder, which appears when all of its rows are there. Written once more, it
    takes its own place.

    Args:
        folder (Path): made if it does not exist.
        run (dict): see :func:`run_record`.
        sources (list[Source]): what the rows are of.
        rows (iterable of dict): of :func:`image_row` and :func:`input_row`.

    Raises:
        OSError: it cannot be written.
    """
    keys = " ".join(input_key(source.name) for source in sources)
    name = f"part-{hashlib.sha256(keys.encode()).hexdigest()[:16]}.parquet"
    shared = {key: run[key] for key in _SCHEMA.names if key in run}
    with _part(folder / name, run) as part:
        waiting = []
        for row in rows:
            waiting.append({**row, "file_name": in_utf8(row["file_name"]), **shared})
            if len(waiting) == ROWS:
                part.write_table(pa.Table.from_pylist(waiting, _SCHEMA))
                waiting = []
        part.write_table(pa.Table.from_pylist(waiting, _SCHEMA))


@contextlib.contextmanager
def _part(path, run):
    schema = _SCHEMA.with_metadata({_META: json.dumps(run)})
    # A process that was thought dead may still be writing the same file.
    mark = f".{uuid.uuid4().hex[:8]}"
    with (
        atomic_file(path, mark) as file,
        pq.ParquetWriter(file, schema, compression="zstd") as part,
    ):
        yield part


@dataclass
class _Input:
    """One that has rows in a file."""

    path: Path
    name: str
    signature: list | None
    error: str | None = None


class Parts:
    """Which inputs the files of a folder have the predictions of."""

    def __init__(self, folder, run):
        """
        Args:
            folder (Path): need not exist. What a kill left half written is deleted, and what is
                there twice once.
            run (dict): see :func:`run_record`.

        Raises:
            ValueError: it has the results of another run, or a file that is damaged.
        """
        self._run, self._inputs, repeated = run, {}, defaultdict(set)
        for path in sorted(folder.glob("*.parquet")):
            for row in _rows(path, run):
                there = self._inputs.setdefault(
                    row["input"], _Input(path, row["file_name"], row["signature"])
                )
                if there.path != path:  # the actors of a killed run lived on for a moment
                    repeated[path].add(row["input"])
                elif row["error"] is not None:
                    there.name, there.error = row["file_name"], row["error"]
        for path in folder.glob("part-*.parquet*.tmp"):
            path.unlink(missing_ok=True)
        for path, keys in repeated.items():
            _drop(path, keys, run)

    def is_done(self, source):
        """
        Args:
            source (Source):

        Returns:
            bool: whether it was done without an error and has not been changed since.
        """
        return is_done(self._inputs.get(input_key(source.name)), source)

    def failed(self):
        """
        Returns:
            list[tuple[str, str]]: name and reason of each input that was not, or not wholly, read.
        """
        failed = [there for there in self._inputs.values() if there.error is not None]
        return sorted((there.name, there.error) for there in failed)

    def drop(self, sources, among):
        """
        Take the rows of inputs that are to be done anew, and of :func:`outdated` ones, out of the
        files.

        Args:
            sources (iterable of Source): to be done anew.
            among (iterable of Source): all inputs there are.
        """
        gone = outdated(self._inputs.values(), among)
        stale = defaultdict(set)
        for key in {input_key(one.name) for one in (*sources, *gone)}:
            if key in self._inputs:
                stale[self._inputs.pop(key).path].add(key)
        for path, keys in stale.items():
            _drop(path, keys, self._run)


def _rows(path, run):
    """What :class:`Parts` needs to know of each row."""
    try:
        with pq.ParquetFile(path) as file:
            check_run(path.parent, _run(file), run)
            columns = ["input", "signature", "file_name", "error"]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    if row["input"] is None or row["file_name"] is None:
                        raise pa.ArrowInvalid("a row names no input")
                    yield row
    except (pa.ArrowException, UnicodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # it cannot be opened
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged ({reason}). Remove it: its inputs are done anew"
        ) from error


def _run(file):
    """What :func:`write_part` noted of the run; nothing where it did not write the file."""
    schema = file.schema_arrow
    try:
        there = json.loads((schema.metadata or {})[_META])
    except (KeyError, ValueError, RecursionError):
        return {}
    return there if isinstance(there, dict) and schema.equals(_SCHEMA) else {}


def _drop(path, keys, run):
    keys, left = pa.array(sorted(keys)), 0
    with pq.ParquetFile(path) as file, _part(path, run) as part:
        for batch in file.iter_batches(ROWS):
            table = pa.Table.from_batches([batch])
            table = table.filter(pc.invert(pc.is_in(table["input"], value_set=keys)))
            part.write_table(table)
            left += len(table)
    if not left:
        path.unlink()
