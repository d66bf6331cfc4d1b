"""The pictures and files that are made of one input: overlays, masks, LabelMe."""

import errno
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path, PurePosixPath

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imrcnn_d2.data.labelme import labelme_document
from imrcnn_d2.evaluation.files import file_sha256, write_atomically

from .identity import input_key
from .overlay import draw_overlay
from .records import counted, label_map
from .video import VideoWriter

__all__ = [
    "OUTPUTS",
    "InputOutputs",
    "OutputFolder",
    "comment",
    "footer",
    "labelme_json",
    "mask_png",
    "output_folders",
    "png",
]

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
