"""Patient ids from a table, file names or DICOM files; further metadata from tables.

Images of one patient stay in one split, and metrics are resampled over patients. So an image whose
patient should be known and is not is bad input; it never becomes a separate patient silently.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from imrcnn_d2.data.formats.base import Sample, Source
from imrcnn_d2.data.images import hide_details, list_files, read_header
from imrcnn_d2.data.masks import ANNOTATION_FIELDS, IMAGE_FIELDS
from imrcnn_d2.utils.files import BadInputError, Rejects, plain_cell, regular_file

__all__ = [
    "KEYS",
    "MetadataTable",
    "Row",
    "Table",
    "not_numbers",
    "patients_from_dicom",
    "patients_from_pattern",
    "read_metadata",
    "read_table",
    "typed",
    "with_metadata",
    "with_patients",
    "with_patients_from_csv",
]


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
    while columns and not columns[-1]:  # which spreadsheets add
        columns.pop()
    if missing := sorted(set(needed) - set(columns)):
        present = ", ".join(columns) or "none"
        raise BadInputError(csv_file, f"lacks the columns {', '.join(missing)}; it has {present}")
    for name in columns:
        if not name or columns.count(name) > 1:
            problem = f"two columns are named {name!r}" if name else "a column has no name"
            raise BadInputError(csv_file, f"{problem}: {', '.join(columns)}")
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


# Columns that identify a row; the order in which tables are joined.
KEYS = ("file", "patient_id", "lesion_id")
_IDS = ("patient_id", "lesion_id")
# Fields of COCO that a prepared data set computes.
_COMPUTED_FIELDS = {
    False: (*IMAGE_FIELDS, "group_id"),
    True: (*ANNOTATION_FIELDS, "score"),
}


@dataclass
class MetadataTable:
    """Rows by what they are of.

    Attributes:
        path: the file.
        key: columns that a row is found by. A table with ``lesion_id`` is one of lesions; where it
            has ``file`` or ``patient_id`` as well, these must agree too, as lesions that are
            numbered anew in each patient need. A table with ``file`` is one of images, and its
            ``patient_id`` a column as any other.
        rows: (line, values by column) by their key. Empty cells are left out.
        columns: the other columns.
        notes: about the table itself.
        used: keys of the rows that were joined.
    """

    path: Path
    key: tuple[str, ...]
    rows: dict[tuple[str, ...], tuple[int, dict]]
    columns: list[str]
    notes: list[str]
    used: set = field(default_factory=set)

    @property
    def of_lesions(self) -> bool:
        """Whether its rows are of annotations; else they are of images."""
        return "lesion_id" in self.key

    def join(self, record: dict, key: tuple, path: Path) -> bool:
        """Adds the values of the row with `key` to `record`; whether there is one.

        Raises:
            BadInputError: `record` has another value; names `path`, its image.
        """
        if key not in self.rows:
            return False
        self.used.add(key)
        line, values = self.rows[key]
        for column, value in values.items():
            present = record.get(column)
            if present is not None and present != value and str(present) != str(value):
                raise BadInputError(
                    path, f"{column} is {present!r}, but {value!r} in {self.path}, line {line}"
                )
            record[column] = value
        return True

    def unused(self) -> list[str]:
        """The rows that nothing matched, as "key (line N)"."""
        return [
            f"{' '.join(key)} (line {line})"
            for key, (line, _) in self.rows.items()
            if key not in self.used
        ]


def read_metadata(csv_file: Path, rejects: Rejects) -> MetadataTable:
    """Reads a table of images, patients or lesions.

    A column in which all cells are numbers, or true and false, has such values; all others, and
    all ids, are text.

    Args:
        csv_file: separated by commas, semicolons or tabs, in UTF-8.
        rejects: takes rows without a key, and those whose key another one has.

    Raises:
        BadInputError: it cannot be read, has no key column, or a column that COCO reserves.
    """
    table = read_table(csv_file)
    key = _key(table)
    columns = [column for column in table.columns if column not in key]
    if taken := set(columns) & set(_COMPUTED_FIELDS["lesion_id" in key]):
        raise BadInputError(
            csv_file,
            f"columns {', '.join(sorted(taken))} are COCO's: give them other names",
        )
    values, notes = _values(table, columns)
    rows: dict[tuple[str, ...], tuple[int, dict]] = {}
    for row, of_row in zip(table.rows, values, strict=True):
        with rejects.catch():
            ids = tuple(row.cells[column] for column in key)
            if not all(ids):
                raise BadInputError(table.where(row), f"has no {key[ids.index('')]}")
            ids = tuple(_cleaned(c, text) for c, text in zip(key, ids, strict=True))
            if ids in rows:
                raise BadInputError(
                    table.where(row), f"{' '.join(ids)} is in line {rows[ids][0]} already"
                )
            rows[ids] = row.line, of_row
    return MetadataTable(csv_file, key, rows, columns, notes)


def with_metadata(
    source: Source, tables: Iterable[MetadataTable], rejects: Rejects, every_image: bool = False
) -> Source:
    """Joins tables to images (their COCO fields) and lesions (those of their annotations).

    Args:
        source: where the images come from.
        tables: those of images are joined first, then those of patients, then those of lesions.
        rejects: takes images and lesions that contradict their row.
        every_image: an image without a row is bad input, not a note.

    Returns:
        the source, its notes with all that did not match. Patient and lesion ids are text in it.

    Raises:
        BadInputError: when the samples are read: nothing in a table matches anything.
    """
    tables = sorted(tables, key=lambda table: KEYS.index(table.key[0]))
    for table in tables:
        source.notes.extend(table.notes)
        source = replace(source, samples=_joined(source, table, rejects, every_image))
    return source


def _joined(
    source: Source, table: MetadataTable, rejects: Rejects, every_image: bool
) -> Iterator[Sample]:
    without: dict[str, None] = {}  # ordered
    read = False
    for sample in source.samples:
        read = True
        with rejects.catch():
            path = sample.image.path
            for record in (sample.fields, *sample.annotations):
                for column in _IDS:
                    if record.get(column) is not None:
                        record[column] = str(record[column])
            for record in sample.annotations if table.of_lesions else (sample.fields,):
                named = {**record, "patient_id": sample.fields.get("patient_id")}
                named["file"] = sample.file_name
                ids = tuple(named.get(column) for column in table.key)
                if table.join(record, ids, path):
                    continue
                if every_image:
                    raise BadInputError(path, f"{sample.file_name} is not in {table.path}")
                known = ids if None not in ids else (f"{sample.file_name} (no {table.key[0]})",)
                without[" ".join(known)] = None
            yield sample
    if read and table.rows and not table.used:
        raise BadInputError(
            table.path,
            f"no {' and '.join(table.key)} in it is one of the data set's. It has "
            f"{_few(table.unused())}; the data set {_few(list(without))}",
        )
    units = {"file": "images", "patient_id": "patients", "lesion_id": "lesions"}[table.key[0]]
    for number, problem, names in (
        (len(without), f"{units} have no row in {table.path}", list(without)),
        (len(table.rows) - len(table.used), f"rows of {table.path} match nothing", table.unused()),
    ):
        if number:
            source.notes.append(f"{number} {problem}: {', '.join(names)}")


def _key(table: Table) -> tuple[str, ...]:
    keys = [column for column in KEYS if column in table.columns]
    if not keys:
        raise BadInputError(
            table.path,
            f"has none of the columns {', '.join(KEYS)}, one of which must identify a row; it "
            f"has {', '.join(table.columns) or 'none'}",
        )
    if "lesion_id" in keys:
        return "lesion_id", *keys[:-1]
    return (keys[0],)


def _cleaned(column: str, text: str) -> str:
    """A file as COCO names it: with slashes, relative."""
    return text.replace("\\", "/").removeprefix("./") if column == "file" else text


def _values(table: Table, columns: Sequence[str]) -> tuple[list[dict], list[str]]:
    """{column: value} of each row, without empty cells; notes on types."""
    values: list[dict] = [{} for _ in table.rows]
    notes = []
    for column in columns:
        texts = [row.cells[column] for row in table.rows]
        if column not in _IDS and (others := not_numbers(texts, table.separator)):
            first = table.rows[others[0]]
            notes.append(
                f"{table.path}: {column} is text, since {first.cells[column]!r} in line "
                f"{first.line} is no number"
            )
        typed_values = texts if column in _IDS else typed(texts, table.separator)
        for row, value in zip(values, typed_values, strict=True):
            if value not in (None, ""):
                row[column] = value
    return values, notes


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown}, …" if len(names) > 3 else shown


PatientOf = Callable[[Sample], str | None]


def with_patients_from_csv(source: Source, csv_file: Path, rejects: Rejects) -> Source:
    """Takes ``patient_id`` from a table with the columns file and patient_id.

    An empty patient_id says that the patient is not known.

    Args:
        source: where the images come from.
        csv_file: see `read_metadata`; a file is named as COCO's ``file_name``.
        rejects: takes images that are not in the table, or have another patient_id already.

    Raises:
        BadInputError: the table cannot be read, or is of something else.
    """
    table = read_metadata(csv_file, rejects)
    if table.key != ("file",) or "patient_id" not in table.columns:
        raise BadInputError(csv_file, "is no table of patients: it needs file and patient_id")
    others = [column for column in table.columns if column != "patient_id"]
    if others:
        table.notes.append(f"{csv_file}: {', '.join(others)} not read; --metadata joins them")
    for _, values in table.rows.values():
        for column in others:
            values.pop(column, None)
    joined = with_metadata(source, [table], rejects, every_image=True)
    return with_patients(joined, lambda sample: sample.fields.get("patient_id"), rejects)


def with_patients(source: Source, patient_of: PatientOf, rejects: Rejects) -> Source:
    """Gives images the ``patient_id`` of `patient_of`, and notes the number of patients.

    Args:
        source: where the images come from.
        patient_of: of a sample; None where it is not known.
        rejects: takes images for which it raises, and those that have another patient_id already.
    """
    return replace(source, samples=_identified(source, patient_of, rejects))


def _identified(source: Source, patient_of: PatientOf, rejects: Rejects):
    patients, unknown = set(), 0
    for sample in source.samples:
        with rejects.catch():
            present, patient = sample.fields.get("patient_id"), patient_of(sample)
            if patient is None:
                patient = None if present is None else str(present)
            elif present is not None and str(present) != patient:
                raise BadInputError(
                    sample.image.path,
                    f"patient_id is {present!r} in the data set, but {patient!r} as requested",
                )
            if patient is None:
                unknown += 1
            else:
                sample.fields["patient_id"] = patient
                patients.add(patient)
            yield sample
    source.notes.append(f"{len(patients)} patients")
    if unknown:
        source.notes.append(
            f"{unknown} images of unknown patients: each is split like a separate patient, "
            "and metrics are resampled over images instead of patients"
        )


def patients_from_pattern(pattern: str) -> PatientOf:
    """Finds the patient in the file name.

    Args:
        pattern: regular expression, looked for anywhere in ``file_name``, folders included. The id
            is its group named ``patient``, else its first group, else all that matches; a group
            that takes no part says that the patient is not known.

    Raises:
        ValueError: it is no regular expression. Of a name that does not match, the function
            returned raises BadInputError.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--patient-pattern {pattern!r} is no regular expression: {error}") from (
            error
        )
    group = "patient" if "patient" in compiled.groupindex else min(compiled.groups, 1)

    def patient_of(sample: Sample) -> str | None:
        match = compiled.search(sample.file_name)
        if match is None:
            raise BadInputError(
                sample.image.path, f"{sample.file_name} does not match the pattern {pattern!r}"
            )
        return match[group] or None

    return patient_of


def patients_from_dicom(folder: Path | None = None, rejects: Rejects | None = None) -> PatientOf:
    """Reads the patient out of DICOM files: tag (0010,0020), PatientID.

    Args:
        folder: of DICOM files named as the images but for the suffix, of which there may be none;
            None where the images are DICOM files themselves.
        rejects: takes links that lead out of the folder, see `list_files`.

    Raises:
        FileNotFoundError: there is no such folder. Of an image without a DICOM file, the function
            returned raises BadInputError.
    """
    files: dict[str, Path] = {}
    for path in [] if folder is None else list_files(folder, rejects):
        name = path.relative_to(folder).as_posix()
        files[re.sub(r"\.(dcm|dicom)$", "", name, flags=re.IGNORECASE)] = path

    def patient_of(sample: Sample) -> str | None:
        path = sample.image.path
        if folder is not None:
            stem = PurePosixPath(sample.file_name).with_suffix("").as_posix()
            if stem not in files:
                raise BadInputError(path, f"there is no DICOM file {stem}.dcm in {folder}")
            path = files[stem]
        header = read_header(path, specific_tags=["PatientID"])
        with hide_details(path, "its PatientID cannot be read"):
            return str(header.get("PatientID") or "").strip() or None

    return patient_of
