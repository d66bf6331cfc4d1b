"""Which device a run gets."""

import pytest
import torch

from imrcnn_d2.engine import choose_device, load_config
from imrcnn_d2.engine import config as device


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_usable_card_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == "cuda"


def test_without_a_card_the_cpu_is_used(no_cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_NVIDIA_DRIVER", tmp_path / "absent")
    assert choose_device() == "cpu"


@pytest.fixture
def unusable_card(no_cuda, monkeypatch, tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  390.157\nGCC version: 12\n")
    monkeypatch.setattr(device, "_NVIDIA_DRIVER", version)


def test_an_unusable_card_stops_the_run(unusable_card):
    with pytest.raises(RuntimeError, match="390.157") as error:
        load_config("configs/imrcnn_lite.yaml")
    assert torch.__version__ in str(error.value)
    assert "MODEL.DEVICE cpu" in str(error.value)


def test_a_named_device_is_not_questioned(unusable_card):
    cfg = load_config("configs/imrcnn_lite.yaml", ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.DEVICE == "cpu"


def test_a_hidden_card_counts_as_absent(unusable_card, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device() == "cpu"


def test_no_config_is_left_without_a_device(no_cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_NVIDIA_DRIVER", tmp_path / "absent")
    assert load_config("configs/imrcnn_lite.yaml").MODEL.DEVICE == "cpu"
