"""The pictures and files that are made of one input: overlays, masks, LabelMe."""

import errno
import hashlib
import io
import json
import os
from collections import Counter
from functools import lru_cache
from pathlib import Path, PurePosixPath

import cv2
import matplotlib
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from imrcnn_d2.data.formats.labelme import labelme_document
from imrcnn_d2.deploy.inputs import VideoWriter, input_key
from imrcnn_d2.utils.files import file_sha256, write_atomically

__all__ = [
    "OUTPUTS",
    "InputOutputs",
    "OutputFolder",
    "coco_head",
    "comment",
    "counted",
    "draw_overlay",
    "footer",
    "frame_record",
    "instance_records",
    "label_map",
    "labelme_json",
    "mask_png",
    "outline",
    "output_folders",
    "png",
    "records",
]


def instance_records(predictor, output, height, width, view=None):
    """
    Args:
        predictor (Predictor): of a detector.
        output (Instances): what its ``forward`` gave for an image; used up.
        height, width (int): of the original image.
        view (View or None): what of it the network saw.

    Returns:
        list[dict]: COCO annotations without ids, by falling score: ``category_id`` (class index
        + 1), ``bbox`` (xywh in pixels), ``score``, ``segmentation`` (compressed RLE) and ``area``.
    """
    records = []
    # One at a time: a hundred masks of a large image would fill the memory.
    for i in range(len(output)):
        finished = predictor.finish(output[i : i + 1], height, width, view)
        if not len(finished):  # a box without any extent
            continue
        x0, y0, x1, y1 = finished.pred_boxes.tensor[0].tolist()
        record = {
            "category_id": int(finished.pred_classes[0]) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(finished.scores[0]),
        }
        if finished.has("pred_masks"):
            mask = np.asfortranarray(finished.pred_masks[0].numpy(), dtype=np.uint8)
            rle = mask_util.encode(mask)
            record["segmentation"] = {"size": [height, width], "counts": rle["counts"].decode()}
            record["area"] = float(mask_util.area(rle))
        else:
            record["area"] = (x1 - x0) * (y1 - y0)
        records.append(record)
    return records


def frame_record(name, frame, view=None):
    """
    Args:
        name (str): of the input, as outputs call it.
        frame (Frame):
        view (View or None): what of it the network saw.

    Returns:
        dict: COCO image record without an id. Of a frame of several, ``file_name`` ends in its
        number, behind "#", and ``frame`` and ``time`` (seconds, or None) say it once more.
        ``view`` is the box [x, y, width, height] that the network saw, where it saw not all.
    """
    height, width = frame.image.shape[:2]
    record = {"file_name": name, "width": width, "height": height}
    if frame.number is not None:
        record["file_name"] = f"{name}#{frame.number:06d}"
        record["frame"] = frame.number
        record["time"] = None if frame.time is None else float(frame.time)
    if view is not None:
        x0, y0, x1, y1 = view.box
        record["view"] = [x0, y0, x1 - x0, y1 - y0]
    return record


def records(predictor, output, height, width, view=None):
    """
    Args:
        predictor (Predictor):
        output (Instances or Tensor): what its ``forward`` gave for an image; used up.
        height, width (int): of the original image.
        view (View or None): what of it the network saw.

    Returns:
        list[dict]: see :func:`instance_records`. Of a recognition model one COCO annotation of the
        whole image: ``category_id`` of the likeliest class (index + 1), its ``score``, and the
        ``probabilities`` of all.
    """
    if not predictor.is_classifier:
        return instance_records(predictor, output, height, width, view)
    values = output.tolist()
    score = max(values)
    return [{"category_id": values.index(score) + 1, "score": score, "probabilities": values}]


def coco_head(about, classes):
    """
    Args:
        about (dict), classes (list[str]): of the :class:`Predictor`.

    Returns:
        dict: the ``info`` and ``categories`` of a COCO file of its predictions.
    """
    return {
        "info": {
            "description": "Predictions of research software, not for diagnosis. All "
            "detections are listed; those with a score of at least tau count.",
            **about,
        },
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
    }


def counted(annotations, tau):
    """
    Args:
        annotations (list[dict]): of an image.
        tau (float or None): None where there is nothing but classes of images.

    Returns:
        list[dict]: detections with a score of at least ``tau``, and the class of an image.
    """
    return [a for a in annotations if "probabilities" in a or a["score"] >= tau]


def label_map(annotations, height, width):
    """
    Args:
        annotations (list[dict]): of an image, with a ``segmentation``.
        height, width (int): of the image.

    Returns:
        np.ndarray: (H, W) uint8, ``category_id`` of the highest score at each pixel, 0 for none.
    """
    ret = np.zeros((height, width), np.uint8)
    for annotation in sorted(annotations, key=lambda annotation: annotation["score"]):
        ret[mask_util.decode(annotation["segmentation"]).astype(bool)] = annotation["category_id"]
    return ret


OUTLINE = (240, 228, 66)  # Okabe and Ito's yellow, which no mucosa has
HALO = (0, 0, 0)
FONT_SHARE = 26  # of the image's smaller side
SMALLEST_FONT = 9


def draw_overlay(image, annotations, classes, footer):
    """
    Outline what counts, each with its class and score; boxes where there are no masks; for a
    recognition model, the class of the image.

    Args:
        image (np.ndarray): (H, W, 3) RGB, uint8; left as it is.
        annotations (list[dict]): of the image, see :func:`instance_records` and
            :func:`classification_records`; only those to be shown.
        classes (list[str]): names, by ``category_id`` - 1.
        footer (str): a line at the bottom, which says what the picture is not for.

    Returns:
        np.ndarray: (H, W, 3) RGB, uint8.
    """
    picture = np.ascontiguousarray(image).copy()
    height, width = picture.shape[:2]
    thickness = max(1, round(min(height, width) / 240))
    labels = []
    for annotation in annotations:
        text = f"{classes[annotation['category_id'] - 1]} {annotation['score']:.2f}"
        if "bbox" not in annotation:
            labels.append((text, 0.02 * width, 0.02 * height))
            continue
        lines = outline(annotation)
        for color, wider in ((HALO, 2), (OUTLINE, 0)):
            cv2.polylines(picture, lines, True, color, thickness + wider, cv2.LINE_AA)
        x, y = annotation["bbox"][:2]
        labels.append((text, x, y))
    return _write(picture, labels, footer)


def outline(annotation):
    """
    Args:
        annotation (dict): of a detection; its ``bbox`` is taken where it has no mask.

    Returns:
        sequence of np.ndarray: closed lines, (K, 1, 2) int32, in pixels (x, y).
    """
    if "segmentation" in annotation:
        mask = mask_util.decode(annotation["segmentation"])
        return cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    x, y, width, height = annotation["bbox"]
    corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]
    return [np.rint(corners).astype(np.int32)[:, None]]


def _write(picture, labels, footer):
    """Texts last, so that no outline crosses them."""
    height, width = picture.shape[:2]
    size = max(SMALLEST_FONT, min(height, width) // FONT_SHARE)
    font = _font(size)
    small = _font(max(SMALLEST_FONT, int(0.8 * size)))
    share = small.getlength(footer) / (0.97 * width)
    if share > 1:  # it has to be seen whole, however narrow the image is
        small = _font(max(1, int(small.size / share)))
    strip = min(height, int(1.5 * small.size))
    picture[height - strip :] //= 3
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    stroke = max(1, size // 8)
    taken = []
    for text, x, y in labels:
        long = draw.textlength(text, font)
        x = min(max(x, stroke), max(stroke, width - long - stroke))
        y = max(y - 1.4 * size, stroke)
        while any(abs(y - v) < 1.2 * size and u - long < x < u + w for u, v, w in taken):
            y += 0.2 * size  # below what is there
        y = min(y, height - strip - 1.3 * size)
        taken.append((x, y, long))
        # White: of a video's yellow, H.264 keeps a quarter.
        draw.text((x, y), text, "white", font, stroke_width=stroke, stroke_fill=HALO)
    draw.text((0.015 * width, height - strip / 2), footer, "white", small, anchor="lm")
    return np.asarray(image)


@lru_cache
def _font(size):
    # Matplotlib's own: Pillow's has no letters but ASCII's.
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


# Folders, and the suffixes of what is in them.
OUTPUTS = {
    "overlays": (".jpg", ".mp4"),
    "masks": (".png",),
    "labelme": (".json", ".png"),
}
JPEG_QUALITY = 92
LONGEST_NAME = 255 - len(".json.tmp")  # bytes, as nearly all file systems have it
# What cannot be written because of how its input is called, or of what the user put there.
_OF_THE_NAME = {
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL),
}


def footer(about):
    """
    Args:
        about (dict): of a :class:`Predictor`.

    Returns:
        str: the line that every picture has at its bottom.
    """
    weights = (about["weights_sha256"] or "none")[:8]
    tau = "" if about["tau"] is None else f" · τ {about['tau']:.3g}"
    return f"Research use only, not for diagnosis · weights {weights}{tau}"


def comment(about):
    """
    Args:
        about (dict): of a :class:`Predictor`.

    Returns:
        str: what a picture's metadata say of it, as JSON.
    """
    return json.dumps({"software": "imrcnn-d2, research use only", **about})


def mask_png(annotations, height, width, classes, about):
    """
    Args:
        annotations (list[dict]): of an image, with a ``segmentation``; only those that count.
        height, width (int): of the image.
        classes (list[str]), about (dict): of the :class:`Predictor`.

    Returns:
        bytes: a PNG file: 0 is background; one class is 255, several are 1, 2, ...
    """
    mask = label_map(annotations, height, width)
    if len(classes) == 1:
        mask *= 255  # to be seen
    return png(mask, about)


def labelme_json(annotations, image_path, height, width, classes, about):
    """
    Args:
        annotations (list[dict]): of an image; only those that count.
        image_path (str): relative to where the file will lie.
        height, width (int): of the image.
        classes (list[str]), about (dict): of the :class:`Predictor`.

    Returns:
        str: a LabelMe file.
    """
    # the class of a whole image is a flag
    flags = {classes[a["category_id"] - 1]: True for a in annotations if "probabilities" in a}
    document = labelme_document(
        annotations,
        dict(enumerate(classes, start=1)),
        image_path,
        height,
        width,
        fields={**flags, "predicted_by": about},
        fill_holes=True,  # a mask has no points to correct
    )
    return json.dumps(document, indent=2) + "\n"


def png(image, about):
    """
    Args:
        image (np.ndarray): uint8, (H, W) or (H, W, 3) RGB.
        about (dict): of a :class:`Predictor`.

    Returns:
        bytes: a PNG file.
    """
    info = PngInfo()
    info.add_text("Comment", comment(about))
    return _encoded(image, "PNG", pnginfo=info)


def output_folders(folder):
    """list[Path]: those in a folder of outputs that pictures are in."""
    return [Path(folder) / kind for kind in OUTPUTS]


class OutputFolder:
    """
    Where the files of each input go.

    An input ``a/b.jpg`` gives ``overlays/a/b.jpg``, ``masks/a/b.png`` and ``labelme/a/b.json``; a
    video ``v.mp4`` gives ``overlays/v.mp4``, and for each frame ``masks/v.mp4/000000.png``. Where
    two inputs differ in nothing but their suffix, or a folder has the name, it is kept:
    ``masks/a/b.jpg.png``. What does not do either, or is too long, is cut and gets a hash.

    Attributes:
        kept (list[Path]): files of the user that had a name that was to be written, and stay.
    """

    def __init__(self, folder, wanted, about, classes, names, taken=None):
        """
        Args:
            folder (Path):
            wanted (iterable of str): of ``OUTPUTS``.
            about (dict), classes (list[str]): of the :class:`Predictor`.
            names (iterable of str): of all inputs.
            taken (dict[str, str] or None): names of inputs with files there -> :meth:`target`.
        """
        self.wanted, self.about, self.classes = tuple(wanted), about, classes
        self.comment = comment(about)
        self.kept = []
        self._folder = folder
        self._targets = _targets(names, taken or {})

    def target(self, name):
        """
        Args:
            name (str): of an input.

        Returns:
            str: its files' name, without the suffix.
        """
        return self._targets.get(name) or _without_suffix(name)

    def path(self, kind, name, suffix, frame=None):
        """
        Args:
            kind (str): of ``OUTPUTS``.
            name (str): of the input.
            suffix (str): of the file.
            frame (int or None): number, for a file of a single frame.

        Returns:
            Path: never outside the folder.
        """
        if frame is not None:
            return self._folder / kind / name / f"{frame:06d}{suffix}"
        return self._folder / kind / f"{self.target(name)}{suffix}"


def _targets(names, taken):
    """By name: the first of :func:`_candidate` that no other input and no folder of others has."""
    everything = {*names, *taken}
    folders = {path.as_posix() for name in everything for path in PurePosixPath(name).parents}
    suffixes = {suffix for group in OUTPUTS.values() for suffix in group}
    files = {target + suffix for target in taken.values() for suffix in suffixes}
    theirs = set(taken.values())
    # A name without a suffix is the whole at once.
    number = {n: int(_without_suffix(n) == n) for n in everything - taken.keys()}
    targets = {name: _candidate(name, n) for name, n in number.items()}

    def clashes(name, target):
        path = PurePosixPath(target)
        return (
            (counts[target] > 1 if number[name] == 0 else target in theirs)
            or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts)
            or any(target + suffix in folders for suffix in suffixes)
            or any(parent.as_posix() in files for parent in path.parents)
        )

    while True:
        counts = Counter([*taken.values(), *targets.values()])
        clashing = [n for n, target in targets.items() if number[n] < 2 and clashes(n, target)]
        if not clashing:
            return {**targets, **taken}
        for name in clashing:
            number[name] += 1
            targets[name] = _candidate(name, number[name])


def _candidate(name, number):
    """0: the name without its suffix; 1: the whole; 2: one that nothing else has."""
    if number < 2:
        return name if number else _without_suffix(name)
    stem = PurePosixPath(name).stem
    while len(os.fsencode(stem)) > LONGEST_NAME // 2:
        stem = stem[:-1]
    return f"{stem}-{input_key(name)}"


def _without_suffix(name):
    return PurePosixPath(name).with_suffix("").as_posix()


class InputOutputs:
    """
    The files of one input, each written whole or not at all, where no other is.

    Use as a context manager: entering it deletes those of what the input was before it changed;
    leaving it by an error deletes the video it was writing.

    Attributes:
        error (str or None): why they, or the rest of them, cannot be written: for how the input is
            called, which stops no other.
    """

    def __init__(self, to, source, journal, *, pictures=True):
        """
        Args:
            to (OutputFolder):
            source (Source):
            journal (Journal): of the same folder.
            pictures (bool): False if its pixels must not reach an output.
        """
        self._to, self._source, self._journal = to, source, journal
        self._wanted = to.wanted if pictures else set(to.wanted) & {"masks"}
        self._video = self._video_path = self.error = None

    def __enter__(self):
        self._journal.begin(self._source)
        return self

    def __exit__(self, *error):
        if self._video is None:
            return
        if self.error is not None:
            error = (OSError, OSError(self.error), None)
        self._video.__exit__(*error)
        if error[0] is None:
            self._journal.add_file(self._video_path, file_sha256(self._video_path))

    def add(self, frame, annotations):
        """
        Args:
            frame (Frame):
            annotations (list[dict]): what was found in it.

        Raises:
            OSError: nothing can be written, of no input.
        """
        if self.error is not None:
            return
        shown = counted(annotations, self._to.about["tau"])
        try:
            if "overlays" in self._wanted:
                self._add_overlay(frame, shown)
            if "masks" in self._wanted:
                self._add_mask(frame, shown)
            # Of a video only frames in which there is something: each is a file of its own.
            if "labelme" in self._wanted and (shown or frame.number is None):
                self._add_labelme(frame, shown)
        except OSError as error:
            if error.errno not in _OF_THE_NAME:
                raise
            self.error = f"its files cannot be written ({error.strerror}): rename it"

    def _add_overlay(self, frame, shown):
        to = self._to
        if frame.time is None:
            path = self._path("overlays", ".jpg", frame)
            picture = draw_overlay(frame.image, shown, to.classes, footer(to.about))
            options = {"quality": JPEG_QUALITY, "comment": to.comment.encode()}
            self._write(path, _encoded(picture, "JPEG", **options))
            return
        if self._video_path is None:
            self._video_path = to.path("overlays", self._source.name, ".mp4")
            if self._is_free(self._video_path):
                self._video = VideoWriter(
                    self._video_path, time_base=frame.time_base, comment=to.comment
                )
        if self._video is not None:
            picture = draw_overlay(frame.image, shown, to.classes, footer(to.about))
            self._video.write(picture, frame.time, frame.pixel_aspect)

    def _add_mask(self, frame, shown):
        to = self._to
        content = mask_png(shown, *frame.image.shape[:2], to.classes, to.about)
        self._write(self._path("masks", ".png", frame), content)

    def _add_labelme(self, frame, shown):
        to = self._to
        path = self._path("labelme", ".json", frame)
        if not self._is_free(path):
            return
        if self._source.kind == "image":
            image_path = os.path.relpath(self._source.path, path.parent.resolve())
        else:
            self._write(path.with_suffix(".png"), png(frame.image, to.about))
            image_path = path.with_suffix(".png").name
        size = frame.image.shape[:2]
        document = labelme_json(shown, image_path, *size, to.classes, to.about)
        self._write(path, document.encode())

    def _path(self, kind, suffix, frame):
        return self._to.path(kind, self._source.name, suffix, frame.number)

    def _write(self, path, content):
        if self._is_free(path):
            self._journal.add_file(path, hashlib.sha256(content).hexdigest())
            write_atomically(path, content)

    def _is_free(self, path):
        """Whether nothing is there yet. What is, is the user's: ours was deleted at the start."""
        if not self._journal.holds(path):
            raise NotADirectoryError(errno.ENOTDIR, "a link leads out of the folder", str(path))
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has the name", str(path))
        if os.path.lexists(path):
            self._to.kept.append(path)
            return False
        return True


def _encoded(image, image_format, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, image_format, **options)
    return stream.getvalue()
