"""The page as its server answers it, over HTTP, without a browser."""

import base64
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
from dicoms import PATIENT, write_dicom
from PIL import Image

from imrcnn_d2.deploy import Predictor, predict_files
from imrcnn_d2.deploy.inputs import public_name

from .conftest import TAU, random_image, read_coco, save_image, serving, wait_for, write_bad_images

gradio_client = pytest.importorskip("gradio_client", reason="the demo extra is not installed")
httpx = pytest.importorskip("httpx")
from imrcnn_d2.deploy.web import app  # noqa: E402
from imrcnn_d2.deploy.web.app import download  # noqa: E402

AppError = gradio_client.exceptions.AppError


def uploaded(predictor, folder, name, seed):
    """The finding of an image on the server, by its user's name."""
    Image.fromarray(random_image(seed)).save(folder / f"upload{seed}", "PNG")
    return app.find(predictor, folder / f"upload{seed}", name)


def unzipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_files_are_those_of_the_command(predictor, tmp_path):
    findings, out = [], tmp_path / "out"
    for seed, name in enumerate(("a.jpg", "a.png", "c.png")):
        findings.append(uploaded(predictor, tmp_path, name, seed))
        (tmp_path / "in").mkdir(exist_ok=True)
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
        assert document.pop("imagePath") == expected.pop("imagePath").split("/")[-1]
        assert document == expected
    assert not documents
    for annotation, mark in zip(findings[0].annotations, app.marks(findings[0]), strict=True):
        mask = mask_util.decode(annotation["segmentation"]).astype(bool)
        contour, lines = np.zeros_like(mask), mark["path"].split("M")[1:]
        for line in lines:
            points = np.array([p.split() for p in line.strip("Z").split("L")], int)
            assert mask[points[:, 1], points[:, 0]].all() or len(lines) > 1
            contour[points[:, 1], points[:, 0]] = True
        assert 0 <= mark["left"] <= 100 and 0 <= mark["top"] <= 100
        for axis in (0, 1):
            ends, expected = (np.flatnonzero(m.any(axis=axis))[[0, -1]] for m in (contour, mask))
            assert (ends == expected).all()


def test_uploads_of_patients(predictor, tmp_path):
    findings, still, two = [], random_image(0), np.stack([random_image(2), random_image(3)])
    for name, pixels, fields in (
        ("Musterfrau_Erika.dcm", still, {}),
        ("Musterfrau.jpg", random_image(1), {"BurnedInAnnotation": "YES"}),
        ("KIS-4711.dcm", two, {}),
    ):
        path = write_dicom(tmp_path / "upload", pixels, **fields)
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
    """Gradio's client asks Hugging Face for things; what the server asks for is in test_browser."""
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
    assert (
        counts_of(summary).items()
        >= {"images": 3, "with a finding": sum(map(bool, counts))}.items()
    )

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
        saved_scores = [annotation["score"] for annotation in coco["annotations"]]
        assert saved_scores == pytest.approx(sum(scores, []), abs=1e-5)
    assert len(site.forwards) == before, "τ is no reason to run the network"


def test_the_slider_starts_at_the_operating_point(predictor, tiny_run, paths):
    """To its last digit, though the slider has three of them."""
    tau = predictor(paths[0]).scores[0].item() - 1e-6
    exact = Predictor(None, tiny_run / "model_best.pth", tau=tau)
    with serving(exact) as site, session(site.url) as client:
        assert 'data-shown="1"' in look(client, paths[0], tau=round(tau, 3))[0]
        assert json.loads(saved(client, "coco", round(tau, 3)))["info"]["tau"] == tau


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
    for bound, limit, number, size, status, text in (
        ("MAX_FILE_MB", 0.01, 1, 11_000, 413, "A file is larger than 0.01 MB"),
        ("MAX_UPLOAD_MB", 0.02, 3, 9_000, 413, "The files have more than 0.02 MB together"),
        ("MAX_FILES", app.MAX_FILES, app.MAX_FILES + 1, 1, 400, ""),
    ):
        monkeypatch.setattr(app, bound, limit)
        files = [("files", (f"{i}.png", bytes(size))) for i in range(number)]
        refused = httpx.post(f"{site.url}gradio_api/upload", files=files)
        assert refused.status_code == status and text in refused.text
    monkeypatch.undo()
    monkeypatch.setattr(app, "MAX_FILES", 2)
    pytest.raises(AppError, look, client, *paths).match("3 files at once; at most 2")
    assert not list(site.folder.iterdir())
    assert "<figure" in look(client, paths[0])[0]


UPLOAD = (
    b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    b'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(50_000)
)


def test_nothing_is_kept_and_uploads_are_bounded(site, paths, monkeypatch):
    def start_upload():
        """A connection, and the beginning of an upload that never ends."""
        host, port = site.url.removeprefix("http://").strip("/").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(UPLOAD)
        return connection

    def upload_whole():
        files = [("files", ("a.png", b"a"))]
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


def test_it_answers_this_computer_and_asks_no_other(site, client, tmp_path):
    assert site.address == "127.0.0.1"
    port = int(site.url.strip("/").split(":")[-1])
    with pytest.raises(OSError, match=rf"{port}: .*in use"), app.server_of(None, port=port):
        pass
    answer, api = httpx.get(site.url), f"{site.url}gradio_api"
    assert answer.headers["content-security-policy"].startswith("default-src 'self' ")
    foreign = r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//'
    assert not re.findall(foreign, answer.text)
    assert "research use only" in answer.text.lower()
    config = httpx.get(f"{site.url}config").json()
    assert not config["analytics_enabled"] and not config["run_history"]
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
        file["is_stream"] = stream  # of which Gradio does not look at the path
        data = {"data": [[file], TAU], "session_hash": "s"}
        event = httpx.post(f"{api}/call/look", json=data).json()["event_id"]
        answer = httpx.get(f"{api}/call/look/{event}", timeout=60)
        assert "event: error" in answer.text and "no longer there" in answer.text
    assert mine.is_file()


def test_other_sites_in_the_same_browser_are_refused(site):
    host, foreign = site.url.removeprefix("http://").rstrip("/"), "http://example.com"
    for headers in (
        *({"origin": foreign}, {"origin": "null"}, {"host": "example.com"}),
        {"host": "example.com", "origin": foreign},  # a name that leads to 127.0.0.1
    ):
        answer = httpx.post(f"{site.url}gradio_api/upload", files={"files": b"a"}, headers=headers)
        assert answer.status_code == 403, headers
    assert not list(site.folder.iterdir())
    for headers in ({"origin": f"http://{host}"}, {"host": host.replace("127.0.0.1", "localhost")}):
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
        with pytest.raises(KeyError):
            uploads.take(path)
    full = SimpleNamespace(read=lambda *_: open("/"))  # raises an OSError, as a full disk does
    with pytest.raises(OSError):
        uploads.keep([io.BytesIO(b"first"), full])
    assert set(tmp_path.iterdir()) == {mine, taken}
    for bound, most, left in (("MAX_WAITING", 3, 3), ("MAX_WAITING_MB", 30 / 2**20, 2)):
        monkeypatch.setattr(app, bound, most)
        paths = [uploads.keep([io.BytesIO(bytes([n]) * 12)])[0] for n in range(5)]
        assert {*map(str, tmp_path.iterdir())} == {str(mine), str(taken), *paths[-left:]}
        with pytest.raises(KeyError):
            uploads.take(paths[0])
    assert uploads.take(paths[4]).read_bytes() == bytes([4]) * 12


def killed_page(folder):
    tempfile.tempdir = str(folder)
    with app.upload_folder() as files:
        (files / "patient.png").write_bytes(b"image")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_next_start_cleans_up_after_a_killed_page(tmp_path, monkeypatch):
    page = multiprocessing.get_context("forkserver").Process(target=killed_page, args=(tmp_path,))
    page.start()
    page.join(60)
    assert page.exitcode == -signal.SIGKILL and len(list(tmp_path.glob("*/files/patient.png"))) == 1
    mine, link = tmp_path / "mine", tmp_path / "imrcnn-uploads-link"
    mine.mkdir()
    (mine / "file").touch()
    link.symlink_to(mine)  # as anybody can make one in /tmp
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with app.upload_folder() as running:
        (running / "a").touch()
        with app.upload_folder() as other:
            assert not list(tmp_path.glob("*/files/patient.png"))
            assert list(running.iterdir()) == [running / "a"], "its page lives"
            assert list(other.iterdir()) == [] and other.stat().st_mode & 0o077 == 0
    assert set(tmp_path.iterdir()) == {mine, link} and list(mine.iterdir()) == [mine / "file"]
