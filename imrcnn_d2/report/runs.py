"""A run as reports and comparisons see it: an evaluation, its model and its data."""

import functools
import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

from imrcnn_d2.data.catalog import SHORT_NAMES, prepared_folder
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.engine.config import read_yaml
from imrcnn_d2.evaluation import Bootstrap, ClassificationResults, LesionResults, OperatingPoint
from imrcnn_d2.evaluation.output import (
    RESULTS,
    TEXT,
    check_fields,
    read_coco_records,
    read_metrics,
    read_run_record,
)
from imrcnn_d2.evaluation.statistics import add_intervals
from imrcnn_d2.task import CLASSIFICATION, Task
from imrcnn_d2.utils.files import file_sha256, strict_json

logger = logging.getLogger(__name__)


MOST_RESAMPLES = 10_000  # of a report, whatever a run records: they take its time
# As their publications write them; classifiers are named by their backbones.
BACKBONES = {"vgg19": "VGG19", "resnet50": "ResNet50", "inception_v3": "Inception-V3"}
# What is read of a config.yaml.
CONFIG = {
    "OUTPUT_DIR": TEXT,
    "DATASETS": {"TRAIN": [TEXT], "TEST": [TEXT]},
    "MODEL": {"WEIGHTS": TEXT, "TIMM": {"WEIGHTS": TEXT}},
}


@dataclass(frozen=True, eq=False)
class Run:
    """One model's evaluation on one data set."""

    name: str  # label in tables and plots
    folder: Path  # of the evaluation, with metrics.json and the files next to it
    run_folder: Path | None  # OUTPUT_DIR; None where results were scored without a training
    dataset: str | None  # registered name, such as "kvasir_seg_test"
    recorded: dict  # metrics.json; its metrics are never shown, see `metrics`
    record: dict  # run.json; empty for runs older than that file
    config: dict  # config.yaml; empty without one that can be read
    labelled: bool = False  # the name was given, and is not the folder's
    images: Path | None = None  # folder of the images, where the user named one

    @property
    def path(self) -> Path:
        """The OUTPUT_DIR of the training, else the folder of the evaluation."""
        return self.run_folder or self.folder

    @property
    def meta(self) -> dict:
        """Settings and sources, as metrics.json records them."""
        return self.recorded["meta"]

    @property
    def task(self) -> Task:
        return Task.named(self.meta.get("task"))

    @property
    def model(self) -> str:
        """Such as "IMR-CNN", of a classifier its backbone, such as "ResNet50"; the run's name
        without a run.json.
        """
        if self.task is CLASSIFICATION and self.backbone:
            return BACKBONES.get(self.backbone.partition(".")[0], self.backbone)
        return self.record.get("model") or self.name

    @property
    def predictions(self) -> dict:
        """What a predictions.json that was evaluated says of its model; empty for others."""
        return self.meta.get("predictions") or {}

    @property
    def architecture(self) -> str | None:
        """Such as "IMR-CNN", from run.json, the evaluation or the evaluated predictions."""
        return self._described("model")

    @property
    def backbone(self) -> str | None:
        """Such as "R-50", from where `architecture` is."""
        return self._described("backbone")

    @property
    def weights_sha256(self) -> str | None:
        return self.meta.get("checkpoint_sha256") or self.predictions.get("weights_sha256")

    def _described(self, key):
        return self.record.get(key) or self.meta.get(key) or self.predictions.get(key)

    @property
    def maps_scores(self) -> bool:
        """Its scores are mapped to probabilities; the threshold is of these."""
        return bool(self.meta.get("score_map") or self.recorded.get("calibration_raw"))

    @property
    def has_scores(self) -> bool:
        """False for a folder of masks, of which each is a detection."""
        return self.meta.get("scored") is not False

    @property
    def seed(self) -> int | None:
        return self.record.get("seed")

    @property
    def fold(self) -> dict[str, int] | None:
        """ "index" and "of" where the data set is a fold."""
        return self.record.get("fold")

    @functools.cached_property
    def settings(self) -> dict:
        """config.yaml without nesting, such as {"MODEL.MASK_ON": True}."""
        return _flat(self.config)

    @functools.cached_property
    def gt_path(self) -> Path:
        """The ground truth: where it was when scored, else its place among the prepared data sets.

        Raises:
            FileNotFoundError: it is in neither place.
            ValueError: it is not the file that was scored, or neither recorded nor prepared.
        """
        return self._ground_truths[0]

    @property
    def test_set(self) -> str:
        """The registered name, else the ground truth, with the folder of a data set that holds it:
        such as "polyps/annotations/test.json".
        """
        gt = self.gt_path
        place = "/".join(gt.parts[-3:]) if gt.parent.name == "annotations" else gt.name
        return self.dataset or place

    @functools.cached_property
    def source(self) -> str | None:
        """The public data set that the ground truth is part of, as its annotations record it."""
        return (read_coco_records(self.gt_path).get("info") or {}).get("source")

    @functools.cached_property
    def _ground_truths(self):
        """The places that hold the ground truth, at least one."""
        recorded, sha256 = self.meta.get("gt"), self.meta.get("gt_sha256")
        places = [Path(recorded)] if recorded else []
        name, _, split = (self.dataset or "").rpartition("_")
        if name and split in SPLITS and name == Path(name).name:
            places.append(_data_sets(name) / name / "annotations" / f"{split}.json")
        existing = [place for place in places if place.is_file()]
        if not existing:
            tried = ", ".join(map(str, places)) or "no path and no known data set is recorded"
            raise FileNotFoundError(
                f"{self.folder}: its ground truth does not exist ({tried}). Put it back, set "
                "IMRCNN_DATASETS to the folder of the prepared data sets, or evaluate again."
            )
        if sha256:
            accepted = [place for place in existing if file_sha256(place) == sha256]
            fault = f"is not the ground truth that was scored (sha256 {sha256[:12]}...)"
        else:  # a run from elsewhere could name any file: its content would be in the report
            accepted = [place for place in existing if self._is_prepared(place)]
            fault = "lies outside IMRCNN_DATASETS, and the sha256 of what was scored is unknown"
        if not accepted:
            raise ValueError(f"{self.folder}: {existing[0]} {fault}. Evaluate the model again.")
        return accepted

    def _is_prepared(self, path):
        name = (self.dataset or "").rpartition("_")[0]
        return _data_sets(name).resolve() in path.resolve().parents

    @functools.cached_property
    def image_root(self) -> Path:
        """The folder that each image's ``file_name`` is relative to: the one that the user named,
        else images/ of the data set that the ground truth is part of. A folder that the run itself
        names is not used: a report holds the images.

        Raises:
            FileNotFoundError: it does not exist.
        """
        if self.images is not None:
            return self.images
        for path in self._ground_truths:
            root = path.resolve().parents[1] / "images"
            # Only in the user's own data sets may a link lead elsewhere.
            if root.is_dir() and (self._is_prepared(path) or root == root.resolve()):
                return root
        raise FileNotFoundError(
            f"{self.folder}: its images do not exist (images/ of the data set of {self.gt_path}). "
            "Name their folder (imrcnn report --images), or set IMRCNN_DATASETS."
        )

    @functools.cached_property
    def results(self) -> LesionResults | ClassificationResults:
        """The recorded predictions, scored again with the recorded settings.

        Raises:
            FileNotFoundError: ground truth or predictions are gone.
            ValueError: they are not the files that were scored.
        """
        places = [Path(self.meta["dt"])] if self.meta.get("dt") else []
        # A folder of masks has no scores; the list of results that was written for it has.
        if self.has_scores or self.task.predictions_file != RESULTS:
            places.insert(0, self.folder / self.task.predictions_file)
        predictions = next((path for path in places if path.is_file() or path.is_dir()), None)
        if predictions is None:
            raise FileNotFoundError(
                f"{self.folder}: its predictions do not exist "
                f"({', '.join(map(str, places)) or 'unknown'}). Evaluate the model again."
            )
        return self.task.score(self.gt_path, predictions, self.recorded)

    @property
    def bootstrap(self) -> Bootstrap | None:
        """The recorded one; None where the evaluation had none."""
        recorded = self.meta.get("bootstrap")
        if not recorded:
            return None
        resamples = min(recorded["resamples"], MOST_RESAMPLES)
        return Bootstrap(resamples, recorded["seed"], bool(recorded.get("all_coco")))

    @property
    def resampled(self) -> dict:
        """What parts of `results` are evaluated with: ``operating_point`` and ``bootstrap``."""
        point = OperatingPoint.of_results(self.results.tau_val)
        return {"operating_point": point, "bootstrap": self.bootstrap}

    @functools.cached_property
    def metrics(self) -> dict:
        """As metrics.json, but computed again from the predictions, with intervals by the recorded
        bootstrap; undefined metrics are None. ``meta`` also has what is recorded.
        """
        bootstrap, settings, results = self.bootstrap, None, self.results
        if bootstrap:
            settings = {**asdict(bootstrap), "unit": results.metrics.units.kind}
        document = json.loads(strict_json(add_intervals(results, bootstrap).document()))
        return {**document, "meta": {**self.meta, **results.meta, "bootstrap": settings}}

    @functools.cached_property
    def remarks(self) -> list[str]:
        """A remark where metrics.json holds other values than the predictions give."""
        differing = [
            f"{group}/{name}"
            for group, metrics in self.results.groups().items()
            for name, value in (self.recorded.get(group) or {}).items()
            if name in metrics and not _agree(metrics[name], value)
        ]
        if not differing:
            return []
        remark = f"{self.folder / 'metrics.json'} holds other metrics than its detections give now "
        remark += f"({', '.join(differing)}): those here were scored again; evaluate it again."
        logger.warning(remark)
        return [remark]


def _data_sets(name):
    """The folder of the user's prepared data sets, among them ``name``."""
    return prepared_folder(name if name in SHORT_NAMES else SHORT_NAMES[0]).parent


def _flat(config, prefix=""):
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
    """Read a run.

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
        run_folder, config = path, _read_config(path)
        folder = path / "inference" / _test_set(path, _flat(config).get("DATASETS.TEST"), dataset)
    elif (path / "metrics.json").is_file():
        folder, parents = path, path.resolve().parents
        run_folder = parents[1] if parents[0].name == "inference" else None
        config = _read_config(run_folder) if run_folder else {}
    else:
        fault = "has no evaluation" if path.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"{path} {fault}: give the OUTPUT_DIR of a training that was evaluated, or a folder "
            "that imrcnn evaluate wrote."
        )
    recorded, record = read_metrics(folder / "metrics.json"), {}
    if run_folder and (run_folder / "run.json").is_file():
        record = read_run_record(run_folder / "run.json")
        if not _is_trained_there(recorded["meta"].get("checkpoint"), config.get("OUTPUT_DIR")):
            weights = recorded["meta"]["checkpoint"]
            logger.warning(
                f"{folder} is an evaluation of {weights}, not of this run.json's weights."
            )
            record = {}
        elif not record.get("finished"):
            logger.warning(f"{run_folder} has not finished training: its metrics may still change.")
    label = name or (run_folder or folder).resolve().name
    data_set, labelled = recorded["meta"].get("dataset"), name is not None
    images = None if images is None else Path(images)
    return Run(label, folder, run_folder, data_set, recorded, record, config, labelled, images)


def _is_trained_there(checkpoint, output_dir):
    """Whether evaluated weights lie in the OUTPUT_DIR of the config, as far as both are recorded:
    `train --eval-only` may have put the evaluation of others into the folder of a training.
    """
    if not checkpoint or not output_dir:
        return True
    folders = PurePath(checkpoint).parent.parts, PurePath(os.path.normpath(output_dir)).parts
    # The configured one may be relative, even to a folder above.
    pairs = zip(*map(reversed, folders), strict=False)
    return all(a == b for a, b in pairs if b != "..")


def _test_set(path, test, dataset):
    """The name of the requested evaluation under inference/, else of one of the sets ``test``."""
    names = sorted(file.parent.name for file in (path / "inference").glob("*/metrics.json"))
    requested = [dataset] if dataset is not None else test
    if requested:
        chosen = [name for name in names if name in requested]
    else:
        tests = [name for name in names if name.endswith("_test")]
        chosen = tests or (names if len(names) == 1 else [])
    if not chosen:
        raise FileNotFoundError(
            f"{path} was not evaluated on {', '.join(requested or ['a test set'])}, only on "
            f"{', '.join(names) or 'none'}. Run imrcnn train --eval-only, or give the folder "
            "of an evaluation."
        )
    if len(chosen) > 1:
        raise ValueError(
            f"{path} was evaluated on {', '.join(chosen)}: give the folder of one of them, such "
            f"as {path / 'inference' / chosen[0]}."
        )
    return chosen[0]


def _read_config(folder):
    """config.yaml; empty where it is absent, or is not what Detectron2 writes."""
    path = folder / "config.yaml"
    try:
        content = read_yaml(path)
        json.dumps(content, default=str, ensure_ascii=False).encode()  # text that can be shown
        check_fields(path, content, CONFIG)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning(f"{path} is not used: {error}")
        return {}
    return content
