"""Weights are loaded whole or not at all, with the config that is theirs."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.artifact import write_safetensors
from imrcnn_d2.deploy.batch import predict_files
from imrcnn_d2.deploy.loading import ARTIFACT_VERSION, load_model, pretrained
from imrcnn_d2.engine import load_config

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


def changed(path, target, **fields):
    """A copy of an artifact with other metadata."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() | {key: json.dumps(value) for key, value in fields.items()}
    safetensors.torch.save_file(safetensors.torch.load_file(path), target, metadata)
    return target


def test_an_artifact_of_another_version_is_refused(tiny_run, tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(load_model(None, tiny_run / "model_best.pth"), path)
    later = changed(path, tmp_path / "l.safetensors", artifact=ARTIFACT_VERSION + 1, version="9.9")
    with pytest.raises(ValueError, match="l.safetensors was written by a later version.* 9.9"):
        load_model(None, later)
    other = changed(path, tmp_path / "o.safetensors", config="MODEL: {NOVEL: 1}\nVERSION: 2\n")
    with pytest.raises(ValueError, match="o.safetensors: the config .*NOVEL"):
        load_model(None, other)


def test_nothing_is_written_where_a_config_says(tiny_run, image_folder, tmp_path):
    cfg = load_config(tiny_run / "config.yaml", ["OUTPUT_DIR", str(tmp_path / "elsewhere")])
    (tmp_path / "sent").mkdir()
    shutil.copy(tiny_run / "model_best.pth", tmp_path / "sent")
    (tmp_path / "sent" / "config.yaml").write_text(cfg.dump())
    for suffix in ("pth", "safetensors"):
        path = tmp_path / "sent" / f"model_best.{suffix}"
        if not path.exists():
            write_safetensors(load_model(None, tmp_path / "sent" / "model_best.pth"), path)
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
