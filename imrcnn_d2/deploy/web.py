"""The web page: served to this computer, with limits, and without a call to any other."""

import asyncio
import base64
import contextlib
import io
import ipaddress
import json
import math
import os
import shutil
import socket
import stat
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlsplit

import gradio as gr
import jinja2
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse

from imrcnn_d2.data.images import is_dicom, read_image
from imrcnn_d2.deploy import outputs
from imrcnn_d2.deploy.batch import PREDICTIONS, reason_of
from imrcnn_d2.deploy.inputs import Frame, may_show_patient, public_name
from imrcnn_d2.deploy.predictor import Predictor
from imrcnn_d2.utils.files import lock_folder

DOWNLOADS = {"masks": "Masks (PNG)", "labelme": "LabelMe", "coco": "COCO"}
SHOWN_SIDE = 1600  # pixels of the longer side, at most, that a browser is sent
SHOWN_QUALITY = 90
ROOM = 7  # of a number, in percent of the image
DIGITS = 3  # of τ on the slider
LEAST_SCORE = 0.05  # Detectron2's, of all detections, before scores are mapped

MAX_FILE_MB = 50
MAX_FILES, MAX_UPLOAD_MB = 50, 500  # at once
MAX_REQUEST_MB = 1  # of any other request: names of files, and τ
UPLOADS_AT_ONCE, UPLOAD_SECONDS = 4, 600  # the others wait for one of them to end
KEPT = 3600  # seconds at most, where nothing comes and reads an upload
MAX_WAITING, MAX_WAITING_MB = 1000, 2000  # uploads, and all of them together: then the oldest go
MAX_QUEUE = 100  # sessions that have dropped files, and for which the network has no time yet
MAX_SESSIONS, MAX_KEPT_MB = 200, 1000  # of tabs, which may never close: then the oldest goes
CONNECTIONS = 500  # at once: a tab has two or three
GOODBYE = 2  # seconds that open connections are given at the end

_FOLDER = resources.files("imrcnn_d2.deploy") / "templates"
_SHOW, _SAVE, _HEADER, _CSS = (
    (_FOLDER / name).read_text(encoding="utf-8")
    for name in ("show.js", "save.js", "header.html", "page.css")
)
# Fonts are the reader's own: nothing is fetched.
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
_THEME = gr.themes.Base(primary_hue="teal", neutral_hue="slate", **_FONTS).set(
    body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300"
)
# What the page needs of Gradio. Other routes fetch URLs, serve files or write sessions to disk.
_API = "/gradio_api"
_PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
_BELOW = (
    *("/assets/", "/static/", "/svelte/"),
    *(f"{_API}/{name}" for name in ("upload", "info", "app_id", "queue/", "run/", "call/")),
    *(f"{_API}/{name}" for name in ("heartbeat/", "cancel", "reset", "startup-events")),
)
_HEADERS = {
    # The browser requests nothing from other hosts, whatever a part of Gradio would like.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_PREFIX = "imrcnn-uploads-"


@dataclass(frozen=True)
class Finding:
    """The predictions for an uploaded file, or why there are none."""

    name: str  # on the page and in all downloads
    error: str | None = None
    image: dict = field(default_factory=dict)  # COCO image record without an id
    annotations: list = field(default_factory=list)  # all detections, see `outputs.records`
    jpeg: bytes | None = None  # to show, perhaps smaller; None if no output may have its pixels
    png: bytes | None = None  # of an image whose file LabelMe cannot read
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image["height"], self.image["width"]

    @property
    def num_bytes(self) -> int:
        return len(self.jpeg or b"") + len(self.png or b"")  # nearly all of it


def find(predictor: Predictor, path: Path, name: str) -> Finding:
    """Predicts on an image or DICOM still of a user, and deletes it as soon as it is read."""
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
        thumbnail = Image.fromarray(image)
        thumbnail.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        return Finding(
            name,
            image=outputs.frame_record(name, Frame(image, view=view)),
            annotations=outputs.records(predictor, output, *image.shape[:2], view),
            jpeg=outputs.encoded(thumbnail, "JPEG", quality=SHOWN_QUALITY) if shown else None,
            png=outputs.png(image, predictor.metadata) if dicom and shown else None,
        )
    except (ModuleNotFoundError, OSError, RuntimeError, ValueError) as error:
        return Finding(name, reason_of(error, dicom))


def unique_names(names: list[str]) -> list[str]:
    """Uploaded files' names without folders; of equal ones, the second is "a (2).jpg"."""
    unique = []
    for name in names:
        # Folders are those of any system; no file name contains a zero byte.
        name = PurePosixPath(name.replace("\\", "/").replace("\0", "")).name
        name = "image" if name in ("", "..") else name
        path, number = PurePosixPath(name), 1
        while name in unique:
            number += 1
            name = f"{path.stem} ({number}){path.suffix}"
        unique.append(name)
    return unique


def download(
    findings: list[Finding], kind: str, tau: float | None, predictor: Predictor
) -> tuple[str, bytes]:
    """Returns name and content of a file of a kind of ``DOWNLOADS``, a zip if there are several. It
    has the detections above ``tau``, COCO all. Raises a ValueError if there is nothing to write.
    """
    metadata, classes = {**predictor.metadata, "tau": tau}, predictor.classes
    findings = [finding for finding in findings if finding.error is None]
    if kind == "labelme":  # whose user would see an image that nobody may see
        findings = [finding for finding in findings if finding.jpeg is not None]
    if not findings:
        raise ValueError("There is no image to write this file of")
    if kind == "coco":
        images = [{"id": i, **finding.image} for i, finding in enumerate(findings, start=1)]
        pairs = [(i, a) for i, finding in enumerate(findings, start=1) for a in finding.annotations]
        annotations = [{"id": n, "image_id": i, **a} for n, (i, a) in enumerate(pairs, start=1)]
        coco = {"images": images, "annotations": annotations}
        return PREDICTIONS, json.dumps(outputs.coco_head(metadata, classes) | coco).encode()
    names = [finding.name for finding in findings]
    folder = outputs.OutputFolder(Path(), [kind], names, {}, predictor)
    files = {}
    for finding in findings:
        shown = outputs.above_threshold(finding.annotations, tau)
        if kind == "masks":
            path = folder.path(kind, finding.name, ".png")
            files[path.name] = outputs.mask_png(shown, finding.size, classes, metadata)
            continue
        path, image_path = folder.path(kind, finding.name, ".json"), finding.name
        if finding.png is not None:
            image_path = path.with_suffix(".png").name
            files[image_path] = finding.png
        text = outputs.labelme_json(shown, image_path, finding.size, classes, metadata)
        files[path.name] = text.encode()
    if len(files) == 1:
        return next(iter(files.items()))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f"{kind}.zip", stream.getvalue()


@lru_cache
def _template(name):
    loader = jinja2.PackageLoader("imrcnn_d2.deploy")
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    # Names of files and classes are anybody's.
    environment = jinja2.Environment(loader=loader, autoescape=True, **options)
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.get_template(name)


def cards_html(findings: list[Finding], predictor: Predictor, tau: float | None) -> str:
    """One card per image, with the contours of all detections, hidden if below the threshold."""
    cards = []
    for finding, caption in zip(findings, captions(findings, predictor, tau), strict=True):
        card = {"finding": finding, "marks": [] if finding.error else marks(finding), **caption}
        card["jpeg"] = finding.jpeg and base64.b64encode(finding.jpeg).decode()
        cards.append(card)
    return _template("cards.html").render(cards=cards)


def marks(finding: Finding) -> list[dict]:
    """Contours, and place of its number in percent, of each detection."""
    height, width = finding.size
    placed, taken = [], np.empty((0, 2))
    for annotation in finding.annotations:
        if "bbox" not in annotation:
            continue
        lines = [line.reshape(-1, 2) for line in outputs.contours(annotation)]
        path = "".join("M" + "L".join(f"{x} {y}" for x, y in line.tolist()) + "Z" for line in lines)
        # At the top of its largest part; further down where other numbers are.
        places = max(lines, key=len, default=np.array([[width / 2, height / 2]]))
        places = 100 * places[np.argsort(places[:, 1], kind="stable")] / (width, height)
        places = places.clip(ROOM / 2, 100 - ROOM / 2)
        free = (abs(places[:, None] - taken) >= ROOM).any(axis=2).all(axis=1)
        left, top = places[free.argmax()].tolist()
        taken = np.append(taken, [[left, top]], axis=0)
        placed.append({"path": path, "left": left, "top": top})
    return placed


def captions(findings: list[Finding], predictor: Predictor, tau: float | None) -> list[dict]:
    """Each finding's ``key``, its caption, ``html``, and how many detections are ``shown``."""
    ret, template = [], _template("caption.html")
    for finding in findings:
        shown = outputs.above_threshold(finding.annotations, tau)
        best = max((a["score"] for a in finding.annotations), default=None)
        values = {"finding": finding, "shown": shown, "best": best, "classes": predictor.classes}
        html = template.render(values, tau=tau)
        ret.append({"key": finding.key, "html": html, "shown": len(shown)})
    return ret


def summary_html(findings: list[Finding], tau: float | None) -> str:
    """Counts over all images."""
    counts = [len(outputs.above_threshold(f.annotations, tau)) for f in findings if f.error is None]
    numbers = {"images": len(counts), "failed": len(findings) - len(counts)}
    numbers |= {"positive": sum(map(bool, counts)), "detections": sum(counts)}
    return _template("summary.html").render(numbers, tau=tau)


async def _as_it_is(path):
    """Gradio's default copies any file of this machine, and fetches URLs; `look` takes neither."""
    return path


def build_page(predictor: Predictor, uploads: "Uploads") -> gr.Blocks:
    """The page. Findings are in the session's state, which is forgotten when its tab is closed, or
    when there are too many and it was not used for the longest time.
    """
    kept = {}  # of each session, bytes
    detector = predictor.task.localises

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
            pairs = list(zip(paths, names, strict=True))
            for path, name in progress.tqdm(pairs, desc="Looking", unit="images"):
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
        html = cards_html(findings, predictor, exact(tau)), summary_html(findings, exact(tau))
        return None, findings, *html, *(gr.update(interactive=has_results) for _ in buttons)

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

    with gr.Blocks(title="IMR-CNN", analytics_enabled=False, fill_width=True) as page:
        page.state_session_capacity = MAX_SESSIONS
        findings = gr.State([])
        gr.HTML(_HEADER)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                files = gr.File(file_count="multiple", label="Images", height=200)
                # Not by a subclass: of each, Gradio writes a .pyi next to its source.
                files.async_move_resource_to_block_cache = _as_it_is
                start, least = round(predictor.tau, DIGITS) if detector else 1, LEAST_SCORE
                info = "Findings with a score of at least τ are shown."
                if detector and predictor.score_map is not None:
                    # rounded down, so that all detections can be shown
                    least = math.floor(predictor.score_map(least) * 10**DIGITS) / 10**DIGITS
                    info += " A score is the probability that a finding is a lesion."
                options = {"step": 10**-DIGITS, "label": "Threshold τ", "visible": detector}
                tau = gr.Slider(min(least, start), 1, start, info=info, **options)
                summary = gr.HTML()
                with gr.Row():
                    buttons = {
                        kind: gr.Button(label, interactive=False, size="sm", min_width=90)
                        for kind, label in DOWNLOADS.items()
                        if kind != "masks" or predictor.has_masks
                    }
                model = {"model": predictor.metadata, "classes": predictor.classes}
                gr.HTML(_template("about.html").render(model))
            with gr.Column(scale=3, min_width=320):
                cards = gr.HTML(_template("empty.html").render(detector=detector))
        shown, file = gr.JSON(visible=False), gr.JSON(visible=False)

        shows = [files, findings, cards, summary, *buttons.values()]
        options = {"preprocess": False, "show_progress_on": files, "api_name": "look"}
        looked = files.upload(look, [files, tau], shows, **options)
        # Once more when all is there: the slider may have been moved in the meantime.
        for event, name in ((looked.then, "show_again"), (tau.change, "show")):
            options = {"queue": False, "trigger_mode": "always_last", "show_progress": "hidden"}
            done = event(show, [findings, tau], [shown, summary], api_name=name, **options)
            done.then(None, shown, js=_SHOW)
        for kind, button in buttons.items():
            saved = button.click(save(kind), [findings, tau], file, queue=False, api_name=kind)
            saved.then(None, file, file, js=_SAVE)
        page.unload(forget)
    page.queue(api_open=False, max_size=MAX_QUEUE)  # nobody passes by the queue
    return page


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """Yields an empty folder, deleted at the end; those of killed pages are deleted now."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        folder = Path(name)
        lock = lock_folder(folder, "temporary folder")  # which ends with the process
        try:
            for other in folder.parent.glob(f"{_PREFIX}*"):
                with contextlib.suppress(OSError, ValueError):  # it is in use, or gone by now
                    status = other.lstat()
                    if stat.S_ISDIR(status.st_mode) and status.st_uid == folder.stat().st_uid:
                        left = lock_folder(other, "temporary folder")
                        shutil.rmtree(other, ignore_errors=True)
                        left.release()
            files = folder / "files"
            files.mkdir(mode=0o700)
            yield files
        finally:
            lock.release()


class Uploads:
    """Uploaded files that wait for prediction, in a folder, empty at first. No others are taken."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._waiting = {}  # path -> bytes, the oldest first

    def keep(self, files: list[BinaryIO]) -> list[str]:
        """Returns the paths of copies, for which the oldest waiting files may be deleted; if the
        disk is full, no copy is left.
        """
        paths = []
        try:
            for file in files:
                handle, path = tempfile.mkstemp(dir=self.folder)
                paths.append(path)
                self._waiting[path] = 0
                with open(handle, "wb") as copy:
                    shutil.copyfileobj(file, copy)
                    self._waiting[path] = copy.tell()
        except BaseException:
            self.drop(paths)
            raise
        waiting = list(self._waiting.items())
        number, size = len(waiting), sum(size for _, size in waiting)
        for path, freed in waiting:
            if number <= MAX_WAITING and size <= 2**20 * MAX_WAITING_MB:
                break
            self.drop([path])
            number, size = number - 1, size - freed
        return paths

    def take(self, path: str) -> Path:
        """The file of a path of `keep`, from now on the caller's; a KeyError if there is none."""
        del self._waiting[path]
        return Path(path)

    def drop(self, paths: list[str]) -> None:
        """Deletes files of `keep` that were not taken."""
        for path in paths:
            if self._waiting.pop(path, None) is not None:
                Path(path).unlink(missing_ok=True)


def _is_local(host):
    """Whether only this computer has this name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Fence:
    """Serves the page's routes, to the page only, and forbids the browser requests to other hosts.

    Any site in the same browser can send requests to this computer; their origin shows it. With a
    domain that resolves to it, a site could even read the answers: so only local names are served.
    """

    def __init__(self, app, local):
        self.app, self.local = app, local

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path not in _PAGES and not path.startswith(_BELOW):
            return await PlainTextResponse("Not found", 404)(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            foreign = origin is not None and urlsplit(origin).netloc != host
            foreign = foreign or (self.local and not _is_local(urlsplit(f"//{host}").hostname))
        except ValueError:  # neither is a name
            foreign = True
        if foreign:
            return await PlainTextResponse("Not from here", 403)(scope, receive, send)
        size, most = 0, MAX_UPLOAD_MB if path == f"{_API}/upload" else MAX_REQUEST_MB

        async def bounded():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > 2**20 * most:
                raise _TooLargeError(f"Over {most} MB at once")
            return message

        async def with_headers(message):
            if message["type"] == "http.response.start":
                headers = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        await self.app(scope, bounded, with_headers)


def _app(predictor, uploads):
    app = FastAPI(openapi_url=None)
    places = asyncio.Semaphore(UPLOADS_AT_ONCE)

    # In place of Gradio's, which gives files of equal content one path, so that the first user who
    # deletes it deletes it for all, and which keeps files that were sent in part.
    @app.post(f"{_API}/upload")
    async def upload(request: Request):
        async with places:
            return await take(request)

    async def take(request):
        if "content-type" not in request.headers:
            return PlainTextResponse("No form of files", 400)
        options = {"max_files": MAX_FILES, "max_fields": 0}
        parser = MultiPartParser(request.headers, request.stream(), **options)
        try:
            form = await asyncio.wait_for(parser.parse(), UPLOAD_SECONDS)
        except MultiPartException as error:
            return PlainTextResponse(error.message, 400)
        except _TooLargeError as error:
            return PlainTextResponse(str(error), 413)
        except asyncio.TimeoutError:
            return PlainTextResponse(f"It took longer than {UPLOAD_SECONDS} s", 408)
        except ClientDisconnect:  # the tab was closed
            return PlainTextResponse("It broke off", 400)
        try:
            files = form.getlist("files")
            if any(file.size > 2**20 * MAX_FILE_MB for file in files):
                return PlainTextResponse(f"A file is larger than {MAX_FILE_MB} MB", 413)
            paths = await run_in_threadpool(uploads.keep, [file.file for file in files])
            asyncio.get_running_loop().call_later(KEPT, uploads.drop, paths)
            return JSONResponse(paths)
        finally:
            await form.close()

    # Progress of uploads is not reported.
    @app.get(f"{_API}/upload_progress")
    def upload_progress():
        return PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    # A browser would keep the run's history.
    off = ("run_history", "ssr_mode", "pwa", "mcp_server", "enable_monitoring")
    options = {"max_file_size": f"{MAX_FILE_MB}mb", "footer_links": [], **dict.fromkeys(off, False)}
    page = build_page(predictor, uploads)
    return gr.mount_gradio_app(app, page, path="/", theme=_THEME, css=_CSS, **options)


class _Server(uvicorn.Server):
    """Closes the connections by which Gradio knows that a tab is open, to end at once."""

    async def shutdown(self, sockets=None):
        outer = self.config.app.app
        outer.routes[-1].app.stop_event.set()  # it was mounted last
        await super().shutdown(sockets)


class _TooLargeError(Exception):
    pass


@contextlib.contextmanager
def server_of(
    predictor: Predictor, host: str = "127.0.0.1", port: int = 7860
) -> Iterator[tuple[uvicorn.Server, socket.socket, str]]:
    """Yields a server, the socket for its ``run(sockets=[...])``, and the page's URL. The default
    host serves this computer only; port 0 takes a free one. Raises an OSError that names host and
    port if it cannot listen there.
    """
    with contextlib.ExitStack() as stack:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = stack.enter_context(socket.create_server((host, port), family=family))
        except OSError as error:
            raise OSError(f"Cannot listen at {host}, port {port}: {error.strerror}") from error
        folder = stack.enter_context(upload_folder())
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # where Gradio's components look for them
        fence = _Fence(_app(predictor, Uploads(folder)), _is_local(host))
        limits = {"limit_concurrency": CONNECTIONS, "timeout_graceful_shutdown": GOODBYE}
        config = uvicorn.Config(fence, log_level="warning", access_log=False, **limits)
        address = f"[{host}]" if ":" in host else host
        yield _Server(config), listening, f"http://{address}:{listening.getsockname()[1]}/"


def serve(predictor: Predictor, host: str, port: int) -> None:
    """Serves the page until Ctrl-C, see `server_of`."""
    with server_of(predictor, host, port) as (server, listening, url):
        print(f"Open {url} in a browser; Ctrl-C ends it", flush=True)
        server.run(sockets=[listening])
