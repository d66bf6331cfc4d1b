#!/usr/bin/env python3
"""Everything that `make install` needs, in one folder for machines without a network.

    DIR/wheels/      torch of the chosen build, Detectron2, and all other packages
    DIR/weights/     pretrained weights, laid out as Detectron2's cache of downloads ($FVCORE_CACHE)
    DIR/bundle.json  Python and platform of the wheels
    DIR/SHA256SUMS   checksums of all these files, as sha256sum writes them

`make bundle` runs `collect`; `make install OFFLINE=DIR` runs `check` before it installs anything.
Both run before any package is installed, on Python's standard library alone.
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
ZOO = "https://dl.fbaipublicfiles.com/"  # its files lie in the cache without their host
MODEL_ZOO = f"{ZOO}detectron2/"  # detectron2://...


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_below(folder: Path) -> list[str]:
    """The files under `folder` except SHA256SUMS, relative to it, sorted."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(set(paths) - {SUMS})


def this_python() -> dict[str, str]:
    """Python's minor version and the platform, on which wheels depend."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": version, "platform": sysconfig.get_platform()}


def write_sums(folder: Path) -> None:
    lines = (f"{sha256(folder / name)}  {name}\n" for name in files_below(folder))
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of SHA256SUMS; exits if there is no such file, or a line has another form."""
    path = folder / SUMS
    if not path.is_file():
        sys.exit(f"{path} is missing: make a bundle with `make bundle BUNDLE=DIR`.")
    sums = {}
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not match or PurePosixPath(match[2]).is_absolute() or ".." in match[2].split("/"):
            sys.exit(f"{path} is damaged: line {number} is not a checksum and a file's name.")
        sums[match[2]] = match[1]
    return sums


def find_faults(folder: Path) -> list[str]:
    """One line for each file under `folder` that is missing, damaged or unknown."""
    sums = read_sums(folder)
    present = set(files_below(folder))
    faults = []
    for name, expected in sums.items():
        if name not in present:
            faults.append(f"missing: {name}")
        elif (actual := sha256(folder / name)) != expected:
            faults.append(f"damaged: {name} (SHA-256 {actual}, expected {expected})")
    # pip would install an unknown wheel, whatever its origin.
    return faults + [f"not in {SUMS}: {name}" for name in sorted(present - set(sums))]


def check(folder: Path) -> None:
    """Exit with a message unless `folder` is a complete bundle for this Python."""
    print(f"Checking the files in {folder} against {SUMS}", flush=True)
    if faults := find_faults(folder):
        lines = [f"{folder} was changed; nothing was installed:", *faults]
        sys.exit("\n".join([*lines, "Copy these files, or make the bundle, again."]))
    made_for, here = json.loads((folder / "bundle.json").read_text("utf-8")), this_python()
    if any(made_for[key] != here[key] for key in here):
        sys.exit(
            f"{folder} is for Python {made_for['python']} on {made_for['platform']}, not "
            f"{here['python']} on {here['platform']}: make install PYTHON=python"
            f"{made_for['python']}, or make a bundle with this Python."
        )
    # Often harmless, but some releases require, say, Python 3.11.5.
    differences = []
    if made_for.get("pyproject.toml") != sha256(ROOT / "pyproject.toml"):
        differences.append("for another pyproject.toml")
    if made_for["release"] != platform.python_version():
        differences.append(f"by Python {made_for['release']}, not {platform.python_version()}")
    if differences:
        print(
            f"Note: {folder} was made {' and '.join(differences)}. If pip finds no distribution of "
            "a package, make the bundle again, from this checkout and by this Python."
        )


def pip_wheel(wheels: Path, *arguments: str | Path) -> None:
    """Put the wheels of requirements, with their dependencies, into `wheels`."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    subprocess.run([*command, "--wheel-dir", wheels, *arguments], check=True, cwd=ROOT)


def collect_wheels(wheels: Path, torch: str, package: str, constraint: str) -> None:
    """Fill the folder `wheels`; for the rest see the options of `collect`."""
    detectron2 = ROOT / "imrcnn_d2" / "cli" / "install_detectron2.py"
    subprocess.run([sys.executable, detectron2, "--fetch", wheels], check=True)
    pip_wheel(wheels, *shlex.split(torch))
    # The other packages must fit this torch, not the index's newest.
    pins = [
        f"{name}=={path.name.split('-')[1]}"
        for name in ("torch", "torchvision")
        for path in wheels.glob(f"{name}-*.whl")
    ]
    # Without build isolation: some releases are sources and need the constraints' setuptools.
    options = ("--find-links", wheels, "--constraint", constraint, "--no-build-isolation")
    pip_wheel(wheels, *options, "pip", "setuptools", "wheel", package, *pins)
    for wheel in wheels.glob("imrcnn_d2-*.whl"):
        wheel.unlink()  # the package is installed from its sources


def fetch_weights(url: str, folder: Path) -> None:
    """Download weights into `folder`, laid out as Detectron2's cache of downloads.

    `url` is https://... or detectron2://..., with #sha256=HEX if the checksum is known.
    """
    url, _, expected = url.partition("#sha256=")
    address = url.replace("detectron2://", MODEL_ZOO, 1)
    parts = urlparse(address)
    host = "" if address.startswith(ZOO) else parts.netloc
    path = (folder / host / parts.path.lstrip("/")).with_name(address.rpartition("/")[2])
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
    actual = sha256(path)
    if not expected:
        print(f"SHA-256 {actual}; pin it: WEIGHTS='{url}#sha256={actual}'")
    elif actual != expected.lower():
        sys.exit(f"{address} has SHA-256 {actual}, expected {expected}: it is another file.")


def collect(folder: Path, torch: str, package: str, constraint: str, weights: list[str]) -> None:
    """Make the bundle `folder`, complete or not at all."""
    folder = folder.absolute()
    if folder.exists() and not (folder / SUMS).is_file():
        sys.exit(f"{folder} exists and is no bundle: name another folder.")
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
            "pyproject.toml": sha256(ROOT / "pyproject.toml"),
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
    command = commands.add_parser(
        "check", help="check that a bundle is complete and for this Python"
    )
    command.add_argument("folder", metavar="DIR", type=Path)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    if args.command == "check":
        check(args.folder)
        return
    try:
        collect(args.folder, args.torch, args.package, args.constraint, args.weights.split())
    except subprocess.CalledProcessError as error:
        sys.exit(f"Failed: {' '.join(map(str, error.cmd))}\nSee above. No bundle was made.")


if __name__ == "__main__":
    main()
