"""Detectron2's installer (`make install` does the download), the bundle, `import imrcnn_d2`."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import bundle
import pytest
from processes import ROOT, run_script

from imrcnn_d2.cli import install_detectron2
from imrcnn_d2.utils.safe_loading import DownloadHandler

METADATA = """\
Metadata-Version: 2.1
Name: sal-detectron2
Version: 0.7.2
Summary: Segmenant Anything in Lidar
License-File: LICENSE
Requires-Dist: Pillow>=7.1
Requires-Dist: numpy<2
Requires-Dist: black
Provides-Extra: dev
Requires-Dist: black==23.3.0; extra == "dev"
"""
# Shortened: newer releases of setuptools have no pkg_resources.
MODEL_ZOO = """\
import os
import pkg_resources

def get_config_file(config_path):
    cfg_file = pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
    return cfg_file
"""
INFO = "sal_detectron2-0.7.2.dist-info"
FILES = {
    "detectron2/__init__.py": '__version__ = "0.7.2"\n',
    "detectron2/model_zoo/__init__.py": "from .model_zoo import get_config_file\n",
    "detectron2/model_zoo/model_zoo.py": MODEL_ZOO,
    "detectron2/model_zoo/configs/Base.yaml": "",
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "compiled",
    "tools/train_net.py": "",
    f"{INFO}/METADATA": METADATA,
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n",
    f"{INFO}/LICENSE": "Apache License",
    f"{INFO}/top_level.txt": "detectron2\ntools\n",
}
ABSENT = "raise ModuleNotFoundError(name=__name__)"
PRESENT = {"torch": "", "torchvision": ""}
WHEEL, WEIGHTS = "wheels/thing-1.0-py3-none-any.whl", "weights/model.pkl"


@pytest.fixture
def original(tmp_path):
    """A wheel of the original's shape and name."""
    for name, text in FILES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "wheels").mkdir()
    pack = [sys.executable, "-m", "wheel", "pack", "--dest-dir", tmp_path / "wheels"]
    subprocess.run([*pack, tmp_path / "tree"], check=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    return wheel.rename(wheel.with_name("sal_detectron2-0.7.2-cp310-none-any.whl"))


def test_repacked_detectron2_is_pure_and_installs(original, tmp_path):
    wheel = install_detectron2.repack(original, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", site]
    subprocess.run([*pip, wheel], check=True)
    info = site / "detectron2-0.6+a59f0563.dist-info"
    assert sorted(site.iterdir()) == [site / "detectron2", info]
    assert not list(site.rglob("*.so"))
    assert '__version__ = "0.6+a59f0563"' in (site / "detectron2" / "__init__.py").read_text()
    distribution = Distribution.at(info)
    assert sorted(distribution.requires) == [
        *("Pillow>=7.1", 'black==23.3.0; extra == "dev"', "fvcore<0.1.6,>=0.1.5"),
        *("iopath>=0.1.7", "numpy"),
    ]
    assert distribution.read_text("top_level.txt").split() == ["detectron2"]
    assert distribution.read_text("LICENSE") == "Apache License"
    zoo = "import detectron2.model_zoo as zoo; print(zoo.get_config_file('Base.yaml'))"
    blocked = f"import sys; sys.modules['pkg_resources'] = None; {zoo}"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=site, capture_output=True, text=True)
    assert done.stdout == f"{site}/detectron2/model_zoo/configs/Base.yaml\n", done.stderr
    (info / "METADATA").write_text(METADATA.replace("Requires-Dist: black\n", ""))
    with pytest.raises(SystemExit, match="'black'"):
        install_detectron2.write_metadata(info / "METADATA")
    with pytest.raises(SystemExit, match="model_zoo.py .*'import pkg_'"):
        install_detectron2.replace(site / "detectron2/model_zoo/model_zoo.py", {"import pkg_": ""})


@pytest.fixture
def install(tmp_path):
    """Run the installer where the modules given as name=source shadow the installed ones."""

    def run(*arguments, **modules):
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)
        command = [sys.executable, install_detectron2.__file__, *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done

    return run


def test_importable_detectron2_is_left_alone(install):
    for version in ("0.6", "0.6+cu113", "0.10", "1.0"):
        done = install(**PRESENT, detectron2=f"__version__ = '{version}'")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"detectron2 {version} " in done.stdout


def test_environments_that_are_refused(install):
    for module, source, message in (
        ("torch", ABSENT, "cannot import torch"),
        ("torch", "raise OSError('libcudart.so: cannot open')", "libcudart"),
        ("torchvision", ABSENT, "cannot import torchvision"),
        ("detectron2", "__version__ = '0.5'", "0.5 .* too old"),
        ("detectron2", "import xyzzy", "xyzzy"),
    ):
        done = install(**{**PRESENT, module: source})
        assert done.returncode == 1 and re.search(message, done.stderr)


@pytest.mark.slow
def test_offline_only_the_pinned_file_is_taken(install, original, tmp_path):
    done = install("--offline", tmp_path, **PRESENT, detectron2=ABSENT)
    wheel = tmp_path / "detectron2-0.6+a59f0563-py3-none-any.whl"
    assert done.returncode == 1 and str(wheel) in done.stderr and "make bundle" in done.stderr
    done = install("--offline", original.parent, "--fetch", tmp_path / "fetched")
    assert done.returncode == 1 and original.name in done.stderr and "491af0c7" in done.stderr


def describe(folder, **changes):
    """Write the description of a bundle of this Python, with changes, and the checksums."""
    project = {"pyproject.toml": bundle.sha256(bundle.ROOT / "pyproject.toml")}
    release = {"release": platform.python_version()}
    description = {**bundle.this_python(), **release, **project, **changes}
    (folder / "bundle.json").write_text(json.dumps(description))
    bundle.write_sums(folder)


@pytest.fixture
def folder(tmp_path):
    """A complete bundle of two files and its description."""
    folder = tmp_path / "a bundle"
    for name in (WHEEL, WEIGHTS):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(name.encode())
    describe(folder)
    return folder


def flip(path):
    *data, last = path.read_bytes()
    path.write_bytes(bytes([*data, last ^ 1]))


def test_a_complete_bundle_passes_here_and_with_sha256sum_for_its_python(folder, capsys):
    subprocess.run(["sha256sum", "--check", "--strict", bundle.SUMS], cwd=folder, check=True)
    assert len((folder / bundle.SUMS).read_text().splitlines()) == 3
    for change, note in (
        ({}, ""),
        ({"pyproject.toml": "0"}, "pyproject.toml"),
        ({"release": "3.9"}, "3.9"),
    ):
        describe(folder, **change)
        bundle.check(folder)
        printed = capsys.readouterr().out
        assert note in printed and ("Note" in printed) == bool(note)
    for key, value in (("python", "3.99"), ("platform", "linux-riscv64")):
        describe(folder, **{key: value})
        with pytest.raises(SystemExit, match=f"{value}.*PYTHON=python"):
            bundle.check(folder)


EMPTY, EVIL = "weights/empty.pkl", "wheels/evil-1.0-py3-none-any.whl"


def test_changed_files_are_named(folder):
    (folder / EMPTY).write_bytes(b"x")
    describe(folder)
    for name, harm, fault in (
        (WEIGHTS, flip, "damaged"),
        (EMPTY, lambda path: path.write_bytes(b""), "damaged"),
        ("bundle.json", flip, "damaged"),
        (WHEEL, Path.unlink, "missing"),
        (EVIL, Path.touch, "not in SHA256SUMS"),
    ):
        harm(folder / name)
        with pytest.raises(SystemExit, match=f"\n{fault}: {name}"):
            bundle.check(folder)


def test_damaged_and_missing_sums(folder):
    sums, zeros = folder / bundle.SUMS, "0" * 64
    text = sums.read_text()
    for line in ("", "0123  wheels/a.whl", f"{zeros}  /etc/passwd", f"{zeros}  ../outside"):
        sums.write_text(f"{text}{line}\n")
        with pytest.raises(SystemExit, match=f"{bundle.SUMS}.*line 4"):
            bundle.find_faults(folder)
    sums.unlink()
    with pytest.raises(SystemExit, match=f"{bundle.SUMS}.*make bundle"):
        bundle.check(folder)


def test_weights_are_checked_and_lie_where_detectron2_looks(tmp_path, capsys, monkeypatch):
    path, weights = tmp_path / "model_final.pkl", tmp_path / "weights"
    path.write_bytes(b"published weights")
    digest = hashlib.sha256(b"published weights").hexdigest()
    bundle.fetch_weights(path.as_uri(), weights)
    assert f"{path.as_uri()}#sha256={digest}" in capsys.readouterr().out
    other = f"{path.as_uri()}#sha256={'0' * 64}"
    absent = (tmp_path / "absent.pkl").as_uri()
    for url, named in ((other, f"{digest}.*00"), (absent, "absent.pkl")):
        with pytest.raises(SystemExit, match=named):
            bundle.fetch_weights(url, weights)

    zoo = "https://dl.fbaipublicfiles.com/detectron2/a/model_final.pkl"
    addresses = {"detectron2://a/model_final.pkl": zoo}
    addresses |= {url: url for url in (zoo, "http://localhost:9/a/b.pth", "https://x.org/c?d=1")}
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: path_opened(path))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for url, address in addresses.items():
        bundle.fetch_weights(f"{url}#sha256={digest}", tmp_path / "cache")
        monkeypatch.setattr("iopath.common.file_io.download", None)  # only the cache can answer
        local = DownloadHandler()._get_local_path(address)
        assert Path(local).read_bytes() == b"published weights"
        shutil.rmtree(tmp_path / "cache")


def path_opened(path):
    """As `urlopen` answers."""
    file = open(path, "rb")
    file.headers = {}
    return file


def test_make_installs_only_from_a_complete_bundle(tmp_path, folder):
    """In a checkout whose .venv runs bundle.py and prints every other command."""
    checkout, package = tmp_path / "checkout", ("__init__.py", "cli/install_detectron2.py")
    names = ("Makefile", "constraints.txt", "pyproject.toml", "packaging/bundle.py")
    for name in (*names, *(f"imrcnn_d2/{file}" for file in package)):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.with_name("pip").touch()
    check = f'[ "$1" = packaging/bundle.py ] && exec "{sys.executable}" "$@"'
    python.write_text(f'#!/bin/sh\n{check}\necho "command: $*"; exit 1\n')
    python.chmod(0o755)
    make = ["make", "install", f"OFFLINE={folder}"]
    done = subprocess.run(make, cwd=checkout, capture_output=True, text=True)
    (command,) = re.findall("^command: .*", done.stdout, re.MULTILINE)
    assert f"install --no-index --find-links {folder}/wheels torch torchvision" in command
    flip(folder / WHEEL)
    done = subprocess.run(make, cwd=checkout, capture_output=True, text=True)
    assert done.returncode and f"damaged: {WHEEL}" in done.stderr
    assert "command: " not in done.stdout


def test_a_failed_run_leaves_no_bundle_and_other_folders_alone(folder, tmp_path):
    before = bundle.files_below(folder)
    weights = (tmp_path / "absent.pkl").as_uri()
    for target in (tmp_path / "new", folder):
        with pytest.raises(SystemExit, match="absent.pkl"):
            bundle.collect(target, "torch", ".", "constraints.txt", [weights])
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*.partial"))
    assert bundle.files_below(folder) == before and bundle.find_faults(folder) == []
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path))):
        bundle.collect(tmp_path, "torch", ".", "constraints.txt", [])
    assert (tmp_path / "letter.txt").read_text() == "dear"


# Prints each access to the data folder, each file that is written, and each connection, while the
# package is imported.
WATCHED_IMPORT = """
import os, sys

def watch(event, args):
    if event.startswith(("socket.connect", "socket.getaddrinfo")):
        print(event, *args)
    elif event in ("open", "os.listdir", "os.scandir", "os.mkdir") and isinstance(args[0], str):
        flags = args[2] if event == "open" else 0
        written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "__pycache__" not in args[0]
        written = written and not args[0].startswith("/dev/")
        if written or os.path.abspath(args[0]).startswith(os.environ["IMRCNN_DATASETS"]):
            print(event, *args)

# Imported first: files that these read and write are not ours.
import cv2, detectron2.data, detectron2.engine, pycocotools.mask, timm, torchvision
sys.addaudithook(watch)
import imrcnn_d2
from detectron2.data import DatasetCatalog
assert "kvasir_seg_train" in DatasetCatalog.list()
"""


def test_import_registers_data_sets_and_touches_no_disk(tmp_path):
    annotations = tmp_path / "datasets" / "kvasir_seg" / "annotations"
    annotations.mkdir(parents=True)
    (annotations / "train.json").write_text("{}")
    (tmp_path / "watch.py").write_text(WATCHED_IMPORT)
    env = {**os.environ, "IMRCNN_DATASETS": str(annotations.parents[1])}
    done = run_script(tmp_path / "watch.py", env=env)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
