"""The tables that are written here: CSV that spreadsheet programs take for data, not formulas."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["csv_line", "csv_lines", "plain_cell", "read_rows"]

# A cell that begins so is run as a formula: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def csv_line(values: Iterable) -> str:
    """One line of a table, its end included.

    Texts that would be run as a formula get an apostrophe before them, which says "text" to a
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
