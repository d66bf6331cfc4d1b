"""The page as its server answers it, over HTTP, without a browser."""

import base64
import contextlib
import io
import itertools
import json
import re
import socket
import zipfile

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.deploy import Predictor

from ..conftest import TAU, random_image, write_bad_images
from ..test_other_models import weights  # noqa: F401  (a fixture)
from .conftest import serving, wait_for

gradio_client = pytest.importorskip("gradio_client", reason="the demo extra is not installed")
httpx = pytest.importorskip("httpx")


@contextlib.contextmanager
def session(url):
    client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
    yield client
    client.close()


@pytest.fixture
def client(site):
    with session(site.url) as client:
        yield client


@pytest.fixture(autouse=True)
def quiet_client(monkeypatch):
    """Gradio's client asks Hugging Face for things; what the server asks for is in test_browser."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def paths(tmp_path):
    """Three pictures."""
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for seed, path in enumerate(paths):
        Image.fromarray(random_image(seed)).save(path)
    return paths


def look(client, *paths, tau=TAU):
    """(cards, summary) after a drop."""
    files = [gradio_client.handle_file(str(path)) for path in paths]
    emptied, cards, summary = client.predict(files, tau, api_name="/look")
    assert not emptied
    return cards, summary


def findings_of(site, client):
    """What the server keeps of a session."""
    (findings,) = site.state()[client.session_hash].state_data.values()
    return findings


def figures(summary):
    """{what: count}."""
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(\d+)</dd>", summary)
    return {what: int(count) for what, count in pairs}


def saved(client, kind, tau):
    """(name, content) of a download."""
    file = client.predict(tau, api_name=f"/{kind}")
    return file["name"], base64.b64decode(file["base64"])


def test_from_a_drop_to_files(site, client, predictor, paths):
    cards, summary = look(client, *paths)
    found = predictor(paths)
    counts = [int((instances.scores >= TAU).sum()) for instances in found]
    assert [
        int(n) for n in re.findall(r'<figure class="card" data-key="\w+" data-shown="(\d+)"', cards)
    ] == counts
    assert cards.count("<path d=") == sum(map(len, found)), "all are there, most hidden"
    assert figures(summary)["images"] == 3
    assert figures(summary)["with a finding"] == sum(map(bool, counts))
    for instances in found:
        for score in instances.scores[instances.scores >= TAU].tolist():
            assert f"<span>{score:.3f}</span>" in cards

    before = len(site.forwards)
    for tau in (0.05, found[0].scores.median().item(), 0.999):
        captions, summary = client.predict(tau, api_name="/show")
        counts = [int((instances.scores >= tau).sum()) for instances in found]
        assert [caption["shown"] for caption in captions] == counts
        assert figures(summary)["findings" if sum(counts) != 1 else "finding"] == sum(counts)

        name, content = saved(client, "masks", tau)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for path, instances in zip(paths, found, strict=True):
                union = instances.pred_masks[instances.scores >= tau].any(dim=0).numpy()
                with Image.open(archive.open(path.name)) as mask:
                    assert ((np.asarray(mask) == 255) == union).all()
        name, content = saved(client, "labelme", tau)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for path, count in zip(paths, counts, strict=True):
                document = json.loads(archive.read(f"{path.stem}.json"))
                assert document["imagePath"] == path.name
                assert bool(document["shapes"]) == bool(count)
        name, content = saved(client, "coco", tau)
        coco = json.loads(content)
        assert [image["file_name"] for image in coco["images"]] == [path.name for path in paths]
        scores = [annotation["score"] for annotation in coco["annotations"]]
        assert scores == pytest.approx([s for i in found for s in i.scores.tolist()], abs=1e-5)
    assert len(site.forwards) == before, "τ is no reason to run the network"


def test_where_the_slider_starts_is_the_operating_point(tiny_run, paths):
    """To its last digit, though the slider has three of them."""
    scores = Predictor(None, tiny_run / "model_best.pth")(paths[0]).scores
    exact = Predictor(None, tiny_run / "model_best.pth", tau=scores[0].item() - 1e-6)
    with serving(exact) as site, session(site.url) as client:
        assert 'data-shown="1"' in look(client, paths[0], tau=round(exact.tau, 3))[0]
        assert json.loads(saved(client, "coco", round(exact.tau, 3))[1])["info"]["tau"] == exact.tau


def test_unreadable_files_are_listed_and_the_page_lives_on(client, paths, tmp_path):
    (tmp_path / "bad").mkdir()
    reasons = write_bad_images(tmp_path / "bad")
    cards, summary = look(client, *(tmp_path / "bad" / name for name in reasons), paths[0])
    for name, reason in reasons.items():
        (message,) = re.findall(
            rf'<strong class="name">{name}</strong>\s*<span>(.*?)</span>', cards
        )
        assert reason in message
    assert figures(summary)["not readable"] == len(reasons) and figures(summary)["image"] == 1
    assert len(client.predict(TAU, api_name="/show")[0]) == 1 + len(reasons)

    cards, summary = look(client, tmp_path / "bad" / "text.jpg")
    assert figures(summary) == {"not readable": 1}
    with pytest.raises(gradio_client.exceptions.AppError, match="no image to write"):
        saved(client, "masks", TAU)
    assert "<figure" in look(client, paths[0])[0]


def test_limits(site, client, paths, monkeypatch):
    from imrcnn_d2.deploy.web import page, server

    upload = f"{site.url}gradio_api/upload"

    def send(number, size):
        files = [("files", (f"{i}.png", bytes(size))) for i in range(number)]
        answer = httpx.post(upload, files=files)
        return answer.status_code, answer.text

    monkeypatch.setattr(server, "MAX_FILE_MB", 0.01)
    assert send(1, 11_000) == (413, "A file is larger than 0.01 MB")
    monkeypatch.setattr(server, "MAX_UPLOAD_MB", 0.02)
    assert send(3, 9_000) == (413, "The files have more than 0.02 MB together")
    assert send(server.MAX_FILES + 1, 1)[0] == 400
    assert not list(site.folder.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(page, "MAX_FILES", 2)
    with pytest.raises(gradio_client.exceptions.AppError, match="3 files at once; at most 2"):
        look(client, *paths)
    assert not list(site.folder.iterdir())
    assert "<figure" in look(client, paths[0])[0]


def test_nothing_is_kept(site, paths, monkeypatch):
    from imrcnn_d2.deploy.web import server

    monkeypatch.setattr("gradio.utils.get_heartbeat_rate", lambda: 0.2)  # seconds
    with session(site.url) as client:
        look(client, *paths)
        assert not list(site.folder.iterdir()), "deleted when they were read"
        assert client.session_hash in site.state()
    wait_for(lambda: client.session_hash not in site.state())

    # uploaded, and then the tab was closed
    monkeypatch.setattr(server, "KEPT", 1)
    answer = httpx.post(f"{site.url}gradio_api/upload", files=[("files", ("a.png", b"a"))])
    assert answer.status_code == 200 and len(list(site.folder.iterdir())) == 1
    wait_for(lambda: not list(site.folder.iterdir()))

    # cut off on its way
    host, port = site.url.removeprefix("http://").strip("/").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            b'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            + bytes(50_000)
        )
    assert httpx.get(site.url).status_code == 200
    assert not list(site.folder.iterdir())


def test_tabs_that_never_close_are_bounded(site, client, paths, monkeypatch):
    """The oldest is forgotten, by what is kept of all; and one alone cannot take it all."""
    from imrcnn_d2.deploy.web import page

    with session(site.url) as second, session(site.url) as third:
        look(client, paths[0])
        held = sum(f.num_bytes for f in findings_of(site, client))
        monkeypatch.setattr(page, "MAX_KEPT_MB", 2.5 * held / 2**20)
        look(second, paths[0])
        client.predict(TAU, api_name="/show")  # now it is the second that was not used longest
        look(third, paths[0])
        assert [each.session_hash in site.state() for each in (client, second, third)] == [
            *(True, False, True)
        ]
        assert look(second, paths[0])[0].count("<figure") == 1
        assert client.session_hash not in site.state()
        with pytest.raises(gradio_client.exceptions.AppError, match="drop fewer"):
            look(third, *paths)
    assert not list(site.folder.iterdir())


def test_uploads_at_the_same_time_are_bounded(site, monkeypatch):
    """Those that come to no end are cut off, and the next has its turn."""
    from imrcnn_d2.deploy.web import server

    monkeypatch.setattr(server, "UPLOAD_SECONDS", 1)
    host, port = site.url.removeprefix("http://").strip("/").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(server.UPLOADS_AT_ONCE):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            )
            stalled = connection
        answer = httpx.post(
            f"{site.url}gradio_api/upload", files=[("files", ("a.png", b"a"))], timeout=60
        )
        assert stalled.recv(100).startswith(b"HTTP/1.1 408")
    assert answer.status_code == 200
    for path in site.folder.iterdir():
        path.unlink()


def test_one_session_does_not_see_or_disturb_another(site, client, paths):
    with session(site.url) as other:
        jobs = [
            each.submit([gradio_client.handle_file(str(paths[0]))], TAU, api_name="/look")
            for each in (client, other)
        ]
        assert all("<figure" in job.result()[1] for job in jobs), "the same file, at the same time"
        look(other, *paths[1:])
        assert len(client.predict(TAU, api_name="/show")[0]) == 1
        assert len(other.predict(TAU, api_name="/show")[0]) == 2


def test_it_answers_this_computer_and_asks_no_other(site, client, tmp_path):
    assert site.address == "127.0.0.1"
    answer = httpx.get(site.url)
    assert answer.headers["content-security-policy"].startswith("default-src 'self' ")
    assert not re.findall(
        r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//', answer.text
    )
    assert "research use only" in answer.text.lower()
    config = httpx.get(f"{site.url}config").json()
    assert not config["analytics_enabled"] and not config["run_history"]
    for route in (
        "deep_link",
        "file=/etc/hosts",
        "file=http://example.com/",
        "proxy=http://a.hf.space",
    ):
        assert httpx.get(f"{site.url}gradio_api/{route}").status_code == 404, route

    # Neither a file of this machine nor one of another is looked at as if it were uploaded.
    own = tmp_path / "own.png"
    Image.fromarray(random_image(0)).save(own)
    for path, stream in itertools.product(
        (str(own), f"{site.folder}/../{own}", "http://example.com/a.png"), (False, True)
    ):
        file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        file["is_stream"] = stream  # of which Gradio does not look at the path
        data = {"data": [[file], TAU], "session_hash": "s"}
        event = httpx.post(f"{site.url}gradio_api/call/look", json=data).json()["event_id"]
        answer = httpx.get(f"{site.url}gradio_api/call/look/{event}", timeout=60)
        assert "event: error" in answer.text and "no longer there" in answer.text
    assert own.is_file()


def test_other_sites_in_the_same_browser_are_refused(site):
    host = site.url.removeprefix("http://").rstrip("/")
    upload = f"{site.url}gradio_api/upload"
    for headers in (
        {"origin": "http://example.com"},
        {"origin": "null"},
        {"host": "example.com", "origin": "http://example.com"},  # a name that leads to 127.0.0.1
        {"host": "example.com"},
    ):
        answer = httpx.post(upload, files={"files": b"a"}, headers=headers)
        assert answer.status_code == 403, headers
    assert not list(site.folder.iterdir())
    for headers in ({"origin": f"http://{host}"}, {"host": host.replace("127.0.0.1", "localhost")}):
        assert httpx.get(site.url, headers=headers).status_code == 200


def test_nobody_passes_by_the_queue(site):
    data = {"data": [[], TAU], "session_hash": "s"}
    assert httpx.post(f"{site.url}gradio_api/run/look", json=data).status_code >= 400


def test_image_classifiers(weights, paths):  # noqa: F811
    with serving(Predictor(None, weights)) as site, session(site.url) as client:
        cards, summary = look(client, *paths)
        probabilities = Predictor(None, weights)(paths)
        for scores in probabilities:
            for score in scores.tolist():
                assert f"<td>{100 * score:.1f} %</td>" in cards
        assert figures(summary) == {"images": 3}
        coco = json.loads(saved(client, "coco", TAU)[1])
        for annotation, scores in zip(coco["annotations"], probabilities, strict=True):
            assert annotation["probabilities"] == pytest.approx(scores.tolist(), abs=1e-5)
        assert "masks" not in str(client.view_api(return_format="dict", print_info=False))
