"""
Stop a training at random moments, resume it each time, and compare what is left with a training
that nobody disturbed: ``python tests/train/chaos.py FOLDER --stops 20``.

Every attempt is a fork of this process, which has imported everything and computed nothing, so
that an attempt starts at once. Kills at random moments take turns with kills in the middle of
writing a checkpoint and with SIGTERM or SIGINT, upon which the training saves and leaves by itself.
The number of workers changes from attempt to attempt.
"""

import argparse
import os
import random
import signal
import time
import traceback
from pathlib import Path

import torch

from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.synthetic import generate
from imrcnn_d2.engine import Trainer, load_config
from imrcnn_d2.engine.hooks import EXIT_INTERRUPTED, interruptible
from imrcnn_d2.utils.files import Rejects

SIZE = 64
# Of run.json's hook: times, which differ between any two runs.
TIMES = {"started", "hours"}


def settings(output, iterations, workers):
    return load_config(
        "configs/imrcnn_lite.yaml",
        [
            *("DATASETS.ROOT", "synthetic"),
            *("DATALOADER.NUM_WORKERS", workers),
            *("INPUT.MIN_SIZE_TRAIN", (SIZE - 16, SIZE)),
            *("INPUT.MIN_SIZE_TEST", SIZE),
            *("INPUT.AUG.COLOR", 0.2),
            *("MODEL.DEVICE", "cpu"),
            *("MODEL.TIMM.WEIGHTS", ""),
            *("MODEL.FPN.OUT_CHANNELS", 16),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 16),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 10),
            *("SOLVER.IMS_PER_BATCH", 2),
            *("SOLVER.MAX_ITER", iterations),
            *("SOLVER.WARMUP_ITERS", 3),
            *("SOLVER.AMP.ENABLED", True),
            *("SOLVER.EMA_DECAY", 0.9),
            *("SOLVER.CHECKPOINT_PERIOD", 2),
            *("TEST.EVAL_PERIOD", 6),
            *("SEED", 3),
            *("OUTPUT_DIR", str(output)),
        ],
    )


def fork(action, log):
    """Run ``action()`` in a process group of its own, so that a kill takes its children along."""
    child = os.fork()
    if child:
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


def train(output, iterations, workers):
    torch.set_num_threads(2)
    trainer = Trainer(settings(output, iterations, workers))
    trainer.resume_or_load(resume=True)
    trainer.train()


def ended(child):
    """None while the process runs, else its exit code."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def finish(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "it failed: see log.txt"


def stop(child, moment, number):
    """Send a signal as ``moment()`` becomes true; False if the training ended before."""
    while not moment():
        code = ended(child)
        if code is not None:
            assert code == 0, "the training failed: see log.txt"
            return False
        time.sleep(0.0005)
    if number == signal.SIGKILL:
        os.killpg(child, number)
        os.waitpid(child, 0)
    else:
        os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (EXIT_INTERRUPTED, 0), code  # 0: it came after the end
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


def facts(value):
    """A checkpoint without times, tensors as (dtype, shape, bytes)."""
    if isinstance(value, dict):
        return {key: facts(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [facts(item) for item in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    iterations = 4 * args.stops + 6
    log = args.folder / "log.txt"
    os.environ["IMRCNN_DATASETS"] = str(args.folder)
    undisturbed, disturbed = args.folder / "undisturbed", args.folder / "disturbed"
    for folder in (undisturbed, disturbed):
        folder.mkdir()

    def draw_images():
        source = generate(args.folder, 20, SIZE)
        prepare_dataset(source, args.folder / "synthetic", SplitOptions(), Rejects("raise"))

    finish(fork(draw_images, log))
    start = time.monotonic()
    child = fork(lambda: train(undisturbed, iterations, workers=0), log)
    while not any(undisturbed.glob("model_*")) and time.monotonic() < start + 600:
        time.sleep(0.001)
    first_checkpoint = time.monotonic() - start
    finish(child)
    print(f"undisturbed: {iterations} iterations in {time.monotonic() - start:.1f} s", flush=True)

    stops = 0
    while stops < args.stops:
        workers = rng.choice((0, 1, 2))
        child = fork(lambda workers=workers: train(disturbed, iterations, workers), log)
        how = ("killed", "killed in a write", "asked to stop")[stops % 3]
        moment = after(0.1 + rng.uniform(0, 1.5) * first_checkpoint)
        if how == "killed in a write":
            moment = during_a_write(disturbed, rng.choice((1, 1, 2)))
        polite = rng.choice((signal.SIGTERM, signal.SIGINT))
        if not stop(child, moment, polite if how == "asked to stop" else signal.SIGKILL):
            break  # done before its time: there is nothing left to stop
        stops += 1
        last = disturbed / "last_checkpoint"
        at = last.read_text() if last.exists() else "the beginning"
        print(f"{stops}: {how}, {workers} workers; goes on from {at}", flush=True)
    else:
        finish(fork(lambda: train(disturbed, iterations, workers=1), log))

    for name in ("model_final.pth", "model_best.pth"):
        a, b = (torch.load(f / name, weights_only=True) for f in (undisturbed, disturbed))
        assert facts(a) == facts(b), f"{name} differs"
    print(f"stopped {stops} times: weights and states are bit-identical")


if __name__ == "__main__":
    main()
