"""Millions of images and frames: the same prediction on many processes or machines, by Ray Data."""

import contextlib
import hashlib
import json
import logging
import math
import os
import uuid
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # of the extra [ray]
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray  # of the extra [ray]
import ray.data
from tqdm import tqdm

from imrcnn_d2.deploy.batch import (
    Item,
    Summary,
    check_run,
    in_utf8,
    is_done,
    outdated,
    predictions,
    printable,
    run_record,
    signature,
)
from imrcnn_d2.deploy.inputs import Source, find_inputs, input_key
from imrcnn_d2.deploy.outputs import frame_record, output_folders
from imrcnn_d2.deploy.predictor import Predictor
from imrcnn_d2.engine.train_step import keep_freed_memory
from imrcnn_d2.utils.files import atomic_file, lock_folder

__all__ = ["PARTS", "Parts", "image_row", "input_row", "predict_with_ray", "write_part"]


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


if not os.environ.get("RAY_ADDRESS"):
    # Read by `import ray`: a Ray that is of one machine listens to that machine alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


INPUTS = 256  # at most so many share a file
FILES = 4  # at least so many an actor, so that all end at about the same time
RETRIES = 2  # of inputs whose actor died
LOST = "the processes that worked on it died or failed, all of them: see Ray's log"


def predict_with_ray(arguments, inputs, output, *, actors=1, batch_size=1, follow_links=False):
    """
    Predict on images, videos and DICOM files, and write Parquet files into the folder
    ``predictions.parquet``: a row an image or frame, see :func:`image_row`, and one for each input
    that cannot be read, or not to its end, with its ``error``. Called again with the same output,
    it goes on where it was interrupted: what is done is skipped, what is new, has changed or failed
    is done.

    A file appears when all in it is done. What an actor that dies was at is done by another; an
    input that actors die of time and again is listed, and the others go on.

    Args:
        arguments (dict): of the :class:`Predictor` that each actor makes for itself.
        inputs (list[str or Path]): see :func:`find_inputs`; all machines have them under the same
            path, and the weights and the output too.
        output (str or Path): folder; made if it does not exist.
        actors (int): processes, each with the model, one core, and where there are GPUs one of
            these or its share. Of the Ray cluster at RAY_ADDRESS, else of this machine.
        batch_size (int): images that the network sees at once, where they are of one size to it.
        follow_links (bool): see :func:`find_inputs`.

    Returns:
        Summary:

    Raises:
        FileNotFoundError: there is no such input, or see :class:`Predictor`.
        ValueError: the folder has the results of another run, or one is writing into it; or see
            :class:`Predictor`.
        OSError: something cannot be written, or no actor could be started. What is done stays done.
    """
    folder = Path(output).absolute() / PARTS
    root, sources = find_inputs(inputs, leave_out=output_folders(output), follow_links=follow_links)
    arguments = _with_absolute_paths(arguments)
    run = run_record(Predictor(**arguments), root)  # what is wrong with the weights shows at once
    with contextlib.ExitStack() as stack:
        stack.callback(lock_folder(output, "--output").release)
        parts = Parts(folder, run)
        left = {source.name: source for source in sources if not parts.is_done(source)}
        skipped = len(sources) - len(left)
        parts.drop(left.values(), sources)
        images = _predict(left, (arguments, folder, run, batch_size), actors) if left else 0
        for source in left.values():
            write_part(folder, run, [source], [input_row(_lost(source))])
        return Summary(images, skipped, Parts(folder, run).failed())


def _predict(left, make, actors):
    """Number of images predicted; ``left`` keeps the inputs, by name, that were lost."""
    images = 0
    with _cluster(), tqdm(desc="Predicting", unit="input", total=len(left)) as bar:
        # Those that were lost together with others are tried alone.
        for share in (_shards, _one_by_one):
            for done in _results(share(left.values(), actors), make, actors):
                for name in done["inputs"]:
                    del left[name]
                    bar.update()
                for line in done["failed"]:
                    tqdm.write(printable(line))
                images += done["images"]
    return images


def _with_absolute_paths(arguments):
    """Elsewhere the working directory is another one."""
    return {
        key: str(Path(value).absolute()) if _is_file(value) else value
        for key, value in arguments.items()
    }


def _is_file(value):
    return isinstance(value, str | Path) and Path(value).is_file()


@contextlib.contextmanager
def _cluster():
    """The one at hand or at RAY_ADDRESS, else one of this machine for as long as it is needed."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS") or "local"  # never one that happens to run here
    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def _shards(sources, actors):
    """
    Lists of those that share a file, and are done anew together if an actor dies. A video, which
    may take hours, has its own.
    """
    films = [[source] for source in sources if source.kind == "video"]
    others = [source for source in sources if source.kind != "video"]
    size = max(1, min(INPUTS, math.ceil(len(others) / (FILES * actors))))
    return films + [others[i : i + size] for i in range(0, len(others), size)]


def _one_by_one(sources, actors):
    return [[source] for source in sources]


def _results(shards, make, actors):
    """Yields what :class:`_Worker` says of each shard, but of those that its actor dies of."""
    if not shards:
        return
    # File names may be no UTF-8, which Arrow's strings have to be, but not JSON's.
    rows = [
        {"shard": json.dumps([[str(s.path), s.name, s.kind] for s in shard])} for shard in shards
    ]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    data.context.enable_progress_bars = False
    data.context.max_errored_blocks = -1
    gpus = ray.cluster_resources().get("GPU", 0)
    pool = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1)
    results = data.map_batches(
        _Worker,
        fn_constructor_args=make,
        batch_size=1,
        compute=pool,
        num_cpus=1,
        num_gpus=1 / math.ceil(actors / gpus) if gpus else None,
        max_task_retries=RETRIES,
    )
    try:
        for row in results.iter_rows():
            done = json.loads(row["done"])
            if done["problem"]:
                raise OSError(done["problem"])
            yield done
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"Ray's actors cannot work: {reason}") from error


class _Worker:
    """An actor: its model, and how it writes a file."""

    def __init__(self, arguments, folder, run, batch_size):
        keep_freed_memory()
        self._predictor = Predictor(**arguments)
        self._folder, self._run, self._batch_size = folder, run, batch_size

    def __call__(self, batch):
        (shard,) = batch["shard"]
        sources = [Source(Path(path), name, kind) for path, name, kind in json.loads(shard)]
        done = {"inputs": [source.name for source in sources], "images": 0, "failed": []}
        try:
            write_part(self._folder, self._run, sources, self._rows(sources, done))
            done["problem"] = None
        except OSError as error:  # would be the same with the others: not to be tried again
            done["problem"] = str(error)
        return {"done": [json.dumps(done)]}

    def _rows(self, sources, done):
        """Yields the rows of a file; counts them."""
        found_in = predictions(self._predictor, sources, self._batch_size)
        number = 0
        with contextlib.closing(found_in):
            for item, found in found_in:
                if item.frame is not None:
                    number += 1
                    yield image_row(item, found, self._predictor.classes)
                    continue
                if item.error:
                    done["failed"].append(f"{item.source.name}: {item.error}")
                if item.error or not number:
                    yield input_row(item)
                done["images"], number = done["images"] + number, 0


def _lost(source):
    return Item(source, signature(source), error=LOST)
