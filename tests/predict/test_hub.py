"""Weights in the Hugging Face Hub: published, found and predicted with; what is not there is named.

The hub is a server on this machine that speaks the part of the API that huggingface_hub uses."""

import base64
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from detectron2.modeling import build_model

from imrcnn_d2.cli import predict
from imrcnn_d2.deploy import Predictor, load_model
from imrcnn_d2.engine import load_weights
from imrcnn_d2.engine.checkpoint import Checkpointer

from .conftest import TAU, random_image, same, save_image

COMMIT = "c" * 40
REVISIONS = "main", "v1", COMMIT


class Hub(ThreadingHTTPServer):
    """Repositories as files by name; ``requested`` are method and path of each request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.requested = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        self.server.requested.append((self.command, self.path))

    def answer(self, content, **headers):
        self.send_response(404 if "X_Error_Code" in headers else 200)
        for name, value in {**headers, "Content_Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        user, repo, _, revision, file = self.path.lstrip("/").split("/", 4)
        files = self.server.repositories.get(f"{user}/{repo}")
        if files is None or revision not in REVISIONS or file not in files:
            kind = "Repo" if files is None else "Entry" if revision in REVISIONS else "Revision"
            return self.answer(b"", X_Error_Code=f"{kind}NotFound", X_Repo_Commit=COMMIT)
        etag = hashlib.sha256(files[file]).hexdigest()
        return self.answer(files[file], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        _, *path = self.path.lstrip("/").split("/")
        if path[0] == "repos":
            repo = "{organization}/{name}".format(**json.loads(body))
            self.server.repositories.setdefault(repo, {})
            answer = {"url": f"{self.server.url}/{repo}"}
        elif path[0] == "validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif path[3] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": name, **regular} for name in names]}
        else:
            _, *files = map(json.loads, body.splitlines())
            contents = {f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in files}
            repo = "/".join(path[1:3])
            self.server.repositories[repo].update(contents)
            address = f"{self.server.url}/{repo}/commit/{COMMIT}"
            answer = {"commitOid": COMMIT, "commitUrl": address}
        self.answer(json.dumps(answer).encode())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with nothing in it, whose files are cached in a folder of the test's."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()


@pytest.fixture
def published(hub, exported):
    """The hub with the tiny detector in me/polyps."""
    hub.repositories["me/polyps"] = {"model.safetensors": exported("torch").read_bytes()}
    return hub


def test_what_is_published_predicts_the_same_elsewhere(hub, weights):
    mine = Predictor(None, weights)
    address = mine.push_to_hub("me/polyps", license="cc-by-nc-4.0", token="t")
    assert address == f"{hub.url}/me/polyps/commit/{COMMIT}"
    files = hub.repositories["me/polyps"]
    assert files.keys() == {"model.safetensors", "config.yaml", "README.md"}
    assert not any(str(weights.parent).encode() in content for content in files.values())
    _, head, text = files["README.md"].decode().split("---\n")
    head = yaml.safe_load(head)
    assert head["library_name"] == "imrcnn-d2" and head["license"] == "cc-by-nc-4.0"
    assert head["pipeline_tag"] == "image-segmentation" and "imr-cnn" in head["tags"]
    assert "not a medical device" in text and "polyp" in text and str(TAU) in text

    hub.requested.clear()
    theirs = Predictor.from_pretrained("me/polyps")
    paths = {path for _, path in hub.requested}
    assert paths == {"/me/polyps/resolve/main/model.safetensors"}, "the named file alone"
    assert (theirs.classes, theirs.tau) == (["polyp"], TAU)
    same(theirs(random_image(0)), mine(random_image(0)))
    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert theirs.metadata["weights_sha256"] == sha256
    assert theirs.metadata["source_sha256"] == mine.metadata["weights_sha256"]


def test_a_card_of_a_report_is_published_as_it_is(hub, predictor, tmp_path):
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n# Mine é", encoding="utf-8")
    predictor.push_to_hub("me/polyps", card=tmp_path / "card.md", token="t")
    assert hub.repositories["me/polyps"]["README.md"].decode() == "---\nlicense: mit\n---\n# Mine é"


def test_graphs_are_not_published(hub, exported):
    graph = Predictor(None, exported("onnxruntime"))
    pytest.raises(ValueError, graph.push_to_hub, "me/polyps").match("fp32.onnx")
    assert not hub.requested


def test_revisions_and_files_are_named_in_the_address(published):
    content = published.repositories["me/polyps"]["model.safetensors"]
    published.repositories["me/polyps"]["small/a.safetensors"] = content
    for name, path in (
        ("hf://me/polyps@v1", "v1/model.safetensors"),
        ("hf://me/polyps/small/a.safetensors", "main/small/a.safetensors"),
        (f"hf://me/polyps@{COMMIT}/small/a.safetensors", f"{COMMIT}/small/a.safetensors"),
    ):
        published.requested.clear()
        assert load_model(None, name).classes == ["polyp"]
        assert {p for _, p in published.requested} <= {f"/me/polyps/resolve/{path}"}
    assert Predictor.from_pretrained("me/polyps@v1").tau == TAU


def test_training_starts_from_the_hub(published, loaded):
    model = build_model(loaded.cfg)
    point = load_weights(Checkpointer(model), "hf://me/polyps").operating_point
    assert point == loaded.weights.operating_point
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


ABSENT = {
    "hf://you/nothing": "you/nothing",
    "hf://me/polyps@v9": "v9",
    "hf://me/polyps/b.safetensors": "b.safetensors",
    **dict.fromkeys(("hf://polyps", "hf://me/polyps/a.pth", "hf://me/polyps/"), "safetensors"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_in_the_hub_is_named_in_one_line(published, name, tmp_path, capsys):
    image = save_image(tmp_path / "a.png", 0)
    command = ["--weights", name, "--input", image, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        predict.main([*map(str, command)])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert f": {name}: " in line and ABSENT[name] in line
    if ABSENT[name] == "safetensors":
        assert not published.requested


def test_without_a_network_what_was_fetched_is_there(published, predictor, monkeypatch, capfd):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts to connect
    Predictor.from_pretrained("me/polyps")
    published.requested.clear()
    for key, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.constants, key, value)
            url = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
            assert Predictor.from_pretrained("me/polyps").tau == TAU
            with pytest.raises(OSError, match="hf://me/others: ") as refused:
                Predictor.from_pretrained("me/others")
            assert "\n" not in str(refused.value) and "cache" in str(refused.value)
            with pytest.raises(OSError, match="hf://me/others: ") as refused:
                predictor.push_to_hub("me/others", token="t")
            assert "\n" not in str(refused.value)
    assert not published.requested and "Retrying" not in capfd.readouterr().err


def test_a_folder_of_that_name_comes_first(published, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("me/polyps").mkdir(parents=True)
    pytest.raises(FileNotFoundError, Predictor.from_pretrained, "me/polyps").match("me/polyps/")
    Path("me/polyps/model.safetensors").write_bytes(exported("torch", "fp16").read_bytes())
    assert Predictor.from_pretrained("me/polyps").metadata["precision"] == "fp16"
    assert not published.requested
    assert Predictor.from_pretrained("hf://me/polyps").metadata["precision"] == "fp32"


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_a_hostile_repository_is_refused(published, metadata, tmp_path, monkeypatch):
    from .test_loading import VALUES, write_export

    monkeypatch.chdir(tmp_path)
    files = published.repositories["me/polyps"]
    files["model.safetensors"] = pickle.dumps({"model": Planted()})
    files["config.yaml"] = b"OUTPUT_DIR: !!python/object/apply:os.mkdir [planted]"
    with pytest.raises(ValueError, match="model.safetensors"):
        Predictor.from_pretrained("me/polyps")
    for config in VALUES["config"][2:]:
        content = json.dumps({**metadata, "config": config})
        path = write_export(tmp_path / "other.safetensors", content)
        files["model.safetensors"] = path.read_bytes()
        with pytest.raises(ValueError, match="model.safetensors"):
            Predictor.from_pretrained("me/polyps")
    assert not Path("planted").exists()
    assert {path.rpartition("/")[2] for _, path in published.requested} == {"model.safetensors"}


@pytest.mark.slow
def test_the_command_with_a_hub_of_one_s_own(published, tmp_path):
    image = save_image(tmp_path / "a.png", 0)
    command = "imrcnn predict --weights hf://me/polyps --output out --input".split()
    env = {**os.environ, "HF_ENDPOINT": published.url, "HF_HOME": str(tmp_path / "hf")}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", *command, str(image)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predictions = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [category["name"] for category in predictions["categories"]] == ["polyp"]
    assert predictions["info"]["source_sha256"]
