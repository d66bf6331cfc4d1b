import json

import cv2
import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.data.audit.audit import audit
from imrcnn_d2.data.audit.findings import read_entries
from imrcnn_d2.data.audit.validity import check_validity, validity_findings


def clouds(seed, counts=(80, 80), apart=5.0):
    """Three views of images of several labels, each label about points of its own."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    views = [
        rng.normal(size=(len(counts), width))[labels] * apart
        + rng.normal(size=(len(labels), width))
        for width in (9, 12, 16)
    ]
    names = [f"{i}.png" for i in range(len(labels))]
    return names, [""] * len(names), [f"class {label}" for label in labels], views


def of_kind(findings, kind):
    return [f for f in findings if f.kind == kind and f.flags]


def test_exchanged_labels_come_first_and_others_are_left_alone():
    names, splits, labels, views = clouds(0, (80, 60, 70))
    wrong = [3, 50, 90, 150, 200]
    for i in wrong:
        labels[i] = "class 0" if labels[i] != "class 0" else "class 2"
    findings = check_validity(names, splits, labels, views)
    found = of_kind(findings, "cluster_disagrees")
    assert {f.images[0] for f in found} == {names[i] for i in wrong}
    assert all(0.75 < f.score <= 1 and f.severity == "warning" for f in found)
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
    assert not of_kind(findings, "outlier")


def test_the_number_of_images_of_a_label_plays_no_part():
    names, splits, labels, views = clouds(1, (400, 45))
    labels[420] = "class 0"
    found = of_kind(check_validity(names, splits, labels, views), "cluster_disagrees")
    assert [f.images for f in found] == [("420.png",)]


def test_labels_that_do_not_show_name_nobody():
    names, splits, labels, views = clouds(2, apart=0.0)
    findings = check_validity(names, splits, labels, views)
    assert not of_kind(findings, "cluster_disagrees")
    (told,) = [f for f in findings if f.kind == "cluster_disagrees"]
    assert told.severity == "info" and "do not show" in told.detail and told.images == ()


def test_what_cannot_be_checked_is_said():
    names, splits, labels, views = clouds(3, (60, 50, 10))
    (told, *_) = [
        f
        for f in check_validity(names, splits, labels, views)
        if f.kind == "cluster_disagrees" and f.severity == "info"
    ]
    assert "class 0 (60), class 1 (50)" in told.detail and "class 2 (10)" in told.detail
    one = check_validity(names, splits, ["lesion"] * len(names), views)
    assert any("fewer than two" in f.detail and "lesion (120)" in f.detail for f in one)
    (few,) = check_validity(names[:20], splits[:20], labels[:20], [view[:20] for view in views])
    assert few.severity == "info" and "20 images" in few.detail


def test_outliers_have_the_highest_scores_first():
    names, splits, labels, views = clouds(4, (100,))
    views[0][7] += 40
    views[1][7] -= 40
    views[2][60] -= 60
    views[1][60] += 60
    views[0][60] += 60
    found = of_kind(check_validity(names, splits, labels, views), "outlier")
    assert [f.images[0] for f in found] == ["60.png", "7.png"]


def test_an_audited_data_set(tmp_path):
    """Two classes by their colour and grain, one image of each under the other's name."""
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(100):
        kind = number % 2
        noise = cv2.GaussianBlur(rng.normal(size=(96, 96)), (0, 0), 3 + 3 * kind)
        gray = 120 + 30 * noise / noise.std() + rng.normal(scale=5)
        tint = np.array([[1.2, 0.8, 0.7], [0.9, 1.0, 0.6]][kind]) + rng.normal(scale=0.02, size=3)
        if number == 60:
            tint = np.array([0.3, 0.4, 1.5])
            gray = 255.0 * (np.arange(96) % 8 < 4) + np.zeros((96, 1))
        picture = np.clip(gray[..., None] * tint, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 96})
        label = 2 - kind if number in (8, 31) else kind + 1
        annotations.append({"id": number, "image_id": number, "category_id": label})
    (tmp_path / "broken.png").write_bytes(b"no image")
    images.append({"id": 100, "file_name": "broken.png"})
    categories = [{"id": 1, "name": "ulcer"}, {"id": 2, "name": "gastritis"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "all.json").write_text(json.dumps(content))
    result = audit(read_entries("all", {"": tmp_path / "all.json"}, tmp_path))
    findings = validity_findings(result)
    disagreeing = {f.images for f in of_kind(findings, "cluster_disagrees")}
    assert disagreeing and disagreeing <= {("8.png",), ("31.png",), ("60.png",)}
    assert [f.images for f in of_kind(findings, "outlier")][0] == ("60.png",)
    assert any("ulcer (50)" in f.detail for f in findings)
