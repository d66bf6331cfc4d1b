"""The page of classifiers, as text and in a browser."""

import json

import html5lib
import pytest
from chromium import chromium, opened
from recognition_runs import draw_classes, prepare_classes, write_classifier

from imrcnn_d2.report.html import render_report
from imrcnn_d2.report.html.gallery import classification_gallery
from imrcnn_d2.report.runs import load_run

HOSTILE = "</script><img src=x onerror=hacked=1>.png"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two classifiers on 36 images, one with a hostile name and one of a known patient."""
    root = tmp_path_factory.mktemp("recognition_page")
    draw_classes(root / "raw", (24, 24, 24))
    out = prepare_classes(root / "raw", root / "gastric_recognition", ratio=(1, 1, 2)).out
    gt = out / "annotations" / "test.json"
    content = json.loads(gt.read_text())
    first, second = content["images"][:2]
    (out / "images" / HOSTILE).parent.mkdir(exist_ok=True)
    (out / "images" / first["file_name"]).rename(out / "images" / HOSTILE)
    first["file_name"], second["patient_id"] = HOSTILE, "P-7"
    gt.write_text(json.dumps(content))
    skills = {"vgg19": 0.5, "resnet50": 1.0}
    return [
        load_run(write_classifier(root / "runs" / name, gt, skill=skill, backbone=name))
        for name, skill in skills.items()
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return render_report(runs, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def tree(page):
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    return parser.parse(page.read_text(encoding="utf-8"))


def section(tree, name):
    (found,) = (s for s in tree.iter("section") if s.get("id") == name)
    return " ".join(" ".join(found.itertext()).split())


def test_it_is_sound_html_and_needs_no_network(tree):
    ids = [node.get("id") for node in tree.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    assert {node.get("href")[1:] for node in tree.iter("a")} <= set(ids)
    sources = [node.get("src") for node in tree.iter("img")]
    assert len(sources) == 2 and all(source.startswith("data:") for source in sources)
    assert not list(tree.iter("link"))


def test_the_figures_are_those_of_the_evaluation(runs, tree):
    results = section(tree, "results")
    for run in runs:
        figures = run.metrics["recognition"]
        low, high = figures["balanced_accuracy_ci"]
        assert f"{figures['balanced_accuracy']:.1f} [{low:.1f}, {high:.1f}]" in results
        assert f"{run.metrics['cancer']['specificity']:.1f}" in results
        for name in run.metrics["meta"]["classes"]:
            assert f"{figures[f'accuracy_{name}']:.1f}" in results
            assert f"{figures[f'precision_{name}']:.1f}" in section(tree, "metrics")
    assert "ResNet50, published" in results and "93" in results
    assert "ResNet50 − VGG19 balanced accuracy (primary)" in results


def test_what_was_run(tree):
    run = section(tree, "run")
    assert "224 × 224 pixels" in run
    assert "pre-training: head for 30 iterations at a rate of 0.001" in run
    assert "Score threshold" not in run


def test_confusions_and_who_was_in(runs, tree):
    confusion = section(tree, "confusion")
    for row in runs[0].results.confusion.rows():
        for count in row:
            assert f"{count} {100 * count / sum(row):.1f} %" in confusion
    data = section(tree, "data")
    assert "72 images offered" in data and "12 gastric cancer" in data
    assert "lesion" not in data


def test_a_large_test_set_is_cut(runs, tmp_path):
    path = render_report(runs, tmp_path / "report.html", max_images=10)
    text = path.read_text(encoding="utf-8")
    assert text.count('"jpeg"') == 10
    assert "10 of 36 test images" in text
    truth = runs[0].results.ground_truth
    own = [run.results.probability[range(36), truth.label] for run in runs]
    worst = (own[0] + own[1]).argsort()[:5]
    names = [image["name"] for image in classification_gallery(runs, 10)["images"]]
    assert {truth.images[i]["file_name"] for i in worst} <= set(names)
    assert len(set(names)) == 10


def test_without_images_the_gallery_is_left_out(runs, tmp_path):
    images = runs[0].gt_path.parent.parent / "images"
    images.rename(images.with_name("gone"))
    try:
        page = render_report(runs, tmp_path / "report.html")
    finally:
        images.with_name("gone").rename(images)
    text = page.read_text(encoding="utf-8")
    assert "No gallery:" in text and "<script" not in text


@pytest.mark.slow
def test_in_a_browser(runs, page):
    right = [[bool(r) for r in run.results.right()] for run in runs]
    with chromium() as browser, opened(browser, page) as tab:
        assert tab.evaluate("window.hacked") is None

        def shown(choice):
            tab.check(f"input[name=show][value={choice}]", force=True)
            return tab.locator(".tiles > li").count()

        assert shown("all") == 36
        wrong = sum(not all(pair) for pair in zip(*right, strict=True))
        assert shown("wrong") == wrong and shown("right") == 36 - wrong
        called = [run.results.probability.argmax(axis=1) for run in runs]
        assert shown("disagree") == (called[0] != called[1]).sum()
        tab.select_option("select[name=model]", "1")
        assert shown("wrong") == right[1].count(False)
        shown("all")
        tab.select_option("select[name=label]", "2")
        assert tab.locator(".tiles > li").count() == 12
        assert tab.locator(".tiles .panel > b").all_inner_texts() == ["gastric ulcer"] * 12

        tab.locator(".tiles button").first.click()
        tab.keyboard.press("End")
        assert tab.locator(".viewer-place").inner_text().startswith("12 of 12")
        assert tab.locator("dialog .verdict").count() == 2
        tab.keyboard.press("Escape")
        assert not tab.locator("dialog").is_visible()
        place = "document.activeElement.parentElement.matches(':last-child')"
        tab.wait_for_function(place)  # the focus is where the viewer was left
        tab.keyboard.press("ArrowLeft")
        assert not tab.evaluate(place)
        printed = tab.locator("[data-print]").text_content()
        assert "12 of 12 images (All, gastric ulcer, ResNet50, worst first)" in printed
        tab.set_viewport_size({"width": 400, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
