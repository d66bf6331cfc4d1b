"""LabelMe's JSON files, one per image: read into COCO, and written from it."""

import argparse
import base64
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from imrcnn_d2.data import masks
from imrcnn_d2.data.formats import base
from imrcnn_d2.data.formats.coco import to_rle, without_empty_ids
from imrcnn_d2.data.images import check_name, inspect_image, list_files, open_image
from imrcnn_d2.utils.files import BadInputError, Rejects, check_inside, read_json
from imrcnn_d2.utils.progress import tqdm

_VERSION = "5.5.0"  # of the format
_FILE_KEYS = ("version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth")
# What LabelMe reads of a shape, but for `locked`; it keeps other keys as they are.
_SHAPE_KEYS = ("label", "points", "group_id", "shape_type", "flags", "mask")
_POINTS = {"rectangle": 2, "circle": 2, "mask": 2, "oriented_rectangle": 4}
# Flags of a shape become fields of its annotation; COCO's own are no flags, but for iscrowd.
_NO_FLAGS = tuple(name for name in masks.ANNOTATION_FIELDS if name != "iscrowd")


class LabelMe(base.Format):
    name = "labelme"
    help = "own data: LabelMe's JSON files"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        base.add_tool_arguments(parser)
        parser.add_argument("--root", type=Path, required=True, help="folder of the JSON files")
        help_ = "folder of images, laid out as --root is (default: where each file says, in --root)"
        parser.add_argument("--images", type=Path, help=help_)

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> base.Source:
        source = read_labelme(args.root, rejects, scratch, args.images, args.classes)
        return base.with_lesion_free(source, args.negatives, rejects)

    def write(self, source: base.Source, stage: Path, out: Path) -> list[str]:
        """Write NAME.json for each image, with the path of the image."""
        for sample in base.unique_samples(source):
            name = PurePosixPath(sample.file_name).with_suffix(".json")
            path, image = stage / name, sample.image
            path.parent.mkdir(parents=True, exist_ok=True)
            image_path = os.path.relpath(image.path.resolve(), (out / name).parent.resolve())
            fields = masks.further_fields(sample.fields, masks.IMAGE_FIELDS)
            args = Path(image_path).as_posix(), image.height, image.width
            names = source.class_names
            document = labelme_document(sample.annotations, names, *args, fields=fields)
            text = json.dumps(document, ensure_ascii=False, indent=2)
            path.write_text(text + "\n", encoding="utf-8")
        return []


def labelme_document(
    annotations: Sequence[Mapping],
    names: Mapping[int, str],
    image_path: str,
    height: int,
    width: int,
    *,
    fields: Mapping | None = None,
    fill_holes: bool = False,
) -> dict:
    """The content of an image's LabelMe file, from COCO annotations. LabelMe keeps further keys.

    Args:
        annotations: those without a box, which name a class of the whole image, are left out.
        names: of the classes by category id.
        image_path: relative to where the file will lie.
        fields: further fields of the image; truth values become its flags.
        fill_holes: fill holes of masks, which become polygons in any case.
    """
    shapes: list[dict] = []
    for number, annotation in enumerate(annotations, start=1):
        if "bbox" in annotation:
            label = names[annotation["category_id"]]
            shapes += _shapes(annotation, label, height, width, number, fill_holes)
    fields = fields or {}
    flags = {key: value for key, value in fields.items() if isinstance(value, bool)}
    return {
        **{key: fields[key] for key in fields if key not in (*_FILE_KEYS, *flags)},
        "version": _VERSION,
        "flags": flags,
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _shapes(
    annotation: Mapping, label: str, height: int, width: int, group_id: int, fill_holes: bool
) -> list[dict]:
    """The shapes of a COCO annotation, of one `group_id` if several; with holes, a mask."""
    areas = _areas(annotation, height, width, fill_holes)
    standard = (*masks.ANNOTATION_FIELDS, *_SHAPE_KEYS, "score", "raw_score")
    further = masks.further_fields(annotation, standard)
    # `locked` is no flag: LabelMe 7 writes it for shapes that cannot be edited.
    is_flag = {key: isinstance(further[key], bool) and key != "locked" for key in further}
    flags = {key: further.pop(key) for key in is_flag if is_flag[key]}
    if annotation.get("iscrowd"):
        flags["iscrowd"] = True
    description = str(further.pop("description", ""))
    if annotation.get("score") is not None:
        description = f"score {annotation['score']:.4f}"
    common = {**further, "label": label, "group_id": group_id if len(areas) > 1 else None}
    common |= {"description": description, "flags": flags, "mask": None}
    return [{**common, **area} for area in areas]


def _areas(annotation: Mapping, height: int, width: int, fill_holes: bool) -> list[dict]:
    """Type and points of each shape."""
    if "segmentation" not in annotation:
        x, y, w, h = annotation["bbox"]
        return [{"shape_type": "rectangle", "points": [[x, y], [x + w, y + h]]}]
    rle = to_rle(annotation["segmentation"], height, width)
    mask = mask_util.decode(rle)
    polygons = masks.mask_polygons(mask, fill_holes)
    if polygons is not None:
        return [{"shape_type": "polygon", "points": points.tolist()} for points in polygons]
    left, top, w, h = mask_util.toBbox(rle).astype(int).tolist()
    stream = io.BytesIO()
    Image.fromarray(mask[top : top + h, left : left + w]).save(stream, "PNG")
    text = base64.b64encode(stream.getvalue()).decode("ascii")
    corners = [[left, top], [left + w - 1, top + h - 1]]  # pixels, the last one included
    return [{"shape_type": "mask", "points": corners, "mask": text}]


@dataclass(frozen=True)
class _File:
    path: Path
    image_path: Path | None  # None if only its pixels are in the file
    content: dict  # but for the pixels


def read_labelme(
    root: Path,
    rejects: Rejects,
    scratch: Path,
    images: Path | None = None,
    classes: base.Names = None,
) -> base.Source:
    """Read a folder of LabelMe files. Every image needs one; without shapes it is lesion-free.

    Polygons, circles and masks are areas, and a rectangle is a box without a mask; those of one
    label and ``group_id`` are one instance, whose rectangles are areas. Flags become fields of the
    image or annotation, as do further keys that LabelMe keeps for others; a shape's flag
    ``iscrowd`` is COCO's.

    Args:
        scratch: an empty folder for images that are only in the files; it must stay.
        images: has the images, laid out as the JSON files are; None if each lies where its file
            says, inside `root`.

    Raises:
        FileNotFoundError: a folder is missing.
        BadInputError: bad input under ``on_error="raise"``, or no usable file at all.
    """
    folder = root if images is None else images
    files_of_images = list_files(folder, rejects)
    paths = files_of_images if images is None else list_files(root, rejects)
    paths = [path for path in paths if path.suffix.lower() == ".json"]
    files: list[_File] = []
    for path in tqdm(paths, desc="Reading LabelMe files", unit="file"):
        with rejects.catch():
            files.append(_read(path, root, images, rejects.follow_links))
    if not files:
        raise BadInputError(root, "there is no LabelMe file (*.json) in it that can be used")
    labels = {shape["label"] for file in files for shape in file.content["shapes"]}
    categories = masks.named_categories(labels, classes, root)
    ids = {category["name"]: category["id"] for category in categories}
    notes: list[str] = []

    def samples() -> Iterator[base.Sample]:
        uses = Counter(file.image_path for file in files)
        for file in tqdm(files, desc="Reading images", unit="image"):
            with rejects.catch():
                if file.image_path is not None and uses[file.image_path] > 1:
                    reason = f"duplicate: several LabelMe files are of {file.image_path}"
                    raise BadInputError(file.path, reason)
                yield _sample(file, root, folder, scratch, ids, notes)
        for path in files_of_images:
            if path.suffix.lower() in Image.registered_extensions() and path not in uses:
                with rejects.catch():
                    remedy = "save one, or give lesion-free images as --negatives"
                    raise BadInputError(path, f"has no LabelMe file; {remedy}")

    return base.Source(samples(), categories, {"description": "from LabelMe"}, notes)


def _read(path: Path, root: Path, images: Path | None, follow_links: bool) -> _File:
    content = read_json(path)
    if not isinstance(content, dict) or not {"shapes", "imagePath"} <= content.keys():
        raise BadInputError(path, "is no LabelMe file: it has no shapes and imagePath")
    shapes = content["shapes"]
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise BadInputError(path, "its shapes are no list of objects")
    for i, shape in enumerate(shapes):
        if not isinstance(shape.get("label"), str) or not shape["label"]:
            raise BadInputError(path, f"shapes[{i}] has no label")
    for key in ("imageHeight", "imageWidth"):
        if not isinstance(content.get(key), int | None):
            raise BadInputError(path, f"its {key} {content[key]!r} is no number of pixels")
    _check_flags(path, content, masks.IMAGE_FIELDS)
    embedded = content.pop("imageData", None)
    image = _locate(path, content["imagePath"], root, images)
    if image is not None:
        check_inside(root if images is None else images, image, follow_links)
    if image is None or not image.is_file():
        if not isinstance(embedded, str):
            reason = f"there is no image {image or content['imagePath']}; name its folder: --images"
            raise BadInputError(path, reason)
        image = None
    return _File(path, image, content)


def _check_flags(path: Path, entry: dict, reserved: Sequence[str]) -> None:
    flags = entry.get("flags") or {}
    if not isinstance(flags, dict) or not all(isinstance(v, bool) for v in flags.values()):
        raise BadInputError(path, f"the flags {flags!r} are not all true or false")
    if clash := sorted(set(flags) & set(reserved)):
        raise BadInputError(path, f"there is a flag {clash[0]!r}; give it another name")


def _locate(path: Path, image_path: object, root: Path, images: Path | None) -> Path | None:
    """Where the image should lie; None if that is outside the folder."""
    if not isinstance(image_path, str) or not image_path:
        raise BadInputError(path, f"its imagePath {image_path!r} is no file name")
    check_name(image_path, path)
    named = PureWindowsPath(image_path)  # which takes / as well
    folder = path.parent.relative_to(root)
    if images is not None:
        return images / folder / named.name
    if named.is_absolute() or named.drive or named.root:
        return path.parent / named.name  # of the computer that it was annotated on
    relative = PurePosixPath(os.path.normpath(folder / named.as_posix()))
    return None if ".." in relative.parts else root / relative


def _sample(
    file: _File, root: Path, folder: Path, scratch: Path, ids: Mapping[str, int], notes: list[str]
) -> base.Sample:
    path, content = file.image_path, file.content
    if path is None:
        path, folder = _unpack(file, root, scratch), scratch
        notes.append(f"{file.path}: its image is missing, the copy inside the file is used")
    image = inspect_image(path)
    size = (content.get("imageWidth") or image.width, content.get("imageHeight") or image.height)
    masks.check_classes((shape["label"] for shape in content["shapes"]), ids, file.path)
    regions = (_region(file.path, i, shape, *size) for i, shape in enumerate(content["shapes"]))
    annotations = masks.annotate(image, size, regions, ids, notes)
    fields = masks.further_fields(content, (*masks.IMAGE_FIELDS, *_FILE_KEYS))
    fields = without_empty_ids(fields | (content.get("flags") or {}))
    return base.Sample(path.relative_to(folder).as_posix(), image, annotations, fields)


def _unpack(file: _File, root: Path, scratch: Path) -> Path:
    """Write the image that is in the file; return where."""
    try:
        data = base64.b64decode(read_json(file.path)["imageData"], validate=True)
        with open_image(io.BytesIO(data)) as image:
            suffix = ".jpg" if image.format == "JPEG" else f".{image.format.lower()}"
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadInputError(file.path, f"its imageData is no readable image ({error})") from error
    target = scratch / file.path.relative_to(root).with_suffix(suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


def _region(path: Path, number: int, shape: dict, width: int, height: int) -> masks.Region:
    _check_flags(path, shape, _NO_FLAGS)
    label, group = shape["label"], shape.get("group_id")
    try:
        if not isinstance(group, int | str | None):
            raise ValueError(f"its group_id {group!r} is no number")
        rle = _shape_rle(shape, height, width)
    except ValueError as error:
        raise BadInputError(path, f"shapes[{number}], {label!r}: {error}") from error
    fields = masks.further_fields(shape, (*masks.ANNOTATION_FIELDS, *_SHAPE_KEYS))
    if not fields.get("description"):
        fields.pop("description", None)
    box = None
    if shape.get("shape_type") == "rectangle":
        (x, y), (x_end, y_end) = shape["points"]
        box = min(x, x_end), min(y, y_end), abs(x_end - x), abs(y_end - y)
    fields = without_empty_ids({**fields, **(shape.get("flags") or {})})
    return masks.Region(label, rle, group, fields, box)


def _shape_rle(shape: Mapping, height: int, width: int) -> dict:
    """Compressed COCO RLE of a shape in an image of that size."""
    kind = shape.get("shape_type") or "polygon"  # not in old files
    points = shape.get("points")
    if not isinstance(points, list) or not all(
        isinstance(point, list) and len(point) == 2 for point in points
    ):
        raise ValueError("its points are no list of [x, y]")
    if not isinstance(kind, str) or kind not in (*_POINTS, "polygon"):
        raise ValueError(f"{kind!r} is no area; make it a polygon, or take it out of the file")
    if len(points) != _POINTS.get(kind, len(points)):
        raise ValueError(f"a {kind} has {len(points)} points instead of {_POINTS[kind]}")
    flat = list(chain.from_iterable(points))
    masks.check_extent(flat, height, width)
    if kind == "rectangle":
        return masks.polygon_rle(masks.rectangle(*flat).tolist(), height, width)
    if kind == "circle":
        (x, y), (x_edge, y_edge) = points
        radius = float(np.hypot(x_edge - x, y_edge - y))
        return masks.ellipse_rle((x, y), (radius, radius), height, width)
    if kind == "mask":
        left, top = (round(value) for value in flat[:2])
        return masks.patch_rle(_decode(shape.get("mask")), left, top, height, width)
    return masks.polygon_rle(points, height, width)


def _decode(text: object) -> np.ndarray:
    """(h, w) bool of a base64 PNG."""
    if not isinstance(text, str):
        raise ValueError("its mask is no text of base64")
    try:
        with open_image(io.BytesIO(base64.b64decode(text, validate=True)), ["PNG"]) as file:
            patch = np.asarray(file)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"its mask is no PNG in base64 ({error})") from error
    if patch.ndim != 2:
        raise ValueError("its mask has several channels; LabelMe's have one")
    return patch != 0
