"""A run as reports and comparisons see it: what was evaluated, and what of."""

import functools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ..engine.config import read_yaml
from ..evaluation import evaluate_lesions, evaluate_recognition
from ..evaluation.files import RESULTS, file_sha256
from ..evaluation.operating_point import OperatingPoint
from ..evaluation.recognition_files import RECOGNITION_RESULTS

__all__ = ["Run", "load_run"]

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# As their publications write them; classifiers are told apart by their backbones.
BACKBONES = {"vgg19": "VGG19", "resnet50": "ResNet50", "inception_v3": "Inception-V3"}


@dataclass(frozen=True, eq=False)
class Run:
    """
    One model's evaluation on one data set.

    Attributes:
        name (str): label in tables and pictures.
        folder (Path): of the evaluation, with metrics.json and the files beside it.
        run_folder (Path or None): the OUTPUT_DIR of the training; None where results were scored
            without one.
        dataset (str or None): its registered name, such as "kvasir_seg_test".
        metrics (dict): metrics.json; undefined figures are None.
        run (dict or None): run.json; None for runs older than that file.
        config (dict or None): config.yaml.
        labelled (bool): the name was given, and is not the folder's.
    """

    name: str
    folder: Path
    run_folder: Path | None
    dataset: str | None
    metrics: dict
    run: dict | None
    config: dict | None
    labelled: bool = False

    @property
    def task(self):
        """str: "lesions", or "recognition" where whole images were classified."""
        return self.metrics["meta"].get("task", "lesions")

    @property
    def model(self):
        """
        str: such as "IMR-CNN", of a classifier its backbone, such as "ResNet50"; the run's name
        where no run.json tells it.
        """
        if self.task == "recognition" and self.backbone:
            return BACKBONES.get(self.backbone.partition(".")[0], self.backbone)
        return (self.run or {}).get("model") or self.name

    @property
    def backbone(self):
        """str or None: such as "R-50"."""
        return (self.run or {}).get("backbone")

    @property
    def seed(self):
        """int or None:"""
        return (self.run or {}).get("seed")

    @property
    def fold(self):
        """dict[str, int] or None: "index" and "of" where the data set is a fold."""
        return (self.run or {}).get("fold")

    @functools.cached_property
    def gt_path(self):
        """
        Path: the ground truth: where it was when scored, else its place in $IMRCNN_DATASETS.

        Raises:
            FileNotFoundError: it is in neither place.
            ValueError: it is not the file that was scored against.
        """
        meta = self.metrics["meta"]
        places = [Path(meta["gt"])] if meta.get("gt") else []
        places += [root / "annotations" / f"{split}.json" for root, split in self._prepared()]
        found = [place for place in places if place.is_file()]
        if not found:
            tried = ", ".join(map(str, places)) or "no path and no known data set is recorded"
            raise FileNotFoundError(
                f"{self.folder}: its ground truth is not there ({tried}). Put it back, set "
                "IMRCNN_DATASETS to the folder of the prepared data sets, or score the results "
                "anew with tools/evaluate.py."
            )
        recorded = meta.get("gt_sha256")
        if not recorded:
            return found[0]
        for place in found:
            if file_sha256(place) == recorded:
                return place
        raise ValueError(
            f"{self.folder}: {found[0]} is not the ground truth that was scored (its sha256 is not "
            f"{recorded[:12]}...). Evaluate the model again, or put the old file back."
        )

    @functools.cached_property
    def image_root(self):
        """
        Path: the folder that each image's ``file_name`` is relative to.

        Raises:
            FileNotFoundError: it is neither where it was nor in $IMRCNN_DATASETS.
        """
        meta = self.metrics["meta"]
        places = [Path(meta["image_root"])] if meta.get("image_root") else []
        # As a prepared data set has them: beside annotations/.
        places += [Path(meta["gt"]).parent.parent / "images"] if meta.get("gt") else []
        places += [root / "images" for root, _ in self._prepared()]
        for place in places:
            if place.is_dir():
                return place
        raise FileNotFoundError(
            f"{self.folder}: its images are not there ({', '.join(map(str, places)) or 'unknown'})."
            " Set IMRCNN_DATASETS to the folder of the prepared data sets."
        )

    @functools.cached_property
    def results(self):
        """
        LesionResults or RecognitionResults: the recorded predictions, scored again with the
        recorded settings.

        Raises:
            FileNotFoundError: ground truth or detections are gone.
            ValueError: they are not what was scored.
        """
        meta = self.metrics["meta"]
        places = [Path(meta["dt"])] if meta.get("dt") else []
        if self.task == "recognition":
            places.insert(0, self.folder / RECOGNITION_RESULTS)
        elif meta.get("scored", True):  # a folder of masks has no scores, its copy here has
            places.insert(0, self.folder / RESULTS)
        detections = next((place for place in places if place.exists()), None)
        if detections is None:
            raise FileNotFoundError(
                f"{self.folder}: its predictions are not there "
                f"({', '.join(map(str, places)) or 'unknown'}). Evaluate the model again "
                "(tools/train_net.py --eval-only), or its results (tools/evaluate.py)."
            )
        if self.task == "recognition":
            return evaluate_recognition(self.gt_path, detections)
        settings = {key: meta[key] for key in ("tau", "iou_threshold", "iou_type")}
        chosen = self.metrics.get("tau_val")
        if chosen:
            chosen = OperatingPoint(*(chosen[key] for key in ("tau", "rule", "dataset")))
        return evaluate_lesions(self.gt_path, detections, operating_point=chosen, **settings)

    def _prepared(self):
        """[(folder of the prepared data set, split)], by the data set's name; at most one."""
        name, _, split = (self.dataset or "").rpartition("_")
        if not name or split not in SPLITS:
            return []
        return [(Path(os.environ.get("IMRCNN_DATASETS", "datasets")) / name, split)]


def load_run(path, name=None, dataset=None):
    """
    Args:
        path (str or Path): the OUTPUT_DIR of a training, whose evaluation on its test set is
            taken, or the folder of an evaluation. "NAME=PATH" names the run.
        name (str or None): label; the folder's name by default.
        dataset (str or None): which evaluation of an OUTPUT_DIR, where it has several.

    Returns:
        Run:

    Raises:
        FileNotFoundError: no such folder, or no evaluation in it.
        ValueError: several evaluations, or files that cannot be read.
    """
    if isinstance(path, str) and "=" in path and not Path(path).exists():
        label, _, path = path.partition("=")
        name = name or label
    path = Path(path)
    if (path / "inference").is_dir():
        run_folder = path
        config = _read_yaml(path / "config.yaml")
        folder = path / "inference" / _test_set(path, config, dataset)
    elif (path / "metrics.json").is_file():
        folder = path
        parents = path.resolve().parents
        run_folder = parents[1] if parents[0].name == "inference" else None
        config = _read_yaml(run_folder / "config.yaml") if run_folder else None
    else:
        what = "has no evaluation" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{path} {what}: give the OUTPUT_DIR of a training that was evaluated, or a folder "
            "that tools/evaluate.py wrote."
        )
    metrics = _read_json(folder / "metrics.json")
    missing = {"lesion", "image", "meta"} - metrics.keys()
    if missing and not {"recognition", "meta"} <= metrics.keys():
        raise ValueError(f"{folder / 'metrics.json'} lacks {sorted(missing)}: evaluate it again.")
    record = run_folder / "run.json" if run_folder else None
    run = _read_json(record) if record and record.is_file() else None
    if run is not None and not run.get("finished"):
        logger.warning(f"{run_folder} has not finished training: its figures may still change.")
    return Run(
        name=name or (run_folder or folder).resolve().name,
        folder=folder,
        run_folder=run_folder,
        dataset=metrics["meta"].get("dataset"),
        metrics=metrics,
        run=run,
        config=config,
        labelled=name is not None,
    )


def _test_set(path, config, dataset):
    """The name of the evaluation under inference/ that is meant."""
    names = sorted(file.parent.name for file in (path / "inference").glob("*/metrics.json"))
    listed = ", ".join(names) or "none"
    if dataset is not None:
        if dataset not in names:
            raise FileNotFoundError(
                f"{path} has no evaluation on {dataset}; it has {listed}. Make it with "
                "tools/train_net.py --eval-only."
            )
        return dataset
    test = ((config or {}).get("DATASETS") or {}).get("TEST")
    chosen = [name for name in names if (name in test if test else name.endswith("_test"))]
    if not chosen and len(names) == 1 and not test:
        return names[0]
    if not chosen:
        raise FileNotFoundError(
            f"{path} was not evaluated on its test set{f' {list(test)}' if test else ''}; it has "
            f"evaluations on {listed}. Let the training finish, or run tools/train_net.py "
            "--eval-only; another data set's evaluation is given by its own folder."
        )
    if len(chosen) > 1:
        raise ValueError(
            f"{path} was evaluated on {', '.join(chosen)}: give the folder of one of them, such "
            f"as {path / 'inference' / chosen[0]}."
        )
    return chosen[0]


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of an object.")
    return content


def _read_yaml(path):
    """A config.yaml as a dict; None where it is absent or no config."""
    try:
        return read_yaml(path)
    except (FileNotFoundError, ValueError) as error:
        logger.info(f"{path} is not used: {error}")
        return None
