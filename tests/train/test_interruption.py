"""A training that is asked to stop saves what it has, and goes on from there."""

import os
import signal
from types import SimpleNamespace

import pytest
from detectron2.engine import HookBase

from imrcnn_d2.engine import Trainer
from imrcnn_d2.engine import hooks as interruption
from imrcnn_d2.engine.hooks import EXIT_INTERRUPTED, SIGNALS, Interruption, interruptible


def interrupted(cfg, iteration, number, moment="before_step", resume=False):
    """The trainer after a signal in an iteration, before its step or after all else in it."""

    def send():
        if trainer.iter == iteration:
            os.kill(os.getpid(), number)

    trainer, hook = Trainer(cfg), HookBase()
    setattr(hook, moment, send)
    trainer.resume_or_load(resume)
    trainer.register_hooks([hook])
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == EXIT_INTERRUPTED == 75
    return trainer


@pytest.fixture
def former():
    """What handles the signals before a test, and has to after it."""

    def end(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in SIGNALS}
    yield end
    assert all(signal.getsignal(number) is end for number in SIGNALS)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_it_finishes_the_iteration_saves_and_leaves(tiny_cfg, tmp_path, former, number):
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = tiny_cfg.TEST.EVAL_PERIOD = 1000
    interrupted(tiny_cfg, 1, number)
    last = tmp_path / "output" / "last_checkpoint"
    assert last.read_text() == "model_0000001.pth"
    resumed = interrupted(tiny_cfg, 3, number, resume=True)  # the last iteration
    assert resumed.start_iter == 2 and last.read_text() == "model_0000003.pth"
    again = Trainer(tiny_cfg)
    again.resume_or_load(resume=True)
    assert "lesion" in again.train()


def test_a_request_after_the_last_iteration_ends_before_the_test(tiny_cfg, tmp_path, former):
    tiny_cfg.SOLVER.MAX_ITER = 1
    interrupted(tiny_cfg, 0, signal.SIGTERM, "after_step")
    output = tmp_path / "output"
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(output.glob("inference/*_test")), "the test set was evaluated all the same"


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_iterations_a_request_ends_at_once(former, caplog, number):
    with pytest.raises(ValueError, match="of the training"), interruptible():
        raise ValueError("of the training")
    assert signal.getsignal(number) is former, "an error restores the handlers"
    with pytest.raises(SystemExit) as ended, interruptible():
        os.kill(os.getpid(), number)
        pytest.fail("it went on")
    assert ended.value.code == EXIT_INTERRUPTED and "--resume" in caplog.text
    os.kill(os.getpid(), number)  # the same request, while the process ends
    for number in SIGNALS:
        signal.signal(number, former)


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
