"""Checks of images, annotations, duplicates and patients of a data set."""

import functools
import hashlib
import importlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from imrcnn_d2.data.audit.findings import Entry, Finding, finding
from imrcnn_d2.data.endoscope_view import View, find_view
from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.data.images import annotated_on_stored_pixels, in_threads, inspect_image, read_image
from imrcnn_d2.data.prepare.duplicates import find_near_duplicates, joined_groups, positions
from imrcnn_d2.utils.files import BadInputError

__all__ = [
    "MIN_CORRELATION",
    "ORIENTATIONS",
    "Examined",
    "ImageMeasures",
    "Line",
    "DecodedAnnotation",
    "DuplicatePair",
    "category_findings",
    "decode_annotations",
    "exact_duplicates",
    "examine_all",
    "file_findings",
    "groups",
    "measure_image",
    "near_duplicates",
    "annotation_findings",
    "repeated_id_findings",
    "require",
    "text_lines",
    "duplicate_findings",
]


_SIDE = 352  # pixels of the longer side, to which larger images are reduced to be measured
_MARGIN = 0.02  # of the shorter side: the view's soft border
_WHITE = 245  # gray value from which on a channel is full
_HASH = 16  # side of the perceptual hash, in bits
_TEXT_SIDE = 1024  # pixels of the longer side, to which larger images are reduced to look for text
_TEXT_CONTRAST = 48  # of writing to what is around it, gray values
_MIN_STROKES = 5  # that a row through a line of writing meets

# As `PIL.Image.Transpose`: an image and its copies that were turned or mirrored. None is upright.
ORIENTATIONS = (None, *Image.Transpose)

Line = tuple[int, int, int, int]


@dataclass(frozen=True)
class ImageMeasures:
    """Of one image. Gray values are 0 to 255; shares 0 to 1.

    Attributes:
        width, height: pixels as shown.
        file_hash: sha256 of the file's bytes.
        pixel_hash: sha256 of size and pixels.
        hashes: (8, 32) uint8, perceptual hash in each of `ORIENTATIONS`.
        brightness: 95th percentile of the gray values.
        blur: Crete's measure in the view, 0 sharp to 1 blurred.
        white: share of the view that is white in patches.
        colour: mean (L, a, b) of the view.
        chroma: mean difference of a pixel's largest and smallest channel, in the view.
        red_minus_blue: their mean difference in the view.
        view_share: share of the image that is the endoscope's view.
        text: boxes (x0, y0, x1, y1) of what looks like a line of writing next to the view.
    """

    width: int
    height: int
    file_hash: str
    pixel_hash: str
    hashes: np.ndarray
    brightness: float
    blur: float
    white: float
    colour: tuple[float, float, float]
    chroma: float
    red_minus_blue: float
    view_share: float
    text: tuple[Line, ...]


def measure_image(image: np.ndarray, view: View, file_hash: str) -> ImageMeasures:
    """
    Args:
        image: (H, W, 3) uint8 RGB.
        view: of :func:`imrcnn_d2.data.endoscope_view.find_view`.
        file_hash: sha256 of the file's bytes.

    Raises:
        ModuleNotFoundError: scikit-image or imagehash is not installed; the error says how.
    """
    height, width = image.shape[:2]
    small = _reduced(image, _SIDE, cv2.INTER_AREA)
    mask = _reduced(view.mask.astype(np.uint8), _SIDE, cv2.INTER_NEAREST)
    mask = cv2.erode(mask, np.ones((5, 5)), borderValue=1)
    if not mask.any():
        mask[:] = 1
    gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    # channel by channel: NumPy takes many times as long over short axes
    red, green, blue = cv2.split(small)
    lowest, highest = (of(of(red, green), blue) for of in (cv2.min, cv2.max))
    full = (lowest >= _WHITE).astype(np.uint8)
    full = cv2.morphologyEx(full, cv2.MORPH_OPEN, np.ones((7, 7)))  # leaves out highlights
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    lit = gray[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return ImageMeasures(
        width=width,
        height=height,
        file_hash=file_hash,
        pixel_hash=hashlib.sha256(bytes(str(image.shape), "ascii") + image.tobytes()).hexdigest(),
        hashes=_perceptual_hashes(gray),
        brightness=float(np.percentile(gray, 95)),
        blur=_blur(lit),
        white=cv2.mean(full, mask)[0],
        colour=cv2.mean(lab, mask)[:3],
        chroma=cv2.mean(highest - lowest, mask)[0],
        red_minus_blue=cv2.mean(red, mask)[0] - cv2.mean(blue, mask)[0],
        view_share=float(view.mask.mean()),
        text=tuple(text_lines(image, view)),
    )


def text_lines(image: np.ndarray, view: View) -> list[Line]:
    """Boxes (x0, y0, x1, y1) around what looks like a line of writing next to the view.

    It is not read: what counts are strokes side by side, in a row, that stand out from the
    background. The frames of insets are no writing.
    """
    gray = _reduced(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), _TEXT_SIDE, cv2.INTER_AREA)
    scale = image.shape[1] / gray.shape[1]
    side = min(gray.shape)
    covered = view.mask.astype(np.uint8)
    for box in view.insets:
        covered[box.slices] = 1
    covered = _reduced(covered, _TEXT_SIDE, cv2.INTER_NEAREST)
    margin = 2 * max(1, round(_MARGIN * side)) + 1
    outside = cv2.dilate(covered, np.ones((margin, margin))) == 0
    if outside.mean() < 0.01:
        return []
    background = int(np.median(gray[outside]))
    strokes = (outside & (cv2.absdiff(gray, background) > _TEXT_CONTRAST)).astype(np.uint8)
    reach = max(3, round(0.025 * side))
    joined = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, np.ones((1, reach)))
    count, _, boxes, _ = cv2.connectedComponentsWithStats(joined)
    lines = []
    for x, y, w, h, _ in boxes[1:count].tolist():
        if not max(4, 0.01 * side) <= h <= 0.1 * side or w < 2 * h:
            continue
        rows = strokes[y : y + h, x : x + w]
        crossings = np.count_nonzero(np.diff(rows.astype(np.int8), axis=1) == 1, axis=1)
        if np.sort(crossings)[h // 2 :].mean() >= _MIN_STROKES and 0.1 < rows.mean() < 0.8:
            lines.append(tuple(round(scale * v) for v in (x, y, x + w, y + h)))
    return lines


def _reduced(image: np.ndarray, side: int, interpolation: int) -> np.ndarray:
    factor = side / max(image.shape[:2])
    if factor >= 1:
        return image
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=interpolation)


def _blur(gray: np.ndarray) -> float:
    """Crete et al., "The blur effect" (SPIE 2007): how little changes if it is blurred again."""
    if min(gray.shape) < 16:
        return 0.0
    return float(require("skimage.measure", "scikit-image").blur_effect(gray))


def _perceptual_hashes(gray: np.ndarray) -> np.ndarray:
    imagehash = require("imagehash", "imagehash")
    tile = Image.fromarray(gray).resize((4 * _HASH, 4 * _HASH), Image.Resampling.LANCZOS)
    views = (tile if turn is None else tile.transpose(turn) for turn in ORIENTATIONS)
    return np.stack(
        [np.packbits(imagehash.phash(view, hash_size=_HASH).hash.ravel()) for view in views]
    )


def require(module: str, package: str) -> ModuleType:
    """Imports a module of the extra [audit]; the error says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install -e '.[audit]'"
        ) from error


# Of the frame, but at least so many pixels: 8x8 at 352x352. What is smaller is a click or a speck.
TINY_SHARE, TINY_PIXELS = 0.0005, 16
OUTSIDE_SHARE = 0.25  # of an annotation, beyond the view
SAME_IOU = 0.75  # of two annotations of one lesion
CROSSING_SHARE = 0.01  # of a polygon's area, that changes with how its crossings are read
IMBALANCE = 10  # times as many annotations
PAIRED = 200  # annotations of an image that are compared in pairs


@dataclass(frozen=True)
class DecodedAnnotation:
    """An annotation with a mask.

    Attributes:
        record: as in the file.
        rle: compressed RLE of its mask.
        area: pixels.
    """

    record: dict
    rle: dict
    area: int


def decode_annotations(
    entry: Entry, width: int, height: int, category_ids: set
) -> tuple[list[DecodedAnnotation], list[Finding]]:
    """Decodes the annotations of an image; findings on those that have no mask.

    Args:
        entry: the image.
        width, height: pixels that it was annotated at.
        category_ids: the categories there are.
    """
    decoded, findings = [], []

    def add(kind: str, annotation: dict, detail: str) -> None:
        findings.append(
            finding(kind, [entry.name], [entry.split], detail, annotation_id=_id(annotation))
        )

    for annotation in entry.annotations:
        segmentation = annotation.get("segmentation")
        try:
            if annotation["category_id"] not in category_ids:
                raise ValueError(f"there is no category with id {annotation['category_id']!r}")
            if annotation.get("iscrowd", 0) not in (0, 1):
                raise ValueError(f"iscrowd is {annotation['iscrowd']!r}, neither 0 nor 1")
            rle = to_rle(segmentation, height, width) if segmentation else None
        except (ValueError, TypeError) as error:
            add("malformed", annotation, str(error))
            continue
        if rle is None:
            add("empty", annotation, "There is no segmentation.")
        elif not (area := int(mask_util.area(rle))):
            add("empty", annotation, f"The mask covers no pixel of the {width}x{height} image.")
        else:
            decoded.append(DecodedAnnotation(annotation, rle, area))
    return decoded, findings


def annotation_findings(
    entry: Entry, decoded: Sequence[DecodedAnnotation], view: np.ndarray
) -> Iterator[Finding]:
    """Tiny annotations, such outside the view, in pairs on one lesion, and polygons that cross.

    Args:
        entry: the image.
        annotations: of `decode_annotations`.
        view: (H, W) bool, the endoscope's view with what is laid over it.

    Raises:
        ModuleNotFoundError: shapely is not installed; the error says how.
    """
    where = [entry.name], [entry.split]
    least = max(TINY_PIXELS, TINY_SHARE * view.size)
    shown = mask_util.encode(np.asfortranarray(view, dtype=np.uint8))
    for annotation in decoded:
        fields = {"annotation_id": _id(annotation.record)}
        if annotation.area < least:
            detail = f"It covers {annotation.area} pixels, less than {least:.0f}."
            yield finding("tiny", *where, detail, score=float(annotation.area), **fields)
        inside = mask_util.area(mask_util.merge([annotation.rle, shown], intersect=True))
        outside = 1 - int(inside) / annotation.area if view.any() else 0.0
        if outside > OUTSIDE_SHARE:
            detail = f"{outside:.0%} of it is outside the endoscope's view."
            yield finding("outside_view", *where, detail, score=float(outside), **fields)
        crossing = _crossing(annotation.record["segmentation"])
        if crossing > CROSSING_SHARE:
            detail = f"{crossing:.0%} of its area depends on how the crossings are read."
            yield finding("self_crossing", *where, detail, score=crossing, **fields)
    yield from _pairs(entry, [a for a in decoded if not a.record.get("iscrowd")])


def _pairs(entry: Entry, decoded: Sequence[DecodedAnnotation]) -> Iterator[Finding]:
    if len(decoded) > PAIRED:
        detail = f"Of {len(decoded)} annotations only the first {PAIRED} were compared in pairs."
        yield finding("overlapping", [entry.name], [entry.split], detail, severity="info")
    masks = [annotation.rle for annotation in decoded[:PAIRED]]
    overlaps = mask_util.iou(masks, masks, [0] * len(masks)) if len(masks) > 1 else np.zeros((0, 0))
    for i, j in np.argwhere(np.triu(overlaps, 1) > SAME_IOU).tolist():
        a, b = decoded[i].record, decoded[j].record
        if a["category_id"] == b["category_id"]:
            detail = f"Annotations {a.get('id')} and {b.get('id')} overlap with an IoU of "
            detail += f"{overlaps[i, j]:.2f}."
            fields = {"annotation_id": _id(a), "score": float(overlaps[i, j])}
            yield finding("overlapping", [entry.name], [entry.split], detail, **fields)


def _crossing(segmentation: object) -> float:
    """Largest share of a polygon's area that is inside by one way of reading it and not by another.

    The signed areas of the loops of a line that crosses itself cancel out; those of a line that
    touches itself, or runs back on itself, do not.
    """
    if not isinstance(segmentation, list):
        return 0.0
    shapely = require("shapely", "shapely")
    worst = 0.0
    for polygon in segmentation:
        points = np.asarray(polygon, dtype=float).reshape(-1, 2)
        shape = shapely.Polygon(points)
        if not shapely.is_valid(shape):
            x, y = points.T
            signed = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
            covered = shapely.make_valid(shape, method="structure", keep_collapsed=False).area
            lobes = shapely.make_valid(shape).area
            area = max(covered, lobes, signed)
            if area:
                worst = max(worst, 1 - min(covered, lobes, signed) / area)
    return worst


def category_findings(
    categories: Iterable[dict], annotations: Iterable[dict], imbalance: float = IMBALANCE
) -> Iterator[Finding]:
    """Categories without an annotation, or with far fewer than the largest one.

    Args:
        categories, annotations: of the whole data set.
        imbalance: how many times as many the largest one may have.
    """
    counts = Counter(str(annotation["category_id"]) for annotation in annotations)
    counts = {category["name"]: counts[str(category["id"])] for category in categories}
    if not any(counts.values()):
        return
    largest = max(counts, key=counts.get)
    for name, count in counts.items():
        if count * imbalance < counts[largest]:
            detail = f"{name}: {count} annotations, {largest}: {counts[largest]}."
            ratio = counts[largest] / count if count else None
            yield finding("class_imbalance", (), (), detail, score=ratio)


def repeated_id_findings(entries: Iterable[Entry]) -> Iterator[Finding]:
    """Annotations of one file that share an id: Detectron2 does not load such a file.

    Args:
        entries: the images; those of one split are of one file.
    """
    sharing = defaultdict(list)
    for entry in entries:
        for annotation in entry.annotations:
            if annotation.get("id") is not None:
                sharing[entry.split, annotation["id"]].append(entry)
    for (split, number), sharers in sharing.items():
        if len(sharers) > 1:
            names = list(dict.fromkeys(entry.name for entry in sharers))
            detail = f"{len(sharers)} annotations have the id {number!r}; give each its own."
            fields = {"annotation_id": _id({"id": number})}
            yield finding("malformed", names, [split] * len(names), detail, **fields)


def _id(annotation: dict) -> int | None:
    number = annotation.get("id")
    return number if isinstance(number, int) else None


@dataclass(frozen=True)
class Examined:
    """What is known of one image.

    Attributes:
        entry: the image.
        measures: None where it cannot be read.
        annotations: those that have a mask.
        findings: what is wrong with it, as far as it shows without the other images.
    """

    entry: Entry
    measures: ImageMeasures | None
    annotations: tuple[DecodedAnnotation, ...]
    findings: tuple[Finding, ...]


def examine_all(entries: Sequence[Entry], category_ids: set | None) -> list[Examined]:
    """Examines all images, in their order.

    Args:
        entries: the images.
        category_ids: the categories there are; None where there are no masks to check.
    """
    examine = functools.partial(_examine, category_ids=category_ids)
    return in_threads(examine, entries, "Examining")


def _examine(entry: Entry, category_ids: set | None) -> Examined:
    def say(kind: str, detail: str) -> Finding:
        return finding(kind, [entry.name], [entry.split], detail)

    findings = []
    width, height = entry.record.get("width"), entry.record.get("height")
    try:
        file = inspect_image(entry.path)
        image = read_image(entry.path)
    except BadInputError as error:
        kind = "unreadable" if entry.path.exists() else "missing_file"
        findings.append(say(kind, f"It {error.reason}."))
        decoded = ()
        if category_ids is not None and _is_size(width) and _is_size(height):
            decoded, wrong = decode_annotations(entry, width, height, category_ids)
            findings += wrong
        return Examined(entry, None, tuple(decoded), tuple(findings))

    view = find_view(image)
    measures = measure_image(image, view, file.sha256)
    width, height = (width or file.width), (height or file.height)
    fits = False
    try:
        fits = not annotated_on_stored_pixels(file, width, height)
    except BadInputError as error:
        findings.append(say("wrong_size", f"It {error.reason}."))
    if category_ids is None or not _is_size(width) or not _is_size(height):
        return Examined(entry, measures, (), tuple(findings))
    decoded, wrong = decode_annotations(entry, width, height, category_ids)
    findings += wrong
    if fits:
        covered = view.mask.copy()
        for box in view.insets:
            covered[box.slices] = True
        findings += annotation_findings(entry, decoded, covered)
    return Examined(entry, measures, tuple(decoded), tuple(findings))


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


# Chosen on Kvasir-SEG and on its images made worse: of its 1,000 images at 352x352 the darkest has
# a brightness of 111, the most blurred 0.52, the whitest 0.15, the least red 47 more red than blue;
# blurred with a sigma of 0.6 % of the longer side, 98 % measure 0.59 or more.
BLACK = 40  # gray value under which 95 % of the image are
BLURRED = 0.54
WHITE_SHARE = 0.2  # of the view
GRAY_CHROMA = 10  # gray values
CAST = 6  # robust standard deviations of colour from the data set's median, and at least:
CAST_DISTANCE = 30  # in CIELAB's a and b


def file_findings(examined: Sequence[Examined]) -> Iterator[Finding]:
    """Black, blurred and over-exposed images, unusual colours, writing next to the view.

    Args:
        examined: all images, since colours are compared with those of the others.
    """
    readable = [image for image in examined if image.measures is not None]
    lit = [image for image in readable if image.measures.brightness >= BLACK]
    middle, spread = _usual_colour(np.array([image.measures.colour[1:] for image in lit]))
    for image in readable:
        measures = image.measures
        where = [image.entry.name], [image.entry.split]
        if measures.text:
            detail = f"{len(measures.text)} lines that look like writing: it was not read."
            yield finding("text_outside_view", *where, detail, score=float(len(measures.text)))
        if measures.brightness < BLACK:
            detail = f"95 % of it are darker than {measures.brightness:.0f} of 255."
            yield finding("black_frame", *where, detail, score=measures.brightness)
            continue  # nothing else can be seen
        if measures.white > WHITE_SHARE:
            detail = f"{measures.white:.0%} of the view are white."
            yield finding("overexposed", *where, detail, score=measures.white)
        if measures.blur > BLURRED:
            detail = f"Blur effect {measures.blur:.2f}, where 0 is sharp and 1 blurred."
            yield finding("blur", *where, detail, score=measures.blur)
        detail = _colour_fault(measures, middle, spread)
        if detail and measures.white <= WHITE_SHARE:
            distance = float(np.hypot(*(np.array(measures.colour[1:]) - middle)))
            yield finding("colour", *where, detail, score=distance)


def _usual_colour(colours: np.ndarray) -> tuple[np.ndarray, float]:
    """Median (a, b), and the robust standard deviation of the distances from it."""
    if not len(colours):
        return np.zeros(2), 0.0
    middle = np.median(colours, axis=0)
    return middle, float(1.4826 * np.median(np.hypot(*(colours - middle).T)))


def _colour_fault(measures, middle: np.ndarray, spread: float) -> str:
    """What is unusual about an image's colour, empty if nothing."""
    if measures.chroma < GRAY_CHROMA:
        return "It is grey, or nearly so."
    distance = float(np.hypot(*(np.array(measures.colour[1:]) - middle)))
    if distance < max(CAST * spread, CAST_DISTANCE):
        return ""
    if measures.red_minus_blue < 0:
        return "There is more blue in it than red: mucosa is red, were the channels exchanged?"
    return f"Its mean colour is {distance:.0f} from the others' in CIELAB."


# Of aligned images. Above it all pairs of Kvasir-SEG show the same scene; see near_duplicates.py,
# whose lower limit is for keeping images together, where a pair too many does no harm.
MIN_CORRELATION = 0.31
_ALIKE = 8  # images that are compared with each one, by embedding
_ALIKE_BY_HASH = 3  # and by perceptual hash, turned and mirrored ones as well
_HASH_BITS = 80  # of 256, by which these may differ; those of unrelated frames mostly do by more
_BLOCK = 512  # images that are looked up at once


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that show the same.

    Attributes:
        a, b: their places among the entries, a < b.
        kind: "exact_duplicate" or "near_duplicate".
        correlation: of the aligned images; 1 of exact duplicates.
        detail: in what they are the same.
    """

    a: int
    b: int
    kind: str
    correlation: float
    detail: str


def exact_duplicates(examined: Sequence[Examined]) -> list[DuplicatePair]:
    """Images with the same bytes or the same pixels, each with the one before it."""
    pairs = []
    for copies in _by_pixels(examined).values():
        for a, b in pairwise(copies):
            files = [examined[i].measures.file_hash for i in (a, b)]
            same = "files" if files[0] == files[1] else "pixels"
            detail = f"The {same} are the same."
            pairs.append(DuplicatePair(a, b, "exact_duplicate", 1.0, detail))
    return sorted(pairs, key=lambda pair: (pair.a, pair.b))


def _by_pixels(examined: Sequence[Examined]) -> dict[str, list[int]]:
    """Positions of the images with the same pixels."""
    return positions(one.measures.pixel_hash if one.measures else None for one in examined)


def near_duplicates(
    examined: Sequence[Examined], embeddings: np.ndarray | None
) -> list[DuplicatePair]:
    """Images that show the same scene, exact duplicates left out.

    The images most alike by their embeddings or perceptual hashes are aligned with each other and
    correlated. The work grows with the number of images, but for the look-up, whose share is small.

    Args:
        examined: the images.
        embeddings: (N, D) rows of length 1, of the images in their order; None to go by the hashes
            alone, which find copies but few frames of a moment later.
    """
    # One image of each set of exact duplicates stands for all.
    places = sorted(copies[0] for copies in _by_pixels(examined).values())
    if len(places) < 2:
        return []
    hashes = np.stack([examined[i].measures.hashes for i in places])
    vectors = None if embeddings is None else embeddings[places]
    paths = [examined[i].entry.path for i in places]
    return [
        DuplicatePair(
            places[pair.a],
            places[pair.b],
            "near_duplicate",
            pair.correlation,
            f"Aligned with each other, they correlate with {pair.correlation:.2f}.",
        )
        for pair in find_near_duplicates(paths, MIN_CORRELATION, _neighbours(hashes, vectors))
    ]


def _neighbours(hashes: np.ndarray, vectors: np.ndarray | None) -> list[list[int]]:
    """Indices of the possible duplicates of each image, from (N, 8, 32) hashes."""
    bits = np.unpackbits(hashes, axis=2).astype(np.float32) * 2 - 1
    upright, count = bits[:, 0], len(bits)
    neighbours: list[set[int]] = [set() for _ in range(count)]
    for start in range(0, count, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, count))
        differ = np.full((len(rows), count), np.inf, np.float32)
        for turn in range(bits.shape[1]):
            np.minimum(differ, (256 - bits[rows, turn] @ upright.T) / 2, out=differ)
        _add_best(neighbours, rows, -differ, _ALIKE_BY_HASH, -_HASH_BITS)
        if vectors is not None:
            _add_best(neighbours, rows, vectors[rows] @ vectors.T, _ALIKE, -1.0)
    return [sorted(indices) for indices in neighbours]


def _add_best(
    neighbours: list[set[int]], rows: np.ndarray, alike: np.ndarray, number: int, least: float
) -> None:
    alike[np.arange(len(rows)), rows] = -np.inf
    number = min(number, alike.shape[1] - 1)
    columns = np.argpartition(-alike, number - 1, axis=1)[:, :number]
    for row, candidates, values in zip(
        rows.tolist(), columns, np.take_along_axis(alike, columns, axis=1), strict=True
    ):
        neighbours[row].update(candidates[values >= least].tolist())


def duplicate_findings(entries: Sequence[Entry], pairs: Iterable[DuplicatePair]) -> list[Finding]:
    """A finding for each pair; an error where it crosses splits."""
    findings = []
    for pair in pairs:
        a, b = entries[pair.a], entries[pair.b]
        crosses = a.split != b.split
        where = f" They are in {a.split} and {b.split}." if crosses else ""
        findings.append(
            finding(
                pair.kind,
                (a.name, b.name),
                (a.split, b.split),
                pair.detail + where,
                severity="error" if crosses else "warning",
                score=pair.correlation,
            )
        )
    return findings


def patient_findings(entries: Sequence[Entry]) -> list[Finding]:
    """Patients whose images are in several splits."""
    findings = []
    for patient, places in positions(e.record.get("patient_id") for e in entries).items():
        images = [entries[i] for i in places]
        splits = list(dict.fromkeys(entry.split for entry in images))
        if len(splits) > 1:
            counts = ", ".join(f"{sum(e.split == s for e in images)} in {s}" for s in splits)
            detail = f"Patient {patient} has {len(images)} images: {counts}."
            names = [entry.name for entry in images]
            findings.append(
                finding("patient_across_splits", names, [e.split for e in images], detail)
            )
    return findings


def groups(entries: Sequence[Entry], pairs: Iterable[DuplicatePair]) -> list[list[int]]:
    """Positions of images that must stay together: duplicates and those of one patient."""
    patients = positions(entry.record.get("patient_id") for entry in entries).values()
    return joined_groups(len(entries), [*((pair.a, pair.b) for pair in pairs), *patients])
