"""The matrix and the contact sheet show what was computed."""

import numpy as np
import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.evaluation import Bootstrap
from imrcnn_d2.evaluation.annotator_agreement import agreement, read_annotator, read_model
from imrcnn_d2.report.agreement import agreement_table, plot_agreement, plot_disagreements


def annotator(name, boxes):
    """Who annotated (image, height) boxes of four images."""
    size = {"height": 40, "width": 50}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", **size} for i in range(1, 5)],
        "categories": [{"id": 1, "name": "polyp"}],
        "annotations": [rectangle(image, 0, 0, 10, height) for image, height in boxes],
    }
    return read_annotator(name, content)


@pytest.fixture(scope="module")
def result():
    """1.png alike, 2.png of Dice 2/3, 3.png of Anna alone, 4.png of nobody."""
    anna = annotator("anna", [(1, 10), (2, 10), (3, 10)])
    ben = annotator("ben", [(1, 10), (2, 5)])
    model = read_model("model", [rectangle(1, 0, 0, 10, 10, score=0.9)], 0.7, anna)
    return agreement([anna, ben], model, bootstrap=Bootstrap(100))


def test_table_and_matrices(result, tmp_path):
    lines = agreement_table(result).split("\n")
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    table = {row[1]: dict(zip(rows[0], row, strict=True)) for row in rows}
    assert table["anna vs ben"]["f1"].startswith(f"{result.values['anna vs ben']['f1']:.1f} [")
    assert table["anna vs ben"]["kappa"].startswith("0.50")
    assert "fleiss_kappa" in table[""] and table["annotators"]["fleiss_kappa"] == ""
    assert table["with_model"]["fleiss_kappa"] and not table["with_model"]["f1"]

    f1, _, kappa = plot_agreement(result, tmp_path / "matrix.png").axes
    values = np.array(f1.images[0].get_array().filled(np.nan))
    pairs = "anna vs ben", "anna vs model", "ben vs model"
    expected = np.array([result.values[pair]["f1"] / 100 for pair in pairs])
    np.testing.assert_allclose(values[[0, 0, 1], [1, 2, 2]], expected)
    np.testing.assert_equal(values, values.T)
    assert np.isnan(values.diagonal()).all()
    texts = {text.get_position(): text.get_text() for text in kappa.texts}
    assert texts[(1, 0)] == texts[(0, 1)] and texts[(1, 0)].startswith("0.50\n[")
    assert (tmp_path / "matrix.png").stat().st_size


def test_contact_sheet(result, tmp_path):
    for i in range(1, 5):
        Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")

    def sheet(compared, **options):
        return plot_disagreements(compared, tmp_path, tmp_path / "sheet.png", **options)

    first, c = annotator("a", [(1, 10), (2, 10)]), annotator("c", [])
    b = annotator("b", [(1, 5), (2, 8)])
    assert sheet(agreement([first, annotator("d", [(1, 10), (2, 10)])])) is None
    assert not (tmp_path / "sheet.png").exists()
    for compared, options, expected in (
        (agreement([first, b]), {"max_images": 1}, ["1.png\nDice 67 %"]),
        (agreement([first, c]), {}, ["1.png\na, not c", "2.png\na, not c"]),
        (result, {}, ["2.png\nanna, not model", "3.png\nanna, not ben"]),
    ):
        figure = sheet(compared, **options)
        assert [axes.get_title() for axes in figure.axes if axes.get_title()] == expected
    lines = figure.axes[0].lines  # 2.png: Anna's and Ben's
    assert len(lines) == 2 and lines[0].get_color() != lines[1].get_color()
    assert lines[1].get_ydata().max() == 4
    with pytest.raises(FileNotFoundError):
        plot_disagreements(result, tmp_path / "none", tmp_path / "none.png")
