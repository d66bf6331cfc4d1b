import dataclasses
import re
import shutil

import pytest

from imrcnn_d2.evaluation.output import log_test_evaluation
from imrcnn_d2.report.model_card import CLAIM, TRIPOD_AI, write_model_card
from imrcnn_d2.report.runs import load_run

OPEN = "*to be filled in by the authors*"


@pytest.fixture
def run(study, tmp_path):
    """A run on a data set of its own, whose log of evaluations can be written."""
    shutil.copytree(study / "datasets", tmp_path / "datasets")
    folder = shutil.copytree(study / "runs" / "MR-CNN", tmp_path / "run")
    metrics = folder / "inference" / "study_test" / "metrics.json"
    metrics.write_text(metrics.read_text().replace(str(study), str(tmp_path)))
    return load_run(f"MR-CNN={folder}")


def rows(text, title):
    """Cells of the tables' rows under a heading."""
    part = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def write(run, tmp_path):
    return write_model_card(run, tmp_path / "card.md").read_text(encoding="utf-8")


def test_figures_at_both_thresholds(run, tmp_path):
    text = write(run, tmp_path)
    found = {row[0]: row[1:] for row in rows(text, "Results")}
    fixed, chosen = run.metrics["lesion"], run.metrics["tau_val"]["lesion"]
    expected = [
        f"{own['recall']:.1f} [{own['recall_ci'][0]:.1f}, {own['recall_ci'][1]:.1f}]"
        for own in (fixed, chosen)
    ]
    assert found["sensitivity (recall): lesions that were found"] == expected
    assert "score ≥ 0.62 (τ_val)" in text
    assert "60 resamples of patients" in text
    assert "not a medical device" in text


def test_data(run, tmp_path):
    table = rows(write(run, tmp_path), "Data")
    meta = run.results.meta
    numbers = [meta["images"], meta["patients"], meta["lesions"], meta["lesion_free_images"]]
    assert table[-1] == ["Test", *map(str, numbers)]
    assert "3 of 43 images (2: mask is empty; 1: duplicate)" in write(run, tmp_path)


@pytest.mark.parametrize("title, items", [("CLAIM", CLAIM), ("TRIPOD+AI", TRIPOD_AI)])
def test_every_item_is_filled_in_or_open(run, tmp_path, title, items):
    (_, *table) = rows(write(run, tmp_path), title)
    assert [row[0] for row in table] == list(items)
    filled = [row for row in table if row[2] != OPEN]
    assert all(row[2] for row in table)
    assert 10 < len(filled) < len(table) - 10
    text = write(run, tmp_path).split(f"\n## {title}\n")[1]
    assert f"{len(filled)} of {len(items)} items" in text.split("\n\n")[0]
    # What no run can know.
    for item in {"CLAIM": ("3", "33", "36", "44"), "TRIPOD+AI": ("3c", "14", "17", "18a")}[title]:
        assert [item, items[item], OPEN] in table


def test_numbers_of_items():
    assert list(CLAIM) == [str(number) for number in range(1, 45)]
    main = dict.fromkeys(re.match(r"\d+", item).group() for item in TRIPOD_AI)
    assert list(main) == [str(number) for number in range(1, 28)]
    assert len(TRIPOD_AI) == 52


def test_what_is_not_recorded_stays_open(run, tmp_path):
    old = dataclasses.replace(run, run=None, config=None)
    text = write(old, tmp_path)
    answers = {row[0]: row[2] for row in rows(text, "CLAIM")}
    assert all(answers[item] == OPEN for item in ("1", "22", "24", "25", "26", "42"))
    assert "not recorded" not in text.split("\n## CLAIM\n")[1]
    assert "no record of the training" in text


def test_looks_at_the_test_set_are_counted(run, tmp_path):
    assert "No evaluation of this test set is on record" in write(run, tmp_path)
    for number in range(2):
        checkpoint, sha256 = tmp_path / f"{number}.pth", str(number) * 64
        log_test_evaluation(run.gt_path, what=checkpoint, sha256=sha256, output=tmp_path)
    text = write(run, tmp_path)
    assert "2 times on record" in text
    assert [row[2] for row in rows(text, "Looks at the test set")[1:]] == ["0" * 16, "1" * 16]


def test_text_of_data_is_no_markup(run, tmp_path):
    record = {**run.run, "command": "a | b\n<script>"}
    text = write(dataclasses.replace(run, run=record), tmp_path)
    assert ["Command", "a \\| b &lt;script>"] in rows(text, "Model and training")
