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
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa  # of the extra [ray]
import pyarrow.compute as pc
import pyarrow.parquet as pq

if not os.environ.get("RAY_ADDRESS"):
    # Read by `import ray`: a Ray that is of one machine listens to that machine alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray  # of the extra [ray]
import ray.data

from imrcnn_d2.deploy import batch
from imrcnn_d2.deploy.batch import Item, Summary
from imrcnn_d2.deploy.inputs import Source, find_inputs, input_key
from imrcnn_d2.deploy.outputs import OUTPUTS, frame_record
from imrcnn_d2.deploy.predictor import Predictor
from imrcnn_d2.engine.train_step import keep_freed_memory
from imrcnn_d2.utils.files import as_utf8, atomic_file, for_terminal, lock_folder
from imrcnn_d2.utils.progress import tqdm

PARTS = "predictions.parquet"
ROWS = 1024  # in memory at a time
INPUTS = 256  # at most so many share a file
FILES = 4  # at least so many per actor, so that all end at about the same time
RETRIES = 2  # of inputs whose actor died
LOST = "the processes that worked on it died or failed, all of them: see Ray's log"
_META = b"imrcnn_d2"
_INT, _FLOAT, _TEXT, _FLOATS = pa.int32(), pa.float64(), pa.string(), pa.list_(pa.float64())
_RLE = pa.struct({"size": pa.list_(_INT, 2), "counts": _TEXT})
_SCHEMA = pa.schema(
    [
        *(("file_name", _TEXT), ("frame", _INT), ("time", _FLOAT), ("width", _INT)),
        *(("height", _INT), ("view", pa.list_(_INT)), ("boxes", pa.list_(pa.list_(_FLOAT, 4)))),
        *(("scores", _FLOATS), ("raw_scores", _FLOATS), ("classes", pa.list_(_TEXT))),
        *(("masks", pa.list_(_RLE)), ("areas", _FLOATS), ("probabilities", _FLOATS)),
        *(("raw_probabilities", _FLOATS), ("error", _TEXT), ("tau", _FLOAT)),
        *(("tracks", pa.list_(_INT)), ("alarms", pa.list_(pa.bool_()))),
        *(("weights_sha256", _TEXT), ("config_sha256", _TEXT), ("version", _TEXT)),
        *(("runtime", _TEXT), ("precision", _TEXT)),
        *(("input", _TEXT), ("signature", pa.list_(pa.int64()))),
    ]
)
# Columns with one value per detection -> keys of COCO.
_DETECTION = {
    **{"boxes": "bbox", "masks": "segmentation", "areas": "area"},
    "raw_scores": "raw_score",  # where there is a map of scores
    **{"tracks": "track_id", "alarms": "alarm"},  # of videos, where there is an alarm rule
}


def image_row(item: Item, annotations: list[dict], classes: list[str]) -> dict:
    """The row of a frame, without what all rows share: lists with one item per detection, see
    `records`. Of a classification model, the likeliest class and the ``probabilities`` of all.
    """
    row = {"input": input_key(item.source.name), "signature": item.signature}
    row |= frame_record(item.source.name, item.frame)
    row["scores"] = [a["score"] for a in annotations]
    row["classes"] = [classes[a["category_id"] - 1] for a in annotations]
    for column, key in _DETECTION.items():
        if not annotations or key in annotations[0]:
            row[column] = [a.get(key) for a in annotations]  # no track below the threshold
    for key in ("probabilities", "raw_probabilities"):
        if annotations and key in annotations[0]:
            row[key] = annotations[0][key]
    return row


def input_row(item: Item) -> dict:
    """The row of an input that has no image, or not all of them; ``error`` says why."""
    name, key = item.source.name, input_key(item.source.name)
    return {"file_name": name, "input": key, "signature": item.signature, "error": item.error}


def write_part(folder: Path, run: dict, sources: list[Source], rows: Iterable[dict]) -> None:
    """Writes a whole file of the sources' rows, which replaces an earlier one of the same."""
    keys = " ".join(input_key(source.name) for source in sources)
    name = f"part-{hashlib.sha256(keys.encode()).hexdigest()[:16]}.parquet"
    shared = {key: run[key] for key in _SCHEMA.names if key in run}
    with _part(folder / name, run) as part:
        waiting = []
        for row in rows:
            waiting.append({**row, "file_name": as_utf8(row["file_name"]), **shared})
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


class Parts:
    """The inputs whose predictions are in the files of a folder. Incomplete files are deleted, and
    rows that repeat others. Raises a ValueError for those of another run, or a damaged file.
    """

    def __init__(self, folder: Path, run: dict):
        self._run, self._inputs, repeated = run, {}, defaultdict(set)
        for path in sorted(folder.glob("*.parquet")):
            for row in _rows(path, run):
                name, signature = row["file_name"], row["signature"]
                first = SimpleNamespace(path=path, name=name, signature=signature, error=None)
                known = self._inputs.setdefault(row["input"], first)
                if known.path != path:  # the actors of a killed run lived on for a moment
                    repeated[path].add(row["input"])
                elif row["error"] is not None:
                    known.name, known.error = name, row["error"]
        for path in folder.glob("part-*.parquet*.tmp"):
            path.unlink(missing_ok=True)
        for path, keys in repeated.items():
            _drop(path, keys, run)

    def is_done(self, source: Source) -> bool:
        return batch.is_done(self._inputs.get(input_key(source.name)), source)

    def failed(self) -> list[tuple[str, str]]:
        """Name and reason of each input that was not, or not wholly, read."""
        inputs = self._inputs.values()
        return sorted((each.name, each.error) for each in inputs if each.error is not None)

    def drop(self, sources: Iterable[Source], all_sources: Iterable[Source]) -> None:
        """Deletes the rows of sources that are to be done anew, and of `outdated` ones."""
        gone = batch.outdated(self._inputs.values(), all_sources)
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
            # The run that `write_part` noted; empty if it did not write the file.
            previous, schema = {}, file.schema_arrow
            with contextlib.suppress(KeyError, ValueError, RecursionError):
                previous = json.loads((schema.metadata or {})[_META])
            is_ours = isinstance(previous, dict) and schema.equals(_SCHEMA)
            batch.check_run(path.parent, previous if is_ours else {}, run)
            columns = ["input", "signature", "file_name", "error"]
            for rows in file.iter_batches(columns=columns):
                for row in rows.to_pylist():
                    if row["input"] is None or row["file_name"] is None:
                        raise pa.ArrowInvalid("a row names no input")
                    yield row
    except (pa.ArrowException, UnicodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # it cannot be opened
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged ({reason}). Remove it: its inputs are redone"
        ) from error


def _drop(path, keys, run):
    keys, left = pa.array(sorted(keys)), 0
    with pq.ParquetFile(path) as file, _part(path, run) as part:
        for rows in file.iter_batches(ROWS):
            table = pa.Table.from_batches([rows])
            table = table.filter(pc.invert(pc.is_in(table["input"], value_set=keys)))
            part.write_table(table)
            left += len(table)
    if not left:
        path.unlink()


def predict_with_ray(
    arguments: dict,
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    actors: int = 1,
    batch_size: int = 1,
    follow_links: bool = False,
) -> Summary:
    """Like `predict_files`, but writes Parquet files into the folder ``predictions.parquet``: one
    row per image or frame, and one for each input that cannot be read, or not to its end, with its
    ``error``. A file appears when all its inputs are done. Those of an actor that dies are done by
    another; an input that actors repeatedly die of is listed.

    Args:
        arguments: of the `Predictor` that each actor makes for itself. All machines have weights,
            inputs and output under the same paths.
        actors: processes of the Ray cluster at RAY_ADDRESS, else of this machine, each with the
            model, one core, and one GPU or a share of it if there are GPUs.

    Raises:
        FileNotFoundError, ValueError: see `predict_files` and `Predictor`.
        OSError: something cannot be written, or no actor could be started.
    """
    folder = Path(output).absolute() / PARTS
    leave_out = [Path(output) / kind for kind in OUTPUTS]
    root, sources = find_inputs(inputs, leave_out=leave_out, follow_links=follow_links)
    for key, value in arguments.items():
        if isinstance(value, str | Path) and Path(value).is_file():
            # Actors have another working directory.
            arguments = {**arguments, key: str(Path(value).absolute())}
    predictor = Predictor(**arguments)  # errors of the weights are raised at once
    run = batch.run_record(predictor, root)
    # "auto" is one runtime for all actors.
    arguments = {**arguments, "runtime": predictor.metadata["runtime"]}
    with contextlib.ExitStack() as stack:
        stack.callback(lock_folder(output, "--output").release)
        parts = Parts(folder, run)
        left = {source.name: source for source in sources if not parts.is_done(source)}
        skipped = len(sources) - len(left)
        parts.drop(left.values(), sources)
        images = _predict(left, (arguments, folder, run, batch_size), actors) if left else 0
        for source in left.values():
            lost = Item(source, batch.signature(source), error=LOST)
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
    """Lists of sources that share a file, and the fate of an actor; a video has its own."""
    videos = [[source] for source in sources if source.kind == "video"]
    others = [source for source in sources if source.kind != "video"]
    size = max(1, min(INPUTS, math.ceil(len(others) / (FILES * actors))))
    return videos + [others[i : i + size] for i in range(0, len(others), size)]


def _results(shards, worker_arguments, actors):
    """Yields each shard's result; shards whose actor died are skipped."""
    if not shards:
        return
    # File names may be no UTF-8, which Arrow's strings have to be, but not JSON's.
    texts = [json.dumps([[str(s.path), s.name, s.kind] for s in shard]) for shard in shards]
    rows = [{"shard": text} for text in texts]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    data.context.enable_progress_bars = False
    data.context.max_errored_blocks = -1
    gpus = ray.cluster_resources().get("GPU", 0)
    results = data.map_batches(
        _Worker,
        fn_constructor_args=worker_arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
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

    def __call__(self, rows):
        (shard,) = rows["shard"]
        sources = [Source(Path(path), name, kind) for path, name, kind in json.loads(shard)]
        done = {"inputs": [s.name for s in sources], "images": 0, "failed": [], "problem": None}
        try:
            write_part(self._folder, self._run, sources, self._rows(sources, done))
        except OSError as error:  # would be the same for the others: not to be tried again
            done["problem"] = str(error)
        return {"done": [json.dumps(done)]}

    def _rows(self, sources, done):
        """Yields the rows of a file, and counts them."""
        number = 0
        with contextlib.closing(
            batch.predictions(self._predictor, sources, self._batch_size)
        ) as items:
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
