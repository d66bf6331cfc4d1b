"""A run as reports and comparisons see it: an evaluation, its model and its data."""

import functools
import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from imrcnn_d2.engine.config import read_yaml
from imrcnn_d2.evaluation import (
    Bootstrap,
    ClassificationResults,
    LesionResults,
    evaluate_classification,
    evaluate_lesions,
)
from imrcnn_d2.evaluation.detection.results import OperatingPoint
from imrcnn_d2.evaluation.output import (
    CLASSIFICATION_RESULTS,
    RESULTS,
    TEXT,
    WHOLE,
    check_fields,
    read_metrics,
    read_run_record,
)
from imrcnn_d2.evaluation.statistics import add_intervals
from imrcnn_d2.utils.files import file_sha256, strict_json

__all__ = ["Run", "load_run"]

logger = logging.getLogger(__name__)


MOST_RESAMPLES = 10_000  # of a report, whatever a run records: they take its time
SPLITS = ("train", "val", "test")
# As their publications write them; classifiers are named by their backbones.
BACKBONES = {"vgg19": "VGG19", "resnet50": "ResNet50", "inception_v3": "Inception-V3"}
# What is read of a config.yaml.
CONFIG = {
    "DATASETS": {"TRAIN": [TEXT], "TEST": [TEXT]},
    "MODEL": {
        **dict.fromkeys(("META_ARCHITECTURE", "WEIGHTS"), TEXT),
        "BACKBONE": {"NAME": TEXT},
        "TIMM": {"WEIGHTS": TEXT},
    },
    "SOLVER": {"MAX_ITER": WHOLE},
}


@dataclass(frozen=True, eq=False)
class Run:
    """
    One model's evaluation on one data set.

    Attributes:
        name: label in tables and plots.
        folder: of the evaluation, with metrics.json and the files next to it.
        run_folder: the OUTPUT_DIR of the training; None where results were scored without one.
        dataset: its registered name, such as "kvasir_seg_test".
        recorded: metrics.json; its metrics are never shown, see ``metrics``.
        run: run.json; None for runs older than that file.
        config: config.yaml.
        labelled: the name was given, and is not the folder's.
        images: folder of the images, where the user named one.
    """

    name: str
    folder: Path
    run_folder: Path | None
    dataset: str | None
    recorded: dict
    run: dict | None
    config: dict | None
    labelled: bool = False
    images: Path | None = None

    @property
    def meta(self) -> dict:
        """Settings and sources, as metrics.json records them."""
        return self.recorded["meta"]

    @property
    def task(self) -> str:
        """ "lesions", or "recognition" where whole images were classified."""
        return self.meta.get("task") or "lesions"

    @property
    def model(self) -> str:
        """
        Such as "IMR-CNN", of a classifier its backbone, such as "ResNet50"; the run's name without
        a run.json.
        """
        if self.task == "recognition" and self.backbone:
            return BACKBONES.get(self.backbone.partition(".")[0], self.backbone)
        return (self.run or {}).get("model") or self.name

    @property
    def backbone(self) -> str | None:
        """Such as "R-50"."""
        return (self.run or {}).get("backbone")

    @property
    def seed(self) -> int | None:
        return (self.run or {}).get("seed")

    @property
    def fold(self) -> dict[str, int] | None:
        """ "index" and "of" where the data set is a fold."""
        return (self.run or {}).get("fold")

    @functools.cached_property
    def gt_path(self) -> Path:
        """
        The ground truth: where it was when scored, else its place in $IMRCNN_DATASETS.

        Raises:
            FileNotFoundError: it is in neither place.
            ValueError: it is not the file that was scored against, or lies outside
                $IMRCNN_DATASETS and which file was scored is not recorded.
        """
        return self._truths[0]

    @functools.cached_property
    def _truths(self):
        """list[Path]: the places that hold the ground truth, at least one."""
        recorded, sha256 = self.meta.get("gt"), self.meta.get("gt_sha256")
        places = [Path(recorded)] if recorded else []
        places += [root / "annotations" / f"{split}.json" for root, split in self._prepared()]
        existing = [place for place in places if place.is_file()]
        if not existing:
            tried = ", ".join(map(str, places)) or "no path and no known data set is recorded"
            raise FileNotFoundError(
                f"{self.folder}: its ground truth does not exist ({tried}). Put it back, set "
                "IMRCNN_DATASETS to the folder of the prepared data sets, or score the results "
                "anew with tools/evaluate.py."
            )
        if not sha256:
            # A run from elsewhere could name any file: its content would be in the report.
            if trusted := [place for place in existing if _is_own(place)]:
                return trusted
            raise ValueError(
                f"{self.folder}: it does not record the sha256 of its ground truth {existing[0]}, "
                "which lies outside IMRCNN_DATASETS. Score the results anew with tools/evaluate.py."
            )
        same = [place for place in existing if file_sha256(place) == sha256]
        if not same:
            raise ValueError(
                f"{self.folder}: {existing[0]} is not the ground truth that was scored (its sha256 "
                f"is not {sha256[:12]}...). Evaluate the model again, or put the old file back."
            )
        return same

    @functools.cached_property
    def image_root(self) -> Path:
        """
        The folder that each image's ``file_name`` is relative to: the one that the user named,
        else images/ of the data set that the ground truth is part of. A folder that the run itself
        names is not used: a report holds the images.

        Raises:
            FileNotFoundError: it does not exist.
        """
        if self.images is not None:
            return self.images
        for truth in self._truths:
            root = truth.resolve().parents[1] / "images"
            # A link would lead out of the data set, which only the user's own may do.
            if root.is_dir() and (_is_own(truth) or root == root.resolve()):
                return root
        raise FileNotFoundError(
            f"{self.folder}: its images do not exist (images/ of the data set of {self.gt_path}). "
            "Name their folder (tools/report.py --images), or set IMRCNN_DATASETS to the folder of "
            "the prepared data sets."
        )

    @functools.cached_property
    def results(self) -> LesionResults | ClassificationResults:
        """
        The recorded predictions, scored again with the recorded settings.

        Raises:
            FileNotFoundError: ground truth or detections are gone.
            ValueError: they are not the files that were scored.
        """
        meta = self.meta
        places = [Path(meta["dt"])] if meta.get("dt") else []
        if self.task == "recognition":
            places.insert(0, self.folder / CLASSIFICATION_RESULTS)
        elif meta.get("scored") is not False:  # a folder of masks has no scores, its copy here has
            places.insert(0, self.folder / RESULTS)
        detections = next((p for p in places if p.is_file() or p.is_dir()), None)
        if detections is None:
            raise FileNotFoundError(
                f"{self.folder}: its predictions do not exist "
                f"({', '.join(map(str, places)) or 'unknown'}). Evaluate the model again "
                "(tools/train_net.py --eval-only), or its results (tools/evaluate.py)."
            )
        if self.task == "recognition":
            return evaluate_classification(self.gt_path, detections)
        settings = {key: meta[key] for key in ("tau", "iou_threshold", "iou_type")}
        chosen = self.recorded.get("tau_val")
        if chosen:
            chosen = OperatingPoint(chosen["tau"], chosen["rule"], chosen.get("dataset"))
        return evaluate_lesions(self.gt_path, detections, operating_point=chosen, **settings)

    @functools.cached_property
    def metrics(self) -> dict:
        """
        As metrics.json, but computed again from the predictions, with intervals by the recorded
        bootstrap; undefined metrics are None. ``meta`` also has what is recorded.

        Raises:
            FileNotFoundError, ValueError: as of ``results``.
        """
        bootstrap = self.meta.get("bootstrap")
        if bootstrap:
            all_coco = bool(bootstrap.get("all_coco"))
            resamples = min(bootstrap["resamples"], MOST_RESAMPLES)
            bootstrap = Bootstrap(resamples, bootstrap["seed"], all_coco)
        results, unit = self.results, self.results.metrics.unit
        document = add_intervals(results, bootstrap or None).document()
        document = json.loads(strict_json(document))
        settings = {**asdict(bootstrap), "unit": unit} if bootstrap else None
        return {**document, "meta": {**self.meta, **results.meta, "bootstrap": settings}}

    @functools.cached_property
    def remarks(self) -> list[str]:
        """A remark where metrics.json holds other values than the predictions give."""
        groups = self.results.groups()
        differing = [
            f"{group}/{name}"
            for group in groups
            for name, value in (self.recorded.get(group) or {}).items()
            if name in groups[group] and not _agree(groups[group][name], value)
        ]
        if not differing:
            return []
        remark = (
            f"{self.folder / 'metrics.json'} holds other metrics than its detections give now "
            f"({', '.join(differing)}): those here were scored again; evaluate it again to renew "
            "it."
        )
        logger.warning(remark)
        return [remark]

    def _prepared(self):
        """[(folder of the prepared data set, split)], by the data set's name; at most one."""
        name, _, split = (self.dataset or "").rpartition("_")
        if not name or split not in SPLITS or name != Path(name).name:
            return []
        return [(_datasets() / name, split)]


def _datasets() -> Path:
    """The user's own data sets."""
    return Path(os.environ.get("IMRCNN_DATASETS", "datasets"))


def _is_own(path) -> bool:
    return _datasets().resolve() in path.resolve().parents


def _agree(value, recorded):
    if recorded is None or isinstance(recorded, list):
        return recorded is None and math.isnan(value)
    return math.isclose(value, recorded, abs_tol=1e-6)


def load_run(
    path: str | Path,
    name: str | None = None,
    dataset: str | None = None,
    images: str | Path | None = None,
) -> Run:
    """
    Read a run.

    Args:
        path: the OUTPUT_DIR of a training, whose evaluation on its test set is taken, or the folder
            of an evaluation. "NAME=PATH" names the run.
        name: label; the folder's name by default.
        dataset: which evaluation of an OUTPUT_DIR, where it has several.
        images: folder of the images that were evaluated; None for images/ of the data set.

    Raises:
        FileNotFoundError: no such folder, or no evaluation in it, or no folder ``images``.
        ValueError: several evaluations.
        BadInputError: files that cannot be read, or whose content is invalid.
    """
    if isinstance(path, str) and "=" in path and not Path(path).exists():
        label, _, path = path.partition("=")
        name = name or label
    path = Path(path)
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder of images.")
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
        fault = "has no evaluation" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{path} {fault}: give the OUTPUT_DIR of a training that was evaluated, or a folder "
            "that tools/evaluate.py wrote."
        )
    recorded = read_metrics(folder / "metrics.json")
    record = run_folder / "run.json" if run_folder else None
    run = read_run_record(record) if record and record.is_file() else None
    if run is not None and not run.get("finished"):
        logger.warning(f"{run_folder} has not finished training: its metrics may still change.")
    return Run(
        name=name or (run_folder or folder).resolve().name,
        folder=folder,
        run_folder=run_folder,
        dataset=recorded["meta"].get("dataset"),
        recorded=recorded,
        run=run,
        config=config,
        labelled=name is not None,
        images=None if images is None else Path(images),
    )


def _test_set(path, config, dataset):
    """The name of the requested evaluation under inference/."""
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


def _read_yaml(path):
    """A config.yaml as a dict; None where it is absent, or is not what Detectron2 writes."""
    try:
        content = read_yaml(path)
        json.dumps(content, default=str, ensure_ascii=False).encode()  # text that can be shown
        check_fields(path, content, CONFIG)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning(f"{path} is not used: {error}")
        return None
    return content
