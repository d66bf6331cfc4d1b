"""Leaving a training in good order when the machine is wanted for something else."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time

import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

__all__ = ["EXIT_INTERRUPTED", "SIGNALS", "Interrupted", "Interruption", "interruptible"]

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
