"""One training of a cross-validation, and the state of all of them."""

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from imrcnn_d2.data.catalog import prepared_folder
from imrcnn_d2.data.prepare.data_set import folds_folder, left_out_by, write_folds
from imrcnn_d2.engine.config import find_config, load_training_config
from imrcnn_d2.engine.run_record import RunRecord, config_sha256
from imrcnn_d2.evaluation.detection.metrics import METRICS, without_masks
from imrcnn_d2.evaluation.output import read_metrics, read_run_record
from imrcnn_d2.task import Task
from imrcnn_d2.utils.files import file_sha256
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
TAIL = 10  # lines of a broken run's log that are shown
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class FoldRun:
    """One model, data set, seed and fold."""

    dataset: str  # name of the prepared data set's folder
    config_file: Path  # of the model; its stem is the model's name
    seed: int
    fold: int
    folds: int | str  # their number, or the field of images whose values are the folds
    output: Path  # of the whole cross-validation
    datasets: Path  # folder that the data set's folder is in
    opts: tuple[str, ...]  # KEY VALUE ..., for every run
    num_gpus: int  # processes of one training

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "FoldRun":
        """The run of configs/cross_validation/sweep.yaml with its overrides.

        Raises:
            FileNotFoundError: there is no config of that model.
            ValueError: there is no such fold.
        """
        path = find_config(str(cfg.model))
        root = data_set_folder(cfg.datasets, str(cfg.dataset))
        count = number_of_folds(cfg.folds, root)
        if not 0 <= cfg.fold < count:
            raise ValueError(f"fold={cfg.fold}: with folds={cfg.folds} they are 0..{count - 1}")
        return cls(
            dataset=root.name,
            config_file=path.resolve(),
            output=Path(cfg.output).resolve(),
            datasets=root.parent,
            opts=tuple(str(value) for value in OmegaConf.to_container(cfg.opts)),
            **{key: cfg[key] for key in ("seed", "fold", "folds", "num_gpus")},
        )

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.config_file.stem}/seed{self.seed}/fold{self.fold}"

    @property
    def folder(self) -> Path:  # OUTPUT_DIR
        return self.output / self.name

    @property
    def log(self) -> Path:  # all that the training printed; a resumed run appends to it
        return self.folder / "console.log"

    @property
    def metrics_file(self) -> Path:  # of the test set
        return self.folder / "inference" / f"{self.dataset}_test" / "metrics.json"

    @property
    def fold_root(self) -> Path:  # the fold as a prepared data set
        folds = folds_folder(self.datasets / self.dataset, self.folds)
        return folds / f"fold{self.fold}" / self.dataset

    @property
    def left_out(self) -> str | None:
        """The value of the field `folds` that it tests, such as a centre."""
        if isinstance(self.folds, int):
            return None
        return left_out_by(self.datasets / self.dataset, self.folds)[self.fold].value

    def state(self) -> str:
        """ "finished" (trained and evaluated with these settings on this fold), "running", "broken"
        (begun, but neither of these) or "not started".
        """
        if not self.log.is_file():
            return "not started"
        with self._lock() as lock:
            if lock is None:
                return "running"
        try:  # without the lock, which would keep the run from starting
            return "finished" if self._is_finished() else "broken"
        except (OSError, ValueError, KeyError):  # the log has it
            return "broken"

    def train(self) -> None:
        """Train and evaluate, from the last checkpoint where there is one; nothing if that is done.

        A run that breaks raises nothing, so that later ones go on: its log's last lines are logged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock() as lock:
            if lock is None:
                logger.warning(f"{self.name}: another process trains it, so it is left alone.")
                return
            try:
                if self._is_finished():
                    logger.info(f"{self.name}: finished before, not run again.")
                    return
                code = self._run(lock)
                problem = f"exit code {code}" if code else None
                if problem is None and not self._is_finished():
                    problem = f"{RunRecord.FILE} or {self.metrics_file.name} is missing"
            except (OSError, ValueError, KeyError) as error:
                problem = type(error).__name__
                with open(self.log, "a", encoding="utf-8") as log:
                    log.write(f"{problem}: {error}\n")
        if problem is None:
            logger.info(f"{self.name}: finished.")
        else:
            logger.error(f"{self.name}: broken ({problem}). {self.tail()}")

    @property
    def model(self) -> tuple[str | None, str | None]:
        """The names of a finished run's model and backbone, by which it is compared."""
        record = read_run_record(self.folder / RunRecord.FILE)
        return record.get("model"), record.get("backbone")

    def tail(self) -> str:
        """The name of the log and its last lines."""
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return f"The last lines of {self.log}:\n{''.join(deque(log, TAIL))}"

    def headline(self) -> dict[str, float | None]:
        """A finished run's metrics of `Task.headline`, by label.

        Raises:
            BadInputError: its metrics.json is damaged.
        """
        metrics = read_metrics(self.metrics_file)
        endpoints = Task.named(metrics["meta"].get("task")).headline
        if (metrics.get("segm") or {}).get("AP") is None:
            endpoints = without_masks(endpoints)
        pairs = [endpoint.split("/") for endpoint in endpoints]
        return {METRICS[name].label: (metrics.get(group) or {}).get(name) for group, name in pairs}

    @contextlib.contextmanager
    def _lock(self):
        """Yields an open file, or None if another process trains this run. The training inherits
        it: the run counts as running while it saves, even if the process that started it was
        killed."""
        with open(self.folder / "training.lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            except OSError as error:
                logger.warning(f"{lock.name}: no lock ({error}); see that no two sweeps run here.")
            yield lock

    def _is_finished(self):
        """Raises ValueError for a run with other settings or data, and for damaged files."""
        path = self.folder / RunRecord.FILE
        if not path.is_file():
            return False
        record = read_run_record(path)
        opts = ["DATASETS.ROOT", repr(str(self.fold_root)), *self._overrides()]
        cfg = load_training_config(self.config_file, [*opts, "MODEL.DEVICE", "cpu"])
        same = record.get("config_sha256") == config_sha256(cfg)
        for name, data in (record.get("datasets") or {}).items():
            split = name.removeprefix(f"{self.dataset}_")
            gt = self.fold_root / "annotations" / f"{split}.json"
            same = same and gt.is_file() and data.get("gt_sha256") == file_sha256(gt)
        if not same:
            raise ValueError(
                f"{self.folder} was trained with other settings or on other data (see its "
                "config.yaml and run.json): give another output=, or remove it to train it anew"
            )
        return bool(record.get("finished") and self.metrics_file.is_file() and self.headline())

    def _overrides(self):
        return [*self.opts, "SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)]

    def _run(self, lock):
        """Runs `imrcnn train` to its end; returns its exit code."""
        datasets = str(self.fold_root.parent)
        command = [sys.executable, "-m", "imrcnn", "train", "--resume"]
        command += ["--config-file", str(self.config_file)]
        command += ["--num-gpus", str(self.num_gpus)] if self.num_gpus > 1 else []
        command += ["--data", str(self.fold_root), *self._overrides()]
        logger.info(f"{self.name}: training, log in {self.log}")
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ IMRCNN_DATASETS={datasets} {shlex.join(command)}\n")
            log.flush()
            env = {**os.environ, "IMRCNN_DATASETS": datasets}
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            options = {"pass_fds": (lock.fileno(),), "preexec_fn": _end_with_parent, **files}
            with subprocess.Popen(command, env=env, **options) as process:
                try:
                    self._watch(process)
                except BaseException:  # a signal: the training saves, and ends by itself
                    process.terminate()
                    process.wait()
                    raise
                finally:
                    process.kill()  # where a second signal ended the waiting; else it has ended
            if process.returncode:
                log.write(f"Exit code {process.returncode}.\n")
        return process.returncode

    def _watch(self, process):
        """Shows how far the training is, until it ends."""
        record = self.folder / RunRecord.FILE
        with tqdm(desc=self.name, unit="iteration") as bar:
            while True:
                try:
                    process.wait(POLL_SECONDS)
                    return
                except subprocess.TimeoutExpired:
                    iteration, loss = _last_logged(self.folder / "metrics.json")
                if iteration is not None:
                    bar.initial = bar.initial or iteration
                    if record.is_file():
                        bar.total = read_run_record(record).get("iterations")
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update(iteration - bar.n)


def data_set_folder(datasets: str, dataset: str) -> Path:
    """The folder of a prepared data set: by its name in `datasets`, else itself."""
    root = Path(datasets).resolve() / dataset
    return root if root.is_dir() else prepared_folder(dataset).resolve()


def number_of_folds(folds: int | str, prepared: Path) -> int:
    """How many folds they are; as `left_out_by` where they are a field of images."""
    return folds if isinstance(folds, int) else len(left_out_by(prepared, folds))


def _end_with_parent():
    """Have Linux send this process SIGTERM when its parent is gone, were it by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_logged(path):
    """Iteration and loss of the last line of Detectron2's log that has them, else (None, None)."""
    if path.is_file():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError):  # a line half written
                entry = json.loads(line)
                return entry["iteration"] + 1, entry["total_loss"]
    return None, None


def prepare_folds(runs: Sequence[FoldRun]) -> None:
    """Write the fold data sets that the runs need; see `write_folds`."""
    for root, folds in dict.fromkeys((run.datasets / run.dataset, run.folds) for run in runs):
        written = write_folds(root, folds)
        logger.info(f"{len(written)} folds of {root}: {written[0].parent}")


def describe_runs(runs: Sequence[FoldRun]) -> tuple[str, bool]:
    """A table of the runs with their states and headline metrics, the logs of the broken ones, and
    the command that compares the finished ones; and whether all are finished.
    """
    states = {run: run.state() for run in runs}
    finished = [run for run, state in states.items() if state == "finished"]
    rows = [
        {"run": run.name, "state": state, **(run.headline() if run in finished else {})}
        for run, state in states.items()
    ]
    parts = [tabulate(rows, headers="keys", floatfmt=".1f", missingval="n/a")]
    parts += [f"{run.name}: {run.tail()}" for run, state in states.items() if state == "broken"]
    if len(finished) < len(runs):
        parts.append(
            f"{len(runs) - len(finished)} of {len(runs)} runs are not finished: the same command "
            "continues them."
        )
    for dataset in dict.fromkeys(run.dataset for run in finished):
        done = [run for run in finished if run.dataset == dataset]
        folders = [str(run.folder) for run in done]
        if len({run.config_file for run in done}) > len({run.model for run in done}):
            folders = [f"{run.config_file.stem}={run.folder}" for run in done]
        output = str(finished[0].output / dataset / "comparison")
        command = shlex.join(["imrcnn", "compare", *folders, "--output", output])
        parts.append(f"Table 4 and its companions:\n{command}")
    return "\n\n".join(parts), len(finished) == len(runs)
