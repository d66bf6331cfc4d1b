"""The page: its parts and their events."""

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
    above_threshold,
    coco_head,
    contours,
    frame_record,
    labelme_json,
    mask_png,
    png,
    records,
)
from imrcnn_d2.deploy.predictor import Predictor
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
    The predictions for an uploaded file.

    Attributes:
        name: on the page and in all downloads.
        error: why there are no predictions; all that follows is then empty.
        image: COCO image record without an id.
        annotations: all detections, see `records`.
        jpeg: to show, perhaps smaller; None if its pixels must not reach an output.
        png: of an image whose file LabelMe cannot read.
        key: unique.
    """

    name: str
    error: str | None = None
    image: dict = field(default_factory=dict)
    annotations: list = field(default_factory=list)
    jpeg: bytes | None = None
    png: bytes | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image["height"], self.image["width"]

    @property
    def num_bytes(self) -> int:
        """Of the images in it, which are nearly all of it."""
        return len(self.jpeg or b"") + len(self.png or b"")

    def above_threshold(self, tau: float | None) -> list[dict]:
        return above_threshold(self.annotations, tau)


def find(predictor: Predictor, path: Path, name: str) -> Finding:
    """
    Predicts on one file, an image or a DICOM file of one, which is deleted as soon as it is read;
    with an ``error`` if it cannot be read. ``name`` is the user's.
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
            image=frame_record(name, Frame(image, view=view)),
            annotations=records(predictor, output, *image.shape[:2], view),
            jpeg=_jpeg(image) if shown else None,
            png=png(image, predictor.metadata) if dicom and shown else None,
        )
    except BadInputError as error:
        return Finding(name, error.reason)
    except ModuleNotFoundError as error:  # of the extra [deploy]
        return Finding(name, f"needs {error.name}: pip install {error.name}")
    except (OSError, RuntimeError, ValueError) as error:
        # An unknown error may quote a patient's data from a DICOM file.
        message = type(error).__name__ if dicom else error
        return Finding(name, f"cannot be predicted ({message})")


def _jpeg(image):
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    thumbnail.save(stream, "JPEG", quality=SHOWN_QUALITY)
    return stream.getvalue()


def unique_names(names: list[str]) -> list[str]:
    """Uploaded files' names without folders; of equal ones, the second is "a (2).jpg"."""
    ret, taken = [], Counter()
    for name in names:
        # Folders are those of any system; no file name contains a zero byte.
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


def download(
    findings: list[Finding], kind: str, tau: float | None, predictor: Predictor
) -> tuple[str, bytes]:
    """
    Returns name and content of a file, a zip if there are several.

    Args:
        kind: of ``DOWNLOADS``.
        tau: the threshold of scores, but for COCO, which has all detections.

    Raises:
        ValueError: there is nothing to write.
    """
    metadata, classes = {**predictor.metadata, "tau": tau}, predictor.classes
    findings = [finding for finding in findings if finding.error is None]
    if kind == "labelme":  # whose user would see an image that nobody may see
        findings = [finding for finding in findings if finding.jpeg is not None]
    if not findings:
        raise ValueError("There is no image to write this file of")
    if kind == "coco":
        return PREDICTIONS, _coco(findings, metadata, classes).encode()
    names = [finding.name for finding in findings]
    folder = OutputFolder(Path(), [kind], metadata, classes, names)
    files = {}
    for finding in findings:
        shown = finding.above_threshold(tau)
        if kind == "masks":
            path = folder.path(kind, finding.name, ".png")
            files[path.name] = mask_png(shown, *finding.size, classes, metadata)
            continue
        path, image_path = folder.path(kind, finding.name, ".json"), finding.name
        if finding.png is not None:
            image_path = path.with_suffix(".png").name
            files[image_path] = finding.png
        text = labelme_json(shown, image_path, *finding.size, classes, metadata)
        files[path.name] = text.encode()
    if len(files) == 1:
        return next(iter(files.items()))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f"{kind}.zip", stream.getvalue()


def _coco(findings, metadata, classes):
    images = [{"id": i, **finding.image} for i, finding in enumerate(findings, start=1)]
    annotations = [
        {"image_id": image["id"], **annotation}
        for image, finding in zip(images, findings, strict=True)
        for annotation in finding.annotations
    ]
    annotations = [{"id": i, **a} for i, a in enumerate(annotations, start=1)]
    return json.dumps(
        {**coco_head(metadata, classes), "images": images, "annotations": annotations}
    )


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


def cards_html(findings: list[Finding], predictor: Predictor, tau: float | None) -> str:
    """
    One card per image, with the contours of all detections, hidden if below the threshold, so that
    another τ needs `captions` only.
    """
    return _template("cards.html").render(
        cards=[
            {
                "finding": finding,
                "caption": caption["html"],
                "shown": caption["shown"],
                "jpeg": finding.jpeg and base64.b64encode(finding.jpeg).decode(),
                "marks": [] if finding.error else _marks(finding),
            }
            for finding, caption in zip(findings, captions(findings, predictor, tau), strict=True)
        ]
    )


def _marks(finding):
    """Contours, and place of its number in percent, of each detection."""
    height, width = finding.size
    marks, taken = [], np.empty((0, 2))
    for annotation in finding.annotations:
        if "bbox" not in annotation:
            continue
        lines = [line.reshape(-1, 2) for line in contours(annotation)]
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


def captions(findings: list[Finding], predictor: Predictor, tau: float | None) -> list[dict]:
    """
    Of each finding its ``key``, the caption, ``html``, and how many of its detections, which are
    sorted by score, are ``shown``.
    """
    ret = []
    for finding in findings:
        shown = finding.above_threshold(tau)
        html = _template("caption.html").render(
            finding=finding,
            shown=shown,
            tau=tau,
            classes=predictor.classes,
            best=max((a["score"] for a in finding.annotations), default=None),
        )
        ret.append({"key": finding.key, "html": html, "shown": len(shown)})
    return ret


def summary_html(findings: list[Finding], tau: float | None) -> str:
    """Counts over all images."""
    read = [finding for finding in findings if finding.error is None]
    counts = [len(finding.above_threshold(tau)) for finding in read]
    return _template("summary.html").render(
        images=len(read),
        failed=len(findings) - len(read),
        positive=sum(map(bool, counts)),
        detections=sum(counts),
        tau=tau,
    )


def about_html(predictor: Predictor) -> str:
    """The model."""
    return _template("about.html").render(about=predictor.metadata, classes=predictor.classes)


def empty_html(predictor: Predictor) -> str:
    """The page before the first image."""
    return _template("empty.html").render(detector=not predictor.is_classifier)


MAX_FILES = 50  # at once
MAX_WAITING = 100  # who have dropped files, and for whom the network has no time yet
MAX_SESSIONS, MAX_KEPT_MB = 200, 1000  # of tabs, which may never close: then the oldest goes
TITLE = "IMR-CNN"
DIGITS = 3  # of τ on the slider
LEAST_SCORE = 0.05  # Detectron2's, of all detections
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
    """Gradio's default copies any file of this machine, and fetches URLs; `look` takes neither."""
    return path


def build_page(predictor: Predictor, uploads) -> gr.Blocks:
    """
    The page, for files of ``uploads`` (`Uploads`). Findings are in the session's state. The whole
    session is forgotten when its tab is closed, or when there are too many and it was not used for
    the longest time.
    """
    kept = {}  # of each session, bytes
    detector = not predictor.is_classifier

    def exact(tau):
        """The slider's value; where it starts, τ with all its digits."""
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
        has_results = any(finding.error is None for finding in findings)
        return (
            None,
            findings,
            cards_html(findings, predictor, exact(tau)),
            summary_html(findings, exact(tau)),
            *(gr.update(interactive=has_results) for _ in buttons),
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
                    info="Findings with a score of at least τ are shown.",
                    visible=detector,
                )
                summary = gr.HTML()
                with gr.Row():
                    buttons = {
                        kind: gr.Button(label, interactive=False, size="sm", min_width=90)
                        for kind, label in _KINDS.items()
                        if kind != "masks" or predictor.has_masks
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
