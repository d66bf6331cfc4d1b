"""A training that is asked to stop saves what it has, and goes on from there."""

import os
import signal
from types import SimpleNamespace

import pytest
from detectron2.engine import HookBase

from imrcnn_d2.engine import Trainer
from imrcnn_d2.engine import hooks as interruption
from imrcnn_d2.engine.hooks import EXIT_INTERRUPTED, SIGNALS, Interruption, interruptible


class SignalAt(HookBase):
    """Before an iteration, or after all else that is done in it."""

    def __init__(self, iteration, number, after=False):
        self._iteration, self._number, self._after = iteration, number, after

    def before_step(self):
        if self.trainer.iter == self._iteration and not self._after:
            os.kill(os.getpid(), self._number)

    def after_step(self):
        if self.trainer.iter == self._iteration and self._after:
            os.kill(os.getpid(), self._number)


@pytest.fixture
def former():
    """What handles the signals before a test, and has to after it."""

    def end(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in SIGNALS}
    yield end
    for number, handler in before.items():
        signal.signal(number, handler)


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


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_after_the_last_iteration_ends_before_the_test(tiny_cfg, tmp_path, number):
    tiny_cfg.SOLVER.MAX_ITER = 1
    trainer = Trainer(tiny_cfg)
    trainer.register_hooks([SignalAt(0, number, after=True)])
    with pytest.raises(SystemExit) as left:
        trainer.train()
    assert left.value.code == EXIT_INTERRUPTED
    output = tmp_path / "output"
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(output.glob("inference/*_test")), "the test set was looked at all the same"


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_iterations_a_request_ends_at_once(former, caplog, number):
    with pytest.raises(SystemExit) as left, interruptible():
        os.kill(os.getpid(), number)
        pytest.fail("it went on")
    assert left.value.code == EXIT_INTERRUPTED
    assert "--resume" in caplog.text
    os.kill(os.getpid(), number)  # the same request, while the process ends


def test_nothing_is_handled_afterwards(former):
    with pytest.raises(ValueError, match="of the training"), interruptible():
        raise ValueError("of the training")
    assert all(signal.getsignal(number) is former for number in SIGNALS)


def test_a_second_request_ends_the_process_at_once(monkeypatch, former):
    hook = Interruption(checkpointer=None)
    hook.trainer = SimpleNamespace(iter=3, max_iter=9)
    hook.before_train()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the same request, delivered twice
    monkeypatch.setattr(interruption, "SAME_REQUEST", -1.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    hook.after_train()
    assert all(signal.getsignal(number) is former for number in SIGNALS)
