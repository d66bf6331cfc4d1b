"""One training of a cross-validation, and what became of all of them."""

import contextlib
import fcntl
import json
import logging
import os
import shlex
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from tabulate import tabulate
from tqdm import tqdm

import imrcnn_d2
from imrcnn_d2.data.catalog import prepared_folder
from imrcnn_d2.data.prepare.data_set import write_folds
from imrcnn_d2.engine.config import SHIPPED, find_config, load_training_config
from imrcnn_d2.engine.run_record import RunRecord, config_sha256
from imrcnn_d2.evaluation.output import read_metrics, read_run_record
from imrcnn_d2.utils.files import file_sha256

__all__ = ["FoldRun", "describe_runs", "prepare_folds"]

logger = logging.getLogger(__name__)


# The training script lies in the checkout, not in the package.
ROOT = Path(imrcnn_d2.__file__).resolve().parents[1]
FIGURES = {  # column -> group and name in metrics.json
    "AP50 (all-point)": ("segm", "AP50_voc"),
    "IoU": ("lesion", "iou"),
    "F1": ("lesion", "f1"),
}
RECOGNITION_FIGURES = {
    "accuracy": ("recognition", "top1"),
    "balanced accuracy": ("recognition", "balanced_accuracy"),
}
TAIL = 10  # lines of a broken run's log that are shown
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class FoldRun:
    """
    One model, data set, seed and fold.

    Attributes:
        dataset (str): name of the prepared data set's folder.
        config_file (Path): of the model; its stem is the model's name.
        seed (int), fold (int), folds (int):
        output (Path): of the whole cross-validation.
        datasets (Path): folder that the data set's folder is in.
        opts (tuple[str]): KEY VALUE ..., for every run.
        num_gpus (int): processes of one training, as train_net.py's ``--num-gpus``.
    """

    dataset: str
    config_file: Path
    seed: int
    fold: int
    folds: int
    output: Path
    datasets: Path
    opts: tuple
    num_gpus: int

    @classmethod
    def from_config(cls, cfg):
        """
        Args:
            cfg (DictConfig): configs/cross_validation/sweep.yaml for one run.

        Raises:
            FileNotFoundError: there is no config of that model.
            ValueError: there is no such fold.
        """
        path = Path(cfg.model) if str(cfg.model).endswith(".yaml") else None
        configs = SHIPPED[0]
        path = find_config(path or configs / f"{cfg.model}.yaml")
        if path is None:
            known = sorted(f.stem for f in configs.glob("*.yaml") if not f.stem.startswith("Base-"))
            raise FileNotFoundError(
                f"{cfg.model}.yaml: no such config. There are {', '.join(known)}; a path that "
                "ends in .yaml names any other."
            )
        if not 0 <= cfg.fold < cfg.folds:
            raise ValueError(f"fold={cfg.fold}: with folds={cfg.folds} they are 0..{cfg.folds - 1}")
        root = Path(cfg.datasets).resolve() / str(cfg.dataset)
        if not root.is_dir():
            root = prepared_folder(cfg.dataset).resolve()
        return cls(
            dataset=root.name,
            config_file=path.resolve(),
            seed=cfg.seed,
            fold=cfg.fold,
            folds=cfg.folds,
            output=Path(cfg.output).resolve(),
            datasets=root.parent,
            opts=tuple(str(value) for value in OmegaConf.to_container(cfg.opts)),
            num_gpus=cfg.num_gpus,
        )

    @property
    def name(self):
        """str: the run's folder in ``output``."""
        return f"{self.dataset}/{self.config_file.stem}/seed{self.seed}/fold{self.fold}"

    @property
    def folder(self):
        """Path: OUTPUT_DIR."""
        return self.output / self.name

    @property
    def log(self):
        """Path: all that the training printed; of a resumed run, one part after the other."""
        return self.folder / "console.log"

    @property
    def metrics_file(self):
        """Path: of the test set."""
        return self.folder / "inference" / f"{self.dataset}_test" / "metrics.json"

    @property
    def fold_datasets(self):
        """Path: what the training sees as $IMRCNN_DATASETS."""
        return self.datasets / f"{self.dataset}.folds{self.folds}" / f"fold{self.fold}"

    @property
    def fold_root(self):
        """Path: the fold as a prepared data set."""
        return self.fold_datasets / self.dataset

    def state(self):
        """
        Returns:
            str: "finished" (trained and evaluated with these settings on this fold), "running",
                "broken" (begun, but neither of these) or "not started".
        """
        if not self.log.is_file():
            return "not started"
        with self._lock() as lock:
            if lock is None:
                return "running"
            try:
                return "finished" if self._is_finished() else "broken"
            except (OSError, ValueError, KeyError):  # the log says it
                return "broken"

    def train(self):
        """
        Train and evaluate, from the last checkpoint where there is one; nothing if that is done.

        A run that breaks raises nothing, so that those behind it go on: it is named with the last
        lines of its log.
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
            except (OSError, ValueError, KeyError) as error:
                problem = f"{type(error).__name__}"
                with open(self.log, "a", encoding="utf-8") as log:
                    log.write(f"{type(error).__name__}: {error}\n")
            if problem is None and not self._is_finished():
                problem = f"{RunRecord.FILE} or {self.metrics_file.name} is missing"
        if problem is None:
            logger.info(f"{self.name}: finished.")
        else:
            logger.error(f"{self.name}: broken ({problem}). {self.tail()}")

    def tail(self):
        """str: the name of the log and its last lines."""
        with open(self.log, encoding="utf-8", errors="replace") as log:
            lines = "".join(deque(log, TAIL))
        return f"The last lines of {self.log}:\n{lines}"

    def figures(self):
        """
        dict[str, float or None]: headline figures of a finished run, as its training wrote them.

        Raises:
            BadInputError: they are damaged.
        """
        metrics = read_metrics(self.metrics_file)
        figures = RECOGNITION_FIGURES if "recognition" in metrics else FIGURES
        return {
            column: (metrics.get(group) or {}).get(name)
            for column, (group, name) in figures.items()
        }

    @contextlib.contextmanager
    def _lock(self):
        """
        Yields an open file, or None if another process trains this run. The training inherits it,
        so that the run counts as running even if the process that started it was killed.
        """
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
        """
        Raises:
            ValueError: the folder holds a run with other settings or on other data, or damaged
                files.
        """
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
                "config.yaml and run.json). Give another output=, or remove it to train it anew."
            )
        return bool(record.get("finished") and self.metrics_file.is_file() and self.figures())

    def _overrides(self):
        return [*self.opts, "SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)]

    def _run(self, lock):
        """Runs train_net.py to its end; returns its exit code."""
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume"]
        command += ["--config-file", str(self.config_file), "--num-gpus", str(self.num_gpus)]
        command += ["--data", str(self.fold_root), *self._overrides()]
        logger.info(f"{self.name}: training, log in {self.log}")
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ IMRCNN_DATASETS={self.fold_datasets} {shlex.join(command)}\n")
            log.flush()
            with subprocess.Popen(
                command,
                env={**os.environ, "IMRCNN_DATASETS": str(self.fold_datasets)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.fileno(),),
            ) as process:
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
        with tqdm(desc=self.name, unit="iteration") as bar:
            while True:
                try:
                    process.wait(POLL_SECONDS)
                    return
                except subprocess.TimeoutExpired:
                    iteration, loss = _last_logged(self.folder / "metrics.json")
                if iteration is not None:
                    bar.initial = bar.initial or iteration
                    bar.total = _iterations(self.folder / RunRecord.FILE)
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update(iteration - bar.n)


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


def _iterations(path):
    return read_run_record(path).get("iterations") if path.is_file() else None


def prepare_folds(runs):
    """
    Write the fold data sets that some runs need; see :func:`write_folds`.

    Args:
        runs (list[FoldRun]):
    """
    for root, count in dict.fromkeys((run.datasets / run.dataset, run.folds) for run in runs):
        folds = write_folds(root, count)
        logger.info(f"{count} folds of {root}: {folds[0].parent}")


def describe_runs(runs):
    """
    Args:
        runs (list[FoldRun]):

    Returns:
        tuple[str, bool]: a table of the runs with their states and figures, the logs of the broken
            ones, and the command that compares what is finished; whether all are finished.
    """
    states = {run: run.state() for run in runs}
    rows = [
        {"run": run.name, "state": state, **(run.figures() if state == "finished" else {})}
        for run, state in states.items()
    ]
    parts = [tabulate(rows, headers="keys", floatfmt=".1f", missingval="n/a")]
    parts += [f"{run.name}: {run.tail()}" for run, state in states.items() if state == "broken"]
    finished = [run for run, state in states.items() if state == "finished"]
    if len(finished) < len(runs):
        parts.append(
            f"{len(runs) - len(finished)} of {len(runs)} runs are not finished: the same "
            "command goes on with them."
        )
    for dataset in dict.fromkeys(run.dataset for run in finished):
        folders = [str(run.folder) for run in finished if run.dataset == dataset]
        output = str(finished[0].output / dataset / "comparison")
        command = shlex.join(["python", "tools/compare.py", *folders, "--output", output])
        parts.append(f"Table 4 and its companions:\n{command}")
    return "\n\n".join(parts), len(finished) == len(runs)
