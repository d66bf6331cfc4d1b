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

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES, distort
from imrcnn_d2.data.images import image_inside, list_files, open_image, read_image
from imrcnn_d2.data.mapper import ClassificationMapper
from imrcnn_d2.evaluation import LesionResults
from imrcnn_d2.evaluation.detection.inputs import Regions
from imrcnn_d2.modeling.classifier import ImageClassifier, grad_cam
from imrcnn_d2.report.names import threshold_name
from imrcnn_d2.report.plots.style import GREEN, SKY, VERMILION, YELLOW, save_figure
from imrcnn_d2.utils.files import install_extra, read_rows
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)


# The ground truth is blue, the model yellow; errors are dashed.
CONTOUR_STYLES = {
    "ground truth": dict(color=SKY, linestyle="-", linewidth=2.4),
    "hit": dict(color=YELLOW, linestyle="-", linewidth=1.1),
    "missed lesion": dict(color=SKY, linestyle=(0, (2.2, 1.1)), linewidth=2.2),
    "false alarm": dict(color=YELLOW, linestyle=(0, (2.2, 1.1)), linewidth=2.0),
}
HALO_WIDTH = 3.4
# Points: lines around smaller regions are thinner in proportion; dashes around still smaller ones
# would no longer be seen as a line: theirs are on a ring of this diameter.
THINNER_BELOW, SOLID_BELOW, RING = 24, 9, 18
SHEET_IMAGES = 12
COLUMNS = 4
# Of a sheet, in inches.
WIDTH, TILE, GAP = 9.6, 2.4, 0.08
TITLE, LABELS, LEGEND = 0.26, 0.4, 0.36
NAME_LENGTH = 30


def halo(width: float = HALO_WIDTH) -> list[patheffects.AbstractPathEffect]:
    """``path_effects`` that set a line off from mucosa, which comes in all lightnesses."""
    return [patheffects.withStroke(linewidth=width, foreground="black", alpha=0.6)]


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


def plot_contours(axes: Axes, regions: Regions, row: int, style: Mapping, label: str = ""):
    """Plot the contours of a region as one line onto a tile of `tile_sheet`, and a label on it."""
    lines = region_contours(regions, row)
    if not lines:  # an empty mask
        return
    points = np.concatenate([[*line, (np.nan, np.nan)] for line in lines])[:-1]
    corner, extent = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    size = axes.get_position().size * axes.figure.get_size_inches() * 72
    scale = min(size / (right - left, bottom - top))  # points per pixel
    length = max(extent - corner) * scale
    thinner = min(max(length / THINNER_BELOW, 0.5), 1)
    style = {**style, "linewidth": thinner * style["linewidth"]}
    if length < SOLID_BELOW and style["linestyle"] != "-":
        angles = np.linspace(0, 2 * np.pi, 33)
        ring = RING / scale / 2 * np.column_stack([np.cos(angles), np.sin(angles)])
        dashed = {**style, "label": "_ring", "linewidth": 1.1}
        axes.plot(*((corner + extent) / 2 + ring).T, path_effects=halo(2.2), **dashed)
        style["linestyle"] = "-"
    axes.plot(*points.T, path_effects=halo(thinner * HALO_WIDTH), **style)
    if label:
        x = min(max(corner[0], left), right - len(label) * 4 / scale)
        y = max(corner[1] - 1.5 / scale, top + 7 / scale)
        taken = [text.get_position() for text in axes.texts]
        while any(abs(x - u) < 14 / scale and abs(y - v) < 6 / scale for u, v in taken):
            y += 6.5 / scale  # below other labels
        text = dict(color="white", fontsize=6, clip_on=True, path_effects=halo(1.5))
        axes.text(x, y, label, **text)


def rank_images(rows: list[list[dict]]) -> list[int]:
    """Positions of images, worst first, by the number of misses and false alarms, then by overlap.
    ``rows`` holds for each image its row of ``per_image`` from each model.
    """

    def badness(position):
        overlaps = [r["union_iou"] for r in rows[position] if not math.isnan(r["union_iou"])]
        errors = sum(row["FP"] + row["FN"] for row in rows[position])
        return errors, 100 - np.mean(overlaps) if overlaps else 0.0

    return sorted(range(len(rows)), key=badness, reverse=True)


def choose_images(rows: list[list[dict]], number: int) -> list[int]:
    """Choose at most ``number`` images of `rank_images`: half are the worst, the others are spread
    evenly over the rest.
    """
    ranked = rank_images(rows)
    if len(ranked) <= number:
        return ranked
    worst, rest = ranked[: number // 2], ranked[number // 2 :]
    spread = np.linspace(0, len(rest) - 1, number - len(worst)).round().astype(int)
    return worst + [rest[i] for i in spread]


def choose_typical(ranked: list[int], number: int) -> list[int]:
    """At most ``number`` of `rank_images`, evenly spread, those nearest to the median first."""
    number = min(number, len(ranked))
    places = [int((i + 0.5) * len(ranked) / number) for i in range(number)]
    places.sort(key=lambda place: abs(place - (len(ranked) - 1) / 2))
    return [ranked[place] for place in places]


def plot_contact_sheet(
    results: LesionResults,
    image_root: str | Path,
    path: str | Path,
    *,
    worst: bool = False,
    max_images: int = SHEET_IMAGES,
) -> Figure:
    """Show ground truth, hits, misses and false alarms in test images: see `choose_typical`, or the
    worst ones of `rank_images`. ``image_root`` is the folder that ``file_name`` is relative to.

    Raises:
        FileNotFoundError: one of the images does not exist.
    """
    ranked = rank_images([[row] for row in results.per_image])
    chosen = ranked[:max_images] if worst else choose_typical(ranked, max_images)
    order = "worst first" if worst else "spread evenly from best to worst, the typical ones first"
    title = f"{len(chosen)} of {len(ranked)} images, {order}; "
    if results.detections.scored:
        title += f"{threshold_name(results.meta['tau'], results.detections.mapped)}, "
    matched = "masks" if results.meta["iou_type"] == "segm" else "boxes"
    title += f"hit: IoU of {matched} ≥ {results.meta['iou_threshold']:g}"
    rows = [results.per_image[position] for position in chosen]
    tiles = [(image_root, row["file_name"], _summary(row, matched)) for row in rows]
    figure, grid = tile_sheet(title, tiles, CONTOUR_STYLES)
    for axes, position in zip(grid, chosen, strict=True):
        for kind, regions, rows in regions_by_kind(results, position):
            for row in rows:
                label = _label(results, kind, row)
                plot_contours(axes, regions, row, {**CONTOUR_STYLES[kind], "label": kind}, label)
    return save_figure(figure, path)


def _summary(row, regions):
    """What was found in an image: mean IoU of the hits, misses and false alarms."""
    words = [] if row["n_gt"] else ["no lesion"]
    if row["TP"]:
        name, key = ("IoU", "iou") if regions == "masks" else ("box IoU", "iou_box")
        words.append(f"{name} {row[key]:.0f} %")
    if row["FN"]:
        words.append(f"{row['FN']} missed")
    if row["FP"]:
        words.append(f"{row['FP']} false alarm{'s' if row['FP'] > 1 else ''}")
    return " · ".join(words)


def _label(results, kind, row):
    """Class, where there are several, and score of a detection; class of a missed lesion."""
    words = []
    detected = kind in ("hit", "false alarm")
    source = results.detections if detected else results.ground_truth
    if len(results.meta["classes"]) > 1 and kind != "ground truth":
        words.append(results.meta["classes"][source.regions.category[row]])
    if detected and results.detections.scored:
        words.append(f"{results.detections.score[row]:.2f}")
    return " ".join(words)


def tile_sheet(
    title: str, tiles: Sequence[tuple[str | Path, str, str]], styles: Mapping[str, Mapping]
) -> tuple[Figure, list[Axes]]:
    """A sheet of images, each given as folder, file name in it and summary, with a legend of
    contours by label. The images of a row have one height and fill the width; the pixels of an
    image are its axes' coordinates.

    Raises:
        FileNotFoundError: an image does not exist.
        BadInputError: it cannot be read, or lies outside its folder.
    """
    pixels = [read_image(image_inside(Path(root), name, root)) for root, name, _ in tiles]
    # An image that is longer still lies in a cell of this shape.
    aspects = [min(max(image.shape[1] / image.shape[0], 0.5), 4) for image in pixels]
    rows = [range(i, min(i + COLUMNS, len(tiles))) for i in range(0, len(tiles), COLUMNS)]
    heights = [(WIDTH - GAP * (len(row) + 1)) / sum(aspects[i] for i in row) for row in rows]
    if rows and len(rows[-1]) < COLUMNS:
        heights[-1] = min(heights[-1], heights[0] if len(rows) > 1 else TILE)
    legend_rows = math.ceil(len(styles) / COLUMNS)
    total = TITLE + sum(heights) + LABELS * len(rows) + LEGEND * legend_rows
    figure = Figure(figsize=(WIDTH, total))
    figure.text(0.5, 1 - 0.1 / total, title, fontsize=9, ha="center", va="top")
    y, grid = total - TITLE, []
    for row, height in zip(rows, heights, strict=True):
        x, y = GAP, y - LABELS - height
        for i in row:
            width = aspects[i] * height
            axes = figure.add_axes((x / WIDTH, y / total, width / WIDTH, height / total))
            axes.axis("off")
            axes.imshow(pixels[i])
            axes.autoscale(False)  # a box may lead out of the image
            axes.set_title(*_tile_title(*tiles[i][1:], width))
            x += width + GAP
            grid.append(axes)
    shown = {label: {**style, "path_effects": halo()} for label, style in styles.items()}
    handles = [Line2D([], [], label=label, **style) for label, style in shown.items()]
    options = dict(ncols=min(len(handles), COLUMNS), fontsize=9, frameon=False, handlelength=3.2)
    figure.legend(handles=handles, loc="lower center", **options)
    return figure, grid


def _tile_title(file_name, summary, width):
    name = Path(file_name).name
    if len(name) > NAME_LENGTH:
        name = f"{name[: NAME_LENGTH // 2]}…{name[-NAME_LENGTH // 2 + 1 :]}"
    longest = max(len(name), len(summary))
    return f"{name}\n{summary}", {"fontsize": min(7.5, 72 * width / (0.55 * longest))}


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
        logger.info("No Grad-CAM plots: they need %s", install_extra("gradcam"))
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
