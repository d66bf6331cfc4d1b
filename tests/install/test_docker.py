"""The image's entry point, and what its build files may not contain.

The image itself is built and run by docker/build_with_buildah.sh.
"""

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def app(tmp_path):
    """The image's /app (Path) with two tools, and a python that says what it was asked for."""
    for name in ("tools/train_net.py", "tools/evaluate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    return tmp_path


def start(app, *arguments, **options):
    return subprocess.Popen(
        [app / "docker" / "entrypoint.sh", *arguments],
        env={"PATH": f"{app / 'bin'}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "python"),
    [
        ([], ["train_net"]),
        (
            ["--config-file", "a b.yaml", "KEY", ""],
            ["train_net", "--config-file", "a b.yaml", "KEY", ""],
        ),
        (["train_net", "--help"], ["train_net", "--help"]),
        (["evaluate", "--gt", "a.json"], ["evaluate", "--gt", "a.json"]),
        (["python", "-c", "pass"], None),
    ],
)
def test_tools_by_name(app, arguments, python):
    out, err = start(app, *arguments).communicate()
    expected = [f"{app}/tools/{python[0]}.py", *python[1:]] if python else arguments[1:]
    assert out == "".join(f"{argument}\n" for argument in expected)
    assert err == ""


def test_other_programs(app):
    assert start(app, "echo", "a  b").communicate()[0] == "a  b\n"
    assert start(app, "/bin/echo", "c").communicate()[0] == "c\n"
    unknown = start(app, "evalute")
    assert "'evalute'. The tools: evaluate train_net" in unknown.communicate()[1]
    assert unknown.returncode == 127


def test_exit_code_and_signals_are_those_of_the_program(app):
    process = start(app, "sh", "-c", "exit 75")
    process.communicate()
    assert process.returncode == 75
    # Only a program that stands in the shell's place gets the signal that is sent to its id.
    process = start(app, "sh", "-c", "trap 'exit 75' TERM; echo ready; while :; do sleep 0.1; done")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75


def context_has(path):
    """Whether .dockerignore lets ``path`` into the build, as Docker does: the last match wins."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        kept_by_this = pattern.startswith("!")
        regex = re.escape(pattern.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{regex}(/.*)?", path):
            kept = kept_by_this
    return kept


@pytest.mark.parametrize(
    "path",
    [
        *(".git/config", ".venv/bin/python", "bundle/wheels/torch.whl", "bundle.partial/x"),
        *("output/egc/model_best.pth", "datasets/egc/images/1.png", "datasets/egc/splits.json"),
        *("imrcnn_d2/__pycache__/config.cpython-311.pyc", "imrcnn_d2.egg-info/PKG-INFO"),
        *("weights/model_final.pkl", "model.safetensors", ".env", "pip.conf", ".hypothesis/a"),
    ],
)
def test_stays_out_of_the_image(path):
    assert not context_has(path)


def test_program_is_in_the_image():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [path for path in files.stdout.splitlines() if not context_has(path)] == []


def logical_lines(text):
    """Dockerfile instructions, continued lines joined, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()


@pytest.fixture(scope="module")
def instructions():
    return [line for line in logical_lines((ROOT / "Dockerfile").read_text()) if line]


def test_final_stage(instructions):
    last = max(i for i, line in enumerate(instructions) if line.startswith("FROM"))
    final = "\n".join(instructions[last:])
    assert re.search(r"^USER (?!root|0)", final, re.MULTILINE)
    assert re.search(
        r'^ENTRYPOINT \["/usr/bin/tini", .*"/app/docker/entrypoint.sh"\]$', final, re.M
    )
    assert re.search(r'^VOLUME \["/data", "/outputs"\]$', final, re.MULTILINE)
    assert not re.search(r"g\+\+|gcc|build-essential|python3-dev|COPY --from=collect", final)
    version = re.search(r'version="(.+)"', (ROOT / "setup.py").read_text())[1]
    assert f"ARG VERSION={version}" in final.splitlines()


def test_no_secret_can_stay_in_the_image(instructions):
    for line in instructions:
        assert not re.search(r"(?i)password|passwd|token|api_?key", line), line
        assert not re.search(r"https?://", line), line
        # Settings of pip come as a secret that is mounted, never as an argument or a copy.
        assert not re.search(r"^(ARG|ENV)\b.*(INDEX|PROXY)", line), line
        assert "pip.conf" not in line or "--mount=type=secret" in line


def test_everything_copied_exists(instructions):
    for line in instructions:
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line


def test_compose():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    train = services["train"]
    assert train["command"][-1] == "--resume" and train["restart"].startswith("on-failure")
    config = re.search(r"\$\{CONFIG:-(.+)\}", train["command"][1])[1]
    assert (ROOT / config).is_file() and "--data" in train["command"]
    assert {volume.rpartition(":")[2] for volume in train["volumes"]} == {"/data", "/outputs"}
    assert "stop_grace_period" in train and "shm_size" in train and "user" in train
    assert services["tensorboard"]["image"] == train["image"]
