"""Real jobs of two processes over gloo: two launches as two "machines", one launch, torchrun."""

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine.launch import _find_free_port

from imrcnn_d2.engine import launch_script, load_config
from imrcnn_d2.engine.hooks import EXIT_INTERRUPTED
from imrcnn_d2.engine.launch import locked_output
from imrcnn_d2.evaluation.detection.operating_point import check_rule
from imrcnn_d2.utils.files import read_json

from .conftest import changed, load
from .distributed_job import gradients
from .test_chaos import facts

JOB = Path(__file__).with_name("distributed_job.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
KILLED = ("wait", 1, signal.SIGKILL, [1, 128 + signal.SIGKILL])
STOPPED = ("after", 0, signal.SIGTERM, [EXIT_INTERRUPTED] * 2)

# Losses are means over samples: the mean of two processes' is that of the double batch if both have
# the same number of samples. So: all anchors and all of a fixed number of proposals are sampled,
# and of these only the lesion itself, one per image, is foreground.
EQUAL_COUNTS = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10000, "MODEL.RPN.NMS_THRESH", 1.0),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 51),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.99]),
    *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", True, "SEED", 5),
]


class Job:
    """``python COMMAND`` for each command, with an action of distributed_job.py."""

    def __init__(self, folder, commands, **settings):
        self.folder, file = folder, folder / "settings.json"
        folder.mkdir()
        file.write_text(json.dumps({**settings, "folder": str(folder)}))
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        options["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        starts = [[sys.executable, *command, "--config-file", file] for command in commands]
        self.processes = [subprocess.Popen(start, **options) for start in starts]

    def running(self):
        assert all(process.poll() is None for process in self.processes), self.ended()
        time.sleep(0.02)
        return True

    def pids(self):
        """Of the job's processes 0 and 1, once they iterate."""
        files = [self.folder / "pid_0", self.folder / "pid_1"]
        while not all(file.exists() for file in files) and self.running():
            pass
        return [int(file.read_text()) for file in files]

    def ended(self):
        """The exit codes, and all output."""
        texts = [process.communicate(timeout=1800)[0] for process in self.processes]
        return [process.returncode for process in self.processes], texts


@pytest.fixture
def job(tiny_datasets, tiny_opts, tmp_path):
    """A function: (action, commands, name, further options) -> a `Job`."""
    for name in tiny_datasets.values():
        DatasetCatalog.get(name)  # its file is known once it was read
    files = {name: MetadataCatalog.get(name).json_file for name in tiny_datasets.values()}
    jobs = []

    def start(action, commands, name="job", more=()):
        opts = [*map(str, tiny_opts), "SEED", "5", *map(str, more)]
        jobs.append(Job(tmp_path / name, commands, action=action, datasets=files, opts=opts))
        return jobs[-1]

    yield start
    for process in (process for job in jobs for process in job.processes):
        process.kill()  # whose own processes the system ends
        process.wait()


@pytest.fixture
def machines():
    """The command of each of two machines with one process."""
    url = f"tcp://127.0.0.1:{_find_free_port()}"
    command = (JOB, "--num-machines", "2", "--dist-url", url, "--machine-rank")
    return (*command, "0"), (*command, "1")


@pytest.mark.slow
def test_two_machines_compute_what_one_does(job, machines, tiny_opts, tmp_path):
    codes, texts = job("step", machines, more=EQUAL_COUNTS).ended()
    assert codes == [0, 0], texts
    single = gradients(load_config("configs/imrcnn_lite.yaml", [*tiny_opts, *EQUAL_COUNTS]))
    ours, other = (load(tmp_path / f"job/gradients_{rank}.pth") for rank in (0, 1))
    assert not changed(ours, other) and len(single) > 50
    # fp32 sums of two halves are rounded otherwise; a share that is missing would be half of each.
    largest = {name: grad.abs().max().item() for name, grad in single.items()}
    close = {k: pytest.approx(0, abs=1e-5 + 1e-3 * value) for k, value in largest.items()}
    assert {k: (ours[k] - single[k]).abs().max().item() for k in ours} == close
    assert max(largest.values()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("action", "rank", "number", "expected"), [KILLED, STOPPED])
def test_a_signal_to_one_process_ends_the_job(job, machines, action, rank, number, expected):
    running = job(action, machines)
    os.kill(running.pids()[rank], number)
    codes, texts = running.ended()
    assert codes == expected, texts
    assert all("--resume" in text for text in texts), texts
    end = r"Process 1 of 2 \(machine 1, .*\) was killed by SIGKILL"
    assert all(bool(re.search(end, text)) == (rank == 1) for text in texts), texts


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while they start", "before", "wait", "after"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_the_launch_ends_all(job, moment, number):
    running = job(moment, [(JOB, "--num-gpus", "2")])
    (process,) = running.processes
    if moment == "while they start":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 3 and running.running():
            pass  # the third is multiprocessing's
    else:
        running.pids()
    process.send_signal(number)
    codes, texts = running.ended()
    assert codes == [EXIT_INTERRUPTED], texts
    assert "--resume" in texts[0] and "Traceback" not in texts[0], texts
    if moment == "wait":  # in the iterations: saved
        assert (running.folder / "last_checkpoint").read_text().startswith("model_")


@pytest.mark.slow
def test_torchrun_restarts_exactly(job, tmp_path):
    final = {}
    for name, starts in (("undisturbed", ["0"]), ("disturbed", ["0", "2"])):
        folder = tmp_path / name
        opts = ["DATASETS.VAL", "()", "SOLVER.MAX_ITER", "5", "OUTPUT_DIR", str(folder)]
        running = job("train", [(*TORCHRUN, "--max-restarts", "1", JOB)], name, more=opts)
        if name == "disturbed":
            (folder / "kill").touch()
        codes, texts = running.ended()
        assert codes == [0], texts
        assert (folder / "starts.txt").read_text().split() == starts, texts
        final[name] = facts(load(folder / "model_final.pth"))
    assert final["disturbed"] == final["undisturbed"]


def test_a_file_that_fails_is_one_line_and_a_defect_keeps_its_traceback(monkeypatch, tmp_path):
    for arguments in ((), ("--dist-url", "nonsense")):
        monkeypatch.setattr(sys, "argv", ["train", "--num-machines", "2", *arguments])
        with pytest.raises(ValueError, match="--dist-url"):
            launch_script(print)
    args = argparse.Namespace(num_gpus=1, num_machines=1)
    for name, use in (("no_such_config.yaml", load_config), ("no_such_file.json", read_json)):
        with pytest.raises(SystemExit, match=name):
            launch_script(lambda args, use=use, name=name: use(tmp_path / name), args)
    # As after the iterations: what our own code refuses there is no mistake of the user's.
    for text, use in (("invalid literal", int), ("threshold", check_rule)):
        with pytest.raises(ValueError, match=text):
            launch_script(lambda args, use=use: use("x"), args)


@pytest.mark.parametrize("name", ["config.yaml", "inference", "log.txt", ".lock"])
def test_nothing_is_written_through_a_link_or_pipe(tmp_path, name):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    for make in (lambda path: path.symlink_to(outside), os.mkfifo):
        make(folder / name)
        with pytest.raises(ValueError, match=str(folder / name)), locked_output(str(folder)):
            pytest.fail("it was to be refused")
        assert [path.name for path in folder.iterdir()] == [name] and not outside.exists()
        (folder / name).unlink()


def lock_and_fork(folder, pids):
    with locked_output(folder):
        pids.send(os.fork())  # as a data loader does; both processes send
        time.sleep(600)


@pytest.mark.slow
def test_a_killed_job_leaves_its_folder_to_others(tmp_path):
    context = multiprocessing.get_context("spawn")
    pids, sent = context.Pipe(duplex=False)
    process = context.Process(target=lock_and_fork, args=(str(tmp_path), sent))
    process.start()
    sent.close()
    child = max(pids.recv() for _ in range(2))
    process.kill()
    process.join()
    try:
        with locked_output(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
