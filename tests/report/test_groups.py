"""The table and picture of figures by group show what was computed."""

import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.subgroups import By, with_groups
from imrcnn_d2.report.plots import plot_groups
from imrcnn_d2.report.tables import groups_table


@pytest.fixture(scope="module")
def results():
    """Centre A finds 2 of 3, B its only lesion; one lesion-free image each, a false alarm in B."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": 40, "width": 50, "centre": "AAAABB"[i - 1]}
        for i in range(1, 7)
    ]
    lesions = [rectangle(i, 0, 0, 10, 10, paris="Is") for i in (1, 2, 3, 5)]
    data = {
        "images": images,
        "categories": [{"id": 1, "name": "polyp"}],
        "annotations": lesions,
    }
    found = [rectangle(i, 0, 0, 10, 10, score=0.9) for i in (1, 2, 5, 6)]
    bootstrap = Bootstrap(200)
    whole = evaluate_lesions(data, found, bootstrap=bootstrap)
    return with_groups(whole, [By("centre"), By("paris")], bootstrap=bootstrap)


def cells(table):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_table(results):
    rows = cells(groups_table(results, "centre"))
    assert rows[""] == ["all", "A", "B"]
    assert rows["images"] == ["6", "4", "2"] and rows["lesions"] == ["4", "3", "1"]
    assert [cell.split()[0] for cell in rows["lesion recall"]] == ["75.00", "66.67", "100.00"]
    assert [cell.split()[0] for cell in rows["image specificity"]] == ["50.00", "100.00", "0.00"]
    low, high = results.by_group["centre"].groups["A"].intervals["lesion"]["recall"]
    assert rows["lesion recall"][1] == f"66.67 [{low:.2f}, {high:.2f}]"
    rows = cells(groups_table(results, "paris"))
    assert rows[""] == ["all", "Is"] and "lesion precision" not in rows


def test_patients_that_only_one_group_knows(tmp_path):
    images = [
        {"id": i, "file_name": f"{i}.png", "height": 40, "width": 50, "centre": "AAB"[i - 1]}
        for i in (1, 2, 3)
    ]
    images[0]["patient_id"] = images[1]["patient_id"] = "p"
    data = {
        "images": images,
        "categories": [{"id": 1, "name": "polyp"}],
        "annotations": [rectangle(i, 0, 0, 10, 10) for i in (1, 2, 3)],
    }
    whole = with_groups(evaluate_lesions(data, []), [By("centre")])
    rows = cells(groups_table(whole, "centre"))
    assert rows["images"] == ["3", "2", "1"]
    assert rows["patients"] == ["", "1", ""]
    plot_groups(whole, "centre", tmp_path / "by.png")


def test_picture(results, tmp_path):
    figure = plot_groups(results, "centre", tmp_path / "by.png")
    with Image.open(tmp_path / "by.png") as image:
        image.load()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[2] == "recall (lesions)" and titles[-1] == "specificity (images)"
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["all\n4 lesions, 6 images", "A\n3 lesions, 4 images", "B\n1 lesion, 2 images"]
    lines = figure.axes[2].lines
    dots = [
        (*line.get_xdata(), *line.get_ydata()) for line in lines if line.get_marker() in ("o", "D")
    ]
    assert dots == [(75, 0), (pytest.approx(200 / 3), 1), (100, 2)]
    low, high = results.by_group["centre"].groups["A"].intervals["lesion"]["recall"]
    assert any(list(line.get_xdata()) == [low, high] for line in lines)


def test_figures_that_nothing_defines_are_not_drawn(results, tmp_path):
    bare = [{k: v for k, v in image.items()} for image in results.ground_truth.images[:3]]
    data = {
        "images": bare,
        "categories": [{"id": 1, "name": "polyp"}],
        "annotations": [rectangle(i, 0, 0, 10, 10) for i in (1, 2, 3)],
    }
    whole = with_groups(evaluate_lesions(data, []), [By("centre")])
    titles = [a.get_title() for a in plot_groups(whole, "centre", tmp_path / "by.png").axes]
    assert "specificity (images)" not in titles and "recall (lesions)" in titles
