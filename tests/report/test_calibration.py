import numpy as np
import pytest
from scipy.stats import beta

from imrcnn_d2.evaluation.calibration import Calibration
from imrcnn_d2.report.plots.curves import plot_calibration


@pytest.fixture
def calibration():
    """Of four detections around 0.25 one hits, of two at 0.95 both."""
    score = np.array([0.22, 0.24, 0.26, 0.28, 0.95, 0.95])
    hit = np.array([False, False, False, True, True, True])
    return Calibration(score, hit, np.zeros(6, int), 1)


def test_points_intervals_and_counts(calibration, tmp_path):
    figure = plot_calibration({"polyp": calibration}, tmp_path / "calibration.png")
    top, bottom = figure.axes
    (container,) = top.containers
    points, _, (bars,) = container.lines
    assert points.get_xydata() == pytest.approx(np.array([[25, 25], [95, 100]]))
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx(
        (100 * beta.ppf(0.025, 1, 4), 100 * beta.ppf(0.975, 2, 3))  # Clopper and Pearson's
    )
    assert bars.get_segments()[1][:, 1] == pytest.approx([100 * 0.025**0.5, 100])
    counts = [text.get_text() for text in bottom.texts]
    assert counts == ["0", "0", "4", "0", "0", "0", "0", "0", "0", "2"]
    legend = [text.get_text() for text in top.get_legend().get_texts()]
    brier = np.mean([0.22**2, 0.24**2, 0.26**2, 0.72**2, 0.05**2, 0.05**2])
    assert legend == ["ideal", f"polyp: ECE {2 / 6 * 5:.1f} %, Brier {brier:.3f}"]


def test_several_runs(calibration, tmp_path):
    nothing = Calibration(np.zeros(0), np.zeros(0, bool), np.zeros(0, int), 1)
    runs = {"a": calibration, "b": calibration, "none": nothing}
    figure = plot_calibration(runs, tmp_path / "calibration.svg")
    top, bottom = figure.axes
    lines = [container.lines[0] for container in top.containers]
    assert len({line.get_color() for line in lines}) == 3
    assert len({line.get_marker() for line in lines}) == 3
    assert not bottom.texts
    assert top.get_legend().get_texts()[3].get_text() == "none: n/a"
