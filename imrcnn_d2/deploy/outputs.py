"""What is written of each input: COCO records, overlays, masks and LabelMe files."""

import errno
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from imrcnn_d2.data.endoscope_view import View
from imrcnn_d2.data.formats.labelme import labelme_document
from imrcnn_d2.data.masks import patch_rle, without_parts
from imrcnn_d2.deploy.inputs import Frame, Source, VideoWriter, input_key
from imrcnn_d2.utils.files import file_sha256, write_atomically

if TYPE_CHECKING:
    from imrcnn_d2.deploy.batch import Journal
    from imrcnn_d2.deploy.predictor import Predictor

# Folders, and the suffixes of their files.
OUTPUTS = {"overlays": (".jpg", ".mp4"), "masks": (".png",), "labelme": (".json", ".png")}
JPEG_QUALITY = 92
LONGEST_NAME = 255 - len(".json.tmp")  # bytes, as nearly all file systems have it
# Errors that the name of the input causes, or a file of the user of the same name.
_NAME_ERRORS = {
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)
}
CONTOUR = (240, 228, 66)  # Okabe and Ito's yellow, which no mucosa has
HALO = (0, 0, 0)
NO_ALARM = (255, 255, 255)
FONT_SHARE = 26  # of the image's smaller side
SMALLEST_FONT = 9
LEAST_SCORE = 0.3  # of detections that another predictor must have too
LEAST_IOU = 0.5  # of two detections that are taken for the same


def records(
    predictor: "Predictor", output, height: int, width: int, view: View | None = None
) -> list[dict]:
    """COCO annotations without ids, by falling score: ``category_id`` (class index + 1), ``bbox``
    (xywh in pixels), ``score``, ``segmentation`` (compressed RLE) and ``area``. Of a classification
    model one for the whole image: ``category_id`` of the likeliest class, its ``score``, and the
    ``probabilities`` of all. Where the predictor has a map of scores, ``raw_score`` and
    ``raw_probabilities`` are those of the network. Parts of other detections are left out where the
    predictor has ``suppress_parts``. The output of ``predictor.forward`` is used up.
    """
    if not predictor.task.localises:
        raw = output.tolist()
        best = raw.index(max(raw))
        values = predictor.finish(output, height, width).tolist()
        annotation = {"category_id": best + 1, "score": values[best], "probabilities": values}
        if predictor.score_map is not None:
            annotation |= {"raw_score": raw[best], "raw_probabilities": raw}
        return [annotation]
    annotations = []
    instances, patches = predictor.scaled(output, height, width, view)
    columns = {"category_id": (instances.pred_classes + 1).tolist()}
    columns |= {"bbox": instances.pred_boxes.tensor.tolist(), "score": instances.scores.tolist()}
    if instances.has("raw_scores"):
        columns["raw_score"] = instances.raw_scores.tolist()
    for values in zip(*columns.values(), strict=True):
        annotation = dict(zip(columns, values, strict=True))
        x0, y0, x1, y1 = annotation["bbox"]
        annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        if predictor.has_masks:
            patch, left, top = next(patches)
            rle = patch_rle(patch.numpy(), left, top, height, width)
            annotation["segmentation"] = {**rle, "counts": rle["counts"].decode()}
            annotation["area"] = float(mask_util.area(rle))
        else:
            annotation["area"] = (x1 - x0) * (y1 - y0)
        annotations.append(annotation)
    return without_parts(annotations) if predictor.suppress_parts else annotations


def frame_record(name: str, frame: Frame) -> dict:
    """COCO image record, without an id, of a frame of an input. Of one of several frames,
    ``file_name`` ends in "#" and its number, which ``frame`` repeats next to ``time`` (seconds, or
    None) and ``sequence_id``, the name without its suffix. ``view`` is the box (xywh) that the
    network saw, if not all.
    """
    height, width = frame.image.shape[:2]
    record = {"file_name": name, "width": width, "height": height}
    if frame.number is not None:
        seconds = None if frame.time is None else float(frame.time)
        record |= {"file_name": f"{name}#{frame.number:06d}", "frame": frame.number}
        record |= {"time": seconds, "sequence_id": _without_suffix(name)}
    if frame.view is not None:
        x0, y0, x1, y1 = frame.view.box
        record["view"] = [x0, y0, x1 - x0, y1 - y0]
    return record


def coco_head(metadata: dict, classes: list[str]) -> dict:
    """``info`` and ``categories`` of a COCO file with a `Predictor`'s predictions."""
    description = "Predictions of research software, not for diagnosis."
    if metadata.get("tau") is None:
        description += " Each image has the class of the highest probability; there is no tau."
    else:
        description += " All detections are listed; those with a score of at least tau are used."
    if "suppress_parts" in metadata:
        description += " Those that lie inside others are left out."
    if "alarm_rule" in metadata:
        description += " Of these, in a video, those of `alarm` true are alarms by alarm_rule."
    if "score_map" in metadata:
        description += " Scores are probabilities, by score_map; raw scores are the network's."
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    return {"info": {"description": description, **metadata}, "categories": categories}


def above_threshold(annotations: list[dict], tau: float | None) -> list[dict]:
    """Detections with a score of at least ``tau``, and classes of images, which have no ``tau``."""
    return [a for a in annotations if "probabilities" in a or a["score"] >= tau]


def label_map(annotations: list[dict], height: int, width: int) -> np.ndarray:
    """(H, W) uint8: the ``category_id`` with the highest score at each pixel, 0 for none."""
    labels = np.zeros((height, width), np.uint8)
    for annotation in sorted(annotations, key=lambda annotation: annotation["score"]):
        mask = mask_util.decode(annotation["segmentation"]).astype(bool)
        labels[mask] = annotation["category_id"]
    return labels


def draw_overlay(
    image: np.ndarray, annotations: list[dict], classes: list[str], footer: str
) -> np.ndarray:
    """A copy of an (H, W, 3) RGB uint8 image with the annotations' contours, or boxes, each with
    its class and score; or with the class of the image; and with a `footer`. Detections that are no
    alarm have a thin white contour and no text.
    """
    overlay = np.ascontiguousarray(image).copy()
    height, width = overlay.shape[:2]
    thickness = max(1, round(min(height, width) / 240))
    labels = []
    for annotation in annotations:
        text = f"{classes[annotation['category_id'] - 1]} {annotation['score']:.2f}"
        if "bbox" not in annotation:
            labels.append((text, 0.02 * width, 0.02 * height))
            continue
        lines = contours(annotation)
        if not annotation.get("alarm", True):
            cv2.polylines(overlay, lines, True, NO_ALARM, max(1, thickness // 2), cv2.LINE_AA)
            continue
        for color, wider in ((HALO, 2), (CONTOUR, 0)):
            cv2.polylines(overlay, lines, True, color, thickness + wider, cv2.LINE_AA)
        labels.append((text, *annotation["bbox"][:2]))
    return _draw_texts(overlay, labels, footer)


def contours(annotation: dict) -> Sequence[np.ndarray]:
    """A detection's closed lines, (K, 1, 2) int32 in pixels (x, y); its box if it has no mask."""
    if "segmentation" in annotation:
        mask = mask_util.decode(annotation["segmentation"])
        return cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    x, y, width, height = annotation["bbox"]
    corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]
    return [np.rint(corners).astype(np.int32)[:, None]]


def _draw_texts(overlay, labels, footer):
    """Last, so that no contour crosses them."""
    height, width = overlay.shape[:2]
    size = max(SMALLEST_FONT, min(height, width) // FONT_SHARE)
    font = _font(size)
    small = _font(max(SMALLEST_FONT, int(0.8 * size)))
    share = small.getlength(footer) / (0.97 * width)
    if share > 1:  # it has to be seen whole, however narrow the image is
        small = _font(max(1, int(small.size / share)))
    strip = min(height, int(1.5 * small.size))
    overlay[height - strip :] //= 3
    image = Image.fromarray(overlay)
    draw = ImageDraw.Draw(image)
    stroke = max(1, size // 8)
    taken = []
    for text, x, y in labels:
        length = draw.textlength(text, font)
        x = min(max(x, stroke), max(stroke, width - length - stroke))
        y = max(y - 1.4 * size, stroke)
        while any(abs(y - v) < 1.2 * size and u - length < x < u + w for u, v, w in taken):
            y += 0.2 * size  # below other labels
        y = min(y, height - strip - 1.3 * size)
        taken.append((x, y, length))
        # White: of a video's yellow, H.264 keeps a quarter.
        draw.text((x, y), text, "white", font, stroke_width=stroke, stroke_fill=HALO)
    draw.text((0.015 * width, height - strip / 2), footer, "white", small, anchor="lm")
    return np.asarray(image)


@lru_cache
def _font(size):
    import matplotlib  # here, since it takes long

    # Its own: Pillow's has no letters but ASCII's.
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def footer(metadata: dict) -> str:
    """The line at the bottom of every overlay."""
    weights = (metadata["weights_sha256"] or "none")[:8]
    tau = "" if metadata["tau"] is None else f" · τ {metadata['tau']:.3g}"
    return f"Research use only, not for diagnosis · weights {weights}{tau}"


def comment(metadata: dict) -> str:
    """A `Predictor`'s metadata for those of an image file, as JSON."""
    return json.dumps({"software": "imrcnn-d2, research use only", **metadata})


def mask_png(annotations: list, size: tuple, classes: list[str], metadata: dict) -> bytes:
    """A PNG file of annotations: 0 is background; one class is 255, several are 1, 2, ..."""
    mask = label_map(annotations, *size)
    return png(mask * 255 if len(classes) == 1 else mask, metadata)  # 1 would not be visible


def labelme_json(annotations: list, path: str, size: tuple, classes: list, metadata: dict) -> str:
    """A LabelMe file of annotations; the image's path is relative to its folder."""
    # the class of a whole image is a flag
    flags = {classes[a["category_id"] - 1]: True for a in annotations if "probabilities" in a}
    names, fields = dict(enumerate(classes, start=1)), {**flags, "predicted_by": metadata}
    # a mask has no points to correct
    document = labelme_document(annotations, names, path, *size, fields=fields, fill_holes=True)
    return json.dumps(document, indent=2) + "\n"


def png(image: np.ndarray, metadata: dict) -> bytes:
    """A PNG file of a uint8 image, (H, W) or (H, W, 3) RGB."""
    info = PngInfo()
    info.add_text("Comment", comment(metadata))
    return encoded(image, "PNG", pnginfo=info)


def encoded(image: np.ndarray | Image.Image, image_format: str, **options) -> bytes:
    """An image in a format of Pillow's."""
    stream = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(stream, image_format, **options)
    return stream.getvalue()


class OutputFolder:
    """Where the files of each input go. Files of the user with such names stay, and are ``kept``.

    An input ``a/b.jpg`` gives ``masks/a/b.png`` and so on, each frame of a video ``v.mp4`` gives
    ``masks/v.mp4/000000.png``. If two inputs differ in their suffix only, or a folder has the name,
    the suffix is kept: ``masks/a/b.jpg.png``. A name that is still not free, or too long, is cut
    and gets a hash.
    """

    def __init__(
        self, folder: Path, kinds: Iterable, names: Iterable, taken: dict, predictor: "Predictor"
    ):
        """For ``kinds`` of ``OUTPUTS`` and the names of all inputs; ``taken`` maps the names of
        those with files in the folder to their `target`.
        """
        self.kinds, self.kept = tuple(kinds), []
        self.metadata, self.classes = predictor.metadata, predictor.classes
        self._folder, self._targets = folder, _targets(names, taken)

    def target(self, name: str) -> str:
        """The name of an input's files, without the suffix."""
        return self._targets.get(name) or _without_suffix(name)

    def path(self, kind: str, name: str, suffix: str, frame: int | None = None) -> Path:
        """The file of an input, or of a frame of it, never outside the folder."""
        stem = self.target(name) if frame is None else f"{name}/{frame:06d}"
        return self._folder / kind / f"{stem}{suffix}"


def _targets(names: Iterable[str], taken: dict[str, str]) -> dict[str, str]:
    """By name: the first `_candidate` that no other input and no folder of others has."""
    everything = {*names, *taken}
    folders = {path.as_posix() for name in everything for path in PurePosixPath(name).parents}
    suffixes = {suffix for group in OUTPUTS.values() for suffix in group}
    files = {target + suffix for target in taken.values() for suffix in suffixes}
    taken_targets = set(taken.values())
    # A name without a suffix is the whole name at once.
    number = {n: int(_without_suffix(n) == n) for n in everything - taken.keys()}

    def clashes(name, target):
        path = PurePosixPath(target)
        return (
            (counts[target] > 1 if number[name] == 0 else target in taken_targets)
            or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts)
            or any(target + suffix in folders for suffix in suffixes)
            or any(parent.as_posix() in files for parent in path.parents)
        )

    while True:
        targets = {name: _candidate(name, n) for name, n in number.items()}
        counts = Counter([*taken.values(), *targets.values()])
        clashing = [n for n, target in targets.items() if number[n] < 2 and clashes(n, target)]
        if not clashing:
            return {**targets, **taken}
        for name in clashing:
            number[name] += 1


def _candidate(name: str, number: int) -> str:
    """0: the name without its suffix; 1: the whole name; 2: a unique one."""
    if number < 2:
        return name if number else _without_suffix(name)
    stem = PurePosixPath(name).stem
    while len(os.fsencode(stem)) > LONGEST_NAME // 2:
        stem = stem[:-1]
    return f"{stem}-{input_key(name)}"


def _without_suffix(name):
    return PurePosixPath(name).with_suffix("").as_posix()


class InputOutputs:
    """The files of one input, each written whole or not at all, and never over another; entering it
    deletes those of before it changed. Its pixels reach an output only if ``show_pixels``. Where
    its name keeps files from being written, ``error`` says why; this stops no other input.
    """

    def __init__(self, folder: OutputFolder, source: Source, journal: "Journal", show_pixels: bool):
        self._folder, self._source, self._journal = folder, source, journal
        self._kinds = folder.kinds if show_pixels else set(folder.kinds) & {"masks"}
        self._video = self._video_path = self.error = None

    def __enter__(self):
        self._journal.begin(self._source.name)
        return self

    def __exit__(self, *error):
        if self._video is None:
            return
        if self.error is not None:
            error = (OSError, OSError(self.error), None)
        self._video.__exit__(*error)
        if error[0] is None:
            self._journal.add_file(self._video_path, file_sha256(self._video_path))

    def add(self, frame: Frame, annotations: list[dict]) -> None:
        """Writes the files of a frame. An OSError concerns all inputs, and not this one's name."""
        if self.error is not None:
            return
        metadata, classes = self._folder.metadata, self._folder.classes
        shown = above_threshold(annotations, metadata["tau"])
        try:
            if "overlays" in self._kinds:
                self._add_overlay(frame, shown)
            if "masks" in self._kinds:
                path = self._folder.path("masks", self._source.name, ".png", frame.number)
                self._write(path, mask_png(shown, frame.image.shape[:2], classes, metadata))
            # Of a video only frames with detections, since each is a file.
            if "labelme" in self._kinds and (shown or frame.number is None):
                self._add_labelme(frame, shown)
        except OSError as error:
            if error.errno in _NAME_ERRORS:
                self.error = f"its files cannot be written ({error.strerror}): rename it"
            elif error.errno is None:  # of an encoder, of what its format cannot hold
                height, width = frame.image.shape[:2]
                self.error = f"no overlay of {width}x{height} pixels ({error}): scale it down"
            else:
                raise

    def _add_overlay(self, frame, shown):
        metadata, classes = self._folder.metadata, self._folder.classes
        if frame.time is not None and self._video_path is None:
            self._video_path = self._folder.path("overlays", self._source.name, ".mp4")
            if self._is_free(self._video_path):
                self._video = VideoWriter(
                    self._video_path, time_base=frame.time_base, comment=comment(metadata)
                )
        if frame.time is not None and self._video is None:
            return
        overlay = draw_overlay(frame.image, shown, classes, footer(metadata))
        if frame.time is not None:
            self._video.write(overlay, frame.time, frame.pixel_aspect)
        else:
            path = self._folder.path("overlays", self._source.name, ".jpg", frame.number)
            options = {"quality": JPEG_QUALITY, "comment": comment(metadata).encode()}
            self._write(path, encoded(overlay, "JPEG", **options))

    def _add_labelme(self, frame, shown):
        metadata, classes = self._folder.metadata, self._folder.classes
        path = self._folder.path("labelme", self._source.name, ".json", frame.number)
        if not self._is_free(path):
            return
        if self._source.kind == "image":
            image_path = os.path.relpath(self._source.path, path.parent.resolve())
        else:
            self._write(path.with_suffix(".png"), png(frame.image, metadata))
            image_path = path.with_suffix(".png").name
        document = labelme_json(shown, image_path, frame.image.shape[:2], classes, metadata)
        self._write(path, document.encode())

    def _write(self, path, content):
        if self._is_free(path):
            self._journal.add_file(path, hashlib.sha256(content).hexdigest())
            write_atomically(path, content)

    def _is_free(self, path):
        """Whether the path is free. If not, the file is the user's: ours was deleted before."""
        if not self._journal.holds(path):
            raise NotADirectoryError(errno.ENOTDIR, "a link leads out of the folder", str(path))
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has the name", str(path))
        if os.path.lexists(path):
            self._folder.kept.append(path)
            return False
        return True


@dataclass(frozen=True)
class Differences:
    """The differences between two predictors, a reference and another, in what their networks give:
    scores are raw ones. Of a classification model, images count as detections.
    """

    images: int
    detections: int  # with a score of at least 0.3 from either
    # Detections that the other predictor lacks (box IoU of 0.5, same class): of two boxes that
    # overlap by about NMS_THRESH_TEST, a rounding decides which one stays.
    unmatched: int
    # Unmatched detections that are above the reference's tau by the mapped score, if there is one.
    lost: int
    scores: np.ndarray  # difference of scores, or the largest of the classes' probabilities
    boxes: np.ndarray  # largest difference of the sides, in percent of the image's longer side
    mask_ious: np.ndarray  # empty where there are no masks

    def largest(self, share: float = 1.0) -> tuple[float, float, float]:
        """Bounds that hold for this share of pairs: of scores, of boxes, and the least mask IoU."""
        score, box = (
            float(np.quantile(values, share, method="higher")) if len(values) else 0.0
            for values in (self.scores, self.boxes)
        )
        ious = self.mask_ious
        iou = float(np.quantile(ious, 1 - share, method="lower")) if len(ious) else 1.0
        return score, box, iou

    def exceeded(
        self, *, lost: float, unmatched: float, score: float, box: float, mask_iou: float, share=1.0
    ) -> list[str]:
        """A sentence for each bound that is exceeded: ``lost`` and ``unmatched`` are in percent of
        the detections, the others have to hold for a ``share`` of the pairs, see `largest`.
        """
        percent = 100 / max(self.detections, 1)
        largest_score, largest_box, least_iou = self.largest(share)
        checks = {  # NaN is beyond any bound
            f"{self.lost} above τ are in one of the two only, over {lost:g} %": (
                percent * self.lost <= lost
            ),
            f"{percent * self.unmatched:.3g} % are in one of the two only, over {unmatched:g} %": (
                percent * self.unmatched <= unmatched
            ),
            f"scores differ by {largest_score:.3g}, more than {score:g}": largest_score <= score,
            f"boxes differ by {largest_box:.3g} %, more than {box:g} %": largest_box <= box,
            f"masks overlap {least_iou:.3g}, less than {mask_iou:g}": least_iou >= mask_iou,
        }
        return [text for text, holds in checks.items() if not holds]


def compare_records(
    reference: list[list[dict]], other: list[list[dict]], sizes: list, tau: float | None
) -> Differences:
    """Compares the predictions of two models in the same images, see `records`, with the images'
    (height, width), and the threshold of scores, None of classification models.
    """
    scores, boxes, ious = [], [], []
    detections, unmatched = 0, []
    for in_reference, in_other, size in zip(reference, other, sizes, strict=True):
        if tau is None:
            detections += 1
            both = in_reference[0], in_other[0]
            first, second = (np.array(_raw(a, "probabilities")) for a in both)
            scores.append(float(abs(first - second).max()))
            continue
        pairs, missing = _match(in_reference, in_other)
        detections += len(pairs) + len(missing)
        unmatched += missing
        for first, second in pairs:
            scores.append(abs(_raw(first, "score") - _raw(second, "score")))
            boxes.append(100 * abs(_corners(first) - _corners(second)).max() / max(size))
            if "segmentation" in first:
                masks = [first["segmentation"], second["segmentation"]]
                # a thin box can hold no pixel's centre
                is_empty = not mask_util.area(masks).any()
                ious.append(1.0 if is_empty else mask_util.iou(masks[:1], masks[1:], [0])[0, 0])
    lost = 0 if tau is None else len(above_threshold(unmatched, tau))
    values = map(np.array, (scores, boxes, ious))
    return Differences(len(sizes), detections, len(unmatched), lost, *values)


def _raw(annotation, key):
    return annotation.get(f"raw_{key}", annotation[key])


def _corners(annotation):
    x, y, width, height = annotation["bbox"]
    return np.array([x, y, x + width, y + height])


def _match(reference, other):
    """Pairs of the same detections, by falling overlap, and those without a partner, if they
    matter. A detection of a small score may be the other's of a larger one.
    """
    both = reference, other
    boxes = [np.array([a["bbox"] for a in each]).reshape(-1, 4) for each in both]
    iou = np.asarray(mask_util.iou(*boxes, [0] * len(other))).reshape(len(reference), len(other))
    classes = [np.array([a["category_id"] for a in each]) for each in both]
    iou[classes[0][:, None] != classes[1]] = 0
    pairs, left = [], [set(range(len(each))) for each in both]
    for flat in np.argsort(-iou, axis=None, kind="stable"):
        i, j = map(int, np.unravel_index(flat, iou.shape))
        if iou[i, j] < LEAST_IOU:
            break
        if i in left[0] and j in left[1]:
            left[0].remove(i)
            left[1].remove(j)
            if max(_raw(reference[i], "score"), _raw(other[j], "score")) >= LEAST_SCORE:
                pairs.append((reference[i], other[j]))
    missing = [each[i] for each, rest in zip(both, left, strict=True) for i in rest]
    return pairs, [a for a in missing if _raw(a, "score") >= LEAST_SCORE]
