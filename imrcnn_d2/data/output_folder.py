"""The folder of a prepared data set: made beside and renamed, never overwritten."""

import contextlib
import filecmp
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_free", "check_same", "first_difference", "is_empty", "staged", "write_json"]

# Grows beside a data set with every evaluation of its test part (evaluation/test_log.py).
TEST_LOG = "test_evaluations.csv"


def write_json(path: Path, content: dict, indent: int | None = None) -> None:
    """Writes strict JSON that is the same byte for byte for the same content; makes the folder."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content, sort_keys=True, allow_nan=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to be renamed to it when complete; removed if it was not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    stage.chmod(0o755)  # mkdtemp's is private
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    """Whether it is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


def check_free(out: Path) -> None:
    """Raises FileExistsError if `out` is something else than a prepared data set or nothing."""
    if out.exists() and not is_empty(out) and not (out / "splits.json").is_file():
        raise FileExistsError(f"{out}: exists and is no prepared data set; choose another --out")


def check_same(stage: Path, out: Path) -> None:
    """Raises FileExistsError, naming a file that differs, unless both hold the same files."""
    name = first_difference(stage, out)
    if name is not None:
        raise FileExistsError(
            f"{out}: holds a data set made from other data or with other settings ({name} "
            "would change). Choose another --out or remove it first; "
            f"--splits {out / 'splits.json'} keeps its assignments in a new one."
        )


def first_difference(a: Path, b: Path) -> str | None:
    """The first file, by name, that only one of two folders has or whose content differs."""
    files = {
        str(path.relative_to(folder))
        for folder in (a, b)
        for path in folder.rglob("*")
        if path.is_file() and path.name != TEST_LOG
    }
    for name in sorted(files):
        pair = a / name, b / name
        if not all(path.is_file() for path in pair) or not filecmp.cmp(*pair, shallow=False):
            return name
    return None
