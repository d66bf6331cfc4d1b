"""The shipped configs and their models, by name; as detectron2.model_zoo has Detectron2's."""

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from imrcnn_d2.engine.checkpoint import Checkpointer, load_weights, pretrained
from imrcnn_d2.engine.config import (
    choose_device,
    load_config,
    load_config_text,
    shipped_config,
    shipped_configs,
)
from imrcnn_d2.utils.safe_loading import load_safetensors

__all__ = ["get", "get_config", "get_config_file", "list"]

_TRAINED = {"imrcnn_lite.yaml": "demo"}  # weights that come with the package


def list() -> list[str]:
    """The names of the shipped configs: YAML files, then LazyConfigs ("lazy/NAME.py")."""
    return shipped_configs()


def get_config_file(name: str) -> str:
    """The path of the shipped config `name`, such as "imrcnn_lite.yaml".

    Raises:
        FileNotFoundError: no shipped config has this name.
    """
    return str(shipped_config(name))


def get_config(name: str, trained: bool = False, device: str | None = None) -> CfgNode | DictConfig:
    """A shipped config: Detectron2's keys and ours, or a LazyConfig.

    Args:
        name: one of `list`.
        trained: the config of the weights that come with the package, and MODEL.WEIGHTS names
            these; else what training starts from (COCO or ImageNet).
        device: of the model; None for a usable GPU, else the CPU.

    Raises:
        FileNotFoundError: no shipped config has this name.
        RuntimeError: the package has no trained weights of this model.
    """
    path = shipped_config(name)
    if trained and path.name not in _TRAINED:
        has = ", ".join(_TRAINED)
        raise RuntimeError(f"{name}: the package has no trained weights of it, but of {has}")
    opts = ["MODEL.DEVICE", device] if device else []
    if trained:
        weights = pretrained(_TRAINED[path.name])
        opts += ["MODEL.WEIGHTS", str(weights), "MODEL.TIMM.WEIGHTS", ""]
        return load_config_text(load_safetensors(weights)[1]["config"], weights, opts)
    if path.suffix == ".py":
        cfg = LazyConfig.load(str(path))
        cfg.train.device = device or choose_device()
        return cfg
    return load_config(path, opts)


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """The model of a shipped config, in training mode, with the weights that the config names.

    Args: as of `get_config`.

    Raises: as `get_config`, and OSError where weights cannot be loaded.
    """
    cfg = get_config(name, trained, device)
    if isinstance(cfg, CfgNode):
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model, weights = instantiate(cfg.model).to(cfg.train.device), cfg.train.init_checkpoint
    load_weights(Checkpointer(model, whole=trained), weights)
    return model
