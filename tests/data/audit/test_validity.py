import numpy as np

from imrcnn_d2.data.audit.validity import check_validity


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
