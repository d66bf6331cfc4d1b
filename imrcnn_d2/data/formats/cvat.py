"""CVAT's XML, version 1.1: for images and video read into COCO, for images written from it."""

import argparse
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, SubElement, indent, tostring

import defusedxml
import numpy as np
import pycocotools.mask as mask_util
from defusedxml.ElementTree import parse

from imrcnn_d2.data import masks
from imrcnn_d2.data.formats import base
from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.data.images import inspect_image, is_image_name, list_files, path_inside
from imrcnn_d2.utils.files import BadInputError, Rejects, regular_file
from imrcnn_d2.utils.progress import tqdm

_FRAME = re.compile(r"frame_(\d+)", re.ASCII)  # CVAT's names of a video's frames
_CORNERS = ("xtl", "ytl", "xbr", "ybr")  # of a box
# What XML 1.0 cannot hold, however it is written.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Cvat(base.Format):
    name = "cvat"
    help = "own data: CVAT's XML for images or video, 1.1"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        base.add_tool_arguments(parser)
        parser.add_argument(
            "--annotations", type=Path, nargs="+", required=True, help="XML of one or several tasks"
        )
        help_ = "folder of the images or of the video's frames"
        parser.add_argument("--images", type=Path, required=True, help=help_)

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> base.Source:
        source = read_cvat(args.annotations, args.images, rejects, args.classes)
        return base.with_lesion_free(source, args.negatives, rejects)

    def write(self, source: base.Source, stage: Path, out: Path) -> list[str]:
        """Write annotations.xml (CVAT for images 1.1) and labels.json, to make a task with.

        Masks become polygons, those with holes masks; further fields of annotations become
        attributes. labels.json is what CVAT's "Raw" constructor of labels takes.
        """
        names = source.class_names
        root = Element("annotations")
        SubElement(root, "version").text = "1.1"
        task = SubElement(SubElement(root, "meta"), "task")
        seen: dict[str, dict[str, list]] = {name: {} for name in names.values()}
        count: Counter[str] = Counter()
        lost: set[str] = set()
        for number, sample in enumerate(source.samples):
            lost.update(masks.further_fields(sample.fields, masks.IMAGE_FIELDS))
            height, width = sample.image.height, sample.image.width
            size = {"width": str(width), "height": str(height)}
            image = SubElement(root, "image", id=str(number), name=sample.file_name, **size)
            for group, annotation in enumerate(sample.annotations, start=1):
                label = names[annotation["category_id"]]
                count[label] += 1
                no_attributes = (*masks.ANNOTATION_FIELDS, "occluded")
                attributes = masks.further_fields(annotation, no_attributes)
                if annotation.get("iscrowd"):
                    attributes["iscrowd"] = True
                for key, value in attributes.items():
                    seen[label].setdefault(key, []).append(value)
                for tag, shape_attributes in _shapes(annotation, height, width, group):
                    shape = SubElement(image, tag, label=label, **shape_attributes)
                    for key, value in attributes.items():
                        text = str(value).lower() if isinstance(value, bool) else str(value)
                        SubElement(shape, "attribute", name=key).text = text
        labels = []
        for name, values_of in seen.items():
            attributes = [_attribute(k, v, len(v) == count[name]) for k, v in values_of.items()]
            labels.append({"name": name, "type": "any", "attributes": attributes})
        SubElement(task, "mode").text = "annotation"
        task.append(_labels_element(labels))
        indent(root)
        text = '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, "unicode") + "\n"
        if bad := _NO_XML.search(text):
            before = text[max(bad.start() - 30, 0) : bad.start()]
            raise BadInputError("annotations.xml", f"cannot hold {bad[0]!r}, after {before!r}")
        stage.joinpath("annotations.xml").write_text(text, encoding="utf-8")
        text = json.dumps(labels, ensure_ascii=False, indent=2)
        stage.joinpath("labels.json").write_text(text + "\n", encoding="utf-8")
        return [f"not in CVAT's file: {', '.join(sorted(lost))} of the images"] if lost else []


def _shapes(annotation: Mapping, height: int, width: int, group: int) -> list[tuple[str, dict]]:
    """The shapes of a COCO annotation: element names and attributes; with holes, a mask, and
    without a mask, its box."""
    common = {"source": "file", "occluded": str(int(bool(annotation.get("occluded"))))}
    if "segmentation" not in annotation:
        x, y, w, h = annotation["bbox"]
        corners = {"xtl": x, "ytl": y, "xbr": x + w, "ybr": y + h}
        texts = {key: f"{value:.2f}" for key, value in corners.items()}
        return [("box", {**common, **texts, "z_order": "0"})]
    rle = to_rle(annotation["segmentation"], height, width)
    mask = mask_util.decode(rle)
    polygons = masks.mask_polygons(mask)
    if polygons is None:
        left, top, w, h = mask_util.toBbox(rle).astype(int).tolist()
        flat = mask[top : top + h, left : left + w].ravel()
        starts = np.flatnonzero(np.diff(flat, prepend=0))
        runs = np.diff(np.concatenate([[0], starts, [flat.size]])).tolist()
        frame = {"left": left, "top": top, "width": w, "height": h}
        attributes = {"rle": ", ".join(map(str, runs)), **{k: str(v) for k, v in frame.items()}}
        return [("mask", {**common, **attributes, "z_order": "0"})]
    group_id = {"group_id": str(group)} if len(polygons) > 1 else {}
    points = [";".join(f"{x:.2f},{y:.2f}" for x, y in polygon.tolist()) for polygon in polygons]
    return [("polygon", {**common, "points": text, "z_order": "0", **group_id}) for text in points]


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
            values = attribute["values"]
            texts = {key: str(attribute[key]) for key in ("name", "mutable", "input_type")}
            texts |= {"default_value": values[0], "values": "\n".join(values)}
            item = SubElement(attributes, "attribute")
            for key, text in texts.items():
                SubElement(item, key).text = text
    return element


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
    xml_files: Sequence[Path], image_root: Path, rejects: Rejects, classes: base.Names = None
) -> base.Source:
    """Read CVAT's "for images" and "for video" files. Images without a shape are lesion-free.

    Polygons, ellipses and masks are areas, and a box that is not turned is one without a mask;
    those of one label and group are one instance, whose boxes are areas.
    Tags become fields of the image that are true, attributes fields of the annotation (of a tag: of
    the image). Of a video, the images are its frames as CVAT exports them (frame_000000.png), and a
    track's number becomes ``lesion_id``. Names are relative to `image_root`, those of a
    project also to the folder of their subset in it.

    Raises:
        FileNotFoundError: there is no such folder.
        BadInputError: bad input under ``on_error="raise"``, or a file that cannot be used at all.
    """
    files = list_files(image_root, rejects)
    entries: list[_Entry] = []
    for xml_file in xml_files:
        root = _parse(xml_file)
        with rejects.catch():
            entries += _read(root, xml_file, image_root, files, rejects)
    labels = {label for entry in entries for _, label, _ in entry.shapes}
    where = xml_files[0] if len(xml_files) == 1 else f"{len(xml_files)} CVAT files"
    categories = masks.named_categories(labels, classes, where)
    ids = {category["name"]: category["id"] for category in categories}
    notes: list[str] = []

    def samples() -> Iterator[base.Sample]:
        uses = Counter(entry.path for entry in entries)
        for entry in tqdm(entries, desc="Reading images", unit="image"):
            with rejects.catch():
                if uses[entry.path] > 1:
                    reason = f"duplicate: the image {entry.name!r} is there several times"
                    raise BadInputError(entry.source, reason)
                if entry.error:
                    raise BadInputError(entry.path, entry.error)
                image = inspect_image(entry.path)
                size = entry.size or (image.width, image.height)
                masks.check_classes((label for _, label, _ in entry.shapes), ids, entry.source)
                regions = (_region(entry, shape, *size) for shape in entry.shapes)
                annotations = masks.annotate(image, size, regions, ids, notes)
                name = entry.path.relative_to(image_root).as_posix()
                yield base.Sample(name, image, annotations, entry.fields)
        used = {*uses, *(entry.source for entry in entries)}
        if left := [path.relative_to(image_root).as_posix() for path in files if path not in used]:
            others = " and others" if len(left) > 5 else ""
            text = f"{len(left)} files of {image_root} are in no CVAT file and left out"
            notes.append(f"{text}: {', '.join(left[:5])}{others}")

    return base.Source(samples(), categories, {"description": "from CVAT"}, notes)


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
        raise BadInputError(path, f"is no CVAT file: its root is <{root.tag}>, not <annotations>")
    version = root.findtext("version")
    if version != "1.1":
        raise BadInputError(path, f"is of CVAT's format {version}; export it as CVAT 1.1")
    return root


def _read(
    root: Element, xml_file: Path, image_root: Path, files: Sequence[Path], rejects: Rejects
) -> list[_Entry]:
    has_images, has_tracks = root.find("image") is not None, root.find("track") is not None
    if has_tracks and has_images:
        raise BadInputError(xml_file, "has both images and tracks; export it as one of both")
    types = {}  # input_type by label and attribute
    for label in root.iter("label"):
        for attribute in label.iterfind("attributes/attribute"):
            key = label.findtext("name", ""), attribute.findtext("name", "")
            types[key] = attribute.findtext("input_type", "")
    modes = {mode.text for mode in root.iterfind("meta//mode")}  # of the tasks, or of the job
    if has_tracks or (not has_images and modes == {"interpolation"}):
        return _read_video(root, xml_file, image_root, files, types)
    by_stem = {path.with_suffix(""): path for path in filter(is_image_name, files)}
    entries = []
    for element in root.iterfind("image"):
        with rejects.catch():
            entry = _read_image(element, xml_file, image_root, types, rejects.follow_links)
            # frames of a video in the format for images have names without a suffix
            if not entry.path.is_file():
                entry.path = by_stem.get(entry.path, entry.path)
            entries.append(entry)
    return entries


def _read_image(
    element: Element, xml_file: Path, image_root: Path, types: dict, follow_links: bool
) -> _Entry:
    name = element.get("name")
    entry = _Entry(path_inside(image_root, name, xml_file, follow_links), xml_file, name, None)
    if subset := element.get("subset"):
        entry.fields["subset"] = subset
        if not entry.path.is_file():
            entry.path = path_inside(image_root, f"{subset}/{name}", xml_file, follow_links)
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
        if clash := sorted(set(entry.fields) & set(masks.IMAGE_FIELDS)):
            raise ValueError(f"there is a tag or attribute {clash[0]!r}; give it another name")
    except ValueError as error:
        raise BadInputError(xml_file, f"image {name!r}: {error}") from error
    return entry


def _read_video(
    root: Element, xml_file: Path, image_root: Path, files: Sequence[Path], types: dict
) -> list[_Entry]:
    """An entry for each frame that lies in the folder or is in a track."""
    frames = {}
    for path in files:
        if match := _FRAME.fullmatch(path.stem):
            if int(match[1]) in frames:
                raise BadInputError(path, f"is the same frame as {frames[int(match[1])]}")
            frames[int(match[1])] = path
    if not frames:
        reason = f"is of a video, and {image_root} has no frame_000000.png and so on of it"
        raise BadInputError(xml_file, reason)
    tasks = {track.get("task_id") for track in root.iterfind("track")}
    if len(tasks) > 1:
        reason = f"has {len(tasks)} videos, whose frames have the same names; export each by itself"
        raise BadInputError(xml_file, reason)
    try:
        size = _size(*(root.findtext(f"meta//original_size/{key}") for key in ("width", "height")))
        entries = {n: _Entry(frames[n], xml_file, frames[n].name, size) for n in sorted(frames)}
        for track in root.iterfind("track"):
            _follow(track, entries, types)
    except ValueError as error:
        raise BadInputError(xml_file, str(error)) from error
    return list(entries.values())


def _follow(track: Element, entries: dict[int, _Entry], types: dict) -> None:
    """Add the areas of a track to their frames; ValueError saying what is wrong with it."""
    name, label = f"track {track.get('id')}", track.get("label")
    if not label:
        raise ValueError(f"{name} has no label")
    shown = None  # the last frame that had a shape in it
    numbers = list(entries)
    for shape in sorted(track, key=lambda shape: _integer(shape.get("frame"))):
        number = _integer(shape.get("frame"))
        is_outside = shape.get("outside") == "1"
        if number not in entries:
            if not is_outside:
                raise ValueError(f"{name}: the image of frame {number} is missing")
            continue
        if shown is not None:
            for between in numbers[bisect_right(numbers, shown) : bisect_left(numbers, number)]:
                problem = f"{name} is in frames {shown} and {number}, but not in this one between"
                entries[between].error = f"{problem}; export the video with all frames"
        shown = None if is_outside else number
        if not is_outside:
            fields = {"lesion_id": track.get("id"), **_attribute_fields(shape, label, types)}
            entries[number].shapes.append((shape, label, fields))
    if shown is not None:
        for after in numbers[bisect_right(numbers, shown) :]:
            problem = f"{name} is in frame {shown} and not marked as outside, but not in this one"
            entries[after].error = f"{problem}; mark it, or export the video with all frames"


def _region(entry: _Entry, shape: tuple, width: int, height: int) -> masks.Region:
    element, label, fields = shape
    try:
        group = _integer(element.get("group_id", "0")) or None
        rle, box = _rle(element, height, width), None
        if element.tag == "box" and not _number(element.get("rotation", "0")):
            left, top, right, bottom = (_number(element.get(key)) for key in _CORNERS)
            box = min(left, right), min(top, bottom), abs(right - left), abs(bottom - top)
        return masks.Region(label, rle, group, fields, box)
    except ValueError as error:
        reason = f"image {entry.name!r}: a {element.tag} {label!r}: {error}"
        raise BadInputError(entry.source, reason) from error


def _rle(element: Element, height: int, width: int) -> dict:
    """The area of a shape in an image of that size."""
    if element.tag == "polygon":
        pairs = [pair.split(",") for pair in element.get("points", "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("its points are not x,y;x,y;...")
        points = [[_number(value) for value in pair] for pair in pairs]
        return masks.polygon_rle(points, height, width)
    if element.tag == "box":
        corners = [_number(element.get(key)) for key in _CORNERS]
        masks.check_extent(corners, height, width)
        degrees = _number(element.get("rotation", "0"))
        return masks.polygon_rle(masks.rectangle(*corners, degrees).tolist(), height, width)
    if element.tag == "ellipse":
        x, y, rx, ry = (_number(element.get(key)) for key in ("cx", "cy", "rx", "ry"))
        degrees = _number(element.get("rotation", "0"))
        return masks.ellipse_rle((x, y), (rx, ry), height, width, degrees)
    if element.tag != "mask":
        raise ValueError("is no area; make it a polygon, or take it out of the task")
    left, top, w, h = (_integer(element.get(key)) for key in ("left", "top", "width", "height"))
    if left + w > width or top + h > height:
        raise ValueError(f"it reaches outside the {width}x{height} image")
    runs = [_integer(run.strip()) for run in element.get("rle", "").split(",")]
    if sum(runs) != w * h:
        raise ValueError(f"its rle covers {sum(runs)} pixels, its {w}x{h} frame {w * h}")
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # of rows, background first
    return masks.patch_rle(values.reshape(h, w), left, top, height, width)


def _attribute_fields(element: Element, label: str, types: Mapping[tuple[str, str], str]) -> dict:
    """COCO fields of a shape or tag, by CVAT's input_type of each label and attribute."""
    fields: dict = {"occluded": True} if element.get("occluded") == "1" else {}
    for attribute in element.iterfind("attribute"):
        name, text = attribute.get("name"), attribute.text or ""
        if not name or name in set(masks.ANNOTATION_FIELDS) - {"iscrowd"}:
            raise ValueError(f"there is an attribute {name!r}; give it another name")
        kind = types.get((label, name))
        if kind == "checkbox":
            fields[name] = text.casefold() == "true"
        elif text:
            fields[name] = _number(text) if kind == "number" else text
    return fields


def _size(width: str | None, height: str | None) -> tuple[int, int] | None:
    return None if width is None or height is None else (_integer(width), _integer(height))


def _integer(text: str | None) -> int:
    """A whole number of at least 0; ValueError naming what is written instead."""
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError(f"{text!r} is no whole number")
    return int(text)


def _number(text: str | None) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no number")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
