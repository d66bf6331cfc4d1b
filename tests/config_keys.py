"""The keys of a config, for tests of several modules."""

from detectron2.config import CfgNode


def flat(cfg, prefix=""):
    """("MODEL.PAFPN.FORM", "panet") and so on."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
