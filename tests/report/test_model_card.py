"""The model card: values of the run, and every item of the checklists filled in or open."""

import dataclasses
import re

import pytest

from imrcnn_d2.evaluation.output import log_test_evaluation
from imrcnn_d2.report.model_card import write_model_card

OPEN = "*to be filled in by the authors*"


@pytest.fixture
def run(home):
    return home.load("MR-CNN")


@pytest.fixture
def write(run, tmp_path):
    """A function that returns the text of the run's card, with some of its fields changed."""
    card = tmp_path / "card.md"
    return lambda **fields: write_model_card(dataclasses.replace(run, **fields), card).read_text(
        encoding="utf-8"
    )


def rows(text, title):
    """Cells of the tables' rows under a heading."""
    part = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_results_at_both_thresholds_and_data(run, write):
    text, meta = write(), run.results.meta
    shown = {row[0]: row[1:] for row in rows(text, "Results")}
    groups = run.metrics["lesion"], run.metrics["tau_val"]["lesion"]
    expected = ["{:.1f} [{:.1f}, {:.1f}]".format(g["recall"], *g["recall_ci"]) for g in groups]
    assert shown["sensitivity (recall): lesions that were found"] == expected
    assert "score ≥ 0.62 (τ_val)" in text and "60 resamples of patients" in text
    assert "not a medical device" in text
    numbers = [meta[key] for key in ("images", "patients", "lesions", "lesion_free_images")]
    assert rows(text, "Data")[-1] == ["Test", *map(str, numbers)]
    assert "3 of 43 images (2: mask is empty; 1: duplicate)" in text


# What no run can know.
UNKNOWN = {"CLAIM": ("3", "33", "36", "44"), "TRIPOD+AI": ("3c", "14", "17", "18a")}


@pytest.mark.parametrize("title, number, last", [("CLAIM", 44, 44), ("TRIPOD+AI", 52, 27)])
def test_every_item_is_filled_in_or_open(write, title, number, last):
    text = write()
    (_, *table) = rows(text, title)
    items = dict.fromkeys(int(re.match(r"\d+", row[0]).group()) for row in table)
    assert len(table) == number and list(items) == list(range(1, last + 1))
    filled = [row for row in table if row[2] != OPEN]
    assert all(row[2] for row in table) and 10 < len(filled) < number - 10
    introduction = text.split(f"\n## {title}\n")[1].split("\n\n")[0]
    assert f"{len(filled)} of {number} items" in introduction
    assert {row[2] for row in table if row[0] in UNKNOWN[title]} == {OPEN}


def test_what_is_not_recorded_stays_open(write):
    text = write(record={}, config={})
    answers = {row[0]: row[2] for row in rows(text, "CLAIM")}
    assert {answers[item] for item in ("1", "22", "24", "25", "26", "42")} == {OPEN}
    assert "not recorded" not in text.split("\n## CLAIM\n")[1]
    assert "no record of the training" in text


def test_looks_at_the_test_set_are_counted(run, write, tmp_path):
    assert "No evaluation of this test set is on record" in write()
    for number in range(2):
        checkpoint, sha256 = tmp_path / f"{number}.pth", str(number) * 64
        log_test_evaluation(run.gt_path, source=checkpoint, sha256=sha256, output=tmp_path)
    text = write()
    assert "2 times on record" in text
    assert [row[2] for row in rows(text, "Looks at the test set")[1:]] == ["0" * 16, "1" * 16]


def test_text_of_data_is_no_markup(run, write):
    text = write(record={**run.record, "command": "a | b\n<script>"})
    assert ["Command", "a \\| b &lt;script>"] in rows(text, "Model and training")
