"""The batch scripts of examples/slurm, with Slurm's commands replaced by ones that take notes."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = sorted(Path("examples/slurm").glob("*.sbatch"))

# Notes its name and arguments. As the training it ends with $CODE, or runs until SIGTERM, then 75.
COMMAND = """#!/bin/bash
echo "$(basename "$0") $*" >> "$NOTES"
case "$(basename "$0") $*" in
    "scontrol show"*) echo node7; echo node8 ;;
    scancel*) kill -TERM "$(cat "$NOTES.pid")"; sleep 0.3 ;;  # the training ends before it does
    *train_net*)
        [ -n "$CODE" ] && exit "$CODE"
        trap 'exit 75' TERM
        echo $$ > "$NOTES.pid"
        while true; do sleep 0.05; done ;;
esac
"""


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def submit(request, tmp_path):
    """A function that starts the script as Slurm does, with commands that take notes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "srun", "scontrol", "scancel"):
        (folder / name).write_text(COMMAND)
        (folder / name).chmod(0o755)

    def start(code=""):
        env = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "NOTES": str(tmp_path / "notes"),
            "CODE": code,
            "SLURM_JOB_ID": "30012",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
        }
        return subprocess.Popen(["bash", request.param, "--config-file", "a b.yaml"], env=env)

    return start, tmp_path / "notes"


def test_a_training_that_ends_is_not_queued_again(submit):
    start, notes = submit
    for code in (0, 1):
        assert start(str(code)).wait(60) == code
    text = notes.read_text()
    assert "requeue" not in text
    assert "--resume --config-file a b.yaml" in text
    assert "--num-gpus 4" in text or (
        "--nproc-per-node 4" in text and "--rdzv-endpoint node7:30012" in text
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_before_its_time_is_over_it_saves_and_queues_again(submit, number):
    start, notes = submit
    job = start()
    while not Path(f"{notes}.pid").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(60) == 75
    assert notes.read_text().splitlines()[-1] == "scontrol requeue 30012"


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_shellcheck_finds_nothing(script):
    subprocess.run(["shellcheck", script], check=True)
