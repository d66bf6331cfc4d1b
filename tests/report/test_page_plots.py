import base64
from xml.etree import ElementTree

import pytest

from imrcnn_d2.report.html.page import curve_plots
from imrcnn_d2.report.runs import load_run

PREFIX = "data:image/svg+xml;base64,"


@pytest.fixture(scope="module")
def runs(study_runs):
    return [study_runs["MR-CNN"], study_runs["IMR-CNN"]]


def words(picture):
    """All text in a picture."""
    assert picture["source"].startswith(PREFIX)
    root = ElementTree.fromstring(base64.b64decode(picture["source"].removeprefix(PREFIX)))
    return [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_all_curves_of_all_models(runs):
    drawn, missing = curve_plots(runs)
    assert missing == []
    assert [picture["title"] for picture in drawn] == [
        "Precision and recall",
        "Free-response ROC",
        "ROC of images",
        "Calibration",
        "Metrics over the threshold",
    ]
    for picture in drawn:
        text = words(picture)
        for run in runs:
            assert any(run.name in word for word in text)
    pr, froc, roc, calibration, _ = drawn
    for run in runs:
        assert f"{run.name}: {run.metrics['segm']['AP50_voc']:.1f}" in pr["alt"]
        assert f"{run.name}: {run.metrics['froc']['mean']:.1f}" in froc["alt"]
        assert f"{run.name}: {run.metrics['image']['auroc']:.1f}" in roc["alt"]
        assert f"{run.name}: {run.metrics['calibration']['ece']:.1f}" in calibration["alt"]
    assert 500 < pr["width"] < 700


def test_classes_have_a_curve_each(write_gt, write_run, tmp_path):
    gt = write_gt(tmp_path / "gt.json", classes=("polyp", "cancer"))
    drawn, _ = curve_plots([load_run(f"mine={write_run('a', gt)}")])
    text = " ".join(words(drawn[0]))
    assert "mine, polyp" in text
    assert "mine, cancer" in text


def test_what_cannot_be_drawn_is_said(write_gt, write_run, tmp_path):
    gt = write_gt(tmp_path / "gt.json", images=1)  # with one lesion
    drawn, missing = curve_plots([load_run(write_run("a", gt, dt=[]))])
    assert "ROC of images" not in [picture["title"] for picture in drawn]
    assert missing == ["No ROC curve: the test set has no image without a lesion."]
