"""Patient ids from a table, file names or DICOM files; further metadata from tables.

Images of one patient stay in one split, and metrics are resampled over patients. So an image whose
patient should be known and is not is bad input; it never becomes a unit of its own silently.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from imrcnn_d2.data.formats.base import Sample, Source
from imrcnn_d2.data.images import hide_details, list_files, read_header
from imrcnn_d2.data.masks import ANNOTATION_FIELDS, IMAGE_FIELDS
from imrcnn_d2.utils.files import BadInputError, Rejects, few, plain_cell, regular_file

# No leading zeros: 007 is a code. More digits than these are the number of an object, such as a
# study, of which a float would not keep the last ones.
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,14})", re.ASCII)
_DECIMAL = re.compile(
    r"[+-]?((0|[1-9]\d*)\.\d*|0|[1-9]\d{0,14}|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII
)
_BOOLEAN = {"true": True, "false": False}
# Columns that identify a row, in the order in which tables are joined, and what they are the id of.
_KEYS = {"file": "images", "patient_id": "patients", "lesion_id": "lesions"}
_IDS = ("patient_id", "lesion_id")

PatientOf = Callable[[Sample], str | None]


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    where: str  # file and line, for errors
    line: int  # from 1; where a row has several, the last
    cells: dict[str, str]  # text by column, "" where there is nothing


@dataclass(frozen=True)
class Table:
    """A table as read; rows without any text are left out."""

    path: Path
    columns: list[str]
    rows: list[Row]
    separator: str  # "," ";" or a tab


def read_table(csv_file: Path, needed: Sequence[str] = ()) -> Table:
    """Read a CSV in UTF-8 whose first line names the columns, the `needed` ones among them.

    Raises:
        BadInputError: it cannot be read, lacks or repeats a column, or a row has too many cells.
    """
    try:
        text = regular_file(csv_file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(csv_file, f"cannot be read as a table in UTF-8 ({error})") from error
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        lines = [(reader.line_num, [plain_cell(c.strip()) for c in cells]) for cells in reader]
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
            reason = f"line {line} has {len(cells)} cells, the first line {len(columns)}; put text "
            raise BadInputError(csv_file, f"{reason}that holds {separator!r} in quotes")
        if any(cells):
            cells += [""] * (len(columns) - len(cells))
            values = dict(zip(columns, cells, strict=False))
            rows.append(Row(f"{csv_file}, line {line}", line, values))
    return Table(csv_file, columns, rows, separator)


def typed(texts: Sequence[str], separator: str = ",") -> list:
    """Give the cells of a column the type that all of them have: int, float, bool or str.

    "" becomes None. All numbers are of one type; codes such as 007 stay text. Between semicolons
    and tabs, numbers may have a decimal comma.
    """
    given = [text for text in texts if text]
    if all(text.casefold() in _BOOLEAN for text in given):
        return [_BOOLEAN[text.casefold()] if text else None for text in texts]
    if all(_INTEGER.fullmatch(text) for text in given):
        return [int(text) if text else None for text in texts]
    numbers = [_number(text, separator) for text in texts]
    if all(number is not None for text, number in zip(texts, numbers, strict=True) if text):
        return numbers
    return [text or None for text in texts]


def _number(text: str, separator: str) -> float | None:
    if separator != ",":
        text = text.replace(",", ".")
    if not _DECIMAL.fullmatch(text) or not math.isfinite(float(text)):
        return None
    return float(text)


@dataclass
class MetadataTable:
    """Rows by the columns of `key`, with their line and their values but for empty cells.

    A table with ``lesion_id`` is one of lesions; where it has ``file`` or ``patient_id`` as well,
    these must agree too, as lesions that are numbered anew in each patient need. A table with
    ``file`` is one of images, and its ``patient_id`` a column as any other.
    """

    path: Path
    key: tuple[str, ...]
    rows: dict[tuple[str, ...], tuple[int, dict]]
    columns: list[str]  # the others
    notes: list[str]
    used: set = field(default_factory=set)  # keys of the rows that were joined

    def join(self, record: dict, key: tuple, image: Path) -> bool:
        """Add the values of the row with `key` to `record`; whether there is one."""
        if key not in self.rows:
            return False
        self.used.add(key)
        line, values = self.rows[key]
        for column, value in values.items():
            present = record.get(column)
            if present is not None and str(present) != str(value) and present != value:
                reason = f"{column} is {present!r}, but {value!r} in {self.path}, line {line}"
                raise BadInputError(image, reason)
            record[column] = value
        return True

    def unused(self) -> list[str]:
        """The rows that nothing matched, as "key (line N)"."""
        rows = ((key, line) for key, (line, _) in self.rows.items() if key not in self.used)
        return [f"{' '.join(key)} (line {line})" for key, line in rows]


def read_metadata(csv_file: Path, rejects: Rejects) -> MetadataTable:
    """Read a table of images, patients or lesions; `typed` gives all columns but ids their types.

    Raises:
        BadInputError: it cannot be read, has no key column, or a column that COCO reserves; under
            ``on_error="raise"`` a row without a key or with that of another row.
    """
    table = read_table(csv_file)
    key = tuple(column for column in _KEYS if column in table.columns)
    if not key:
        reason = f"has none of the columns {', '.join(_KEYS)}, one of which must identify a row; "
        raise BadInputError(csv_file, f"{reason}it has {', '.join(table.columns) or 'none'}")
    of_lesions = "lesion_id" in key
    key = ("lesion_id", *key[:-1]) if of_lesions else key[:1]
    columns = [column for column in table.columns if column not in key]
    of_annotations = (*ANNOTATION_FIELDS, "score", "raw_score")
    reserved = of_annotations if of_lesions else (*IMAGE_FIELDS, "group_id")
    if taken := set(columns) & set(reserved):
        reason = f"columns {', '.join(sorted(taken))} are COCO's: give them other names"
        raise BadInputError(csv_file, reason)
    values, notes = _values(table, columns)
    rows: dict[tuple[str, ...], tuple[int, dict]] = {}
    for row, row_values in zip(table.rows, values, strict=True):
        with rejects.catch():
            where, ids = row.where, [row.cells[column] for column in key]
            if not all(ids):
                raise BadInputError(where, f"has no {key[ids.index('')]}")
            if "file" in key:  # as COCO names it: with slashes, relative
                place = key.index("file")
                ids[place] = ids[place].replace("\\", "/").removeprefix("./")
            ids = tuple(ids)
            if ids in rows:
                raise BadInputError(where, f"{' '.join(ids)} is in line {rows[ids][0]} already")
            rows[ids] = row.line, row_values
    return MetadataTable(csv_file, key, rows, columns, notes)


def _values(table: Table, columns: Sequence[str]) -> tuple[list[dict], list[str]]:
    """{column: value} of each row, without empty cells; notes on columns with a few texts."""
    values: list[dict] = [{} for _ in table.rows]
    notes = []
    for column in columns:
        texts = [row.cells[column] for row in table.rows]
        typed_values = texts
        if column not in _IDS:
            typed_values = typed(texts, table.separator)
            given = [row for row in table.rows if row.cells[column]]
            others = [r for r in given if _number(r.cells[column], table.separator) is None]
            if 0 < len(others) < len(given) / 2:
                place = f"{others[0].cells[column]!r} in line {others[0].line}"
                notes.append(f"{table.path}: {column} is text, since {place} is no number")
        for row, value in zip(values, typed_values, strict=True):
            if value not in (None, ""):
                row[column] = value
    return values, notes


def read_facts(csv_file: Path, key: str, names: Mapping[str, str]) -> dict[str, dict]:
    """Read columns of a table, each `typed`: {cell of the column `key`: {its new name: value}},
    without empty cells.

    Raises:
        BadInputError: it cannot be read, lacks a column, or has a row without a key.
    """
    table = read_table(csv_file, (key, *names))
    facts: dict[str, dict] = {}
    for row, values in zip(table.rows, _values(table, [*names])[0], strict=True):
        if not row.cells[key]:
            raise BadInputError(row.where, f"has no {key}")
        facts[row.cells[key]] = {names[column]: value for column, value in values.items()}
    return facts


def with_metadata(
    source: Source, tables: Iterable[MetadataTable], rejects: Rejects, every_image: bool = False
) -> Source:
    """Join tables to images (their COCO fields) and lesions (those of their annotations).

    Tables of images are joined first, then those of patients, then those of lesions. What
    contradicts its row is bad input and, with `every_image`, an image without a row, else a note.
    A table that matches nothing is a BadInputError when the samples are read. Ids become text.
    """
    order = list(_KEYS)
    for table in sorted(tables, key=lambda table: order.index(table.key[0])):
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
            path, name = sample.image.path, sample.file_name
            for record in (sample.fields, *sample.annotations):
                for column in _IDS:
                    if record.get(column) is not None:
                        record[column] = str(record[column])
            of_lesions = "lesion_id" in table.key
            for record in sample.annotations if of_lesions else (sample.fields,):
                patient = sample.fields.get("patient_id")
                known = {**record, "patient_id": patient, "file": name}
                ids = tuple(known.get(column) for column in table.key)
                if table.join(record, ids, path):
                    continue
                if every_image:
                    raise BadInputError(path, f"{name} is not in {table.path}")
                without[f"{name} (no {table.key[0]})" if None in ids else " ".join(ids)] = None
            yield sample
    if read and table.rows and not table.used:
        reason = f"no {' and '.join(table.key)} in it is one of the data set's. It has "
        reason += f"{few(table.unused())}; the data set {few([*without]) or 'nothing'}"
        raise BadInputError(table.path, reason)
    for problem, names in (
        (f"{_KEYS[table.key[0]]} have no row in {table.path}", list(without)),
        (f"rows of {table.path} match nothing", table.unused()),
    ):
        if names:
            source.notes.append(f"{len(names)} {problem}: {', '.join(names)}")


def with_pattern(source: Source, pattern: str, rejects: Rejects) -> Source:
    """Give images the fields that a regular expression finds in their file names, folders included:
    the text of its named groups, but of ``frame`` a number.

    Where it does not match, or a group takes no part, the field is not known: a note counts these.
    What contradicts a field that the image has is bad input.

    Raises:
        ValueError: it is no regular expression, or names no group, or one as COCO's own fields.
    """
    compiled = _compiled(pattern, "--metadata-pattern")
    fields = list(compiled.groupindex)
    if not fields or {*fields} & {*IMAGE_FIELDS, "group_id"}:
        text = f"--metadata-pattern {pattern!r}: name its groups as fields, such as (?P<centre>C.)"
        raise ValueError(f"{text}; {', '.join(IMAGE_FIELDS)} and group_id are taken")

    def samples() -> Iterator[Sample]:
        values: dict[str, set[str]] = {field: set() for field in fields}
        unknown: dict[str, list[str]] = {field: [] for field in fields}
        for sample in source.samples:
            with rejects.catch():
                match = compiled.search(sample.file_name)
                for field in fields:
                    if not (text := match and match[field]):
                        unknown[field].append(sample.file_name)
                        continue
                    value = int(text) if field == "frame" and text.isdecimal() else text
                    if sample.fields.get(field) is None:
                        sample.fields[field] = value
                    present = sample.fields[field]
                    if str(present) != str(value) or (field == "frame" and value == text):
                        reason = f"{field} is {present!r}, {text!r} in the name {sample.file_name}"
                        raise BadInputError(sample.image.path, reason)
                    values[field].add(text)
                yield sample
        for field in fields:
            note = f"{field}: {len(values[field])} values by --metadata-pattern"
            if names := unknown[field]:
                note += f"; not known of {len(names)} images: {few(names)}"
            source.notes.append(note)

    return replace(source, samples=samples())


def with_defaults(source: Source) -> Source:
    """Give images the default of each field that they lack, or of which it is null."""

    def samples() -> Iterator[Sample]:
        for sample in source.samples:
            known = {k: v for k, v in sample.fields.items() if v is not None}
            sample.fields = {**sample.fields, **sample.defaults, **known}
            yield sample

    return replace(source, samples=samples())


def with_patients_from_csv(source: Source, csv_file: Path, rejects: Rejects) -> Source:
    """Take ``patient_id`` from a table with the columns file and patient_id, see `read_metadata`.

    An empty patient_id says that the patient is not known. Images that are not in the table, or
    have another patient_id already, are bad input.
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
    """Give images the ``patient_id`` of `patient_of`, and note the number of patients.

    Images for which it raises, and those that have another patient_id already, are bad input.
    """

    def samples() -> Iterator[Sample]:
        patients, unknown = set(), 0
        for sample in source.samples:
            with rejects.catch():
                present, patient = sample.fields.get("patient_id"), patient_of(sample)
                if patient is None:
                    patient = None if present is None else str(present)
                elif present is not None and str(present) != patient:
                    reason = f"patient_id is {present!r} in the data set, {patient!r} as requested"
                    raise BadInputError(sample.image.path, reason)
                if patient is None:
                    unknown += 1
                else:
                    sample.fields["patient_id"] = patient
                    patients.add(patient)
                yield sample
        source.notes.append(f"{len(patients)} patients")
        if unknown:
            text = f"{unknown} images of unknown patients: each, or its sequence where known"
            source.notes.append(f"{text}, is split and resampled on its own")

    return replace(source, samples=samples())


def patients_from_pattern(pattern: str) -> PatientOf:
    """Match the patient anywhere in the file name, folders included, by a regular expression.

    The id is the group named ``patient``, else the first group, else all that matches; a group that
    takes no part says that the patient is not known. A name that does not match is bad input.
    """
    compiled = _compiled(pattern, "--patient-pattern")
    group = "patient" if "patient" in compiled.groupindex else min(compiled.groups, 1)

    def patient_of(sample: Sample) -> str | None:
        match = compiled.search(sample.file_name)
        if match is None:
            reason = f"{sample.file_name} does not match the pattern {pattern!r}; where patients "
            reason += "are known in part, give it as --metadata-pattern '(?P<patient_id>...)'"
            raise BadInputError(sample.image.path, reason)
        return match[group] or None

    return patient_of


def _compiled(pattern: str, option: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option} {pattern!r} is no regular expression: {error}") from error


def patients_from_dicom(folder: Path | None = None, rejects: Rejects | None = None) -> PatientOf:
    """Read the patient out of DICOM files: tag (0010,0020), PatientID.

    The files in `folder` are named as the images but for the suffix, of which there may be none; an
    image without one is bad input. None where the images are DICOM files themselves.
    """
    files: dict[str, Path] = {}
    for path in [] if folder is None else list_files(folder, rejects):
        name = path.relative_to(folder).as_posix()
        files[re.sub(r"\.(dcm|dicom)$", "", name, flags=re.IGNORECASE)] = path

    def patient_of(sample: Sample) -> str | None:
        path = sample.image.path
        if folder is not None:
            if sample.stem not in files:
                raise BadInputError(path, f"there is no DICOM file {sample.stem}.dcm in {folder}")
            path = files[sample.stem]
        header = read_header(path, specific_tags=["PatientID"])
        with hide_details(path, "its PatientID cannot be read"):
            return str(header.get("PatientID") or "").strip() or None

    return patient_of
