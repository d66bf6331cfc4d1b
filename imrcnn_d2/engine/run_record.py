"""run.json: what was trained, on what and with what, so that a metric can be traced back."""

import hashlib
import json
import logging
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.utils import comm
from torch import nn

from imrcnn_d2.engine.train_step import TrainStep
from imrcnn_d2.evaluation.output import package_versions
from imrcnn_d2.modeling import ImageClassifier, TimmBackbone
from imrcnn_d2.task import CLASSIFICATION, DETECTION
from imrcnn_d2.utils.files import file_sha256, read_rows, write_atomically

logger = logging.getLogger(__name__)


def _now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class RunRecord(HookBase):
    """Writes ``run.json`` as training starts and completes it when `finish` is called.

    A resumed run keeps its start. ``hours`` is the time spent in iterations, validation and
    checkpoints that the final weights come from: each checkpoint carries it, so pauses, the final
    test and work lost in an interruption do not count. Register it before the periodic checkpoint,
    on every rank; only the main process writes.

    Args:
        step: whose model and precision are recorded.
        config_hash: see `config_sha256`.
        phases: see `Phases.describe`.
        plan: see `plan_record`.
    """

    FILE = "run.json"

    def __init__(
        self,
        cfg: CfgNode,
        step: TrainStep,
        config_hash: str,
        phases: list[dict] | None = None,
        plan: dict | None = None,
    ):
        self._path = Path(cfg.OUTPUT_DIR) / self.FILE
        sets = cfg.DATASETS
        self._datasets = list(dict.fromkeys([*sets.TRAIN, *sets.VAL, *sets.TEST]))
        self._step, self._config_hash, self._phases, self._plan = step, config_hash, phases, plan
        self._started, self._since, self._hours_before = None, None, 0.0
        self._cfg = cfg

    def before_train(self):
        self._since = time.perf_counter()
        self._started = self._started or _now()
        if not comm.is_main_process():
            return
        model = self._step.model
        name, backbone = describe_model(model)
        device = next(model.parameters()).device
        card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        program, *arguments = sys.argv
        program = program if program.startswith("imrcnn ") else f"python {shlex.quote(program)}"
        self._content = {
            "model": name,
            "backbone": backbone,
            "input": _input_facts(model),
            "seed": self._step.seed,
            "command": f"{program} {shlex.join(arguments)}".strip(),
            "git": git_state(),
            "versions": {"python": sys.version.split()[0], **package_versions()},
            "config_sha256": self._config_hash,
            "device": f"{device.type}{card}",
            "precision": self._step.precision,
            "precision_seconds": self._step.precision_seconds,
            "processes": comm.get_world_size(),
            "started": self._started,
            "finished": None,
            "hours": self._hours_before,
            "iterations": self.trainer.max_iter,
            "phases": self._phases,
            "plan": self._plan,
            "datasets": {name: _dataset_facts(name) for name in self._datasets},
            **_split_facts(self._datasets[0]),
        }
        self._write()
        self._log_start()

    def _log_start(self):
        cfg, content, last = self._cfg, self._content, self.trainer.max_iter
        training, validation, test = (
            sum(content["datasets"][name]["images"] for name in cfg.DATASETS[split])
            for split in ("TRAIN", "VAL", "TEST")
        )
        batch = cfg.SOLVER.IMS_PER_BATCH
        logger.info(
            f"Training {content['model']} ({content['backbone']}) on {content['device']} in "
            f"{content['precision']}, {content['processes']} process(es). Images: {training} for "
            f"training, {validation} for validation, {test} for the test; {batch} per iteration. "
            f"Iterations {self.trainer.start_iter} to {last} "
            f"({last * batch / training:.3g} epochs), validation every "
            f"{cfg.TEST.EVAL_PERIOD or last}. Files: {cfg.OUTPUT_DIR}"
        )

    def after_train(self):
        self._hours_before, self._since = self._hours(), None

    def finish(self) -> None:
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


def describe_model(model: nn.Module) -> tuple[str, str]:
    """Names of a model and its backbone: for a Mask R-CNN the ``model_name`` of its neck (see
    :class:`PAFPN`) or, with an FPN, "MR-CNN", else that of its class; and "R-50" or
    "tf_efficientnet_lite0". The model may be wrapped by DistributedDataParallel.
    """
    model = getattr(model, "module", model)
    backbone = getattr(model, "backbone", None)
    name = type(model).__name__
    if isinstance(model, ImageClassifier):
        return name, model.name
    if isinstance(model, GeneralizedRCNN) and getattr(model.roi_heads, "mask_on", False):
        name = getattr(backbone, "model_name", "MR-CNN" if isinstance(backbone, FPN) else name)
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
            if layer is not block.shortcut and isinstance(layer, nn.Conv2d)
        ]
        return name, f"R-{len(layers) + 2}"
    return name, type(bottom_up).__name__


def config_sha256(cfg: CfgNode) -> str:
    """Hash of a config as loaded, before epochs are turned into iterations: equal for runs that
    differ only in OUTPUT_DIR, MODEL.DEVICE, DATASETS.ROOT and PLAN.
    """
    cfg = cfg.clone()
    cfg.defrost()
    del cfg["OUTPUT_DIR"], cfg.MODEL["DEVICE"], cfg.DATASETS["ROOT"]
    cfg.pop("PLAN", None)  # facts, by which nothing is trained
    return hashlib.sha256(cfg.dump().encode()).hexdigest()


def git_state() -> dict | None:
    """ "revision" and "dirty" (whether tracked files differ from it) of the checkout that this
    package lies in; None where it was installed elsewhere.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*arguments):
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # A package installed into a virtual environment inside some other checkout is not its.
        git("ls-files", "--error-unmatch", "__init__.py")
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None


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
    records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    task = CLASSIFICATION if metadata.get("evaluator_type") == CLASSIFICATION.name else DETECTION
    patients = {r["patient_id"] for r in records if r.get("patient_id") is not None}
    json_file = metadata.get("json_file")
    gt = Path(json_file).absolute() if json_file else None
    # Of the whole prepared data set: what was left out belongs to no split.
    listed = gt is not None and (gt.parent.parent / "rejected.csv").is_file()
    rejected = read_rows(gt.parent.parent / "rejected.csv", ("reason",)) if listed else None
    return {
        "gt": str(gt) if gt else None,
        "gt_sha256": file_sha256(gt) if gt else None,
        "images": len(records),
        **task.dataset_facts(records, metadata.get("thing_classes", [])),
        "patients": len(patients) or None,
        "rejected": None if rejected is None else len(rejected),
    }


def _split_facts(name):
    """``splits_sha256``, ``fold`` and what that ``left_out`` of the prepared data set that a name
    stands for."""
    json_file = MetadataCatalog.get(name).get("json_file")
    path = Path(json_file).parent.parent / "splits.json" if json_file else None
    splits = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    fold = {"index": splits["fold"], "of": splits["folds"]} if "fold" in splits else None
    left_out = splits.get("left_out") if fold else None
    return {"splits_sha256": splits.get("sha256"), "fold": fold, "left_out": left_out}
