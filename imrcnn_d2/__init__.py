"""IMR-CNN on Detectron2. Importing the package registers its models and data sets."""

from importlib.util import find_spec

if find_spec("detectron2") is None:
    raise ModuleNotFoundError(
        "imrcnn_d2 needs Detectron2, which is missing: run `imrcnn install-detectron2`",
        name="detectron2",
    )

from imrcnn_d2 import modeling
from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.data import catalog as register  # reads a data set's files when it is loaded

__all__ = ["add_imrcnn_config", "modeling", "register"]
__version__ = "0.3.0"
