"""COCO data of rectangles, on which overlaps can be worked out by hand."""

import numpy as np
import pytest
from rectangles import rectangle, rectangles
from scipy import special, stats

HEIGHT, WIDTH = 40, 50


def make_dataset(num_images, annotations=(), classes=("lesion",), patients=()):
    """A COCO dict with images 1, 2, ... and classes 1, 2, ..."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
        for i in range(1, num_images + 1)
    ]
    for image, patient in zip(images, patients, strict=False):
        image["patient_id"] = patient
    return {
        "images": images,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
        "annotations": [
            {"id": number, "iscrowd": 0, "area": float(a["bbox"][2] * a["bbox"][3]), **a}
            for number, a in enumerate(annotations, 1)
        ],
    }


def make_random(seed, scores="tied", num_images=6, num_classes=2):
    """A crowded data set and results for it, as (dataset, results): several classes, crowds,
    sizes, lesion-free images, near misses, equal overlaps; scores that tie or "distinct" ones."""
    rng = np.random.default_rng(seed)

    def anywhere(image_id, **fields):
        x, y = (rng.integers(0, 5, 2) * 4).tolist()
        width, height = (rng.integers(2, 6, 2) * 4).tolist()
        category = int(rng.integers(1, num_classes + 1))
        return rectangle(image_id, x, y, width, height, category_id=category, **fields)

    def near(annotation, score):
        x, y, width, height = annotation["bbox"]
        right, down = rng.integers(0, 3, 2).tolist()
        place = annotation["image_id"], x + right, y + down, width, height
        return rectangle(*place, category_id=annotation["category_id"], score=score)

    annotations, results = [], []
    for image_id in range(1, num_images + 1):
        lesions = []
        for _ in range(rng.integers(0, 4)):
            lesion = anywhere(image_id, iscrowd=int(rng.random() < 0.2))
            lesion["area"] = float(lesion["bbox"][2] * lesion["bbox"][3] * rng.choice([1, 9, 99]))
            lesions.append(lesion)
            if rng.random() < 0.2:
                lesions.append(dict(lesions[-1]))
        annotations += lesions
        for _ in range(rng.integers(0, 7)):
            score = float(rng.integers(0, 11) / 10 if scores == "tied" else rng.random())
            if lesions and rng.random() < 0.7:
                results.append(near(lesions[rng.integers(len(lesions))], score))
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


@pytest.fixture(scope="session")
def t_interval():
    """The interval of a metric in percent, or between other limits, of its resampled values."""

    def interval(value, samples, units, low=0, high=100):
        share = (value - low) / (high - low)
        error = np.nanstd(samples, ddof=1) * units / (units - 1) / (high - low)
        half = stats.t(units - 1).ppf(0.975) * error / (share * (1 - share))
        return tuple(low + (high - low) * special.expit(special.logit(share) + [-half, half]))

    return interval


@pytest.fixture
def worked(dataset, region):
    """Four images, five lesions of two classes and a crowd. By falling score: hit, false alarm, hit
    and false alarm at 0.7, on the crowd alone, false alarm, hit."""
    data = dataset(
        4,
        rectangles(
            "1 0 0 10 10; 1 20 0 10 10 class 2; 2 0 0 10 10; 2 20 0 10 10; 3 0 0 10 10 class 2; "
            "3 20 20 20 20 crowd"
        ),
        classes=("a", "b"),
    )
    # (6) of the other class
    results = rectangles(
        "1 0 0 10 10 @0.9; 4 0 0 10 10 @0.8; 2 0 0 10 10 @0.7; 2 0 20 10 10 @0.7; "
        "3 20 20 10 10 @0.6; 3 0 0 10 10 @0.5; 1 20 0 10 10 class 2 @0"
    )
    return data, results
