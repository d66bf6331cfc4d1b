"""The matrix and the contact sheet show what was computed."""

import numpy as np
import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.evaluation import Bootstrap
from imrcnn_d2.evaluation.annotator_agreement import agreement, read_annotator, read_model
from imrcnn_d2.report.agreement import agreement_table, plot_agreement, plot_disagreements


def annotator(name, regions, number=4):
    size = {"height": 40, "width": 50}
    return read_annotator(
        name,
        {
            "images": [{"id": i, "file_name": f"{i}.png", **size} for i in range(1, number + 1)],
            "categories": [{"id": 1, "name": "polyp"}],
            "annotations": regions,
        },
    )


@pytest.fixture(scope="module")
def found():
    """1.png alike, 2.png of Dice 2/3, 3.png of Anna alone, 4.png of nobody."""
    anna = annotator("anna", [rectangle(i, 0, 0, 10, 10) for i in (1, 2, 3)])
    ben = annotator("ben", [rectangle(1, 0, 0, 10, 10), rectangle(2, 0, 0, 10, 5)])
    model = read_model("model", [rectangle(1, 0, 0, 10, 10, score=0.9)], 0.7, anna)
    return agreement([anna, ben], model, bootstrap=Bootstrap(100))


@pytest.fixture
def images(tmp_path):
    for i in range(1, 5):
        Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_table(found):
    rows = [
        [cell.strip() for cell in line.split("|")] for line in agreement_table(found).split("\n")
    ]
    table = {row[1]: dict(zip(rows[0], row, strict=True)) for row in rows}
    assert table["anna vs ben"]["f1"].startswith(f"{found.values['anna vs ben']['f1']:.1f} [")
    assert table["anna vs ben"]["kappa"].startswith("0.50")
    assert "fleiss_kappa" in table[""] and table["annotators"]["fleiss_kappa"] == ""
    assert table["with_model"]["fleiss_kappa"] and not table["with_model"]["f1"]


def test_matrices(found, tmp_path):
    figure = plot_agreement(found, tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as image:
        image.load()
    f1, dice, kappa = figure.axes
    values = np.array(f1.images[0].get_array().filled(np.nan))
    expected = {"anna vs ben": (0, 1), "anna vs model": (0, 2), "ben vs model": (1, 2)}
    for name, (row, column) in expected.items():
        assert values[row, column] == pytest.approx(found.values[name]["f1"] / 100)
    np.testing.assert_equal(values, values.T)
    assert np.isnan(values.diagonal()).all()
    texts = {text.get_position(): text.get_text() for text in kappa.texts}
    assert texts[(1, 0)] == texts[(0, 1)] and texts[(1, 0)].startswith("0.50\n[")


def test_contact_sheet(found, images):
    figure = plot_disagreements(found, images, images / "sheet.png")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["2.png\nanna, not model", "3.png\nanna, not ben"]
    lines = figure.axes[0].lines  # 2.png: Anna's and Ben's
    assert len(lines) == 2 and lines[0].get_color() != lines[1].get_color()
    assert lines[1].get_ydata().max() == 4
    with pytest.raises(FileNotFoundError):
        plot_disagreements(found, images / "none", images / "none.png")


def test_two_annotators_and_how_far_they_differ(images):
    pair = [
        annotator("a", [rectangle(1, 0, 0, 10, 10), rectangle(2, 0, 0, 10, 10)]),
        annotator("b", [rectangle(1, 0, 0, 10, 5), rectangle(2, 0, 0, 10, 8)]),
    ]
    figure = plot_disagreements(agreement(pair), images, images / "sheet.png", max_images=1)
    assert [axes.get_title() for axes in figure.axes] == ["1.png\nDice 67 %"]
    assert (
        plot_disagreements(agreement([pair[0], annotator("c", [])]), images, images / "s.png")
        .axes[0]
        .get_title()
        == "1.png\na, not c"
    )


def test_no_sheet_where_all_agree(images):
    regions = [rectangle(1, 0, 0, 10, 10)]
    same = agreement([annotator("a", regions), annotator("b", regions)])
    assert plot_disagreements(same, images, images / "sheet.png") is None
    assert not (images / "sheet.png").exists()
