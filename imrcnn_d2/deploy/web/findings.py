"""What is found in an uploaded image, and what there is to show and to download of it."""

import io
import json
import uuid
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from imrcnn_d2.data.dicom import is_dicom
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.rejects import BadInputError

from ..dicom import may_show_patient, public_name
from ..journal import PREDICTIONS
from ..outputs import OutputFolder, labelme_json, mask_png, png
from ..records import coco_head, counted, frame_record, records
from ..video import Frame

__all__ = ["DOWNLOADS", "Finding", "download", "find", "unique_names"]

DOWNLOADS = ("masks", "labelme", "coco")
SHOWN_SIDE = 1600  # pixels of the longer side, at most, that a browser is sent
SHOWN_QUALITY = 90


@dataclass(frozen=True)
class Finding:
    """
    What is known of an uploaded file once it was looked at.

    Attributes:
        name (str): what the page and all downloads call it.
        error (str or None): why it could not be looked at; all that follows is then empty.
        image (dict): COCO image record without an id.
        annotations (list[dict]): all detections, see :func:`records`.
        picture (bytes or None): a JPEG to show, perhaps smaller; None if its pixels must not reach
            an output.
        frame (bytes or None): a PNG of an image that LabelMe cannot read in its own file.
        key (str): of this and no other.
    """

    name: str
    error: str | None = None
    image: dict = field(default_factory=dict)
    annotations: list = field(default_factory=list)
    picture: bytes | None = None
    frame: bytes | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def size(self):
        """tuple[int, int]: height and width in pixels."""
        return self.image["height"], self.image["width"]

    @property
    def num_bytes(self):
        """int: of the images in it, which are nearly all of it."""
        return len(self.picture or b"") + len(self.frame or b"")

    def counted(self, tau):
        """
        Args:
            tau (float or None): see :func:`counted`.

        Returns:
            list[dict]: the annotations that count.
        """
        return counted(self.annotations, tau)


def find(predictor, path, name):
    """
    Look at one file.

    Args:
        predictor (Predictor):
        path (Path): an image, or a DICOM file of one; deleted as soon as it was read.
        name (str): as its owner calls it.

    Returns:
        Finding: with an ``error`` if it cannot be read.
    """
    dicom = is_dicom(path)
    try:
        try:
            name = public_name(path) if dicom else name
            shown = not (dicom and may_show_patient(path))
            image = read_image(path)
        finally:
            path.unlink(missing_ok=True)
        view = predictor.views()(image)
        (output,) = predictor.forward([predictor.prepare(image, view)])
        return Finding(
            name,
            image=frame_record(name, Frame(image), view),
            annotations=records(predictor, output, *image.shape[:2], view),
            picture=_jpeg(image) if shown else None,
            frame=png(image, predictor.about) if dicom and shown else None,
        )
    except BadInputError as error:
        return Finding(name, error.reason)
    except ModuleNotFoundError as error:  # of the extra [deploy]
        return Finding(name, f"needs {error.name}: pip install {error.name}")
    except (OSError, RuntimeError, ValueError) as error:
        # What an unknown error quotes of a DICOM file may be the patient's.
        said = type(error).__name__ if dicom else error
        return Finding(name, f"cannot be predicted ({said})")


def _jpeg(image):
    picture = Image.fromarray(image)
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=SHOWN_QUALITY)
    return stream.getvalue()


def unique_names(names):
    """
    Args:
        names (list[str]): of uploaded files, perhaps with folders.

    Returns:
        list[str]: their last parts; of equal ones, the second is "a (2).jpg".
    """
    ret, taken = [], Counter()
    for name in names:
        # Of any system, and without what no file can be named by.
        name = PurePosixPath(name.replace("\\", "/").replace("\0", "")).name
        name = "image" if name in ("", "..") else name
        while name in ret:
            taken[name] += 1
            path = PurePosixPath(name)
            candidate = f"{path.stem} ({taken[name] + 1}){path.suffix}"
            if candidate not in ret:
                name = candidate
        ret.append(name)
    return ret


def download(findings, kind, tau, predictor):
    """
    Args:
        findings (list[Finding]):
        kind (str): of ``DOWNLOADS``.
        tau (float or None): score from which on a detection counts. COCO has all of them.
        predictor (Predictor): that found them.

    Returns:
        tuple[str, bytes]: name and content of a file; a zip where there are several.

    Raises:
        ValueError: there is nothing to be written.
    """
    about, classes = {**predictor.about, "tau": tau}, predictor.classes
    found = [finding for finding in findings if finding.error is None]
    if kind == "labelme":  # of which all others would show an image that nobody may see
        found = [finding for finding in found if finding.picture is not None]
    if not found:
        raise ValueError("There is no image to write this file of")
    if kind == "coco":
        return PREDICTIONS, _coco(found, about, classes).encode()
    to = OutputFolder(Path(), [kind], about, classes, [finding.name for finding in found])
    files = {}
    for finding in found:
        shown = finding.counted(tau)
        if kind == "masks":
            path = to.path(kind, finding.name, ".png")
            files[path.name] = mask_png(shown, *finding.size, classes, about)
            continue
        path, image_path = to.path(kind, finding.name, ".json"), finding.name
        if finding.frame is not None:
            image_path = path.with_suffix(".png").name
            files[image_path] = finding.frame
        files[path.name] = labelme_json(shown, image_path, *finding.size, classes, about).encode()
    if len(files) == 1:
        return next(iter(files.items()))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f"{kind}.zip", stream.getvalue()


def _coco(findings, about, classes):
    images = [{"id": i, **finding.image} for i, finding in enumerate(findings, start=1)]
    annotations = [
        {"image_id": image["id"], **annotation}
        for image, finding in zip(images, findings, strict=True)
        for annotation in finding.annotations
    ]
    annotations = [{"id": i, **a} for i, a in enumerate(annotations, start=1)]
    return json.dumps({**coco_head(about, classes), "images": images, "annotations": annotations})
