"""Test images with what is in them and what was detected, as one picture."""

import math
from pathlib import Path

from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..data.images import image_inside, read_image
from ..evaluation import evaluate_lesions
from .outlines import (
    HALO_WIDTH,
    LIGHT_HALO,
    STYLES,
    choose_images,
    outlines,
    regions_by_kind,
)
from .style import save_figure

__all__ = ["draw_contact_sheet", "show_tile", "tile_grid"]

DARK = [patheffects.withStroke(linewidth=HALO_WIDTH, foreground="black", alpha=0.5)]
LIGHT = [patheffects.withStroke(linewidth=HALO_WIDTH, foreground="white", alpha=0.9)]
OUTLINES = {
    kind: {**line, "path_effects": LIGHT if kind in LIGHT_HALO else DARK}
    for kind, line in STYLES.items()
}
COLUMNS = 4
TILE = 2.4  # inches
NAME_LENGTH = 30


def draw_contact_sheet(gt, results, image_root, path, *, tau=0.7, max_images=16):
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
