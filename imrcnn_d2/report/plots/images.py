"""Sheets of all images of a folder, for a person to look through."""

import logging
import math
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw
from tqdm import tqdm

from imrcnn_d2.data.images import image_inside, list_files, open_image, read_image
from imrcnn_d2.data.mapper import ClassificationMapper
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.modeling.classifier import grad_cam
from imrcnn_d2.report.plots.style import GREEN, PURPLE, SKY, VERMILION, YELLOW, save_figure
from imrcnn_d2.utils.files import read_rows

__all__ = [
    "HALO_WIDTH",
    "LIGHT_HALO",
    "STYLES",
    "choose_hits_and_misses",
    "choose_images",
    "plot_contact_sheet",
    "plot_grad_cam",
    "plot_review_sheets",
    "plot_test_grad_cams",
    "mask_contours",
    "outlines",
    "regions_by_kind",
    "show_tile",
    "tile_grid",
]

logger = logging.getLogger(__name__)


# Sky blue and purple are the truth, yellow and vermilion the model's word.
STYLES = {
    "ground truth": dict(color=SKY, linestyle="-", linewidth=1.6),
    "hit": dict(color=YELLOW, linestyle=(0, (4, 2)), linewidth=1.6),
    "missed lesion": dict(color=PURPLE, linestyle=(0, (1, 1)), linewidth=2.8),
    "false alarm": dict(color=VERMILION, linestyle=(0, (5, 1.2, 1, 1.2)), linewidth=2.2),
}
# Halos set the lines off from mucosa, which comes in all lightnesses and is orange itself: what
# went wrong in white, the rest in black.
LIGHT_HALO = ("missed lesion", "false alarm")
HALO_WIDTH = 4.2


def regions_by_kind(scored, position):
    """
    Args:
        scored (LesionResults): what a model found.
        position (int): of the image among ``scored.ground_truth.images``.

    Returns:
        list[tuple[str, Regions, np.ndarray]]: key of ``STYLES``, and which (K,) of the regions are
        of that kind, in the order of drawing. Crowds, and detections that only match one, are not.
    """
    truth, found = scored.ground_truth.regions, scored.detections.regions
    lesions = np.flatnonzero((truth.image == position) & ~scored.ground_truth.crowd)
    shown = np.flatnonzero(scored.above_threshold & (found.image == position))
    matched = scored.matching.gt[shown]
    return [
        ("ground truth", truth, np.intersect1d(lesions, matched)),
        ("missed lesion", truth, np.setdiff1d(lesions, matched)),
        ("false alarm", found, shown[matched < 0]),
        ("hit", found, shown[matched >= 0]),
    ]


def outlines(regions, region):
    """
    Args:
        regions (Regions):
        region (int): position of the one asked for.

    Returns:
        list[np.ndarray]: closed lines (K, 2) of xy around it, holes included. Whole numbers are the
        centres of pixels. Where there are no masks, its box.
    """
    if regions.masks is None:
        x, y, width, height = regions.boxes[region]
        corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        return [np.array(corners) - 0.5]
    return mask_contours(regions.masks[region])


def mask_contours(rle):
    """
    Args:
        rle (dict): compressed RLE of a mask.

    Returns:
        list[np.ndarray]: as of :func:`outlines`.
    """
    contours, _ = cv2.findContours(mask_util.decode(rle), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [np.concatenate([contour[:, 0], contour[:1, 0]]) for contour in contours]


def choose_images(rows, number):
    """
    Choose which images stand for all. The first half of the choice are the worst, by the number of
    misses and false alarms, then by overlap; the other half is spread evenly over the rest, so that
    failures are shown without being all that is shown.

    Args:
        rows (list[list[dict]]): for each image, its row of ``per_image`` from each model.
        number (int): how many at most.

    Returns:
        list[int]: positions of the chosen, worst first.
    """

    def badness(position):
        own = rows[position]
        overlaps = [row["union_iou"] for row in own if not math.isnan(row["union_iou"])]
        errors = sum(row["FP"] + row["FN"] for row in own)
        return errors, 100 - np.mean(overlaps) if overlaps else 0.0

    ranked = sorted(range(len(rows)), key=badness, reverse=True)
    if len(ranked) <= number:
        return ranked
    worst, rest = ranked[: number // 2], ranked[number // 2 :]
    spread = np.linspace(0, len(rest) - 1, number - len(worst)).round().astype(int)
    return worst + [rest[i] for i in spread]


DARK = [patheffects.withStroke(linewidth=HALO_WIDTH, foreground="black", alpha=0.5)]
LIGHT = [patheffects.withStroke(linewidth=HALO_WIDTH, foreground="white", alpha=0.9)]
OUTLINES = {
    kind: {**line, "path_effects": LIGHT if kind in LIGHT_HALO else DARK}
    for kind, line in STYLES.items()
}
COLUMNS = 4
TILE = 2.4  # inches
NAME_LENGTH = 30


def plot_contact_sheet(gt, results, image_root, path, *, tau=0.7, max_images=16):
    """
    Outline ground truth, hits, misses and false alarms in a choice of test images.

    The first half of the choice are the worst images, by the number of misses and false alarms,
    then by overlap; the other half is spread evenly over the rest, so that the sheet shows failures
    without being made of them. Worst first.

    Args:
        gt (dict, COCO, str or Path): COCO ground truth, see :func:`evaluate_lesions`.
        results (list[dict], dict, str or Path): COCO results, likewise.
        image_root (str or Path): folder that ``file_name`` is relative to.
        path (str or Path): the picture to write, .png, .jpg or .pdf.
        tau (float): score from which on a detection is shown.
        max_images (int): tiles at most.

    Returns:
        matplotlib.figure.Figure: what was saved.

    Raises:
        FileNotFoundError: if one of the images is not there.
        ValueError: on bad input, see :func:`evaluate_lesions`.
    """
    scored = evaluate_lesions(gt, results, tau=tau)
    chosen = choose_images([[row] for row in scored.per_image], max_images)
    figure, tiles = tile_grid(
        len(chosen),
        f"{len(chosen)} of {len(scored.per_image)} images, worst first; "
        f"detections with score ≥ {tau:g}",
    )
    for axes, position in zip(tiles, chosen, strict=True):
        _draw_tile(axes, scored, position, Path(image_root))
    handles = [Line2D([], [], label=name, **line) for name, line in OUTLINES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    save_figure(figure, path)
    return figure


def tile_grid(number, title):
    """
    Args:
        number (int): of tiles.
        title (str): above them all.

    Returns:
        tuple[Figure, list[Axes]]: a sheet with that many empty tiles.
    """
    columns = min(COLUMNS, max(number, 1))
    rows = max(math.ceil(number / columns), 1)
    figure = Figure(figsize=(columns * TILE, rows * (TILE + 0.36) + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    return figure, list(grid[:number])


def show_tile(axes, image_root, file_name, summary):
    """
    Args:
        axes (matplotlib.axes.Axes): gets the image, to draw on in its pixels, and its name.
        image_root (Path): folder that ``file_name`` is relative to.
        file_name (str):
        summary (str): a few words below the name.

    Raises:
        FileNotFoundError: the image is not there.
        BadInputError: it cannot be read, or is no file of that folder.
    """
    axes.imshow(read_image(image_inside(image_root, file_name, image_root)))
    axes.autoscale(False)  # a box may lead out of the image
    name = Path(file_name).name
    if len(name) > NAME_LENGTH:
        name = f"{name[: NAME_LENGTH // 2]}…{name[-NAME_LENGTH // 2 + 1 :]}"
    axes.set_title(f"{name}\n{summary}", fontsize=7.5)


def _draw_tile(axes, scored, position, image_root):
    record, row = scored.ground_truth.images[position], scored.per_image[position]
    show_tile(axes, image_root, record["file_name"], _summary(row))
    for kind, regions, chosen in regions_by_kind(scored, position):
        for region in chosen:
            for line in outlines(regions, region):
                axes.plot(*line.T, **OUTLINES[kind])


def _summary(row):
    """What happened in an image, in a few words."""
    score = f"score {row['score']:.2f}"
    if not row["n_gt"]:
        return f"no lesion · {score}"
    if not math.isnan(row["union_iou"]):
        return f"{score} · IoU {row['union_iou']:.0f} %"
    if not math.isnan(row["iou_box"]):
        return f"{score} · box IoU {row['iou_box']:.0f} %"
    return f"{score} · missed"


GRAD_CAM_TILE = 1.7  # inches
OPACITY = 0.45


def plot_test_grad_cams(cfg, model):
    """
    Draw ``grad_cam.png`` beside the files of each evaluation of DATASETS.TEST; nothing but a hint
    where the grad-cam package is not installed, or the network has no feature maps (a ViT).

    Args:
        cfg (CfgNode): of the evaluation.
        model (ImageClassifier): that was evaluated.
    """
    if find_spec("pytorch_grad_cam") is None:
        logger.info("No Grad-CAM pictures: they need a package (pip install grad-cam)")
        return
    mapper = ClassificationMapper(cfg, is_train=False)
    for name in cfg.DATASETS.TEST:
        folder = Path(cfg.OUTPUT_DIR) / "inference" / name
        try:
            plot_grad_cam(model, mapper, name, folder)
        except ValueError as error:
            logger.warning("No Grad-CAM pictures: %s", error)
            return
        logger.info("Grad-CAM: %s", folder / "grad_cam.png")


def plot_grad_cam(model, mapper, dataset_name, folder, *, each=3):
    """
    Overlay hits and misses of each class with Grad-CAM of the class that was called.

    Args:
        model (ImageClassifier): whose predictions ``per_image.csv`` has.
        mapper (callable): dataset dict -> what the model takes.
        dataset_name (str): a registered data set of images with classes.
        folder (str or Path): of the evaluation; ``grad_cam.png`` is written there.
        each (int): hits, and misses, of a class at most.

    Returns:
        matplotlib.figure.Figure: what was saved.
    """
    rows = read_rows(Path(folder) / "per_image.csv", ("image_id", "label", "predicted", "score"))
    records = {str(record["image_id"]): record for record in DatasetCatalog.get(dataset_name)}
    classes = MetadataCatalog.get(dataset_name).thing_classes
    chosen = choose_hits_and_misses(rows, classes, each)
    figure = Figure(
        figsize=(2 * each * GRAD_CAM_TILE, len(classes) * (GRAD_CAM_TILE + 0.45) + 0.7),
        layout="constrained",
    )
    figure.suptitle(
        "Grad-CAM of the class called: what speaks for it is bright. Left hits, evenly spread over "
        "their scores; right misses, most confident first",
        fontsize=8,
        wrap=True,
    )
    grid = figure.subplots(len(classes), 2 * each, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, name in zip(grid, classes, strict=True):
        hits, misses = chosen[name]
        for axes, row in [*zip(line, hits, strict=False), *zip(line[each:], misses, strict=False)]:
            _draw_grad_cam_tile(axes, model, mapper(records[row["image_id"]]), row, classes)
    save_figure(figure, Path(folder) / "grad_cam.png")
    return figure


def choose_hits_and_misses(rows, classes, each):
    """
    Args:
        rows (list[dict]): of per_image.csv: "label", "predicted" and "score" of each image.
        classes (list[str]): names.
        each (int): how many of a kind at most.

    Returns:
        dict[str, tuple[list[dict], list[dict]]]: of each class hits, evenly spread over their
        scores, and misses, by falling score.
    """
    chosen = {}
    for name in classes:
        own = sorted(
            (row for row in rows if row["label"] == name), key=lambda row: -float(row["score"])
        )
        hits = [row for row in own if row["predicted"] == name]
        spread = np.linspace(0, len(hits) - 1, min(each, len(hits))).astype(int)
        misses = [row for row in own if row["predicted"] != name]
        chosen[name] = ([hits[i] for i in spread], misses[:each])
    return chosen


def _draw_grad_cam_tile(axes, model, sample, row, classes):
    (heat,) = grad_cam(model, [sample], [classes.index(row["predicted"])])
    axes.imshow(sample["image"].permute(1, 2, 0).numpy())
    axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=OPACITY)
    hit = row["label"] == row["predicted"]
    said = f"{row['label']}\ncalled so" if hit else f"{row['label']}\ncalled {row['predicted']}"
    axes.set_title(
        f"{said}, {float(row['score']):.2f}", fontsize=7, color=GREEN if hit else VERMILION
    )


_COLUMNS, _ROWS = 5, 4
_TILE = 352  # pixels: writing can still be told from mucosa
_NAME = 16  # pixels for the line below


def plot_review_sheets(images: Path, folder: Path) -> list[Path]:
    """Draws 20 images a sheet, each with its name, in the order of their names.

    Args:
        images: the folder of images.
        folder: for sheet_001.jpg, sheet_002.jpg, ...; must not hold any before.

    Returns:
        the sheets.

    Raises:
        FileExistsError: the folder is not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; choose another folder for the sheets")
    paths, sheets = list_files(images), []
    number = math.ceil(len(paths) / (_COLUMNS * _ROWS))
    for i in tqdm(range(number), desc="Review sheets", unit="sheet"):
        part = paths[i * _COLUMNS * _ROWS : (i + 1) * _COLUMNS * _ROWS]
        sheets.append(folder / f"sheet_{i + 1:03d}.jpg")
        _drawn(part, images).save(sheets[-1], quality=92)
    return sheets


def _drawn(paths: list[Path], root: Path) -> Image.Image:
    rows = math.ceil(len(paths) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * (_TILE + _NAME)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, path in enumerate(paths):
        x, y = i % _COLUMNS * _TILE, i // _COLUMNS * (_TILE + _NAME)
        with open_image(path) as image:
            image.thumbnail((_TILE - 4, _TILE - 4))
            sheet.paste(image, (x + 2, y + 2))
        draw.text((x + 4, y + _TILE), path.relative_to(root).as_posix(), "black")
    return sheet
