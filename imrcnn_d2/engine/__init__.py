from .config import load_config
from .device import choose_device
from .trainer import Trainer

__all__ = ["Trainer", "choose_device", "load_config"]
