#!/usr/bin/env python3
"""Everything that `make install` needs, in one folder for machines without a network.

    DIR/wheels/      torch of the chosen build, Detectron2, and all other packages
    DIR/weights/     pretrained weights, laid out as Detectron2's cache of downloads ($FVCORE_CACHE)
    DIR/bundle.json  which Python and platform the wheels are for
    DIR/SHA256SUMS   checksums of all these files, as sha256sum writes them

`make bundle` calls ``collect``, `make install OFFLINE=DIR` calls ``check`` before it installs
anything. Both run before any package is there, on Python's standard library alone.
"""

import argparse
import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parent.parent
SUMS = "SHA256SUMS"
# What Detectron2 makes of detectron2://...
MODEL_ZOO = "https://dl.fbaipublicfiles.com/detectron2/"


def sha256(path):
    """str: hexadecimal SHA-256 of the file ``path`` (Path)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_below(folder):
    """list[str]: the files under ``folder`` (Path) but SHA256SUMS, relative to it, in order."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(set(paths) - {SUMS})


def this_python():
    """dict: what wheels depend on: Python's minor version and the platform."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": version, "platform": sysconfig.get_platform()}


def write_sums(folder):
    """Write ``folder``/SHA256SUMS of all files under ``folder`` (Path)."""
    lines = (f"{sha256(folder / name)}  {name}\n" for name in files_below(folder))
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder):
    """Return {name: SHA-256} of ``folder``/SHA256SUMS.

    Raises:
        SystemExit: there is no such file, or it has a line of another form.
    """
    path = folder / SUMS
    if not path.is_file():
        sys.exit(
            f"{path} is missing, so {folder} is no bundle. `make bundle BUNDLE=DIR` makes one."
        )
    sums = {}
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not match or PurePosixPath(match[2]).is_absolute() or ".." in match[2].split("/"):
            sys.exit(f"{path} is damaged: line {number} is not a checksum and a file's name.")
        sums[match[2]] = match[1]
    return sums


def find_faults(folder):
    """list[str]: a line for each file under ``folder`` that is missing, damaged or unknown."""
    sums = read_sums(folder)
    there = set(files_below(folder))
    faults = []
    for name, expected in sums.items():
        if name not in there:
            faults.append(f"missing: {name}")
        elif (found := sha256(folder / name)) != expected:
            faults.append(f"damaged: {name} (SHA-256 {found}, expected {expected})")
    # pip would install a wheel from there, whoever put it there.
    return faults + [f"not in {SUMS}: {name}" for name in sorted(there - set(sums))]


def check(folder):
    """Exit with what is wrong unless ``folder`` (Path) is a whole bundle for this Python."""
    print(f"Checking the files in {folder} against {SUMS}", flush=True)
    if faults := find_faults(folder):
        sys.exit(
            "\n".join([f"{folder} is not as it was made; nothing was installed:", *faults])
            + "\nCopy these files (or the folder) again, or make the bundle again."
        )
    made_for, here = json.loads((folder / "bundle.json").read_text("utf-8")), this_python()
    if any(made_for[key] != here[key] for key in here):
        sys.exit(
            f"{folder} is for Python {made_for['python']} on {made_for['platform']}, and this is "
            f"Python {here['python']} on {here['platform']}: name that Python (make install "
            f"PYTHON=python{made_for['python']}), or make a bundle with this one."
        )
    # Neither need matter. Some releases ask for, say, Python 3.11.5.
    differences = []
    if made_for["setup.py"] != sha256(ROOT / "setup.py"):
        differences.append("for another setup.py")
    if made_for["release"] != platform.python_version():
        differences.append(f"by Python {made_for['release']}, not {platform.python_version()}")
    if differences:
        print(
            f"Note: {folder} was made {' and '.join(differences)}. Should pip find no distribution "
            "of something, or go through versions without end, make the bundle again, from this "
            "checkout and by this Python."
        )


def pip_wheel(wheels, *arguments):
    """Put the wheels of some requirements and of what they require into ``wheels`` (Path)."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    subprocess.run([*command, "--wheel-dir", wheels, *arguments], check=True, cwd=ROOT)


def collect_wheels(wheels, torch, package, constraint):
    """Fill the folder ``wheels`` (Path).

    Args:
        torch (str): what to install torch from, in pip's words.
        package (str): this package with the extras that are to be installable.
        constraint (str): constraints file for everything but torch.
    """
    detectron2 = ROOT / "imrcnn_d2" / "cli" / "install_detectron2.py"
    subprocess.run([sys.executable, detectron2, "--fetch", wheels], check=True)
    pip_wheel(wheels, *shlex.split(torch))
    # The other packages must be chosen to go with this torch, not with the index's newest.
    pins = [
        f"{name}=={path.name.split('-')[1]}"
        for name in ("torch", "torchvision")
        for path in wheels.glob(f"{name}-*.whl")
    ]
    # Without build isolation: some releases are sources and need the constraints' setuptools.
    options = ("--find-links", wheels, "--constraint", constraint, "--no-build-isolation")
    pip_wheel(wheels, *options, "pip", "setuptools", "wheel", package, *pins)
    for own in wheels.glob("imrcnn_d2-*.whl"):
        own.unlink()  # it is installed from its sources


def fetch_weights(url, folder):
    """Download a file of weights to where Detectron2 looks for the download of ``url``.

    Args:
        url (str): https://... or detectron2://..., with #sha256=HEX where the checksum is known.
        folder (Path): the bundle's folder of weights.
    """
    url, _, expected = url.partition("#sha256=")
    address = url.replace("detectron2://", MODEL_ZOO, 1)
    path = folder / urlparse(address).path.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {address}", flush=True)
    try:
        with urllib.request.urlopen(address, timeout=60) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
            length = source.headers.get("Content-Length")
    except OSError as error:
        sys.exit(f"{address} cannot be fetched: {error}")
    if length and path.stat().st_size != int(length):
        sys.exit(f"{address} broke off after {path.stat().st_size} of {length} bytes.")
    found = sha256(path)
    if not expected:
        print(f"SHA-256 {found}; pin it: WEIGHTS='{url}#sha256={found}'")
    elif found != expected.lower():
        sys.exit(f"{address} has SHA-256 {found}, expected {expected}: not the file you asked for.")


def collect(folder, torch, package, constraint, weights):
    """Make the bundle ``folder`` (Path): whole, or not at all. For the rest see collect_wheels."""
    folder = folder.absolute()
    if folder.exists() and not (folder / SUMS).is_file():
        sys.exit(f"{folder} is there and is no bundle: name another folder.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "wheels").mkdir(parents=True)
        for url in weights:
            fetch_weights(url, partial / "weights")
        collect_wheels(partial / "wheels", torch, package, constraint)
        description = {
            **this_python(),
            "release": platform.python_version(),
            "torch": torch,
            "weights": weights,
            "setup.py": sha256(ROOT / "setup.py"),
        }
        (partial / "bundle.json").write_text(json.dumps(description, indent=2) + "\n", "utf-8")
        write_sums(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    names = files_below(folder)
    size = sum((folder / name).stat().st_size for name in names)
    print(f"{folder}: {len(names)} files, {size / 1e9:.2f} GB; {SUMS} has {sha256(folder / SUMS)}")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("collect", help="make a bundle")
    command.add_argument("folder", metavar="DIR", type=Path)
    command.add_argument("--torch", required=True, help="torch and torchvision, in pip's words")
    command.add_argument("--package", required=True, help="this package, such as .[dev,lite]")
    command.add_argument("--constraint", required=True, metavar="FILE", help="for the rest")
    command.add_argument(
        "--weights", default="", metavar="URLS", help="URL or URL#sha256=HEX, separated by blanks"
    )
    command = commands.add_parser("check", help="is this a whole bundle for this Python?")
    command.add_argument("folder", metavar="DIR", type=Path)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        check(arguments.folder)
        return
    try:
        collect(
            arguments.folder,
            arguments.torch,
            arguments.package,
            arguments.constraint,
            arguments.weights.split(),
        )
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"Failed: {' '.join(map(str, error.cmd))}\nThe lines above say why. No bundle made."
        )


if __name__ == "__main__":
    main()
