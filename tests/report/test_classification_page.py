"""The page of classifiers, as text and in a browser."""

import json

import pytest
from chromium import chromium, opened
from recognition_runs import draw_classes, prepare_classes, write_classifier

from imrcnn_d2.report import load_run
from imrcnn_d2.report.html import render_report
from imrcnn_d2.report.html.page import classification_gallery

HOSTILE = "</script><img src=x onerror=hacked=1>.png"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two classifiers on 36 images, one with a hostile name and one of a known patient."""
    root = tmp_path_factory.mktemp("classification_page")
    draw_classes(root / "raw", (24, 24, 24))
    out = prepare_classes(root / "raw", root / "gastric_recognition", ratio=(1, 1, 2)).out
    gt = out / "annotations" / "test.json"
    content = json.loads(gt.read_text())
    first, second = content["images"][:2]
    (out / "images" / HOSTILE).parent.mkdir(exist_ok=True)
    (out / "images" / first["file_name"]).rename(out / "images" / HOSTILE)
    first["file_name"], second["patient_id"] = HOSTILE, "P-7"
    gt.write_text(json.dumps(content))
    return [
        load_run(write_classifier(root / "runs" / name, gt, skill=skill, backbone=name))
        for name, skill in (("vgg19", 0.5), ("resnet50", 1.0))
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return render_report(runs, tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_is_sound_and_has_the_values_of_the_evaluation(runs, page, parse):
    tree, sections = parse(page.read_text(encoding="utf-8"))
    assert len(list(tree.iter("img"))) == 2
    top = sections["results"]
    for run in runs:
        metrics = run.metrics["recognition"]
        low, high = metrics["balanced_accuracy_ci"]
        assert f"{metrics['balanced_accuracy']:.1f} [{low:.1f}, {high:.1f}]" in top
        assert f"{run.metrics['cancer']['specificity']:.1f}" in top
        for name in run.metrics["meta"]["classes"]:
            assert f"{metrics[f'accuracy_{name}']:.1f}" in top
            assert f"{metrics[f'precision_{name}']:.1f}" in sections["metrics"]
        for row in run.results.confusion.rows():
            for count in row:
                assert f"{count} {100 * count / sum(row):.1f} %" in sections["confusion"]
    assert "Score threshold" not in sections["run"] and "lesion" not in sections["data"]
    for name, words in (
        ("results", "ResNet50, published"),
        ("results", "ResNet50 − VGG19 balanced accuracy (primary)"),
        ("run", "224 × 224 pixels"),
        ("run", "pre-training: head for 30 iterations at a rate of 0.001"),
        ("data", "72 images offered"),
        ("data", "12 gastric cancer"),
    ):
        assert words in sections[name]


def test_the_gallery_of_a_large_test_set_is_cut(runs, tmp_path):
    text = render_report(runs, tmp_path / "report.html", max_images=10).read_text(encoding="utf-8")
    assert text.count('"jpeg"') == 10 and "10 of 36 test images" in text
    truth = runs[0].results.ground_truth
    of_truth = sum(run.results.probability[range(36), truth.label] for run in runs)
    names = {image["name"] for image in classification_gallery(runs, 10)["images"]}
    assert {truth.images[i]["file_name"] for i in of_truth.argsort()[:5]} <= names
    assert len(names) == 10


@pytest.mark.slow
def test_in_a_browser(runs, page):
    right = [[bool(r) for r in run.results.right()] for run in runs]
    with chromium() as browser, opened(browser, page) as tab:
        assert tab.evaluate("window.hacked") is None
        tiles = tab.locator(".tiles > li")

        def shown(choice):
            tab.check(f"input[name=show][value={choice}]", force=True)
            return tiles.count()

        assert shown("all") == 36
        wrong = sum(not all(pair) for pair in zip(*right, strict=True))
        assert shown("wrong") == wrong and shown("right") == 36 - wrong
        first, second = (run.results.probability.argmax(axis=1) for run in runs)
        assert shown("disagree") == (first != second).sum()
        tab.select_option("select[name=model]", "1")
        assert shown("wrong") == right[1].count(False)
        shown("all")
        tab.select_option("select[name=label]", "2")
        assert tab.locator(".tiles .panel > b").all_inner_texts() == ["gastric ulcer"] * 12

        tab.locator(".tiles button").first.click()
        tab.keyboard.press("End")
        assert tab.locator(".viewer-place").inner_text().startswith("12 of 12")
        assert tab.locator("dialog .verdict").count() == 2
        tab.keyboard.press("Escape")
        assert not tab.locator("dialog").is_visible()
        printed = tab.locator("[data-print]").text_content()
        assert "12 of 12 images (All, gastric ulcer, ResNet50, worst first)" in printed
        tab.set_viewport_size({"width": 400, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
