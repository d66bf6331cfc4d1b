"""CVAT: XML of tasks, jobs and projects, version 1.1, of images and of videos.

https://docs.cvat.ai/docs/dataset_management/formats/format-xml/
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import defusedxml
from defusedxml.ElementTree import parse
from tqdm import tqdm

from imrcnn_d2.data.cvat_shapes import integer, region, with_attributes
from imrcnn_d2.data.files import regular_file
from imrcnn_d2.data.images import inspect_image, list_files, path_inside
from imrcnn_d2.data.instances import (
    IMAGE_FIELDS,
    Region,
    annotate,
    check_classes,
    named_categories,
)
from imrcnn_d2.data.prepare import Sample, Source
from imrcnn_d2.data.rejects import BadInputError, Rejects

__all__ = ["read_cvat"]

# CVAT's names of a video's frames
_FRAME = re.compile(r"frame_(\d+)", re.ASCII)


@dataclass
class _Picture:
    """What is said of one image, not yet looked at.

    Attributes:
        path: of the image.
        source: the XML.
        name: what the XML calls it.
        size: width and height by the XML; None if not said.
        shapes: elements of areas with their label and further fields.
        fields: of the image.
        error: why it cannot be used, found while reading.
    """

    path: Path
    source: Path
    name: str
    size: tuple[int, int] | None
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
    pictures: list[_Picture] = []
    for xml_file in xml_files:
        root = _parse(xml_file)
        with rejects.catch():
            pictures += _read(root, xml_file, image_root, files, rejects)
    labels = {label for picture in pictures for _, label, _ in picture.shapes}
    where = xml_files[0] if len(xml_files) == 1 else f"{len(xml_files)} CVAT files"
    categories = named_categories(labels, classes, where)
    notes: list[str] = []
    samples = _samples(pictures, files, image_root, categories, rejects, notes)
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
) -> list[_Picture]:
    has_tracks = root.find("track") is not None
    if has_tracks and root.find("image") is not None:
        raise BadInputError(xml_file, "has both images and tracks; export it as one of both")
    if has_tracks or (root.find("image") is None and _of_video(root)):
        return _read_video(root, xml_file, image_root, files)
    types = _attribute_types(root)
    by_stem = {path.with_suffix(""): path for path in files}
    pictures = []
    for element in root.iterfind("image"):
        with rejects.catch():
            picture = _read_image(element, xml_file, image_root, types, rejects.follow_links)
            # frames of a video in the format for images have names without a suffix
            picture.path = by_stem.get(picture.path, picture.path)
            pictures.append(picture)
    return pictures


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
) -> _Picture:
    name = element.get("name")
    path = path_inside(image_root, name, xml_file, follow_links)
    picture = _Picture(path, xml_file, name, None)
    if subset := element.get("subset"):
        picture.fields["subset"] = subset
        if not path.is_file():
            name_in_subset = f"{subset}/{name}"
            picture.path = path_inside(image_root, name_in_subset, xml_file, follow_links)
    try:
        picture.size = _size(element.get("width"), element.get("height"))
        for child in element:
            label = child.get("label")
            if not label:
                raise ValueError(f"a {child.tag} has no label")
            fields = with_attributes(child, label, types)
            if child.tag == "tag":
                picture.fields |= {label: True, **fields}
            else:
                picture.shapes.append((child, label, fields))
        if clash := sorted(set(picture.fields) & set(IMAGE_FIELDS)):
            raise ValueError(f"there is a tag or attribute {clash[0]!r}; give it another name")
    except ValueError as error:
        raise BadInputError(xml_file, f"image {name!r}: {error}") from error
    return picture


def _size(width: str | None, height: str | None) -> tuple[int, int] | None:
    return None if width is None or height is None else (integer(width), integer(height))


def _read_video(
    root: Element, xml_file: Path, image_root: Path, files: Sequence[Path]
) -> list[_Picture]:
    """A picture for each frame that lies in the folder or is in a track."""
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
        pictures = {n: _Picture(path, xml_file, path.name, size) for n, path in frames.items()}
        for track in root.iterfind("track"):
            _follow(track, pictures, types)
    except ValueError as error:
        raise BadInputError(xml_file, str(error)) from error
    return [pictures[number] for number in sorted(pictures)]


def _follow(track: Element, pictures: dict[int, _Picture], types: dict) -> None:
    """Adds the areas of a track to their frames; ValueError saying what is wrong with it."""
    name, label = f"track {track.get('id')}", track.get("label")
    if not label:
        raise ValueError(f"{name} has no label")
    shown = None  # the last frame that had a shape in it
    numbers = sorted(pictures)
    for shape in sorted(track, key=lambda shape: integer(shape.get("frame"))):
        number = integer(shape.get("frame"))
        if number not in pictures:
            if shape.get("outside") != "1":
                raise ValueError(f"{name}: the image of frame {number} is missing")
            continue
        if shown is not None:
            for between in numbers[bisect_right(numbers, shown) : bisect_left(numbers, number)]:
                pictures[between].error = (
                    f"{name} is in frames {shown} and {number}, but not in this one between; "
                    "export the video with all frames, not the key frames only"
                )
        shown = None
        if shape.get("outside") != "1":
            fields = {"lesion_id": track.get("id"), **with_attributes(shape, label, types)}
            pictures[number].shapes.append((shape, label, fields))
            shown = number
    if shown is not None:
        for after in numbers[bisect_right(numbers, shown) :]:
            pictures[after].error = (
                f"{name} is in frame {shown} and not said to have left it, but not in this one; "
                "mark it as outside where the lesion is gone, or export the video with all frames"
            )


def _samples(
    pictures: Sequence[_Picture],
    files: Sequence[Path],
    image_root: Path,
    categories: Sequence[dict],
    rejects: Rejects,
    notes: list[str],
) -> Iterator[Sample]:
    ids = {category["name"]: category["id"] for category in categories}
    uses = Counter(picture.path for picture in pictures)
    for picture in tqdm(pictures, desc="Reading images", unit="image"):
        with rejects.catch():
            if uses[picture.path] > 1:
                raise BadInputError(
                    picture.source, f"duplicate: the image {picture.name!r} is there several times"
                )
            if picture.error:
                raise BadInputError(picture.path, picture.error)
            image = inspect_image(picture.path)
            size = picture.size or (image.width, image.height)
            check_classes((label for _, label, _ in picture.shapes), ids, picture.source)
            regions = (_region(picture, shape, *size) for shape in picture.shapes)
            annotations = annotate(image, size, regions, ids, notes)
            name = picture.path.relative_to(image_root).as_posix()
            yield Sample(name, image, annotations, picture.fields)
    left = [path for path in files if path not in uses and path not in {p.source for p in pictures}]
    if left:
        names = ", ".join(path.relative_to(image_root).as_posix() for path in left[:5])
        notes.append(
            f"{len(left)} files of {image_root} are in no CVAT file and left out: {names}"
            + (" and others" if len(left) > 5 else "")
        )


def _region(picture: _Picture, shape: tuple[Element, str, dict], width: int, height: int) -> Region:
    element, label, fields = shape
    try:
        return region(element, label, fields, height, width)
    except ValueError as error:
        raise BadInputError(
            picture.source, f"image {picture.name!r}: a {element.tag} {label!r}: {error}"
        ) from error
