"""run.json: what was trained, on what, with what, so that a figure can be traced back."""

import hashlib
import json
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.utils import comm

from imrcnn_d2.data.catalog import labels_of
from imrcnn_d2.modeling import PAFPN, ImageClassifier, TimmBackbone
from imrcnn_d2.utils.files import file_sha256, read_rows, write_atomically
from imrcnn_d2.versions import package_versions

__all__ = ["RunRecord", "config_sha256", "describe_model", "git_state"]


class RunRecord(HookBase):
    """
    Writes ``run.json`` as training starts and completes it when :meth:`finish` is called.

    A resumed run keeps its start. ``hours`` is the time spent in iterations, validation and
    checkpoints that the final weights come from: it goes into every checkpoint and is counted on
    from there, so pauses, the final test and work lost in an interruption are left out.

    Put it before the periodic checkpoint, on every rank; only the main process writes.
    """

    FILE = "run.json"

    def __init__(self, output_dir, *, model, seed, config_hash, datasets, phases=None):
        """
        Args:
            output_dir (str): folder of the file.
            model (nn.Module): what is trained.
            seed (int): negative if none was set.
            config_hash (str): see :func:`config_sha256`.
            datasets (list[str]): names of the sets for training, validation and test, in that
                order.
            phases (list[dict] or None): see :meth:`Phases.describe`.
        """
        self._path = Path(output_dir) / self.FILE
        self._phases = phases
        self._about = (model, seed, config_hash, list(dict.fromkeys(datasets)))
        self._started, self._hours_before = None, 0.0
        self._since = None

    def before_train(self):
        self._since = time.perf_counter()
        self._started = self._started or _now()
        if not comm.is_main_process():
            return
        model, seed, config_hash, datasets = self._about
        name, backbone = describe_model(model)
        split = _split_facts(datasets[0])
        self._content = {
            "model": name,
            "backbone": backbone,
            "input": _input_facts(model),
            "seed": seed if seed >= 0 else None,
            "command": _command_line(),
            "git": git_state(),
            "versions": {"python": sys.version.split()[0], **package_versions()},
            "config_sha256": config_hash,
            "device": _device(model),
            "processes": comm.get_world_size(),
            "started": self._started,
            "finished": None,
            "hours": self._hours_before,
            "iterations": self.trainer.max_iter,
            "phases": self._phases,
            "datasets": {name: _dataset_facts(name) for name in datasets},
            **split,
        }
        self._write()

    def after_train(self):
        self._hours_before, self._since = self._hours(), None

    def finish(self):
        """To be called when the final test is done."""
        if comm.is_main_process():
            self._content.update(finished=_now(), hours=self._hours())
            self._write()

    def state_dict(self):
        return {"started": self._started, "hours": self._hours()}

    def load_state_dict(self, state_dict):
        self._started, self._hours_before = state_dict["started"], state_dict["hours"]

    def _hours(self):
        running = time.perf_counter() - self._since if self._since is not None else 0
        return self._hours_before + running / 3600

    def _write(self):
        write_atomically(self._path, json.dumps(self._content, indent=2) + "\n")


def describe_model(model):
    """
    Args:
        model (nn.Module): built, perhaps wrapped by DistributedDataParallel.

    Returns:
        tuple[str, str]: the model's name, that is "IMR-CNN", "IBMR-CNN" or "MR-CNN" for a Mask
            R-CNN whose neck is a PAFPN with CBAM, one without, or an FPN, else that of its class;
            and its backbone's, such as "R-50" or "tf_efficientnet_lite0".
    """
    model = getattr(model, "module", model)
    backbone = getattr(model, "backbone", None)
    name = type(model).__name__
    if isinstance(model, ImageClassifier):
        return name, model.name
    if isinstance(model, GeneralizedRCNN) and getattr(model.roi_heads, "mask_on", False):
        if isinstance(backbone, PAFPN):
            name = "IMR-CNN" if backbone.cbams else "IBMR-CNN"
        elif isinstance(backbone, FPN):
            name = "MR-CNN"
    bottom_up = getattr(backbone, "bottom_up", backbone)
    if isinstance(bottom_up, TimmBackbone):
        return name, bottom_up.name
    if isinstance(bottom_up, ResNet):
        # As ResNets are named: the layers on the main path, the stem's and a classifier's included.
        layers = [
            layer
            for stage in bottom_up.stages
            for block in stage
            for layer in block.children()
            if layer is not block.shortcut and isinstance(layer, torch.nn.Conv2d)
        ]
        return name, f"R-{len(layers) + 2}"
    return name, type(bottom_up).__name__


def _command_line():
    program, *arguments = sys.argv
    program = program if program.startswith("imrcnn ") else f"python {shlex.quote(program)}"
    return f"{program} {shlex.join(arguments)}".strip()


def config_sha256(cfg):
    """
    Hash of a config, equal for runs that differ in nothing but where they run and write.

    Args:
        cfg (CfgNode): as loaded, before epochs are turned into iterations; not changed.

    Returns:
        str: sha256 of ``cfg.dump()`` without OUTPUT_DIR and MODEL.DEVICE.
    """
    cfg = cfg.clone()
    cfg.defrost()
    del cfg["OUTPUT_DIR"], cfg.MODEL["DEVICE"]
    return hashlib.sha256(cfg.dump().encode()).hexdigest()


def git_state():
    """
    Returns:
        dict or None: "revision" and "dirty" (whether tracked files differ from it) of the checkout
            that this package lies in; None where it was installed elsewhere.
    """
    package = Path(__file__).resolve().parents[1]
    try:
        # A package installed into a virtual environment inside some other checkout is not its.
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        changes = _git(package, "status", "--porcelain", "--untracked-files=no")
        return {"revision": _git(package, "rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder, *arguments):
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _device(model):
    device = next(model.parameters()).device
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def _input_facts(model):
    """Colour order, mean and standard deviation of the images, and a classifier's image size."""
    model = getattr(model, "module", model)
    facts = {"format": getattr(model, "input_format", None)}
    for key in ("pixel_mean", "pixel_std"):
        values = getattr(model, key, None)
        facts[key] = None if values is None else values.flatten().tolist()
    if isinstance(model, ImageClassifier):
        facts["size"] = model.input_size
    return facts


def _dataset_facts(name):
    records = DatasetCatalog.get(name)
    patients = {r["patient_id"] for r in records if r.get("patient_id") is not None}
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "recognition":
        counts = np.bincount(labels_of(records), minlength=len(metadata.thing_classes)).tolist()
        content = {"classes": dict(zip(metadata.thing_classes, counts, strict=True))}
    else:
        lesions = [sum(not a.get("iscrowd", 0) for a in r.get("annotations", ())) for r in records]
        content = {"lesion_free_images": lesions.count(0), "lesions": sum(lesions)}
    json_file = metadata.get("json_file")
    gt = Path(json_file).absolute() if json_file else None
    rejected = gt.parent.parent / "rejected.csv" if gt else None
    return {
        "gt": str(gt) if gt else None,
        "gt_sha256": file_sha256(gt) if gt else None,
        "images": len(records),
        **content,
        "patients": len(patients) or None,
        # Of the whole prepared data set: what was left out belongs to no split.
        "rejected": len(read_rows(rejected, ("reason",)))
        if rejected and rejected.is_file()
        else None,
    }


def _split_facts(name):
    """``splits_sha256`` and ``fold`` of the prepared data set that a name stands for."""
    json_file = MetadataCatalog.get(name).get("json_file")
    path = Path(json_file).parent.parent / "splits.json" if json_file else None
    splits = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    fold = {"index": splits["fold"], "of": splits["folds"]} if "fold" in splits else None
    return {"splits_sha256": splits.get("sha256"), "fold": fold}
