"""Configs of a hostile sender: wherever one is read, no address is asked and no file is written."""

import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from detectron2 import model_zoo
from detectron2.utils.file_io import PathManager

from imrcnn_d2.cli import predict
from imrcnn_d2.cli import train as train_net
from imrcnn_d2.deploy.runtimes import EXPORTS
from imrcnn_d2.deploy.runtimes.graph import METADATA_KEY
from imrcnn_d2.deploy.runtimes.openvino import OPENVINO_PARTS
from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.cross_validation import FoldRun
from imrcnn_d2.engine.run_record import RunRecord


@pytest.fixture
def asked(monkeypatch):
    """What was requested of a server at ``asked.url`` or of a hub, and folders read as a model."""

    class Asked(list):
        url = None

    requests = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"SEED: 1\n")

        def log_message(self, *arguments):
            pass

    def contacted(model, **_):
        requests.append(model)
        raise OSError("was asked")

    for name in ("load_model_config_from_hf", "load_model_config_from_path"):
        monkeypatch.setattr(timm.models._factory, name, contacted)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    requests.url = f"http://127.0.0.1:{server.server_port}"
    yield requests
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of the attacked; the cache of downloads lies deep in it."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache" / "a" / "b"))
    (tmp_path / "outside.yaml").write_text("SEED: 1\n")
    folder = tmp_path / "received"
    folder.mkdir()
    return folder


def predicted(folder, capsys, *arguments):
    """Run predict.py on no image; what it says when it refuses."""
    (folder / "images").mkdir()
    given = ["--input", str(folder / "images"), "--output", str(folder / "output")]
    with pytest.raises(SystemExit) as stop:
        predict.main([*map(str, arguments), *given])
    assert stop.value.code == 1
    return capsys.readouterr().err


def about(text):
    """What an exported file says about itself."""
    names = {"model": "IMR-CNN", "backbone": "R-50", "classes": ["lesion"], "version": "0.1.0"}
    hashes = {"weights_sha256": "0" * 64, "config_sha256": "0" * 64}
    point = {"operating_point": None, "tau": 0.7, "precision": "fp32", "artifact": 1}
    return {**names, **hashes, **point, "config": text}


def in_safetensors(text, folder, capsys):
    path, metadata = folder / "a.safetensors", {k: json.dumps(v) for k, v in about(text).items()}
    safetensors.torch.save_file({"w": torch.zeros(1)}, path, metadata)
    return predicted(folder, capsys, "--weights", path)


def in_onnx(text, folder, capsys):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["images"], ["out"])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=opset)
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(about(text))})
    onnx.save(model, folder / "a.onnx")
    return predicted(folder, capsys, "--weights", folder / "a.onnx")


def in_openvino(text, folder, capsys):
    openvino = pytest.importorskip("openvino")
    parameter = openvino.opset8.parameter([1], openvino.Type.f32, name="images")
    model = openvino.Model([openvino.opset8.relu(parameter)], [parameter], "g")
    parts = [folder / name for name in OPENVINO_PARTS]
    openvino.serialize(model, *parts)
    with zipfile.ZipFile(folder / "a.openvino", "w") as archive:
        for part in parts:
            archive.write(part, part.name)
        archive.writestr(METADATA_KEY, json.dumps(about(text)))
    return predicted(folder, capsys, "--weights", folder / "a.openvino")


def in_torchscript(text, folder, capsys):
    if "torchscript" not in EXPORTS:
        pytest.skip("no such format")
    buffer, module = io.BytesIO(), torch.jit.trace(torch.nn.ReLU(), torch.zeros(1))
    torch.jit.save(module, buffer, {METADATA_KEY: json.dumps(about(text)).encode()})
    (folder / "a.torchscript").write_bytes(buffer.getvalue())
    return predicted(folder, capsys, "--weights", folder / "a.torchscript")


def beside_weights(text, folder, capsys):
    (folder / "config.yaml").write_text(text)
    torch.save({"model": {"w": torch.zeros(1)}}, folder / "model.pth")
    return predicted(folder, capsys, "--weights", folder / "model.pth")


def as_config_file(text, folder, capsys):
    (folder / "sent.yaml").write_text(text)
    weights = ("--weights", folder / "model.pth", "--config-file", folder / "sent.yaml")
    torch.save({"model": {"w": torch.zeros(1)}}, folder / "model.pth")
    return predicted(folder, capsys, *weights)


def in_a_training(text, folder, capsys):
    (folder / "sent.yaml").write_text(text)
    args = ["--config-file", str(folder / "sent.yaml"), "--eval-only"]
    args = train_net.argument_parser().parse_args(args)
    args.opts = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder / "output"), "DATASETS.TEST", "()"]
    with pytest.raises((OSError, ValueError)) as refused:
        train_net.run(args)
    return str(refused.value)


def in_a_cross_validation(text, folder, capsys):
    (folder / "sent.yaml").write_text(text)
    run = FoldRun("synthetic", folder / "sent.yaml", 0, 0, 2, folder / "output", folder, (), 1)
    run.folder.mkdir(parents=True)
    (run.folder / RunRecord.FILE).write_text('{"config_sha256": "", "datasets": {}}')
    run.train()
    return run.log.read_text()


CARRIED = [in_safetensors, in_onnx, in_openvino, in_torchscript]
FILES = [beside_weights, as_config_file, in_a_training, in_a_cross_validation]
TIMM = "BACKBONE: {NAME: build_timm_backbone}"
ATTACKS = {  # what a config says: what an error names
    "_BASE_: {url}/../../../../planted.pth": "_BASE_",
    "_BASE_: [{url}/a.yaml]": "_BASE_",
    "_BASE_: detectron2://a.yaml": "_BASE_",
    "_BASE_: ../outside.yaml": "_BASE_",
    "_BASE_: {outside}": "_BASE_",
    "_BASE_: ~/../../{outside}": "_BASE_",
    "_BASE_: link.yaml": "_BASE_",
    "_BASE_: based.yaml": "_BASE_",
    "_BASE_: pipe": "_BASE_",
    "MODEL: {{{timm}, TIMM: {{NAME: 'hf-hub:x/y'}}}}": "TIMM.NAME",
    "MODEL: {{{timm}, TIMM: {{NAME: 'hf_hub:x'}}}}": "TIMM.NAME",
    "MODEL: {{{timm}, TIMM: {{NAME: 'local-dir:/x'}}}}": "TIMM.NAME",
    "DATASETS: {{TRAIN: ['{url}/a']}}": "DATASETS.TRAIN",
}


@pytest.mark.parametrize("text", ATTACKS)
@pytest.mark.parametrize("read", CARRIED + FILES, ids=lambda read: read.__name__)
def test_a_config_reads_its_own_tree_only(read, text, folder, asked, capsys):
    outside = folder.parent / "outside.yaml"
    (folder / "link.yaml").symlink_to(outside)
    (folder / "based.yaml").write_text(f"_BASE_: {asked.url}/../../../../planted.pth\n")
    (folder / "pipe").symlink_to("/dev/zero")
    said = read(text.format(url=asked.url, outside=outside, timm=TIMM), folder, capsys)
    assert asked == []
    assert sorted(folder.parent.iterdir()) == [outside, folder]
    assert ATTACKS[text] in said and folder.name in said
    assert "Traceback" not in said


ADDRESSES = (  # Detectron2 takes all of these for one
    "{url}/../../../../planted.pth",
    "{URL}/w.pth",
    "' {url}/w.pth'",
    '"ht\\ntp{rest}/w.pth"',
    "'\"{url}/w.pth\"'",  # a string in a string: the config unpacks it
    "ftp{rest}/w.pth",
    "https://1drv.ms/u/s!w",
)


@pytest.mark.parametrize("text", ADDRESSES)
@pytest.mark.parametrize("key", ["WEIGHTS", "TIMM: {WEIGHTS"])
def test_weights_of_a_config_are_files(text, key, folder, asked, capsys):
    url, rest = asked.url, asked.url.removeprefix("http")
    value = text.format(url=url, URL=url.replace("http", "HTTP"), rest=rest)
    config = f"MODEL: {{{key}: {value}}}" + "}" * key.count("{")
    said = in_a_training(config, folder, capsys)
    assert asked == []
    assert not (folder.parent / "cache").exists()
    assert "WEIGHTS" in said and "sent.yaml" in said


def test_what_the_user_names_may_be_an_address(folder, asked):
    config, url = folder / "a.yaml", f"{asked.url}/w.pth"
    config.write_text("MODEL: {WEIGHTS: 'http://127.0.0.1:9/x', TIMM: {NAME: 'hf-hub:x/y'}}")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", url, "MODEL.TIMM.NAME", "local-dir:/x"]
    cfg = load_config(str(config), opts)
    assert cfg.MODEL.WEIGHTS == url and cfg.MODEL.TIMM.NAME == "local-dir:/x"
    assert Path(PathManager.get_local_path(url)).read_text() == "SEED: 1\n"
    assert asked == ["/w.pth"]


def test_a_download_is_kept_for_its_host_alone(folder, asked):
    paths = {
        PathManager.get_local_path(f"{asked.url.replace('127.0.0.1', host)}/detectron2/R-50.pkl")
        for host in ("127.0.0.1", "localhost")
    }
    assert len(paths) == len(asked) == 2
    assert not (folder.parent / "cache/a/b/detectron2").exists()  # the model zoo's place


@pytest.mark.parametrize(
    "path", ["/../../../../planted.pth", "/.\n./.\n./planted.pth", "/a?/..", "/../a/b"]
)
def test_a_download_stays_in_its_folder(path, folder, asked, capsys):
    url = asked.url + path
    with pytest.raises(ValueError, match="127.0.0.1"):
        PathManager.get_local_path(url)
    with pytest.raises(ValueError, match="127.0.0.1"):
        PathManager.open(url)
    if "?" not in path:
        assert "127.0.0.1" in predicted(folder, capsys, "--weights", url)
    assert asked == []
    assert not (folder.parent / "cache").exists()


def test_the_model_zoo_s_weights_stay_there():
    with pytest.raises(ValueError, match="dl.fbaipublicfiles.com"):
        PathManager.get_local_path("detectron2://../../planted.pth")


@pytest.mark.parametrize(
    ("place", "base"),
    [
        ("configs/polyps/a.yaml", "../Base.yaml"),
        ("configs/a.yaml", "parts/b.yaml"),
        ("project/configs/deep/er/a.yaml", "../../Base.yaml"),
        ("a.yaml", "parts/b.yaml"),
        ("a.yaml", ["parts/b.yaml", "./Base.yaml"]),
        ("a.yaml", Path("configs/imrcnn_R_50.yaml").resolve()),
        ("a.yaml", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"),
        ("a.yaml", "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml"),
    ],
)
def test_a_base_in_the_tree_or_of_a_package(place, base, tmp_path):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if str(base).startswith("COCO"):
        base = model_zoo.get_config_file(base)
        expected = load_config(base, ["MODEL.DEVICE", "cpu"])
        (tmp_path / "link").symlink_to(Path(base).parent)
        base = f"link/{Path(base).name}"
    elif isinstance(base, Path):
        expected = load_config(str(base), ["MODEL.DEVICE", "cpu"])
    else:
        expected = load_config("", ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 7, "SEED", 3])
        contents = ("SOLVER: {MAX_ITER: 7}\nSEED: 1\n", "SEED: 2")
        for name, content in zip([base] if isinstance(base, str) else base, contents):  # noqa: B905
            (path.parent / name).parent.mkdir(exist_ok=True)
            (path.parent / name).write_text(content)
    path.write_text(f"_BASE_: {json.dumps(base, default=str)}\nSEED: 3\n")
    expected.SEED = 3
    assert load_config(str(path), ["MODEL.DEVICE", "cpu"]) == expected


def test_our_own_config_comes_back(folder):
    """As training dumps it: with aliases of YAML's and, here, the address that its user gave."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "https://example.com/w.pth"]
    cfg = load_config("configs/imrcnn_R_50.yaml", opts)
    (folder / "config.yaml").write_text(cfg.dump())
    assert "*id001" in cfg.dump()
    with pytest.raises(ValueError, match=r"config.yaml.*MODEL.WEIGHTS.*example.com"):
        load_config(str(folder / "config.yaml"))
    again = load_config(str(folder / "config.yaml"), opts)
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


BOMBS = {
    "nested lists": "SEED: " + "[" * 50_000,
    "nested text": "SEED: '" + "(" * 50_000 + "'",
    "signs": "SEED: '" + "-" * 50_000 + "1'",
    "laughs": "a: &a [x, x]\n"
    + "".join(f"{k}: &{k} [{', '.join(['*' + j] * 9)}]\n" for j, k in zip("abcdefgh", "bcdefghi")),  # noqa: B905
    "merges": "a: &a {x: 1, y: 2}\n"
    + "".join(f"{k}: &{k} {{<<: [{', '.join(['*' + j] * 99)}]}}\n" for j, k in zip("abcd", "bcde")),  # noqa: B905
    "one text often": "a: &a " + "x" * 40_000 + "\nSEED: [" + "*a, " * 10_000 + "]",
    "itself": "SEED: &a [*a]",
    "a mapping of itself": "MODEL: &a {MODEL: *a}",
    "its own base": "_BASE_: a.yaml",
    "bases of bases": "_BASE_: [b.yaml, b.yaml]",
    "large": "# " + "x" * 2_000_000,
    "a date": "SEED: 2024-01-01",
    "bytes": "SEED: !!binary aaaa",
    "a timestamp that is none": "SEED: !!timestamp x",
    "an integer that is none": "SEED: !!int ''",
    "no text": b"\xff\xfe\x00",
    "an old version": "VERSION: 1",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_a_line(name, tmp_path):
    path, content = tmp_path / "a.yaml", BOMBS[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for this, following in zip("bcdefghijklmnop", "cdefghijklmnopq", strict=True):
        (tmp_path / f"{this}.yaml").write_text(f"_BASE_: [{following}.yaml, {following}.yaml]")
    (tmp_path / "q.yaml").write_text("SEED: 1")
    with pytest.raises(ValueError, match=r"a\.yaml") as refused:
        load_config(str(path))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000
