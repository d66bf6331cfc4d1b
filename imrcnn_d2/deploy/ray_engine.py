"""Millions of images and frames: the same prediction on many processes or machines, by Ray Data."""

import contextlib
import json
import logging
import math
import os
from pathlib import Path

if not os.environ.get("RAY_ADDRESS"):
    # Read by `import ray`: a Ray that is of one machine listens to that machine alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray  # of the extra [ray]
import ray.data
from tqdm import tqdm

from imrcnn_d2.engine.allocator import keep_freed_memory
from imrcnn_d2.evaluation.files import lock_folder

from .batch import Summary
from .identity import printable, run_record, signature
from .inputs import Source, find_inputs
from .outputs import output_folders
from .parquet import PARTS, Parts, image_row, input_row, write_part
from .pipeline import Item, predictions
from .predictor import Predictor

__all__ = ["predict_with_ray"]

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
