"""Files: strict JSON and CSV, atomic writes, hashes, links; errors that name file or remedy."""

import contextlib
import csv
import gc
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

import ijson
from filelock import FileLock, Timeout

# A cell that begins so is run as a formula: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def install_extra(name: str) -> str:
    """The command that installs the packages of an extra."""
    return f"pip install 'imrcnn-d2[{name}]'"


def csv_line(values: Iterable) -> str:
    """Return one line of a table, its end included. Texts that a spreadsheet program would run as a
    formula get an apostrophe, which marks text; numbers, also as texts, stay as they are."""
    text = io.StringIO()
    # With "\n" as its end of lines, Python's writer would leave a "\r" in a cell unquoted.
    csv.writer(text, lineterminator="\r\n").writerow(map(_cell, values))
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_lines(rows: Iterable[Iterable]) -> str:
    """Return several lines, see `csv_line`."""
    return "".join(map(csv_line, rows))


def csv_text(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """Return the rows under all their keys, in the order of their first appearance, NaN empty;
    without rows, the header of `columns`."""
    columns = list(dict.fromkeys(key for row in rows for key in row)) or columns
    cells = ([row.get(column) for column in columns] for row in rows)
    known = ([None if isinstance(v, float) and math.isnan(v) else v for v in row] for row in cells)
    return csv_lines([columns, *known])


def plain_cell(cell: str) -> str:
    """Return a cell as it was before `csv_line` wrote it."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def read_rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Read a table of `csv_lines` whose first line names the columns, cells as they were; raise
    ValueError if it is no such table, or lacks a needed column."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [[plain_cell(cell) for cell in line] for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table in UTF-8 ({error})") from error
    columns, *rows = lines or [[]]
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(f"{path}: lacks the columns {', '.join(missing)}")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{path}: a row has {len(row)} cells, not {len(columns)}: {row[:9]}")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _cell(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = as_utf8(str(value))
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


# What a terminal obeys, what turns the direction of writing, and bytes of file names that are no
# UTF-8; not the end of a line.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def for_terminal(text: object, one_line: bool = False) -> str:
    """Escape control characters, which names in files can hold, as ``\\x1b`` and so on."""
    escaped = _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], str(text))
    return escaped.replace("\n", r"\n") if one_line else escaped


def as_utf8(text: str) -> str:
    """Escape the bytes of a file name that are no UTF-8, which no JSON or Parquet file can hold."""
    return text.encode(errors="backslashreplace").decode()


def few(values: Sequence, number: int = 3, separator: str = ", ") -> str:
    """Return the first values as text, with the number of the others."""
    text, others = separator.join(map(str, values[:number])), len(values) - number
    return f"{text} and {others} more" if others > 0 else text


class BadInputError(ValueError):
    """An image, mask or annotation that cannot be used; names the file and the reason."""

    can_be_rejected = False  # whether ``on_error="reject"`` would have gone on without it

    def __init__(self, file: str | Path, reason: str):
        super().__init__(for_terminal(f"{file}: {reason}"))
        self.file = str(file)
        self.reason = reason

    def __reduce__(self):  # else it could not come back from another process
        return type(self), (self.file, self.reason)


class Rejects:
    """Collects bad input under ``on_error="reject"``; under "raise" the first one stops the run.
    `follow_links` allows links inside a folder of the user to lead out of it."""

    def __init__(self, on_error: str = "raise", follow_links: bool = False):
        if on_error not in ("raise", "reject"):
            raise ValueError(f"on_error is {on_error!r}; choose 'raise' or 'reject'")
        self.on_error, self.follow_links = on_error, follow_links
        self.errors: list[BadInputError] = []

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        """End the block at a `BadInputError`; if rejecting, list it and go on after it."""
        try:
            yield
        except BadInputError as error:
            error.can_be_rejected = True
            if self.on_error == "raise":
                raise
            self.leave_out(error)

    def leave_out(self, error: BadInputError) -> None:
        """List what is left out under either setting, such as a copy in a published data set."""
        self.errors.append(error)

    def write_csv(self, path: Path) -> None:
        """Write columns ``file, reason``, one row per reject."""
        rows = [("file", "reason"), *((error.file, error.reason) for error in self.errors)]
        path.write_text(csv_lines(rows), encoding="utf-8", newline="")


def regular_file(path: Path) -> Path:
    """Return `path`, which is a file whose end comes; raise BadInputError if there is none, or it
    is a folder, pipe, socket or device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInputError(path, f"cannot be opened: {reason}") from error
    if not stat.S_ISREG(mode):
        kind, remedy = "a pipe, socket or device", "give a copy as a file"
        if stat.S_ISDIR(mode):
            kind, remedy = "a folder", file_in(path)
        raise BadInputError(path, f"cannot be opened: is {kind}, not a file; {remedy}")
    return path


_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".rar", ".7z")


def is_archive(path: Path) -> bool:
    """Whether it is a file with the name of an archive."""
    return path.is_file() and path.suffix.lower() in _ARCHIVES


def file_in(folder: Path) -> str:
    """The advice to give a file in `folder`: the one that a prepared data set, a prediction or an
    evaluation is known by, if it is there."""
    for name in ("annotations/test.json", "predictions.json", "coco_instances_results.json"):
        if (folder / name).is_file():
            return f"give {folder / name}"
    return "give a file in it"


def leads_out(folder: Path, path: Path) -> bool:
    """Whether `path`, once links are followed, lies outside `folder`, which may be a link."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_inside(folder: Path, path: Path, follow_links: bool = False) -> Path:
    """Return `path`; raise BadInputError if it leads out of `folder`, unless `follow_links`."""
    if not follow_links and leads_out(folder, path):
        reason = f"is a link that leads out of {folder}, to {os.path.realpath(path)}; put a copy"
        raise BadInputError(path, f"{reason} there, or allow such links with --follow-links")
    return path


def check_no_way_out(folder: str | Path) -> None:
    """Raise BadInputError if a link in `folder` leads out of it, or a pipe lies in it: programs
    that write into it would follow the link, and wait for the pipe's reader."""
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if leads_out(Path(folder), path):
                target = os.path.realpath(path)
                raise BadInputError(path, f"is a link out of {folder}, to {target}; remove it")
            if path.is_fifo():
                raise BadInputError(path, "is a pipe, where a file is to be written; remove it")


_MOST_BYTES = 2**30
_MOST_CONTAINERS = 20_000_000  # lists and objects; an empty one takes up to 60 times its text
_LONGEST_INTEGER = 300  # digits: larger ones cannot become a float
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")
_OPENING = re.compile(r"[ \t\r\n]*\[[ \t\r\n]*(\]?)")
_SEPARATOR = re.compile(r"[ \t\r\n]*([,\]])")
_BLOCK, _LONGEST_ITEM = 2**20, 2**26  # characters of a list: read at a time, of an item


def read_json(path: Path) -> object:
    """Read strict JSON in UTF-8, with or without a byte order mark.

    Raises:
        BadInputError: cannot be opened, is no JSON, has a key twice in one object, or holds what
            cannot be written again: NaN, infinite numbers, broken text. Or it is too large.
    """
    regular_file(path)
    with _json_errors(path):
        if path.stat().st_size > _MOST_BYTES:
            raise BadInputError(path, f"is larger than {_MOST_BYTES:,} bytes; split it")
        text = path.read_text(encoding="utf-8-sig")
        if text.count("[") + text.count("{") > _MOST_CONTAINERS:
            reason = f"has more than {_MOST_CONTAINERS:,} lists and objects; split it"
            raise BadInputError(path, reason)
        collects = gc.isenabled()
        gc.disable()  # JSON has no cycles; looking for them takes half of the time
        try:
            content = json.loads(text, **_STRICT)
        finally:
            if collects:
                gc.enable()
        if _HALF_CHARACTER.search(text):  # which JSON can spell, but no file can hold
            json.dumps(content, ensure_ascii=False).encode()
    return content


@contextlib.contextmanager
def _json_errors(path):
    """BadInputError for what goes wrong in reading."""
    try:
        yield
    except BadInputError:
        raise
    except OSError as error:
        raise BadInputError(path, f"cannot be opened: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise BadInputError(path, f"is no JSON (broken text: {error.reason})") from error
    except (ValueError, ijson.JSONError) as error:
        raise BadInputError(path, f"is no JSON ({error})") from error
    except MemoryError as error:
        raise BadInputError(path, "is too large for the memory of this machine") from error
    except RecursionError as error:
        raise BadInputError(path, "is nested too deeply to be read") from error


def is_json_list(path: str | Path) -> bool:
    """Whether a JSON file begins as a list does; BadInputError if it is no file."""
    with open(regular_file(Path(path)), "rb") as file:
        return file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def read_records(path: Path, prefix: str) -> Iterator[dict]:
    """The records of a list in a JSON file, one after the other, so that it may be larger than
    `read_json` takes; `prefix` is the list's key, "" where the file is the list.

    Raises:
        BadInputError: cannot be opened, is no JSON, or the list holds what is no object. Of a file
            that is a list, as `read_json`.
    """
    regular_file(path)
    with _json_errors(path):
        if prefix:
            with open(path, "rb") as file:
                yield from map(_object, ijson.items(file, f"{prefix}.item", use_float=True))
        else:
            with open(path, encoding="utf-8-sig") as file:
                yield from map(_object, _items(file))


def _object(record):
    if not isinstance(record, dict):
        raise ValueError(f"a list of records holds {record!r:.40}, not an object")
    return record


def _items(file):
    """The items of a list in an open file."""
    decode = json.JSONDecoder(**_STRICT).raw_decode
    text, number = file.read(_BLOCK), 0
    opening = _OPENING.match(text)
    if not opening:
        raise ValueError("it is no list")
    place, separator, is_broken = opening.end(), opening[1], _HALF_CHARACTER.search(text)
    while separator != "]":
        try:
            item, end = decode(text, _SPACE.match(text, place).end())
            following = _SEPARATOR.match(text, end)
            if not following:
                raise ValueError("Expecting ',' or ']'")
        except ValueError as error:  # maybe because the text ends within the item
            more = "" if len(text) - place > _LONGEST_ITEM else file.read(max(_BLOCK, len(text)))
            if not more:
                reason = getattr(error, "msg", error)
                raise ValueError(f"{reason}: item {number} of the list") from error
            text, place = text[place:] + more, 0
            is_broken = _HALF_CHARACTER.search(text)
            continue
        if is_broken:
            json.dumps(item, ensure_ascii=False).encode()
        yield item
        place, separator, number = following.end(), following[1], number + 1
    if text[place:].strip() or file.read(_BLOCK).strip():
        raise ValueError("Extra data after the list")


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


_STRICT = {
    "object_pairs_hook": _unique,
    "parse_constant": _refuse,
    "parse_float": _finite,
    "parse_int": _whole,
}


def strict_json(document: dict) -> str:
    """Return indented JSON that every reader takes: floats that are not finite become null."""
    return json.dumps(_nan_to_null(document), indent=2, allow_nan=False) + "\n"


def _nan_to_null(value: object) -> object:
    if isinstance(value, dict):
        return {key: _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


LONGEST_NAME = 255  # bytes of a file's name, as nearly all file systems have it


def file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: str | Path, mark: str = "") -> Iterator[BinaryIO]:
    """Open a file, in a folder that is made, that replaces its predecessor at once, or not at all.

    A temporary file next to it is written to the disk, and renamed when the block ends without an
    error. Nothing is written through a link that somebody left under either name. Where others may
    be writing the same file, a `mark` keeps the temporary files apart.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{mark}.tmp")
    if len(os.fsencode(temporary.name)) > LONGEST_NAME:
        temporary = path.with_name(hashlib.sha256(os.fsencode(temporary.name)).hexdigest() + ".tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    file = open(temporary, "xb")  # closed below
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
    """Write a whole file through `atomic_file`, text as UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_texts(folder: str | Path, texts: Mapping[str, str]) -> list[Path]:
    """Write files by name, each atomically, into a folder; returns them."""
    for name, text in texts.items():
        write_atomically(Path(folder) / name, text)
    return [Path(folder) / name for name in texts]


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a new folder next to `out`, to be renamed to it when complete, else removed."""
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
    """Lock a folder, made if it does not exist, for one writer, until the lock is released or the
    process ends; raise ValueError if another run still writes into it after `timeout` seconds.
    `option` chose the folder, such as "--output"."""
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
