"""The page of an audit: whole, safe, and it states all findings."""

import csv
import json

import numpy as np
import pytest
from chromium import chromium, opened
from PIL import Image
from planted_faults import Planted

from imrcnn_d2.data.audit import Finding, audit, read_entries
from imrcnn_d2.report.audit import TILES, write_audit

HOSTILE = "<img src=x onerror=alert(1)>.jpg"


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A few synthetic images: one with an annotation twice, two alike in two splits, one broken."""
    planted = Planted(tmp_path_factory.mktemp("data"))
    first = planted.add(name=HOSTILE, patient_id="<b>p</b>")
    planted.annotate(first, **planted._splits["train"]["annotations"][0])
    other = planted.add(split="test", patient_id="<b>p</b>")
    Image.open(planted.images / HOSTILE).save(planted.images / other["file_name"], quality=95)
    dark = planted.add(np.zeros((192, 192, 3), np.uint8), split="test")
    dark |= {"width": None, "height": None}
    broken = planted.add(split="val")
    (planted.images / broken["file_name"]).write_text("nothing")
    result = audit(read_entries("<i>title</i>", planted.write(), planted.images))
    result.notes.append("<u>note</u>")
    return result


@pytest.fixture(scope="module")
def output(audited, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    write_audit(audited, folder)
    return folder


def test_the_page(audited, output, parse):
    text = (output / "audit.html").read_text()
    tree, sections = parse(text)
    kinds = [finding.kind for finding in audited.findings]
    assert {"overlapping", "black_frame", "unreadable", "patient_across_splits"} <= set(kinds)
    assert set(sections) == {"results", "annotations", *kinds}
    for kind, words in (
        ("overlapping", "1 finding"),
        ("overlapping", f"{HOSTILE} train"),
        ("unreadable", "cannot be read"),
        ("results", "Blurred"),
        ("patient_across_splits", "Patient <b>p</b> has 2 images: 1 in train, 1 in test."),
    ):
        assert words in sections[kind]
    assert "Like no other image" not in sections["results"]
    # SVG's elements are in a name space of their own.
    paths = {e.get("class") for e in tree.iter() if str(e.tag).rpartition("}")[2] == "path"}
    assert {"alarm", "truth"} <= paths
    boxes = [e.get("viewBox") for e in tree.iter() if str(e.tag).rpartition("}")[2] == "svg"]
    # A size that is not stated is the image's.
    assert boxes.count("0 0 192 192") >= 2 and not [box for box in boxes if "None" in box]
    # Nothing in the data becomes markup.
    assert not any(markup in text for markup in ("<img src=x", "<i>title", "<b>p", "<u>note"))
    assert not list(tree.iter("script"))


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_state_the_same(audited, output):
    document = json.loads((output / "audit.json").read_text())
    kinds = [finding.kind for finding in audited.findings]
    assert [finding["kind"] for finding in document["findings"]] == kinds
    assert document["images"] == 4 and document["flagged_images"] == len(audited.flagged)
    for row, finding in zip(rows(output / "findings.csv"), audited.findings, strict=True):
        assert row["detail"] == finding.detail
        assert tuple(filter(None, row["images"].split("; "))) == finding.images
        assert row["splits"].split("; ") == list(finding.splits or [""])
    images = {row["file_name"]: row for row in rows(output / "images.csv")}
    assert "overlapping" in images[HOSTILE]["flags"].split()
    assert (images["004.jpg"]["flags"], images["004.jpg"]["blur"]) == ("unreadable", "")


def test_many_findings_are_cut(audited, tmp_path):
    many = [Finding("outlier", (HOSTILE,), ("train",), f"No. {i}.") for i in range(TILES + 5)]
    before = audited.findings, audited.checked
    audited.add(many, "validity")
    page = write_audit(audited, tmp_path).read_text()
    audited.findings, audited.checked = before
    assert page.count("No. ") == TILES and f"first {TILES};" in page
    assert "Looks like another label" in page  # checked and not found


@pytest.mark.slow
def test_it_opens_in_a_browser(output):
    with chromium() as browser, opened(browser, output / "audit.html") as page:
        assert page.locator("#overlapping svg").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
