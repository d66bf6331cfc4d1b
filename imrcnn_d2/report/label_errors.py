"""Possible label errors: annotations that a cross-validation's models contradict, for a review."""

import functools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

from imrcnn_d2.data.audit.findings import KINDS, Finding, finding
from imrcnn_d2.data.formats.labelme import labelme_document
from imrcnn_d2.data.images import image_inside, path_inside
from imrcnn_d2.evaluation.label_errors import LabelError, find_label_errors, pool_label_errors
from imrcnn_d2.report.plots.images import HALO_WIDTH, region_contours, show_tile, tile_grid
from imrcnn_d2.report.plots.style import SKY, VERMILION, save_figure
from imrcnn_d2.report.runs import Run, load_run
from imrcnn_d2.utils.files import csv_text, strict_json, write_atomically

__all__ = ["Case", "plot_label_errors", "gather_label_errors", "write_label_errors"]

logger = logging.getLogger(__name__)


COLUMNS = ("rank", "kind", "score", "file_name", "test_set", "annotation_id", "iou", "models")
MODEL_LABEL = "{} (model)"  # class of a detection in a LabelMe file
HALO = [patheffects.withStroke(linewidth=HALO_WIDTH, foreground="black", alpha=0.55)]
LINES = {
    "annotation": dict(color=SKY, linestyle="-", linewidth=1.7, path_effects=HALO),
    "model": dict(color=VERMILION, linestyle=(0, (5, 1.5)), linewidth=1.9, path_effects=HALO),
}


@dataclass(frozen=True, eq=False)
class Case:
    """
    A possible label error.

    Attributes:
        suspect: with the mean score over the models.
        run: of the model that contradicts the annotation most.
        models: how many did not see the image in training.
    """

    suspect: LabelError
    run: Run
    models: int

    @property
    def record(self) -> dict:
        """The image's COCO record."""
        return self.run.results.ground_truth.images[self.suspect.image]

    @property
    def test_set(self) -> str:
        """ "fold0", or "test" of a run without folds."""
        return "test" if self.run.fold is None else f"fold{self.run.fold['index']}"

    @property
    def annotation(self) -> dict | None:
        """The COCO annotation in question."""
        if self.suspect.region is None:
            return None
        return _annotations(self.run)[self.suspect.region]

    @property
    def row(self) -> dict:
        """A row of suspects.csv, without its rank."""
        return {
            "kind": self.suspect.kind,
            "score": round(self.suspect.score, 4),
            "file_name": self.record["file_name"],
            "test_set": self.test_set,
            "annotation_id": (self.annotation or {}).get("id"),
            "iou": round(100 * self.suspect.iou, 1),
            "models": self.models,
        }

    @property
    def finding(self) -> Finding:
        kind, row = KINDS[self.suspect.kind], self.row
        detail = f"{kind.title}: {row['score']:.2f} of 1, mean of {self.models} models"
        if self.suspect.iou:
            detail += f"; IoU {row['iou']:.0f} %"
        return finding(
            self.suspect.kind,
            (row["file_name"],),
            (self.test_set,),
            f"{detail}.",
            annotation_id=row["annotation_id"],
            score=row["score"],
        )


def gather_label_errors(root: str | Path) -> tuple[list[Case], list[Run]]:
    """
    Find the possible label errors of a cross-validation, or of any runs, in a folder; several
    models and seeds are pooled, see :func:`pool_label_errors`.

    Returns:
        the cases by falling score, and the runs that they are from.

    Raises:
        FileNotFoundError: no run evaluated on its test set exists, or its files are gone.
        ValueError: a model was trained on images of its test set, an image is in test sets of
            different content, or whole images were classified.
    """
    root = Path(root)
    folders = {path.parents[2] for path in root.rglob("inference/*/metrics.json")}
    groups = {}
    for folder in tqdm(sorted(folders), desc="Reading runs", unit="run"):
        try:
            run = load_run(folder)
        except FileNotFoundError as error:
            logger.warning(f"Left out: {error}")
            continue
        if run.task != "lesions":
            raise ValueError(f"{folder} classifies whole images: it has no lesions to check.")
        _check_unseen(run)
        groups.setdefault(run.meta.get("gt_sha256"), []).append(run)
    if not groups:
        raise FileNotFoundError(f"{root}: contains no run with an evaluation on its test set.")
    cases, first_run = [], {}
    for runs in groups.values():
        for record in runs[0].results.ground_truth.images:
            other = first_run.setdefault(record["file_name"], runs[0])
            if other is not runs[0]:
                raise ValueError(
                    f"{record['file_name']} is in the test sets of {other.folder} and of "
                    f"{runs[0].folder}, which differ: give the runs of one cross-validation."
                )
        pooled = pool_label_errors([find_label_errors(run.results) for run in runs])
        cases += [Case(suspect, runs[model], len(runs)) for suspect, model in pooled]
    cases.sort(key=lambda case: (-case.suspect.score, case.record["file_name"]))
    return cases, [run for runs in groups.values() for run in runs]


def _check_unseen(run):
    """A prediction for an image that was trained on says nothing about its annotation."""
    test = {record["file_name"] for record in run.results.ground_truth.images}
    trained = ((run.config or {}).get("DATASETS") or {}).get("TRAIN") or ()
    for name, source in ((run.run or {}).get("datasets") or {}).items():
        is_train = name in trained if trained else name.endswith("_train")
        path = Path(source.get("gt") or "")
        if is_train and path.is_file():
            images = json.loads(path.read_text(encoding="utf-8"))["images"]
            seen = sorted(test & {image["file_name"] for image in images})
            if seen:
                raise ValueError(
                    f"{run.folder}: {len(seen)} of its test images, such as {seen[0]}, are in "
                    f"{path}, which the model was trained on. Only predictions for images "
                    "that were not are of use here."
                )


@functools.cache
def _annotations(run):
    """The annotations in the order of ``GroundTruth.regions``."""
    content = json.loads(run.gt_path.read_text(encoding="utf-8"))
    place = {record["id"]: i for i, record in enumerate(run.results.ground_truth.images)}
    return sorted(content["annotations"], key=lambda a: place[a["image_id"]])


def write_label_errors(
    cases: list[Case], runs: list[Run], output: str | Path, *, number: int = 24
) -> list[Path]:
    """
    Write ``suspects.csv`` (all, ranked), ``suspects.json`` (the first as an audit's findings),
    ``suspects.png`` (the first images with both contours) and ``labelme/``, one file for each of
    these images with its annotations and, as "CLASS (model)", the detections that contradict them.

    Args:
        cases, runs: of :func:`gather_label_errors`.
        number: of images to review, at most.

    Returns:
        the files written. LabelMe files that exist with another content stay.

    Raises:
        FileNotFoundError: one of the images does not exist.
    """
    output = Path(output)
    by_image = {}
    for case in cases:
        by_image.setdefault(case.record["file_name"], []).append(case)
    chosen = dict(list(by_image.items())[:number])
    first = [case for case in cases if case.record["file_name"] in chosen]
    paths = [output / name for name in ("suspects.csv", "suspects.json", "suspects.png")]
    rows = [{"rank": rank, **case.row} for rank, case in enumerate(cases, 1)]
    write_atomically(paths[0], csv_text(rows, COLUMNS))
    document = {
        "runs": [str(run.run_folder or run.folder) for run in runs],
        "findings": [case.finding.as_json() for case in first],
    }
    write_atomically(paths[1], strict_json(document))
    plot_label_errors(chosen, len(by_image), paths[2])
    for file_name, image_cases in chosen.items():
        gt_path = image_cases[0].run.gt_path
        path = path_inside(output / "labelme", file_name, gt_path).with_suffix(".json")
        text = json.dumps(_labelme(image_cases, path), indent=2) + "\n"
        if path.exists() and path.read_bytes() != text.encode():
            logger.warning(f"{path} stays: its content differs, perhaps because it was corrected")
            continue
        write_atomically(path, text)
        paths.append(path)
    return paths


def _labelme(cases, path):
    """The LabelMe file at ``path`` of the image of all cases."""
    run, record = cases[0].run, cases[0].record
    truth = run.results.ground_truth
    names = {category["id"]: category["name"] for category in truth.categories}
    shown = [a for a in _annotations(run) if a["image_id"] == record["id"]]
    # Classes of the models' detections have separate ids.
    offset = max(names) + 1
    names |= {offset + number: MODEL_LABEL.format(name) for number, name in names.items()}
    for case in cases:
        if case.suspect.detection is not None:
            shown.append(_detection(case, truth.categories, offset))
    image = image_inside(run.image_root, record["file_name"], run.gt_path).resolve()
    relative = os.path.relpath(image, path.parent.resolve())
    return labelme_document(shown, names, relative, record["height"], record["width"])


def _detection(case, categories, offset):
    detections, at = case.run.results.detections, case.suspect.detection
    regions = detections.regions
    record = {
        "category_id": offset + categories[regions.category[at]]["id"],
        "bbox": regions.boxes[at].tolist(),
        "score": float(detections.score[at]),
    }
    if regions.masks is not None:
        record["segmentation"] = regions.masks[at]
    return record


def plot_label_errors(chosen: dict[str, list[Case]], total: int, path: str | Path) -> Figure:
    """
    Plot the annotations and the detections that contradict them.

    Args:
        chosen: the cases of each image to show, by its name, in their order.
        total: images that have cases.

    Raises:
        FileNotFoundError: one of the images does not exist.
    """
    figure, tiles = tile_grid(
        len(chosen), f"{len(chosen)} of {total} images, most suspicious first"
    )
    for axes, (file_name, cases) in zip(tiles, chosen.items(), strict=True):
        top = cases[0]
        summary = f"{KINDS[top.suspect.kind].title}: {top.suspect.score:.2f}"
        show_tile(axes, top.run.image_root, file_name, summary)
        truth = top.run.results.ground_truth.regions
        for region in (truth.image == top.suspect.image).nonzero()[0]:
            _plot_contours(axes, truth, region, "annotation")
        for case in cases:
            if case.suspect.detection is not None:
                _plot_contours(
                    axes, case.run.results.detections.regions, case.suspect.detection, "model"
                )
    labels = {"annotation": "annotation in the data set", "model": "model that never saw the image"}
    handles = [Line2D([], [], label=labels[name], **line) for name, line in LINES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    save_figure(figure, path)
    return figure


def _plot_contours(axes, regions, region, style):
    for line in region_contours(regions, region):
        axes.plot(*line.T, **LINES[style])
