import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.evaluation.detection.curves import pr_curve
from imrcnn_d2.report.plots.curves import plot_pr_curves, plot_pr_panels


@pytest.fixture
def curve():
    """Hit, false alarm, hit, false alarm, hit; four ground truths."""
    score = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    return pr_curve(score, np.array([True, False, True, False, True]), 4)


def points(axes):
    """{marker: (recall, precision)} of the points marked."""
    marked = [line for line in axes.lines if line.get_marker() != "None" and len(line.get_xdata())]
    return {line.get_marker(): tuple(np.ravel(line.get_xydata())) for line in marked}


def test_the_picture_shows_curve_and_points(curve, tmp_path):
    figure = plot_pr_curves({"polyp": curve}, tmp_path / "pr.png", tau=0.7)
    (axes,) = figure.axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[0] == "polyp: AP50_voc 56.7, BEP 50.0"
    assert legend[1] == "operating point, score ≥ 0.7"
    assert points(axes)["o"] == pytest.approx((50, 200 / 3))  # after three detections: 2 hits
    assert points(axes)["D"] == pytest.approx((50, 50))
    steps = next(line for line in axes.lines if line.get_drawstyle() == "steps-pre")
    x, y = steps.get_data()
    # The area under the drawn steps is what the legend says.
    assert np.sum(np.diff(x) * y[1:]) / 100 == pytest.approx(100 * curve.area)
    with Image.open(tmp_path / "pr.png") as image:
        assert min(image.size) > 1000


def test_several_runs_differ_in_colour_and_style(curve, tmp_path):
    names = ["MR-CNN", "IBMR-CNN", "IMR-CNN"]
    figure = plot_pr_curves(dict.fromkeys(names, curve), tmp_path / "pr.svg")
    steps = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-pre"]
    assert len({line.get_color() for line in steps}) == 3
    assert len({str(line.get_linestyle()) for line in steps}) == 3
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [text.split(":")[0] for text in legend[:3]] == names


def test_panels(curve, tmp_path):
    """One a class, four of them in rows of three; the same figure in two formats."""
    panels = {f"class {i}": {"one": curve, "two": curve} for i in range(4)}
    paths = [tmp_path / "pr.png", tmp_path / "pr.svg"]
    figure = plot_pr_panels(panels, paths, tau=0.7)
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    for axes in figure.axes:
        steps = [line for line in axes.lines if line.get_drawstyle() == "steps-pre"]
        assert [line.get_label()[:3] for line in steps] == ["one", "two"]
    with Image.open(paths[0]) as image:
        assert image.size == (3 * 1200, 2 * 1220)
    assert "<svg" in paths[1].read_text()


def test_no_point_where_there_is_none(curve, tmp_path):
    few = pr_curve(np.array([0.5]), np.array([True]), 3)  # no break-even point, none above 0.7
    figure = plot_pr_curves({"few": few}, tmp_path / "pr.png", tau=0.7)
    assert not points(figure.axes[0])
    assert "BEP n/a" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_without_a_detection(tmp_path):
    figure = plot_pr_curves({}, tmp_path / "pr.png")
    assert (tmp_path / "pr.png").exists()
    assert [text.get_text() for text in figure.axes[0].texts] == ["No detections"]
