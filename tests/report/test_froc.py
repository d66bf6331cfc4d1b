import numpy as np
import pytest

from imrcnn_d2.evaluation.detection.curves import FROC
from imrcnn_d2.report.plots.curves import plot_froc


@pytest.fixture
def froc():
    """Hit, false alarm, hit, false alarm in two images; three lesions."""
    score = np.array([0.9, 0.8, 0.7, 0.6])
    hit = np.array([True, False, True, False])
    return FROC(score, hit, np.array([0, 0, 1, 1]), np.array([1, 2]))


def test_steps_and_operating_point(froc, tmp_path):
    figure = plot_froc({"polyp": froc}, tmp_path / "froc.png", tau=0.7)
    (axes,) = figure.axes
    steps, beyond, point, *_ = axes.lines
    assert steps.get_drawstyle() == "steps-post"  # up at a hit, never on a slope
    x, y = steps.get_data()
    assert x == pytest.approx([0, 0, 0.5, 0.5, 1])
    assert y == pytest.approx([0, 100 / 3, 100 / 3, 200 / 3, 200 / 3])
    assert beyond.get_xydata() == pytest.approx(np.array([[1, 200 / 3], [8, 200 / 3]]))
    assert np.ravel(point.get_xydata()) == pytest.approx([0.5, 200 / 3])
    # At 1/8 and 1/4 the first hit, from 1/2 on two of three.
    mean = (2 * 100 / 3 + 5 * 200 / 3) / 7
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == [f"polyp: mean {mean:.1f}", "operating point, score ≥ 0.7"]
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks == ["1/32", "1/16", "1/8", "1/4", "1/2", "1", "2", "4", "8"]
    assert (tmp_path / "froc.png").stat().st_size


def test_a_point_without_false_alarms_is_on_the_edge(froc, tmp_path):
    figure = plot_froc({"polyp": froc}, tmp_path / "froc.svg", tau=0.85)
    assert np.ravel(figure.axes[0].lines[2].get_xydata()) == pytest.approx([1 / 32, 100 / 3])


def test_several_runs_and_none_without_scores(froc, tmp_path):
    unscored = FROC(np.ones(4), froc.hit, froc.image, froc.lesions, scored=False)
    runs = {"a": froc, "b": froc, "masks": unscored}
    figure = plot_froc(runs, tmp_path / "froc.png")
    legend = figure.axes[0].get_legend()
    assert [t.get_text().split(":")[1][:4] for t in legend.get_texts()[:3]][2] == " n/a"
    colours = [line.get_color() for line in legend.get_lines()[:3]]
    assert len(set(colours)) == 3
