"""The page: what is on it and what happens when something on it is moved."""

import base64
import io
import json
import uuid
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path, PurePosixPath

import gradio as gr
import jinja2
import numpy as np
from PIL import Image

from imrcnn_d2.data.images import is_dicom, read_image
from imrcnn_d2.deploy.batch import PREDICTIONS
from imrcnn_d2.deploy.inputs import Frame, may_show_patient, public_name
from imrcnn_d2.deploy.outputs import (
    OutputFolder,
    coco_head,
    counted,
    frame_record,
    labelme_json,
    mask_png,
    outline,
    png,
    records,
)
from imrcnn_d2.utils.files import BadInputError

__all__ = [
    "DOWNLOADS",
    "LOOK",
    "MAX_FILES",
    "Finding",
    "about_html",
    "build_page",
    "captions",
    "cards_html",
    "download",
    "empty_html",
    "find",
    "summary_html",
    "unique_names",
]


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


ROOM = 7  # of a number, in percent of the image


@lru_cache
def _template(name):
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imrcnn_d2.deploy.web"),
        autoescape=True,  # names of files and classes are anybody's
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.get_template(name)


def cards_html(findings, predictor, tau):
    """
    Args:
        findings (list[Finding]):
        predictor (Predictor):
        tau (float or None): score from which on a detection is shown.

    Returns:
        str: a figure for each, with the outlines of all detections, of which those that do not
        count are hidden; so that another τ needs :func:`captions` alone.
    """
    said = captions(findings, predictor, tau)
    return _template("cards.html").render(
        cards=[
            {
                "finding": finding,
                "caption": caption["html"],
                "shown": caption["shown"],
                "picture": finding.picture and base64.b64encode(finding.picture).decode(),
                "marks": [] if finding.error else _marks(finding),
            }
            for finding, caption in zip(findings, said, strict=True)
        ]
    )


def _marks(finding):
    """Outline, and place of its number in percent, of each detection."""
    height, width = finding.size
    marks, taken = [], np.empty((0, 2))
    for annotation in finding.annotations:
        if "bbox" not in annotation:
            continue
        lines = [line.reshape(-1, 2) for line in outline(annotation)]
        path = "".join("M" + "L".join(f"{x} {y}" for x, y in line.tolist()) + "Z" for line in lines)
        # At the top of its largest part; further down where other numbers are.
        places = max(lines, key=len, default=np.array([[width / 2, height / 2]]))
        places = 100 * places[np.argsort(places[:, 1], kind="stable")] / (width, height)
        places = places.clip(ROOM / 2, 100 - ROOM / 2)
        free = (abs(places[:, None] - taken) >= ROOM).any(axis=2).all(axis=1)
        left, top = places[free.argmax()].tolist()
        taken = np.append(taken, [[left, top]], axis=0)
        marks.append({"path": path, "left": left, "top": top})
    return marks


def captions(findings, predictor, tau):
    """
    Args:
        findings (list[Finding]), predictor (Predictor), tau (float or None): as above.

    Returns:
        list[dict]: of each finding its ``key``, the caption, ``html``, and how many of its
        detections, which come by falling score, are ``shown``.
    """
    ret = []
    for finding in findings:
        shown = finding.counted(tau)
        html = _template("caption.html").render(
            finding=finding,
            shown=shown,
            tau=tau,
            classes=predictor.classes,
            best=max((a["score"] for a in finding.annotations), default=None),
        )
        ret.append({"key": finding.key, "html": html, "shown": len(shown)})
    return ret


def summary_html(findings, tau):
    """
    Args:
        findings (list[Finding]), tau (float or None): as above.

    Returns:
        str: counts over all images.
    """
    read = [finding for finding in findings if finding.error is None]
    counts = [len(finding.counted(tau)) for finding in read]
    return _template("summary.html").render(
        images=len(read),
        failed=len(findings) - len(read),
        positive=sum(map(bool, counts)),
        marked=sum(counts),
        tau=tau,
    )


def about_html(predictor):
    """
    Args:
        predictor (Predictor):

    Returns:
        str: what predicts.
    """
    return _template("about.html").render(about=predictor.about, classes=predictor.classes)


def empty_html(predictor):
    """
    Args:
        predictor (Predictor):

    Returns:
        str: what is there before the first image.
    """
    return _template("empty.html").render(detector=not predictor.is_classifier)


MAX_FILES = 50  # at once
MAX_WAITING = 100  # who have dropped files, and for whom the network has no time yet
MAX_SESSIONS, MAX_KEPT_MB = 200, 1000  # of tabs, which may never close: then the oldest goes
TITLE = "IMR-CNN"
DIGITS = 3  # of τ on the slider
LEAST_SCORE = 0.05  # Detectron2's, of what is found at all
_FOLDER = resources.files("imrcnn_d2.deploy.web") / "templates"
# Of gr.mount_gradio_app. Fonts are the reader's own: nothing is fetched.
LOOK = {
    "theme": gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300"),
    "css": (_FOLDER / "page.css").read_text(encoding="utf-8"),
}
_SHOW, _SAVE, _HEADER = (
    (_FOLDER / name).read_text(encoding="utf-8") for name in ("show.js", "save.js", "header.html")
)
_KINDS = {"masks": "Masks (PNG)", "labelme": "LabelMe", "coco": "COCO"}


async def _as_it_is(path):
    """Gradio's own copies any file of this machine, and fetches a URL; `look` takes neither."""
    return path


def build_page(predictor, uploads):
    """
    Args:
        predictor (Predictor):
        uploads (Uploads): the files that may be looked at.

    Returns:
        gr.Blocks: keeps what was found in the session's state, and forgets the whole session when
        its tab is closed, or when there are too many and it is the one that was not used longest.
    """
    kept = {}  # of each session, bytes
    detector = not predictor.is_classifier

    def exact(tau):
        """What the slider stands for: where it starts, τ with all its digits."""
        if not detector:
            return None
        return predictor.tau if tau == round(predictor.tau, DIGITS) else tau

    def look(files, tau, request: gr.Request, progress=gr.Progress()):  # noqa: B008  (asks for a bar)
        paths, findings, size = [], [], 0
        try:
            for file in files:
                paths.append(uploads.take(file["path"]))
            if len(paths) > MAX_FILES:
                raise gr.Error(f"{len(paths)} files at once; at most {MAX_FILES}", title="Too many")
            names = unique_names([file.get("orig_name") or "image" for file in files])
            for path, name in progress.tqdm(
                list(zip(paths, names, strict=True)), desc="Looking", unit="images"
            ):
                findings.append(find(predictor, path, name))
                size += findings[-1].num_bytes
                if size > 2**20 * MAX_KEPT_MB:
                    raise gr.Error(f"Over {MAX_KEPT_MB} MB of pixels: drop fewer", title="Too much")
            keep(request.session_hash, size)
        except KeyError:
            raise gr.Error("The upload is no longer there: drop the images again") from None
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
        found = any(finding.error is None for finding in findings)
        return (
            None,
            findings,
            cards_html(findings, predictor, exact(tau)),
            summary_html(findings, exact(tau)),
            *(gr.update(interactive=found) for _ in buttons),
        )

    def show(findings, tau):
        tau = exact(tau)
        return captions(findings, predictor, tau), summary_html(findings, tau)

    def save(kind):
        def make(findings, tau):
            try:
                name, content = download(findings, kind, exact(tau), predictor)
            except ValueError as error:
                raise gr.Error(str(error), title="No file") from error
            return {"name": name, "base64": base64.b64encode(content).decode()}

        return make

    def keep(session, size):
        sessions = page.state_holder.session_data  # by when they were last used
        kept[session] = size
        others = [key for key in list(sessions) if key in kept and key != session]
        for other in kept.keys() - {session, *others}:
            del kept[other]
        while sum(kept.values()) > 2**20 * MAX_KEPT_MB:
            oldest = others.pop(0)
            del kept[oldest]
            sessions.pop(oldest, None)

    def forget(request: gr.Request):
        page.state_holder.session_data.pop(request.session_hash, None)

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        page.state_session_capacity = MAX_SESSIONS
        findings = gr.State([])
        gr.HTML(_HEADER)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                files = gr.File(file_count="multiple", label="Images", height=200)
                # Not by a subclass: of each, Gradio writes a .pyi beside its source.
                files.async_move_resource_to_block_cache = _as_it_is
                start = round(predictor.tau, DIGITS) if detector else 1
                tau = gr.Slider(
                    *(min(LEAST_SCORE, start), 1),
                    value=start,
                    step=10**-DIGITS,
                    label="Threshold τ",
                    info="Findings with a score of at least τ count.",
                    visible=detector,
                )
                summary = gr.HTML()
                with gr.Row():
                    buttons = {
                        kind: gr.Button(label, interactive=False, size="sm", min_width=90)
                        for kind, label in _KINDS.items()
                        if kind != "masks" or predictor.outlines
                    }
                gr.HTML(about_html(predictor))
            with gr.Column(scale=3, min_width=320):
                cards = gr.HTML(empty_html(predictor))
        shown, file = gr.JSON(visible=False), gr.JSON(visible=False)

        looked = files.upload(
            look,
            [files, tau],
            [files, findings, cards, summary, *buttons.values()],
            preprocess=False,
            show_progress_on=files,
            api_name="look",
        )
        # Once more when all is there: the slider may have been moved in the meantime.
        for event, name in ((looked.then, "show_again"), (tau.change, "show")):
            event(
                show,
                [findings, tau],
                [shown, summary],
                queue=False,
                trigger_mode="always_last",
                show_progress="hidden",
                api_name=name,
            ).then(None, shown, js=_SHOW)
        for kind, button in buttons.items():
            button.click(save(kind), [findings, tau], file, queue=False, api_name=kind).then(
                None, file, file, js=_SAVE
            )
        page.unload(forget)
    page.queue(api_open=False, max_size=MAX_WAITING)  # nobody passes by the queue
    return page
