"""What comparisons of detectors and of classifiers write alike: page, JSON and one table."""

from dataclasses import asdict

import pandas as pd

from ..evaluation.files import strict_json, write_atomically
from .compare_tables import table_of_tests
from .tables import markdown_table, markdown_text, write_table

__all__ = ["difference_table", "document", "markdown_page", "median_runs", "write_files"]


def median_runs(comparison, figure):
    """
    Args:
        comparison (Comparison):
        figure (callable): of a Run, what its model's runs are ordered by.

    Returns:
        dict[str, Run]: the one run shown of each model on one split: of several seeds the median.
    """
    shown = {}
    for label, runs in comparison.gathered.split.items():
        name = f"{label} (median of {len(runs)} runs)" if len(runs) > 1 else label
        shown[name] = sorted(runs, key=figure)[(len(runs) - 1) // 2]
    return shown


def difference_table(comparison):
    """
    Args:
        comparison (Comparison): with tests.

    Returns:
        Table: the tests of models on the same images.
    """
    notes = ["Later model given minus earlier one, or model minus baseline; percentage points."]
    if comparison.clustered:
        notes.append(
            "Patients have several images each: McNemar's test takes images for independent and "
            "is too sure; the bootstrap resamples patients."
        )
    title = "Differences between models on the same test images"
    return table_of_tests(comparison, comparison.tests, "differences", title, *notes)


def document(comparison, models, published, definitions, **more):
    """
    Args:
        comparison (Comparison):
        models (dict[str, dict]): what is told of each model, beside its figures.
        published (list or dict), definitions (dict): JSON values.
        **more: what else is told.

    Returns:
        dict: what comparison.json holds.
    """
    return {
        "settings": comparison.settings,
        "runs": [_about_run(label, run) for label, run in comparison.runs],
        "models": {
            label: {
                "figures": model.figures,
                "intervals": model.intervals,
                "runs": model.runs,
                **models.get(label, {}),
            }
            for label, model in comparison.models.items()
        },
        "folds": {label: [one.figures for one in own] for label, own in comparison.folds.items()},
        **more,
        "tests": [asdict(test) for test in comparison.tests],
        "fold_tests": [asdict(test) for test in comparison.fold_tests],
        "published": published,
        "remarks": comparison.remarks,
        "definitions": definitions,
    }


def markdown_page(comparison, test_set, tables, pictures, definitions, citation=None):
    """
    Args:
        comparison (Comparison):
        test_set (str): its images, and what they show.
        tables (list[Table]):
        pictures (list[str]): lines of Markdown that show them.
        definitions (dict[str, str]): how each number is defined.
        citation (str or None): of published values.

    Returns:
        str: comparison.md.
    """
    patients = comparison.runs[0][1].results.meta["patients"]
    labels = dict.fromkeys(label for label, _ in comparison.runs)
    lines = [
        f"# {markdown_text(', '.join(labels))}",
        "",
        f"Test set: {markdown_text(comparison.dataset or 'not named')}, {markdown_text(test_set)}"
        f"{f', {patients} patients' if patients else ''}"
        f"{'' if comparison.models else ' in the first fold'}. "
        f"Primary endpoint: {markdown_text(comparison.primary)}.",
        "",
    ]
    if comparison.remarks:
        remarks = [f"- {markdown_text(remark)}" for remark in comparison.remarks]
        lines += ["**Read first**", "", *remarks, ""]
    lines += ["## Tables", ""]
    for table in tables:
        lines += [table.markdown(), ""]
    lines += [*pictures, "## How each number is defined", ""]
    lines += [f"- **{name}**: {text}" for name, text in definitions.items()]
    if citation:
        lines += ["", f"Published values: {citation}."]
    lines += ["", "## Runs", "", _runs_table(comparison), ""]
    return "\n".join(lines)


def write_files(folder, page, content, tables, pictures):
    """
    Write comparison.md, comparison.json and the files of the tables.

    Args:
        folder (Path): made if it does not exist.
        page (str), content (dict): of :func:`markdown_page` and :func:`document`.
        tables (list[Table]):
        pictures (list[Path]): that are written already.

    Returns:
        list[Path]: all files; the first is comparison.md.
    """
    files = [path for table in tables for path in write_table(table, folder)]
    write_atomically(folder / "comparison.md", page)
    write_atomically(folder / "comparison.json", strict_json(content))
    return [folder / "comparison.md", folder / "comparison.json", *files, *pictures]


def _about_run(label, run):
    """dict: where a run of a model is, and what of."""
    meta, record = run.meta, run.run or {}
    return {
        "model": label,
        "architecture": record.get("model"),
        "backbone": run.backbone,
        "seed": run.seed,
        "fold": run.fold,
        "folder": str(run.folder.resolve()),
        "dataset": run.dataset,
        "ground_truth": str(run.gt_path),
        "gt_sha256": meta.get("gt_sha256"),
        "checkpoint_sha256": meta.get("checkpoint_sha256"),
        "git": record.get("git"),
        "config_sha256": record.get("config_sha256"),
    }


def _runs_table(comparison):
    """str: a Markdown table of the runs."""
    rows = []
    for label, run in comparison.runs:
        about = _about_run(label, run)
        fold = f"{run.fold['index']} of {run.fold['of']}" if run.fold else ""
        git = about["git"] or {}
        rows.append(
            {
                "model": label,
                "backbone": run.backbone or "",
                "seed": "" if run.seed is None else str(run.seed),
                "fold": fold,
                "checkpoint": (about["checkpoint_sha256"] or "")[:12],
                "git": (git.get("revision") or "")[:12]
                + (" + changes" if git.get("dirty") else ""),
                "folder": about["folder"],
            }
        )
    return markdown_table(pd.DataFrame(rows), 7)
