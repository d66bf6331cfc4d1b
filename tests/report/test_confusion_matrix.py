import numpy as np
import pytest
from matplotlib.image import AxesImage

from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix
from imrcnn_d2.report.plots.matrices import plot_confusion_matrix


@pytest.fixture
def matrix():
    counts = np.array([[6, 1, 1], [0, 0, 0], [3, 2, np.nan]])
    return ConfusionMatrix(["cancer", "ulcer", "background"], counts)


def test_cells(matrix, tmp_path):
    figure = plot_confusion_matrix({"IMR-CNN": matrix}, tmp_path / "matrix.png")
    (axes,) = figure.axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells[0, 0] == "6\n75.0 %"  # x is the prediction, y the truth
    assert cells[1, 0] == "1\n12.5 %"
    assert cells[0, 1] == "0"
    assert cells[0, 2] == "3"
    assert (2, 2) not in cells and len(axes.patches) == 1
    assert [tick.get_text() for tick in axes.get_yticklabels()] == matrix.classes
    assert axes.get_title() == "IMR-CNN"
    (shade,) = [child for child in axes.get_children() if isinstance(child, AxesImage)]
    assert shade.get_array()[0].tolist() == [0.75, 0.125, 0.125]
    assert not shade.get_array()[1:].any()


def test_side_by_side(matrix, tmp_path):
    figure = plot_confusion_matrix({"a": matrix, "b": matrix}, tmp_path / "matrix.svg")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert (tmp_path / "matrix.svg").stat().st_size
