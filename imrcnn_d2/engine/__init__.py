from . import downloads  # noqa: F401  (from here on they stay in their folder)
from .config import load_config
from .device import choose_device
from .launch import launch_script
from .trainer import Trainer
from .weights import load_weights

__all__ = ["Trainer", "choose_device", "launch_script", "load_config", "load_weights"]
