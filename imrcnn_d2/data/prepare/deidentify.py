"""De-identification: data sets without what identifies a person.

Images are cropped to the endoscope's view, all around and over it is blanked, and they are written
anew, so that no metadata of the old files stay. Names of files and ids become keyed hashes: without
the key nobody can compute them from a list of patients, with it the next images of a patient get
the same id. Writing inside the view stays: a person has to look at the images.
"""

import contextlib
import csv
import hashlib
import hmac
import io
import itertools
import os
import re
import secrets
import shlex
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pycocotools.mask as mask_util
from PIL import Image

from imrcnn_d2.data.endoscope_view import View, find_view
from imrcnn_d2.data.formats.base import Sample, Source, is_repeated_frame
from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.data.images import check_utf8, inspect_image, read_image, without_suffix
from imrcnn_d2.data.masks import (
    ANNOTATION_FIELDS,
    IDS,
    IMAGE_FIELDS,
    annotation_from_box,
    annotation_from_mask,
)
from imrcnn_d2.utils.files import BadInputError, Rejects, csv_lines, read_rows, regular_file

# Which values of a field pass: those listed, numbers from the first to the second, or all.
Rule = frozenset[str] | tuple[float, float] | None

_HEX_DIGITS = 16  # of a new name: 64 bits, so that two of a million images hardly share one
_KEY_BYTES = 32
_CUT = 0.01  # share of a lesion's area that may lie beyond the view without a note
# A range in `--keep FIELD=LOW:HIGH`.
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})", re.ASCII)
_SHOWN_VALUES, _EXAMINED_IMAGES = 12, 1000  # of a field whose rule is missing
_CATEGORY_FIELDS = ("id", "name", "supercategory")
_IDS = {key: key.removesuffix("_id") for key in IDS}
_NEVER_KEPT = {*_IDS, *IMAGE_FIELDS, *ANNOTATION_FIELDS, "group_id"}
_INFO = {
    "description": "De-identified: cropped to the endoscope's view, all else blanked, names and "
    "ids replaced by keyed hashes. Writing inside the view is not removed."
}


class Pseudonyms:
    """New names for images, patients, sequences and lesions, by HMAC-SHA256 (RFC 2104) with a key.

    The same name gets the same new one with the same key. Which became which is written to
    a table next to the key: either one identifies the patients. The key has 64 hexadecimal digits;
    it is made, readable by its owner only, if it does not exist.

    Raises:
        BadInputError: the file holds no key, others can read it, or it lies in the data set `out`.
    """

    def __init__(self, key_file: Path, out: Path):
        location = key_file.parent.resolve() / key_file.name  # where the tables go, if it is a link
        if out.resolve() in (*key_file.resolve().parents, *location.parents):
            raise BadInputError(key_file, f"the key must not lie in the data set's folder {out}")
        self._key = _read_or_make_key(key_file)
        self.table = key_file.with_name(f"{key_file.name}.names.csv")  # grown by write_table
        self.rejected = key_file.with_name(f"{key_file.name}.{out.resolve().name}.rejected.csv")
        self._new: dict[tuple[str, str], str] = {}

    def __call__(self, kind: str, name: str) -> str:
        """Sixteen hexadecimal digits for a name; kinds are "image" and those of ids."""
        digest = hmac.new(self._key, f"{kind}:{name}".encode(), hashlib.sha256).hexdigest()
        new = self._new[kind, name] = digest[:_HEX_DIGITS]
        return new

    def of_file(self, name: str) -> str:
        """A new file name, ".png", for one as a data set has it."""
        return f"{self('image', name)}.png"

    def of_splits(self, splits: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Splits of old names as splits of new ones, once all images have theirs; names that are
        new already stay, and of an image that was converted the old name is as it was before."""
        new = re.compile(rf"[0-9a-f]{{{_HEX_DIGITS}}}\.png")

        def renamed(name):
            if new.fullmatch(name):
                return name
            converted = f"{without_suffix(PurePosixPath(name))}.png"
            was_converted = ("image", name) not in self._new and ("image", converted) in self._new
            return self.of_file(converted if was_converted else name)

        new_splits = {split: [*map(renamed, names)] for split, names in splits.items()}
        self.write_table()  # with the names of files that are gone
        return new_splits

    def write_table(self) -> None:
        """Add the names given so far to the table: kind, old, new."""
        rows = dict(self._new)
        if self.table.exists():
            known = read_rows(self.table, ("kind", "old", "new"))
            rows |= {(row["kind"], row["old"]): row["new"] for row in known}
        lines = [("kind", "old", "new"), *((*key, new) for key, new in sorted(rows.items()))]
        _write_private(self.table, lines)


class PrivateRejects(Rejects):
    """Rejects that name no file in the data set: the list with names lies next to the key."""

    def __init__(self, on_error: str, names: Pseudonyms, follow_links: bool = False):
        super().__init__(on_error, follow_links)
        self._private = names.rejected

    def write_csv(self, path: Path) -> None:
        """Write their numbers to `path`, and the list itself next to the key."""
        rows = [(error.file, error.reason) for error in self.errors]
        _write_private(self._private, [("file", "reason"), *rows])
        numbered = [(n, "listed next to the key") for n in range(1, len(rows) + 1)]
        path.write_text(csv_lines([("number", "reason"), *numbered]), encoding="utf-8")


def _read_or_make_key(path: Path) -> bytes:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        key = secrets.token_bytes(_KEY_BYTES)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(key.hex() + "\n")
        return key
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise BadInputError(path, "the key can be read by others: chmod 600 it")
    try:
        key = bytes.fromhex(regular_file(path).read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise BadInputError(path, f"is no key file ({error})") from error
    if len(key) != _KEY_BYTES:
        raise BadInputError(path, f"is no key file: it has {len(key)} bytes, not {_KEY_BYTES}")
    if len(set(key)) < _KEY_BYTES // 4:  # of random bytes, more differ: all zero, or one repeated
        raise BadInputError(path, "is no random key, which can be guessed; let a new one be made")
    return key


def _write_private(path: Path, rows: Sequence[Sequence]) -> None:
    """Write a table that only its owner can read, replaced at once or not at all."""
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(csv_lines(rows))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def deidentified(
    source: Source,
    folder: Path,
    pseudonyms: Pseudonyms,
    rejects: Rejects,
    keep: Mapping[str, Rule] | None = None,
) -> Source:
    """Crop and blank images into `folder`, move their annotations, and rename all.

    Of further fields only those in `keep` pass, and of these only the values that the rule of
    `parse_keep` admits: whether another is a date cannot be known. A lesion that reaches beyond the
    view is cut; one outside it is bad input, as is an image in which nothing is lit.

    Raises:
        ValueError: `keep` names an id or another field that is made anew.
    """
    keep = dict(keep or {})
    if forbidden := sorted(keep.keys() & _NEVER_KEPT):
        text = "ids are replaced, and what follows from the new images is made anew"
        raise ValueError(f"{', '.join(forbidden)} cannot be kept: {text}")
    categories = [{k: c[k] for k in _CATEGORY_FIELDS if k in c} for c in source.categories]
    samples = _samples(source, folder, pseudonyms, rejects, keep)
    return Source(samples, categories, _INFO, source.notes)


def parse_keep(texts: Sequence[str], as_is: Sequence[str], source: Source) -> dict[str, Rule]:
    """Read which fields may pass, as rules by field: FIELD=VALUE,VALUE or FIELD=LOW:HIGH.

    A value with a comma is in double quotes. All values of the fields `as_is` pass. The samples of
    `source` are used up to show some values of a field without a rule.

    Raises:
        ValueError: a text names no values, or a field is named twice.
    """
    rules: dict[str, Rule] = {}
    parted = [text.partition("=") for text in texts]
    counts = Counter([field for field, *_ in parted] + list(as_is))
    if twice := [field for field, times in counts.items() if times > 1]:
        raise ValueError(f"--keep, --keep-as-is: {twice[0]} is named twice; name it once")
    for field, _, values in parted:
        if not values:
            raise ValueError(_without_rule(field, source))
        if between := _RANGE.fullmatch(values):
            rules[field] = float(between[1]), float(between[2])
        else:
            rules[field] = frozenset(next(csv.reader([values], skipinitialspace=True)))
    return rules | dict.fromkeys(as_is)


def _without_rule(field: str, source: Source) -> str:
    """The error of ``--keep FIELD`` alone: the possible rules, with values of the field."""
    samples = list(itertools.islice(source.samples, _EXAMINED_IMAGES))
    records = [record for s in samples for record in (s.fields, *s.annotations)]
    values = [record[field] for record in records if record.get(field) is not None]
    numbers = [value for value in values if _is_number(value)]
    texts = sorted({_text(value) for value in values})
    listed = io.StringIO()
    csv.writer(listed, lineterminator="").writerow(texts[:_SHOWN_VALUES])
    more = f" and {len(texts) - _SHOWN_VALUES} more" if len(texts) > _SHOWN_VALUES else ""
    low, high = (min(numbers), max(numbers)) if numbers else (0, 100)
    listing, span = (shlex.quote(f"{field}={v}") for v in (listed.getvalue(), f"{low}:{high}"))
    return (
        f"--keep {field} does not say which values may pass: list them, --keep {listing}{more}; or "
        f"give the range of the numbers, --keep {span}; or pass all, unexamined, --keep-as-is "
        f"{shlex.quote(field)}"
    )


def _samples(
    source: Source, folder: Path, pseudonyms: Pseudonyms, rejects: Rejects, keep: Mapping
) -> Iterator[Sample]:
    folder.mkdir(parents=True, exist_ok=True)
    origins: dict[str, Sample] = {}  # by new name, and by hash of the cropped image
    cut = whole = num_insets = 0
    left_out = set(source.extra) | set(source.info) - {"description"}
    for sample in source.samples:
        with rejects.catch():
            path = sample.image.path
            check_utf8(sample.file_name, path)
            pixels = read_image(path)
            view = find_view(pixels)
            if view.is_empty:
                raise BadInputError(path, "nothing in it is lit, so there is no view to crop to")
            moved, num_cut = _moved(sample, view)
            names = {*sample.fields, *(key for record in sample.annotations for key in record)}
            left_out |= names - keep.keys() - {*_IDS, *ANNOTATION_FIELDS}
            image_ids = _ids(sample.fields)
            annotations = [
                {**new, **_passed(old, pseudonyms, keep, path, image_ids)} for old, new in moved
            ]
            fields = _passed(sample.fields, pseudonyms, keep, path)
            name = sample.installed_name  # as in the other data set, whose splits can be kept
            new_name = pseudonyms.of_file(name)
            if new_name in origins:  # whose file may be linked already
                first = origins[new_name].image.path
                raise BadInputError(path, f"duplicate: {name} was already made from {first}")
            Image.fromarray(view.crop(pixels)).save(folder / new_name)
            image = inspect_image(folder / new_name)
            other = origins.setdefault(image.sha256, sample)
            if other is not sample and not is_repeated_frame(sample, other):
                image.path.unlink()
                reason = f"duplicate: cropped, it is the same image as {other.image.path}"
                raise BadInputError(path, reason)
            origins[new_name] = sample
            cut, whole = cut + num_cut, whole + view.is_whole
            num_insets += bool(view.insets)
            yield replace(
                sample, file_name=new_name, image=image, annotations=annotations, fields=fields
            )
    pseudonyms.write_table()
    source.notes += [
        f"old and new names: {pseudonyms.table}; keep it and the key apart",
        f"{num_insets} images with something laid over the view, blanked",
    ]
    for number, text in (
        (cut, "lesions reached beyond the view and were cut"),
        (whole, "images show nothing but the view, as far as can be seen: nothing was cut off"),
    ):
        if number:
            source.notes.append(f"{number} {text}")
    if left_out:
        source.notes.append(f"fields left out: {', '.join(sorted(left_out))}")
    if unexamined := sorted(field for field, rule in keep.items() if rule is None):
        source.notes.append(f"passed as they are, NOT examined: {', '.join(unexamined)}")
    fields = itertools.product(source.categories, ("name", "supercategory"))
    names = dict.fromkeys(str(category[field]) for category, field in fields if category.get(field))
    source.notes += [
        f"names of classes pass as they are: {', '.join(names)}",
        "writing inside the view is still there: look at the images",
    ]


def _moved(sample: Sample, view: View) -> tuple[list[tuple[dict, dict]], int]:
    """(Annotation, its mask or class in the view) and the number of lesions that were cut."""
    pairs, cut = [], 0
    for old in sample.annotations:
        if "bbox" not in old:  # a class of the whole image
            pairs.append((old, {"category_id": old["category_id"]}))
            continue
        fields = {"category_id": old["category_id"], "iscrowd": old["iscrowd"]}
        new, before = None, old["area"]
        if "segmentation" in old:
            mask = mask_util.decode(to_rle(old["segmentation"], *view.size))
            inside, before = view.crop(mask), mask.sum()
            if inside.any():
                new = annotation_from_mask(inside, **fields)
        else:
            left, top, right, bottom = view.box
            x, y, w, h = old["bbox"]
            with contextlib.suppress(ValueError):  # outside
                box = (x - left, y - top, w, h)
                new = annotation_from_box(box, bottom - top, right - left, **fields)
        if new is not None:
            cut += bool(before - new["area"] > _CUT * before)
            pairs.append((old, new))
        elif not old["iscrowd"]:
            box, view_box = old["bbox"], tuple(view.box)
            reason = f"a lesion at [x, y, w, h] {box} lies outside the endoscope's view {view_box}"
            raise BadInputError(sample.image.path, reason)
    return pairs, cut


def _ids(record: Mapping) -> dict[str, str]:
    return {field: str(record[field]) for field in _IDS if record.get(field) is not None}


def _passed(
    record: Mapping,
    pseudonyms: Pseudonyms,
    keep: Mapping[str, Rule],
    path: Path,
    other_ids: Mapping[str, str] | None = None,
) -> dict:
    """Of a record, the fields that may pass, ids replaced; none may hold `other_ids` either."""
    ids = _ids(record)
    passed = {field: pseudonyms(_IDS[field], name) for field, name in ids.items()}
    for field in keep.keys() & record.keys():
        value = record[field]
        if value is not None and not isinstance(value, int | float | str):
            raise BadInputError(path, f"{field} is a {type(value).__name__}, which cannot pass")
        if not _admits(keep[field], value):
            reason = f"{field} is {value!r}, which --keep {field} does not admit; list it, or leave"
            raise BadInputError(path, f"{reason} the field out")
        names = [
            name
            for key, name in (*ids.items(), *(other_ids or {}).items())
            # a number that is a sequence's as well, such as that of a frame, tells nothing
            if key != "sequence_id" or isinstance(value, str)
        ]
        if any(_reveals(value, name) for name in names):
            raise BadInputError(path, f"{field} is {value!r}, an id, which cannot pass")
        passed[field] = value
    return passed


def _admits(rule: Rule, value: float | str | None) -> bool:
    if rule is None or value is None:
        return True
    if isinstance(rule, frozenset):
        return _text(value) in rule
    return _is_number(value) and rule[0] <= value <= rule[1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: object) -> str:
    """As it is listed: true and false, 2 of 2.0 too."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _reveals(value: float | str | None, name: str) -> bool:
    """Whether a value is an id or holds it; one of a single character is in too many texts."""
    if isinstance(value, str):
        text, name = (unicodedata.normalize("NFKC", t).casefold() for t in (value, name))
        return text == name or (len(name) > 1 and name in text)
    return _text(value) == (name.removesuffix(".0").lstrip("0") or "0")  # 12 is the id 0012 too
