import numpy as np
import pytest

from imrcnn_d2.report.plots.curves import THRESHOLD_COLUMNS, plot_thresholds


def table(specificity):
    return [
        {
            **dict.fromkeys(THRESHOLD_COLUMNS, 100 * (1 - tau)),
            "tau": tau,
            "image_specificity": specificity,
        }
        for tau in (0.1, 0.5, 0.9)
    ]


def test_one_run_is_one_panel(tmp_path):
    figure = plot_thresholds({"IMR-CNN": table(np.nan)}, tmp_path / "t.png", tau=0.6)
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([[0.1, 90], [0.5, 50], [0.9, 10]]))
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["Precision", "Recall", "F1", "threshold 0.6"]  # specificity is undefined
    assert "IMR-CNN" in axes.get_title()
    assert (tmp_path / "t.png").stat().st_size


def test_several_runs_have_a_panel_a_figure(tmp_path):
    figure = plot_thresholds({"a": table(50), "b": table(np.nan)}, tmp_path / "t.svg")
    assert [axes.get_title() for axes in figure.axes] == list(THRESHOLD_COLUMNS.values())
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["a", "b", "threshold 0.7"]
    assert not figure.axes[3].texts
    figure = plot_thresholds({"a": table(np.nan), "b": table(np.nan)}, tmp_path / "t.svg")
    assert figure.axes[3].texts[0].get_text() == "undefined"


def test_without_scores(tmp_path):
    """No rows: nothing to draw, and no failure."""
    plot_thresholds({"masks": []}, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size
