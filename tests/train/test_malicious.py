"""Files and configs of a hostile sender run no code, contact no address and write no file."""

import itertools
import json
import os
import pickle
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from detectron2 import model_zoo
from detectron2.utils.file_io import PathManager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_json
from rectangles import rectangle

from imrcnn_d2.cli import compare, cross_validate, evaluate, predict, prepare_dataset, report
from imrcnn_d2.cli import train as train_command
from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.config import load_config_text
from imrcnn_d2.engine.cross_validation import FoldRun
from imrcnn_d2.engine.run_record import RunRecord

from .conftest import write_coco
from .test_safe_loading import Calls

LAZY = "configs/lazy/imrcnn_lite.py"
REFUSED = {f"model.{suffix}": r"posix\.mkdir" for suffix in ("pkl", "pth", "pyth")}
REFUSED["model.safetensors"] = r"model\.safetensors cannot be read"
SLOW = [pytest.param("model_0000001.pth", a, marks=pytest.mark.slow) for a in ([], ["--eval-only"])]


@pytest.fixture
def marker(tmp_path):
    """A path that must not exist when a test has ended."""
    path = tmp_path / "the_planted_code_ran"
    yield path
    assert not path.exists()


@pytest.fixture
def plant(tmp_path, marker):
    """Writes a malicious checkpoint of the format that its suffix names; returns its path."""

    def write(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {"w": Calls(os.mkdir, str(marker))}
        content = {"model": weights, "__author__": "x", "model_state": {}}
        if path.suffix in (".pth", ".pyth"):
            weights["v"] = torch.zeros(1)  # what has no tensors is no checkpoint
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        return str(path)

    return write


@pytest.fixture
def malicious_yaml(tmp_path, marker):
    path = tmp_path / "malicious.yaml"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{marker}"]\n')
    return path


def test_the_bait_works(plant, marker):
    pickle.loads(open(plant("model.pkl"), "rb").read())
    marker.rmdir()
    torch.load(plant("model.pth"), weights_only=False)
    marker.rmdir()


@pytest.fixture
def refuses(tiny_opts, tiny_lazy_opts):
    """Runs the training with tiny settings, of a YAML or lazy config, to a line that matches."""

    def run(match, *arguments, opts=(), config="configs/imrcnn_lite.yaml"):
        parser = train_command.argument_parser()
        args = parser.parse_args(["--config-file", str(config), *arguments])
        args.opts = [*(tiny_lazy_opts if config == LAZY else map(str, tiny_opts)), *opts]
        with pytest.raises(SystemExit, match=match):
            train_command.run(args)

    return run


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(
    "arguments", [["--eval-only"], pytest.param([], marks=pytest.mark.slow)], ids=len
)
def test_weights(refuses, plant, name, arguments):
    path, refused = plant(name), REFUSED[name]
    refuses(refused, *arguments, opts=["MODEL.WEIGHTS", path])
    refuses(refused, *arguments, opts=[f"train.init_checkpoint={path}"], config=LAZY)
    if arguments and name != "model.pyth":
        refuses(refused, opts=["MODEL.TIMM.WEIGHTS", path])
        refuses(refused, opts=[f"model.backbone.bottom_up.weights={path}"], config=LAZY)


@pytest.mark.parametrize(("name", "arguments"), [("model.pkl", []), *SLOW])
def test_a_checkpoint_to_resume_from(refuses, plant, tmp_path, name, arguments):
    plant(f"output/{name}")
    (tmp_path / "output" / "last_checkpoint").write_text(name)
    match = name if name == "model.pkl" else rf"{name}.*posix\.mkdir"
    refuses(match, "--resume", *arguments)
    if not arguments:
        refuses(match, "--resume", config=LAZY)


def test_configs_and_overrides(refuses, plant, malicious_yaml, tmp_path, marker):
    based_on_it = tmp_path / "based_on_it.yaml"
    based_on_it.write_text(f"_BASE_: {malicious_yaml.name}\n")
    for config in (malicious_yaml, based_on_it):
        refuses(rf"(?s){config.name}.*os\.mkdir", config=config)
    # Taken as a text, which the config then refuses or uses as one.
    text = f"__import__('os').mkdir({str(marker)!r})"
    refuses(".*", opts=["SOLVER.MAX_ITER", text])
    opts = ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN"]
    refuses("MODEL.LOAD_PROPOSALS", opts=[*opts, f"('{plant('proposals.pkl')}',)"])


def test_configs_and_folders_of_a_cross_validation(malicious_yaml, tmp_path, monkeypatch, capsys):
    arguments = ["+malicious=malicious", "--config-dir", str(tmp_path), "--cfg", "job"]
    (tmp_path / "malicious").mkdir()
    malicious_yaml.rename(tmp_path / "malicious" / "malicious.yaml")
    command = ["tools/cross_validate.py", "model=mrcnn_lite"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    with pytest.raises(SystemExit) as stop:
        cross_validate.main()
    assert stop.value.code
    assert "python/object/apply:os.mkdir" in capsys.readouterr().err
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "kvasir_seg").symlink_to(tmp_path / "outside")
    monkeypatch.setattr(sys, "argv", [*command, "dataset=kvasir_seg", f"output={tmp_path}/output"])
    assert "output/kvasir_seg: is a link" in cross_validate.main()
    assert not (tmp_path / "outside").exists()


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A ground truth with one lesion, results that have it, and what evaluate makes of them."""
    folder = tmp_path_factory.mktemp("scored")
    lesion = rectangle(1, 5, 5, 15, 15, size=(40, 40))
    annotations = [{**lesion, "area": 225, "iscrowd": 0}]
    gt_file = write_coco(folder / "gt", [np.zeros((40, 40, 3), np.uint8)], annotations, ["lesion"])
    dt_file = folder / "dt.json"
    dt_file.write_text(json.dumps([{**lesion, "score": 0.9}]))
    files = ["--gt", str(gt_file), "--dt", str(dt_file)]
    evaluate.main([*files, "--output", str(folder / "run"), "--resamples", "0"])
    return folder


def test_pickles_as_results_runs_and_images(scored, plant, malicious_yaml, tmp_path, capsys):
    run, page = shutil.copytree(scored / "run", tmp_path / "run"), tmp_path / "report.html"
    malicious_yaml.rename(run / "config.yaml")
    report.main([str(run), "--output", str(page)])
    assert page.is_file() and "os.mkdir" not in page.read_text()

    def refuses(tool, name, *arguments):
        with pytest.raises(SystemExit) as stop:
            tool.main([*map(str, arguments)])
        assert stop.value.code
        assert name in f"{stop.value.code} {capsys.readouterr().err}"

    gt, dt, planted = scored / "gt/coco.json", scored / "dt.json", plant("planted.json")
    out = tmp_path / "out"
    refuses(evaluate, planted, "--gt", gt, "--dt", planted, "--output", out)
    refuses(evaluate, planted, "--gt", planted, "--dt", dt, "--output", out)
    refuses(evaluate, planted, "--gt", gt, "--dt", dt, "--tau-from", planted, dt, "--output", out)
    for name in ("metrics.json", "coco_instances_results.json"):
        run = shutil.copytree(scored / "run", tmp_path / name)
        plant(f"{name}/{name}")
        for tool in (report, compare):
            refuses(tool, name, f"a={run}", f"b={scored / 'run'}", "--output", out)
    for folder in ("images", "masks"):
        plant(f"data/{folder}/1.jpg")
    refuses(prepare_dataset, "1.jpg", "kvasir-seg", "--root", tmp_path / "data", "--out", out)


CPU = ["MODEL.DEVICE", "cpu"]


@pytest.fixture
def requested(monkeypatch, tmp_path_factory):
    """Paths requested of a server at ``url`` or of a hub, and folders read as a model."""
    paths = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            paths.append(self.path)

    for name in ("load_model_config_from_hf", "load_model_config_from_path"):
        monkeypatch.setattr(timm.models._factory, name, lambda model, **_: paths.append(model))
    served = tmp_path_factory.mktemp("served")
    (served / "w.pth").write_text("SEED: 1\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield SimpleNamespace(paths=paths, url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of the attacked; the cache of downloads lies deep in it."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache" / "a" / "b"))
    (tmp_path / "outside.yaml").write_text("SEED: 1\n")
    folder = tmp_path / "received"
    folder.mkdir()
    return folder


def predicted(folder, capsys, *arguments):
    """Run predict.py on no image; its error."""
    (folder / "images").mkdir()
    given = ["--input", str(folder / "images"), "--output", str(folder / "output")]
    with pytest.raises(SystemExit) as stop:
        predict.main([*map(str, arguments), *given])
    assert stop.value.code == 1
    return capsys.readouterr().err


def in_an_export(text, folder, capsys):
    """All formats of exported files keep the config among the same metadata."""
    metadata = {"model": "IMR-CNN", "backbone": "R-50", "classes": ["lesion"], "version": "0.1.0"}
    metadata |= {"weights_sha256": "0" * 64, "config_sha256": "0" * 64, "operating_point": None}
    metadata |= {"tau": 0.7, "precision": "fp32", "artifact": 1, "config": text}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    safetensors.torch.save_file({"w": torch.zeros(1)}, folder / "a.safetensors", metadata)
    return predicted(folder, capsys, "--weights", folder / "a.safetensors")


def next_to_weights(text, folder, capsys, *arguments):
    (folder / "config.yaml").write_text(text)
    torch.save({"model": {"w": torch.zeros(1)}}, folder / "model.pth")
    return predicted(folder, capsys, "--weights", folder / "model.pth", *arguments)


def as_config_file(text, folder, capsys):
    return next_to_weights(text, folder, capsys, "--config-file", folder / "config.yaml")


def in_a_training(text, folder, capsys):
    (folder / "sent.yaml").write_text(text)
    args = ["--config-file", str(folder / "sent.yaml"), "--eval-only", *CPU]
    args += ["OUTPUT_DIR", str(folder / "output"), "DATASETS.TEST", "()"]
    with pytest.raises(SystemExit) as refused:
        train_command.run(train_command.argument_parser().parse_args(args))
    return str(refused.value)


def in_a_cross_validation(text, folder, capsys):
    (folder / "sent.yaml").write_text(text)
    run = FoldRun("synthetic", folder / "sent.yaml", 0, 0, 2, folder / "output", folder, (), 1)
    run.folder.mkdir(parents=True)
    (run.folder / RunRecord.FILE).write_text('{"config_sha256": "", "datasets": {}}')
    run.train()
    return run.log.read_text()


READERS = [in_an_export, next_to_weights, as_config_file, in_a_training, in_a_cross_validation]
TIMM = "BACKBONE: {{NAME: build_timm_backbone}}"
ATTACKS = {"DATASETS: {{TRAIN: ['{url}/a']}}": "DATASETS.TRAIN"}  # config: what an error names
for base in """{url}/../../../../planted.pth [{url}/a.yaml] detectron2://a.yaml {outside} link.yaml
        ../outside.yaml ~/../../{outside} based.yaml pipe""".split():
    ATTACKS[f"_BASE_: {base}"] = "_BASE_"
for name in ("hf-hub:x/y", "hf_hub:x", "local-dir:/x"):
    ATTACKS[f"MODEL: {{{{{TIMM}, TIMM: {{{{NAME: '{name}'}}}}}}}}"] = "TIMM.NAME"
TREES = {"configs/polyps": ["../Base.yaml"], "project/configs/deep/er": ["../../Base.yaml"]}
TREES |= {"configs": ["parts/b.yaml"], ".": ["parts/b.yaml", "./Base.yaml"]}


@pytest.mark.parametrize("text", ATTACKS)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_config_reads_its_own_tree_only(read, text, folder, requested, capsys):
    outside = folder.parent / "outside.yaml"
    (folder / "link.yaml").symlink_to(outside)
    (folder / "based.yaml").write_text(f"_BASE_: {requested.url}/../../../../planted.pth\n")
    (folder / "pipe").symlink_to("/dev/zero")
    error = read(text.format(url=requested.url, outside=outside), folder, capsys)
    assert requested.paths == []
    assert sorted(folder.parent.iterdir()) == [outside, folder]
    assert ATTACKS[text] in error and folder.name in error
    assert "Traceback" not in error


# Detectron2 takes all of these for an address; in the last, the config unpacks an inner string.
ADDRESSES = ["{url}/../../../../planted.pth", "{URL}/w.pth", "' {url}/w.pth'", "ftp{rest}/w.pth"]
ADDRESSES += ['"ht\\ntp{rest}/w.pth"', "https://1drv.ms/u/s!w", "'\"{url}/w.pth\"'"]


@pytest.mark.parametrize("text", ADDRESSES)
@pytest.mark.parametrize("key", ["WEIGHTS", "TIMM: {WEIGHTS"])
def test_weights_of_a_config_are_files(text, key, folder, requested, capsys):
    url, rest = requested.url, requested.url.removeprefix("http")
    value = text.format(url=url, URL=url.replace("http", "HTTP"), rest=rest)
    config = f"MODEL: {{{key}: {value}}}" + "}" * key.count("{")
    error = in_a_training(config, folder, capsys)
    assert requested.paths == []
    assert not (folder.parent / "cache").exists()
    assert "WEIGHTS" in error and "sent.yaml" in error


def test_what_the_user_names_may_be_an_address(folder, requested):
    config, url = folder / "a.yaml", f"{requested.url}/w.pth"
    config.write_text("MODEL: {WEIGHTS: 'http://127.0.0.1:9/x', TIMM: {NAME: 'hf-hub:x/y'}}")
    opts = [*CPU, "MODEL.WEIGHTS", url, "MODEL.TIMM.NAME", "local-dir:/x"]
    cfg = load_config(str(config), opts)
    assert cfg.MODEL.WEIGHTS == url and cfg.MODEL.TIMM.NAME == "local-dir:/x"
    # A download is kept for its host alone, and not in the model zoo's place.
    hosts = {PathManager.get_local_path(u) for u in (url, url.replace("127.0.0.1", "localhost"))}
    assert [Path(path).read_text() for path in hosts] == ["SEED: 1\n"] * 2
    assert requested.paths == ["/w.pth"] * 2
    assert not (folder.parent / "cache/a/b/w.pth").exists()


@pytest.mark.parametrize(
    "path", ["/../../../../planted.pth", "/.\n./.\n./planted.pth", "/a?/..", "/../a/b"]
)
def test_a_download_stays_in_its_folder(path, folder, requested, capsys):
    url = requested.url + path
    for read in (PathManager.get_local_path, PathManager.open):
        with pytest.raises(ValueError, match="127.0.0.1"):
            read(url)
    if "?" not in path:
        assert "127.0.0.1" in predicted(folder, capsys, "--weights", url)
    assert requested.paths == []
    assert not (folder.parent / "cache").exists()
    with pytest.raises(ValueError, match="dl.fbaipublicfiles.com"):
        PathManager.get_local_path("detectron2://../../planted.pth")


@pytest.mark.parametrize("place, bases", TREES.items(), ids=TREES)
def test_a_base_in_the_tree(place, bases, tmp_path):
    path = tmp_path / place / "a.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, content in zip(bases, ("SOLVER: {MAX_ITER: 7}\nSEED: 1\n", "SEED: 2"), strict=False):
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_text(content)
    path.write_text(f"_BASE_: {json.dumps(bases if bases[1:] else bases[0])}\nSEED: 3\n")
    assert load_config(path, CPU) == load_config("", [*CPU, "SOLVER.MAX_ITER", 7, "SEED", 3])


@pytest.mark.parametrize("base", ["R_50_FPN", "X_101_32x8d_FPN", None])
def test_a_base_of_a_package(base, tmp_path):
    path = Path("configs/imrcnn_R_50.yaml").resolve()
    if base:
        name = f"COCO-InstanceSegmentation/mask_rcnn_{base}_3x.yaml"
        path = Path(model_zoo.get_config_file(name))
    (tmp_path / "link").symlink_to(path.parent)
    (tmp_path / "a.yaml").write_text(f"_BASE_: link/{path.name}\nSEED: 3\n")
    assert load_config(tmp_path / "a.yaml", CPU) == load_config(path, [*CPU, "SEED", 3])


def test_our_own_config_comes_back(folder):
    """As training dumps it: with aliases of YAML's and, here, the address that its user gave."""
    opts = [*CPU, "MODEL.WEIGHTS", "https://example.com/w.pth"]
    cfg = load_config("configs/imrcnn_R_50.yaml", opts)
    (folder / "config.yaml").write_text(cfg.dump())
    assert "*id001" in cfg.dump()
    with pytest.raises(ValueError, match=r"config.yaml.*MODEL.WEIGHTS.*example.com"):
        load_config(str(folder / "config.yaml"))
    again = load_config(str(folder / "config.yaml"), opts)
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def nested(form):
    """Lines, each of which has several of the one before: a, then b with a's, and so on."""
    pairs = itertools.pairwise("abcdefghi")
    return "".join(f"{k}: &{k} {form.replace('?', '*' + j)}\n" for j, k in pairs)


BOMBS = {
    "nested lists": "SEED: " + "[" * 50_000,
    "nested text": "SEED: '" + "(" * 50_000 + "'",
    "signs": "SEED: '" + "-" * 50_000 + "1'",
    "laughs": "a: &a [x, x]\n" + nested(f"[{', '.join('?' * 9)}]"),
    "merges": "a: &a {x: 1, y: 2}\n" + nested(f"{{<<: [{', '.join('?' * 99)}]}}"),
    "one text often": "a: &a " + "x" * 40_000 + "\nSEED: [" + "*a, " * 10_000 + "]",
    "a mapping of itself": "MODEL: &a {MODEL: *a}",
    "its own base": "_BASE_: a.yaml",
    "bases of bases": "_BASE_: [b.yaml, b.yaml]",
    "large": "# " + "x" * 2_000_000,
    "no text": "\xff\xfe\x00",
    "an old version": "VERSION: 1",
}
for value in ("&a [*a]", "2024-01-01", "!!binary aaaa", "!!timestamp x", "!!int ''"):
    BOMBS[value] = f"SEED: {value}"


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_a_line(name, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(BOMBS[name], encoding="latin-1")
    for this, following in itertools.pairwise("bcdefghijklmnopq"):
        (tmp_path / f"{this}.yaml").write_text(f"_BASE_: [{following}.yaml, {following}.yaml]")
    (tmp_path / "q.yaml").write_text("SEED: 1")
    with pytest.raises(ValueError, match=r"a\.yaml") as refused:
        load_config(str(path))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


DUMPS = [load_config(f"configs/{n}.yaml", CPU).dump() for n in ("imrcnn_R_50", "resnet50")]
UNHEALTHY = [HealthCheck.too_slow, HealthCheck.data_too_large]
VALUES = st.sampled_from(
    """*id001 *none &id001 &a [*a] {a:&b*b} !!binary !!timestamp !!int !!float !!set !!omap
    !!python/tuple ~ .nan .inf 1e999 0x1f 0b 0o9 1:60 190:20:30 2024-01-01 0001-01-01T00:00:00+23:59
    <<: --- ... ? - | > % @ ` "\\ud800" "\\0" "\\e[2J" "('a',)" "{[]:1}" "f''" "\\x9b"
    _BASE_ _BASE_: http://127.0.0.1:9/a ../a.yaml / . "" '' detectron2://../a hf-hub:a/b
    999999999999 ImageClassifier resnet18 resnet18.a resnet18.no -1 [] {} [[[[ }}} (((""".split()
)  # fmt: skip


@st.composite
def damaged_yaml(draw):
    """Bytes of a config with lines and values changed; or damaged as JSON or as bytes."""
    text = draw(st.sampled_from(DUMPS))
    damage = draw(st.sampled_from(["bytes", "json", "lines", "lines"]))
    if damage == "bytes":
        return draw(damaged_bytes(text.encode()))
    if damage == "json":
        return draw(damaged_json(yaml.safe_load(text)))
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        value = " ".join(draw(st.lists(VALUES, max_size=3)))
        changed = {
            "replace": [f"{key}{colon} {value}"],
            "key": [f"{value}{colon} {value}", lines[at]],
            "remove": [""],
            "repeat": lines[at : at + draw(st.integers(1, 9))] + [lines[at]],
            "indent": [f"  {lines[at]}"],
        }
        lines[at : at + 1] = changed[draw(st.sampled_from(list(changed)))]
    return "\n".join(lines).encode()


@pytest.mark.fuzz
@pytest.mark.slow
@given(damaged_yaml(), st.none() | st.booleans() | st.integers() | st.lists(st.integers()))
@settings(max_examples=max(200, settings().max_examples), suppress_health_check=UNHEALTHY)
def test_any_config_is_read_or_refused_in_a_line(tmp_path_factory, data, other):
    """Alone or inside an exported file; some minutes: ``-m fuzz --hypothesis-profile minute``."""
    path = tmp_path_factory.getbasetemp() / "a.yaml"
    path.write_bytes(data)
    reads = [partial(load_config_text, text, path) for text in (data.decode("latin-1"), other)]
    for read in (partial(load_config, path), *reads):
        try:
            cfg = read(CPU)
        except ValueError as error:
            assert type(error) is ValueError
            assert "\n" not in str(error) and len(str(error)) < 1000
            str(error).encode()  # it can be shown
        else:
            assert cfg.VERSION == 2 and "://" not in cfg.MODEL.WEIGHTS.removeprefix("detectron2://")
