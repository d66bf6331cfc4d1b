#!/usr/bin/env python
"""Label the images of a prepared data set of lesions by how much of the frame they cover.

    python examples/classification/labels.py datasets/polypgen labels.csv

The classes are "no polyp", "small polyp" (less than 5 % of the frame) and "large polyp". Of each
centre as many images of every class are taken, at random, so that a centre's equipment says nothing
of the class; centres that lack a class are left out.
"""

import random
import sys
from collections import defaultdict
from pathlib import Path

from imrcnn_d2.utils.files import csv_text, read_json, write_atomically

CLASSES = ("no polyp", "small polyp", "large polyp")
LARGE = 0.05  # of the frame, all lesions together
FIELDS = ("centre", "sequence_id", "patient_id")


def main(data: str, table: str) -> None:
    groups = defaultdict(list)  # (centre, class) -> records
    for file in sorted(Path(data, "annotations").glob("*.json")):
        coco, covered = read_json(file), defaultdict(float)
        for annotation in coco["annotations"]:
            covered[annotation["image_id"]] += annotation["area"]
        for image in coco["images"]:
            share = covered[image["id"]] / (image["width"] * image["height"])
            label = CLASSES[(share > 0) + (share >= LARGE)]
            groups[image.get("centre"), label].append(image)
    rows, generator = [], random.Random(0)
    for centre in sorted({centre for centre, _ in groups}):
        number = min(len(groups[centre, label]) for label in CLASSES)
        print(f"{centre}: {number} images of each class")
        for label in CLASSES:
            images = sorted(groups[centre, label], key=lambda image: image["file_name"])
            for image in generator.sample(images, number):
                fields = {field: image.get(field) for field in FIELDS}
                rows.append({"file": image["file_name"], "label": label, **fields})
    write_atomically(Path(table), csv_text(rows, ("file", "label", *FIELDS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
