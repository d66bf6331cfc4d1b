"""Prediction on millions of images and frames by many processes or machines, with Ray Data."""

import contextlib
import hashlib
import json
import logging
import math
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # of the extra [ray]
import pyarrow.compute as pc
import pyarrow.parquet as pq

if not os.environ.get("RAY_ADDRESS"):
    # Read by `import ray`: a Ray that is of one machine listens to that machine alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray  # of the extra [ray]
import ray.data
from tqdm import tqdm

from imrcnn_d2.deploy.batch import (
    Item,
    Summary,
    check_run,
    is_done,
    outdated,
    predictions,
    run_record,
    signature,
)
from imrcnn_d2.deploy.inputs import Source, find_inputs, input_key
from imrcnn_d2.deploy.outputs import frame_record, output_folders
from imrcnn_d2.deploy.predictor import Predictor
from imrcnn_d2.engine.train_step import keep_freed_memory
from imrcnn_d2.utils.files import atomic_file, for_terminal, lock_folder

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
# Columns with one value per detection -> keys of COCO.
_DETECTION = {"boxes": "bbox", "masks": "segmentation", "areas": "area"}


def image_row(item: Item, annotations: list[dict], classes: list[str]) -> dict:
    """
    The row of a frame, without what all rows share. ``boxes`` (xywh in pixels), ``scores``,
    ``classes``, ``masks`` (compressed RLE) and ``areas`` have one item per detection, by falling
    score, down to MODEL.ROI_HEADS.SCORE_THRESH_TEST. Of a classification model, the likeliest class
    and its score, and the ``probabilities`` of all.

    Args:
        item: of a frame.
        annotations: its predictions, see `records`.
        classes: names.
    """
    row = {**_input_columns(item), **frame_record(item.source.name, item.frame)}
    row["scores"] = [a["score"] for a in annotations]
    row["classes"] = [classes[a["category_id"] - 1] for a in annotations]
    for column, key in _DETECTION.items():
        if not annotations or key in annotations[0]:
            row[column] = [a[key] for a in annotations]
    if annotations and "probabilities" in annotations[0]:
        row["probabilities"] = annotations[0]["probabilities"]
    return row


def input_row(item: Item) -> dict:
    """The row of an input that has no image, or not all of them; ``error`` says why."""
    return {**_input_columns(item), "file_name": item.source.name, "error": item.error}


def _input_columns(item):
    return {"input": input_key(item.source.name), "signature": item.signature}


def write_part(folder: Path, run: dict, sources: list[Source], rows: Iterable[dict]) -> None:
    """
    Writes a file of the folder, which appears when it is complete. Its name depends on the sources,
    so that it replaces an earlier one of the same.

    Args:
        folder: made if it does not exist.
        run: see `run_record`.
        rows: of `image_row` and `input_row`, of all sources.

    Raises:
        OSError: it cannot be written.
    """
    keys = " ".join(input_key(source.name) for source in sources)
    name = f"part-{hashlib.sha256(keys.encode()).hexdigest()[:16]}.parquet"
    shared = {key: run[key] for key in _SCHEMA.names if key in run}
    with _part(folder / name, run) as part:
        waiting = []
        for row in rows:
            # Not all file names are UTF-8.
            file_name = row["file_name"].encode(errors="backslashreplace").decode()
            waiting.append({**row, "file_name": file_name, **shared})
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
class _InputRows:
    """An input with rows in a file."""

    path: Path
    name: str
    signature: list | None
    error: str | None = None


class Parts:
    """The inputs whose predictions are in the files of a folder."""

    def __init__(self, folder: Path, run: dict):
        """
        Args:
            folder: need not exist. Incomplete files are deleted, and rows that repeat others.
            run: see `run_record`.

        Raises:
            ValueError: it has the results of another run, or a file that is damaged.
        """
        self._run, self._inputs, repeated = run, {}, defaultdict(set)
        for path in sorted(folder.glob("*.parquet")):
            for row in _rows(path, run):
                known = self._inputs.setdefault(
                    row["input"], _InputRows(path, row["file_name"], row["signature"])
                )
                if known.path != path:  # the actors of a killed run lived on for a moment
                    repeated[path].add(row["input"])
                elif row["error"] is not None:
                    known.name, known.error = row["file_name"], row["error"]
        for path in folder.glob("part-*.parquet*.tmp"):
            path.unlink(missing_ok=True)
        for path, keys in repeated.items():
            _drop(path, keys, run)

    def is_done(self, source: Source) -> bool:
        """Whether an input was done without an error and has not been changed since."""
        return is_done(self._inputs.get(input_key(source.name)), source)

    def failed(self) -> list[tuple[str, str]]:
        """Name and reason of each input that was not, or not wholly, read."""
        inputs = self._inputs.values()
        return sorted((each.name, each.error) for each in inputs if each.error is not None)

    def drop(self, sources: Iterable[Source], all_sources: Iterable[Source]) -> None:
        """Deletes the rows of sources that are to be done anew, and of `outdated` ones."""
        gone = outdated(self._inputs.values(), all_sources)
        stale = defaultdict(set)
        for key in {input_key(each.name) for each in (*sources, *gone)}:
            if key in self._inputs:
                stale[self._inputs.pop(key).path].add(key)
        for path, keys in stale.items():
            _drop(path, keys, self._run)


def _rows(path, run):
    """The columns of each row that `Parts` needs."""
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
    """The run that `write_part` noted; empty if it did not write the file."""
    schema = file.schema_arrow
    try:
        run = json.loads((schema.metadata or {})[_META])
    except (KeyError, ValueError, RecursionError):
        return {}
    return run if isinstance(run, dict) and schema.equals(_SCHEMA) else {}


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


INPUTS = 256  # at most so many share a file
FILES = 4  # at least so many per actor, so that all end at about the same time
RETRIES = 2  # of inputs whose actor died
LOST = "the processes that worked on it died or failed, all of them: see Ray's log"


def predict_with_ray(
    arguments: dict,
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    actors: int = 1,
    batch_size: int = 1,
    follow_links: bool = False,
) -> Summary:
    """
    Predicts on images, videos and DICOM files, and writes Parquet files into the folder
    ``predictions.parquet``: one row per image or frame, see `image_row`, and one for each input
    that cannot be read, or not to its end, with its ``error``. Called again with the same output,
    it goes on where it was interrupted: finished inputs are skipped; those that are new, changed or
    failed are done.

    A file appears when all its inputs are done. Those of an actor that dies are done by another; an
    input that actors repeatedly die of is listed, and the others go on.

    Args:
        arguments: of the `Predictor` that each actor makes for itself.
        inputs, follow_links: see `find_inputs`; all machines have the inputs under the same path,
            and the weights and the output too.
        output: folder; made if it does not exist.
        actors: processes, each with the model, one core, and one GPU or a share of it if there are
            GPUs. Of the Ray cluster at RAY_ADDRESS, else of this machine.
        batch_size: images that the network sees at once, if they are of one size to it.

    Raises:
        FileNotFoundError: there is no such input, or see `Predictor`.
        ValueError: the folder has the results of another run, or another run is writing into it; or
            see `Predictor`.
        OSError: something cannot be written, or no actor could be started. Finished inputs stay
            finished.
    """
    folder = Path(output).absolute() / PARTS
    root, sources = find_inputs(inputs, leave_out=output_folders(output), follow_links=follow_links)
    arguments = _with_absolute_paths(arguments)
    run = run_record(Predictor(**arguments), root)  # errors of the weights are raised at once
    with contextlib.ExitStack() as stack:
        stack.callback(lock_folder(output, "--output").release)
        parts = Parts(folder, run)
        left = {source.name: source for source in sources if not parts.is_done(source)}
        skipped = len(sources) - len(left)
        parts.drop(left.values(), sources)
        images = _predict(left, (arguments, folder, run, batch_size), actors) if left else 0
        for source in left.values():
            lost = Item(source, signature(source), error=LOST)
            write_part(folder, run, [source], [input_row(lost)])
        return Summary(images, skipped, Parts(folder, run).failed())


def _predict(left, worker_arguments, actors) -> int:
    """Returns the number of images predicted; ``left`` keeps the lost inputs, by name."""
    images = 0
    with _cluster(), tqdm(desc="Predicting", unit="input", total=len(left)) as bar:
        for alone in (False, True):  # inputs that were lost together with others are tried alone
            sources = list(left.values())
            shards = [[source] for source in sources] if alone else _shards(sources, actors)
            for done in _results(shards, worker_arguments, actors):
                for name in done["inputs"]:
                    del left[name]
                    bar.update()
                for line in done["failed"]:
                    tqdm.write(for_terminal(line, one_line=True))
                images += done["images"]
    return images


def _with_absolute_paths(arguments):
    """Actors have another working directory."""
    return {
        key: str(Path(value).absolute())
        if isinstance(value, str | Path) and Path(value).is_file()
        else value
        for key, value in arguments.items()
    }


@contextlib.contextmanager
def _cluster():
    """The current one or that at RAY_ADDRESS, else one of this machine for as long as needed."""
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
    Lists of sources that share a file, and are done anew together if an actor dies. A video, which
    may take hours, has its own.
    """
    videos = [[source] for source in sources if source.kind == "video"]
    others = [source for source in sources if source.kind != "video"]
    size = max(1, min(INPUTS, math.ceil(len(others) / (FILES * actors))))
    return videos + [others[i : i + size] for i in range(0, len(others), size)]


def _results(shards, worker_arguments, actors):
    """Yields each shard's result; shards whose actor died are skipped."""
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
        fn_constructor_args=worker_arguments,
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
    """An actor: it has the model, and writes one file per shard."""

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
        except OSError as error:  # would be the same for the others: not to be tried again
            done["problem"] = str(error)
        return {"done": [json.dumps(done)]}

    def _rows(self, sources, done):
        """Yields the rows of a file, and counts them."""
        number = 0
        with contextlib.closing(predictions(self._predictor, sources, self._batch_size)) as items:
            for item, annotations in items:
                if item.frame is not None:
                    number += 1
                    yield image_row(item, annotations, self._predictor.classes)
                    continue
                if item.error:
                    done["failed"].append(f"{item.source.name}: {item.error}")
                if item.error or not number:
                    yield input_row(item)
                done["images"], number = done["images"] + number, 0
