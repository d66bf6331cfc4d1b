"""Checksums of a small bundle, weights from files, `make install` that refuses what is damaged."""

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import bundle
import pytest
from iopath.common.file_io import HTTPURLHandler

ROOT = Path(bundle.__file__).parent.parent


def describe(folder, **changes):
    """Write the description of a bundle that was made here, but for ``changes``."""
    description = {
        **bundle.this_python(),
        "release": platform.python_version(),
        "setup.py": bundle.sha256(ROOT / "setup.py"),
        **changes,
    }
    (folder / "bundle.json").write_text(json.dumps(description))
    bundle.write_sums(folder)


@pytest.fixture
def folder(tmp_path):
    """A whole bundle (Path) of two files and its description."""
    folder = tmp_path / "a bundle"
    (folder / "wheels").mkdir(parents=True)
    (folder / "weights").mkdir()
    (folder / "wheels" / "thing-1.0-py3-none-any.whl").write_bytes(b"wheel")
    (folder / "weights" / "model.pkl").write_bytes(b"weights")
    describe(folder)
    return folder


def test_sums_are_those_of_sha256sum(folder):
    assert shutil.which("sha256sum")
    done = subprocess.run(["sha256sum", "--check", "--strict", bundle.SUMS], cwd=folder)
    assert done.returncode == 0
    assert len((folder / bundle.SUMS).read_text().splitlines()) == 3


def test_whole_bundle(folder, capsys):
    assert bundle.find_faults(folder) == []
    bundle.check(folder)
    assert "Note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "word"),
    [({"setup.py": "0" * 64}, "another setup.py"), ({"release": "3.11.99"}, "by Python 3.11.99")],
)
def test_what_may_matter_is_said(folder, change, word, capsys):
    describe(folder, **change)
    bundle.check(folder)
    assert word in capsys.readouterr().out


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: flip(folder / "weights/model.pkl"), "damaged: weights/model.pkl"),
        (lambda folder: (folder / "weights/model.pkl").write_bytes(b""), "damaged: weights/model"),
        (lambda folder: (folder / "weights/model.pkl").unlink(), "missing: weights/model.pkl"),
        (lambda folder: flip(folder / "bundle.json"), "damaged: bundle.json"),
        (
            lambda folder: (folder / "wheels/evil-1.0-py3-none-any.whl").write_bytes(b""),
            "not in SHA256SUMS: wheels/evil-1.0-py3-none-any.whl",
        ),
    ],
)
def test_faults_are_named(folder, harm, fault):
    harm(folder)
    (found,) = bundle.find_faults(folder)
    assert found.startswith(fault)
    with pytest.raises(SystemExit) as refusal:
        bundle.check(folder)
    assert found in str(refusal.value) and "nothing was installed" in str(refusal.value)


@pytest.mark.parametrize(
    "line",
    ["", "0123  wheels/thing.whl", f"{'0' * 64}  /etc/passwd", f"{'0' * 64}  ../outside"],
)
def test_damaged_sums(folder, line):
    with (folder / bundle.SUMS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit, match="SHA256SUMS is damaged: line 4"):
        bundle.find_faults(folder)


def test_folder_without_sums(folder):
    (folder / bundle.SUMS).unlink()
    with pytest.raises(SystemExit, match="SHA256SUMS is missing.*make bundle"):
        bundle.check(folder)


@pytest.mark.parametrize(("key", "value"), [("python", "3.99"), ("platform", "linux-riscv64")])
def test_bundle_for_another_python(folder, key, value):
    describe(folder, **{key: value})
    with pytest.raises(SystemExit, match=f"{value}.*PYTHON=python"):
        bundle.check(folder)


@pytest.fixture
def published(tmp_path):
    """A file (Path) that stands for weights on a server, and its SHA-256."""
    path = tmp_path / "server" / "detectron2" / "model_final.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"published weights")
    return path, hashlib.sha256(b"published weights").hexdigest()


def test_weights_are_fetched_and_checked(published, tmp_path, capsys):
    path, digest = published
    weights = tmp_path / "weights"
    bundle.fetch_weights(f"{path.as_uri()}#sha256={digest}", weights)
    fetched = weights / path.relative_to("/")
    assert fetched.read_bytes() == b"published weights"
    bundle.fetch_weights(path.as_uri(), weights)
    assert f"{path.as_uri()}#sha256={digest}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"has SHA-256 {digest}, expected 00"):
        bundle.fetch_weights(f"{path.as_uri()}#sha256={'0' * 64}", weights)
    with pytest.raises(SystemExit, match="absent.pkl cannot be fetched"):
        bundle.fetch_weights((path.parent / "absent.pkl").as_uri(), weights)


def test_weights_lie_where_detectron2_looks(published, tmp_path, monkeypatch):
    path, _ = published
    monkeypatch.setattr(bundle, "MODEL_ZOO", path.parent.as_uri() + "/")
    bundle.fetch_weights("detectron2://model_final.pkl", tmp_path / "weights")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "weights"))
    # Nothing answers at this address: only the cache can.
    local = HTTPURLHandler()._get_local_path(f"http://localhost:9{path}")
    assert Path(local).read_bytes() == b"published weights"


@pytest.fixture
def checkout(tmp_path):
    """What `make install` reads, in a folder (Path) with a .venv that only checks bundles."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("packaging/bundle.py", "imrcnn_d2/cli/install_detectron2.py"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "pip").touch()
    (programs / "python").write_text(
        f'#!/bin/sh\n[ "$1" = packaging/bundle.py ] && exec "{sys.executable}" "$@"\n'
        'echo "asked for: $*"; exit 1\n'
    )
    (programs / "python").chmod(0o755)
    return folder


def make_install(checkout, folder):
    return subprocess.run(
        ["make", "install", f"OFFLINE={folder}"], cwd=checkout, capture_output=True, text=True
    )


def test_make_installs_nothing_from_a_damaged_bundle(checkout, folder):
    flip(folder / "wheels" / "thing-1.0-py3-none-any.whl")
    done = make_install(checkout, folder)
    assert done.returncode != 0
    assert "damaged: wheels/thing-1.0-py3-none-any.whl" in done.stderr
    assert "asked for" not in done.stdout


def test_make_installs_only_from_the_bundle(checkout, folder):
    done = make_install(checkout, folder)
    (asked,) = [line for line in done.stdout.splitlines() if line.startswith("asked for")]
    assert f"install --no-index --find-links {folder}/wheels torch torchvision" in asked


def test_broken_run_leaves_no_bundle(folder, tmp_path):
    before = bundle.files_below(folder)
    weights = (tmp_path / "absent.pkl").as_uri()
    for target in (tmp_path / "new", folder):
        with pytest.raises(SystemExit, match="absent.pkl cannot be fetched"):
            bundle.collect(target, "torch", ".", "constraints.txt", [weights])
    assert not (tmp_path / "new").exists()
    assert bundle.files_below(folder) == before and bundle.find_faults(folder) == []
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit, match="is no bundle: name another folder"):
        bundle.collect(tmp_path / "mine", "torch", ".", "constraints.txt", [])
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
