"""Outlines that are wrong are told from those that are only unusual."""

import json

import numpy as np
import pytest

from imrcnn_d2.data.audit.checks import (
    PAIRED,
    annotation_findings,
    category_findings,
    decode_annotations,
    repeated_id_findings,
)
from imrcnn_d2.data.audit.findings import Entry, read_entries
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.utils.files import BadInputError

SIZE = 100


def kinds(*annotations, view=None):
    """[(kind, id of the annotation)] of what is found in an image with these annotations."""
    own = [{"id": i, "category_id": 1, **annotation} for i, annotation in enumerate(annotations, 1)]
    entry = Entry("a.png", "train", None, {}, tuple(own))
    outlines, findings = decode_annotations(entry, SIZE, SIZE, {1, 2})
    view = np.ones((SIZE, SIZE), bool) if view is None else view
    findings += annotation_findings(entry, outlines, view)
    return [(found.kind, found.annotation_id) for found in findings]


def polygon(*points, **fields):
    return {"segmentation": [[float(v) for point in points for v in point]], **fields}


def box(x, y, width, height, **fields):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[y : y + height, x : x + width] = True
    return {**annotation_from_mask(mask), **fields}


SQUARE = polygon((10, 10), (50, 10), (50, 50), (10, 50))


@pytest.mark.parametrize(
    "annotation, kind",
    [
        (SQUARE, None),
        (polygon((10, 10), (50, 50), (50, 10), (10, 50)), "self_crossing"),
        # a small loop in a large outline
        (polygon((10, 10), (80, 10), (80, 80), (40, 80), (50, 84), (50, 80), (10, 80)), None),
        # out and back along one line, and a corner that touches a side: tools leave such
        (polygon((10, 10), (50, 10), (80, 10), (50, 10), (50, 50), (10, 50)), None),
        (polygon((10, 10), (50, 10), (50, 50), (30, 10), (10, 50)), None),
        (polygon((10, 10), (12, 10), (12, 12), (10, 12)), "tiny"),
        (box(10, 10, 5, 2), "tiny"),
        (box(10, 10, 10, 6), None),
        ({}, "empty"),
        ({"segmentation": []}, "empty"),
        (polygon((200, 200), (250, 200), (250, 250)), "empty"),
        ({"segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0]]}, "malformed"),
        ({"segmentation": [[1, 1, 1, 1]]}, "malformed"),
        ({"segmentation": {"size": [SIZE, SIZE], "counts": [5]}}, "malformed"),
        ({"segmentation": "text"}, "malformed"),
        (SQUARE | {"category_id": 3}, "malformed"),
        (SQUARE | {"iscrowd": 2}, "malformed"),
    ],
)
def test_single_outlines(annotation, kind):
    assert kinds(annotation) == ([] if kind is None else [(kind, 1)])


def test_outside_the_view():
    view = np.zeros((SIZE, SIZE), bool)
    view[:, 40:] = True
    assert kinds(box(30, 10, 40, 20), view=view) == []  # exactly a quarter
    assert kinds(SQUARE, view=view) == [("outside_view", 1)]
    assert kinds(SQUARE, view=np.zeros_like(view)) == []  # a black frame has no view


def test_outlined_twice():
    first, second, third = box(10, 10, 40, 40), box(11, 10, 40, 40), box(30, 10, 40, 40)
    assert kinds(first, third, second) == [("overlapping", 1)]
    assert kinds(first, second | {"category_id": 2}) == []
    assert kinds(first, second | {"iscrowd": 1}) == []


def test_thousands_of_outlines_on_one_image():
    """Compared in pairs, 20,000 would take 3 GB and minutes."""
    found = kinds(*(box(10 + i % 3, 10, 40, 40, id=i) for i in range(PAIRED + 50)))
    assert len(found) == PAIRED * (PAIRED - 1) // 2 + 1, "with a note that others were not compared"


def test_classes_of_very_different_size():
    categories = [{"id": i, "name": name} for i, name in enumerate(("polyp", "ulcer", "cancer"))]

    def found(*counts):
        annotations = [{"category_id": i} for i, n in enumerate(counts) for _ in range(n)]
        return [(f.detail, f.score) for f in category_findings(categories, annotations)]

    assert found(100, 10, 50) == []
    assert found(100, 9, 50) == [("ulcer: 9 annotations, polyp: 100.", 100 / 9)]
    assert found(100, 60, 0) == [("cancer: 0 annotations, polyp: 100.", None)]
    assert found(0, 0, 0) == []


def test_annotations_with_one_id():
    """In one file; two splits may number theirs alike, and none needs an id."""

    def entry(name, split, *ids):
        return Entry(name, split, None, {}, tuple({"id": i} for i in ids))

    entries = [
        entry("a.png", "train", 1, 2, None, None),
        entry("b.png", "train", 2, 3, 3),
        entry("c.png", "test", 1, 2),
    ]
    found = [(f.kind, f.images, f.splits, f.annotation_id) for f in repeated_id_findings(entries)]
    assert found == [
        ("malformed", ("a.png", "b.png"), ("train", "train"), 2),
        ("malformed", ("b.png",), ("train",), 3),
    ]


@pytest.mark.parametrize("patient", [["p"], {"id": 1}])
def test_a_patient_that_is_neither_text_nor_a_number(tmp_path, patient):
    image = {"id": 1, "file_name": "a.png", "patient_id": patient}
    categories = [{"id": 1, "name": "polyp"}]
    content = {"images": [image], "annotations": [], "categories": categories}
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(BadInputError, match="own.json: a.png has the patient_id"):
        read_entries("own", {"": tmp_path / "own.json"}, tmp_path)
