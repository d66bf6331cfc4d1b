"""Tables of what is known of images: CSV, separated by commas, semicolons or tabs."""

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imrcnn_d2.data.csv_files import plain_cell
from imrcnn_d2.data.files import regular_file
from imrcnn_d2.data.rejects import BadInputError

__all__ = ["Row", "Table", "not_numbers", "read_table", "typed"]

# No leading zeros: 007 is a code. More digits than this are a number of a thing as well.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,14})", re.ASCII)
_DECIMAL = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_BOOLEAN = {"true": True, "false": False}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        line: of the file, counted from 1; where a row has several, the last.
        cells: text by column, without spaces around it; "" where there is nothing.
    """

    line: int
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A table as read.

    Attributes:
        path: the file.
        columns: their names, in the file's order.
        rows: those that are not empty.
        separator: "," ";" or a tab.
    """

    path: Path
    columns: list[str]
    rows: list[Row]
    separator: str

    def where(self, row: Row) -> str:
        """What an error calls the row."""
        return f"{self.path}, line {row.line}"


def read_table(csv_file: Path, needed: Sequence[str] = ()) -> Table:
    """Reads a CSV in UTF-8 whose first line names the columns.

    Args:
        csv_file: the table.
        needed: columns that it must have.

    Raises:
        BadInputError: it cannot be read, lacks a needed column or names one twice, or a row has
            more cells than there are columns.
    """
    try:
        text = regular_file(csv_file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(csv_file, f"cannot be read as a table in UTF-8 ({error})") from error
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        lines = [
            (reader.line_num, [plain_cell(cell.strip()) for cell in cells]) for cells in reader
        ]
    except csv.Error as error:
        reason = f"is no readable table: line {reader.line_num}: {error}"
        raise BadInputError(csv_file, reason) from error
    columns = lines[0][1] if lines else []
    while columns and not columns[-1]:  # what spreadsheets leave behind
        columns.pop()
    if missing := sorted(set(needed) - set(columns)):
        there = ", ".join(columns) or "none"
        raise BadInputError(csv_file, f"lacks the columns {', '.join(missing)}; it has {there}")
    for name in columns:
        if not name or columns.count(name) > 1:
            what = f"two columns are named {name!r}" if name else "a column has no name"
            raise BadInputError(csv_file, f"{what}: {', '.join(columns)}")
    rows = []
    for line, cells in lines[1:]:
        if any(cells[len(columns) :]):
            raise BadInputError(
                csv_file,
                f"line {line} has {len(cells)} cells, the first line names {len(columns)} columns; "
                f"put text that holds {separator!r} in quotes",
            )
        if any(cells):
            cells += [""] * (len(columns) - len(cells))
            rows.append(Row(line, dict(zip(columns, cells, strict=False))))
    return Table(csv_file, columns, rows, separator)


def typed(texts: Sequence[str], separator: str = ",") -> list:
    """Gives the cells of a column the type that all of them have.

    Args:
        texts: cells; "" is nothing.
        separator: of the table; between semicolons and tabs, numbers may have a decimal comma.

    Returns:
        int, float, bool or str, None for nothing. All numbers are of one type. Codes such as 007
        stay text.
    """
    given = [text for text in texts if text]
    if all(text.casefold() in _BOOLEAN for text in given):
        return [_BOOLEAN[text.casefold()] if text else None for text in texts]
    if all(_INTEGER.fullmatch(text) for text in given):
        return [int(text) if text else None for text in texts]
    numbers = [_number(text, separator) if text else None for text in texts]
    if all(number is not None for text, number in zip(texts, numbers, strict=True) if text):
        return numbers
    return [text or None for text in texts]


def not_numbers(texts: Sequence[str], separator: str = ",") -> list[int]:
    """Places of the cells for which a column that is mostly of numbers is text; empty if none."""
    given = [i for i, text in enumerate(texts) if text]
    others = [i for i in given if _number(texts[i], separator) is None]
    return others if len(others) < len(given) / 2 else []


def _number(text: str, separator: str) -> float | None:
    if separator != ",":
        text = text.replace(",", ".")
    if not _DECIMAL.fullmatch(text) or not math.isfinite(float(text)):
        return None
    return float(text)
