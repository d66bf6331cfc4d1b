"""Test images with contours, distortions or Grad-CAM, and sheets of all images of a folder."""

import logging
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw
from tqdm import tqdm

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES, distort
from imrcnn_d2.data.images import image_inside, list_files, open_image, read_image
from imrcnn_d2.data.mapper import ClassificationMapper
from imrcnn_d2.evaluation import LesionResults
from imrcnn_d2.evaluation.detection.inputs import Regions
from imrcnn_d2.modeling.classifier import ImageClassifier, grad_cam
from imrcnn_d2.report.plots.style import GREEN, PURPLE, SKY, VERMILION, YELLOW, save_figure
from imrcnn_d2.utils.files import read_rows

logger = logging.getLogger(__name__)


# Sky blue and purple are the ground truth, yellow and vermilion the model's detections.
CONTOUR_STYLES = {
    "ground truth": dict(color=SKY, linestyle="-", linewidth=1.6),
    "hit": dict(color=YELLOW, linestyle=(0, (4, 2)), linewidth=1.6),
    "missed lesion": dict(color=PURPLE, linestyle=(0, (1, 1)), linewidth=2.8),
    "false alarm": dict(color=VERMILION, linestyle=(0, (5, 1.2, 1, 1.2)), linewidth=2.2),
}
# Halos set the lines off from mucosa, which comes in all lightnesses and is orange itself: errors
# in white, the rest in black.
LIGHT_HALO = ("missed lesion", "false alarm")
HALO_WIDTH = 4.2


def halo(colour: str = "black", alpha: float = 0.55) -> list[patheffects.AbstractPathEffect]:
    """``path_effects`` of a contour."""
    return [patheffects.withStroke(linewidth=HALO_WIDTH, foreground=colour, alpha=alpha)]


DARK, LIGHT = halo("black", 0.5), halo("white", 0.9)
CONTOURS = {
    kind: {**line, "path_effects": LIGHT if kind in LIGHT_HALO else DARK}
    for kind, line in CONTOUR_STYLES.items()
}
TILE = 2.4  # inches
NAME_LENGTH = 30


def regions_by_kind(results: LesionResults, position: int) -> list[tuple[str, Regions, np.ndarray]]:
    """The regions of the image at ``position`` in ``results.ground_truth.images``: key of
    ``CONTOUR_STYLES``, the regions, and which (K,) of them are of that kind, in the order of
    plotting. Crowds, and detections that only match one, are left out.
    """
    truth, detections = results.ground_truth.regions, results.detections.regions
    lesions = np.flatnonzero((truth.image == position) & ~results.ground_truth.crowd)
    shown = np.flatnonzero(results.above_threshold & (detections.image == position))
    matched = results.matching.gt[shown]
    return [
        ("ground truth", truth, np.intersect1d(lesions, matched)),
        ("missed lesion", truth, np.setdiff1d(lesions, matched)),
        ("false alarm", detections, shown[matched < 0]),
        ("hit", detections, shown[matched >= 0]),
    ]


def region_contours(regions: Regions, row: int) -> list[np.ndarray]:
    """Closed lines (K, 2) of xy around a region, holes included; around its box where there are no
    masks. Whole numbers are the centres of pixels.
    """
    if regions.masks is not None:
        return mask_contours(regions.masks[row])
    x, y, width, height = regions.boxes[row]
    corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    return [np.array(corners) - 0.5]


def mask_contours(rle: dict) -> list[np.ndarray]:
    """Closed lines around a mask in compressed RLE, as of `region_contours`."""
    contours, _ = cv2.findContours(mask_util.decode(rle), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [np.concatenate([contour[:, 0], contour[:1, 0]]) for contour in contours]


def plot_contours(axes: Axes, regions: Regions, row: int, style: Mapping):
    """Plot the contours of a region onto a tile of `show_tile`."""
    for line in region_contours(regions, row):
        axes.plot(*line.T, **style)


def contour_legend(figure: Figure, styles: Mapping[str, Mapping], columns: int = 4):
    """A legend of contours, by label, under the tiles."""
    handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    columns = min(len(handles), columns)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)


def choose_images(rows: list[list[dict]], number: int) -> list[int]:
    """Choose at most ``number`` images and return their positions, worst first: half are the worst,
    by the number of misses and false alarms, then by overlap; the others are spread evenly over the
    rest. ``rows`` holds for each image its row of ``per_image`` from each model.
    """

    def badness(position):
        overlaps = [r["union_iou"] for r in rows[position] if not math.isnan(r["union_iou"])]
        errors = sum(row["FP"] + row["FN"] for row in rows[position])
        return errors, 100 - np.mean(overlaps) if overlaps else 0.0

    ranked = sorted(range(len(rows)), key=badness, reverse=True)
    if len(ranked) <= number:
        return ranked
    worst, rest = ranked[: number // 2], ranked[number // 2 :]
    spread = np.linspace(0, len(rest) - 1, number - len(worst)).round().astype(int)
    return worst + [rest[i] for i in spread]


def plot_contact_sheet(
    results: LesionResults, image_root: str | Path, path: str | Path, *, max_images: int = 16
) -> Figure:
    """Show ground truth, hits, misses and false alarms in test images, see `choose_images`.
    ``image_root`` is the folder that ``file_name`` is relative to.

    Raises:
        FileNotFoundError: one of the images does not exist.
    """
    chosen = choose_images([[row] for row in results.per_image], max_images)
    title = f"{len(chosen)} of {len(results.per_image)} images, worst first"
    if results.detections.scored:
        title += f"; detections with score ≥ {results.meta['tau']:g}"
    figure, tiles = tile_grid(len(chosen), title)
    for axes, position in zip(tiles, chosen, strict=True):
        file_name = results.ground_truth.images[position]["file_name"]
        show_tile(axes, image_root, file_name, _summary(results.per_image[position]))
        for kind, regions, rows in regions_by_kind(results, position):
            for row in rows:
                plot_contours(axes, regions, row, CONTOURS[kind])
    contour_legend(figure, CONTOURS)
    return save_figure(figure, path)


def _summary(row):
    """The outcome of an image in a few words."""
    score = "" if math.isnan(row["score"]) else f"score {row['score']:.2f} · "
    if not row["n_gt"]:
        return f"no lesion · {score}".removesuffix(" · ")
    for key, name in (("union_iou", "IoU"), ("iou_box", "box IoU")):
        if not math.isnan(row[key]):
            return f"{score}{name} {row[key]:.0f} %"
    return f"{score}missed"


def tile_grid(number: int, title: str) -> tuple[Figure, list[Axes]]:
    """A sheet with ``number`` empty tiles under a title."""
    columns = min(4, max(number, 1))
    rows = max(math.ceil(number / columns), 1)
    figure = Figure(figsize=(columns * TILE, rows * (TILE + 0.36) + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    return figure, list(grid[:number])


def show_tile(axes: Axes, image_root: str | Path, file_name: str, summary: str):
    """Show an image, whose pixels become the axes' coordinates, under its name and a summary.

    Raises:
        FileNotFoundError: the image does not exist.
        BadInputError: it cannot be read, or lies outside ``image_root``.
    """
    axes.imshow(read_image(image_inside(Path(image_root), file_name, image_root)))
    axes.autoscale(False)  # a box may lead out of the image
    name = Path(file_name).name
    if len(name) > NAME_LENGTH:
        name = f"{name[: NAME_LENGTH // 2]}…{name[-NAME_LENGTH // 2 + 1 :]}"
    axes.set_title(f"{name}\n{summary}", fontsize=7.5)


def plot_distortions(image: np.ndarray, path: str | Path, seed: int | Sequence[int] = 0) -> Figure:
    """Show an (H, W, 3) uint8 RGB image under every distortion: one row each, severity rising to
    the right. ``seed`` is of directions and places.
    """
    figure = Figure(figsize=(1.5 * (1 + len(SEVERITIES)), 1.6 * len(DISTORTIONS)))
    grid = figure.subplots(len(DISTORTIONS), 1 + len(SEVERITIES), squeeze=False)
    for (name, distortion), row in zip(DISTORTIONS.items(), grid, strict=True):
        for severity, axes in enumerate(row):
            axes.imshow(distort(image, name, severity, seed) if severity else image)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            level = f"{distortion.levels[severity - 1]:g}" if severity else "none"
            axes.set_title(level, fontsize=7.5, pad=2)
        row[0].set_ylabel(f"{distortion.title}\n{distortion.unit}", fontsize=7.5)
    figure.subplots_adjust(0.07, 0.01, 0.99, 0.98, wspace=0.03, hspace=0.14)
    return save_figure(figure, path, dpi=110)


GRAD_CAM_TILE = 1.7  # inches
GRAD_CAMS = 3  # hits, and misses, of a class


def plot_test_grad_cams(cfg: CfgNode, model: ImageClassifier):
    """Plot ``grad_cam.png`` next to the files of each evaluation of DATASETS.TEST: hits and misses
    of each class, with Grad-CAM of the predicted class. Only logs a hint where the grad-cam package
    is not installed, or the network has no feature maps (a ViT).
    """
    if find_spec("pytorch_grad_cam") is None:
        logger.info("No Grad-CAM plots: they need a package (pip install grad-cam)")
        return
    mapper = ClassificationMapper(cfg, is_train=False)
    for name in cfg.DATASETS.TEST:
        folder = Path(cfg.OUTPUT_DIR) / "inference" / name
        try:
            _plot_grad_cams(model, mapper, name, folder)
        except ValueError as error:
            logger.warning("No Grad-CAM plots: %s", error)
            return
        logger.info("Grad-CAM: %s", folder / "grad_cam.png")


def _plot_grad_cams(model, mapper, dataset_name, folder):
    rows = read_rows(folder / "per_image.csv", ("image_id", "label", "predicted", "score"))
    records = {str(record["image_id"]): record for record in DatasetCatalog.get(dataset_name)}
    classes = MetadataCatalog.get(dataset_name).thing_classes
    chosen = choose_hits_and_misses(rows, classes, GRAD_CAMS)
    size = 2 * GRAD_CAMS * GRAD_CAM_TILE, len(classes) * (GRAD_CAM_TILE + 0.45) + 0.7
    figure = Figure(figsize=size, layout="constrained")
    title = "Grad-CAM of the predicted class: what speaks for it is bright. Left hits, evenly "
    title += "spread over their scores; right misses, most confident first"
    figure.suptitle(title, fontsize=8, wrap=True)
    grid = figure.subplots(len(classes), 2 * GRAD_CAMS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, (hits, misses) in zip(grid, chosen.values(), strict=True):
        tiles = [*zip(line, hits, strict=False), *zip(line[GRAD_CAMS:], misses, strict=False)]
        for axes, row in tiles:
            _show_grad_cam(axes, model, mapper(records[row["image_id"]]), row, classes)
    save_figure(figure, folder / "grad_cam.png")


def choose_hits_and_misses(
    rows: list[dict], classes: list[str], number: int
) -> dict[str, tuple[list[dict], list[dict]]]:
    """At most ``number`` hits of each class, evenly spread over their scores, and as many misses,
    by falling score. ``rows`` of per_image.csv have "label", "predicted" and "score".
    """
    chosen = {}
    for name in classes:
        images = [row for row in rows if row["label"] == name]
        images.sort(key=lambda row: -float(row["score"]))
        hits = [row for row in images if row["predicted"] == name]
        misses = [row for row in images if row["predicted"] != name]
        spread = np.linspace(0, len(hits) - 1, min(number, len(hits))).astype(int)
        chosen[name] = ([hits[i] for i in spread], misses[:number])
    return chosen


def _show_grad_cam(axes, model, sample, row, classes):
    (heat,) = grad_cam(model, [sample], [classes.index(row["predicted"])])
    axes.imshow(sample["image"].permute(1, 2, 0).numpy())
    axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.45)
    hit = row["label"] == row["predicted"]
    prediction = f"predicted {'so' if hit else row['predicted']}, {float(row['score']):.2f}"
    axes.set_title(f"{row['label']}\n{prediction}", fontsize=7, color=GREEN if hit else VERMILION)


SHEET_COLUMNS, SHEET_ROWS = 5, 4
SHEET_TILE = 352  # pixels: text in the image stays recognisable
SHEET_NAME = 16  # pixels for the line below


def plot_review_sheets(images: Path, folder: Path) -> list[Path]:
    """Show 20 images of a folder per sheet, each with its name, in the order of their names; write
    and return sheet_001.jpg, sheet_002.jpg, ... in ``folder``.

    Raises:
        FileExistsError: the folder is not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; choose another folder for the sheets")
    paths, sheets = list_files(images), []
    per_sheet = SHEET_COLUMNS * SHEET_ROWS
    for start in tqdm(range(0, len(paths), per_sheet), desc="Review sheets", unit="sheet"):
        sheets.append(folder / f"sheet_{len(sheets) + 1:03d}.jpg")
        _review_sheet(paths[start : start + per_sheet], images).save(sheets[-1], quality=92)
    return sheets


def _review_sheet(paths, root):
    rows = math.ceil(len(paths) / SHEET_COLUMNS)
    size = (SHEET_COLUMNS * SHEET_TILE, rows * (SHEET_TILE + SHEET_NAME))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, path in enumerate(paths):
        row, column = divmod(i, SHEET_COLUMNS)
        x, y = column * SHEET_TILE, row * (SHEET_TILE + SHEET_NAME)
        with open_image(path) as image:
            image.thumbnail((SHEET_TILE - 4, SHEET_TILE - 4))
            sheet.paste(image, (x + 2, y + 2))
        draw.text((x + 4, y + SHEET_TILE), path.relative_to(root).as_posix(), "black")
    return sheet
