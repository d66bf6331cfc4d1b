"""An exported file is the model."""

import json

import pytest
import safetensors.torch
import torch

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.deploy.runtimes import TorchRuntime
from imrcnn_d2.engine import Trainer, load_weights
from imrcnn_d2.engine.checkpoint import Checkpointer

from .conftest import TAU


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return load_model(None, tiny_run / "model_best.pth")


def test_it_needs_nothing_else(loaded, predictor, tmp_path):
    TorchRuntime.export(loaded, tmp_path / "model.safetensors")
    other = Predictor(None, tmp_path / "model.safetensors")
    assert (other.tau, other.classes) == (TAU, ["polyp"])
    assert other.metadata["config_sha256"] == predictor.metadata["config_sha256"]
    expected = loaded.model.state_dict()
    found = load_model(None, tmp_path / "model.safetensors").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_metadata(loaded, tiny_run, tmp_path):
    TorchRuntime.export(loaded, tmp_path / "model.safetensors", precision="fp16")
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        texts = file.metadata()
    assert texts.pop("format") == "pt"
    about = {key: json.loads(text) for key, text in texts.items()}
    assert about["operating_point"] == {"tau": TAU, "rule": "f1", "dataset": "kvasir_seg_val"}
    assert (about["tau"], about["classes"], about["precision"]) == (TAU, ["polyp"], "fp16")
    assert about["weights_sha256"] == loaded.weights.sha256
    assert str(tiny_run) not in " ".join(texts.values()), (
        "where it was trained is nobody's business"
    )


def test_fp16_rounds_kernels_alone(loaded, tmp_path):
    path = tmp_path / "model.safetensors"
    TorchRuntime.export(loaded, path, precision="fp16")
    for name, tensor in safetensors.torch.load_file(path).items():
        original = loaded.model.state_dict()[name]
        if original.ndim < 2:
            assert tensor.dtype == original.dtype and torch.equal(tensor, original)
        else:
            assert tensor.dtype == torch.float16
            torch.testing.assert_close(tensor.float(), original, rtol=2**-11, atol=1e-7)


def test_what_fp16_cannot_hold_is_named(tiny_run, tmp_path):
    loaded = load_model(None, tiny_run / "model_best.pth")
    with torch.no_grad():
        loaded.model.backbone.fpn_lateral2.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"backbone.fpn_lateral2.weight has values up to 1e\+06"):
        TorchRuntime.export(loaded, tmp_path / "model.safetensors", precision="fp16")
    assert not list(tmp_path.iterdir())


def test_model_weights_takes_it(loaded, tmp_path):
    path = tmp_path / "model.safetensors"
    TorchRuntime.export(loaded, path, precision="fp16")
    model = Trainer.build_model(loaded.cfg)
    weights = load_weights(Checkpointer(model), str(path))
    assert weights.operating_point.tau == TAU
    name = "backbone.fpn_lateral2.weight"
    found, expected = model.state_dict()[name], loaded.model.state_dict()[name]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=2**-11, atol=1e-7)
