"""The curves of classes are scikit-learn's, a panel each, and dots lie where classes are called."""

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from imrcnn_d2.evaluation import evaluate_classification
from imrcnn_d2.report.plots.curves import plot_class_roc


def scored(classes, number=40, seed=0, absent=()):
    rng = np.random.default_rng(seed)
    labels = rng.choice([k for k in range(classes) if k not in absent], number)
    scores = rng.random((number, classes)) + 0.4 * np.eye(classes)[labels]
    scores /= scores.sum(axis=1, keepdims=True)
    truth = {
        "images": [{"id": i} for i in range(number)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(classes)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": int(k)} for i, k in enumerate(labels)
        ],
    }
    results = [{"image_id": i, "scores": row.tolist()} for i, row in enumerate(scores)]
    return evaluate_classification(truth, results), labels, scores


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_panel_a_class(classes, tmp_path):
    results, labels, scores = scored(classes)
    figure = plot_class_roc({"one": results, "two": results}, tmp_path / "roc.png")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == classes
    called = scores.argmax(axis=1)
    for k, axes in enumerate(panels):
        lines = [line for line in axes.get_lines() if line.get_linestyle() != "None"][1:]
        dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
        assert len(lines) == len(dots) == 2
        false, true, _ = roc_curve(labels == k, scores[:, k], drop_intermediate=False)
        np.testing.assert_allclose(lines[0].get_xydata(), 100 * np.stack([false, true], 1))
        (dot,) = dots[0].get_xydata()
        share = [(called[labels != k] == k).mean(), (called[labels == k] == k).mean()]
        np.testing.assert_allclose(dot, 100 * np.array(share))
        area = results.recognition[f"auroc_class {k}"]
        assert lines[0].get_label() == f"one: AUROC {area:.1f}"


def test_a_class_without_images_has_no_curve(tmp_path):
    results, *_ = scored(3, absent=(1,))
    figure = plot_class_roc({"one": results}, tmp_path / "roc.svg")
    assert "one: n/a" in [line.get_label() for line in figure.axes[1].get_lines()]
    assert (tmp_path / "roc.svg").stat().st_size > 5000
