"""
A task of three classes out of the real images: polyps, mucosa without a polyp, ulcerative colitis.

All crops are square, of one distribution of sizes, and resized to SIDE pixels, so that scale gives
nothing away; they lie on lit mucosa, outside the black corners and the green inset. It checks the
machinery, not a clinical question: the ten colitis images have another source than the polyps.
"""

import csv
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imrcnn_d2.data.catalog import labels_of
from imrcnn_d2.engine import Trainer

__all__ = ["CLASSES", "frozen_feature_accuracy", "write_recognition_task"]

CLASSES = ("polyp", "mucosa", "ulcerative colitis")
SIDE, SIZE = 128, 352  # pixels of a crop; of the images that it is cut from
MIN_SIDE = 64
MAX_UNLIT = 0.02  # share of a crop that may be black or green
DISTANCE = 8  # pixels between a polyp and mucosa away from it
SPLITS = ("train", "val", "test")


def write_recognition_task(kvasir, colitis, folder, *, images, crops, seed=0):
    """
    Cut crops and list them in ``labels.csv``, the input of ``prepare_dataset.py classification``.

    A polyp crop is the squared bounding box, with a margin, of an image's largest polyp; a mucosa
    crop of the same image has the same side and no polyp within ``DISTANCE``. Where there is no
    room for one, there is none. The image that a crop is from is its ``patient_id`` and decides its
    split.

    Args:
        kvasir (Path): of Kvasir-SEG's layout, images of 352x352.
        colitis (Path): folder of images of any size, squeezed to 352x352 as the others were.
        folder (Path): to write to.
        images (tuple[int, int, int]): of Kvasir-SEG, for train, val and test.
        crops (int): of each of the colitis images, of which 6, 2 and 2 are for these.
        seed (int): of the choice of images and places.

    Returns:
        Path: the CSV.
    """
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True)
    names = rng.permutation(sorted(p.name for p in (kvasir / "images").iterdir()))
    rows, sides = [], []

    def put(image, square, label, source, split, number=0):
        if square is None:
            return
        x, y, side = square
        crop = image[y : y + side, x : x + side]
        crop = cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        name = f"{CLASSES.index(label)}_{Path(source).stem}_{number}.png"
        cv2.imwrite(str(folder / name), crop)
        rows.append({"file": name, "label": label, "patient_id": source, "split": split})

    for split, chosen in zip(SPLITS, np.split(names, np.cumsum(images))[:3], strict=True):
        for name in chosen:
            image = cv2.imread(str(kvasir / "images" / name))
            polyps = cv2.imread(str(kvasir / "masks" / name), cv2.IMREAD_GRAYSCALE) >= 128
            x, y, side = square = _largest_polyp(polyps)
            lit = _lit(image)
            if (~lit[y : y + side, x : x + side]).mean() <= MAX_UNLIT:
                put(image, square, "polyp", name, split)
                sides.append(side)
                near = cv2.dilate(polyps.astype(np.uint8), np.ones((2 * DISTANCE + 1,) * 2)) > 0
                put(image, _square(rng, side, lit, forbidden=near), "mucosa", name, split)
    sources = rng.permutation(sorted(p.name for p in colitis.glob("*.jpg")))
    for split, chosen in zip(SPLITS, np.split(sources, [6, 8]), strict=True):
        for name in chosen:
            image = cv2.resize(
                cv2.imread(str(colitis / name)), (SIZE, SIZE), interpolation=cv2.INTER_AREA
            )
            for number in range(crops):
                side = int(rng.choice(sides))
                square = _square(rng, side, _lit(image))
                put(image, square, "ulcerative colitis", name, split, number)
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "labels.csv"


def _largest_polyp(mask):
    """x, y and side of a square around it, within the image."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    x, y, width, height, _ = stats[1 + stats[1:, cv2.CC_STAT_AREA].argmax()]
    side = int(np.clip(1.1 * max(width, height), MIN_SIDE, SIZE))
    return *(
        int(np.clip(start + (length - side) // 2, 0, SIZE - side))
        for start, length in ((x, width), (y, height))
    ), side


def _lit(image):
    """Pixels that show tissue: (H, W) bool."""
    blue, green, red = cv2.split(image)
    return (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) > 25) & (red >= green)


def _square(rng, side, lit, forbidden=None):
    """A random (x, y, side) with hardly an unlit pixel and no forbidden one; None without."""
    allowed = _sums(~lit, side) <= MAX_UNLIT * side**2
    if forbidden is not None:
        allowed &= _sums(forbidden, side) == 0
    ys, xs = np.nonzero(allowed)
    if not len(xs):
        return None
    chosen = rng.integers(len(xs))
    return int(xs[chosen]), int(ys[chosen]), side


def _sums(mask, side):
    """Of all squares of a side, by their upper left corner."""
    total = cv2.integral(mask.astype(np.uint8))
    return total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]


def frozen_feature_accuracy(cfg):
    """
    What a linear classifier reaches on the features of the network as it comes from ImageNet.

    Args:
        cfg (CfgNode): of a classifier; its data sets, network and image size are taken. The
            regression's strength is chosen on DATASETS.VAL.

    Returns:
        float: balanced accuracy on DATASETS.TEST, percent.
    """
    model = Trainer.build_model(cfg).eval()
    features, labels = {}, {}
    for split in SPLITS:
        name = cfg.DATASETS[split.upper()][0]
        loader = Trainer.build_test_loader(cfg, name)
        with torch.no_grad():
            rows = [model.backbone(model.preprocess_image(batch))[0].numpy() for batch in loader]
        features[split] = np.stack(rows)
        labels[split] = labels_of(DatasetCatalog.get(name))
    fitted = [
        make_pipeline(
            StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=5000)
        ).fit(features["train"], labels["train"])
        for c in 10.0 ** np.arange(-4, 2)
    ]

    def accuracy(classifier, split):
        predicted = classifier.predict(features[split])
        return 100 * balanced_accuracy_score(labels[split], predicted)

    best = max(fitted, key=lambda classifier: accuracy(classifier, "val"))
    return accuracy(best, "test")
