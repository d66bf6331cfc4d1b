"""Where a classifier looked in test images that it called right or wrong."""

import logging
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure

from imrcnn_d2.data.classification_mapper import ClassificationMapper
from imrcnn_d2.data.csv_files import read_rows
from imrcnn_d2.modeling.grad_cam import grad_cam

from .style import GREEN, VERMILION, save_figure

__all__ = ["choose_hits_and_misses", "draw_grad_cam", "draw_test_grad_cams"]

logger = logging.getLogger(__name__)

TILE = 1.7  # inches
OPACITY = 0.45


def draw_test_grad_cams(cfg, model):
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
            draw_grad_cam(model, mapper, name, folder)
        except ValueError as error:
            logger.warning("No Grad-CAM pictures: %s", error)
            return
        logger.info("Grad-CAM: %s", folder / "grad_cam.png")


def draw_grad_cam(model, mapper, dataset_name, folder, *, each=3):
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
        figsize=(2 * each * TILE, len(classes) * (TILE + 0.45) + 0.7), layout="constrained"
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
            _draw_tile(axes, model, mapper(records[row["image_id"]]), row, classes)
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


def _draw_tile(axes, model, sample, row, classes):
    (heat,) = grad_cam(model, [sample], [classes.index(row["predicted"])])
    axes.imshow(sample["image"].permute(1, 2, 0).numpy())
    axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=OPACITY)
    hit = row["label"] == row["predicted"]
    said = f"{row['label']}\ncalled so" if hit else f"{row['label']}\ncalled {row['predicted']}"
    axes.set_title(
        f"{said}, {float(row['score']):.2f}", fontsize=7, color=GREEN if hit else VERMILION
    )
