"""What was run, as rows of a table: the models, their training and their evaluation."""

import yaml

from .compare_runs import flat_config

__all__ = ["UNKNOWN", "config_differences", "configs", "facts"]

UNKNOWN = "not recorded"
# These differ between any two runs.
PLACES = ("OUTPUT_DIR", "MODEL.WEIGHTS")


def facts(runs, settings):
    """
    Args:
        runs (list[Run]):
        settings (dict): of the split, from :func:`imrcnn_d2.report.cohort.cohort`.

    Returns:
        list[list[str]]: label, and a text for each run. What is not known is "not recorded".
    """
    columns = [_facts_of(run, settings) for run in runs]
    return [[label, *(column[label] for column in columns)] for label in columns[0]]


def _facts_of(run, settings):
    record, meta = run.run or {}, run.metrics["meta"]
    git = record.get("git") or {}
    revision = git.get("revision")
    if revision and git.get("dirty"):
        revision += ", with uncommitted changes"
    fold, chosen, bootstrap = run.fold, run.metrics.get("tau_val"), meta.get("bootstrap")
    versions = meta.get("versions") or record.get("versions") or {}
    texts = {
        "Model": record.get("model") or _of_config(run),
        "Backbone": run.backbone or _backbone(run),
        "Seed": run.seed if run.seed is not None else (run.config or {}).get("SEED"),
        "Fold": f"{fold['index']} of {fold['of']}" if fold else "none",
        "Iterations": record.get("iterations") or _max_iter(run),
        "Training": _training(record),
        "Device": record.get("device"),
        "Command": record.get("command"),
        "Code revision": revision,
        "Config, sha256": _short(record.get("config_sha256")),
        "Weights, sha256": _short(meta.get("checkpoint_sha256")),
        "Data set": meta.get("dataset"),
        "Ground truth, sha256": _short(meta.get("gt_sha256")),
        "Split, sha256": _short(record.get("splits_sha256") or settings.get("sha256")),
        **(_steps(record) if run.task == "recognition" else _thresholds(meta, chosen)),
        "Intervals": (
            f"{bootstrap['resamples']:,} resamples of {bootstrap['unit']}s, seed "
            f"{bootstrap['seed']}"
            if bootstrap
            else "none"
        ),
        "Versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
    }
    return {label: UNKNOWN if text in (None, "") else str(text) for label, text in texts.items()}


def _steps(record):
    """How a classifier was trained."""
    size = (record.get("input") or {}).get("size")
    steps = [
        f"{phase['name']}: {phase['trainable']} for {phase['iterations']} iterations at a rate of "
        f"{phase['lr']:g}"
        for phase in record.get("phases") or ()
    ]
    return {"Images as": size and f"{size} × {size} pixels", "Steps": "; ".join(steps)}


def _thresholds(meta, chosen):
    """What decides about detections."""
    point = None
    if chosen:
        point = f"{chosen['tau']:.3g} ({chosen.get('rule')}, on {chosen.get('dataset')})"
    return {
        "Score threshold τ": f"{meta['tau']:g}",
        "τ chosen on validation": point,
        "Hit": f"IoU ≥ {meta['iou_threshold']:g} of {_regions(meta)}",
    }


def _of_config(run):
    model = (run.config or {}).get("MODEL") or {}
    return model.get("META_ARCHITECTURE")


def _backbone(run):
    model = (run.config or {}).get("MODEL") or {}
    return (model.get("BACKBONE") or {}).get("NAME")


def _max_iter(run):
    return ((run.config or {}).get("SOLVER") or {}).get("MAX_ITER")


def _training(record):
    if not record.get("finished"):
        return f"started {record['started']}, not finished" if record.get("started") else None
    hours = record.get("hours")
    return ("" if hours is None else f"{hours:.2f} h, ") + f"finished {record['finished']}"


def _short(sha256):
    return sha256 and f"{sha256[:16]}…"


def _regions(meta):
    return "masks" if meta["iou_type"] == "segm" else "boxes"


def config_differences(runs):
    """list[list[str]]: key and its values, where not all configurations agree."""
    if any(run.config is None for run in runs):
        return []
    flat = [flat_config(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config if key not in PLACES)
    rows = [[key, *(str(config.get(key, "not set")) for config in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def configs(runs):
    """list[tuple[str, str]]: each run's name and its whole configuration, "" where unknown."""
    return [(run.name, yaml.safe_dump(run.config) if run.config else "") for run in runs]
