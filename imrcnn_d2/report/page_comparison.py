"""How the models on the page differ, from the comparison that tools/compare.py makes."""

import math

from ..evaluation.bootstrap import Bootstrap
from .compare import compare
from .compare_runs import gather
from .figure_names import figure_name

__all__ = ["differences"]

GROUPS = {
    "segm": "masks",
    "bbox": "boxes",
    "lesion": "lesions",
    "image": "images",
    "patient": "patients",
    "tau_val.lesion": "lesions, τ_val",
    "tau_val.image": "images, τ_val",
    "tau_val.patient": "patients, τ_val",
}
FIGURES = {"recall": "sensitivity", "iou": "IoU", "iou_box": "IoU", "miou": "mIoU", "f1": "F1"}
AT_A_GLANCE = (
    *("lesion/recall", "lesion/precision", "lesion/iou"),
    *("recognition/top1", "recognition/auroc", "cancer/recall", "cancer/specificity"),
)


def differences(runs):
    """
    Args:
        runs (list[Run]): of one test set.

    Returns:
        dict or None: ``columns``, ``rows`` of the primary endpoint and a few others, ``all_rows``
        (list[list[str]]), ``caption`` and ``note``. None for less than two models; runs that differ
        by seed only are one.
    """
    settings = [run.metrics["meta"].get("bootstrap") for run in runs]
    known = next((one for one in settings if one), {})
    bootstrap = Bootstrap(**{key: known[key] for key in ("resamples", "seed") if key in known})
    gathered = gather(runs)
    if len(gathered.split) < 2:
        return None
    found = compare(gathered, bootstrap)
    chosen = (found.primary, *AT_A_GLANCE)
    rows = {test: _row(test) for test in found.tests}
    return {
        "columns": ["models", "figure", "difference", "95 % interval", "p", "test"],
        "rows": [row for test, row in rows.items() if test.endpoint in chosen],
        "all_rows": list(rows.values()),
        "caption": "First model minus second, in percentage points",
        "note": (
            f"{bootstrap.resamples:,} paired resamples of {found.settings['unit']}s. "
            f"Primary endpoint: {_name(found.primary)}; the p-values of the other "
            f"{len(rows) - sum(test.primary for test in rows)} tests are adjusted by Holm’s method."
        ),
        "remarks": found.remarks,
    }


def _row(test):
    p = test.p if test.primary else test.p_holm
    interval = f"[{_signed(test.low)},\u00a0{_signed(test.high)}]"
    return [
        f"{test.first} − {test.second}",
        _name(test.endpoint) + (" (primary)" if test.primary else ""),
        _signed(test.estimate),
        "n/a" if math.isnan(test.low) else interval,
        "n/a" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}",
        test.test,
    ]


def _name(endpoint):
    group, _, figure = endpoint.partition("/")
    if group in ("recognition", "cancer"):
        return figure_name(endpoint)
    return f"{FIGURES.get(figure, figure)}, {GROUPS.get(group, group)}"


def _signed(value):
    return "n/a" if math.isnan(value) else f"{value:+.1f}".replace("-", "−")
