"""COCO data of rectangles, on which overlaps can be worked out by hand."""

import numpy as np
import pytest
from rectangles import rectangle

HEIGHT, WIDTH = 40, 50


def make_dataset(num_images, annotations=(), classes=("lesion",), patients=None):
    """A COCO dict with images 1, 2, ... and classes 1, 2, ..."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
        for i in range(1, num_images + 1)
    ]
    for image, patient in zip(images, patients or [], strict=False):
        image["patient_id"] = patient
    return {
        "images": images,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
        "annotations": [
            {
                "id": number,
                "iscrowd": 0,
                "area": float(annotation["bbox"][2] * annotation["bbox"][3]),
                **annotation,
            }
            for number, annotation in enumerate(annotations, 1)
        ],
    }


def make_random(seed, scores="tied", num_images=6, num_classes=2):
    """
    A crowded data set and results for it, as (dataset, results): several classes, crowds,
    lesion-free images, near misses and equal overlaps; scores that tie or "distinct" ones.
    """
    rng = np.random.default_rng(seed)

    def anywhere(image_id, **fields):
        x, y = rng.integers(0, 5, 2) * 4
        width, height = rng.integers(2, 6, 2) * 4
        category = int(rng.integers(1, num_classes + 1))
        return rectangle(
            image_id, int(x), int(y), int(width), int(height), category_id=category, **fields
        )

    def near(annotation, **fields):
        x, y, width, height = annotation["bbox"]
        right, down = rng.integers(0, 3, 2).tolist()
        return rectangle(x=x + right, y=y + down, width=width, height=height, **fields)

    annotations, results = [], []
    for image_id in range(1, num_images + 1):
        own = []
        for _ in range(rng.integers(0, 4)):
            own.append(anywhere(image_id, iscrowd=int(rng.random() < 0.2)))
            if rng.random() < 0.2:
                own.append(dict(own[-1]))
        annotations += own
        for _ in range(rng.integers(0, 7)):
            score = float(rng.integers(0, 11) / 10 if scores == "tied" else rng.random())
            if own and rng.random() < 0.7:
                target = own[rng.integers(len(own))]
                keys = {key: target[key] for key in ("image_id", "category_id")}
                results.append(near(target, score=score, **keys))
            else:
                results.append(anywhere(image_id, score=score))
    rng.shuffle(results)
    classes = [f"class {i}" for i in range(num_classes)]
    return make_dataset(num_images, annotations, classes), results


@pytest.fixture(scope="session")
def region():
    return rectangle


@pytest.fixture(scope="session")
def dataset():
    return make_dataset


@pytest.fixture(scope="session")
def random_case():
    return make_random
