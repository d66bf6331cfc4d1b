"""A training that is asked to stop saves what it has, and goes on from there."""

import os
import signal

import pytest
from detectron2.engine import HookBase

from imrcnn_d2.engine import Trainer
from imrcnn_d2.engine.interruption import EXIT_INTERRUPTED, Interruption


class SignalAt(HookBase):
    def __init__(self, iteration, number):
        self._iteration, self._number = iteration, number

    def before_step(self):
        if self.trainer.iter == self._iteration:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_finishes_the_iteration_saves_and_leaves(tiny_cfg, tmp_path, number):
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 1000
    tiny_cfg.TEST.EVAL_PERIOD = 1000
    before = signal.getsignal(number)
    trainer = Trainer(tiny_cfg)
    trainer.register_hooks([SignalAt(1, number)])
    with pytest.raises(SystemExit) as left:
        trainer.train()
    assert left.value.code == EXIT_INTERRUPTED == 75
    assert signal.getsignal(number) is before
    output = tmp_path / "output"
    assert (output / "last_checkpoint").read_text() == "model_0000001.pth"

    resumed = Trainer(tiny_cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    with pytest.raises(SystemExit):  # at its last iteration too
        resumed.register_hooks([SignalAt(3, number)])
        resumed.train()
    assert (output / "last_checkpoint").read_text() == "model_0000003.pth"
    again = Trainer(tiny_cfg)
    again.resume_or_load(resume=True)
    assert "lesion" in again.train()


def test_a_second_request_ends_the_process_at_once(monkeypatch):
    def end(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in Interruption.SIGNALS}
    hook = Interruption(checkpointer=None)
    hook.before_train()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same request, delivered twice
        monkeypatch.setattr(hook, "SAME_REQUEST", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        hook.after_train()
        assert all(signal.getsignal(number) is end for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
