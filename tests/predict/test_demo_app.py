"""tools/demo_app.py: what it takes and what it refuses; the page is tested in web/."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from PIL import Image

from imrcnn_d2.cli import demo_app

from .test_predict import case  # noqa: F401  (a fixture)

pytest.importorskip("gradio", reason="the demo extra is not installed")


def failing(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        demo_app.main([str(argument) for argument in arguments])
    return stopped.value.code, capsys.readouterr().err


def looked_at(url, image):
    """What the page says of an image."""
    httpx = pytest.importorskip("httpx")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    api = f"{url}gradio_api"
    (path,) = httpx.post(f"{api}/upload", files=[("files", ("a.png", stream.getvalue()))]).json()
    file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    event = httpx.post(f"{api}/call/look", json={"data": [[file], 0.5]}).json()["event_id"]
    return httpx.get(f"{api}/call/look/{event}", timeout=60).text


def test_errors_are_a_line(capsys, tmp_path):
    status, err = failing(capsys, "--weights", tmp_path / "none.pth")
    assert status == 1 and "none.pth: no such file of weights" in err and "Traceback" not in err
    assert failing(capsys, "--port", 70000)[0] == 2


def test_a_port_that_is_taken_is_told():
    from imrcnn_d2.deploy.web.server import server_of

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127.0.0.1, port {port}: .*in use"):
            with server_of(None, port=port):
                pass


def test_defaults():
    args = demo_app.argument_parser().parse_args([])
    assert (args.host, args.weights) == ("127.0.0.1", "demo")


@pytest.mark.slow
def test_it_serves_until_it_is_told_to_end(case, tmp_path):  # noqa: F811
    """A process of its own, which leaves nothing in the folder for temporary files."""
    command = [sys.executable, "-W", "ignore", "tools/demo_app.py", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--weights", str(case / "model.pth")],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(process.stdout.readline, "")
        url = next(m[1] for line in lines if (m := re.search(r"Open (http://127\.\S+)", line)))
        with urllib.request.urlopen(url) as answer:
            assert b"IMR-CNN" in answer.read()
        assert list(tmp_path.glob("imrcnn-uploads-*"))
        assert "7000x7000" in looked_at(url, Image.new("L", (7000, 7000)))
        assert "figure" in looked_at(url, Image.new("L", (70, 70)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert not list(tmp_path.glob("imrcnn-uploads-*"))
    finally:
        process.kill()
