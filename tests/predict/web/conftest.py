"""The page of the tiny model, served as tools/demo_app.py does."""

import contextlib
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", None)
_asked = []


def _note(event, arguments):
    """Whom this process asks for anything; an audit hook, which stays."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _asked.append(arguments[1][0])
    elif event == "socket.getaddrinfo":
        _asked.append(arguments[0])


sys.addaudithook(_note)


@contextlib.contextmanager
def serving(predictor):
    """
    Yields:
        SimpleNamespace: ``url``; ``address`` that it listens at; ``folder`` of uploads; ``state()``
        of sessions; ``forwards``, an item for each time that the network ran.
    """
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    from imrcnn_d2.deploy.web.server import server_of

    forwards = []
    model = predictor._runtime.model
    hook = getattr(model, "backbone", model).register_forward_hook(lambda *_: forwards.append(1))
    with server_of(predictor, port=0) as (server, listening, url):
        import gradio.utils

        page = server.config.app.app.routes[-1].app
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield SimpleNamespace(
                url=url,
                address=listening.getsockname()[0],
                folder=Path(gradio.utils.get_upload_folder()),
                state=lambda: page.state_holder.session_data,
                forwards=forwards,
            )
        finally:
            server.should_exit = True
            thread.join(60)
            hook.remove()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def site(predictor):
    """Of the tiny detector. At the end no upload is left, and no other computer was asked."""
    with serving(predictor) as site:
        yield site
        assert not list(site.folder.iterdir())
    assert not site.folder.exists()
    assert {host for host in _asked if host not in LOCAL} == set()


def wait_for(condition):
    """Until it is true; fails if it never is."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited a minute"
        time.sleep(0.05)
