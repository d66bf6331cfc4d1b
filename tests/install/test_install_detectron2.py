"""Repacking of a small wheel of the same shape; refusals in environments made of stubs.

The real download is what `make install` does, which ends in `pip check`.
"""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution

import pytest

from imrcnn_d2.cli import install_detectron2

METADATA = """\
Metadata-Version: 2.1
Name: sal-detectron2
Version: 0.7.2
Summary: Segmenant Anything in Lidar
Requires-Python: >=3.8
License-File: LICENSE
Requires-Dist: Pillow>=7.1
Requires-Dist: numpy<2
Requires-Dist: black
Provides-Extra: dev
Requires-Dist: black==23.3.0; extra == "dev"
"""
FILES = {
    "detectron2/__init__.py": 'from . import layers\n__version__ = "0.7.2"\n',
    "detectron2/layers/__init__.py": "",
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "compiled",
    "tools/__init__.py": "",
    "tools/train_net.py": "",
    "sal_detectron2-0.7.2.dist-info/METADATA": METADATA,
    "sal_detectron2-0.7.2.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: setuptools (75.6.0)\n"
    "Root-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n",
    "sal_detectron2-0.7.2.dist-info/LICENSE": "Apache License",
    "sal_detectron2-0.7.2.dist-info/top_level.txt": "detectron2\ntools\n",
}


def run_module(*arguments):
    subprocess.run([sys.executable, "-m", *arguments], check=True)


@pytest.fixture
def original(tmp_path):
    """A wheel (Path) of the original's shape and name, in a folder of its own."""
    tree = tmp_path / "tree"
    for name, text in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    folder = tmp_path / "wheels"
    folder.mkdir()
    run_module("wheel", "pack", "--dest-dir", folder, tree)
    (wheel,) = folder.iterdir()
    return wheel.rename(folder / "sal_detectron2-0.7.2-cp310-none-any.whl")


@pytest.fixture
def pure_wheel(original, tmp_path):
    return install_detectron2.repack(original, tmp_path)


def test_repacked_wheel_is_pure_and_installs(pure_wheel, tmp_path):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    target = tmp_path / "site"
    run_module("pip", "install", "--no-index", "--no-deps", "--target", target, pure_wheel)
    assert sorted(path.name for path in target.iterdir()) == [
        "detectron2",
        "detectron2-0.6+a59f0563.dist-info",
    ]
    assert not list(target.rglob("*.so"))
    code = "import detectron2; print(detectron2.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == "0.6+a59f0563"


def test_repacked_metadata(pure_wheel, tmp_path):
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path / "site")
    (info,) = (tmp_path / "site").glob("*.dist-info")
    distribution = Distribution.at(info)
    assert distribution.metadata["Name"] == "detectron2"
    assert distribution.version == "0.6+a59f0563"
    assert sorted(distribution.requires) == [
        "Pillow>=7.1",
        'black==23.3.0; extra == "dev"',
        "fvcore<0.1.6,>=0.1.5",
        "iopath>=0.1.7",
        "numpy",
        "setuptools<81",
    ]
    assert distribution.read_text("top_level.txt").split() == ["detectron2"]
    assert distribution.read_text("LICENSE") == "Apache License"


def test_unexpected_metadata_is_refused(tmp_path):
    path = tmp_path / "METADATA"
    path.write_text(METADATA.replace("Requires-Dist: black\n", ""))
    with pytest.raises(SystemExit, match="does not require .'black'."):
        install_detectron2.write_metadata(path)


@pytest.fixture
def run_script(tmp_path):
    """Run the script where the modules given as name=source shadow the installed ones."""

    def run(*arguments, **modules):
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)
        return subprocess.run(
            [sys.executable, install_detectron2.__file__, *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    return run


ABSENT = "raise ModuleNotFoundError(name=__name__)"


@pytest.mark.parametrize("version", ["0.6", "0.6+cu113", "0.10", "1.0"])
def test_importable_detectron2_is_left_alone(run_script, version):
    done = run_script(torch="", torchvision="", detectron2=f"__version__ = '{version}'")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"detectron2 {version} is there and used as it is.\n"


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"torch": ABSENT}, "cannot import torch"),
        ({"torch": "raise OSError('libcudart.so: cannot open')"}, "libcudart"),
        ({"torch": "", "torchvision": ABSENT}, "cannot import torchvision"),
        ({"torch": "", "torchvision": "", "detectron2": "__version__ = '0.5'"}, "0.5 .* too old"),
        ({"torch": "", "torchvision": "", "detectron2": "import xyzzy"}, "needs xyzzy"),
    ],
)
def test_environments_that_are_refused(run_script, modules, message):
    done = run_script(**modules)
    assert done.returncode == 1
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_offline_folder_without_the_wheel(run_script, tmp_path):
    done = run_script("--offline", str(tmp_path), torch="", torchvision="", detectron2=ABSENT)
    assert done.returncode == 1
    wheel = tmp_path / "detectron2-0.6+a59f0563-py3-none-any.whl"
    assert f"{wheel} is missing" in done.stderr and "make bundle" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_the_pinned_file_is_taken(run_script, original, tmp_path):
    done = run_script("--offline", str(original.parent), "--fetch", str(tmp_path / "fetched"))
    assert done.returncode == 1
    assert f"{original.name} has SHA-256" in done.stderr and "expected 491af0c7" in done.stderr
