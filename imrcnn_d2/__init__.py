"""IMR-CNN on Detectron2. Importing the package registers its models and data sets."""

from . import modeling  # registers backbones and heads
from .config import add_imrcnn_config
from .data import register  # registers data sets by name; files are read when one is loaded

__all__ = ["add_imrcnn_config", "modeling", "register"]
__version__ = "0.1.0"
