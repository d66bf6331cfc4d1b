"""The page of an audit: whole, safe, and it says what was found."""

import csv
import json

import html5lib
import numpy as np
import pytest
from chromium import chromium, opened
from PIL import Image
from planted_faults import Planted

from imrcnn_d2.data.audit.audit import audit
from imrcnn_d2.data.audit.findings import finding, read_entries
from imrcnn_d2.report.audit import TILES, write_audit

HOSTILE = "<img src=x onerror=alert(1)>.jpg"


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A few drawn images: one with an outline on it twice, two alike in two splits, one broken."""
    planted = Planted(tmp_path_factory.mktemp("data"))
    first = planted.add(name=HOSTILE, patient_id="<b>p</b>")
    planted.annotate(first, **planted._splits["train"]["annotations"][0])
    other = planted.add(split="test", patient_id="<b>p</b>")
    Image.open(planted.images / HOSTILE).save(planted.images / other["file_name"], quality=95)
    dark = planted.add(np.zeros((192, 192, 3), np.uint8), split="test")
    dark |= {"width": None, "height": None}
    broken = planted.add(split="val")
    (planted.images / broken["file_name"]).write_text("nothing")
    result = audit(read_entries("<i>own</i>", planted.write(), planted.images))
    result.notes.append("<u>note</u>")
    return result


@pytest.fixture(scope="module")
def output(audited, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    write_audit(audited, folder)
    return folder


def test_it_says_what_was_found(audited, output):
    tree = html5lib.parse((output / "audit.html").read_text(), namespaceHTMLElements=False)
    sections = {s.get("id"): " ".join(" ".join(s.itertext()).split()) for s in tree.iter("section")}
    kinds = [found.kind for found in audited.findings]
    assert {"overlapping", "black_frame", "unreadable", "patient_across_splits"} <= set(kinds)
    assert set(sections) == {"results", "annotations", *kinds}
    assert "1 finding" in sections["overlapping"]
    assert f"{HOSTILE} train" in sections["overlapping"]
    assert "cannot be read" in sections["unreadable"]
    assert "Blurred" in sections["results"] and "Like no other image" not in sections["results"]
    assert (
        "Patient <b>p</b> has 2 images: 1 in train, 1 in test."
        in (sections["patient_across_splits"])
    )
    # SVG's elements are in a name space of their own.
    drawn = [e.get("class") for e in tree.iter() if str(e.tag).endswith("}path")]
    assert "alarm" in drawn and "truth" in drawn


def test_a_size_that_is_not_stated_is_the_images(output):
    tree = html5lib.parse((output / "audit.html").read_text(), namespaceHTMLElements=False)
    boxes = [e.get("viewBox") for e in tree.iter() if str(e.tag).endswith("}svg")]
    assert boxes.count("0 0 192 192") >= 2
    assert not [box for box in boxes if box and "None" in box]


def test_nothing_in_the_data_becomes_markup(output):
    text = (output / "audit.html").read_text()
    tree = html5lib.parse(text, namespaceHTMLElements=False)
    assert not [image for image in tree.iter("img") if image.get("src") == "x"]
    for markup in ("<i>own", "<b>p", "<u>note"):
        assert markup not in text
    assert not list(tree.iter("script"))


def test_the_files_say_the_same(audited, output):
    document = json.loads((output / "audit.json").read_text())
    assert [found["kind"] for found in document["findings"]] == [f.kind for f in audited.findings]
    assert document["images"] == 4 and document["flagged_images"] == len(audited.flagged)
    with open(output / "findings.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["detail"] for row in rows] == [found.detail for found in audited.findings]
    for row, found in zip(rows, audited.findings, strict=True):
        assert tuple(filter(None, row["images"].split("; "))) == found.images
        assert row["splits"].split("; ") == list(found.splits or [""])
    with open(output / "images.csv", newline="") as file:
        rows = {row["file_name"]: row for row in csv.DictReader(file)}
    assert "overlapping" in rows[HOSTILE]["flags"].split()
    assert rows["004.jpg"]["flags"] == "unreadable" and rows["004.jpg"]["blur"] == ""


def test_many_findings_are_cut(audited, tmp_path):
    many = [
        finding("outlier", [HOSTILE], ["train"], f"No. {i}.", score=i) for i in range(TILES + 5)
    ]
    before = audited.findings, audited.checked
    audited.add(many, "validity")
    page = write_audit(audited, tmp_path).read_text()
    audited.findings, audited.checked = before
    assert f"The first {TILES}; all are in findings.csv." in page
    assert page.count("No. ") == TILES
    assert "Looks like another label" in page  # checked and not found


@pytest.mark.slow
def test_it_opens_in_a_browser(output):
    with chromium() as browser, opened(browser, output / "audit.html") as page:
        assert page.locator("#overlapping svg").count() == 1
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0
