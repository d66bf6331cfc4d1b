"""Weights are loaded whole or not at all, with the config that is theirs."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.batch import predict_files
from imrcnn_d2.deploy.loading import load_model, pretrained
from imrcnn_d2.deploy.runtimes import EXPORT_VERSION, TorchRuntime
from imrcnn_d2.engine import load_config
from imrcnn_d2.utils.files import BadInputError
from imrcnn_d2.utils.safe_loading import CHECKSUM

from .conftest import OPTS, TAU


def test_the_config_is_found_beside_the_weights(tiny_run, tmp_path):
    loaded = load_model(None, tiny_run / "model_best.pth")
    assert loaded.cfg.INPUT.MIN_SIZE_TEST == 64
    assert loaded.tau == TAU and not loaded.model.training
    alone = shutil.copy(tiny_run / "model_best.pth", tmp_path / "alone.pth")
    with pytest.raises(FileNotFoundError, match="brings no config along"):
        load_model(None, alone)
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_model(None, tmp_path / "nowhere.pth")


@pytest.mark.parametrize("model", ["mrcnn", "ibmrcnn"])
def test_weights_of_another_architecture_are_refused(tiny_run, model):
    cfg = load_config(f"configs/kvasir_seg/{model}_lite.yaml", OPTS)
    with pytest.raises(
        ValueError, match="model_best.pth: .*another architecture.*not this model's, such as .*cbam"
    ):
        load_model(cfg, tiny_run / "model_best.pth")


def test_names_of_weights_are_told_in_a_line(tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run / "model_best.pth", weights_only=True)
    checkpoint["model"]["\x1b]0;x\x07\ny"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth: .*\\x1b]0;x") as refused:
        load_model(tiny_run / "config.yaml", tmp_path / "a.pth")
    assert str(refused.value).isprintable()


def test_weights_of_another_size_are_refused(tiny_run):
    cfg = load_config(str(tiny_run / "config.yaml"), ["MODEL.ROI_BOX_HEAD.FC_DIM", 24])
    with pytest.raises(ValueError, match=r"\d of another shape, such as roi_heads"):
        load_model(cfg, tiny_run / "model_best.pth")


def test_missing_weights_are_refused(tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run / "model_best.pth", weights_only=True)
    del checkpoint["model"]["backbone.fpn_lateral2.weight"]
    torch.save(checkpoint, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="1 missing, such as backbone.fpn_lateral2.weight"):
        load_model(tiny_run / "config.yaml", tmp_path / "part.pth")


def test_without_an_operating_point_the_config_s_threshold_counts(tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run / "model_best.pth", weights_only=True)
    torch.save({"model": checkpoint["model"]}, tmp_path / "plain.pth")
    assert load_model(tiny_run / "config.yaml", tmp_path / "plain.pth").tau == 0.7


def test_class_names_of_a_foreign_data_set(tiny_run):
    cfg = load_config(str(tiny_run / "config.yaml"), ["DATASETS.TEST", ("nobody_knows",)])
    cfg.DATASETS.VAL = cfg.DATASETS.TRAIN = ()
    assert load_model(cfg, tiny_run / "model_best.pth").classes == ["lesion"]


@pytest.fixture(scope="module")
def artifact(tiny_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    TorchRuntime.export(load_model(None, tiny_run / "model_best.pth"), path)
    return path


def changed(path, target, **fields):
    """A copy of an artifact with other metadata."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() | {key: json.dumps(value) for key, value in fields.items()}
    del metadata[CHECKSUM]
    safetensors.torch.save_file(safetensors.torch.load_file(path), target, metadata)
    return target


def test_an_artifact_of_another_version_is_refused(artifact, tmp_path):
    later = changed(
        artifact, tmp_path / "l.safetensors", artifact=EXPORT_VERSION + 1, version="9.9"
    )
    with pytest.raises(ValueError, match="l.safetensors was written by a later version.* 9.9"):
        load_model(None, later)
    other = changed(artifact, tmp_path / "o.safetensors", config="MODEL: {NOVEL: 1}\nVERSION: 2\n")
    with pytest.raises(ValueError, match="o.safetensors: the config .*NOVEL"):
        load_model(None, other)


POINTS = [
    {"tau": float("nan"), "rule": "f1", "dataset": "val"},
    {"tau": -0.1, "rule": "f1", "dataset": "val"},
    {"tau": 1.1, "rule": "f1", "dataset": "val"},
    {"tau": "0.5", "rule": "f1", "dataset": "val"},
    {"tau": 0.5, "rule": 3, "dataset": "val"},
    {"tau": 0.5, "rule": "f1"},
    {"tau": 0.5, "rule": "f1", "dataset": None, "more": 1},
    0.5,
    [],
]


@pytest.mark.parametrize("point", POINTS)
def test_an_operating_point_is_checked(tiny_run, tmp_path, point):
    checkpoint = torch.load(tiny_run / "model_best.pth", weights_only=True)
    torch.save({**checkpoint, "operating_point": point}, tmp_path / "a.pth")
    with pytest.raises(BadInputError, match=r"a.pth.*operating_point"):
        load_model(tiny_run / "config.yaml", tmp_path / "a.pth")


@pytest.mark.parametrize("score", [float("nan"), 2.0])
def test_the_config_s_threshold_is_checked(tiny_run, tmp_path, score):
    checkpoint = torch.load(tiny_run / "model_best.pth", weights_only=True)
    torch.save({"model": checkpoint["model"]}, tmp_path / "a.pth")
    cfg = load_config(str(tiny_run / "config.yaml"), ["MODEL.IMRCNN.SCORE_THRESH", score])
    with pytest.raises(BadInputError, match=r"a.pth.*MODEL.IMRCNN.SCORE_THRESH"):
        load_model(cfg, tmp_path / "a.pth")


def test_weights_of_nan_are_refused(tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run / "model_best.pth", weights_only=True)
    checkpoint["model"]["backbone.fpn_lateral2.weight"][0, 0] = float("nan")
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth: backbone.fpn_lateral2.weight holds NaN"):
        load_model(tiny_run / "config.yaml", tmp_path / "a.pth")


@pytest.mark.parametrize(
    "fields",
    [{"classes": ["a", "b"]}, {"classes": "polyp"}, {"artifact": "1"}, {"config": ["x"]}],
)
def test_metadata_are_checked(artifact, tmp_path, fields):
    path = changed(artifact, tmp_path / "a.safetensors", **fields)
    with pytest.raises(BadInputError, match="a.safetensors.*(classes|artifact|config)"):
        load_model(None, path)


def test_a_model_far_larger_than_its_weights_is_not_built(tiny_run, tmp_path, monkeypatch):
    cfg = load_config(str(tiny_run / "config.yaml"), ["MODEL.ROI_BOX_HEAD.FC_DIM", 10_000_000])
    with pytest.raises(ValueError, match=r"model_best.pth has not a byte for each of the 10"):
        load_model(cfg, tiny_run / "model_best.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.MIN_SIZE_TEST", 100_000),
        ("MODEL.ROI_MASK_HEAD.NUM_CONV", 10**7),
        ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 10**4),
        ("TEST.DETECTIONS_PER_IMAGE", 10**6),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8.0] * 1000]),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0] * 1000]),
    ],
)
def test_a_config_s_demands_are_bounded(tiny_run, artifact, tmp_path, key, value):
    cfg = load_config(str(tiny_run / "config.yaml"), [key, value])
    with pytest.raises(ValueError, match=f"model_best.pth: .*{key}"):
        load_model(cfg, tiny_run / "model_best.pth")
    with pytest.raises(ValueError, match=f"a.safetensors: .*{key}"):
        load_model(None, changed(artifact, tmp_path / "a.safetensors", config=cfg.dump()))


def test_a_flipped_bit_of_an_artifact(artifact, tmp_path):
    content = artifact.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in (header, (header + len(content)) // 2, len(content) - 1, content.index(b"0.5")):
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        (tmp_path / "a.safetensors").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"a.safetensors is damaged: its checksum"):
            load_model(None, tmp_path / "a.safetensors")


def test_nothing_is_written_where_a_config_says(tiny_run, image_folder, tmp_path):
    cfg = load_config(tiny_run / "config.yaml", ["OUTPUT_DIR", str(tmp_path / "elsewhere")])
    (tmp_path / "sent").mkdir()
    shutil.copy(tiny_run / "model_best.pth", tmp_path / "sent")
    (tmp_path / "sent" / "config.yaml").write_text(cfg.dump())
    for suffix in ("pth", "safetensors"):
        path = tmp_path / "sent" / f"model_best.{suffix}"
        if not path.exists():
            TorchRuntime.export(load_model(None, tmp_path / "sent" / "model_best.pth"), path)
            path = changed(path, tmp_path / "sent" / "changed.safetensors", config=cfg.dump())
        before = set(tmp_path.rglob("*"))
        predict_files(Predictor(None, path), [image_folder], tmp_path / suffix, save=["masks"])
        written = set(tmp_path.rglob("*")) - before
        assert all(new.is_relative_to(tmp_path / suffix) for new in written)


def test_weights_of_the_package(tmp_path):
    (tmp_path / "demo.safetensors").touch()
    assert pretrained("demo", tmp_path) == tmp_path / "demo.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights named 'other'; it has: demo"):
        pretrained("other", tmp_path)
    with pytest.raises(FileNotFoundError, match="it has: none"):
        pretrained("demo", tmp_path / "nothing")
