"""Files: strict JSON and CSV, atomic writes, hashes, links, and errors that name a file."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

__all__ = [
    "BadInputError",
    "Rejects",
    "atomic_file",
    "check_inside",
    "csv_line",
    "csv_lines",
    "csv_text",
    "file_sha256",
    "for_terminal",
    "is_empty",
    "leads_out",
    "lock_folder",
    "plain_cell",
    "read_json",
    "read_rows",
    "regular_file",
    "staged",
    "strict_json",
    "write_atomically",
]


# A cell that begins so is run as a formula: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def csv_line(values: Iterable) -> str:
    """One line of a table, its end included.

    Texts that would be run as a formula get an apostrophe before them, which marks text in a
    spreadsheet program; numbers, as numbers or as texts, stay as they are.
    """
    text = io.StringIO()
    # With "\n" as its end of lines, Python's writer would leave a "\r" in a cell unquoted.
    csv.writer(text, lineterminator="\r\n").writerow(map(_cell, values))
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_lines(rows: Iterable[Iterable]) -> str:
    """Several lines, see `csv_line`."""
    return "".join(map(csv_line, rows))


def plain_cell(cell: str) -> str:
    """A cell as it was before `csv_line` wrote it."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def read_rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Reads a table of `csv_lines` whose first line names the columns, cells as they were.

    Raises:
        ValueError: it is no such table, or lacks a needed column.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [[plain_cell(cell) for cell in line] for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table in UTF-8 ({error})") from error
    columns = lines[0] if lines else []
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(f"{path}: lacks the columns {', '.join(missing)}")
    for line in lines:
        if len(line) != len(columns):
            raise ValueError(f"{path}: a row has {len(line)} cells, not {len(columns)}: {line[:9]}")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def _cell(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


# What a terminal obeys, what turns the direction of writing, and bytes of file names that are no
# UTF-8; not the end of a line.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def for_terminal(text: object, one_line: bool = False) -> str:
    """The text with control characters, which names in files can hold, as ``\\x1b`` and so on."""
    escaped = _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], str(text))
    return escaped.replace("\n", r"\n") if one_line else escaped


class BadInputError(ValueError):
    """An image, mask or annotation that cannot be used; names the file and the reason."""

    def __init__(self, file: str | Path, reason: str):
        super().__init__(for_terminal(f"{file}: {reason}"))
        self.file = str(file)
        self.reason = reason

    def __reduce__(self):  # else it could not come back from another process
        return type(self), (self.file, self.reason)


class Rejects:
    """Collects bad input under ``on_error="reject"``; under "raise" the first one stops the run.

    Args:
        on_error: "raise" or "reject".
        follow_links: whether links inside a folder of the user may lead out of it.
    """

    def __init__(self, on_error: str = "raise", follow_links: bool = False):
        if on_error not in ("raise", "reject"):
            raise ValueError(f"on_error is {on_error!r}; choose 'raise' or 'reject'")
        self.on_error, self.follow_links = on_error, follow_links
        self.errors: list[BadInputError] = []

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        """Ends the block at a `BadInputError`; if rejecting, lists it and goes on after it."""
        try:
            yield
        except BadInputError as error:
            if self.on_error == "raise":
                raise
            self.errors.append(error)

    def write_csv(self, path: Path) -> None:
        """Writes columns ``file, reason``, one row a reject, in the order met."""
        rows = [("file", "reason"), *((error.file, error.reason) for error in self.errors)]
        path.write_text(csv_lines(rows), encoding="utf-8", newline="")


def regular_file(path: Path) -> Path:
    """Returns `path`, which is a file whose end comes; nothing else is opened.

    Raises:
        BadInputError: there is no such file, or it is a folder, pipe, socket or device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInputError(path, f"cannot be opened: {reason}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise BadInputError(path, f"cannot be opened: is {kind}, not a file; give a copy as a file")
    return path


def leads_out(folder: Path, path: Path) -> bool:
    """Whether `path`, once links are followed, lies outside `folder`, which may be a link."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_inside(folder: Path, path: Path, follow_links: bool = False) -> Path:
    """Returns `path`.

    Raises:
        BadInputError: links lead it out of `folder`, and `follow_links` does not allow that.
    """
    if not follow_links and leads_out(folder, path):
        raise BadInputError(
            path,
            f"is a link that leads out of {folder}, to {os.path.realpath(path)}; put a copy there, "
            "or allow such links with --follow-links",
        )
    return path


_MOST_BYTES = 2**30
_MOST_CONTAINERS = 20_000_000  # lists and objects; an empty one takes up to 60 times its text
_LONGEST_INTEGER = 300  # digits: larger ones cannot become a float
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> object:
    """Reads strict JSON in UTF-8, with or without a byte order mark.

    Raises:
        BadInputError: cannot be opened, is no JSON, has a key twice in one object, or holds what
            cannot be written again: NaN, infinite numbers, broken text. Or it is too large.
    """
    regular_file(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise BadInputError(path, f"is larger than {_MOST_BYTES:,} bytes; split it")
        text = path.read_text(encoding="utf-8-sig")
        if text.count("[") + text.count("{") > _MOST_CONTAINERS:
            raise BadInputError(
                path, f"has more than {_MOST_CONTAINERS:,} lists and objects; split it"
            )
        content = json.loads(
            text,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_unique,
        )
    except BadInputError:
        raise
    except OSError as error:
        raise BadInputError(path, f"cannot be opened: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(path, f"is no JSON ({error})") from error
    except MemoryError as error:
        raise BadInputError(path, "is too large for the memory of this machine") from error
    except RecursionError as error:
        raise BadInputError(path, "is nested too deeply to be read") from error
    if _HALF_CHARACTER.search(text):  # which JSON can spell, but no file can hold
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadInputError(path, f"is no JSON (broken text: {error.reason})") from error
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """json.loads takes the last of several values, so that the others would be lost unnoticed."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, times), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is there {times} times in one object, keep one")
    return content


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value, write null or leave the field out")


def _whole(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"the number {text[:20]}... is out of range")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is out of range")
    return value


_LONGEST_NAME = 255  # bytes, as nearly all file systems have it


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: str | Path, mark: str = "") -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces its predecessor at once, or not at all.

    A temporary file next to it is written to the disk, and renamed when the block ends without an
    error. Nothing is written through a link that somebody left under either name.

    Args:
        path: its folder is made if it does not exist.
        mark: in the name of the temporary file, where others may be writing the same one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{mark}.tmp")
    if len(os.fsencode(temporary.name)) > _LONGEST_NAME:
        temporary = path.with_name(hashlib.sha256(os.fsencode(temporary.name)).hexdigest() + ".tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    file = open(temporary, "xb")  # noqa: SIM115  (closed below)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file through `atomic_file`, text as UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder next to `out`, to be renamed to it when complete; removed if it was not."""
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


def lock_folder(folder: str | Path, option: str, timeout: float = 0) -> FileLock:
    """Locks a folder for one writer, until the lock is released or the process ends.

    Args:
        folder: made if it does not exist.
        option: that chose it, such as "--output", for the error.
        timeout: seconds to wait for another writer to end.

    Raises:
        ValueError: another run is writing into the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=timeout)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another run is writing into {folder}: wait for it, or choose another {option}"
        ) from error
    return lock


def strict_json(document: dict) -> str:
    """Indented JSON that every reader takes: floats that are not finite become null."""
    return json.dumps(_nan_to_null(document), indent=2, allow_nan=False) + "\n"


def _nan_to_null(value: object) -> object:
    if isinstance(value, dict):
        return {key: _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """The rows under all their keys, in the order of their first appearance; NaN is empty.

    Without rows, it is the header of `columns` alone.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row)) or columns
    values = ([row.get(column) for column in columns] for row in rows)
    known = ([None if isinstance(v, float) and math.isnan(v) else v for v in row] for row in values)
    return csv_lines([columns, *known])
