from imrcnn_d2.engine.checkpoint import load_weights
from imrcnn_d2.engine.config import choose_device, load_config
from imrcnn_d2.engine.launch import launch_script
from imrcnn_d2.engine.trainer import Trainer
from imrcnn_d2.utils import safe_loading as downloads  # noqa: F401  (from here on they stay in their folder)

__all__ = ["Trainer", "choose_device", "launch_script", "load_config", "load_weights"]
