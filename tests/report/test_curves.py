"""Curves over the score threshold are those worked out by hand or by scikit-learn."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from scipy.stats import beta
from sklearn.metrics import auc, roc_curve

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES
from imrcnn_d2.evaluation import evaluate_classification
from imrcnn_d2.evaluation.calibration import Calibration
from imrcnn_d2.evaluation.detection.counts import UnitCounts
from imrcnn_d2.evaluation.detection.curves import FROC, pr_curve
from imrcnn_d2.report.plots import curves, draw_all, plot_pr_panels, plot_robustness
from imrcnn_d2.report.plots.style import STYLES


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


# Hit, false alarm, hit, false alarm, hit; four ground truths.
SCORES, HITS = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([True, False, True, False, True])
CURVE = pr_curve(SCORES, HITS, 4)


def steps_of(axes):
    return [line for line in axes.lines if line.get_drawstyle() == "steps-pre"]


def test_pr_curve_and_its_points(tmp_path):
    few = pr_curve(np.array([0.5]), np.array([True]), 3)  # no break-even point, none above 0.7
    # The points after three detections, two of them hits; then of as many detections as lesions.
    points = {"o": pytest.approx((50, 200 / 3)), "D": pytest.approx((50, 50))}
    for pr, marked, label in (
        (CURVE, points, "polyp: AP50_voc 56.7, BEP 50.0"),
        (few, {}, "polyp: AP50_voc 33.3, BEP n/a"),
    ):
        (axes,) = plot_pr_panels(
            {curves.PR_TITLE: {"polyp": pr}}, tmp_path / "pr.png", tau=0.7
        ).axes
        assert legend(axes)[0] == label
        lines = [line for line in axes.lines if line.get_marker() != "None"]
        shown = {line.get_marker(): line.get_xydata() for line in lines if len(line.get_xdata())}
        assert {marker: tuple(np.ravel(xy)) for marker, xy in shown.items()} == marked
        x, y = steps_of(axes)[0].get_data()
        # The area under the plotted steps is what the legend says.
        assert np.sum(np.diff(x) * y[1:]) / 100 == pytest.approx(100 * pr.area)
    (axes,) = plot_pr_panels({curves.PR_TITLE: {}}, tmp_path / "pr.png").axes
    assert [text.get_text() for text in axes.texts] == ["No detections"]


def test_pr_panels(tmp_path):
    """One for each class, four of them in rows of three; the same figure in two formats."""
    panels = {f"class {i}": {"one": CURVE, "two": CURVE} for i in range(4)}
    figure = plot_pr_panels(panels, tmp_path / "pr.png", tmp_path / "pr.svg")
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    for axes in figure.axes:
        first, second = steps_of(axes)
        assert (first.get_label()[:3], second.get_label()[:3]) == ("one", "two")
        styles = [(line.get_color(), line.get_linestyle()) for line in (first, second)]
        assert all(one != two for one, two in zip(*styles, strict=True))
    with Image.open(tmp_path / "pr.png") as image:
        assert image.size == (3 * 1200, 2 * 1220)
    assert "<svg" in (tmp_path / "pr.svg").read_text()


def test_froc(tmp_path):
    """Hit, false alarm, hit, false alarm in two images; three lesions."""
    hit, image, lesions = HITS[:4], np.array([0, 0, 1, 1]), np.array([1, 2])
    froc = FROC(SCORES[:4], hit, image, lesions)
    (axes,) = curves.plot_froc({"polyp": froc}, tmp_path / "froc.png", tau=0.7).axes
    steps, beyond, point, *_ = axes.lines
    assert steps.get_drawstyle() == "steps-post"  # up at a hit, never on a slope
    x, y = steps.get_data()
    assert x == pytest.approx([0, 0, 0.5, 0.5, 1])
    assert y == pytest.approx([0, 100 / 3, 100 / 3, 200 / 3, 200 / 3])
    assert beyond.get_xydata() == pytest.approx(np.array([[1, 200 / 3], [8, 200 / 3]]))
    assert np.ravel(point.get_xydata()) == pytest.approx([0.5, 200 / 3])
    # At 1/8 and 1/4 the first hit, from 1/2 on two of three.
    mean = (2 * 100 / 3 + 5 * 200 / 3) / 7
    assert legend(axes) == [f"polyp: mean {mean:.1f}", "operating point, score ≥ 0.7"]
    assert [tick.get_text() for tick in axes.get_xticklabels()][::4] == ["1/32", "1/2", "8"]

    unscored = FROC(np.ones(4), hit, image, lesions, scored=False)
    runs = {"a": froc, "b": froc, "masks": unscored}
    (axes,) = curves.plot_froc(runs, tmp_path / "froc.svg", tau=0.85).axes
    # A point without a false alarm is on the edge.
    assert np.ravel(axes.lines[2].get_xydata()) == pytest.approx([1 / 32, 100 / 3])
    assert legend(axes)[2] == "masks: n/a"
    assert len({line.get_color() for line in axes.get_legend().get_lines()[:3]}) == 3


def test_roc_of_images(tmp_path):
    # Worked by hand: of 6 pairs of an image with and one without a lesion 5 are in order.
    units = []
    for lesions, score in (([1, 2, 1, 0, 0], [0.9, 0.8, 0.3, 0.5, 0.0]), ([1, 0], [0.4, 0.2])):
        fields = dict.fromkeys(UnitCounts.__dataclass_fields__, np.zeros(len(lesions)))
        fields |= {"lesions": np.array(lesions), "score": np.array(score)}
        units.append(UnitCounts(**fields))
    runs = dict(zip(("one", "low"), units, strict=True))
    (axes,) = curves.plot_roc_curves(runs, tmp_path / "roc.svg", tau=0.5).axes
    (curve, dot), (low, low_dot) = (
        [line for line in axes.lines if to_rgb(line.get_color()) == to_rgb(STYLES[run][0])]
        for run in range(2)
    )
    assert auc(*curve.get_xydata().T) / 100**2 == pytest.approx(5 / 6)
    assert dot.get_xydata().tolist() == [[50, pytest.approx(200 / 3)]]  # at 0.5 itself, too
    assert legend(axes)[0] == "one: AUROC 83.3"
    assert low_dot.get_xydata().tolist() == [[0, 0]]  # no score reaches 0.5
    assert curve.get_linestyle() != low.get_linestyle()


def scored(classes, number=40, absent=()):
    rng = np.random.default_rng(0)
    labels = rng.choice([k for k in range(classes) if k not in absent], number)
    scores = rng.random((number, classes)) + 0.4 * np.eye(classes)[labels]
    scores /= scores.sum(axis=1, keepdims=True)
    images = enumerate(labels)
    truth = {
        "images": [{"id": i} for i in range(number)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(classes)],
        "annotations": [{"id": i, "image_id": i, "category_id": int(k)} for i, k in images],
    }
    results = [{"image_id": i, "scores": row.tolist()} for i, row in enumerate(scores)]
    return evaluate_classification(truth, results), labels, scores


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_roc_of_each_class(classes, tmp_path):
    results, labels, scores = scored(classes)
    figure = curves.plot_class_roc({"one": results, "two": results}, tmp_path / "roc.png")
    assert len(figure.axes) == classes
    predicted = scores.argmax(axis=1)
    for k, axes in enumerate(figure.axes):
        lines = [line for line in axes.get_lines() if line.get_linestyle() != "None"][1:]
        dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
        assert len(lines) == len(dots) == 2
        false, true, _ = roc_curve(labels == k, scores[:, k], drop_intermediate=False)
        np.testing.assert_allclose(lines[0].get_xydata(), 100 * np.stack([false, true], 1))
        (dot,) = dots[0].get_xydata()
        share = [(predicted[labels != k] == k).mean(), (predicted[labels == k] == k).mean()]
        np.testing.assert_allclose(dot, 100 * np.array(share))
        area = results.recognition[f"auroc_class {k}"]
        assert lines[0].get_label() == f"one: AUROC {area:.1f}"


def test_a_class_without_images_has_no_curve(tmp_path):
    results, *_ = scored(3, absent=(1,))
    figure = curves.plot_class_roc({"one": results}, tmp_path / "roc.svg")
    assert "one: n/a" in [line.get_label() for line in figure.axes[1].get_lines()]
    paths = draw_all(results, tmp_path)
    assert [path.stem for path in paths] == ["confusion_matrix", "roc_curve", "calibration"]
    assert all(path.is_file() for path in paths)


def test_calibration_points_intervals_and_counts(tmp_path):
    """Of four detections around 0.25 one hits, of two at 0.95 both."""
    score = np.array([0.22, 0.24, 0.26, 0.28, 0.95, 0.95])
    hit = np.array([False, False, False, True, True, True])
    calibration = Calibration(score, hit, np.zeros(6, int), 1)
    top, bottom = curves.plot_calibration({"polyp": calibration}, tmp_path / "calibration.png").axes
    points, _, (bars,) = top.containers[0].lines
    assert points.get_xydata() == pytest.approx(np.array([[25, 25], [95, 100]]))
    clopper_pearson = 100 * beta.ppf(0.025, 1, 4), 100 * beta.ppf(0.975, 2, 3)
    assert tuple(bars.get_segments()[0][:, 1]) == pytest.approx(clopper_pearson)
    assert bars.get_segments()[1][:, 1] == pytest.approx([100 * 0.025**0.5, 100])
    assert [text.get_text() for text in bottom.texts] == [*"0040000002"]
    brier = np.mean([0.22**2, 0.24**2, 0.26**2, 0.72**2, 0.05**2, 0.05**2])
    assert legend(top) == ["ideal", f"polyp: ECE {2 / 6 * 5:.1f} %, Brier {brier:.3f}"]

    nothing = Calibration(np.zeros(0), np.zeros(0, bool), np.zeros(0, int), 1)
    runs = {"a": calibration, "b": calibration, "none": nothing}
    top, bottom = curves.plot_calibration(runs, tmp_path / "calibration.svg").axes
    lines = [container.lines[0] for container in top.containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 3
    assert not bottom.texts and legend(top)[3] == "none: n/a"


def test_thresholds(tmp_path):
    """One panel for one run, one for each metric of several; without scores there are no rows."""

    def rows(specificity):
        return [
            dict.fromkeys(curves.THRESHOLD_COLUMNS, 100 * (1 - tau))
            | {"tau": tau, "image_specificity": specificity}
            for tau in (0.1, 0.5, 0.9)
        ]

    (axes,) = curves.plot_thresholds({"IMR-CNN": rows(np.nan)}, tmp_path / "t.png", tau=0.6).axes
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([[0.1, 90], [0.5, 50], [0.9, 10]]))
    assert legend(axes) == ["Precision", "Recall", "F1", "threshold 0.6"]  # one is undefined
    assert "IMR-CNN" in axes.get_title()
    curves.plot_thresholds({"masks": []}, tmp_path / "t.png")
    for defined, words in ((50, []), (np.nan, ["undefined"])):
        tables = {"a": rows(defined), "b": rows(np.nan)}
        panels = curves.plot_thresholds(tables, tmp_path / "t.svg").axes
        assert [axes.get_title() for axes in panels] == list(curves.THRESHOLD_COLUMNS.values())
        assert legend(panels[0]) == ["a", "b", "threshold 0.7"]
        assert [text.get_text() for text in panels[3].texts] == words


def document(values, images=10, names=("jpeg", "rotation")):
    """Of two distortions, the second a point worse than the first."""
    rows = [{"distortion": "clean", "severity": 0, "level": None, "lesion/f1": 90}]
    for i, name in enumerate(names):
        for severity, value in zip(SEVERITIES, values, strict=True):
            value = None if value is None else value - i
            rows.append({"distortion": name, "severity": severity, "level": 1, "lesion/f1": value})
    rows = [{**row, "lesion/fp_per_image": 0.5} for row in rows]
    return {"meta": {"dataset_sha256": "a", "images": images, "seed": 0}, "rows": rows}


def test_robustness(tmp_path):
    models = {"MR-CNN": document([80, 70, 60, 50, 40]), "IMR-CNN": document([85, 75, None, 0, 1])}
    figure = plot_robustness(models, tmp_path / "robustness.png")
    jpeg, rotation = figure.axes
    first, second = (line for line in jpeg.lines if line.get_linestyle() != "None")
    assert first.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert first.get_ydata().tolist() == [90, 80, 70, 60, 50, 40]
    assert np.isnan(second.get_ydata()[3]) and first.get_color() != second.get_color()
    assert rotation.lines[0].get_ydata().tolist() == [90, 79, 69, 59, 49, 39]
    ticks = [tick.get_text() for tick in jpeg.get_xticklabels()]
    assert ticks == ["none", "50", "30", "20", "10", "5"]
    assert jpeg.get_ylabel() == "lesion: f1 (%)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(models)

    models = {"a": document([1] * 5, names=tuple(DISTORTIONS))}
    figure = plot_robustness(models, tmp_path / "r.svg", metric="lesion/fp_per_image")
    shown = [axes.get_title() for axes in figure.axes]
    assert shown == [distortion.title for distortion in DISTORTIONS.values()]
    assert figure.axes[0].get_ylabel() == "lesion: fp_per_image"

    models = {"a": document([1] * 5), "b": document([1] * 5, images=5)}
    output = tmp_path / "refused.png"
    with pytest.raises(ValueError, match="images"):
        plot_robustness(models, output)
    with pytest.raises(ValueError, match="segm/AP"):
        plot_robustness({"a": document([1] * 5)}, output, metric="segm/AP")
    assert not output.exists()
