"""Leaving a training in good order when the machine is wanted for something else."""

import logging
import signal
import threading
import time

from detectron2.engine import HookBase
from detectron2.utils import comm

__all__ = ["EXIT_INTERRUPTED", "Interruption"]

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h, "try again later": saved, to be started again with --resume.
EXIT_INTERRUPTED = 75


class Interruption(HookBase):
    """
    On SIGTERM or SIGINT (Ctrl-C) to any process of the training: finish the iteration, save a
    checkpoint, and exit with :data:`EXIT_INTERRUPTED`. A signal that comes more than
    ``SAME_REQUEST`` seconds after the first ends the process at once.

    Put it last, on every rank: the checkpoint then has all that the iteration's other hooks did.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    # Slurm, and launchers that pass signals on, may deliver one request twice.
    SAME_REQUEST = 5.0

    def __init__(self, checkpointer):
        """
        Args:
            checkpointer (Checkpointer): of the whole training.
        """
        self._checkpointer = checkpointer
        self._received, self._since = None, None
        self._former = {}

    def before_train(self):
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            self._former = {s: signal.signal(s, self._receive) for s in self.SIGNALS}

    def _receive(self, number, frame):
        if self._received is None:
            self._received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() > self._since + self.SAME_REQUEST:
            self._restore()
            signal.raise_signal(number)

    def _restore(self):
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def after_step(self):
        received = [name for name in comm.all_gather(self._received) if name]
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
        raise SystemExit(EXIT_INTERRUPTED)

    def after_train(self):
        self._restore()
