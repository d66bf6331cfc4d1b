import numpy as np
import pytest
from matplotlib.colors import to_rgb
from sklearn.metrics import auc

from imrcnn_d2.evaluation.detection.counts import UnitCounts
from imrcnn_d2.report.plots.curves import plot_roc_curves
from imrcnn_d2.report.plots.style import STYLES


def counts(lesions, score):
    nothing = np.zeros(len(lesions))
    fields = {name: nothing for name in UnitCounts.__dataclass_fields__}
    return UnitCounts(**{**fields, "lesions": np.array(lesions), "score": np.array(score)})


def line(figure, number=0):
    colour = to_rgb(STYLES[number][0])
    return [line for line in figure.axes[0].lines if to_rgb(line.get_color()) == colour]


def test_curve_area_and_operating_point(tmp_path):
    # Worked by hand: of 6 pairs of an image with and one without a lesion 5 are in order.
    own = counts([1, 2, 1, 0, 0], [0.9, 0.8, 0.3, 0.5, 0.0])
    figure = plot_roc_curves({"one": own}, tmp_path / "roc.svg", tau=0.5)
    curve, dot = line(figure)
    x, y = curve.get_xydata().T
    assert auc(x, y) / 100**2 == pytest.approx(5 / 6)
    assert dot.get_xydata().tolist() == [[50, pytest.approx(200 / 3)]]  # at 0.5 itself, too
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "one: AUROC 83.3"
    assert (tmp_path / "roc.svg").read_bytes().startswith(b"<?xml")


def test_models_differ_in_colour_and_line(tmp_path):
    own = counts([1, 0], [0.9, 0.8])
    figure = plot_roc_curves({"a": own, "b": own}, tmp_path / "roc.png", tau=0.7)
    first, second = line(figure)[0], line(figure, 1)[0]
    assert first.get_linestyle() != second.get_linestyle()


def test_no_score_reaches_the_threshold(tmp_path):
    figure = plot_roc_curves({"a": counts([1, 0], [0.4, 0.2])}, tmp_path / "roc.png", tau=0.7)
    assert line(figure)[1].get_xydata().tolist() == [[0, 0]]
