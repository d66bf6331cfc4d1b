"""Which runs belong together: seeds of a model, folds of a cross-validation, models on a split."""

import logging
from dataclasses import dataclass

from ..evaluation.files import file_sha256
from ..evaluation.run_files import read_coco_records

__all__ = ["Gathered", "flat_config", "gather", "training_images"]

logger = logging.getLogger(__name__)

# Config keys that may differ between the runs of one model.
OF_A_RUN = ("SEED", "OUTPUT_DIR", "DATASETS", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS")
SETTINGS = ("tau", "iou_threshold", "iou_type")


@dataclass(frozen=True, eq=False)
class Gathered:
    """
    Attributes:
        split (dict[str, list[Run]]): runs on one test set by model, which differ by seed.
        folds (dict[str, list[list[Run]]]): runs of a cross-validation by model: for each fold, by
            its index, the runs that differ by seed.
        remarks (list[str]): what a reader of the comparison must know.
    """

    split: dict
    folds: dict
    remarks: list


def gather(runs):
    """
    Group runs by the label given, else by model and backbone, and check that they can be compared.

    Args:
        runs (list[Run]):

    Returns:
        Gathered:

    Raises:
        ValueError: different test sets or settings; a seed or a fold given twice, a fold missing;
            one label for different models. Both runs are named.
    """
    models = _models(runs)
    split, folds = {}, {}
    for label, own in models.items():
        single = [run for run in own if run.fold is None]
        if single:
            split[label] = _seeds(label, single)
        if len(single) < len(own):
            folds[label] = _folds(label, [run for run in own if run.fold is not None])
    _check_tasks(runs)
    _check_settings(runs)
    _check_test_sets(run for own in split.values() for run in own)
    _check_folds(folds)
    remarks = [remark for label, own in models.items() for remark in _config_remarks(label, own)]
    return Gathered(split, folds, remarks)


def training_images(run):
    """
    Args:
        run (Run):

    Returns:
        int or None: images that it was trained on, those for validation left out, from run.json or
        else from the train.json beside the test set. None where neither tells.
    """
    facts = list(((run.run or {}).get("datasets") or {}).items())
    if facts:
        names = ((run.config or {}).get("DATASETS") or {}).get("TRAIN") or [facts[0][0]]
        return sum(about["images"] for name, about in facts if name in names) or None
    beside = run.gt_path.with_name("train.json")
    if beside.is_file() and beside != run.gt_path:
        return len(read_coco_records(beside)["images"]) or None
    return None


def _where(run):
    return str(run.run_folder or run.folder)


def _models(runs):
    """{label: runs}, in the order given."""
    backbones = {}
    for run in runs:
        backbones.setdefault(run.model, {})[run.backbone] = None
    groups, keys = {}, {}
    for run in runs:
        key = run.name if run.labelled else (run.model, run.backbone)
        several = run.backbone and len(backbones[run.model]) > 1
        label = (
            run.name if run.labelled else f"{run.model} {run.backbone}" if several else run.model
        )
        if keys.setdefault(label, key) != key:
            raise ValueError(
                f"{_where(groups[label][0])} and {_where(run)} would both be called {label!r}: "
                "give one of them another NAME=PATH."
            )
        groups.setdefault(label, []).append(run)
    return groups


def _seeds(label, runs):
    """The runs of one model on one test set, by seed."""
    by_seed = {}
    for run in runs:
        if run.seed in by_seed:
            of_fold = f" of fold {run.fold['index']}" if run.fold else ""
            seed = "no known seed" if run.seed is None else f"seed {run.seed}"
            raise ValueError(
                f"{_where(by_seed[run.seed])} and {_where(run)} are both {label}{of_fold} with "
                f"{seed}: give each once, or different models different names (NAME=PATH)."
            )
        by_seed[run.seed] = run
    return [by_seed[seed] for seed in sorted(by_seed, key=lambda seed: (seed is None, seed or 0))]


def _folds(label, runs):
    """[runs that differ by seed] of each fold."""
    number = runs[0].fold["of"]
    by_index = {}
    for run in runs:
        if run.fold["of"] != number:
            raise ValueError(
                f"{_where(runs[0])} is one of {number} folds, {_where(run)} one of "
                f"{run.fold['of']}: compare runs of one cross-validation."
            )
        by_index.setdefault(run.fold["index"], []).append(run)
    missing = sorted(set(range(number)) - by_index.keys())
    if missing:
        raise ValueError(
            f"{label} lacks fold {', '.join(map(str, missing))} of {number} (there are "
            f"{', '.join(map(str, sorted(by_index)))}): train it, or leave {label} out."
        )
    return [_seeds(label, by_index[index]) for index in sorted(by_index)]


def _check_tasks(runs):
    for run in runs[1:]:
        if run.task != runs[0].task:
            raise ValueError(
                f"{_where(runs[0])} is of {runs[0].task}, {_where(run)} of {run.task}: these have "
                "no figures in common."
            )


def _check_settings(runs):
    for run in runs[1:]:
        for key in SETTINGS:
            ours, theirs = (one.meta.get(key) for one in (runs[0], run))
            if ours != theirs:
                raise ValueError(
                    f"{_where(runs[0])} was evaluated with {key} {ours}, {_where(run)} with "
                    f"{theirs}: evaluate one of them again."
                )


def _sha256(run):
    return run.meta.get("gt_sha256") or file_sha256(run.gt_path)


def _check_test_sets(runs):
    first = None
    for run in runs:
        first = first or run
        if _sha256(first) != _sha256(run):
            raise ValueError(
                f"{_where(first)} ({first.dataset}, {first.gt_path}) and {_where(run)} "
                f"({run.dataset}, {run.gt_path}) were evaluated on different test sets: their "
                "figures cannot be compared."
            )


def _check_folds(folds):
    """Every model has the same folds, and no image is tested in two of them."""
    labels = list(folds)
    for label in labels[1:]:
        ours, theirs = len(folds[labels[0]]), len(folds[label])
        if ours != theirs:
            raise ValueError(
                f"{labels[0]} has {ours} folds, {label} has {theirs}: compare models on the same "
                "folds."
            )
    tested = {}
    for index, runs in enumerate(zip(*folds.values(), strict=True)):
        _check_test_sets(run for seeds in runs for run in seeds)
        run = runs[0][0]
        for image in run.results.ground_truth.images:
            name = image.get("file_name", image["id"])
            if tested.setdefault(name, index) != index:
                raise ValueError(
                    f"{name} is tested in fold {tested[name]} and again in fold {index} "
                    f"({_where(run)}): the folds are not of one cross-validation, or one is "
                    "given twice."
                )


def _config_remarks(label, runs):
    """[what differs between the configs of the runs of one model]."""
    flat = [flat_config(run.config) for run in runs if run.config]
    keys = dict.fromkeys(key for config in flat for key in config)
    differing = [
        key
        for key in keys
        if not any(key == of or key.startswith(f"{of}.") for of in OF_A_RUN)
        and any(config.get(key) != flat[0].get(key) for config in flat)
    ]
    if not differing:
        return []
    remark = (
        f"The runs of {label} differ in more than seed and fold: {', '.join(differing)}. Name "
        "them apart (NAME=PATH) unless that is meant."
    )
    logger.warning(remark)
    return [remark]


def flat_config(config, prefix=""):
    """dict: of nested dicts one, such as {"MODEL.MASK_ON": value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flat_config(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
