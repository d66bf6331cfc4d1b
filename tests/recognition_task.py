"""A task of three classes out of the real images: polyps, mucosa without one, ulcerative colitis.

Crops are squares of lit mucosa, of one distribution of sizes, resized to SIDE pixels, so that scale
gives nothing away. It checks the machinery, not a clinical question: the ten colitis images have
another source than the polyps."""

import cv2
import numpy as np

from imrcnn_d2.data.images import read_mask
from imrcnn_d2.utils.files import csv_text

CLASSES = ("polyp", "mucosa", "ulcerative colitis")
SIDE, SIZE = 128, 352  # pixels of a crop; of the images that it is cut from


def write_recognition_task(kvasir, colitis, folder, *, images, crops, seed=0):
    """Cut crops and list them in ``labels.csv``, as ``prepare-dataset classification`` reads it.

    A polyp crop holds all polyps of an image; a mucosa crop of the same image and side holds none.
    The image is the ``patient_id`` and decides the split: ``images`` of Kvasir-SEG for each split,
    6, 2 and 2 of the ten colitis images, with ``crops`` of each."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows, sides, nothing = [], [], np.zeros((SIZE, SIZE), bool)

    def cut(image, side, label, source, split, polyps=nothing, corner=None):
        """Add the crop at a corner (x, y), else at a random one of lit mucosa, if one is found."""
        tissue = (image.max(axis=2) > 50) & (image[..., 2] >= image[..., 1])  # not black, not green
        corners = [corner] if corner else rng.integers(0, SIZE - side, (50, 2), endpoint=True)
        for x, y in corners:
            place = np.s_[y : y + side, x : x + side]
            if tissue[place].mean() > 0.9 and (corner or not polyps[place].any()):
                crop = cv2.resize(image[place], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
                name = f"{len(rows)}.png"
                cv2.imwrite(str(folder / name), crop)
                row = {"file": name, "label": label, "patient_id": source.name, "split": split}
                return rows.append(row)

    paths = rng.permutation(sorted((kvasir / "images").iterdir()))
    others = rng.permutation(sorted(colitis.glob("*.jpg")))
    parts = np.split(paths, np.cumsum(images))[:3], np.split(others, [6, 8])
    for split, of_kvasir, of_colitis in zip(("train", "val", "test"), *parts, strict=True):
        for path in of_kvasir:
            image, polyps = cv2.imread(str(path)), read_mask(kvasir / "masks" / path.name)
            x, y, width, height = cv2.boundingRect(polyps.astype(np.uint8))
            sides.append(max(width, height, SIDE // 2))
            x, y = min(x, SIZE - sides[-1]), min(y, SIZE - sides[-1])
            cut(image, sides[-1], "polyp", path, split, corner=(x, y))
            cut(image, sides[-1], "mucosa", path, split, polyps)
        for path in of_colitis:
            image = cv2.resize(cv2.imread(str(path)), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
            for side in rng.choice(sides, crops):
                cut(image, side, "ulcerative colitis", path, split)
    (folder / "labels.csv").write_text(csv_text(rows, []), encoding="utf-8", newline="")
    return folder / "labels.csv"
