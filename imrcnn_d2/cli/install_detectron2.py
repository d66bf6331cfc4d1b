"""Install Detectron2 into the environment of the Python that runs this script.

A Detectron2 that can be imported (0.6 or newer, from any source) is used as it is. Otherwise its
pure-Python part is installed: no compiler, no GPU and no git are needed. Detectron2 has no release
on PyPI under its own name, so the Python files come from ``sal-detectron2``, a wheel built from
upstream's main branch (commit a59f0563, 2024-04-17) with three harmless differences. Its compiled
``_C`` fits one Python and one torch only and is left out. Mask R-CNN takes NMS and ROIAlign from
torchvision; what does need ``_C`` is rotated boxes, modulated deformable convolution, deformable
convolution on a GPU, and the fast COCO evaluation (which falls back to pycocotools' own).

``--from-source`` builds upstream with its C++/CUDA operators instead (needs git, a compiler and,
for CUDA, the toolkit that the installed torch was built with).
"""

import argparse
import hashlib
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path

MIN_VERSION = (0, 6)
SOURCE = "sal-detectron2==0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
UPSTREAM = "git+https://github.com/facebookresearch/detectron2.git"
# Upstream has released no 0.7: it calls this commit 0.6, and so does what we install.
VERSION = "0.6+a59f0563"

# numpy<2 was for _C; black is optional (LazyConfig prints prettier with it).
DROPPED_REQUIREMENTS = ("numpy<2", "black")
ADDED_REQUIREMENTS = ("numpy", "fvcore<0.1.6,>=0.1.5", "iopath>=0.1.7")
# Later releases of setuptools no longer have pkg_resources.
MODEL_ZOO = {
    "import pkg_resources\n": "",
    """pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )""": 'os.path.join(os.path.dirname(__file__), "configs", config_path)',
}


def installed_version():
    """Return the version of the Detectron2 that can be imported, or None where there is none.

    Raises:
        SystemExit: torch or torchvision is missing, or the Detectron2 is older than 0.6 or broken.
    """
    for name in ("torch", "torchvision"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
            sys.exit(
                f"{sys.executable} cannot import {name}: {error}\nDetectron2 stands on it: install "
                "torch and torchvision first (`make install` does), then run this again."
            )
    try:
        detectron2 = importlib.import_module("detectron2")
    except ModuleNotFoundError as error:
        if error.name == "detectron2":
            return None
        sys.exit(f"detectron2 is there but needs {error.name}: run `pip install {error.name}`.")
    version = detectron2.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < MIN_VERSION:
        sys.exit(
            f"detectron2 {version} ({detectron2.__file__}) is too old, 0.6 or newer is needed: "
            "run `pip uninstall detectron2`, then this again."
        )
    if find_spec("pkg_resources") is None:
        try:
            importlib.import_module("detectron2.model_zoo")
        except ModuleNotFoundError as error:
            if error.name == "pkg_resources":
                print(
                    "Note: detectron2.model_zoo, from which LazyConfigs take parts, needs "
                    "pkg_resources: for these run `pip install 'setuptools<81'`."
                )
    return version


def verify(wheel):
    """Exit unless the file ``wheel`` (Path) has the pinned SHA-256."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(
            f"{wheel.name} has SHA-256 {digest}, expected {SHA256}: not the file this script was "
            "written for, so it is not installed. Empty pip's cache (`pip cache purge`) and try "
            "another index, or use --from-source."
        )


def make_pure(tree):
    """Turn an unpacked ``sal-detectron2`` wheel into one of pure-Python ``detectron2``.

    Args:
        tree (Path): folder made by ``wheel unpack``; changed in place.
    """
    for compiled in tree.glob("detectron2/_C.*"):
        compiled.unlink()
    shutil.rmtree(tree / "tools")  # would be importable as a top-level package

    version = f'__version__ = "{VERSION}"  # changed by IMR-CNN\'s install_detectron2.py'
    replace(tree / "detectron2" / "__init__.py", {'__version__ = "0.7.2"': version})
    replace(tree / "detectron2" / "model_zoo" / "model_zoo.py", MODEL_ZOO)

    (info,) = tree.glob("*.dist-info")
    (info / "top_level.txt").write_text("detectron2\n")
    write_metadata(info / "METADATA")
    wheel_file = message_from_string((info / "WHEEL").read_text())
    wheel_file.replace_header("Root-Is-Purelib", "true")
    wheel_file.replace_header("Tag", "py3-none-any")
    (info / "WHEEL").write_text(str(wheel_file))
    info.rename(tree / f"detectron2-{VERSION}.dist-info")


def replace(path, texts):
    """Replace each text in the file ``path`` (Path); exit if one is not there."""
    source = path.read_text()
    for old, new in texts.items():
        if old not in source:
            sys.exit(f"{path} does not hold {old!r}, so it is not the file expected.")
        source = source.replace(old, new)
    path.write_text(source)


def write_metadata(path):
    """Correct name, version, summary and requirements in the METADATA file at ``path`` (Path)."""
    metadata = message_from_string(path.read_text())
    requirements = metadata.get_all("Requires-Dist")
    missing = set(DROPPED_REQUIREMENTS) - set(requirements)
    if missing:
        sys.exit(f"{path} does not require {sorted(missing)}, so it is not the file expected.")
    metadata.replace_header("Name", "detectron2")
    metadata.replace_header("Version", VERSION)
    metadata.replace_header(
        "Summary",
        "Detectron2 (main of 2024-04-17) without its compiled operators, repacked from " + SOURCE,
    )
    del metadata["Requires-Dist"]
    kept = [line for line in requirements if line not in DROPPED_REQUIREMENTS]
    for line in [*ADDED_REQUIREMENTS, *kept]:
        metadata["Requires-Dist"] = line
    path.write_text(str(metadata))


def run(*arguments):
    """Run a module of this Python; raise CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True)


def fetch(folder, index):
    """Download the ``sal-detectron2`` wheel to ``folder`` (Path), verify it, return its path.

    Args:
        index (list[str]): options for pip that say where packages come from.
    """
    # A cp310 wheel; what is left of it after make_pure fits every Python from 3.8 on.
    python310 = ("--python-version", "3.10", "--only-binary=:all:")
    run("pip", "download", *index, "--no-deps", *python310, "--dest", folder, SOURCE)
    (wheel,) = folder.glob("sal_detectron2-*.whl")
    verify(wheel)
    return wheel


def repack(original, folder):
    """Write the pure wheel made of ``original`` (Path) to ``folder`` (Path); return its path."""
    with tempfile.TemporaryDirectory() as temporary:
        run("wheel", "unpack", "--dest", temporary, original)
        (tree,) = Path(temporary).iterdir()
        make_pure(tree)
        run("wheel", "pack", "--dest-dir", folder, tree)
    return folder / f"detectron2-{VERSION}-py3-none-any.whl"


def find_wheel(folder):
    """Path of the repacked wheel in ``folder`` (str); exit where there is none."""
    wheel = Path(folder) / f"detectron2-{VERSION}-py3-none-any.whl"
    if not wheel.is_file():
        sys.exit(f"{wheel} is missing: `make bundle BUNDLE=DIR` makes it, in DIR/wheels.")
    return wheel


def install(offline, index, constraint, from_source):
    """Install Detectron2 and what it requires.

    Args:
        offline (str or None): folder of wheels that has Detectron2's.
        index (list[str]): options for pip that say where packages come from.
        constraint (list[str]): options for pip that say which versions.
        from_source (bool): build upstream from git instead.
    """
    # Without build isolation: upstream's setup.py imports torch, and the releases of fvcore and
    # iopath are sources, which would fetch a setuptools of their own.
    run("pip", "install", *index, *constraint, "setuptools", "wheel")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if from_source:
            package = f"detectron2 @ {UPSTREAM}"
        elif offline:
            package = find_wheel(offline)
        else:
            package = repack(fetch(folder, index), folder)
        run("pip", "install", "--no-build-isolation", *index, *constraint, package)
    # In a new process: this one has looked for the module before it was there.
    check = "import detectron2.model_zoo; print('Installed detectron2', detectron2.__version__)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", check], check=True)


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--constraint", metavar="FILE", help="constraints file for pip")
    parser.add_argument(
        "--offline",
        metavar="DIR",
        help="take every package, Detectron2 too, from the wheels in DIR and ask no index",
    )
    parser.add_argument("--from-source", action="store_true", help="build upstream from git")
    parser.add_argument(
        "--fetch",
        metavar="DIR",
        help="only put the repacked wheel into DIR, for --offline",
    )
    return parser


def main(argv=None):
    arguments = argument_parser().parse_args(argv)
    index = ["--no-index", "--find-links", arguments.offline] if arguments.offline else []
    constraint = ["--constraint", arguments.constraint] if arguments.constraint else []
    try:
        if arguments.fetch:
            with tempfile.TemporaryDirectory() as folder:
                repack(fetch(Path(folder), index), Path(arguments.fetch))
        elif version := installed_version():
            print(f"detectron2 {version} is there and used as it is.")
        else:
            install(arguments.offline, index, constraint, arguments.from_source)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"Failed: {' '.join(map(str, error.cmd))}\nThe lines above say why. Without a network, "
            "make a bundle by `make bundle BUNDLE=DIR` on a connected machine and give its wheels "
            "by --offline DIR/wheels."
        )


if __name__ == "__main__":
    main()
