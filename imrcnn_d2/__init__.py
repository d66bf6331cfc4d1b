"""IMR-CNN on Detectron2. Importing the package registers its models and data sets."""

from imrcnn_d2 import modeling  # registers backbones and heads
from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.data import (
    catalog as register,  # registers data sets by name; files are read when one is loaded
)

__all__ = ["add_imrcnn_config", "modeling", "register"]
__version__ = "0.1.0"
