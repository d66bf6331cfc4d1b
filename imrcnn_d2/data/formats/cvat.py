"""CVAT's XML, version 1.1: for images and video read into COCO, for images written from it."""

import argparse
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, SubElement, indent, tostring

import defusedxml
import numpy as np
import pycocotools.mask as mask_util
from defusedxml.ElementTree import parse
from tqdm import tqdm

from imrcnn_d2.data.formats.base import Format, Sample, Source, add_class_arguments
from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.data.images import inspect_image, list_files, path_inside
from imrcnn_d2.data.masks import (
    ANNOTATION_FIELDS,
    IMAGE_FIELDS,
    Region,
    annotate,
    check_classes,
    check_extent,
    ellipse_rle,
    further_fields,
    mask_polygons,
    named_categories,
    patch_rle,
    polygon_rle,
    rectangle,
)
from imrcnn_d2.utils.files import BadInputError, Rejects, regular_file

__all__ = ["Cvat", "cvat_documents", "read_cvat"]


class Cvat(Format):
    name = "cvat"
    help = "own data: CVAT's XML for images or video, 1.1"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_class_arguments(parser)
        parser.add_argument(
            "--annotations", type=Path, nargs="+", required=True, help="XML of one or several tasks"
        )
        parser.add_argument(
            "--images",
            type=Path,
            required=True,
            help="folder of the images or of the video's frames",
        )

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        return read_cvat(args.annotations, args.images, rejects, args.classes)

    def write(self, source: Source, names: Mapping[int, str], stage: Path, out: Path) -> list[str]:
        """Writes annotations.xml (CVAT for images 1.1) and labels.json, to make a task with.

        As `LabelMe.write`.
        """
        lost: set[str] = set()

        def samples() -> Iterator[Sample]:
            for sample in source.samples:
                lost.update(further_fields(sample.fields, IMAGE_FIELDS))
                yield sample

        text, labels = cvat_documents(samples(), names)
        stage.joinpath("annotations.xml").write_text(text, encoding="utf-8")
        text = json.dumps(labels, ensure_ascii=False, indent=2)
        stage.joinpath("labels.json").write_text(text + "\n", encoding="utf-8")
        return [f"not in CVAT's file: {', '.join(sorted(lost))} of the images"] if lost else []


def _integer(text: str | None) -> int:
    """A whole number of at least 0; ValueError naming what is written instead."""
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


def _attribute_fields(element: Element, label: str, types: Mapping[tuple[str, str], str]) -> dict:
    """COCO fields of a shape or tag, by CVAT's input_type of each label and attribute."""
    fields: dict = {"occluded": True} if element.get("occluded") == "1" else {}
    for attribute in element.iterfind("attribute"):
        name, text = attribute.get("name"), attribute.text or ""
        if not name or name in set(ANNOTATION_FIELDS) - {"iscrowd"}:
            raise ValueError(f"there is an attribute {name!r}; give it another name")
        kind = types.get((label, name))
        if kind == "checkbox":
            fields[name] = text.casefold() == "true"
        elif kind == "number" and text:
            fields[name] = _number(text)
        elif text:
            fields[name] = text
    return fields


def _element_region(element: Element, label: str, fields: dict, height: int, width: int) -> Region:
    """The area of a shape in an image of that size."""
    group = _integer(element.get("group_id", "0")) or None
    return Region(label, _rle(element, height, width), group, fields)


def _rle(element: Element, height: int, width: int) -> dict:
    if element.tag == "polygon":
        pairs = [pair.split(",") for pair in element.get("points", "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("its points are not x,y;x,y;...")
        points = [[_number(value) for value in pair] for pair in pairs]
        return polygon_rle(points, height, width)
    if element.tag == "box":
        corners = [_number(element.get(key)) for key in ("xtl", "ytl", "xbr", "ybr")]
        check_extent(corners, height, width)
        degrees = _number(element.get("rotation", "0"))
        return polygon_rle(rectangle(*corners, degrees).tolist(), height, width)
    if element.tag == "ellipse":
        x, y, rx, ry = (_number(element.get(key)) for key in ("cx", "cy", "rx", "ry"))
        degrees = _number(element.get("rotation", "0"))
        return ellipse_rle((x, y), (rx, ry), height, width, degrees)
    if element.tag == "mask":
        return _mask_rle(element, height, width)
    raise ValueError("is no area; make it a polygon, or take it out of the task")


def _mask_rle(element: Element, height: int, width: int) -> dict:
    left, top, w, h = (_integer(element.get(key)) for key in ("left", "top", "width", "height"))
    if left + w > width or top + h > height:
        raise ValueError(f"it reaches outside the {width}x{height} image")
    runs = [_integer(run.strip()) for run in element.get("rle", "").split(",")]
    if sum(runs) != w * h:
        raise ValueError(f"its rle covers {sum(runs)} pixels, its {w}x{h} frame {w * h}")
    # of rows, background first
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return patch_rle(values.reshape(h, w), left, top, height, width)


def _number(text: str | None) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no number")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _attributes(annotation: Mapping) -> dict:
    """CVAT attributes of a COCO annotation: its further fields, and ``iscrowd`` where it is one."""
    crowd = {"iscrowd": True} if annotation.get("iscrowd") else {}
    return {**further_fields(annotation, (*ANNOTATION_FIELDS, "occluded")), **crowd}


def _shapes(annotation: Mapping, height: int, width: int, group: int) -> list[tuple[str, dict]]:
    """The shapes of a COCO annotation: element names and attributes; with holes, a mask."""
    rle = to_rle(annotation["segmentation"], height, width)
    mask = mask_util.decode(rle)
    common = {"source": "file", "occluded": str(int(bool(annotation.get("occluded"))))}
    polygons = mask_polygons(mask)
    if polygons is None:
        left, top, w, h = mask_util.toBbox(rle).astype(int).tolist()
        flat = mask[top : top + h, left : left + w].ravel()
        starts = np.flatnonzero(np.diff(flat, prepend=0))
        runs = np.diff(np.concatenate([[0], starts, [flat.size]])).tolist()
        frame = {"left": left, "top": top, "width": w, "height": h}
        attributes = {"rle": ", ".join(map(str, runs)), **{k: str(v) for k, v in frame.items()}}
        return [("mask", {**common, **attributes, "z_order": "0"})]
    shapes = []
    for polygon in polygons:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in polygon.tolist())
        attributes = {**common, "points": points, "z_order": "0"}
        if len(polygons) > 1:
            attributes["group_id"] = str(group)
        shapes.append(("polygon", attributes))
    return shapes


# CVAT's names of a video's frames
_FRAME = re.compile(r"frame_(\d+)", re.ASCII)


@dataclass
class _Entry:
    """An image as the XML describes it, not yet read."""

    path: Path
    source: Path
    name: str
    size: tuple[int, int] | None  # width and height
    shapes: list[tuple[Element, str, dict]] = field(default_factory=list)
    fields: dict = field(default_factory=dict)
    error: str = ""


def read_cvat(
    xml_files: Sequence[Path],
    image_root: Path,
    rejects: Rejects,
    classes: Sequence[str] | None = None,
) -> Source:
    """Reads CVAT's "for images" and "for video" files. Images without a shape are lesion-free.

    Polygons, boxes, ellipses and masks are areas; those of one label and group are one instance.
    Tags become fields of the image that are true, attributes fields of the annotation (of a tag: of
    the image). Of a video, the images are its frames as CVAT exports them (frame_000000.png), and a
    track's number becomes ``lesion_id``.

    Args:
        xml_files: of one or several tasks, each with images of its own.
        image_root: the folder that each name is relative to; of a project's images also in the
            folder of their subset. With a video: its frames.
        rejects: takes bad input.
        classes: the labels in their order; None takes those found, sorted.

    Raises:
        FileNotFoundError: there is no such folder.
        BadInputError: bad input under ``on_error="raise"``; always if a file as a whole cannot be
            used.
    """
    files = list_files(image_root, rejects)
    entries: list[_Entry] = []
    for xml_file in xml_files:
        root = _parse(xml_file)
        with rejects.catch():
            entries += _read(root, xml_file, image_root, files, rejects)
    labels = {label for entry in entries for _, label, _ in entry.shapes}
    where = xml_files[0] if len(xml_files) == 1 else f"{len(xml_files)} CVAT files"
    categories = named_categories(labels, classes, where)
    notes: list[str] = []
    samples = _samples(entries, files, image_root, categories, rejects, notes)
    return Source(samples, categories, {"description": "from CVAT"}, notes)


def _parse(path: Path) -> Element:
    regular_file(path)
    try:
        root = parse(path).getroot()
    except OSError as error:
        raise BadInputError(path, f"cannot be opened: {error.strerror}") from error
    except defusedxml.DefusedXmlException as error:
        raise BadInputError(path, f"defines entities, which CVAT never does ({error})") from error
    except (ParseError, ValueError, LookupError) as error:  # a broken or unknown encoding too
        raise BadInputError(path, f"is no XML ({error})") from error
    if root.tag != "annotations":
        raise BadInputError(
            path, f"is no CVAT file: it starts with <{root.tag}>, not <annotations>"
        )
    version = root.findtext("version")
    if version != "1.1":
        raise BadInputError(path, f"is of CVAT's format {version}; export it as CVAT 1.1")
    return root


def _read(
    root: Element, xml_file: Path, image_root: Path, files: Sequence[Path], rejects: Rejects
) -> list[_Entry]:
    has_tracks = root.find("track") is not None
    if has_tracks and root.find("image") is not None:
        raise BadInputError(xml_file, "has both images and tracks; export it as one of both")
    if has_tracks or (root.find("image") is None and _of_video(root)):
        return _read_video(root, xml_file, image_root, files)
    types = _attribute_types(root)
    by_stem = {path.with_suffix(""): path for path in files}
    entries = []
    for element in root.iterfind("image"):
        with rejects.catch():
            entry = _read_image(element, xml_file, image_root, types, rejects.follow_links)
            # frames of a video in the format for images have names without a suffix
            entry.path = by_stem.get(entry.path, entry.path)
            entries.append(entry)
    return entries


def _of_video(root: Element) -> bool:
    """Whether all tasks, or the job, are of videos, by what CVAT calls their mode."""
    modes = {mode.text for mode in root.iterfind("meta//mode")}
    return modes == {"interpolation"}


def _attribute_types(root: Element) -> dict[tuple[str, str], str]:
    """input_type by label and attribute."""
    return {
        (label.findtext("name", ""), attribute.findtext("name", "")): attribute.findtext(
            "input_type", ""
        )
        for label in root.iter("label")
        for attribute in label.iterfind("attributes/attribute")
    }


def _read_image(
    element: Element, xml_file: Path, image_root: Path, types: dict, follow_links: bool
) -> _Entry:
    name = element.get("name")
    path = path_inside(image_root, name, xml_file, follow_links)
    entry = _Entry(path, xml_file, name, None)
    if subset := element.get("subset"):
        entry.fields["subset"] = subset
        if not path.is_file():
            name_in_subset = f"{subset}/{name}"
            entry.path = path_inside(image_root, name_in_subset, xml_file, follow_links)
    try:
        entry.size = _size(element.get("width"), element.get("height"))
        for child in element:
            label = child.get("label")
            if not label:
                raise ValueError(f"a {child.tag} has no label")
            fields = _attribute_fields(child, label, types)
            if child.tag == "tag":
                entry.fields |= {label: True, **fields}
            else:
                entry.shapes.append((child, label, fields))
        if clash := sorted(set(entry.fields) & set(IMAGE_FIELDS)):
            raise ValueError(f"there is a tag or attribute {clash[0]!r}; give it another name")
    except ValueError as error:
        raise BadInputError(xml_file, f"image {name!r}: {error}") from error
    return entry


def _size(width: str | None, height: str | None) -> tuple[int, int] | None:
    return None if width is None or height is None else (_integer(width), _integer(height))


def _read_video(
    root: Element, xml_file: Path, image_root: Path, files: Sequence[Path]
) -> list[_Entry]:
    """An entry for each frame that lies in the folder or is in a track."""
    frames = {}
    for path in files:
        if match := _FRAME.fullmatch(path.stem):
            if int(match[1]) in frames:
                raise BadInputError(path, f"is the same frame as {frames[int(match[1])]}")
            frames[int(match[1])] = path
    if not frames:
        raise BadInputError(
            xml_file, f"is of a video, and {image_root} has no frame_000000.png and so on of it"
        )
    tasks = {track.get("task_id") for track in root.iterfind("track")}
    if len(tasks) > 1:
        raise BadInputError(
            xml_file,
            f"has {len(tasks)} videos, whose frames have the same names; export each task for "
            "itself, and prepare it with the folder of its frames",
        )
    types = _attribute_types(root)
    try:
        size = _size(
            root.findtext("meta//original_size/width"), root.findtext("meta//original_size/height")
        )
        entries = {n: _Entry(path, xml_file, path.name, size) for n, path in frames.items()}
        for track in root.iterfind("track"):
            _follow(track, entries, types)
    except ValueError as error:
        raise BadInputError(xml_file, str(error)) from error
    return [entries[number] for number in sorted(entries)]


def _follow(track: Element, entries: dict[int, _Entry], types: dict) -> None:
    """Adds the areas of a track to their frames; ValueError saying what is wrong with it."""
    name, label = f"track {track.get('id')}", track.get("label")
    if not label:
        raise ValueError(f"{name} has no label")
    shown = None  # the last frame that had a shape in it
    numbers = sorted(entries)
    for shape in sorted(track, key=lambda shape: _integer(shape.get("frame"))):
        number = _integer(shape.get("frame"))
        if number not in entries:
            if shape.get("outside") != "1":
                raise ValueError(f"{name}: the image of frame {number} is missing")
            continue
        if shown is not None:
            for between in numbers[bisect_right(numbers, shown) : bisect_left(numbers, number)]:
                entries[between].error = (
                    f"{name} is in frames {shown} and {number}, but not in this one between; "
                    "export the video with all frames, not the key frames only"
                )
        shown = None
        if shape.get("outside") != "1":
            fields = {"lesion_id": track.get("id"), **_attribute_fields(shape, label, types)}
            entries[number].shapes.append((shape, label, fields))
            shown = number
    if shown is not None:
        for after in numbers[bisect_right(numbers, shown) :]:
            entries[after].error = (
                f"{name} is in frame {shown} and not said to have left it, but not in this one; "
                "mark it as outside where the lesion is gone, or export the video with all frames"
            )


def _samples(
    entries: Sequence[_Entry],
    files: Sequence[Path],
    image_root: Path,
    categories: Sequence[dict],
    rejects: Rejects,
    notes: list[str],
) -> Iterator[Sample]:
    ids = {category["name"]: category["id"] for category in categories}
    uses = Counter(entry.path for entry in entries)
    for entry in tqdm(entries, desc="Reading images", unit="image"):
        with rejects.catch():
            if uses[entry.path] > 1:
                raise BadInputError(
                    entry.source, f"duplicate: the image {entry.name!r} is there several times"
                )
            if entry.error:
                raise BadInputError(entry.path, entry.error)
            image = inspect_image(entry.path)
            size = entry.size or (image.width, image.height)
            check_classes((label for _, label, _ in entry.shapes), ids, entry.source)
            regions = (_region(entry, shape, *size) for shape in entry.shapes)
            annotations = annotate(image, size, regions, ids, notes)
            name = entry.path.relative_to(image_root).as_posix()
            yield Sample(name, image, annotations, entry.fields)
    left = [
        path
        for path in files
        if path not in uses and path not in {entry.source for entry in entries}
    ]
    if left:
        names = ", ".join(path.relative_to(image_root).as_posix() for path in left[:5])
        notes.append(
            f"{len(left)} files of {image_root} are in no CVAT file and left out: {names}"
            + (" and others" if len(left) > 5 else "")
        )


def _region(entry: _Entry, shape: tuple[Element, str, dict], width: int, height: int) -> Region:
    element, label, fields = shape
    try:
        return _element_region(element, label, fields, height, width)
    except ValueError as error:
        raise BadInputError(
            entry.source, f"image {entry.name!r}: a {element.tag} {label!r}: {error}"
        ) from error


# What XML 1.0 cannot hold, however it is written.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def cvat_documents(samples: Iterable[Sample], names: Mapping[int, str]) -> tuple[str, list[dict]]:
    """A data set in CVAT's two files.

    Masks become polygons, those with holes masks; further fields of annotations become attributes.

    Args:
        samples: with annotations that have a mask.
        names: of the classes by category id.

    Returns:
        XML text; and the labels with their attributes, as CVAT's "Raw" constructor takes them.

    Raises:
        BadInputError: a text that XML cannot hold.
    """
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    meta = SubElement(root, "meta")
    seen: dict[str, dict[str, list]] = {name: {} for name in names.values()}
    count: Counter[str] = Counter()
    for number, sample in enumerate(samples):
        width, height = sample.image.width, sample.image.height
        size = {"width": str(width), "height": str(height)}
        image = SubElement(root, "image", id=str(number), name=sample.file_name, **size)
        for group, annotation in enumerate(sample.annotations, start=1):
            label = names[annotation["category_id"]]
            count[label] += 1
            attributes = _attributes(annotation)
            for key, value in attributes.items():
                seen[label].setdefault(key, []).append(value)
            for tag, shape_attributes in _shapes(annotation, height, width, group):
                shape = SubElement(image, tag, label=label, **shape_attributes)
                for key, value in attributes.items():
                    SubElement(shape, "attribute", name=key).text = _text(value)
    labels = [_label(name, attributes, count[name]) for name, attributes in seen.items()]
    task = SubElement(meta, "task")
    SubElement(task, "mode").text = "annotation"
    task.append(_labels_element(labels))
    indent(root)
    text = '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, "unicode") + "\n"
    if bad := _NO_XML.search(text):
        start = max(bad.start() - 30, 0)
        raise BadInputError(
            "annotations.xml", f"XML cannot hold {bad[0]!r}, after {text[start : bad.start()]!r}"
        )
    return text, labels


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _label(name: str, attributes: Mapping[str, Sequence], count: int) -> dict:
    return {
        "name": name,
        "type": "any",
        "attributes": [
            _attribute(key, values, for_all=len(values) == count)
            for key, values in attributes.items()
        ],
    }


def _attribute(name: str, values: Sequence, for_all: bool) -> dict:
    """Of a kind that can hold all its values; a CVAT number is whole and has bounds.

    CVAT gives the default to instances without a value: where there are such, only a text, whose
    default is empty, does not make an unknown size 0.
    """
    if name == "iscrowd" or (for_all and all(isinstance(value, bool) for value in values)):
        kind, choices = "checkbox", ["false"]
    elif for_all and all(type(value) is int and value >= 0 for value in values):
        kind, choices = "number", ["0", str(max(values)), "1"]
    else:
        kind, choices = "text", [""]
    return {"name": name, "mutable": False, "input_type": kind, "values": choices}


def _labels_element(labels: Sequence[dict]) -> Element:
    element = Element("labels")
    for label in labels:
        entry = SubElement(element, "label")
        SubElement(entry, "name").text = label["name"]
        SubElement(entry, "type").text = label["type"]
        attributes = SubElement(entry, "attributes")
        for attribute in label["attributes"]:
            item = SubElement(attributes, "attribute")
            SubElement(item, "name").text = attribute["name"]
            SubElement(item, "mutable").text = str(attribute["mutable"])
            SubElement(item, "input_type").text = attribute["input_type"]
            SubElement(item, "default_value").text = attribute["values"][0]
            SubElement(item, "values").text = "\n".join(attribute["values"])
    return element
