"""De-identification: data sets without what identifies a person.

Images are cropped to the endoscope's view, all around and over it is blanked, and they are written
anew, so that no metadata of the old files stay. Names of files and ids become keyed hashes: without
the key nobody can compute them from a list of patients, with it the next images of a patient get
the same id. Writing inside the view stays: a person has to look at the images.
"""

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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from imrcnn_d2.data.endoscope_view import View, find_view
from imrcnn_d2.data.formats.base import Sample, Source
from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.data.images import SourceImage, inspect_image, read_image
from imrcnn_d2.data.masks import ANNOTATION_FIELDS, IMAGE_FIELDS, annotation_from_mask
from imrcnn_d2.utils.files import BadInputError, Rejects, csv_lines, read_rows, regular_file

__all__ = ["PrivateRejects", "Pseudonyms", "deidentified", "parse_keep"]


_HEX_DIGITS = 16  # of a new name: 64 bits, so that two of a million images hardly share one
_KEY_BYTES = 32


class Pseudonyms:
    """New names for images, patients and lesions, by HMAC-SHA256 (RFC 2104) with a key.

    The same name gets the same new one with the same key. Which became which is written to
    a table next to the key: either one identifies the patients.

    Args:
        key_file: 64 hexadecimal digits; made, readable by its owner only, if it does not exist.
        out: the data set's folder, in which neither file may lie.

    Attributes:
        table: the file with which became which, grown by `write_table`.
        rejected: next to it, named after `out` too, for the list of what was left out.

    Raises:
        BadInputError: the file holds no key, others can read it, or it lies in `out`.
    """

    def __init__(self, key_file: Path, out: Path):
        location = key_file.parent.resolve() / key_file.name  # where the tables go, if it is a link
        if out.resolve() in (*key_file.resolve().parents, *location.parents):
            raise BadInputError(key_file, f"the key must not lie in the data set's folder {out}")
        self._key = _read_or_make_key(key_file)
        self.table = key_file.with_name(f"{key_file.name}.names.csv")
        self.rejected = key_file.with_name(f"{key_file.name}.{out.resolve().name}.rejected.csv")
        self._new: dict[tuple[str, str], str] = {}

    def __call__(self, kind: str, name: str) -> str:
        """Sixteen hexadecimal digits.

        Args:
            kind: "image", "patient" or "lesion", each with separate names.
            name: the one to replace.
        """
        digest = hmac.new(self._key, f"{kind}:{name}".encode(), hashlib.sha256).hexdigest()
        new = self._new[kind, name] = digest[:_HEX_DIGITS]
        return new

    def of_file(self, name: str) -> str:
        """A new file name, ".png", for one as a data set has it."""
        return f"{self('image', name)}.png"

    def of_splits(self, splits: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Splits of old names as splits of new ones; names that are new already stay."""
        new = re.compile(rf"[0-9a-f]{{{_HEX_DIGITS}}}\.png")
        return {
            split: [name if new.fullmatch(name) else self.of_file(name) for name in names]
            for split, names in splits.items()
        }

    def write_table(self) -> None:
        """Adds the names given so far to the table: kind, old, new."""
        rows = dict(self._new)
        if self.table.exists():
            known = read_rows(self.table, ("kind", "old", "new"))
            rows |= {(row["kind"], row["old"]): row["new"] for row in known}
        lines = [("kind", "old", "new"), *((*key, new) for key, new in sorted(rows.items()))]
        _write_private(self.table, lines)


class PrivateRejects(Rejects):
    """Rejects that name no file in the data set: the list with names lies next to the key.

    Args:
        on_error: "raise" or "reject".
        names: whose key it is.
        follow_links: see `Rejects`.
    """

    def __init__(self, on_error: str, names: Pseudonyms, follow_links: bool = False):
        super().__init__(on_error, follow_links)
        self._private = names.rejected

    def write_csv(self, path: Path) -> None:
        """Writes their number to `path`, and the list itself next to the key."""
        rows = [(error.file, error.reason) for error in self.errors]
        _write_private(self._private, [("file", "reason"), *rows])
        numbered = [(n, "listed beside the key") for n in range(1, len(rows) + 1)]
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
    """A table that its owner only can read, replaced at once or not at all."""
    descriptor, temporary = tempfile.mkstemp(
        prefix=".", dir=path.parent
    )  # readable by its owner only
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(csv_lines(rows))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# Which values of a field pass: those listed, numbers from the first to the second, or all.
Rule = frozenset[str] | tuple[float, float] | None

_CUT = 0.01  # share of a lesion's area that may lie beyond the view without a note
# A range in `--keep FIELD=LOW:HIGH`.
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})", re.ASCII)
_SHOWN_VALUES, _EXAMINED_IMAGES = 12, 1000  # of a field whose rule is missing
_CATEGORY_FIELDS = ("id", "name", "supercategory")
_IDS = {"patient_id": "patient", "lesion_id": "lesion"}
_NEVER_KEPT = {*_IDS, *IMAGE_FIELDS, *ANNOTATION_FIELDS, "group_id"}
_INFO = {
    "description": "De-identified: cropped to the endoscope's view, all else blanked, names and "
    "ids replaced by keyed hashes. Writing inside the view is not removed."
}


def deidentified(
    source: Source,
    folder: Path,
    pseudonyms: Pseudonyms,
    rejects: Rejects,
    keep: Mapping[str, Rule] | None = None,
) -> Source:
    """Crops and blanks images, moves their annotations, and renames all.

    Of what else is known only the fields in `keep` pass, and of these only the values that its rule
    admits: whether another is a date cannot be known. A lesion that reaches beyond the view is cut;
    one outside it is bad input, as is an image in which nothing is lit.

    Args:
        source: where the images come from.
        folder: for the new images, which the samples then refer to.
        pseudonyms: gives the new names.
        rejects: takes bad input.
        keep: rules by the names of fields of images and annotations, see `parse_keep`.

    Raises:
        ValueError: `keep` names an id or another field that is made anew.
    """
    keep = dict(keep or {})
    if forbidden := sorted(keep.keys() & _NEVER_KEPT):
        raise ValueError(
            f"{', '.join(forbidden)} cannot be kept: ids are always replaced, and what follows "
            "from the new images is made anew"
        )
    return Source(
        samples=_samples(source, folder, pseudonyms, rejects, keep),
        categories=[
            {key: category[key] for key in _CATEGORY_FIELDS if key in category}
            for category in source.categories
        ],
        info=_INFO,
        notes=source.notes,
    )


def parse_keep(texts: Sequence[str], as_is: Sequence[str], source: Source) -> dict[str, Rule]:
    """Reads which fields may pass.

    Args:
        texts: FIELD=VALUE,VALUE or FIELD=LOW:HIGH, numbers; a value with a comma in double quotes.
        as_is: fields whose values pass whatever they are.
        source: has the fields; its samples are used up to show some of a field without a rule.

    Returns:
        rules by field, for `deidentified`.

    Raises:
        ValueError: a text names no values, or a field is there twice.
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
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    listed = io.StringIO()
    texts = sorted({_text(value) for value in values})
    csv.writer(listed, lineterminator="").writerow(texts[:_SHOWN_VALUES])
    more = f" and {len(texts) - _SHOWN_VALUES} more" if len(texts) > _SHOWN_VALUES else ""
    low, high = (min(numbers), max(numbers)) if numbers else (0, 100)
    return (
        f"--keep {field} does not say which values may pass. List them, --keep "
        f"{shlex.quote(f'{field}={listed.getvalue()}')}{more}; or give the range of the numbers, "
        f"--keep {shlex.quote(f'{field}={low}:{high}')}; or let all pass, unexamined, "
        f"--keep-as-is {shlex.quote(field)}"
    )


def _samples(
    source: Source,
    folder: Path,
    pseudonyms: Pseudonyms,
    rejects: Rejects,
    keep: Mapping[str, Rule],
) -> Iterator[Sample]:
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[str, Path] = {}
    made: dict[str, Path] = {}
    cut = whole = num_insets = 0
    left_out = set(source.extra) | set(source.info) - {"description"}
    for sample in source.samples:
        with rejects.catch():
            path = sample.image.path
            pixels = read_image(path)
            view = find_view(pixels)
            if view.is_empty:
                raise BadInputError(path, "nothing in it is lit, so there is no view to crop to")
            annotations, num_cut = _moved(sample, view)
            names = {*sample.fields, *(key for one in sample.annotations for key in one)}
            left_out |= names - keep.keys() - {*_IDS, *ANNOTATION_FIELDS}
            of_image = _ids(sample.fields).values()
            annotations = [
                {**new, **_passed(old, pseudonyms, keep, path, of_image)}
                for old, new in annotations
            ]
            fields = _passed(sample.fields, pseudonyms, keep, path)
            name = _name_of(sample.file_name, sample.image)
            new_name = pseudonyms.of_file(name)
            if new_name in made:  # whose file may be linked already
                raise BadInputError(
                    path, f"duplicate: {name} was already made from {made[new_name]}"
                )
            image = _written(view.crop(pixels), folder / new_name)
            if image.sha256 in seen:
                image.path.unlink()
                raise BadInputError(
                    path, f"duplicate: cropped, it is the same image as {seen[image.sha256]}"
                )
            seen[image.sha256] = made[new_name] = path
            cut, whole = cut + num_cut, whole + view.is_whole
            num_insets += bool(view.insets)
            yield replace(
                sample,
                file_name=image.path.name,
                image=image,
                annotations=annotations,
                fields=fields,
            )
    pseudonyms.write_table()
    source.notes.append(f"old and new names: {pseudonyms.table}; keep it and the key apart")
    source.notes.append(f"{num_insets} images with something laid over the view, blanked")
    if cut:
        source.notes.append(f"{cut} lesions reached beyond the view and were cut")
    if whole:
        source.notes.append(
            f"{whole} images show nothing but the view, as far as can be seen: nothing was cut off"
        )
    if left_out:
        source.notes.append(f"fields left out: {', '.join(sorted(left_out))}")
    if unexamined := sorted(field for field, rule in keep.items() if rule is None):
        source.notes.append(f"passed as they are, NOT examined: {', '.join(unexamined)}")
    fields = itertools.product(source.categories, ("name", "supercategory"))
    names = dict.fromkeys(str(category[field]) for category, field in fields if category.get(field))
    source.notes.append(f"names of classes pass as they are: {', '.join(names)}")
    source.notes.append("writing inside the view is still there: look at the images")


def _name_of(file_name: str, image: SourceImage) -> str:
    """As a data set that is not de-identified calls it, so that its splits can be kept."""
    if image.needs_conversion:
        return str(PurePosixPath(file_name).with_suffix(".png"))
    return file_name


def _moved(sample: Sample, view: View) -> tuple[list[tuple[dict, dict]], int]:
    """(Annotation, its mask or class in the view) and the number of lesions that were cut."""
    pairs, cut = [], 0
    for old in sample.annotations:
        if "segmentation" not in old:  # a class of the whole image
            pairs.append((old, {"category_id": old["category_id"]}))
            continue
        mask = mask_util.decode(to_rle(old["segmentation"], *view.mask.shape))
        inside = view.crop(mask)
        if not inside.any():
            if old["iscrowd"]:
                continue
            raise BadInputError(
                sample.image.path,
                f"a lesion at [x, y, w, h] {old['bbox']} lies outside the endoscope's view "
                f"{tuple(view.box)}",
            )
        cut += bool(mask.sum() - inside.sum() > _CUT * mask.sum())
        pairs.append(
            (old, annotation_from_mask(inside, old["category_id"], iscrowd=old["iscrowd"]))
        )
    return pairs, cut


def _ids(record: Mapping) -> dict[str, str]:
    return {field: str(record[field]) for field in _IDS if record.get(field) is not None}


def _passed(
    record: Mapping,
    pseudonyms: Pseudonyms,
    keep: Mapping[str, Rule],
    path: Path,
    other_ids: Collection[str] = (),
) -> dict:
    """Of a record, the fields that may pass, ids replaced; none may hold `other_ids` either."""
    ids = _ids(record)
    passed = {field: pseudonyms(_IDS[field], name) for field, name in ids.items()}
    for field in keep.keys() & record.keys():
        value = record[field]
        if value is not None and not isinstance(value, int | float | str):
            raise BadInputError(path, f"{field} is a {type(value).__name__}, which cannot pass")
        if not _admits(keep[field], value):
            raise BadInputError(
                path,
                f"{field} is {value!r}, which --keep {field} does not admit; list it, or leave the "
                "field out",
            )
        if any(_tells(value, name) for name in (*ids.values(), *other_ids)):
            raise BadInputError(path, f"{field} is {value!r}, an id, which cannot pass")
        passed[field] = value
    return passed


def _admits(rule: Rule, value: float | str | None) -> bool:
    if rule is None or value is None:
        return True
    if isinstance(rule, frozenset):
        return _text(value) in rule
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and rule[0] <= value <= rule[1]


def _text(value: object) -> str:
    """As it is listed: true and false, 2 of 2.0 too."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _tells(value: float | str | None, name: str) -> bool:
    """Whether a value is an id or holds it; one of a single character is in too many texts."""
    if isinstance(value, str):
        text, name = (unicodedata.normalize("NFKC", t).casefold() for t in (value, name))
        return text == name or (len(name) > 1 and name in text)
    return _text(value) == (name.removesuffix(".0").lstrip("0") or "0")  # 12 is the id 0012 too


def _written(pixels: np.ndarray, path: Path) -> SourceImage:
    """A PNG of nothing but the pixels."""
    Image.fromarray(pixels).save(path)
    return inspect_image(path)
