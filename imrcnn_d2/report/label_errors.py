"""Possible label errors: annotations that a cross-validation's models contradict, for a review."""

import functools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from imrcnn_d2.data.audit import KINDS, Finding
from imrcnn_d2.data.formats.labelme import labelme_document
from imrcnn_d2.data.images import image_inside, path_inside
from imrcnn_d2.engine.checkpoint import EARLIER
from imrcnn_d2.evaluation.label_errors import LabelError, find_label_errors, pool_label_errors
from imrcnn_d2.evaluation.output import coco_result
from imrcnn_d2.report.plots import images
from imrcnn_d2.report.plots.style import save_figure
from imrcnn_d2.report.runs import Run, load_run
from imrcnn_d2.task import DETECTION
from imrcnn_d2.utils.files import csv_text, strict_json, write_atomically
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)


COLUMNS = ("rank", "kind", "score", "file_name", "test_set", "annotation_id", "iou", "models")
ANNOTATION, MODEL = (images.CONTOUR_STYLES[kind] for kind in ("ground truth", "hit"))


@dataclass(frozen=True, eq=False)
class Case:
    """A possible label error."""

    suspect: LabelError  # with the mean score over the models
    run: Run  # of the model that contradicts the annotation most
    models: int  # how many did not see the image in training

    @property
    def record(self) -> dict:
        """The image's COCO record."""
        return self.run.results.ground_truth.images[self.suspect.image]

    @functools.cached_property
    def row(self) -> dict:
        """A row of suspects.csv, without its rank."""
        fold, annotation = self.run.fold, {}
        if self.suspect.region is not None:
            annotation = _annotations(self.run)[self.suspect.region]
        return {
            "kind": self.suspect.kind,
            "score": round(self.suspect.score, 4),
            "file_name": self.record["file_name"],
            "test_set": "test" if fold is None else f"fold{fold['index']}",
            "annotation_id": annotation.get("id"),
            "iou": round(100 * self.suspect.iou, 1),
            "models": self.models,
        }

    @property
    def finding(self) -> Finding:
        """As of an audit."""
        row = self.row
        detail = f"{KINDS[row['kind']].title}: {row['score']:.2f} of 1, mean of {self.models} "
        detail += f"models; IoU {row['iou']:.0f} %." if self.suspect.iou else "models."
        place = (row["file_name"],), (row["test_set"],)
        fields = {key: row[key] for key in ("annotation_id", "score")}
        return Finding(row["kind"], *place, detail, **fields)


def gather_label_errors(root: str | Path) -> tuple[list[Case], list[Run]]:
    """Find the possible label errors of a cross-validation, or of any runs, in a folder; several
    models and seeds are pooled, see `pool_label_errors`. Return the cases by falling score, and the
    runs that they are from.

    Raises:
        FileNotFoundError: no run evaluated on its test set exists, or its files are gone.
        ValueError: a model was trained on images of its test set, an image is in test sets of
            different content, or whole images were classified.
    """
    root = Path(root)
    folders = {path.parents[2] for path in root.rglob("inference/*/metrics.json")}
    # What a training that was begun anew has moved aside was of other weights.
    folders = {folder for folder in folders if not folder.name.startswith(EARLIER)}
    groups = {}
    for folder in tqdm(sorted(folders), desc="Reading runs", unit="run"):
        try:
            run = load_run(folder)
        except FileNotFoundError as error:
            logger.warning(f"Left out: {error}")
            continue
        if run.task is not DETECTION:
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
    """A prediction for an image that was trained on does not test its annotation."""
    test = {record["file_name"] for record in run.results.ground_truth.images}
    trained = run.settings.get("DATASETS.TRAIN") or ()
    for name, source in (run.record.get("datasets") or {}).items():
        path = Path(source.get("gt") or "")
        if path.is_file() and (name in trained if trained else name.endswith("_train")):
            content = json.loads(path.read_text(encoding="utf-8"))
            seen = sorted(test & {image["file_name"] for image in content["images"]})
            if seen:
                raise ValueError(
                    f"{run.folder}: {len(seen)} of its test images, such as {seen[0]}, are in "
                    f"{path}, which the model was trained on."
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
    """Write ``suspects.csv`` (all, ranked), ``suspects.json`` (the first as an audit's findings),
    ``suspects.png`` (the first ``number`` images with both contours) and ``labelme/``, one file for
    each of these images with its annotations and, as "CLASS (model)", the detections that
    contradict them. Return the files written: LabelMe files that exist with another content stay.

    Raises:
        FileNotFoundError: one of the images does not exist.
    """
    output, by_image = Path(output), {}
    for case in cases:
        by_image.setdefault(case.record["file_name"], []).append(case)
    chosen = dict(list(by_image.items())[:number])
    paths = [output / name for name in ("suspects.csv", "suspects.json", "suspects.png")]
    rows = [{"rank": rank, **case.row} for rank, case in enumerate(cases, 1)]
    write_atomically(paths[0], csv_text(rows, COLUMNS))
    first = [case for case in cases if case.record["file_name"] in chosen]
    findings = [case.finding.as_json() for case in first]
    document = {"runs": [str(run.path) for run in runs], "findings": findings}
    write_atomically(paths[1], strict_json(document))
    _plot_label_errors(chosen, len(by_image), paths[2])
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
    run, image = cases[0].run, cases[0].record
    truth = run.results.ground_truth
    names = {category["id"]: category["name"] for category in truth.categories}
    shown = [a for a in _annotations(run) if a["image_id"] == image["id"]]
    # Classes of the models' detections have separate ids.
    offset = max(names) + 1
    names |= {offset + number: f"{name} (model)" for number, name in names.items()}
    for case in cases:
        if case.suspect.detection is not None:
            record = coco_result(case.run.results.detections, truth, case.suspect.detection)
            shown.append({**record, "category_id": offset + record["category_id"]})
    photo = image_inside(run.image_root, image["file_name"], run.gt_path).resolve()
    relative = os.path.relpath(photo, path.parent.resolve())
    return labelme_document(shown, names, relative, image["height"], image["width"])


def _plot_label_errors(chosen, total, path):
    """Plot the annotations and the detections that contradict them, in images by their names."""
    title = f"{len(chosen)} of {total} images, most suspicious first"
    tiles = []
    for file_name, (case, *_) in chosen.items():
        summary = f"{KINDS[case.suspect.kind].title}: {case.suspect.score:.2f}"
        tiles.append((case.run.image_root, file_name, summary))
    labels = {"annotation in the data set": ANNOTATION, "model that never saw the image": MODEL}
    figure, grid = images.tile_sheet(title, tiles, labels)
    for axes, cases in zip(grid, chosen.values(), strict=True):
        suspect, truth = cases[0].suspect, cases[0].run.results.ground_truth.regions
        for row in (truth.image == suspect.image).nonzero()[0]:
            images.plot_contours(axes, truth, row, ANNOTATION)
        for case in cases:
            if case.suspect.detection is not None:
                regions = case.run.results.detections.regions
                images.plot_contours(axes, regions, case.suspect.detection, MODEL)
    save_figure(figure, path)
