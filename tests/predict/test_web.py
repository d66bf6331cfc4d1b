"""The page as its server answers it, over HTTP; and in a real browser (slow)."""

import base64
import contextlib
import io
import itertools
import json
import logging
import re
import socket
import tempfile
import threading
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
from chromium import TIMEOUT, chromium
from dicoms import PATIENT, write_dicom
from PIL import Image

from imrcnn_d2 import __version__
from imrcnn_d2.deploy import Predictor, predict_files
from imrcnn_d2.deploy.inputs import public_name
from imrcnn_d2.utils.files import lock_folder

from .conftest import TAU, random_image, read_coco, save_image, serving, wait_for, write_bad_images

gradio_client = pytest.importorskip("gradio_client", reason="the demo extra is not installed")
httpx = pytest.importorskip("httpx")
import imrcnn_d2.deploy.web as app  # noqa: E402

AppError, download = gradio_client.exceptions.AppError, app.download


def uploaded(predictor, folder, name, seed):
    """The finding of an image on the server, by its user's name."""
    Image.fromarray(random_image(seed)).save(folder / f"upload{seed}", "PNG")
    return app.find(predictor, folder / f"upload{seed}", name)


def unzipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_files_are_those_of_the_command(predictor, tmp_path):
    findings, out = [], tmp_path / "out"
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(("a.jpg", "a.png", "c.png")):
        findings.append(uploaded(predictor, tmp_path, name, seed))
        Image.fromarray(random_image(seed)).save(tmp_path / "in" / name, "PNG")
    predict_files(predictor, [tmp_path / "in"], out, save=["masks", "labelme"])
    files = {kind: download(findings, kind, TAU, predictor) for kind in app.DOWNLOADS}
    assert (files["coco"][0], files["masks"][0]) == ("predictions.json", "masks.zip")
    assert json.loads(files["coco"][1]) == read_coco(out)
    masks, documents = unzipped(files["masks"][1]), unzipped(files["labelme"][1])
    assert masks == {path.name: path.read_bytes() for path in (out / "masks").iterdir()}
    assert sorted(masks) == ["a.jpg.png", "a.png.png", "c.png"], "no two of one name"
    assert download(findings[2:], "masks", TAU, predictor) == ("c.png", masks["c.png"])
    for path in (out / "labelme").iterdir():
        document, expected = json.loads(documents.pop(path.name)), json.loads(path.read_text())
        expected["imagePath"] = expected["imagePath"].split("/")[-1]
        assert document == expected
    assert not documents
    places = []
    for annotation, mark in zip(findings[0].annotations, app.marks(findings[0]), strict=True):
        mask = mask_util.decode(annotation["segmentation"]).astype(bool)
        contour, lines = np.zeros_like(mask), mark["path"].split("M")[1:]
        for line in lines:
            points = np.array([p.split() for p in line.strip("Z").split("L")], int)
            assert mask[points[:, 1], points[:, 0]].all() or len(lines) > 1
            contour[points[:, 1], points[:, 0]] = True
        places.append((mark["left"], mark["top"]))
        for axis in (0, 1):
            ends, expected = (np.flatnonzero(m.any(axis=axis))[[0, -1]] for m in (contour, mask))
            assert (ends == expected).all()
    assert 3.5 <= np.min(places) and np.max(places) <= 96.5, "the numbers are seen whole"
    apart = abs(np.array(places)[:, None] - places).max(axis=2) + 100 * np.eye(len(places))
    assert apart.min() >= 7, "none lies on another"


def test_uploads_of_patients(predictor, tmp_path):
    findings, still, two = [], random_image(0), np.stack([random_image(2), random_image(3)])
    names = {"Erika.dcm": (still, "NO"), "Musterfrau.jpg": (still, "YES"), "4711.dcm": (two, "NO")}
    for name, (pixels, burned_in) in names.items():
        path = write_dicom(tmp_path / "upload", pixels, BurnedInAnnotation=burned_in)
        public, finding = public_name(path), app.find(predictor, path, name)
        assert finding.name == public and not path.exists()
        findings.append(finding)
    assert findings[1].jpeg is findings[1].png is None and findings[1].annotations
    assert "2 or more frames" in findings[2].error
    made = [app.cards_html(findings, predictor, TAU).encode()]
    for kind in app.DOWNLOADS:
        name, content = download(findings, kind, TAU, predictor)
        files = unzipped(content) if content.startswith(b"PK") else {}
        made += [name.encode(), content, *map(str.encode, files), *files.values()]
    for word in "^".join(PATIENT.values()).lower().encode().split(b"^"):
        assert not [part for part in made if word in part.lower()], word
    files = unzipped(download(findings, "labelme", TAU, predictor)[1])
    (document,) = (json.loads(content) for name, content in files.items() if "json" in name)
    with Image.open(io.BytesIO(files[document["imagePath"]])) as frame:
        assert (np.asarray(frame) == still).all()
    assert len(files) == 2, "of the one that shows the patient's name nothing is written"
    pytest.raises(ValueError, download, findings[1:], "labelme", TAU, predictor).match("no image")


def test_names(predictor, tmp_path):
    names = ["a.jpg", "C:\\x\\a.jpg", "/etc/a.jpg", "a (2).jpg", "../..", "", "\0", "é.png"]
    unique = app.unique_names(names)
    assert unique[:3] == ["a.jpg", "a (2).jpg", "a (3).jpg"] and unique[-1] == "é.png"
    assert len(set(unique)) == len(names)
    assert not any(set(name) & set("/\\\0") or name in ("", ".", "..") for name in unique)
    Image.fromarray(random_image(0, 200, 3200)).save(tmp_path / "wide", "PNG")
    wide = app.find(predictor, tmp_path / "wide", "wide.png")
    assert wide.size == (200, 3200) and Image.open(io.BytesIO(wide.jpeg)).size == (1600, 100)
    (bad := tmp_path / "bad").touch()
    name = "<img src=x onerror=alert(1)>.png"
    findings = [uploaded(predictor, tmp_path, name, 0), app.find(predictor, bad, name)]
    html = app.cards_html(findings, predictor, TAU)
    assert "<img src=x" not in html and html.count("&lt;img src=x") >= 3


def session(url):
    return contextlib.closing(gradio_client.Client(url, verbose=False, analytics_enabled=False))


@pytest.fixture
def client(site):
    with session(site.url) as client:
        yield client


@pytest.fixture(autouse=True)
def quiet_client(monkeypatch):
    """Gradio's client asks Hugging Face for things; what the page asks for is in `tab`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def paths(tmp_path):
    return [save_image(tmp_path / f"{name}.png", seed) for seed, name in enumerate("abc")]


def look(client, *paths, tau=TAU):
    """(cards, summary) after a drop."""
    files = [gradio_client.handle_file(str(path)) for path in paths]
    emptied, cards, summary = client.predict(files, tau, api_name="/look")
    assert not emptied
    return cards, summary


def counts_of(summary):
    """{label: count}."""
    return {k: int(count) for k, count in re.findall(r"<dt>(.*?)</dt><dd>(\d+)</dd>", summary)}


def saved(client, kind, tau):
    """The content of a download."""
    return base64.b64decode(client.predict(tau, api_name=f"/{kind}")["base64"])


def test_from_a_drop_to_files(site, client, predictor, paths):
    cards, summary = look(client, *paths)
    expected = predictor(paths)
    scores = [instances.scores.tolist() for instances in expected]
    assert cards.count("<path d=") == len(sum(scores, [])), "all are there, most hidden"
    for score in (score for score in sum(scores, []) if score >= TAU):
        assert f"<span>{score:.3f}</span>" in cards
    counts = [sum(score >= TAU for score in each) for each in scores]
    shown = re.findall(r'<figure class="card" data-key="\w+" data-shown="(\d+)"', cards)
    assert list(map(int, shown)) == counts
    positive = sum(map(bool, counts))
    assert counts_of(summary).items() >= {"images": 3, "with a finding": positive}.items()
    before = len(site.forwards)
    for tau in (0.05, expected[0].scores.median().item(), 0.999):
        captions, summary = client.predict(tau, api_name="/show")
        counts = [sum(score >= tau for score in each) for each in scores]
        assert [caption["shown"] for caption in captions] == counts
        if not counts[0]:
            assert f"highest score {max(scores[0]):.3f}" in captions[0]["html"]
        assert counts_of(summary)["findings" if sum(counts) != 1 else "finding"] == sum(counts)
        masks, documents = (unzipped(saved(client, kind, tau)) for kind in ("masks", "labelme"))
        for path, instances, count in zip(paths, expected, counts, strict=True):
            union = instances.pred_masks[instances.scores >= tau].any(dim=0).numpy()
            with Image.open(io.BytesIO(masks[path.name])) as mask:
                assert ((np.asarray(mask) == 255) == union).all()
            assert bool(json.loads(documents[f"{path.stem}.json"])["shapes"]) == bool(count)
        coco = json.loads(saved(client, "coco", tau))
        assert coco["info"]["tau"] == tau
        assert [image["file_name"] for image in coco["images"]] == [path.name for path in paths]
        of_images = [(a["image_id"], a["score"]) for a in coco["annotations"]]
        pairs = [(i, score) for i, each in enumerate(scores, 1) for score in each]
        np.testing.assert_allclose(of_images, pairs, atol=1e-5)
    assert len(site.forwards) == before, "τ is no reason to run the network"


def test_the_slider_starts_at_the_operating_point(predictor, weights, paths):
    """To its last digit, though the slider has three of them."""
    tau = predictor(paths[0]).scores[0].item() - 1e-6
    with serving(Predictor(None, weights, tau=tau)) as site, session(site.url) as client:
        assert 'data-shown="1"' in look(client, paths[0], tau=round(tau, 3))[0]
        assert json.loads(saved(client, "coco", round(tau, 3)))["info"]["tau"] == tau


def test_the_page_shows_mapped_scores(mapped, paths):
    """And lets the slider go down to the lowest of them."""
    instances = mapped(paths[0])
    shown = int((instances.scores >= TAU).sum())
    with serving(mapped) as site, session(site.url) as client:
        (tau,) = [part["props"] for part in client.config["components"] if part["type"] == "slider"]
        assert tau["value"] == TAU and "probability" in tau["info"]
        assert 0 <= mapped.score_map(app.LEAST_SCORE) - tau["minimum"] < 0.001 < app.LEAST_SCORE / 2
        cards = look(client, paths[0])[0]
        assert f'data-shown="{shown}"' in cards
        for score in instances.scores[:shown].tolist():
            assert f"<span>{score:.3f}</span>" in cards
        coco = json.loads(saved(client, "coco", TAU))
        pairs = [(a["score"], a["raw_score"]) for a in coco["annotations"]]
        expected = zip(instances.scores.tolist(), instances.raw_scores.tolist(), strict=True)
        assert pairs == list(expected)


def test_what_cannot_be_taken_is_refused_and_the_page_lives_on(
    site, client, paths, tmp_path, monkeypatch
):
    (tmp_path / "bad").mkdir()
    reasons = write_bad_images(tmp_path / "bad")
    cards, summary = look(client, *(tmp_path / "bad" / name for name in reasons), paths[0])
    messages = re.findall(r'<strong class="name">(.*?)</strong>\s*<span>(.*?)</span>', cards)
    assert all(reasons.pop(name) in message for name, message in messages) and not reasons
    assert counts_of(summary).items() >= {"not readable": len(messages), "image": 1}.items()
    assert counts_of(look(client, tmp_path / "bad" / "text.jpg")[1]) == {"not readable": 1}
    pytest.raises(AppError, saved, client, "masks", TAU).match("no image")
    for bound, limit, number, size, status in (
        ("MAX_FILE_MB", 0.01, 1, 10_486, 413),
        ("MAX_UPLOAD_MB", 0.02, 3, 9_000, 413),
        ("MAX_FILES", app.MAX_FILES, app.MAX_FILES + 1, 1, 400),
    ):
        monkeypatch.setattr(app, bound, limit)
        files = [("files", (f"{i}.png", bytes(size))) for i in range(number)]
        refused = httpx.post(f"{site.url}gradio_api/upload", files=files)
        assert refused.status_code == status and str(limit) in refused.text
    monkeypatch.undo()
    monkeypatch.setattr(app, "MAX_FILES", 2)
    pytest.raises(AppError, look, client, *paths).match("3 files at once; at most 2")
    assert not list(site.folder.iterdir())
    assert look(client, *paths[:2])[0].count("<figure") == 2


UPLOAD = (
    b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    b'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(50_000)
)


def test_nothing_is_kept_and_uploads_are_bounded(site, paths, monkeypatch):
    def start_upload():
        """A connection, and the beginning of an upload that never ends."""
        connection = socket.create_connection((site.address, httpx.URL(site.url).port))
        connection.sendall(UPLOAD)
        return connection

    def upload_whole():
        files = {"files": ("a.png", b"a")}
        answer = httpx.post(f"{site.url}gradio_api/upload", files=files, timeout=60)
        assert answer.status_code == 200 and len(list(site.folder.iterdir())) == 1

    monkeypatch.setattr("gradio.utils.get_heartbeat_rate", lambda: 0.2)  # seconds
    with session(site.url) as client:
        look(client, *paths)
        assert not list(site.folder.iterdir()), "deleted when they were read"
        assert client.session_hash in site.state()
    wait_for(lambda: client.session_hash not in site.state())
    monkeypatch.setattr(app, "KEPT", 1)  # uploaded, and then the tab was closed
    upload_whole()
    wait_for(lambda: not list(site.folder.iterdir()))
    start_upload().close()  # cut off on its way
    assert httpx.get(site.url).status_code == 200
    assert not list(site.folder.iterdir())

    # Those that come to no end are cut off, and the next has its turn.
    monkeypatch.undo()
    monkeypatch.setattr(app, "UPLOAD_SECONDS", 1)
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(start_upload()) for _ in range(app.UPLOADS_AT_ONCE)]
        upload_whole()
        assert stalled[-1].recv(100).startswith(b"HTTP/1.1 408")
    for path in site.folder.iterdir():
        path.unlink()


def test_odd_requests_are_refused_without_a_traceback(site, monkeypatch):
    errors, handler = [], logging.Handler()
    monkeypatch.setattr(handler, "emit", errors.append)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [handler])
    api, connection = f"{site.url}gradio_api", (site.address, httpx.URL(site.url).port)
    with socket.create_connection(connection) as upload:  # a tab that is closed on its way
        upload.sendall(UPLOAD)
    assert httpx.post(f"{api}/upload", content=b"no form").status_code == 400
    monkeypatch.setattr(app, "MAX_REQUEST_MB", 0.01)
    for size, status in ((100, 200), (20_000, 400)):
        body = {"data": [None, TAU], "session_hash": "s", "more": "x" * size}
        assert httpx.post(f"{api}/run/show", json=body).status_code == status
    time.sleep(0.5)  # of an error that would come
    assert not errors and not list(site.folder.iterdir())


def test_sessions_are_apart_and_tabs_that_never_close_are_bounded(site, client, paths, monkeypatch):
    """The oldest is forgotten, by what is kept of all; and one alone cannot take it all."""
    with session(site.url) as second, session(site.url) as third:
        files = [gradio_client.handle_file(str(paths[0]))]
        jobs = [each.submit(files, TAU, api_name="/look") for each in (client, second)]
        assert all("<figure" in job.result()[1] for job in jobs), "the same file, at the same time"
        look(second, *paths[1:])
        shown = [client.predict(TAU, api_name="/show")[0], second.predict(TAU, api_name="/show")[0]]
        assert list(map(len, shown)) == [1, 2]
        (findings,) = site.state()[client.session_hash].state_data.values()
        held = sum(finding.num_bytes for finding in findings)
        monkeypatch.setattr(app, "MAX_KEPT_MB", 2.5 * held / 2**20)
        look(second, paths[0])
        client.predict(TAU, api_name="/show")  # now it is the second that was not used longest
        look(third, paths[0])
        kept = [each.session_hash in site.state() for each in (client, second, third)]
        assert kept == [True, False, True]
        assert look(second, paths[0])[0].count("<figure") == 1
        assert client.session_hash not in site.state()
        pytest.raises(AppError, look, third, *paths).match("drop fewer")
    assert not list(site.folder.iterdir())


def test_which_addresses_are_this_computer(predictor):
    for host, local in (("127.0.0.2", True), ("localhost", True), ("0.0.0.0", False)):
        with app.server_of(predictor, host, 0) as (server, *_):
            assert server.config.app.local is local, host


def test_it_answers_this_computer_and_asks_no_other(site, client, tmp_path):
    assert site.address == "127.0.0.1"
    port = httpx.URL(site.url).port
    with pytest.raises(OSError, match=rf"{port}: .*in use"), app.server_of(None, port=port):
        pass
    answer, api = httpx.get(site.url), f"{site.url}gradio_api"
    assert answer.headers["content-security-policy"].startswith("default-src 'self' ")
    foreign = r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//'
    assert not re.findall(foreign, answer.text)
    assert "research use only" in answer.text.lower()
    config = httpx.get(f"{site.url}config").json()
    assert not config["analytics_enabled"] and not config["run_history"]
    assert not any(c["props"]["visible"] for c in config["components"] if c["type"] == "json")
    files = "file=/etc/hosts", "file=http://example.com/"
    for route in ("deep_link", *files, "proxy=http://a.hf.space"):
        assert httpx.get(f"{api}/{route}").status_code == 404, route
    data = {"data": [[], TAU], "session_hash": "s"}  # nobody passes by the queue
    assert httpx.post(f"{api}/run/look", json=data).status_code >= 400

    # Neither a file of this machine nor one of another is looked at as if it were uploaded.
    mine = save_image(tmp_path / "mine.png", 0)
    paths = str(mine), f"{site.folder}/../{mine}", "http://example.com/a.png"
    for path, stream in itertools.product(paths, (False, True)):
        file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        data["data"][0] = [{**file, "is_stream": stream}]  # of a stream Gradio checks no path
        event = httpx.post(f"{api}/call/look", json=data).json()["event_id"]
        answer = httpx.get(f"{api}/call/look/{event}", timeout=60)
        assert "event: error" in answer.text and "no longer there" in answer.text
    assert mine.is_file()


def test_other_sites_in_the_same_browser_are_refused(site):
    port, foreign = httpx.URL(site.url).port, "http://example.com"
    both = {"host": "example.com", "origin": foreign}  # a name that leads to 127.0.0.1
    odd = {"origin": "http://["}, {"host": "["}
    for headers in ({"origin": foreign}, {"origin": "null"}, {"host": "example.com"}, both, *odd):
        answer = httpx.post(f"{site.url}gradio_api/upload", files={"files": b"a"}, headers=headers)
        assert answer.status_code == 403, headers
    assert not list(site.folder.iterdir())
    names = "localhost", "127.0.0.2", "[::1]"
    for headers in ({"origin": site.url.rstrip("/")}, *({"host": f"{n}:{port}"} for n in names)):
        assert httpx.get(site.url, headers=headers).status_code == 200


def test_image_classifiers(classifier, paths):
    with serving(classifier) as site, session(site.url) as client:
        cards, summary = look(client, *paths)
        probabilities = [scores.tolist() for scores in classifier(paths)]
        assert all(f"<td>{100 * score:.1f} %</td>" in cards for score in sum(probabilities, []))
        assert counts_of(summary) == {"images": 3}
        annotations = json.loads(saved(client, "coco", TAU))["annotations"]
        written = [score for annotation in annotations for score in annotation["probabilities"]]
        assert written == pytest.approx(sum(probabilities, []), abs=1e-5)
        assert "masks" not in str(client.view_api(return_format="dict", print_info=False))


def test_only_uploads_are_taken_once_and_the_oldest_go(tmp_path, monkeypatch):
    uploads, mine = app.Uploads(tmp_path), tmp_path / "mine"
    mine.touch()
    paths = uploads.keep([io.BytesIO(b"same"), io.BytesIO(b"same"), io.BytesIO(b"c")])
    assert len(set(paths)) == 3, "equal files are two"
    taken = uploads.take(paths[0])
    assert taken.read_bytes() == b"same"
    uploads.drop([*paths, str(mine)])
    assert set(tmp_path.iterdir()) == {mine, taken}, "it is its taker's"
    for path in (*paths, str(mine), "/etc/hosts", "http://example.com/a"):
        pytest.raises(KeyError, uploads.take, path)
    full = SimpleNamespace(read=lambda *_: open("/"))  # raises an OSError, as a full disk does
    pytest.raises(OSError, uploads.keep, [io.BytesIO(b"first"), full])
    assert set(tmp_path.iterdir()) == {mine, taken}
    for bound, most, left in (("MAX_WAITING", 3, 3), ("MAX_WAITING_MB", 24 / 2**20, 2)):
        monkeypatch.setattr(app, bound, most)
        paths = [uploads.keep([io.BytesIO(bytes([n]) * 12)])[0] for n in range(5)]
        assert {*map(str, tmp_path.iterdir())} == {str(mine), str(taken), *paths[-left:]}
        pytest.raises(KeyError, uploads.take, paths[0])
    assert uploads.take(paths[4]).read_bytes() == bytes([4]) * 12


def test_the_next_start_cleans_up_after_a_killed_page(tmp_path, monkeypatch):
    left, link = tmp_path / "imrcnn-uploads-a", tmp_path / "imrcnn-uploads-b"
    mine = tmp_path / "mine"
    for folder in (left, mine):
        folder.mkdir()
        (folder / "patient.png").touch()
    lock_folder(left, "folder").release()  # as its process's death does
    link.symlink_to(mine)  # as anybody can make one in /tmp
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with app.upload_folder() as running:
        (running / "a").touch()
        assert not left.exists()
        with app.upload_folder() as other:
            assert list(running.iterdir()) == [running / "a"], "its page lives"
            assert list(other.iterdir()) == [] and other.stat().st_mode & 0o077 == 0
    assert {*tmp_path.rglob("*")} == {mine, link, mine / "patient.png"}


@pytest.fixture(scope="module")
def tab(site):
    """The open page; at the end, it has logged no errors and requested its server only."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(TIMEOUT)
        messages, requests = [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(site.url)
        page.locator(".empty").wait_for()
        yield page
        page.close()
        # Gradio's own, of each stream that it closes
        assert set(messages) <= {"Method not implemented."}
        local = (site.url, "data:", f"blob:{site.url}")
        assert [url for url in requests if not url.startswith(local)] == []


def drop(tab, *paths):
    """Drops files and waits until there are results."""
    tab.evaluate("document.querySelector('.cards')?.classList.add('old')")
    tab.set_input_files("input[type=file]", list(paths))
    tab.locator(".cards:not(.old)").wait_for()


def set_tau(tab, tau):
    """Moves the slider as a keyboard does."""
    tab.get_by_label("number input for Threshold τ").fill(str(tau))
    tab.keyboard.press("Enter")


@pytest.mark.slow
@pytest.mark.story
def test_drop_slider_download(tab, site, predictor, paths):
    text = tab.locator("body").inner_text()
    for part in ("Research use only", "Not for diagnosis", "IMR-CNN", f"imrcnn-d2 {__version__}"):
        assert part in text and "Gradio" not in text
    assert tab.get_by_role("button", name="COCO").is_disabled()
    drop(tab, *paths)
    scores = [instances.scores.tolist() for instances in predictor(paths)]
    before = len(site.forwards)
    for tau in (TAU, round((scores[0][0] + scores[0][1]) / 2, 3), 1, 0.05):
        set_tau(tab, tau)
        counts = [sum(score >= tau for score in each) for each in scores]
        for figure, count in zip(tab.locator("figure.card").all(), counts, strict=True):
            figure.and_(tab.locator(f"[data-shown='{count}']")).wait_for()
            for part in ("g", ".canvas .badge", "li"):  # contours, numbers, scores
                assert figure.locator(f"{part}:visible").count() == count
        tab.locator(f".summary dd >> nth=2 >> text='{sum(counts)}'").wait_for()
    assert len(site.forwards) == before
    for button, name in (("Masks", "masks.zip"), ("COCO", "predictions.json")):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=button).click()
        assert download.value.suggested_filename == name
    coco = json.loads(download.value.path().read_text())
    assert len(coco["annotations"]) == sum(map(len, scores)) and coco["info"]["tau"] == 0.05


@pytest.mark.slow
def test_bad_files_are_refused_in_words_and_lost_sessions_end(tab, site, paths, tmp_path):
    notes, large = tmp_path / "notes.txt", tmp_path / "large.png"
    notes.write_text("no image")
    drop(tab, notes)
    text = tab.locator(".card.failed").inner_text()
    assert "notes.txt" in text and "no readable image" in text
    assert tab.get_by_role("button", name="COCO").is_disabled()
    with open(large, "wb") as file:
        file.truncate(51 * 2**20)
    tab.set_input_files("input[type=file]", large)
    tab.get_by_text("exceed the maximum allowed size").wait_for()
    drop(tab, paths[0])
    site.state().clear()
    set_tau(tab, 0.3)
    tab.locator(".cards.forgotten").wait_for()
    drop(tab, *paths)
    assert not tab.locator(".cards.forgotten").count()
    before = set(site.state())
    tab.reload()
    tab.locator(".empty").wait_for()
    wait_for(lambda: not before & set(site.state()))


@pytest.mark.slow
def test_the_slider_is_moved_while_the_network_runs(tab, predictor, paths, monkeypatch):
    go_on, forward = threading.Event(), predictor.forward
    monkeypatch.setattr(predictor, "forward", lambda batch: go_on.wait(60) and forward(batch))
    set_tau(tab, 0.05)
    tab.set_input_files("input[type=file]", paths[1])
    tab.get_by_text("Looking").first.wait_for()
    set_tau(tab, 0.999)
    tab.wait_for_timeout(500)
    go_on.set()
    tab.locator("figure.card[data-shown='0'] img[alt='b.png']").wait_for()
