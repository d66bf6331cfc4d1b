"""Training. ``trainer`` builds it from a config and runs it: ``train_step`` is one step, ``hooks``
come between steps, ``schedule`` sets optimizer and learning rate, ``precision`` chooses 16 or 32
bits, ``checkpoint`` saves and loads, ``run_record`` writes run.json. ``config`` reads configs,
``fingerprint`` and ``plan`` make one, ``launch`` starts processes, and ``cross_validation`` trains
many models.
"""

from imrcnn_d2.engine.checkpoint import load_weights
from imrcnn_d2.engine.config import choose_device, load_config
from imrcnn_d2.engine.launch import launch_script
from imrcnn_d2.engine.trainer import Trainer

__all__ = ["Trainer", "choose_device", "launch_script", "load_config", "load_weights"]
