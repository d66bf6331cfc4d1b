"""From a config file and overrides to the config that a tool runs with."""

from detectron2.config import get_cfg

from imrcnn_d2.config import add_imrcnn_config

from .device import choose_device

__all__ = ["load_config"]


def load_config(config_file="", opts=()):
    """
    Args:
        config_file (str): a YAML file; "" for the defaults.
        opts (list[str]): ``[KEY, VALUE, ...]``, applied after the file.

    Returns:
        CfgNode: Detectron2's defaults and ours, the file and the overrides; MODEL.DEVICE is what
            these name, else the result of :func:`choose_device`. Not frozen.
    """
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    # A placeholder that no run ever sees, to tell "nobody named a device" from a named one.
    cfg.MODEL.DEVICE = "auto"
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(opts))
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = choose_device()
    return cfg
