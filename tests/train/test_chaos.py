"""Stop a training at random moments, resume it each time, and compare the result with that of an
undisturbed training; as a script: ``python tests/train/test_chaos.py FOLDER --stops 20``.

Each attempt is a fork of the script, which has imported everything and computed nothing, and has
its number of workers. It is killed, or killed while it writes a checkpoint, or asked to stop."""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.synthetic import generate
from imrcnn_d2.engine import Trainer, load_config
from imrcnn_d2.engine.hooks import EXIT_INTERRUPTED, interruptible
from imrcnn_d2.utils.files import Rejects

SIZE = 64
# Differ between two runs: times of run.json's hook, and the config, which names the workers.
VARYING = {"started", "hours", "config"}


@pytest.mark.slow
def test_a_training_that_is_stopped_again_and_again(tmp_path):
    command = [sys.executable, __file__, tmp_path, "--stops", "3"]
    ran = subprocess.run(command, capture_output=True, text=True)
    log = tmp_path / "log.txt"
    assert ran.returncode == 0, ran.stdout + ran.stderr + (log.read_text() if log.exists() else "")
    # Fewer than three if it ended before.
    assert re.search("stopped [123] times: weights and states are bit-identical", ran.stdout)


def facts(value):
    """A checkpoint without what varies, tensors as (dtype, shape, bytes)."""
    if isinstance(value, dict):
        return {key: facts(item) for key, item in value.items() if key not in VARYING}
    if isinstance(value, list | tuple):
        return [facts(item) for item in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    return value


def train(output, iterations, workers):
    opts = [
        *("DATASETS.ROOT", "synthetic", "DATALOADER.NUM_WORKERS", workers),
        *("INPUT.MIN_SIZE_TRAIN", (SIZE - 16, SIZE), "INPUT.MIN_SIZE_TEST", SIZE),
        *("INPUT.AUG.COLOR", 0.2, "MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""),
        *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.POST_NMS_TOPK_TEST", 10),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", iterations, "SOLVER.WARMUP_ITERS", 3),
        *("SOLVER.AMP.PRECISION", "bf16", "SOLVER.EMA_DECAY", 0.9),
        *("SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 6),
        *("SEED", 3, "OUTPUT_DIR", str(output)),
    ]
    torch.set_num_threads(2)
    trainer = Trainer(load_config("configs/imrcnn_lite.yaml", opts))
    trainer.resume_or_load(resume=True)
    trainer.train()


def fork(action, log):
    """Run ``action()`` in a process group of its own, so that a kill takes its children along."""
    if child := os.fork():
        os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        with interruptible():
            action()
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child, *codes):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, *codes), f"it ended with {code}: see log.txt"


def stop(child, moment, number):
    """Send a signal as ``moment()`` becomes true; False if the training ended before."""
    while not moment():
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, "the training failed: see log.txt"
            return False
        time.sleep(0.0005)
    (os.killpg if number == signal.SIGKILL else os.kill)(child, number)
    finish(child, -number if number == signal.SIGKILL else EXIT_INTERRUPTED)  # 0: after the end
    return True


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def during_a_write(folder, writes):
    """While a checkpoint is being written for the ``writes``-th time."""
    seen, was = 0, False

    def moment():
        nonlocal seen, was
        now = any(folder.glob("*.pth.tmp"))
        seen, was = seen + (now and not was), now
        return now and seen == writes

    return moment


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, iterations = random.Random(args.seed), 4 * args.stops + 6
    os.environ["IMRCNN_DATASETS"] = str(args.folder)
    undisturbed, disturbed = folders = args.folder / "undisturbed", args.folder / "disturbed"
    for folder in folders:
        folder.mkdir()

    def start(action):
        return fork(action, args.folder / "log.txt")

    def write_images():
        source = generate(args.folder, 20, SIZE)
        prepare_dataset(source, args.folder / "synthetic", SplitOptions(), Rejects("raise"))

    finish(start(write_images))
    began = time.monotonic()
    child = start(lambda: train(undisturbed, iterations, workers=0))
    while not any(undisturbed.glob("model_*")) and time.monotonic() < began + 600:
        time.sleep(0.001)
    first_checkpoint = time.monotonic() - began
    finish(child)

    stops = 0
    while stops < args.stops:
        workers = rng.choice((0, 1, 2))
        child = start(lambda workers=workers: train(disturbed, iterations, workers))
        manner = ("killed", "killed in a write", "asked to stop")[stops % 3]
        moment = after(0.1 + rng.uniform(0, 1.5) * first_checkpoint)
        if manner == "killed in a write":
            moment = during_a_write(disturbed, rng.choice((1, 1, 2)))
        request = rng.choice((signal.SIGTERM, signal.SIGINT))
        if not stop(child, moment, request if manner == "asked to stop" else signal.SIGKILL):
            break  # it ended before: there is nothing left to stop
        stops += 1
        print(f"{stops}: {manner}, {workers} workers", flush=True)
    else:
        finish(start(lambda: train(disturbed, iterations, workers=1)))

    for name in ("model_final.pth", "model_best.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in folders)
        assert facts(a) == facts(b), f"{name} differs"
    print(f"stopped {stops} times: weights and states are bit-identical")


if __name__ == "__main__":
    main()
