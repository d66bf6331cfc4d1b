"""What a run's files say, checked: anybody may have written them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..data.json_files import read_json
from ..data.rejects import BadInputError

__all__ = [
    "check_fields",
    "read_coco_records",
    "read_metrics",
    "read_robustness",
    "read_run_record",
    "read_split_settings",
]


class Kind(NamedTuple):
    """
    What a value must be; null and nothing at all are admitted too, unless it is needed.

    Attributes:
        name (str): of such values.
        admits (callable): of a value, whether it is one.
        needed (bool): it must be there.
    """

    name: str
    admits: Callable
    needed: bool = False

    def always(self):
        """Kind: the same, needed."""
        return self._replace(needed=True)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _range(low, high):
    return Kind(
        f"a whole number from {low:,} to {high:,}", lambda v: _is_whole(v) and low <= v <= high
    )


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a finite number", _is_number)
WHOLE = Kind("a whole number", _is_whole)
COUNT = _range(0, 10**12)
LIST = Kind("a list", lambda value: isinstance(value, list))
ID = Kind("a number or a text", lambda value: isinstance(value, str) or _is_number(value))
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
OVERLAP = Kind("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
REGIONS = Kind("'segm' or 'bbox'", lambda value: value in ("segm", "bbox"))
TASK = Kind("'lesions' or 'recognition'", lambda value: value in ("lesions", "recognition"))
NAME = Kind("a text that is not empty", lambda value: isinstance(value, str) and value.strip())
FIGURE = Kind(
    "a finite number, or two",
    lambda value: all(v is None or _is_number(v) for v in _listed(value)),
)
FIGURES = {str: FIGURE}
FOLDS = 1000
VERSIONS = {str: TEXT}

METRICS = {
    "meta": {
        "task": TASK,
        "dataset": NAME,
        **dict.fromkeys(("gt", "dt", "image_root"), TEXT),
        **dict.fromkeys(("gt_sha256", "checkpoint", "checkpoint_sha256"), TEXT),
        "scored": FLAG,
        "bootstrap": {
            "resamples": _range(1, 100_000).always(),
            "seed": COUNT.always(),
            "all_coco": FLAG,
        },
        "versions": VERSIONS,
    },
    **dict.fromkeys(("bbox", "segm", "lesion", "image", "patient"), FIGURES),
    **dict.fromkeys(("recognition", "cancer"), FIGURES),
}
# What the figures of detections were made with.
LESIONS = {
    "meta": {
        "tau": SHARE.always(),
        "iou_threshold": OVERLAP.always(),
        "iou_type": REGIONS.always(),
    },
    "tau_val": {"tau": SHARE.always(), "rule": TEXT.always(), "dataset": TEXT},
}
RUN = {
    **dict.fromkeys(("model", "backbone"), NAME),
    **dict.fromkeys(("command", "device", "started", "finished"), TEXT),
    **dict.fromkeys(("config_sha256", "splits_sha256"), TEXT),
    "seed": WHOLE,
    "fold": {"index": _range(0, FOLDS - 1).always(), "of": _range(2, FOLDS).always()},
    "input": {"size": COUNT},
    "git": {"revision": TEXT, "dirty": FLAG},
    "versions": VERSIONS,
    "hours": NUMBER,
    "iterations": COUNT,
    "phases": [
        {"name": TEXT.always(), "trainable": TEXT, "iterations": COUNT, "lr": NUMBER.always()}
    ],
    "datasets": {str: {"images": COUNT.always(), "gt_sha256": TEXT}},
}
COCO = {
    "images": [{"id": ID.always(), "file_name": TEXT, "patient_id": ID}],
    "annotations": [{"image_id": ID.always(), "category_id": ID.always()}],
    "categories": [{"id": ID.always(), "name": TEXT.always()}],
    "info": {"description": TEXT},
}
SPLITS = {
    "ratio": [NUMBER],
    **dict.fromkeys(("split_by", "sha256"), TEXT),
    **dict.fromkeys(("seed", "fold", "folds", "test_per_class"), WHOLE),
}
ROBUSTNESS = {
    "meta": {"model": NAME.always(), "dataset_sha256": TEXT, "images": COUNT, "seed": COUNT},
    "rows": [{"distortion": TEXT.always(), "severity": _range(0, 5).always()}],
}


def check_fields(path, value, kinds, where=""):
    """
    Args:
        path (str or Path): the file that is blamed.
        value: what it holds.
        kinds (Kind, dict or list): what ``value`` must be: an object with these fields, one with
            any names of fields ({str: kind}), or a list of such values ([kind]).
        where (str): name of the field in the file.

    Raises:
        BadInputError: it is something else.
    """
    if isinstance(kinds, Kind):
        if value is None and kinds.needed:
            raise BadInputError(path, f"lacks {where}, {kinds.name}")
        if value is not None and not kinds.admits(value):
            raise BadInputError(path, f"{where} is {_shown(value)}; it must be {kinds.name}")
        return
    if value is None:
        return
    is_list = isinstance(kinds, list)
    if not isinstance(value, list if is_list else dict):
        what = "a list" if is_list else "an object"
        raise BadInputError(path, f"{where or 'its content'} is {_shown(value)}; it must be {what}")
    if is_list:
        for place, item in enumerate(value):
            check_fields(path, {} if item is None else item, kinds[0], f"{where}[{place}]")
        return
    if str in kinds:
        kinds = dict.fromkeys(value, kinds[str])
    for name, kind in kinds.items():
        check_fields(path, value.get(name), kind, f"{where}.{name}" if where else name)


def _listed(value):
    return value if isinstance(value, list) and len(value) == 2 else [value]


def _shown(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_metrics(path):
    """
    Args:
        path (Path): a metrics.json.

    Returns:
        dict: what it holds: the settings in ``meta`` and ``tau_val`` can be used; its figures are
        numbers, but may be any.

    Raises:
        BadInputError: it is none.
    """
    content = _read(path, METRICS)
    task = (content.get("meta") or {}).get("task")
    needed = {"recognition"} if task == "recognition" else {"lesion", "image"}
    if missing := sorted(name for name in {"meta"} | needed if content.get(name) is None):
        raise BadInputError(path, f"lacks {', '.join(missing)}: evaluate it again")
    if task != "recognition":
        check_fields(path, content, LESIONS)
    return content


def read_run_record(path):
    """dict: a run.json, checked as :func:`read_metrics` does."""
    record = _read(path, RUN)
    fold = record.get("fold")
    if fold and fold["index"] >= fold["of"]:
        raise BadInputError(path, f"fold.index is {fold['index']}, of {fold['of']} folds")
    return record


def read_coco_records(path):
    """dict: a COCO file whose images, annotations and categories can be counted."""
    content = _read(path, COCO)
    if content.get("images") is None:
        raise BadInputError(path, "lacks images")
    return content


def read_split_settings(path):
    """dict: a splits.json, which says how the splits were made."""
    return _read(path, SPLITS)


def read_robustness(path):
    """dict: a robustness.json, ``meta`` and ``rows``."""
    content = _read(path, ROBUSTNESS)
    if missing := [name for name in ROBUSTNESS if content.get(name) is None]:
        raise BadInputError(path, f"lacks {', '.join(missing)}")
    for row in content["rows"]:
        figures = {name: value for name, value in row.items() if "/" in name}
        check_fields(path, figures, {str: NUMBER}, f"{row['distortion']} {row['severity']}")
    return content


def _read(path, kinds):
    content = read_json(Path(path))
    if not isinstance(content, dict):
        raise BadInputError(path, f"its content is {_shown(content)}; it must be an object")
    check_fields(path, content, kinds)
    return content
