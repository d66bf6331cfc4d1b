"""What is known of images, patients and lesions besides the pixels, joined from tables.

A row belongs to what its key column names: ``file`` (an image), ``patient_id`` (all images of a
patient) or ``lesion_id`` (all annotations of a lesion). What does not match is told, on both sides.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from imrcnn_d2.data.instances import ANNOTATION_FIELDS, IMAGE_FIELDS
from imrcnn_d2.data.prepare import Sample, Source
from imrcnn_d2.data.rejects import BadInputError, Rejects
from imrcnn_d2.data.tables import Table, not_numbers, read_table, typed

__all__ = ["KEYS", "MetadataTable", "read_metadata", "with_metadata"]

# Columns that say whose row it is; the order in which tables are joined.
KEYS = ("file", "patient_id", "lesion_id")
_IDS = ("patient_id", "lesion_id")
# Fields of COCO that a prepared data set gives itself.
_OWN_FIELDS = {
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
        used: keys of the rows that were asked for and found.
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
            BadInputError: `record` says something else already; `path`, its image, is blamed.
        """
        if key not in self.rows:
            return False
        self.used.add(key)
        line, values = self.rows[key]
        for column, value in values.items():
            there = record.get(column)
            if there is not None and there != value and str(there) != str(value):
                raise BadInputError(
                    path, f"{column} is {there!r}, but {value!r} in {self.path}, line {line}"
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
        BadInputError: it cannot be read, has no key column, or a column that is one of COCO's own.
    """
    table = read_table(csv_file)
    key = _key(table)
    columns = [column for column in table.columns if column not in key]
    if taken := set(columns) & set(_OWN_FIELDS["lesion_id" in key]):
        raise BadInputError(
            csv_file, f"columns {', '.join(sorted(taken))} are COCO's own: give them other names"
        )
    values, notes = _values(table, columns)
    rows: dict[tuple[str, ...], tuple[int, dict]] = {}
    for row, of_row in zip(table.rows, values, strict=True):
        with rejects.catch():
            own = tuple(row.cells[column] for column in key)
            if not all(own):
                raise BadInputError(table.where(row), f"has no {key[own.index('')]}")
            own = tuple(_cleaned(c, text) for c, text in zip(key, own, strict=True))
            if own in rows:
                raise BadInputError(
                    table.where(row), f"{' '.join(own)} is in line {rows[own][0]} already"
                )
            rows[own] = row.line, of_row
    return MetadataTable(csv_file, key, rows, columns, notes)


def with_metadata(
    source: Source, tables: Iterable[MetadataTable], rejects: Rejects, every_image: bool = False
) -> Source:
    """Joins tables to images (their COCO fields) and lesions (those of their annotations).

    Args:
        source: where the images come from.
        tables: those of images are joined first, then those of patients, then those of lesions.
        rejects: takes images and lesions that say something else than their row.
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
                own = tuple(named.get(column) for column in table.key)
                if table.join(record, own, path):
                    continue
                if every_image:
                    raise BadInputError(path, f"{sample.file_name} is not in {table.path}")
                known = own if None not in own else (f"{sample.file_name} (no {table.key[0]})",)
                without[" ".join(known)] = None
            yield sample
    if read and table.rows and not table.used:
        raise BadInputError(
            table.path,
            f"no {' and '.join(table.key)} in it is one of the data set's. It has "
            f"{_few(table.unused())}; the data set {_few(list(without))}",
        )
    of = {"file": "images", "patient_id": "patients", "lesion_id": "lesions"}[table.key[0]]
    for number, what, which in (
        (len(without), f"{of} have no row in {table.path}", list(without)),
        (len(table.rows) - len(table.used), f"rows of {table.path} match nothing", table.unused()),
    ):
        if number:
            source.notes.append(f"{number} {what}: {', '.join(which)}")


def _key(table: Table) -> tuple[str, ...]:
    there = [column for column in KEYS if column in table.columns]
    if not there:
        raise BadInputError(
            table.path,
            f"has none of the columns {', '.join(KEYS)}, one of which must say whose row it is; it "
            f"has {', '.join(table.columns) or 'none'}",
        )
    if "lesion_id" in there:
        return "lesion_id", *there[:-1]
    return (there[0],)


def _cleaned(column: str, text: str) -> str:
    """A file as COCO names it: with slashes, relative."""
    return text.replace("\\", "/").removeprefix("./") if column == "file" else text


def _values(table: Table, columns: Sequence[str]) -> tuple[list[dict], list[str]]:
    """{column: value} of each row, without empty cells, and what to tell of the types."""
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
        of_column = texts if column in _IDS else typed(texts, table.separator)
        for row, value in zip(values, of_column, strict=True):
            if value not in (None, ""):
                row[column] = value
    return values, notes


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown}, …" if len(names) > 3 else shown
