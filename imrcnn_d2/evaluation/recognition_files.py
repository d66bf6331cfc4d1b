"""The files of an evaluation of image classification."""

from pathlib import Path

from ..versions import package_versions
from .files import (
    confusion_rows,
    csv_text,
    group_documents,
    group_rows,
    strict_json,
    transposed,
    with_intervals,
    write_atomically,
)

__all__ = ["RECOGNITION_RESULTS", "recognition_document", "write_recognition"]

# The probabilities of each image.
RECOGNITION_RESULTS = "recognition_results.json"


def write_recognition(results, folder, **meta):
    """
    Write the files of an evaluation; each replaces its predecessor at once, or not at all. What is
    undefined is null in JSON and empty in CSV; shares are in percent, but probabilities in [0, 1].

    - ``metrics.json``: all figures, each with its interval ``<key>_ci`` if there is one; ``meta``.
    - ``per_image.csv``: a row an image: label, class predicted, right or wrong, probabilities.
    - ``confusion_matrix.csv``: rows are truth; ``calibration.csv``: a row for each bin of scores.
    - ``by_group.csv``, where the results have groups: a row a figure of a group.

    Args:
        results (RecognitionResults):
        folder (str or Path): made if it does not exist.
        **meta: what else to note under ``meta``, such as the data set's name; JSON values.

    Returns:
        dict[str, Path]: file name -> path.
    """
    document = recognition_document(results)
    document["meta"] = {**meta, **results.meta, "versions": package_versions()}
    texts = {
        "metrics.json": strict_json(document),
        "per_image.csv": csv_text(results.per_image, ["image_id"]),
        "confusion_matrix.csv": csv_text(confusion_rows(results.confusion), ["truth"]),
        "calibration.csv": csv_text(*transposed(results.measures.calibration.diagram())),
    }
    if results.by_group:
        texts["by_group.csv"] = csv_text(group_rows(results.by_group), ["column"])
    paths = {name: Path(folder) / name for name in texts}
    for name, path in paths.items():
        write_atomically(path, texts[name])
    return paths


def recognition_document(results):
    """
    Args:
        results (RecognitionResults):

    Returns:
        dict: what metrics.json holds, but for ``meta``.
    """
    groups = {**results.groups(), "calibration": results.calibration}
    document = {
        name: with_intervals(figures, results.intervals.get(name, {}))
        for name, figures in groups.items()
    }
    document["confusion_matrix"] = {
        "classes": results.confusion.classes,
        "counts": results.confusion.rows(),
    }
    if results.by_group:
        document["by_group"] = group_documents(results.by_group)
    document["undefined_shares"] = results.undefined_shares
    return document
