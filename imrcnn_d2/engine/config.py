"""From a config file and overrides to the config that a tool runs with."""

import yaml
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from imrcnn_d2.config import add_imrcnn_config

from .device import choose_device
from .recognition import resolve_input

__all__ = ["load_config"]

# What a config raises of unknown keys, values of another type, and files that are no mapping.
_WRONG = (AssertionError, AttributeError, KeyError, TypeError, ValueError)


def load_config(config_file="", opts=()):
    """
    Args:
        config_file (str): a YAML file; "" for the defaults.
        opts (list[str]): ``[KEY, VALUE, ...]``, applied after the file.

    Returns:
        CfgNode: Detectron2's defaults and ours, the file and the overrides; MODEL.DEVICE is what
            these name, else the result of :func:`choose_device`; what images a classifier takes is
            resolved, see :func:`resolve_input`. Not frozen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key that there is not, or a value of another type. The file, or one that it is
            based on, is no plain YAML: Detectron2 would run what a tag such as
            ``!!python/object/apply`` names. So would it what a file of precomputed proposals holds,
            hence for MODEL.LOAD_PROPOSALS.
    """
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    # A placeholder that no run ever sees, to tell "nobody named a device" from a named one.
    cfg.MODEL.DEVICE = "auto"
    if config_file:
        if not PathManager.isfile(config_file):
            raise FileNotFoundError(f"{config_file}: no such config file")
        try:
            cfg.merge_from_file(config_file, allow_unsafe=False)
        except yaml.YAMLError as error:
            raise ValueError(
                f"{config_file} (or a _BASE_ of it) is no plain YAML: {error}\nA config holds "
                "values only: where a tag like !!python/object/apply:eval stands, write what it "
                "gives."
            ) from error
        except _WRONG as error:
            raise ValueError(f"{config_file} is no config of these models: {_said(error)}") from (
                error
            )
    try:
        cfg.merge_from_list(list(opts))
    except _WRONG as error:
        raise ValueError(f"KEY VALUE ...: {_said(error)}") from error
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True, but DATASETS.PROPOSAL_FILES_* are pickles, which run "
            "whatever they hold when Detectron2 loads them. Set it to False: the models here make "
            "their own proposals."
        )
    resolve_input(cfg)
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = choose_device()
    return cfg


def _said(error):
    """Of a KeyError too without quotes."""
    return error.args[0] if error.args else repr(error)
