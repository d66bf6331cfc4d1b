"""Checks of the images, annotations, duplicates and patients of a data set: `audit`."""

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import cv2
import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.audit.findings import KINDS, AuditedData, Entry, Finding, whole_id
from imrcnn_d2.data.endoscope_view import View, brightest, find_view
from imrcnn_d2.data.formats.coco import to_rle
from imrcnn_d2.data.images import (
    annotated_on_stored_pixels,
    in_threads,
    inspect_image,
    pixels_sha256,
    read_image,
)
from imrcnn_d2.data.masks import box_rle, check_size, cut_box, encode
from imrcnn_d2.data.prepare.duplicates import find_near_duplicates, joined_groups, positions
from imrcnn_d2.data.units import units_of
from imrcnn_d2.utils.files import BadInputError

_SIDE = 352  # pixels of the longer side, to which larger images are reduced to be measured
_MARGIN = 0.02  # of the shorter side: the view's soft border
_WHITE = 245  # gray value from which on a channel is full
_TEXT_SIDE = 1024  # pixels of the longer side, to which larger images are reduced to look for text
_TEXT_CONTRAST = 48  # of writing to the background, gray values
_MIN_STROKES = 5  # that a row through a line of writing meets

Line = tuple[int, int, int, int]


@dataclass(frozen=True)
class ImageMeasures:
    """Measures of one image. Gray values are 0 to 255; shares 0 to 1."""

    width: int
    height: int
    file_hash: str  # sha256 of the file's bytes
    pixel_hash: str  # sha256 of size and pixels
    brightness: float  # 95th percentile of the gray values
    blur: float  # Crete's measure in the view, 0 sharp to 1 blurred
    white: float  # share of the view that is white in patches
    colour: tuple[float, float, float]  # mean (L, a, b) of the view
    chroma: float  # mean difference of a pixel's largest and smallest channel, in the view
    red_minus_blue: float  # their mean difference in the view
    view_share: float  # share of the image that is the endoscope's view
    text: list[Line]  # see `text_lines`


def measure_image(image: np.ndarray, view: View, file_hash: str) -> ImageMeasures:
    """Measure an (H, W, 3) uint8 RGB image whose file has this sha256."""
    height, width = image.shape[:2]
    small = _reduced(image, _SIDE, cv2.INTER_AREA)
    mask = _reduced(view.mask.astype(np.uint8), _SIDE, cv2.INTER_NEAREST)
    mask = cv2.erode(mask, np.ones((5, 5)), borderValue=1)
    if not mask.any():
        mask[:] = 1
    gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    red, _, blue = cv2.split(small)
    darkest = 255 - brightest(255 - small)
    full = cv2.morphologyEx(  # leaves out highlights
        (darkest >= _WHITE).astype(np.uint8), cv2.MORPH_OPEN, np.ones((7, 7))
    )
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    x, y, w, h = cv2.boundingRect(mask)
    return ImageMeasures(
        width=width,
        height=height,
        file_hash=file_hash,
        pixel_hash=pixels_sha256(image),
        brightness=float(np.percentile(gray, 95)),
        blur=_blur(gray[y : y + h, x : x + w]),
        white=cv2.mean(full, mask)[0],
        colour=cv2.mean(lab, mask)[:3],
        chroma=cv2.mean(brightest(small) - darkest, mask)[0],
        red_minus_blue=cv2.mean(red, mask)[0] - cv2.mean(blue, mask)[0],
        view_share=float(view.mask.mean()),
        text=text_lines(image, view),
    )


def text_lines(image: np.ndarray, view: View) -> list[Line]:
    """Return boxes (x0, y0, x1, y1) of what looks like a line of writing next to the view: strokes
    in a row that stand out from the background."""
    gray = _reduced(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), _TEXT_SIDE, cv2.INTER_AREA)
    scale = image.shape[1] / gray.shape[1]
    side = min(gray.shape)
    covered = _reduced(view.with_insets.astype(np.uint8), _TEXT_SIDE, cv2.INTER_NEAREST)
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
    from skimage.measure import blur_effect

    return float(blur_effect(gray)) if min(gray.shape) >= 16 else 0.0


# Of the frame, but at least so many pixels: 8x8 at 352x352. What is smaller is a click or a speck.
TINY_SHARE, TINY_PIXELS = 0.0005, 16
OUTSIDE_SHARE = 0.25  # of an annotation, beyond the view
SAME_IOU = 0.75  # of two annotations of one lesion
CROSSING_SHARE = 0.01  # of a polygon's area, that changes with how its crossings are read
IMBALANCE = 10  # times as many annotations
PAIRED = 200  # annotations of an image that are compared in pairs


@dataclass(frozen=True)
class DecodedAnnotation:
    """An annotation that has a mask or, without one, a box, which stands for it."""

    record: dict  # as in the file
    rle: dict  # compressed
    area: int  # pixels


def decode_annotations(
    entry: Entry, width: int, height: int, category_ids: set
) -> tuple[list[DecodedAnnotation], list[Finding]]:
    """Decode the annotations of an image of this size; findings on those that cover nothing."""
    decoded, findings = [], []
    for annotation in entry.annotations:
        segmentation = annotation.get("segmentation")
        try:
            if annotation["category_id"] not in category_ids:
                raise ValueError(f"there is no category with id {annotation['category_id']!r}")
            if annotation.get("iscrowd", 0) not in (0, 1):
                raise ValueError(f"iscrowd is {annotation['iscrowd']!r}, neither 0 nor 1")
            if not segmentation and annotation.get("bbox") is not None:
                rle = box_rle(cut_box(annotation["bbox"], height, width), height, width)
            else:
                rle = to_rle(segmentation, height, width) if segmentation else None
        except (ValueError, TypeError) as error:
            findings.append(entry.finding("malformed", str(error), annotation))
            continue
        area = int(mask_util.area(rle)) if rle else 0
        if area:
            decoded.append(DecodedAnnotation(annotation, rle, area))
            continue
        detail = f"The mask covers no pixel of the {width}x{height} image."
        if rle is None:
            detail = "There is neither a segmentation nor a bbox."
        findings.append(entry.finding("empty", detail, annotation))
    return decoded, findings


def annotation_findings(
    entry: Entry, decoded: Sequence[DecodedAnnotation], view: np.ndarray
) -> Iterator[Finding]:
    """Yield annotations that are tiny, outside the (H, W) view, cross themselves or overlap."""
    least = max(TINY_PIXELS, TINY_SHARE * view.size)
    shown = encode(view)
    for annotation in decoded:
        record, area = annotation.record, annotation.area
        if area < least:
            detail = f"It covers {area} pixels, less than {least:.0f}."
            yield entry.finding("tiny", detail, record, score=float(area))
        inside = mask_util.area(mask_util.merge([annotation.rle, shown], intersect=True))
        outside = 1 - int(inside) / area if view.any() else 0.0
        if outside > OUTSIDE_SHARE:
            detail = f"{outside:.0%} of it is outside the endoscope's view."
            yield entry.finding("outside_view", detail, record, score=float(outside))
        crossing = _crossing(record.get("segmentation"))
        if crossing > CROSSING_SHARE:
            detail = f"{crossing:.0%} of its area depends on how the crossings are read."
            yield entry.finding("self_crossing", detail, record, score=crossing)

    decoded = [a for a in decoded if not a.record.get("iscrowd")]
    if len(decoded) > PAIRED:
        detail = f"Of {len(decoded)} annotations only the first {PAIRED} were compared in pairs."
        yield entry.finding("overlapping", detail, severity="info")
    masks = [annotation.rle for annotation in decoded[:PAIRED]]
    overlaps = mask_util.iou(masks, masks, [0] * len(masks)) if len(masks) > 1 else np.zeros((0, 0))
    for i, j in np.argwhere(np.triu(overlaps, 1) > SAME_IOU).tolist():
        a, b, iou = decoded[i].record, decoded[j].record, float(overlaps[i, j])
        if a["category_id"] == b["category_id"]:
            pair = f"{a.get('id')} and {b.get('id')}"
            detail = f"Annotations {pair} overlap with an IoU of {iou:.2f}."
            yield entry.finding("overlapping", detail, a, score=iou)


def _crossing(segmentation: object) -> float:
    """Largest share of a polygon's area that is inside by one way of reading it and not by another:
    the signed areas of a line's loops cancel out where it crosses itself, not where it touches."""
    import shapely

    worst = 0.0
    for polygon in segmentation if isinstance(segmentation, list) else ():
        points = np.asarray(polygon, dtype=float).reshape(-1, 2)
        shape = shapely.Polygon(points)
        if not shapely.is_valid(shape):
            x, y = points.T
            signed = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
            covered = shapely.make_valid(shape, method="structure", keep_collapsed=False).area
            areas = signed, covered, shapely.make_valid(shape).area
            if any(areas):
                worst = max(worst, 1 - min(areas) / max(areas))
    return worst


def category_findings(categories: Iterable[dict], annotations: Iterable[dict]) -> Iterator[Finding]:
    """Yield categories of a data set with far fewer annotations than the largest one."""
    counts = Counter(str(annotation["category_id"]) for annotation in annotations)
    counts = {category["name"]: counts[str(category["id"])] for category in categories}
    largest = max(counts, key=counts.get, default=None)
    for name, count in counts.items():
        if count * IMBALANCE < counts[largest]:
            detail = f"{name}: {count} annotations, {largest}: {counts[largest]}."
            ratio = counts[largest] / count if count else None
            yield Finding("class_imbalance", (), (), detail, score=ratio)


def repeated_id_findings(entries: Iterable[Entry]) -> Iterator[Finding]:
    """Yield annotations of one file that share an id: Detectron2 does not load such a file."""
    sharing = defaultdict(list)
    for entry in entries:
        for annotation in entry.annotations:
            if annotation.get("id") is not None:
                sharing[entry.split, annotation["id"]].append(entry.name)
    for (split, number), sharers in sharing.items():
        if len(sharers) > 1:
            names = tuple(dict.fromkeys(sharers))
            detail = f"{len(sharers)} annotations have the id {number!r}; give each its own."
            splits = (split,) * len(names)
            number = whole_id({"id": number})
            yield Finding("malformed", names, splits, detail, annotation_id=number)


@dataclass(frozen=True)
class Examined:
    """What one image shows without the others."""

    entry: Entry
    measures: ImageMeasures | None  # None where the image cannot be read
    annotations: list[DecodedAnnotation]  # those that cover something
    findings: list[Finding]


def _examine(entry: Entry, category_ids: set | None) -> Examined:
    """Examine an image, and its annotations where the ids of the categories are given."""
    findings, measures, view = [], None, None
    width, height = entry.record.get("width"), entry.record.get("height")
    try:
        file = inspect_image(entry.path)
        image = read_image(entry.path)
        view = find_view(image)
        measures = measure_image(image, view, file.sha256)
    except BadInputError as error:
        kind = "unreadable" if entry.path.exists() else "missing_file"
        findings.append(entry.finding(kind, f"It {error.reason}."))
    else:
        width, height = (width or file.width), (height or file.height)
        try:
            if annotated_on_stored_pixels(file, width, height):
                view = None
        except BadInputError as error:
            findings.append(entry.finding("wrong_size", f"It {error.reason}."))
            view = None
    annotations = []
    try:
        height, width = check_size(height, width)
    except ValueError:  # a finding of the image, which is another or missing
        category_ids = None
    if category_ids is not None:
        annotations, malformed = decode_annotations(entry, width, height, category_ids)
        findings += malformed
        if view is not None:
            findings += annotation_findings(entry, annotations, view.with_insets)
    return Examined(entry, measures, annotations, findings)


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
    """Yield images that are black, blurred, over-exposed or of an unusual colour compared with the
    others."""
    readable = [(image.entry, image.measures) for image in examined if image.measures is not None]
    colours = np.array([m.colour[1:] for _, m in readable if m.brightness >= BLACK]).reshape(-1, 2)
    median = np.median(colours, axis=0) if len(colours) else np.zeros(2)
    # the robust standard deviation of the distances from the median
    spread = 1.4826 * np.median(np.hypot(*(colours - median).T)) if len(colours) else 0.0
    for entry, measures in readable:
        if measures.brightness < BLACK:
            detail = f"95 % of it are darker than {measures.brightness:.0f} of 255."
            yield entry.finding("black_frame", detail, score=measures.brightness)
            continue  # nothing else can be seen
        if measures.blur > BLURRED:
            detail = f"Blur effect {measures.blur:.2f}, where 0 is sharp and 1 blurred."
            yield entry.finding("blur", detail, score=measures.blur)
        if measures.white > WHITE_SHARE:
            detail = f"{measures.white:.0%} of the view are white."
            yield entry.finding("overexposed", detail, score=measures.white)
            continue  # white has no colour
        distance = float(np.hypot(*(np.array(measures.colour[1:]) - median)))
        if measures.chroma < GRAY_CHROMA:
            detail = "It is grey, or nearly so."
        elif distance < max(CAST * spread, CAST_DISTANCE):
            continue
        elif measures.red_minus_blue < 0:
            detail = (
                "There is more blue in it than red: mucosa is red, were the channels exchanged?"
            )
        else:
            detail = f"Its mean colour is {distance:.0f} from the others' in CIELAB."
        yield entry.finding("colour", detail, score=distance)


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that show the same."""

    a: int  # place among the entries
    b: int  # a < b
    kind: str  # "exact_duplicate" or "near_duplicate"
    correlation: float  # of the aligned images; 1 of exact duplicates
    detail: str


def exact_duplicates(examined: Sequence[Examined]) -> list[DuplicatePair]:
    """Return images with the same bytes or the same pixels, each with the one before it."""
    pairs = []
    for copies in _by_pixels(examined).values():
        for a, b in pairwise(copies):
            same_files = examined[a].measures.file_hash == examined[b].measures.file_hash
            detail = f"The {'files' if same_files else 'pixels'} are the same."
            pairs.append(DuplicatePair(a, b, "exact_duplicate", 1.0, detail))
    return sorted(pairs, key=lambda pair: (pair.a, pair.b))


def _by_pixels(examined: Sequence[Examined]) -> dict[str, list[int]]:
    """Positions of the images with the same pixels."""
    return positions(image.measures.pixel_hash if image.measures else None for image in examined)


def near_duplicates(examined: Sequence[Examined]) -> list[DuplicatePair]:
    """Return images that show the same scene, exact duplicates left out."""
    places = [i for i, image in enumerate(examined) if image.measures is not None]
    pairs = []
    for pair in find_near_duplicates([examined[i].entry.path for i in places]):
        a, b = places[pair.a], places[pair.b]
        if examined[a].measures.pixel_hash != examined[b].measures.pixel_hash:
            detail = f"Aligned with each other, they correlate with {pair.correlation:.2f}."
            pairs.append(DuplicatePair(a, b, "near_duplicate", pair.correlation, detail))
    return pairs


# What a processor writes on all its images is one finding; a name in a few of them is another.
_USUAL_SHARE, _USUAL_IMAGES = 0.1, 5  # of a centre, that have a line at the same place
_CELLS = 40  # of a side; lines begin at the same place if they begin in adjacent cells


def overlay_findings(examined: Sequence[Examined]) -> Iterator[Finding]:
    """Yield each centre whose images have writing at the same place next to the view, with an
    example, and each image with writing where hardly another of its centre has any."""
    names = (image.entry.record.get("centre") for image in examined)
    centres = positions("" if name is None else str(name) for name in names)
    for centre, places in centres.items():
        images = [examined[i] for i in places if examined[i].measures is not None]
        having = defaultdict(set)  # images with a line that begins in or next to a cell
        cells = [_text_cells(image.measures) for image in images]
        for number, lines in enumerate(cells):
            for x, y in lines:
                for cell in product((x - 1, x, x + 1), (y - 1, y, y + 1)):
                    having[cell].add(number)
        least = max(_USUAL_IMAGES, _USUAL_SHARE * len(images))
        usual = []
        for image, lines in zip(images, cells, strict=True):
            unusual = sum(len(having[cell]) < least for cell in lines)
            if unusual:
                detail = f"{unusual} lines that look like writing: it was not read."
                yield image.entry.finding("text_outside_view", detail, score=float(unusual))
            if unusual < len(lines):
                usual.append(image)
        if usual:
            name = f" of centre {centre}" if centre != "" else ""
            detail = f"{len(usual)} of {len(images)} images{name} have writing at the same places, "
            detail += "as a processor adds it. This is one of them."
            yield usual[0].entry.finding("overlay", detail, score=float(len(usual)))


def _text_cells(measures: ImageMeasures) -> list[tuple[int, int]]:
    """Where the lines of writing begin, in cells of the image."""
    width, height = measures.width, measures.height
    return [(_CELLS * x // width, _CELLS * y // height) for x, y, *_ in measures.text]


def contradiction_findings(
    examined: Sequence[Examined], pairs: Iterable[DuplicatePair]
) -> Iterator[Finding]:
    """Yield duplicates with different labels: another class of the image, a lesion in one only, or
    other masks on the same pixels."""
    for pair in pairs:
        a, b = examined[pair.a], examined[pair.b]
        if reason := _contradiction(a, b, pair.kind == "exact_duplicate"):
            names, splits = zip(*((e.entry.name, e.entry.split) for e in (a, b)), strict=True)
            detail = f"{pair.detail} {reason}"
            severity = "error" if pair.kind == "exact_duplicate" else ""
            kind = "contradicting_labels"
            yield Finding(kind, names, splits, detail, severity, score=pair.correlation)


def _contradiction(a: Examined, b: Examined, same_pixels: bool) -> str:
    """What is contradictory in the labels of two images that show the same; "" for nothing."""
    classes = [
        sorted({str(annotation.get("category_id")) for annotation in image.entry.annotations})
        for image in (a, b)
    ]
    if not classes[0] and not classes[1]:
        return ""
    if not classes[0] or not classes[1]:
        return f"{(a, b)[not classes[1]].entry.name} has no annotation, the other one has."
    if classes[0] != classes[1]:
        return f"Their classes differ: {', '.join(classes[0])} and {', '.join(classes[1])}."
    masks = [mask_util.merge([d.rle for d in image.annotations]) for image in (a, b)]
    if same_pixels and all(masks) and masks[0]["size"] == masks[1]["size"]:
        iou = float(mask_util.iou([masks[0]], [masks[1]], [0])[0, 0])
        if iou < SAME_IOU:
            return f"Their masks overlap with an IoU of {iou:.2f} only."
    return ""


def duplicate_findings(
    entries: Sequence[Entry], pairs: Iterable[DuplicatePair]
) -> Iterator[Finding]:
    """Yield a finding for each pair; an error where it crosses splits."""
    for pair in pairs:
        a, b = entries[pair.a], entries[pair.b]
        severity, detail = "warning", pair.detail
        if a.split != b.split:
            severity, detail = "error", f"{detail} They are in {a.split} and {b.split}."
        names, splits = (a.name, b.name), (a.split, b.split)
        yield Finding(pair.kind, names, splits, detail, severity, score=pair.correlation)


def patient_findings(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Yield patients whose images are in several splits."""
    for patient, places in positions(e.record.get("patient_id") for e in entries).items():
        splits = tuple(entries[i].split for i in places)
        if len(set(splits)) > 1:
            counts = ", ".join(f"{count} in {split}" for split, count in Counter(splits).items())
            detail = f"Patient {patient} has {len(places)} images: {counts}."
            names = tuple(entries[i].name for i in places)
            yield Finding("patient_across_splits", names, splits, detail)


def groups(entries: Sequence[Entry], pairs: Iterable[DuplicatePair]) -> list[list[int]]:
    """Return positions of images that must stay together: duplicates and those of one unit."""
    units = positions(units_of([entry.record for entry in entries])).values()
    return joined_groups(len(entries), [*((pair.a, pair.b) for pair in pairs), *units])


@dataclass
class Audit:
    """The result of an audit."""

    data: AuditedData
    examined: list[Examined]  # in the order of ``data.entries``
    duplicates: list[DuplicatePair]
    findings: list[Finding]  # by kind, then severity, then score, the strongest first
    notes: list[str] = field(default_factory=list)  # what was not checked, and why
    checked: tuple[str, ...] = ("files", "annotations", "leakage")  # keys of `AREAS`
    embeddings: np.ndarray | None = None  # of the images that can be read, in their order

    @property
    def readable(self) -> list[int]:
        """Places of the images that can be read."""
        return [i for i, image in enumerate(self.examined) if image.measures is not None]

    @property
    def flagged(self) -> set[tuple[str, str]]:
        """(split, name) of the images that an error or a warning is about."""
        return {place for f in self.findings if f.flags for place in f.places}

    def images_of(self, kind: str) -> set[tuple[str, str]]:
        """(split, name) of the images that findings of a kind are about."""
        return {
            place for finding in self.findings if finding.kind == kind for place in finding.places
        }

    def counts(self) -> dict[str, Counter]:
        """Return counts by kind and severity, in the order of the kinds that were found."""
        counts = {kind: Counter() for kind in KINDS}
        for finding in self.findings:
            counts[finding.kind][finding.severity] += 1
        return {kind: severities for kind, severities in counts.items() if severities}

    def add(self, findings: Iterable[Finding], *areas: str) -> None:
        """Add findings, and the further areas that were checked for them."""
        self.checked += areas
        self.findings = sorted([*self.findings, *findings], key=lambda finding: finding.rank)


def audit(data: AuditedData) -> Audit:
    """Check files, annotations, duplicates and leakage.

    Raises:
        ModuleNotFoundError: a package of the extra [audit] is missing.
    """
    category_ids = None if data.classified else {category["id"] for category in data.categories}
    examine = functools.partial(_examine, category_ids=category_ids)
    examined = in_threads(examine, data.entries, "Examining")
    result = Audit(data, examined, [], [])
    result.duplicates = exact_duplicates(examined) + near_duplicates(examined)

    findings = [finding for image in examined for finding in image.findings]
    for file, annotation in data.strays:
        detail = f"{file}: there is no image with id {annotation['image_id']!r}."
        number = whole_id(annotation)
        findings.append(Finding("malformed", (), (), detail, annotation_id=number))
    annotations = [annotation for entry in data.entries for annotation in entry.annotations]
    findings += repeated_id_findings(data.entries)
    findings += file_findings(examined)
    findings += category_findings(data.categories, annotations)
    findings += overlay_findings(examined)
    findings += duplicate_findings(data.entries, result.duplicates)
    findings += contradiction_findings(examined, result.duplicates)
    findings += patient_findings(data.entries)
    result.add(findings)
    return result
