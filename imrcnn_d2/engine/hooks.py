"""Hooks: interruption, averaged weights, validation, the best checkpoint, sample predictions."""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from imrcnn_d2.data.mapper import in_frame
from imrcnn_d2.engine.checkpoint import Checkpointer, Weights, damage, load_weights
from imrcnn_d2.evaluation.calibration import ScoreMap, Temperature
from imrcnn_d2.evaluation.detection.operating_point import (
    NOT_REACHED,
    OperatingPoint,
    check_rule,
    score_threshold,
)

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h, "try again later": to be started again with --resume.
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Slurm, and launchers that pass signals on, may deliver one request twice.
SAME_REQUEST = 5.0  # seconds

_DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class Interrupted(SystemExit):
    """A signal ended the process where no iteration had to be finished; args: its exit code."""

    def __init__(self) -> None:
        super().__init__(EXIT_INTERRUPTED)


class _Requests:
    """SIGTERM and SIGINT (Ctrl-C) to this process, handled until `restore`."""

    def __init__(self) -> None:
        self.received: str | None = None  # the name of the first one
        self.defer = False  # whether the current iteration is finished first
        self._since = 0.0
        self._pid = os.getpid()
        self._former = {}
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if os.getpid() != self._pid:  # a data loader's worker: the training ends it
            if number != signal.SIGINT:
                self._end_now(number)
        elif self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
            if not self.defer:
                raise Interrupted
        elif time.monotonic() > self._since + SAME_REQUEST:
            self._end_now(number)

    @staticmethod
    def _end_now(number):
        signal.signal(number, _DEFAULTS[number])
        signal.raise_signal(number)


_of_process: _Requests | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGTERM and SIGINT end this process with `EXIT_INTERRUPTED`: at once, since files are
    whole or absent at any time; a training with an `Interruption` finishes its iteration first. A
    signal more than `SAME_REQUEST` seconds after the first has its default effect.
    """
    global _of_process
    _of_process = requests = _Requests()
    try:
        yield
    except Interrupted:
        logger.warning(
            f"{requests.received}: ended with exit code {EXIT_INTERRUPTED}. To continue: the same "
            "command, a training with --resume"
        )
        if dist.is_initialized():  # others may wait for this process, which cannot wait for them
            logging.shutdown()
            sys.stdout.flush()
            os._exit(EXIT_INTERRUPTED)
        raise
    finally:
        _of_process = None
        if requests.received is None:  # else the process ends, and may get the same signal again
            requests.restore()


class Interruption(HookBase):
    """On SIGTERM or SIGINT (Ctrl-C) to any process of the training: finish the iteration, save a
    checkpoint and exit with `EXIT_INTERRUPTED`; see `interruptible` for other moments.

    Register it last, on every rank: the checkpoint then has all that other hooks did.
    """

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer
        self._requests, self._saved = None, False

    def before_train(self):
        self._restores = _of_process is None
        self._requests = _Requests() if self._restores else _of_process
        self._requests.defer = True

    def after_step(self):
        received = [name for name in comm.all_gather(self._requests.received) if name]
        if not received:
            return
        iteration = self.trainer.iter
        self._checkpointer.save_iteration(iteration)
        logger.warning(
            f"{received[0]}: saved after iteration {iteration}, exit code {EXIT_INTERRUPTED}. "
            "Continue with --resume"
        )
        # As at the end of the loop; Detectron2's printer divides by the iterations since it wrote.
        self.trainer.iter += 1
        self._saved = True
        raise SystemExit(EXIT_INTERRUPTED)

    def after_train(self):
        if self._requests is None:  # another hook failed before the training began
            return
        self._requests.defer = False
        if self._restores:
            self._requests.restore()
        finished = self.trainer.iter == self.trainer.max_iter and not self._saved
        if self._requests.received and finished:  # received since the last iteration looked
            raise Interrupted


class EMA(HookBase):
    """Exponential moving average of a model's weights, not wrapped by DistributedDataParallel:
    update n keeps ``min(decay, (1 + n) / (10 + n))`` of the average, which so follows the first
    iterations closely. Buffers are copied. Register it before validation, on every rank.

    Raises:
        ValueError: `decay` is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"SOLVER.EMA_DECAY is {decay}; it lies between 0 (off) and 1")

        def average(averaged, current, updates):
            keep = min(decay, (1 + updates) / (10 + updates))
            get_ema_multi_avg_fn(keep)(averaged, current, updates)

        self._live = model
        self._averaged = AveragedModel(model, multi_avg_fn=average)

    @property
    def model(self) -> nn.Module:
        """With the averaged weights."""
        return self._averaged.module

    def before_train(self):
        if self._averaged.n_averaged == 0:  # MODEL.WEIGHTS was loaded after this object was made
            self.after_step()

    def after_step(self):
        self._averaged.update_parameters(self._live)

    def state_dict(self):
        return self._averaged.state_dict()

    def load_state_dict(self, state_dict):
        self._averaged.load_state_dict(state_dict)


def _is_due(trainer, period):
    next_iter = trainer.iter + 1
    return next_iter == trainer.max_iter or (period > 0 and next_iter % period == 0)


class EvalHook(hooks.EvalHook):
    """Evaluate every ``eval_period`` iterations and after the last one; Detectron2's own evaluates
    that after the training loop, too late for the final checkpoint to know the result.
    """

    def is_due(self) -> bool:
        return _is_due(self.trainer, self._period)

    def after_step(self):
        if self.is_due():
            self._do_eval()

    def after_train(self):
        del self._func  # a method of the trainer: break the circle


def _validated(storage: EventStorage) -> dict[str, float]:
    """The metrics of a validation after this iteration, and its losses."""
    return {k: value for k, (value, when) in storage.latest().items() if when == storage.iter}


def _of_data_set(metrics: dict, dataset: str | None, name: str) -> float | None:
    """Detectron2 prefixes metrics with the data set's name where there are several sets."""
    return metrics.get(f"{dataset}/{name}", metrics.get(name))


def _score_map(metrics: dict, dataset: str | None) -> ScoreMap | Temperature | None:
    """The one that the evaluator fitted on this data set, if any."""
    slope, offset, temperature = (
        _of_data_set(metrics, dataset, f"score_map/{name}")
        for name in ("slope", "offset", "temperature")
    )
    if temperature is not None:
        return Temperature(temperature, dataset)
    return None if slope is None else ScoreMap(slope, offset, dataset)


class BestCheckpointer(HookBase):
    """Save ``model_best.pth`` when validation is as good as ever: weights, iteration, score,
    operating point and map of scores. Unlike Detectron2's it remembers the best over a resume and
    never changes ``last_checkpoint``. Register it between `EvalHook` and the periodic checkpoint,
    on every rank.

    Args:
        tau_rule: by which the evaluator chose ``lesion/tau_val``; None stores no operating point.
        dataset: the validation set whose operating point and map of scores are stored.
        metric: "group/metric", larger is better; the mean where several validation sets have it.
        metadata: of `Checkpointer`.
    """

    FILE_STEM = "model_best"

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        validation: EvalHook,
        *,
        tau_rule: str | None = None,
        dataset: str | None = None,
        metric: str,
        metadata: dict | None = None,
    ):
        self._checkpointer = Checkpointer(model, save_dir, whole=True, metadata=metadata)
        self._path = os.path.join(save_dir, f"{self.FILE_STEM}.pth")
        self._validation = validation
        if tau_rule is not None:
            check_rule(tau_rule)  # before the training, not at its first validation
        self._tau_rule, self._dataset, self._metric = tau_rule, dataset, metric
        self.best_score = self.best_iter = None

    def before_train(self):
        lost = comm.all_gather(self._set_aside_if_damaged())[0]  # only the main process knows
        if lost and self.trainer.start_iter >= self.trainer.max_iter:  # no validation is left
            self._validation._do_eval()
            self._keep_if_best(self.trainer.start_iter - 1)

    def _set_aside_if_damaged(self):
        """Whether the best weights of a training that is resumed are lost."""
        problem = damage(self._path) if self.best_iter is not None else None
        if problem is None or not comm.is_main_process():
            return False
        logger.warning(
            "%s is damaged (%s) and set aside: later validations choose anew", self._path, problem
        )
        if os.path.lexists(self._path):
            os.replace(self._path, f"{self._path}.damaged")
        self.best_score = self.best_iter = None
        return True

    def after_step(self):
        if self._validation.is_due():
            self._keep_if_best(self.trainer.iter)

    def _keep_if_best(self, iteration):
        """Save the current weights, which were just validated, if they are the best."""
        if not comm.is_main_process():
            return
        metrics = _validated(self.trainer.storage)
        name = self._metric
        scores = [value for key, value in metrics.items() if f"/{key}".endswith(f"/{name}")]
        if not scores:
            logger.warning("The validation has no metric %s: not saved", name)
            return
        score = float(np.mean(scores))
        if math.isnan(score):
            logger.warning("%s is undefined on the validation set: not saved", self._metric)
            return
        # Of equals the later one: early in training nothing reaches the threshold at all.
        if self.best_score is not None and score < self.best_score:
            best = f"{self.best_score:.3f} of iteration {self.best_iter}"
            logger.info(f"{self._metric} {score:.3f}: the best stays {best}")
            return
        self.best_score, self.best_iter = score, iteration
        tau = _of_data_set(metrics, self._dataset, "lesion/tau_val")
        point, score_map = None, _score_map(metrics, self._dataset)
        if self._tau_rule is not None and tau is not None and not math.isnan(tau):
            is_reached, suppress_parts = (
                _of_data_set(metrics, self._dataset, f"lesion/{name}") == 1
                for name in ("tau_rule_reached", "suppress_parts")
            )
            rule = self._tau_rule + ("" if is_reached else NOT_REACHED)
            point = OperatingPoint(tau, rule, self._dataset, suppress_parts)
        chosen = {
            "operating_point": point and vars(point),
            "score_map": score_map and vars(score_map),
        }
        self._checkpointer.write(self.FILE_STEM, **self.state_dict(), **chosen)
        logger.info("%s %.3f is the best so far: saved %s.pth", self._metric, score, self.FILE_STEM)

    def load_best(self) -> Weights | None:
        """Load the best weights of this run into the model, on every rank; None where it saved none
        (a file of an earlier run in the same folder is not its), and the model is left as it is.
        """
        if not comm.all_gather(self.best_iter is not None)[0]:  # only the main process knows
            return None
        return load_weights(self._checkpointer, self._path)

    def state_dict(self):
        best = {"best_score": self.best_score, "best_iter": self.best_iter}
        return {**best, "best_metric": self._metric}

    def load_state_dict(self, state_dict):
        before = state_dict.get("best_metric", self._metric)
        if before != self._metric:
            text = "The best weights so far are those of %s: later validations choose by %s"
            logger.warning(text, before, self._metric)
            return
        self.best_score, self.best_iter = state_dict["best_score"], state_dict["best_iter"]


class SamplePredictions(HookBase):
    """Ground truth next to a detector's predictions above the threshold, on `NUM_IMAGES` images of
    a validation set, spread evenly, for TensorBoard: every `period` iterations and after the last;
    on the main process. Scores are mapped as in the validation before it. `tau` is
    TEST.SCORE_THRESH, see `score_threshold`.
    """

    NUM_IMAGES = 4

    def __init__(
        self, model: nn.Module, loader: DataLoader, dataset_name: str, period: int, tau: float
    ):
        dataset, records = loader.dataset, DatasetCatalog.get(dataset_name)
        number = min(self.NUM_IMAGES, len(dataset))
        picks = np.linspace(0, len(dataset) - 1, number).astype(int).tolist()
        self._samples = [(dataset[i], records[i].get("annotations", [])) for i in picks]
        self._model, self._metadata = model, MetadataCatalog.get(dataset_name)
        self._dataset, self._period, self._tau = dataset_name, period, tau

    def after_step(self):
        if not _is_due(self.trainer, self._period):
            return
        was_training = self._model.training
        self._model.eval()
        score_map = _score_map(_validated(self.trainer.storage), self._dataset)
        with torch.no_grad():
            for sample, annotations in self._samples:
                self._plot(sample, annotations, score_map)
        self._model.train(was_training)

    def _plot(self, sample, annotations, score_map):
        from detectron2.utils.visualizer import Visualizer  # here, since Matplotlib takes long

        image = detection_utils.read_image(sample["file_name"], "RGB")
        instances = in_frame(sample, self._model([sample])[0]["instances"].to("cpu"))
        if score_map is not None:
            instances.scores = torch.as_tensor(score_map(instances.scores.numpy()))
        tau = score_threshold(self._tau, mapped=score_map is not None)
        kept = instances[instances.scores >= tau]
        truth, prediction = Visualizer(image, self._metadata), Visualizer(image, self._metadata)
        if not all(annotation.get("segmentation") for annotation in annotations):
            # The visualizer takes masks of all or of none.
            annotations = [{k: v for k, v in a.items() if k != "segmentation"} for a in annotations]
        panels = [
            truth.draw_dataset_dict({"annotations": annotations}).get_image(),
            prediction.draw_instance_predictions(kept).get_image(),
        ]
        name = f"ground truth | prediction, image {sample['image_id']}"
        plot = np.concatenate(panels, axis=1).transpose(2, 0, 1)
        self.trainer.storage.put_image(name, np.ascontiguousarray(plot))
