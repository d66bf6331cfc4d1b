"""Data sets without what leads back to a person.

Images are cropped to the endoscope's view, all around and over it is blanked, and they are written
anew, so that no metadata of the old files stay. Names of files and ids become keyed hashes: without
the key nobody can compute them from a list of patients, with it the next images of a patient get
the same id. Writing inside the view stays: a person has to look at the images.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from imrcnn_d2.data.coco import to_rle
from imrcnn_d2.data.endoscope_view import View, find_view
from imrcnn_d2.data.images import SourceImage, inspect_image, read_image
from imrcnn_d2.data.instances import ANNOTATION_FIELDS, IMAGE_FIELDS
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare import Sample, Source
from imrcnn_d2.data.pseudonyms import Pseudonyms
from imrcnn_d2.data.rejects import BadInputError, Rejects

__all__ = ["deidentified"]

_CUT = 0.01  # share of a lesion's area that may lie beyond the view without being told
_LONGEST_TEXT = 32  # characters of a value that passes; what is longer is free text
_MONTH = (
    r"(jan(uary?)?|feb(ruary?)?|mar(ch)?|märz?|apr(il)?|may|mai|jun[ei]?|jul[iy]?|aug(ust)?"
    r"|sept?(ember)?|o[ck]t(ober)?|nov(ember)?|de[cz](ember)?)"
)
_YEAR, _BETWEEN = r"(19|20)\d\d", r"[-./_: ]"
_SEPARATOR = _BETWEEN + "{1,2}"
_DATE = re.compile(
    # digits alone, perhaps with a time; behind a decimal point they are a fraction
    r"(?<!\d)(?<!\d\.)\d{8}(\d{4}|\d{6})?(?!\d)"
    rf"|(?<!\d)(\d{{4}}{_SEPARATOR}\d{{1,2}}{_SEPARATOR}\d{{1,2}}"
    rf"|\d{{1,2}}{_SEPARATOR}\d{{1,2}}{_SEPARATOR}\d{{2,4}}"
    rf"|{_YEAR}{_SEPARATOR}(0[1-9]|1[012])|(0?[1-9]|1[012]){_SEPARATOR}{_YEAR})(?!\d)"
    rf"|\d{_BETWEEN}{{0,2}}{_MONTH}(?![a-z])|(?<![a-z]){_MONTH}{_BETWEEN}{{0,2}}\d",
    re.IGNORECASE,
)
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
    keep: Collection[str] = (),
) -> Source:
    """Crops and blanks images, moves their annotations, and renames all.

    Of what else is known only the fields named in `keep` pass, numbers and short texts that are no
    dates. A lesion that reaches beyond the view is cut; one outside it is bad input, as is an
    image in which nothing is lit.

    Args:
        source: where the images come from.
        folder: for the new images, which the samples then refer to.
        pseudonyms: gives the new names.
        rejects: takes bad input.
        keep: names of fields of images and annotations that pass as they are.

    Raises:
        ValueError: `keep` names an id or another field that is made anew.
    """
    if forbidden := sorted({*keep} & _NEVER_KEPT):
        raise ValueError(
            f"{', '.join(forbidden)} cannot be kept: ids are always replaced, and what follows "
            "from the new images is made anew"
        )
    return Source(
        samples=_samples(source, folder, pseudonyms, rejects, frozenset(keep)),
        categories=[
            {key: category[key] for key in _CATEGORY_FIELDS if key in category}
            for category in source.categories
        ],
        info=_INFO,
        notes=source.notes,
    )


def _samples(
    source: Source, folder: Path, pseudonyms: Pseudonyms, rejects: Rejects, keep: frozenset
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
            left_out |= names - keep - {*_IDS, *ANNOTATION_FIELDS}
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
                    path, f"duplicate: cropped, it is the same picture as {seen[image.sha256]}"
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
            f"{whole} images show nothing but the view, as far as can be told: nothing was cut off"
        )
    if left_out:
        source.notes.append(f"fields left out: {', '.join(sorted(left_out))}")
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
    keep: frozenset,
    path: Path,
    other_ids: Collection[str] = (),
) -> dict:
    """Of a record, the fields that may pass, ids replaced; none may hold `other_ids` either."""
    ids = _ids(record)
    passed = {field: pseudonyms(_IDS[field], name) for field, name in ids.items()}
    for field in keep & record.keys():
        value = record[field]
        if value is not None and not isinstance(value, int | float | str):
            raise BadInputError(path, f"{field} is a {type(value).__name__}, which cannot pass")
        text = str(value)
        if (isinstance(value, str) and len(text) > _LONGEST_TEXT) or _DATE.search(text):
            raise BadInputError(
                path, f"{field} is {value!r}, a date or free text, which cannot pass; leave it out"
            )
        if any(_tells(value, name) for name in (*ids.values(), *other_ids)):
            raise BadInputError(path, f"{field} is {value!r}, an id, which cannot pass")
        passed[field] = value
    return passed


def _tells(value: float | str | None, name: str) -> bool:
    """Whether a value is an id or holds it; one of a single character is in too many texts."""
    text = str(value).removesuffix(".0").casefold()
    return text == name.casefold() or (
        isinstance(value, str) and len(name) > 1 and name.casefold() in text
    )


def _written(pixels: np.ndarray, path: Path) -> SourceImage:
    """A PNG of nothing but the pixels."""
    Image.fromarray(pixels).save(path)
    return inspect_image(path)
