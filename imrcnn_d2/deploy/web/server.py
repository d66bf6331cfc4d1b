"""Serves the page: to this computer, with limits, and without a call to any other."""

import asyncio
import contextlib
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import JSONResponse, PlainTextResponse

from imrcnn_d2.deploy.predictor import Predictor
from imrcnn_d2.deploy.web.page import LOOK, MAX_FILES, build_page
from imrcnn_d2.utils.files import lock_folder

__all__ = ["KEPT", "MAX_FILE_MB", "Uploads", "serve", "server_of", "upload_folder"]


KEPT = 3600  # seconds at most, where nothing comes and reads it
MAX_WAITING, MAX_WAITING_MB = 1000, 2000  # files, and of all together: then the oldest go
_PREFIX = "imrcnn-uploads-"


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
        """
        Returns the paths of copies. The oldest waiting files may be deleted for them.

        Raises:
            OSError: the disk is full; no copy is left.
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
        self._drop_oldest()
        return paths

    def _drop_oldest(self):
        waiting = list(self._waiting.items())
        number, size = len(waiting), sum(size for _, size in waiting)
        for path, freed in waiting:
            if number <= MAX_WAITING and size <= 2**20 * MAX_WAITING_MB:
                return
            self.drop([path])
            number, size = number - 1, size - freed

    def take(self, path: str) -> Path:
        """
        The file of a path of `keep`, which is the caller's from now on.

        Raises:
            KeyError: there is no such upload, or it was taken before.
        """
        del self._waiting[path]
        return Path(path)

    def drop(self, paths: list[str]) -> None:
        """Deletes files of `keep` that were not taken."""
        for path in paths:
            if self._waiting.pop(path, None) is not None:
                Path(path).unlink(missing_ok=True)


MAX_FILE_MB = 50
MAX_UPLOAD_MB = 500  # of all files together
UPLOADS_AT_ONCE, UPLOAD_SECONDS = 4, 600  # the others wait for one of them to end
CONNECTIONS = 500  # at once: a tab has two or three
GOODBYE = 2  # seconds that open connections are given at the end

# What the page needs of Gradio. Other routes fetch URLs, serve files or write sessions to disk.
_PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
_API = "/gradio_api"
_BELOW = (
    *("/assets/", "/static/", "/svelte/"),
    *(f"{_API}/{name}" for name in ("upload", "info", "app_id", "queue/", "run/", "call/")),
    *(f"{_API}/{name}" for name in ("heartbeat/", "cancel", "reset", "startup-events")),
)
_LOCAL = ("127.0.0.1", "::1", "localhost")
_HEADERS = {
    # The browser requests nothing from other hosts, whatever a part of Gradio would like.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class _Fence:
    """
    Serves the page's routes, to the page only, and forbids the browser requests to other hosts.

    Any site in the same browser can send requests to this computer; their origin shows it. With a
    domain that resolves to this computer, a site could even read the answers; hence a server for
    this computer only accepts its local names only.
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
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign or (self.local and urlsplit(f"//{host}").hostname not in _LOCAL):
            return await PlainTextResponse("Not from here", 403)(scope, receive, send)

        async def with_headers(message):
            if message["type"] == "http.response.start":
                headers = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        await self.app(scope, receive, with_headers)


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
        limit = 2**20 * MAX_FILE_MB
        parser = MultiPartParser(
            request.headers, _bounded(request.stream()), max_files=MAX_FILES, max_fields=0
        )
        try:
            form = await asyncio.wait_for(parser.parse(), UPLOAD_SECONDS)
        except MultiPartException as error:
            return PlainTextResponse(error.message, 400)
        except _TooLargeError as error:
            return PlainTextResponse(str(error), 413)
        except asyncio.TimeoutError:
            return PlainTextResponse(f"It took longer than {UPLOAD_SECONDS} s", 408)
        try:
            files = form.getlist("files")
            for file in files:
                if file.size > limit:
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

    return gr.mount_gradio_app(
        app,
        build_page(predictor, uploads),
        path="/",
        max_file_size=f"{MAX_FILE_MB}mb",
        footer_links=[],
        run_history=False,  # which a browser would keep
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        **LOOK,
    )


class _Server(uvicorn.Server):
    """Closes the connections by which Gradio knows that a tab is open, to end at once."""

    async def shutdown(self, sockets=None):
        outer = self.config.app.app
        outer.routes[-1].app.stop_event.set()  # it was mounted last
        await super().shutdown(sockets)


class _TooLargeError(Exception):
    pass


async def _bounded(stream):
    size = 0
    async for chunk in stream:
        size += len(chunk)
        if size > 2**20 * MAX_UPLOAD_MB:
            raise _TooLargeError(f"The files have more than {MAX_UPLOAD_MB} MB together")
        yield chunk


@contextlib.contextmanager
def server_of(
    predictor: Predictor, host: str = "127.0.0.1", port: int = 7860
) -> Iterator[tuple[uvicorn.Server, socket.socket, str]]:
    """
    Yields a server, the socket for its ``run(sockets=[...])``, and the page's URL. Uploads are in a
    temporary folder that is deleted at the end.

    Args:
        host: address to listen at; the default serves this computer only.
        port: 0 for a free one.

    Raises:
        OSError: it cannot listen there; the error names host and port.
    """
    with contextlib.ExitStack() as stack:
        try:
            listening = stack.enter_context(_listen(host, port))
        except OSError as error:
            raise OSError(f"Cannot listen at {host}, port {port}: {error.strerror}") from error
        folder = stack.enter_context(upload_folder())
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # where Gradio's components look for them
        config = uvicorn.Config(
            _Fence(_app(predictor, Uploads(folder)), host in _LOCAL),
            log_level="warning",
            access_log=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=GOODBYE,
        )
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listening.getsockname()[1]}/"
        yield _Server(config), listening, url


def _listen(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def serve(predictor: Predictor, host: str, port: int) -> None:
    """Serves the page until Ctrl-C, see `server_of`."""
    with server_of(predictor, host, port) as (server, listening, url):
        print(f"Open {url} in a browser; Ctrl-C ends it", flush=True)
        server.run(sockets=[listening])
