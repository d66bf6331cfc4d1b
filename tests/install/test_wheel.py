"""The wheel where no checkout is: its metadata, its content, and the commands from an empty
environment; and what every extra resolves to."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import ROOT

import imrcnn_d2

SOURCES = """CHANGELOG.md CITATION.cff LICENSE MANIFEST.in README.md configs constraints.txt
    imrcnn.py imrcnn_d2 pyproject.toml setup.py""".split()
BUILD = """
import os, sys
from setuptools import build_meta
os.chdir(sys.argv[1])
print(build_meta.{}(sys.argv[2]))
"""
SMALL = """INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 MODEL.DEVICE cpu MODEL.TIMM.WEIGHTS ''
    DATALOADER.NUM_WORKERS 0 MODEL.RPN.POST_NMS_TOPK_TEST 20 SOLVER.IMS_PER_BATCH 2""".split()


def build(what, folder, target):
    """Build a wheel or an sdist of a folder without a download; return its path."""
    command = [sys.executable, "-c", BUILD.format(f"build_{what}"), folder, target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist, which is built from a copy of the sources."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    shutil.unpack_archive(build("sdist", copy, built), built)
    (unpacked,) = (path for path in built.iterdir() if path.is_dir())
    assert (unpacked / "constraints.txt").is_file()
    return build("wheel", unpacked, built)


@pytest.fixture(scope="module")
def imrcnn(wheel, tmp_path_factory):
    """Runs a command in an environment that has the wheel, and all other packages of this one."""
    prefix = tmp_path_factory.mktemp("prefix")
    venv.create(prefix, symlinks=True)
    python = prefix / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", wheel], check=True)
    (packages,) = prefix.glob("lib/python*/site-packages")
    # As paths, not as sites: the .pth file of an editable installation is not read there.
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(others))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IMRCNN_DATASETS")}
    folder = tmp_path_factory.mktemp("elsewhere")

    def run(*arguments, program=prefix / "bin" / "imrcnn"):
        command = [program, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    code = """from importlib.util import find_spec
print(*(find_spec(name).origin for name in ("imrcnn", "imrcnn_d2")))"""
    for path in run("-c", code, program=python).split():
        assert Path(path).is_relative_to(packages)
    return run, folder, python


def requirements(distribution):
    """The requirements of each extra, of which "" is none: {extra: [Requirement]}."""
    extras = {}
    for line in distribution.requires:
        requirement = Requirement(line)
        extra = re.search(r'extra == "(.+?)"', str(requirement.marker or ""))
        extras.setdefault(extra[1] if extra else "", []).append(requirement)
    return extras


@pytest.fixture(scope="module")
def metadata(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("metadata")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (info,) = folder.glob("*.dist-info")
    return Distribution.at(info)


def test_the_wheel_holds_configs_weights_and_licences(wheel, metadata):
    assert metadata.version == imrcnn_d2.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == imrcnn_d2.__version__
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "imrcnn_d2"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix().replace("configs", "imrcnn_d2/configs", 1)
            name = name if folder == "configs" else path.relative_to(ROOT).as_posix()
            assert path.is_dir() or "__pycache__" in name or name in names, name
    assert not [name for name in names if name.startswith(("tests", "configs", "tools"))]
    expression = metadata.metadata["License-Expression"]
    ours, weights = re.fullmatch(r"(Apache-2\.0) AND (LicenseRef-[\w.-]+)", expression).groups()
    files = metadata.metadata.get_all("License-File")
    texts = [metadata.read_text(f"licenses/{name}") for name in files]
    assert ours == "Apache-2.0" and any("Apache License" in text for text in texts)
    assert "imrcnn_d2/weights/LICENSE.txt" in files and any(weights in text for text in texts)


def test_what_is_imported_is_declared(metadata):
    """Every package that our code imports; and no other is required."""
    extras = requirements(metadata)
    offered = [extra for extra in extras if extra not in ("dev", "docs")]
    declared = {canonicalize_name(r.name) for extra in offered for r in extras[extra]}
    homes, imported = packages_distributions(), {}
    sources = [*ROOT.glob("imrcnn_d2/**/*.py"), *ROOT.glob("configs/*/*.py"), ROOT / "imrcnn.py"]
    for path in sources:
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
        for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
            imported |= {canonicalize_name(home): path for home in homes.get(name, [name])}
    imported.pop("detectron2"), imported.pop("imrcnn-d2")
    missing = {name: path for name, path in imported.items() if name not in declared}
    assert not missing
    required = {canonicalize_name(r.name) for r in extras[""]}
    assert required - imported.keys() == {"tensorboard"}  # torch.utils.tensorboard imports it


@pytest.mark.slow
def test_every_extra_resolves_under_the_constraints(tmp_path):
    """All of them at once; from the metadata of an index, nothing is installed."""
    uv = pytest.importorskip("uv").find_uv_bin()
    command = [uv, "pip", "compile", "--quiet", "--all-extras", "pyproject.toml"]
    command += ["--constraint", "constraints.txt", "--python", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "Failed to fetch" in done.stderr and "CI" not in os.environ:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))
    assert {"hydra-ray-launcher", "openvino", "statsmodels", "torch"} <= pins.keys()


@pytest.mark.slow
@pytest.mark.story
def test_predict_and_evaluate_where_no_checkout_is(imrcnn, kvasir_original):
    run, folder, python = imrcnn
    assert run("--version") == f"imrcnn-d2 {imrcnn_d2.__version__}\n"
    source = f"--images {kvasir_original}/images --masks {kvasir_original}/masks"
    gt, dt = "set/annotations/train.json", "predictions/predictions.json"
    commands = (
        f"prepare-dataset masks {source} --classes polyp --ratio 1:0:0 --out set",
        "predict --weights demo --input set/images --output predictions",
        f"evaluate --gt {gt} --dt {dt} --output scores",
    )
    # In one process: the imports take most of the time.
    code = (
        "import imrcnn, sys\nfor line in sys.argv[1:]: assert not imrcnn.main(line.split()), line"
    )
    run("-c", code, *commands, program=python)
    metrics = json.loads((folder / "scores" / "metrics.json").read_text())
    assert metrics["image"]["TP"] >= 4  # of five polyps


@pytest.mark.slow
def test_a_study_where_no_checkout_is(imrcnn):
    run, folder, python = imrcnn
    # Newer releases of setuptools have no pkg_resources.
    code = "import sys; sys.modules['pkg_resources'] = None; import imrcnn_d2.cli.train"
    run("-c", f"{code}, imrcnn_d2.model_zoo", program=python)
    run(*"prepare-dataset synthetic --out study --num-images 24 --size 64".split())
    for name in ("imrcnn_lite", "mrcnn_lite.yaml"):
        command = (
            f"train --config-file {name} --data study SOLVER.MAX_ITER 5 OUTPUT_DIR runs/{name}"
        )
        run(*command.split(), *SMALL)
    options = "train.max_iter=1 train.device=cpu train.output_dir=runs/lazy"
    options += " model.backbone.bottom_up.weights=''"
    run(*f"train --config-file lazy/imrcnn_lite.py --data study {options}".split())
    run(*"compare runs/imrcnn_lite runs/mrcnn_lite.yaml --output comparison".split())
    run(*"report runs/imrcnn_lite --output report.html".split())
    opts = [f"'{value}'" if "(" in value else value for value in (*SMALL, "SOLVER.MAX_ITER", "2")]
    keys = f"dataset=study datasets={folder} folds=2"
    printed = run("cross-validate", *keys.split(), f"opts=[{','.join(opts)}]")
    assert len(re.findall(r"^study/imrcnn_lite/seed0/fold\d +finished ", printed, re.M)) == 2
    assert (folder / "report.html").is_file() and (folder / "comparison").is_dir()
