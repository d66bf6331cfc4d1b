"""The files that a comparison of annotators leaves."""

from pathlib import Path

from ..versions import package_versions
from .agreement_measures import COLUMNS, FIGURES, pair_name
from .files import csv_text, strict_json, with_intervals, write_atomically
from .metrics import divide

__all__ = ["agreement_document", "agreement_rows", "write_agreement"]


def write_agreement(found, folder, **meta):
    """
    Write ``agreement.json`` (every figure with its interval), ``agreement.csv`` (a row a pair),
    ``per_image.csv`` (a row an image and pair) and ``missing.csv`` (images that not all have).

    Args:
        found (Agreement):
        folder (str or Path): made if it does not exist.
        **meta: what else to note under ``meta``; JSON values.

    Returns:
        list[Path]: the files.
    """
    document = agreement_document(found)
    document["meta"] = {**meta, **found.meta, "versions": package_versions()}
    pairs = []
    for name, figures in document["agreement"].items():
        row = {"pair": name, **{k: v for k, v in figures.items() if not isinstance(v, list)}}
        for figure in (key.removesuffix("_ci") for key in figures if key.endswith("_ci")):
            row[f"{figure}_low"], row[f"{figure}_high"] = figures[f"{figure}_ci"]
        pairs.append(row)
    missing = [
        {"file_name": file, "missing_in": ", ".join(names)} for file, names in found.missing.items()
    ]
    texts = {
        "agreement.json": strict_json(document),
        "agreement.csv": csv_text(pairs, ["pair", *FIGURES]),
        "per_image.csv": csv_text(agreement_rows(found), ["file_name"]),
        "missing.csv": csv_text(missing, ["file_name", "missing_in"]),
    }
    for name, text in texts.items():
        write_atomically(Path(folder) / name, text)
    return [Path(folder) / name for name in texts]


def agreement_document(found):
    """
    Args:
        found (Agreement):

    Returns:
        dict: for agreement.json: the figures of every group with their intervals, those of pairs
        with counts; what was left out; ``meta``.
    """
    groups = {
        name: with_intervals(figures, found.intervals.get(name, {}))
        for name, figures in found.figures.items()
    }
    for (a, b), columns in found.pairs.items():
        counts = dict(zip(COLUMNS, columns.sum(axis=0).astype(int).tolist(), strict=True))
        for overlap in ("iou", "dice", "union_iou", "union_dice"):
            del counts[overlap]
        name = pair_name(a, b)
        groups[name] = {"a": a, "b": b, **counts, **groups[name]}
    return {
        "agreement": groups,
        "missing": found.missing,
        "notes": found.notes,
        "undefined_shares": found.undefined_shares,
        "meta": found.meta,
    }


def agreement_rows(found):
    """
    Args:
        found (Agreement):

    Returns:
        list[dict]: a row an image and pair: image, a, b, lesions of each and pairs of them, mean
        overlaps of the pairs and overlaps of the unions in percent.
    """
    rows = []
    for (a, b), columns in found.pairs.items():
        for record, values in zip(found.images, columns, strict=True):
            own = dict(zip(COLUMNS, values.tolist(), strict=True))
            row = {"file_name": record["file_name"], "a": a, "b": b}
            row["lesions_a"] = int(own["matched"] + own["only_a"])
            row["lesions_b"] = int(own["matched"] + own["only_b"])
            row["matched"] = int(own["matched"])
            for name, of in (
                ("iou", "matched"),
                ("dice", "matched"),
                ("union_iou", "either"),
                ("union_dice", "either"),
            ):
                row[name] = float(100 * divide(own[name], own[of]))
            rows.append(row)
    return rows
