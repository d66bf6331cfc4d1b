"""Validation, the best checkpoint, and sample predictions for TensorBoard."""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.visualizer import Visualizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imrcnn_d2.engine.checkpoint import Checkpointer, damage, load_weights
from imrcnn_d2.evaluation.detection.results import check_rule

__all__ = [
    "EMA",
    "EXIT_INTERRUPTED",
    "SIGNALS",
    "BestCheckpointer",
    "EvalHook",
    "Interrupted",
    "Interruption",
    "SamplePredictions",
    "assemble_hooks",
    "interruptible",
]

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
    """SIGTERM and SIGINT (Ctrl-C) to this process, handled until :meth:`restore`."""

    def __init__(self) -> None:
        self.received: str | None = None  # the name of the first one
        self.defer = False  # whether it is left to an iteration to see it
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
def interruptible():
    """
    Within, SIGTERM and SIGINT end this process with :data:`EXIT_INTERRUPTED`: at once, since files
    are whole or absent at any time; after the iteration, where a training with an
    :class:`Interruption` iterates. A signal that comes more than ``SAME_REQUEST`` seconds after the
    first ends the process as if nobody handled it.
    """
    global _of_process
    _of_process = requests = _Requests()
    try:
        yield
    except Interrupted:
        logger.warning(
            "%s: ended. What was saved is whole: the same command goes on from there, a training's "
            "with --resume. Exit code %d",
            requests.received,
            EXIT_INTERRUPTED,
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
    """
    On SIGTERM or SIGINT (Ctrl-C) to any process of the training: finish the iteration, save a
    checkpoint, and exit with :data:`EXIT_INTERRUPTED`; see :func:`interruptible` for the time
    before and after the iterations, and for a second signal.

    Put it last, on every rank: the checkpoint then has all that the iteration's other hooks did.
    """

    def __init__(self, checkpointer):
        """
        Args:
            checkpointer (Checkpointer): of the whole training.
        """
        self._checkpointer = checkpointer
        self._saved = False

    def before_train(self):
        self._own = _of_process is None
        self._requests = _Requests() if self._own else _of_process
        self._requests.defer = True

    def after_step(self):
        received = [name for name in comm.all_gather(self._requests.received) if name]
        if not received:
            return
        iteration = self.trainer.iter
        self._checkpointer.save_iteration(iteration)
        logger.warning(
            "%s: saved after iteration %d; go on from there with --resume. Exit code %d",
            received[0],
            iteration,
            EXIT_INTERRUPTED,
        )
        # As at the end of the loop; Detectron2's printer divides by the iterations since it wrote.
        self.trainer.iter += 1
        self._saved = True
        raise SystemExit(EXIT_INTERRUPTED)

    def after_train(self):
        self._requests.defer = False
        if self._own:
            self._requests.restore()
        ended_well = self.trainer.iter == self.trainer.max_iter and not self._saved
        if self._requests.received and ended_well:  # since the last iteration asked
            raise Interrupted


class EMA(HookBase):
    """
    Exponential moving average of a model's weights: after update n the average keeps
    ``min(decay, (1 + n) / (10 + n))`` of what it was, so that it follows the first iterations
    closely. Buffers are the model's own.

    Put it before validation, on every rank.
    """

    def __init__(self, model, decay):
        """
        Args:
            model (nn.Module): that is trained, not wrapped by DistributedDataParallel.
            decay (float): in (0, 1), such as 0.999.

        Raises:
            ValueError: for another decay.
        """
        if not 0 < decay < 1:
            raise ValueError(f"SOLVER.EMA_DECAY is {decay}; it lies between 0 (off) and 1")

        def average(averaged, current, updates):
            get_ema_multi_avg_fn(min(decay, (1 + updates) / (10 + updates)))(
                averaged, current, updates
            )

        self._live = model
        self._averaged = AveragedModel(model, multi_avg_fn=average)

    @property
    def model(self):
        """nn.Module: with the averaged weights."""
        return self._averaged.module

    def before_train(self):
        if self._averaged.n_averaged == 0:  # MODEL.WEIGHTS was loaded after this object was made
            self._averaged.update_parameters(self._live)

    def after_step(self):
        self._averaged.update_parameters(self._live)

    def state_dict(self):
        return self._averaged.state_dict()

    def load_state_dict(self, state_dict):
        self._averaged.load_state_dict(state_dict)


def _is_due(trainer, period):
    next_iter = trainer.iter + 1
    return next_iter == trainer.max_iter or (period > 0 and next_iter % period == 0)


def assemble_hooks(
    *,
    record,
    lr_scheduler,
    ema,
    validation,
    make_samples,
    checkpointer,
    checkpoint_period,
    make_writers,
    log_period,
    phases=None,
):
    """
    The hooks of a training in their order: validation and the best checkpoint come before the
    periodic checkpoint, so that this one carries their state.

    Args:
        record (RunRecord):
        lr_scheduler (LRScheduler):
        ema (EMA or None):
        validation (list[HookBase]): :class:`EvalHook` and :class:`BestCheckpointer`, or nothing.
        make_samples (callable or None): () -> SamplePredictions; main process only.
        checkpointer (Checkpointer): of the whole training.
        checkpoint_period (int): iterations between checkpoints.
        make_writers (callable): () -> list[EventWriter]; main process only.
        log_period (int): iterations between what the writers write.
        phases (Phases or None):

    Returns:
        list[HookBase]:
    """
    ret = [hooks.IterationTimer(), phases, lr_scheduler, ema, record, *validation]
    if comm.is_main_process():
        if make_samples is not None:
            ret.append(make_samples())
        ret += [
            hooks.PeriodicCheckpointer(checkpointer, checkpoint_period),
            hooks.PeriodicWriter(make_writers(), period=log_period),
        ]
    ret.append(Interruption(checkpointer))
    return [hook for hook in ret if hook is not None]


class EvalHook(hooks.EvalHook):
    """
    Evaluate every ``eval_period`` iterations and after the last one.

    Detectron2's own evaluates the last iteration after the training loop, too late for the final
    checkpoint to know the result.
    """

    def is_due(self) -> bool:
        return _is_due(self.trainer, self._period)

    def after_step(self):
        if self.is_due():
            self._do_eval()

    def after_train(self):
        # The function is a closure that holds the trainer: break the circle.
        del self._func


class BestCheckpointer(HookBase):
    """
    Save ``model_best.pth`` when validation is as good as ever: weights, iteration, score and the
    operating point that this validation gave.

    Unlike Detectron2's it remembers the best over a resume, never changes ``last_checkpoint``, and
    looks only at figures of this iteration. Put it behind :class:`EvalHook` and before the periodic
    checkpoint, on every rank (only the main process writes).
    """

    FILE_STEM = "model_best"

    def __init__(
        self,
        model,
        save_dir,
        validation,
        *,
        tau_rule=None,
        dataset=None,
        metric="lesion/selection",
    ):
        """
        Args:
            model (nn.Module): whose weights are saved.
            save_dir (str): folder of the checkpoint.
            validation (EvalHook): whose figures are looked at.
            tau_rule (str or None): MODEL.IMRCNN.TAU_RULE, by which the evaluator chose the figure
                ``lesion/tau_val``; None stores no operating point.
            dataset (str or None): the validation set whose ``tau_val`` is stored. A threshold is
                chosen on one set: the mean of two sets' thresholds would be neither's.
            metric (str): name of a figure, larger is better; the mean where several validation sets
                give one each.
        """
        self._checkpointer = Checkpointer(model, save_dir, whole=True)
        self._validation = validation
        if tau_rule is not None:
            check_rule(tau_rule)  # before the training, not at its first validation
        self._tau_rule, self._dataset = tau_rule, dataset
        self._metric = metric
        self.best_score = None
        self.best_iter = None

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
            "%s, the best weights so far, is damaged (%s) and set aside: the validations to come "
            "choose anew",
            self._path,
            problem,
        )
        if os.path.lexists(self._path):
            os.replace(self._path, f"{self._path}.damaged")
        self.best_score = self.best_iter = None
        return True

    def after_step(self):
        if self._validation.is_due():
            self._keep_if_best(self.trainer.iter)

    def _keep_if_best(self, iteration):
        """Of the weights as they are after an iteration, if they were validated just now."""
        if not comm.is_main_process():
            return
        figures = {
            name: value
            for name, (value, noted) in self.trainer.storage.latest().items()
            if noted == self.trainer.storage.iter
        }
        scores = [value for name, value in figures.items() if name.endswith(self._metric)]
        if not scores:
            return
        score = float(np.mean(scores))
        if math.isnan(score):
            logger.warning(
                "%s is undefined on the validation set: no best checkpoint", self._metric
            )
            return
        # Of equals the later one: early in training nothing reaches the threshold at all.
        if self.best_score is not None and score < self.best_score:
            logger.info(
                "%s %.3f: the best stays %.3f of iteration %d",
                self._metric,
                score,
                self.best_score,
                self.best_iter,
            )
            return
        self.best_score, self.best_iter = score, iteration
        point = self._operating_point(figures)
        self._checkpointer.write(self.FILE_STEM, **self.state_dict(), operating_point=point)
        logger.info("%s %.3f is the best so far: saved %s.pth", self._metric, score, self.FILE_STEM)

    def _operating_point(self, figures):
        # Detectron2 puts the data set's name before figures where there are several sets.
        tau = figures.get(f"{self._dataset}/lesion/tau_val", figures.get("lesion/tau_val"))
        if self._tau_rule is None or tau is None or math.isnan(tau):
            return None
        return {"tau": tau, "rule": self._tau_rule, "dataset": self._dataset}

    @property
    def _path(self):
        return os.path.join(self._checkpointer.save_dir, f"{self.FILE_STEM}.pth")

    def load_best(self):
        """
        Load the best weights of this run into the model, on every rank.

        Returns:
            Weights or None: None where none were saved (a file of an earlier run in the same folder
                is not this run's); the model is then left as it is.
        """
        if not comm.all_gather(self.best_iter is not None)[0]:  # only the main process knows
            return None
        return load_weights(self._checkpointer, self._path)

    def state_dict(self):
        return {"best_score": self.best_score, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict):
        self.best_score, self.best_iter = state_dict["best_score"], state_dict["best_iter"]


class SamplePredictions(HookBase):
    """
    Ground truth and prediction side by side on a few validation images, as TensorBoard pictures.
    For the main process alone.
    """

    def __init__(self, model, data_loader, dataset_name, period, score_thresh, num_images=4):
        """
        Args:
            model (nn.Module): a detector.
            data_loader (DataLoader): of the validation set, one image a batch.
            dataset_name (str): of the validation set.
            period (int): iterations between pictures; they are made after the last one too.
            score_thresh (float): detections below it are not drawn.
            num_images (int): how many images, spread evenly over the set.
        """
        dataset, records = data_loader.dataset, DatasetCatalog.get(dataset_name)
        picks = np.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).astype(int).tolist()
        self._inputs = [dataset[i] for i in picks]
        self._annotations = [records[i].get("annotations", []) for i in picks]
        self._model = model
        self._metadata = MetadataCatalog.get(dataset_name)
        self._period = period
        self._score_thresh = score_thresh

    def after_step(self):
        if _is_due(self.trainer, self._period):
            was_training = self._model.training
            self._model.eval()
            with torch.no_grad():
                for sample, annotations in zip(self._inputs, self._annotations, strict=True):
                    self._put_picture(sample, annotations)
            self._model.train(was_training)

    def _put_picture(self, sample, annotations):
        image = detection_utils.read_image(sample["file_name"], "RGB")
        instances = self._model([sample])[0]["instances"].to("cpu")
        kept = instances[instances.scores >= self._score_thresh]
        pictures = [
            Visualizer(image, self._metadata)
            .draw_dataset_dict({"annotations": annotations})
            .get_image(),
            Visualizer(image, self._metadata).draw_instance_predictions(kept).get_image(),
        ]
        side_by_side = np.concatenate(pictures, axis=1).transpose(2, 0, 1)
        name = f"ground truth | prediction, image {sample['image_id']}"
        self.trainer.storage.put_image(name, np.ascontiguousarray(side_by_side))
