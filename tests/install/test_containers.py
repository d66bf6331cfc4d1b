"""The image, its entry point and build files; batch scripts, with a Slurm that takes notes."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from processes import ROOT

from imrcnn_d2 import __version__

SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))

# Notes its name and arguments. As the training it ends with $CODE, or runs until SIGTERM, then 75.
COMMAND = """#!/bin/bash
echo "$(basename "$0") $*" >> "$NOTES"
case "$(basename "$0") $*" in
    "scontrol show"*) echo node7; echo node8 ;;
    scancel*) kill -TERM "$(cat "$NOTES.pid")"; sleep 0.3 ;;  # the training ends before it does
    *"imrcnn train"*)
        [ -n "$CODE" ] && exit "$CODE"
        trap 'exit 75' TERM
        echo $$ > "$NOTES.pid"
        while true; do sleep 0.05; done ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Start the entry point of an /app with two tools, and a python that prints its arguments."""
    for name in ("tools/train_net.py", "tools/evaluate.py", "bin/python"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    shutil.copytree(ROOT / "docker", tmp_path / "docker")

    def run(*arguments):
        env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        command = [tmp_path / "docker" / "entrypoint.sh", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=env, **pipes)

    return run


def test_tools_by_name_and_other_programs(start, tmp_path):
    for arguments, printed in (
        ([], ["train_net.py"]),
        (["--config-file", "a b.yaml", ""], ["train_net.py", "--config-file", "a b.yaml", ""]),
        (["train_net", "--help"], ["train_net.py", "--help"]),
        (["evaluate", "--gt", "a.json"], ["evaluate.py", "--gt", "a.json"]),
        (["python", "-c", "pass"], ["-c", "pass"]),
        (["echo", "a  b"], ["a  b"]),
        (["/bin/echo", "c"], ["c"]),
    ):
        out, err = start(*arguments).communicate()
        assert out.replace(f"{tmp_path}/tools/", "") == "".join(f"{line}\n" for line in printed)
        assert err == ""


def test_exit_code_and_signals_are_those_of_the_program(start):
    process = start("evalute")
    assert "'evalute'. The tools: evaluate train_net" in process.communicate()[1]
    assert process.returncode == 127
    assert start("sh", "-c", "exit 75").wait() == 75
    # Only a program that replaces the shell gets the signal that is sent to its id.
    process = start("sh", "-c", "trap 'exit 75' TERM; echo ready; while :; do sleep 0.1; done")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75


def context_has(path):
    """Whether .dockerignore keeps a file in the build context: the last matching line decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            regex = re.escape(pattern.lstrip("!"))
            regex = regex.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if re.fullmatch(f"{regex}(/.*)?", path):
                kept = pattern.startswith("!")
    return kept


def test_the_image_holds_the_program_and_no_data():
    foreign = [".git/config", ".venv/bin/python", "bundle/wheels/torch.whl", "bundle.partial/x"]
    foreign += ["output/egc/model_best.pth", "datasets/egc/images/1.png", "imrcnn_d2.egg-info/PKG"]
    foreign += ["imrcnn_d2/__pycache__/config.cpython-311.pyc", "weights/model_final.pkl", ".env"]
    foreign += ["datasets/egc/splits.json", "model.safetensors", "pip.conf", ".hypothesis/a"]
    assert [path for path in foreign if context_has(path)] == []
    if (ROOT / ".git").exists():
        files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
        assert [path for path in files if not context_has(path)] == []


def test_dockerfile():
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("FROM"))
    final = "\n".join(lines[last:])
    entrypoint = r'^ENTRYPOINT \["/usr/bin/tini", .*"/app/docker/entrypoint.sh"\]$'
    for pattern in (r"^USER (?!root|0)", entrypoint, r'^VOLUME \["/data", "/outputs"\]$'):
        assert re.search(pattern, final, re.MULTILINE)
    assert not re.search(r"g\+\+|gcc|build-essential|python3-dev|COPY --from=collect", final)
    assert f"ARG VERSION={__version__}" in lines[last:]
    for line in lines:
        # No secret can stay in the image: pip's settings are a mounted secret, never an argument.
        assert not re.search(r"(?i)password|passwd|token|api_?key|https?://", line), line
        assert not re.search(r"^(ARG|ENV)\b.*(INDEX|PROXY)", line), line
        assert "pip.conf" not in line or "--mount=type=secret" in line
        if line.startswith("COPY") and "--from" not in line:
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line


@pytest.mark.slow
@pytest.mark.skipif(
    "MIRROR" not in os.environ, reason="MIRROR names no Debian mirror to build from"
)
def test_the_image_trains_and_predicts(tmp_path):
    """As docker/build_with_buildah.sh says, as root; OPTIONS are those of buildah build."""
    options = os.environ.get("OPTIONS", "").split()
    subprocess.run([ROOT / "docker" / "build_with_buildah.sh", tmp_path, *options], check=True)


def test_compose():
    train = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["train"]
    assert train["command"][-1] == "--resume" and train["restart"].startswith("on-failure")
    config = re.search(r"\$\{CONFIG:-(.+)\}", train["command"][1])[1]
    assert (ROOT / config).is_file() and "--data" in train["command"]
    assert {"stop_grace_period", "shm_size", "user"} <= train.keys()


def submit(script, folder, code=""):
    """Start a script as Slurm does."""
    for name in ("python", "srun", "scontrol", "scancel"):
        (folder / name).write_text(COMMAND)
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "NOTES": f"{folder}/notes", "CODE": code}
    env |= {"SLURM_JOB_ID": "30012", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
    command = ["bash", script, "--config-file", "a b.yaml"]
    return subprocess.Popen(command, env={**env, "SLURM_GPUS_ON_NODE": "4"})


of_each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@of_each_script
def test_a_training_that_ends_is_not_queued_again(script, tmp_path):
    for code in (0, 1):
        assert submit(script, tmp_path, str(code)).wait(60) == code
    text = (tmp_path / "notes").read_text()
    assert "requeue" not in text and "--resume --config-file a b.yaml" in text
    assert re.search("--num-gpus 4|--nproc-per-node 4 .*--rdzv-endpoint node7:30012", text)


@of_each_script
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_and_queues_the_job_again(script, tmp_path, number):
    job = submit(script, tmp_path)
    while not (tmp_path / "notes.pid").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(60) == 75
    assert (tmp_path / "notes").read_text().splitlines()[-1] == "scontrol requeue 30012"
