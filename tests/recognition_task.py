"""A task of three classes out of the real images: polyps, mucosa without one, ulcerative colitis.

All crops are square, of one distribution of sizes, and resized to SIDE pixels, so that scale gives
nothing away; they lie on lit mucosa, outside the black corners and the green inset. It checks the
machinery, not a clinical question: the ten colitis images have another source than the polyps.
"""

import csv

import cv2
import numpy as np

CLASSES = ("polyp", "mucosa", "ulcerative colitis")
SIDE, SIZE = 128, 352  # pixels of a crop; of the images that it is cut from
MAX_UNLIT = 0.02  # share of a crop that may be black or green
DISTANCE = 8  # pixels between a polyp and mucosa away from it
SPLITS = ("train", "val", "test")


def write_recognition_task(kvasir, colitis, folder, *, images, crops, seed=0):
    """Cut crops, list them in ``labels.csv`` (as ``prepare_dataset.py classification`` reads it).

    A polyp crop is the squared bounding box, with a margin, of an image's largest polyp; a mucosa
    crop of the same image has the same side and no polyp within DISTANCE, if there is room for one.
    The image that a crop is from is its ``patient_id`` and decides its split: ``images`` of
    Kvasir-SEG (352x352) for each, 6, 2 and 2 of the ten colitis images, with ``crops`` of each.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows, sides = [], []

    def put(image, square, label, source, split, number=0):
        if square is not None:
            x, y, side = square
            crop = image[y : y + side, x : x + side]
            crop = cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            name = f"{CLASSES.index(label)}_{source.stem}_{number}.png"
            cv2.imwrite(str(folder / name), crop)
            rows.append({"file": name, "label": label, "patient_id": source.name, "split": split})

    paths = rng.permutation(sorted((kvasir / "images").iterdir()))
    for split, chosen in zip(SPLITS, np.split(paths, np.cumsum(images))[:3], strict=True):
        for path in chosen:
            image = cv2.imread(str(path))
            mask = cv2.imread(str(kvasir / "masks" / path.name), cv2.IMREAD_GRAYSCALE)
            polyps = (mask >= 128).astype(np.uint8)
            x, y, side = square = _largest_polyp(polyps)
            lit = _lit(image)
            if (~lit[y : y + side, x : x + side]).mean() <= MAX_UNLIT:
                put(image, square, "polyp", path, split)
                sides.append(side)
                near = cv2.dilate(polyps, np.ones((2 * DISTANCE + 1,) * 2)) > 0
                put(image, _random_square(rng, side, lit, near), "mucosa", path, split)
    paths = rng.permutation(sorted(colitis.glob("*.jpg")))
    for split, chosen in zip(SPLITS, np.split(paths, [6, 8]), strict=True):
        for path in chosen:
            image = cv2.resize(cv2.imread(str(path)), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
            for number in range(crops):
                square = _random_square(rng, int(rng.choice(sides)), _lit(image))
                put(image, square, "ulcerative colitis", path, split, number)
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "labels.csv"


def _largest_polyp(mask):
    """x, y and side of a square around it, within the image."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    x, y, width, height, _ = stats[1 + stats[1:, cv2.CC_STAT_AREA].argmax()]
    side = int(np.clip(1.1 * max(width, height), SIDE // 2, SIZE))
    x, y = (np.clip([x + (width - side) // 2, y + (height - side) // 2], 0, SIZE - side)).tolist()
    return x, y, side


def _lit(image):
    """Pixels that show tissue: (H, W) bool."""
    _, green, red = cv2.split(image)
    return (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) > 25) & (red >= green)


def _random_square(rng, side, lit, forbidden=None):
    """An (x, y, side) with hardly an unlit pixel and no forbidden one; None if there is none."""

    def sums(mask):
        """Of all squares, by their upper left corner."""
        total = cv2.integral(mask.astype(np.uint8))
        total = total[side:] - total[:-side]
        return total[:, side:] - total[:, :-side]

    allowed = sums(~lit) <= MAX_UNLIT * side**2
    if forbidden is not None:
        allowed &= sums(forbidden) == 0
    ys, xs = np.nonzero(allowed)
    if not len(xs):
        return None
    chosen = rng.integers(len(xs))
    return int(xs[chosen]), int(ys[chosen]), side
