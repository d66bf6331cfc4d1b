"""A model card in Markdown: what a run itself can say about its model."""

import re
from datetime import datetime, timezone
from pathlib import Path

from imrcnn_d2 import __version__
from imrcnn_d2.evaluation.output import read_test_log
from imrcnn_d2.report.cohort import cohort, is_external
from imrcnn_d2.report.html.page import (
    UNKNOWN,
    facts,
    known_facts,
    of_training,
    template_environment,
)
from imrcnn_d2.report.html.tables import (
    CALIBRATION_METRICS,
    CURVE_METRICS,
    PAPER,
    PAPER_METRICS,
    UNIT_METRICS,
    at_threshold,
    cell,
    curve_group,
    metric_rows,
    of_boxes,
    of_classes,
)
from imrcnn_d2.report.names import PAPER_THRESHOLD, threshold_name
from imrcnn_d2.report.runs import Run
from imrcnn_d2.report.tables import markdown_text
from imrcnn_d2.utils import hub
from imrcnn_d2.utils.files import write_atomically

_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)*(?=[^\s/])")


def write_model_card(run: Run, path: str | Path) -> Path:
    """Write the model card, a Markdown file that begins with the Hugging Face Hub's front matter;
    replaced at once, or not at all.

    Raises:
        FileNotFoundError: ground truth or detections are gone.
        ValueError: they are not the files that were scored, or a file of the data set is damaged.
    """
    data = cohort(run)
    data["notes"] += filter(None, [of_training(run, data)])
    rows = facts([run], data["settings"])
    known, (shown, unknown) = dict(rows), known_facts(rows)

    def filled(text):
        """The text with facts filled in; None if one of them was not recorded."""
        needed = [label for label in known if f"{{{label}}}" in text]
        return None if UNKNOWN in map(known.get, needed) else text.format(**known)

    chosen = run.metrics.get("tau_val")
    environment = template_environment(autoescape=False)  # no HTML; data go through "plain"
    # Cards are passed on: absolute paths are of this machine, and only their ends are shown.
    environment.filters["plain"] = lambda text: markdown_text(_FOLDERS.sub("", str(text)))
    card = environment.get_template("model_card.md").render(
        name=run.name,
        dataset=run.test_set,
        folder=run.folder,
        facts=shown,
        unknown=unknown,
        filled=filled,
        cohort=data,
        prepared=data["excluded"] is not None,
        external=is_external(run, data["settings"]),
        left_out=data["settings"].get("left_out"),
        with_config=bool(run.config),
        best_metric=run.settings.get("TEST.BEST_METRIC"),
        groups=_groups(run),
        scores=_scores(run),
        meta=run.metrics["meta"],
        chosen=chosen,
        recorded=bool(run.record),
        validated=bool(run.settings.get("DATASETS.VAL", True)),
        has_masks=run.results.has_masks,
        weights=run.settings.get("MODEL.WEIGHTS") or run.settings.get("MODEL.TIMM.WEIGHTS"),
        remarks=run.remarks,
        log=read_test_log(run.gt_path),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        version=__version__,
    )
    curve, lesion = curve_group(run)[1], run.metrics["lesion"]
    values = {name: curve.get(name) for name in ("AP50_voc", "AP")}
    values |= {name: lesion.get(name) for name in ("recall", "precision", "f1", "iou", "dice")}
    front_matter = hub.front_matter(
        "image-segmentation" if run.results.has_masks else "object-detection",
        run.model,
        dataset=run.dataset or "",
        metrics={name: value for name, value in values.items() if value is not None},
    )
    write_atomically(path, front_matter + card)
    return Path(path)


def _groups(run):
    """Title, columns and rows (label, cells) of each table of results."""
    chosen, metrics = run.metrics.get("tau_val"), run.metrics
    columns = [at_threshold([run])]
    columns += [f"{threshold_name(chosen['tau'], run.maps_scores)} (τ_val)"] if chosen else []
    tables = [("Over all scores", [""], CURVE_METRICS, "", [curve_group(run)[1]])]
    for unit, (title, names) in UNIT_METRICS.items():
        if metrics.get(unit):
            names = names if run.results.has_masks else of_boxes(unit, names)
            points = [metrics[unit], *([chosen.get(unit) or {}] if chosen else [])]
            tables.append((title, columns, names, unit, points))
    for title, names, points in of_classes([run]):
        tables.append((title, columns[:1], names, "", points))
    tables.append((PAPER, [PAPER_THRESHOLD], PAPER_METRICS, "paper", [metrics["paper"]]))
    calibration, names = [metrics["calibration"]], [""]
    if before := metrics.get("calibration_raw"):
        calibration, names = [before, *calibration], ["before the map", "after it"]
    tables.append(("Scores as probabilities of a hit", names, CALIBRATION_METRICS, "", calibration))
    return [
        {"title": title, "columns": headings, "rows": _rows(run, *rest)}
        for title, headings, *rest in tables
    ]


def _rows(run, names, unit, groups):
    return [
        (
            f"{row['label']}: {row['hint']}" if row["hint"] else row["label"],
            [_text(cell) for cell in row["cells"]],
        )
        for row in metric_rows(names, groups, unit, [run])
    ]


def _text(cell):
    return f"{cell['text']} {cell['interval']}".strip()


def _scores(run):
    """What a score means, in a sentence; None without a map of scores."""
    before, after = run.metrics.get("calibration_raw"), run.metrics["calibration"]
    if not before or None in (before["ece"], after["ece"]):
        return None
    precision, recall = (
        _text(cell(run.metrics["lesion"], name)) for name in ("precision", "recall")
    )
    return (
        "The score of a detection is mapped to the probability that it hits a lesion: on these "
        f"images the expected calibration error is {before['ece']:.1f} before the map and "
        f"{after['ece']:.1f} after it. At a {at_threshold([run])} precision is {precision} "
        f"and recall {recall}."
    )
