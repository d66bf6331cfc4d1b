"""The report of external validation, of centres whose values are known."""

import csv
import dataclasses

import numpy as np
import pytest
from chromium import chromium, opened
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.output import coco_result
from imrcnn_d2.evaluation.pooling import Pooled, pool
from imrcnn_d2.evaluation.subgroups import By, with_groups
from imrcnn_d2.report.validation import Validation, findings, write_validation

BOOTSTRAP = Bootstrap(100)
# Images, share of lesions found and false alarms in images of each centre.
CENTRES = {"Bonn": (40, 0.95), "Lyon": (40, 0.9), "Oslo": (40, 0.5), "Rome": (12, 0.75)}


@pytest.fixture(scope="module")
def results():
    """Every fourth image is free of lesions, of Rome only one; found lesions are moved a little."""
    rng = np.random.default_rng(0)
    images, annotations, detections = [], [], []
    for centre, (number, share) in CENTRES.items():
        for place in range(number):
            image = len(images) + 1
            record = {"id": image, "file_name": f"{image}.png", "height": 40, "width": 50}
            # The column "pooled" is named as a table of the report.
            images.append({**record, "centre": centre, "pooled": "mf"[place % 2]})
            if place % (12 if centre == "Rome" else 4) == 0:
                if rng.random() > share:
                    detections.append(rectangle(image, 5, 5, 9, 9, score=0.6))
                continue
            annotations.append({**rectangle(image, 10, 10, 20, 20), "id": image})
            if rng.random() < share:
                moved = 10 + int(rng.integers(0, 4))
                detections.append(rectangle(image, moved, 10, 20, 20, score=0.5 + rng.random() / 2))
    data = {"images": images, "annotations": annotations}
    data["categories"] = [{"id": 1, "name": "polyp"}]
    whole = evaluate_lesions(data, detections, tau=0.5, bootstrap=BOOTSTRAP)
    return with_groups(whole, [By("centre"), By("pooled")], bootstrap=BOOTSTRAP)


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    """{file name: path}."""
    folder = tmp_path_factory.mktemp("validation")
    for image in results.ground_truth.images:
        Image.new("RGB", (50, 40), (150, 90, 80)).save(folder / image["file_name"])
    validation = Validation.of(
        results,
        title="a.pth on <b>",
        facts={"Weights": "a.pth", "Score threshold": "0.5, stored"},
        marks=["Images that the weights were trained on are among these."],
        notes=["Two images are near-duplicates."],
    )
    files = write_validation(validation, folder / "report", image_root=folder)
    return {path.name: path for path in files}


def rows_of(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_files(written):
    tables = ("centres", "pooled", "calibration_by_centre", "by_pooled")
    plots = {"forest.png", "calibration_by_centre.png"}
    plots |= {f"worst_{n}_{name}.png" for n, name in enumerate(CENTRES, 1)}
    texts = {f"{table}{suffix}" for table in tables for suffix in (".md", ".csv", ".tex")}
    assert written.keys() == {"validation.html", "validation.md", *plots, *texts}
    for table in tables:  # the mark stands on each
        for suffix in (".md", ".tex"):
            assert "trained on are among these" in written[table + suffix].read_text()


def test_the_table_holds_the_metrics_of_each_centre(results, written):
    rows = rows_of(written["centres.csv"])
    for row in rows:
        group, (level, metric) = (
            results.by_group["centre"].groups[row["centre"]],
            (row["figure"].split("/")),
        )
        assert float(row["value"]) == group.values[level][metric]
        if row["low"]:
            interval = group.intervals[level][metric]
            assert (float(row["low"]), float(row["high"])) == interval
        assert int(row["cases"]) == group.cases(row["figure"])[0]
    assert {row["centre"] for row in rows} == set(CENTRES) and len(rows) == 40
    few = {(row["centre"], row["figure"]) for row in rows if row["few_cases"] == "True"}
    assert few == {("Rome", "image/specificity")}
    text = written["centres.md"].read_text()
    assert text.count("(n 1†)") == 1 and "Fewer than 5 cases" in text


def test_the_summary_is_that_of_the_centres(results, written):
    rows = {row["figure"]: row for row in rows_of(written["pooled.csv"])}
    centres = results.by_group["centre"].groups
    summary = pool(centres, ["lesion/recall"])["lesion/recall"]
    row = rows["lesion/recall"]
    assert float(row["pooled"]) == summary.value and float(row["i2"]) == summary.i2
    recalls = [group.values["lesion"]["recall"] for group in centres.values()]
    assert (float(row["lowest"]), float(row["highest"])) == (min(recalls), max(recalls))
    # The single lesion-free image of Rome is not the best or the worst of all centres.
    values = [centres[name].values["image"]["specificity"] for name in ("Bonn", "Lyon", "Oslo")]
    row = rows["image/specificity"]
    assert (float(row["lowest"]), float(row["highest"])) == (min(values), max(values))


def test_calibration_of_each_centre(results, written):
    rows = {row["centre"]: row for row in rows_of(written["calibration_by_centre.csv"])}
    for centre, group in results.by_group["centre"].groups.items():
        scores = group.results.metrics.calibration
        assert float(rows[centre]["hit_rate"]) == pytest.approx(100 * scores.hit.mean())
        misses = (~scores.hit).sum()
        assert bool(rows[centre]["slope"]) == (min(scores.hit.sum(), misses) >= 10)


def test_the_page(results, written, parse):
    tree, sections = parse(written["validation.html"].read_text(encoding="utf-8"))
    words = " ".join("".join(tree.itertext()).split())
    assert "a.pth on <b>" in words  # no markup
    assert "trained on are among these" in sections["results"]
    assert "near-duplicates" in sections["results"] and "0.5, stored" in sections["run"]
    assert "Sensitivity (lesions found, n 101) differs between centres" in sections["results"]
    assert "in Oslo" in sections["results"] and "specificity in Rome (1)" in sections["results"]
    assert "n 1†" in sections["centres"] and "a further centre" in sections["pooled"]
    assert "By pooled" in sections["by-1"] and all(name in sections["worst"] for name in CENTRES)


def test_centres_that_are_alike_are_those_that_have_such_cases(results):
    validation = Validation.of(results, title="a.pth", facts={}, marks=[], notes=[])
    alike = {"value": 90, "interval": (88, 92), "predicted": (85, 94), "i2": 0, "p": 0.8}
    for left_out, of in (((), "in all centres"), (("Rome",), "in the 3 centres that have such")):
        pooled = Pooled(("Bonn", "Lyon", "Oslo"), left_out, "logit", **alike)
        pooled = {**validation.pooled, "image/specificity": pooled}
        texts = findings(dataclasses.replace(validation, pooled=pooled))
        assert any("Specificity" in text and f"is alike {of}" in text for text in texts)


@pytest.mark.slow
def test_two_centres_have_no_summary(results, tmp_path):
    groups = results.by_group["centre"].groups
    two = {name: groups[name].results for name in ("Bonn", "Lyon")}  # of weights of their own
    files = write_validation(Validation.of(two, title="a"), tmp_path)
    (row, *_) = rows_of(tmp_path / "pooled.csv")
    assert row["pooled"] == row["i2"] == ""
    text = files[1].read_text()
    assert "From 2 centres nothing follows" in text and "differs between" not in text


@pytest.mark.slow
def test_the_page_in_a_browser(written):
    """It runs no script, asks for nothing, and is no wider than a phone."""
    with chromium() as browser, opened(browser, written["validation.html"]) as page:
        assert page.locator("img").count() == 2 + len(CENTRES)
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_masks_without_scores_say_nothing_of_scores(results):
    """Nor of AP and calibration, which need them."""
    truth = results.ground_truth
    detections = results.detections
    masks = [
        {**coco_result(detections, truth, row), "score": None}
        for row in range(len(detections.score))
    ]
    bare = evaluate_lesions(truth, masks, bootstrap=Bootstrap(20))
    validation = Validation.of(with_groups(bare, [By("centre")], bootstrap=Bootstrap(20)))
    headings = " ".join(validation.metrics.values())
    assert "sensitivity" in headings and "AP50" not in headings and "ECE" not in headings
    assert not any("score" in sentence.lower() for sentence in findings(validation))
