"""The pictures and files that are made of one input: overlays, masks, LabelMe."""

import io
import json
import os
from collections import Counter
from pathlib import Path, PurePosixPath

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imrcnn_d2.data.labelme import labelme_document
from imrcnn_d2.evaluation.files import write_atomically

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
    two inputs differ in nothing but their suffix, it is kept: ``masks/a/b.jpg.png``.
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

    def clear(self, name):
        """
        Delete the files of an input, such as those of what it was before it changed.

        Args:
            name (str): of the input.
        """
        for kind, suffixes in OUTPUTS.items():
            frames = self._folder / kind / name
            paths = list(frames.glob("[0-9]" * 6 + "*")) if frames.is_dir() else []
            for path in paths + [self.path(kind, name, suffix) for suffix in suffixes]:
                if path.suffix in suffixes:
                    path.unlink(missing_ok=True)


def _targets(names, taken):
    """By name: without its suffix where nothing else is called so then, else the whole."""
    targets = {name: taken.get(name) or _without_suffix(name) for name in names}
    while True:
        counts = Counter({**taken, **targets}.values())
        clashing = [
            name
            for name, to in targets.items()
            if counts[to] > 1 and to != name and name not in taken
        ]
        if not clashing:
            return targets
        targets.update((name, name) for name in clashing)


def _without_suffix(name):
    return PurePosixPath(name).with_suffix("").as_posix()


class InputOutputs:
    """
    The files of one input, each written whole or not at all.

    Use as a context manager: leaving it by an error deletes the video it was writing.
    """

    def __init__(self, to, source, name, *, pictures=True):
        """
        Args:
            to (OutputFolder):
            source (Source):
            name (str): what outputs call it.
            pictures (bool): False if its pixels must not reach an output.
        """
        self._to, self._source, self._name = to, source, name
        self._wanted = to.wanted if pictures else set(to.wanted) & {"masks"}
        self._video = None

    def __enter__(self):
        self._to.clear(self._name)
        return self

    def __exit__(self, *error):
        if self._video is not None:
            self._video.__exit__(*error)

    def add(self, frame, annotations):
        """
        Args:
            frame (Frame):
            annotations (list[dict]): what was found in it.
        """
        shown = counted(annotations, self._to.about["tau"])
        if "overlays" in self._wanted:
            self._add_overlay(frame, shown)
        if "masks" in self._wanted:
            self._add_mask(frame, shown)
        # Of a video only frames in which there is something: each is a file of its own.
        if "labelme" in self._wanted and (shown or frame.number is None):
            self._add_labelme(frame, shown)

    def _add_overlay(self, frame, shown):
        to = self._to
        picture = draw_overlay(frame.image, shown, to.classes, footer(to.about))
        if frame.time is None:
            path = to.path("overlays", self._name, ".jpg", frame.number)
            options = {"quality": JPEG_QUALITY, "comment": to.comment.encode()}
            write_atomically(path, _encoded(picture, "JPEG", **options))
            return
        if self._video is None:
            path = to.path("overlays", self._name, ".mp4")
            self._video = VideoWriter(path, time_base=frame.time_base, comment=to.comment)
        self._video.write(picture, frame.time, frame.pixel_aspect)

    def _add_mask(self, frame, shown):
        to = self._to
        content = mask_png(shown, *frame.image.shape[:2], to.classes, to.about)
        write_atomically(to.path("masks", self._name, ".png", frame.number), content)

    def _add_labelme(self, frame, shown):
        to = self._to
        path = to.path("labelme", self._name, ".json", frame.number)
        if self._source.kind == "image":
            image_path = os.path.relpath(self._source.path, path.parent.resolve())
        else:
            write_atomically(path.with_suffix(".png"), png(frame.image, to.about))
            image_path = path.with_suffix(".png").name
        size = frame.image.shape[:2]
        write_atomically(path, labelme_json(shown, image_path, *size, to.classes, to.about))


def _encoded(image, image_format, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, image_format, **options)
    return stream.getvalue()
