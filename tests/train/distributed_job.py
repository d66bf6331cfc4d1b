"""What test_launch.py starts in several processes. ``--config-file`` names a JSON file:

action      "step", "train", "wait", "before", "after" or "while they start", see `main`
folder      where they write
datasets    name -> COCO JSON file, to be registered
opts        overrides of the light IMR-CNN's config"""

import json
import os
import signal
import time
from pathlib import Path

import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from imrcnn_d2.data.catalog import register_lesion_dataset
from imrcnn_d2.engine import Trainer, launch_script, load_config
from imrcnn_d2.engine.checkpoint import Checkpointer
from imrcnn_d2.engine.hooks import Interruption
from imrcnn_d2.utils.files import write_atomically


def gradients(cfg):
    """Of the first training step, name -> tensor."""
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    with EventStorage():
        trainer._trainer.iter = 0
        trainer._trainer.run_step()
    named = trainer.model.named_parameters()
    return {n.removeprefix("module."): p.grad for n, p in named if p.grad is not None}


class Kill(HookBase):
    """Kill process 1 in the first attempt of torchrun, after iteration 2 of 0, 1, 2, ..."""

    def after_step(self):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and comm.get_rank() == 1 and self.trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def write_pid(folder):
    write_atomically(folder / f"pid_{comm.get_rank()}", str(os.getpid()))


class Idle(TrainerBase):
    """Nothing but iterations."""

    def run_step(self):
        time.sleep(0.05)
        if self.iter == 3:
            write_pid(self.folder)


def main(args):
    settings = json.loads(Path(args.config_file).read_text())
    folder, action = Path(settings["folder"]), settings["action"]
    for name, json_file in settings["datasets"].items():
        register_lesion_dataset(name, json_file, Path(json_file).parent)
    cfg = load_config("configs/imrcnn_lite.yaml", settings["opts"])
    torch.manual_seed(0)
    idle = Idle()
    idle.folder = folder
    idle.register_hooks([Interruption(Checkpointer(nn.Linear(1, 1), str(folder)))])
    if action == "wait":
        idle.train(0, 10**6)
    elif action == "step":
        torch.save(gradients(cfg), folder / f"gradients_{comm.get_rank()}.pth")
    elif action == "train":
        trainer = Trainer(cfg)
        trainer.resume_or_load(args.resume)
        if (folder / "kill").exists():
            trainer.register_hooks([Kill()])
        if comm.is_main_process():
            (folder / "starts.txt").open("a").write(f"{trainer.start_iter}\n")
        trainer.train()
    else:  # process 0 works, and the others wait for it, before or after iterations
        if action == "after":
            idle.train(0, 2)
        write_pid(folder)
        if comm.is_main_process():
            time.sleep(600)
        comm.synchronize()


if __name__ == "__main__":
    launch_script(main)
