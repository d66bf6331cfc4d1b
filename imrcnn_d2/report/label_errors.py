"""Annotations that a cross-validation's models disagree with: found, and written for a review."""

import functools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from matplotlib import patheffects
from matplotlib.lines import Line2D
from tqdm import tqdm

from imrcnn_d2.data.audit.findings import KINDS, finding
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
    "outline": dict(color=SKY, linestyle="-", linewidth=1.7, path_effects=HALO),
    "model": dict(color=VERMILION, linestyle=(0, (5, 1.5)), linewidth=1.9, path_effects=HALO),
}


@dataclass(frozen=True, eq=False)
class Case:
    """
    Attributes:
        suspect (LabelError): with the mean score over the models.
        run (Run): of the model that says so most.
        models (int): how many did not see the image in training.
    """

    suspect: LabelError
    run: Run
    models: int

    @property
    def record(self):
        """dict: the image's COCO record."""
        return self.run.results.ground_truth.images[self.suspect.image]

    @property
    def test_set(self):
        """str: "fold0", or "test" of a run without folds."""
        return "test" if self.run.fold is None else f"fold{self.run.fold['index']}"

    @property
    def annotation(self):
        """dict or None: the COCO annotation it is about."""
        if self.suspect.region is None:
            return None
        return _annotations(self.run)[self.suspect.region]

    @property
    def row(self):
        """dict: of suspects.csv, but for its rank."""
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
    def finding(self):
        """Finding: as an audit has them."""
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


def gather_label_errors(root):
    """
    Args:
        root (str or Path): folder of a cross-validation, or of any runs; several models and seeds
            are pooled, see :func:`pool_label_errors`.

    Returns:
        tuple[list[Case], list[Run]]: by falling score; the runs they are from.

    Raises:
        FileNotFoundError: no run evaluated on its test set is there, or its files are gone.
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
            raise ValueError(f"{folder} classifies whole images: there are no outlines to check.")
        _check_unseen(run)
        groups.setdefault(run.meta.get("gt_sha256"), []).append(run)
    if not groups:
        raise FileNotFoundError(f"{root}: no run with an evaluation on its test set is there.")
    cases, owner = [], {}
    for runs in groups.values():
        for record in runs[0].results.ground_truth.images:
            other = owner.setdefault(record["file_name"], runs[0])
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
    """A prediction for an image that was trained on says nothing about its outline."""
    test = {record["file_name"] for record in run.results.ground_truth.images}
    trained = ((run.config or {}).get("DATASETS") or {}).get("TRAIN") or ()
    for name, about in ((run.run or {}).get("datasets") or {}).items():
        is_train = name in trained if trained else name.endswith("_train")
        path = Path(about.get("gt") or "")
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


def write_label_errors(cases, runs, output, *, number=24):
    """
    Write ``suspects.csv`` (all, ranked), ``suspects.json`` (the first as an audit's findings),
    ``suspects.png`` (the first images with both outlines) and ``labelme/``, a file for each of
    these images with its outlines and, as "CLASS (model)", the detections that speak against them.

    Args:
        cases (list[Case]), runs (list[Run]): of :func:`gather_label_errors`.
        output (str or Path): folder.
        number (int): of images to review, at most.

    Returns:
        list[Path]: what was written. LabelMe files that are there with another content stay.

    Raises:
        FileNotFoundError: one of the images is not there.
    """
    output = Path(output)
    of_image = {}
    for case in cases:
        of_image.setdefault(case.record["file_name"], []).append(case)
    chosen = dict(list(of_image.items())[:number])
    first = [case for case in cases if case.record["file_name"] in chosen]
    paths = [output / name for name in ("suspects.csv", "suspects.json", "suspects.png")]
    rows = [{"rank": rank, **case.row} for rank, case in enumerate(cases, 1)]
    write_atomically(paths[0], csv_text(rows, COLUMNS))
    document = {
        "runs": [str(run.run_folder or run.folder) for run in runs],
        "findings": [case.finding.as_json() for case in first],
    }
    write_atomically(paths[1], strict_json(document))
    plot_label_errors(chosen, len(of_image), paths[2])
    for file_name, own in chosen.items():
        path = path_inside(output / "labelme", file_name, own[0].run.gt_path).with_suffix(".json")
        text = json.dumps(_labelme(own, path), indent=2) + "\n"
        if path.exists() and path.read_bytes() != text.encode():
            logger.warning(f"{path} stays: it is not as it would be written, but corrected perhaps")
            continue
        write_atomically(path, text)
        paths.append(path)
    return paths


def _labelme(cases, path):
    """The LabelMe file at ``path`` of the image that all cases are of."""
    run, record = cases[0].run, cases[0].record
    truth = run.results.ground_truth
    names = {category["id"]: category["name"] for category in truth.categories}
    shown = [a for a in _annotations(run) if a["image_id"] == record["id"]]
    # Classes of the models' outlines have ids of their own.
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
    found = {
        "category_id": offset + categories[regions.category[at]]["id"],
        "bbox": regions.boxes[at].tolist(),
        "score": float(detections.score[at]),
    }
    if regions.masks is not None:
        found["segmentation"] = regions.masks[at]
    return found


def plot_label_errors(chosen, total, path):
    """
    Args:
        chosen (dict[str, list[Case]]): of each image to show, by its name, in their order.
        total (int): images that there are cases of.
        path (str or Path): the picture to write.

    Returns:
        matplotlib.figure.Figure: what was saved.

    Raises:
        FileNotFoundError: one of the images is not there.
    """
    figure, tiles = tile_grid(len(chosen), f"{len(chosen)} of {total} images, most suspect first")
    for axes, (file_name, cases) in zip(tiles, chosen.items(), strict=True):
        top = cases[0]
        summary = f"{KINDS[top.suspect.kind].title}: {top.suspect.score:.2f}"
        show_tile(axes, top.run.image_root, file_name, summary)
        truth = top.run.results.ground_truth.regions
        for region in (truth.image == top.suspect.image).nonzero()[0]:
            _draw(axes, truth, region, "outline")
        for case in cases:
            if case.suspect.detection is not None:
                _draw(axes, case.run.results.detections.regions, case.suspect.detection, "model")
    labels = {"outline": "outline in the data set", "model": "model that never saw the image"}
    handles = [Line2D([], [], label=labels[name], **line) for name, line in LINES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    save_figure(figure, path)
    return figure


def _draw(axes, regions, region, style):
    for line in region_contours(regions, region):
        axes.plot(*line.T, **LINES[style])
