"""Real jobs of two processes over gloo: two launches as two "machines", one launch, torchrun."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from imrcnn_d2.data.catalog import register_lesion_dataset
from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.hooks import EXIT_INTERRUPTED
from imrcnn_d2.engine.launch import launch_script, locked_output

from .chaos import facts
from .conftest import write_dataset
from .distributed_job import gradients

pytestmark = pytest.mark.slow

JOB = Path(__file__).with_name("distributed_job.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# Losses are means over samples: the mean of two processes' is that of the double batch if both have
# the same number of samples. So: all anchors and all of a fixed number of proposals are sampled,
# and of these only the lesion itself, one an image, is foreground.
EQUAL_COUNTS = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10000),
    *("MODEL.RPN.NMS_THRESH", 1.0),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 51),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.99]),
]


@contextlib.contextmanager
def started(settings, folder, *commands, **env):
    """Start ``python COMMAND`` for each command, with the job's settings; end them in any case."""
    folder.mkdir()
    settings = {**settings, "folder": str(folder)}
    (folder / "settings.json").write_text(json.dumps(settings))
    config = ("--config-file", str(folder / "settings.json"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **env}
    processes = [
        subprocess.Popen(
            [sys.executable, *command, *config],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()  # whose own processes are told by the system
            process.wait()


def outputs(processes):
    """[(exit code, output)]"""
    texts = [process.communicate(timeout=1800)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def machines():
    """The command of each of two machines with one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = (JOB, "--num-machines", "2", "--dist-url", url, "--machine-rank")
    return (*command, "0"), (*command, "1")


def pids(folder, processes):
    """Of the job's processes 0 and 1, once they iterate."""
    files = [folder / "pid_0", folder / "pid_1"]
    while not all(file.exists() for file in files):
        assert all(p.poll() is None for p in processes), outputs(processes)
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


@pytest.fixture
def settings(tiny_datasets, tiny_opts, tmp_path):
    """Of a job on the tiny data sets, and on one whose images have one lesion each."""
    for name in tiny_datasets.values():
        DatasetCatalog.get(name)  # its file is known once it was read
    files = {name: MetadataCatalog.get(name).json_file for name in tiny_datasets.values()}
    return {"datasets": files, "opts": [*map(str, tiny_opts), "SEED", "5"]}


def test_two_machines_compute_what_one_does(settings, tiny_datasets, tmp_path):
    """Gradients of the double batch, and each of an odd number of images evaluated once."""
    name = uuid.uuid4().hex
    lesions = write_dataset(tmp_path / "lesions", 2)  # images 1 and 2 of three have one lesion
    settings["datasets"][name] = str(lesions)
    settings["opts"] += [*map(str, EQUAL_COUNTS), "DATASETS.TRAIN", f"('{name}',)"]
    with started(settings | {"action": "step"}, tmp_path / "job", *machines()) as processes:
        ended = outputs(processes)
    assert [code for code, _ in ended] == [0, 0], ended

    register_lesion_dataset(name, lesions, lesions.parent)
    single = gradients(load_config("configs/synthetic/imrcnn_lite.yaml", settings["opts"]))
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    ours, other = (torch.load(tmp_path / f"job/gradients_{rank}.pth") for rank in (0, 1))
    assert ours.keys() == single.keys() and len(single) > 50
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    # fp32 sums of two halves are rounded otherwise; a share that is missing would be half of each.
    for name, grad in single.items():
        largest = grad.abs().max().item()
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=1e-5 + 1e-3 * largest, msg=name)
    assert max(grad.abs().max() for grad in single.values()) > 1e-2

    folder = tmp_path / "output/inference" / tiny_datasets["test"]
    rows = (folder / "per_image.csv").read_text().splitlines()
    assert len(rows) == 1 + 5


def test_a_killed_process_ends_the_job_on_both_machines(settings, tmp_path):
    folder = tmp_path / "job"
    with started(settings | {"action": "wait"}, folder, *machines()) as processes:
        os.kill(pids(folder, processes)[1], signal.SIGKILL)
        ended = outputs(processes)
    assert [code for code, _ in ended] == [1, 128 + signal.SIGKILL], ended
    for _, output in ended:
        assert re.search(r"Process 1 of 2 \(machine 1, .*\) was killed by SIGKILL", output), output
        assert "--resume" in output


def test_sigterm_to_the_launch_saves_and_ends_all(settings, tmp_path):
    folder = tmp_path / "job"
    with started(settings | {"action": "wait"}, folder, (JOB, "--num-gpus", "2")) as processes:
        pids(folder, processes)
        processes[0].send_signal(signal.SIGTERM)
        ended = outputs(processes)
    assert ended[0][0] == EXIT_INTERRUPTED, ended
    assert (folder / "last_checkpoint").read_text().startswith("model_")


@pytest.mark.parametrize("moment", ["while they start", "before", "after"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_outside_iterations_ends_all(settings, tmp_path, moment, number):
    folder = tmp_path / "job"
    with started(settings | {"action": moment}, folder, (JOB, "--num-gpus", "2")) as processes:
        if moment == "while they start":
            children = Path(f"/proc/{processes[0].pid}/task/{processes[0].pid}/children")
            while len(children.read_text().split()) < 3:  # the third is multiprocessing's
                assert processes[0].poll() is None, outputs(processes)
        else:
            pids(folder, processes)
        processes[0].send_signal(number)
        ended = outputs(processes)
    assert ended[0][0] == EXIT_INTERRUPTED, ended
    assert "--resume" in ended[0][1] and "Traceback" not in ended[0][1], ended


def test_a_request_to_one_process_ends_the_job_on_both_machines(settings, tmp_path):
    folder = tmp_path / "job"
    with started(settings | {"action": "after"}, folder, *machines()) as processes:
        os.kill(pids(folder, processes)[0], signal.SIGTERM)
        ended = outputs(processes)
    assert [code for code, _ in ended] == [EXIT_INTERRUPTED] * 2, ended


def test_a_folder_is_for_one_job(tmp_path, monkeypatch):
    monkeypatch.setattr("imrcnn_d2.engine.launch.LOCK_TIMEOUT", 0)
    with locked_output(tmp_path), pytest.raises(ValueError, match=str(tmp_path)):
        with locked_output(tmp_path):
            pytest.fail("a second job came in")
    with locked_output(tmp_path):
        pass


@pytest.mark.parametrize("name", ["config.yaml", "inference", "log.txt", ".lock"])
def test_nothing_is_written_through_a_link_or_pipe(tmp_path, name):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{folder / name}.*{outside}"):
        with locked_output(str(folder)):
            pytest.fail("it was to be refused")
    assert [path.name for path in folder.iterdir()] == [name] and not outside.exists()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{folder / name}"), locked_output(str(folder)):
        pytest.fail("it was to be refused")


def lock_and_fork(folder):
    with locked_output(folder):
        os.fork()  # as a data loader does
        (Path(folder) / f"locked_{os.getpid()}").touch()
        time.sleep(600)


def test_a_killed_job_leaves_its_folder_to_others(tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=lock_and_fork, args=(str(tmp_path),)
    )
    process.start()
    while len(locked := list(tmp_path.glob("locked_*"))) < 2:
        assert process.exitcode is None
        time.sleep(0.05)
    process.kill()
    process.join()
    (child,) = {int(path.name.removeprefix("locked_")) for path in locked} - {process.pid}
    try:
        with locked_output(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.story
def test_torchrun_restarts_exactly(settings, tmp_path):
    settings["opts"] += ["DATASETS.VAL", "()", "SOLVER.MAX_ITER", "5"]
    found = {}
    for name in ("undisturbed", "disturbed"):
        folder = tmp_path / name
        own = settings | {"action": "train"}
        own["opts"] = [*settings["opts"], "OUTPUT_DIR", str(folder)]
        with started(own, folder, (*TORCHRUN, "--max-restarts", "1", JOB)) as processes:
            if name == "disturbed":
                (folder / "kill").touch()
            ended = outputs(processes)
        assert ended[0][0] == 0, ended
        found[name] = torch.load(folder / "model_final.pth", weights_only=True)
        starts = (folder / "starts.txt").read_text().split()
        assert starts == (["0"] if name == "undisturbed" else ["0", "2"]), ended
    assert facts(found["disturbed"]) == facts(found["undisturbed"])


@pytest.mark.parametrize("arguments", [(), ("--dist-url", "nonsense")])
def test_machines_need_an_address(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["train", "--num-machines", "2", *arguments])
    with pytest.raises(ValueError, match=r"--dist-url .*tcp://HOST:PORT"):
        launch_script(print)
