"""The page as text; tests/report/test_report_browser.py opens it."""

import dataclasses
import json
import re

import html5lib
import pytest

from imrcnn_d2.report.html import render_report
from imrcnn_d2.report.runs import load_run


@pytest.fixture(scope="module")
def text(study_runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert render_report(list(study_runs.values()), path) == path
    return path.read_text(encoding="utf-8")


def parsed(text):
    """The page's elements, by strict rules."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def section(text, name):
    """The words of one section, as a reader sees them."""
    (found,) = (s for s in parsed(text).iter("section") if s.get("id") == name)
    return " ".join(" ".join(found.itertext()).split())


def test_it_is_sound_html(text):
    tree = parsed(text)
    ids = [node.get("id") for node in tree.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    links = [node.get("href")[1:] for node in tree.iter("a")]
    assert set(links) <= set(ids)
    for node in tree.iter():
        for key in ("aria-labelledby", "aria-describedby"):
            assert node.get(key, ids[0]) in ids
    assert tree.get("lang") == "en"


def test_it_needs_no_network(text):
    loaded = [
        node.get(key) for node in parsed(text).iter() for key in ("src", "srcset", "action")
        if node.get(key)
    ]  # fmt: skip
    assert loaded and all(source.startswith("data:") for source in loaded)
    assert not list(parsed(text).iter("link"))
    (style,) = parsed(text).iter("style")
    assert not re.search(r"@import|url\(", style.text)
    assert "default-src 'none'" in text


def test_each_image_is_there_once(text, study):
    coco = json.loads((study / "datasets/study/annotations/test.json").read_text())
    assert text.count('"jpeg"') == len(coco["images"])


def test_what_must_be_said(text):
    words = " ".join(" ".join(parsed(text).itertext()).split())
    assert words.count("Research use only, not a medical device.") == 2
    assert "0123abc, with uncommitted changes" in section(text, "run")
    assert "2: mask is empty" in section(text, "data")
    assert "43 images offered" in section(text, "data")
    assert "PPV at 0.5 %" in section(text, "screening")
    assert "IMR-CNN − MR-CNN" in section(text, "results")


def test_markup_in_names_stays_text(text):
    tree = parsed(text)
    assert not [image for image in tree.iter("img") if image.get("src") == "x"]
    scripts = ["".join(script.itertext()) for script in tree.iter("script")]
    assert len(scripts) == 2
    names = [image["name"] for image in json.loads(scripts[0])["images"]]
    assert "</script><script>hacked=1</script>.jpg" in names
    assert text.count("</script>") == 2


def test_markup_in_runs_stays_text(study_runs, tmp_path):
    run = study_runs["MR-CNN"]
    hostile = "<b>x</b>"
    run = dataclasses.replace(
        run,
        name=hostile,
        dataset=f"{hostile}_test",
        run={**run.run, "command": hostile, "device": hostile},
        config={"KEY": hostile},
    )
    page = render_report([run], tmp_path / "report.html", max_images=5)
    text = page.read_text(encoding="utf-8")
    assert hostile not in text
    assert section(text, "run").count(hostile) >= 4
    assert text.count('"jpeg"') == 5
    assert "5 of 24 test images, half the worst" in section(text, "gallery")


def test_older_runs_say_what_is_missing(study_runs, tmp_path):
    run = study_runs["MR-CNN"]
    kept = ("bbox", "segm", "lesion", "image", "meta")
    recorded = {
        name: {k: v for k, v in run.recorded[name].items() if not k.endswith("_ci")}
        for name in kept
    }
    recorded["meta"] |= {"bootstrap": None}
    old = dataclasses.replace(run, run=None, config=None, recorded=recorded)
    page = render_report([old, study_runs["IMR-CNN"]], tmp_path / "report.html")
    words = section(page.read_text(encoding="utf-8"), "results")
    assert "MR-CNN: no run.json was found" in words
    assert "MR-CNN: evaluated without intervals." in words
    assert "MR-CNN: no threshold chosen on validation data" in words
    assert ", IMR-CNN:" not in words


def test_runs_that_do_not_belong_together(study_runs, write_gt, write_run, tmp_path):
    first = study_runs["MR-CNN"]
    output = tmp_path / "report.html"
    with pytest.raises(ValueError, match="'MR-CNN'"):
        render_report([first, first], output)
    other = load_run(write_run("a", write_gt(tmp_path / "gt.json")))
    with pytest.raises(ValueError, match="different test sets"):
        render_report([first, other], output)
    recorded = {**first.recorded, "meta": {**first.meta, "tau": 0.5}}
    stricter = dataclasses.replace(first, name="other", recorded=recorded)
    with pytest.raises(ValueError, match="with tau 0.7, .* with 0.5"):
        render_report([first, stricter], output)
    assert not output.exists()


def test_nothing_detected_and_images_that_are_gone(write_gt, write_run, tmp_path):
    run = load_run(write_run("a", write_gt(tmp_path / "gt.json", images=6), dt=[]))
    page = render_report([run], tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    assert "n/a" in section(text, "results")
    assert "No gallery: " in section(text, "gallery")
    assert len(list(parsed(text).iter("script"))) == 0
