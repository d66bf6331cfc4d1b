"""A model card in Markdown: what a run itself can say about its model."""

import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from imrcnn_d2.evaluation.output import read_test_log
from imrcnn_d2.report.cohort import cohort, is_external
from imrcnn_d2.report.html.page import UNKNOWN, facts, known_facts, template_environment
from imrcnn_d2.report.html.tables import CURVE_METRICS, UNIT_METRICS, cell, curve_group
from imrcnn_d2.report.names import metric_label
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
        with_config=bool(run.config),
        groups=_groups(run),
        meta=run.metrics["meta"],
        chosen=chosen,
        recorded=bool(run.record),
        weights=run.settings.get("MODEL.WEIGHTS") or run.settings.get("MODEL.TIMM.WEIGHTS"),
        remarks=run.remarks,
        log=read_test_log(run.gt_path),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        version=metadata.version("imrcnn-d2"),
    )
    kind, curve = curve_group(run)
    lesion = (chosen or run.metrics).get("lesion") or {}
    values = {name: curve.get(name) for name in ("AP50_voc", "AP")}
    values |= {name: lesion.get(name) for name in ("recall", "precision", "f1", "iou", "dice")}
    front_matter = hub.front_matter(
        "image-segmentation" if kind == "mask" else "object-detection",
        run.model,
        dataset=run.dataset or "",
        metrics={name: value for name, value in values.items() if value is not None},
    )
    write_atomically(path, front_matter + card)
    return Path(path)


def _groups(run):
    """Title, columns and rows (label, cells) of each table of results."""
    chosen = run.metrics.get("tau_val")
    columns = [f"score ≥ {run.metrics['meta']['tau']:.3g}"]
    columns += [f"score ≥ {chosen['tau']:.3g} (τ_val)"] if chosen else []
    curve = _rows(CURVE_METRICS, [curve_group(run)[1]])
    groups = [{"title": "Over all scores", "columns": [""], "rows": curve}]
    for unit, (title, names) in UNIT_METRICS.items():
        if run.metrics.get(unit):
            metrics = [run.metrics[unit], *([chosen.get(unit) or {}] if chosen else [])]
            groups.append({"title": title, "columns": columns, "rows": _rows(names, metrics)})
    return groups


def _rows(names, groups):
    rows = []
    for name, hint, *label in names:
        if name in groups[0]:
            cells = [cell(group, name) if name in group else {} for group in groups]
            texts = [f"{c.get('text', '')} {c.get('interval', '')}".strip() for c in cells]
            title = label[0] if label else metric_label(name)
            rows.append((f"{title}: {hint}" if hint else title, texts))
    return rows
