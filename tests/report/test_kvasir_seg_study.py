"""examples/kvasir_seg_study/results.py on simulated runs."""

import importlib
import json
import math
import re
import statistics
import sys
from itertools import product
from pathlib import Path

import pytest
from scipy import stats

SCRIPTS = Path(__file__).parents[2] / "examples" / "kvasir_seg_study"
MODELS = {"mrcnn": ("MR-CNN", 0.6), "ibmrcnn": ("IBMR-CNN", 0.75), "imrcnn": ("IMR-CNN", 0.9)}


@pytest.fixture
def results(monkeypatch):
    """The script, which finds leakage.py next to it as it does when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("results")
    for name in ("results", "leakage"):
        del sys.modules[name]


@pytest.fixture
def runs(tmp_path, write_gt, write_run):
    gt = write_gt(tmp_path / "test.json")
    for (name, (model, skill)), seed in product(MODELS.items(), range(3)):
        options = {"skill": skill, "seed": seed, "model": model, "tau_val": 0.6}
        write_run(f"main/{name}_seed{seed}", gt, **options)
    return tmp_path / "runs"


@pytest.fixture
def study(results, runs, tmp_path):
    (tmp_path / "images").mkdir()
    return results.Study(runs, tmp_path, tmp_path / "images")


def metrics(run):
    return json.loads((run / "inference/kvasir_seg_test/metrics.json").read_text())


def last_row(table):
    return [cell.strip() for cell in table.splitlines()[-1].split("|")][1:-1]


def test_tables_have_the_values_of_the_runs_files(study, runs):
    columns = {"IoU": "lesion/iou", "F1": "tau_val.lesion/f1"}
    table = study.metrics({"seed 1": "main/imrcnn_seed1"}, columns)
    read = metrics(runs / "main/imrcnn_seed1")
    values = read["lesion"]["iou"], read["tau_val"]["lesion"]["f1"]
    assert last_row(table) == ["seed 1", *(f"{value:.1f}" for value in values)]
    table = study.means({"IMR-CNN": "main/imrcnn_*"}, {"alarms": "lesion/fp_per_image"})
    values = [metrics(path)["lesion"]["fp_per_image"] for path in runs.glob("main/imrcnn_*")]
    mean = f"{statistics.fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})"
    assert last_row(table) == ["IMR-CNN", "3", mean]


def test_models_are_compared_over_their_seeds(results, study, tmp_path):
    patterns = [f"main/{name}_*" for name in MODELS]
    compared = study.comparison(*patterns)
    assert all(f"| {model}" in study.table(compared, 3) for model, _ in MODELS.values())
    tests = [line for line in study.tests("x", *patterns).splitlines() if " − " in line]
    assert {t.endpoint for t in compared.tests if t.p_holm < 0.05} - set(results.JUDGED)
    shown = [t for t in compared.tests if t.endpoint in results.JUDGED or t.p_holm < 0.05]
    assert len(tests) == len(shown)
    assert "images/pr.png)" in study.pr_curves(compared, "pr")
    assert (tmp_path / "images" / "pr.png").stat().st_size > 10_000


TITLE = "Differences on the 250 test images"


@pytest.fixture
def recorded(results, tmp_path):
    """Of the tests whose runs are gone: (models, metric) -> difference, p and Holm's p as text."""
    table = results.Study(tmp_path, tmp_path, tmp_path).tests(TITLE, "main/mrcnn_*")
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    return {(row[0], row[1]): (row[3], *row[4:6]) for row in cells if row and " − " in row[0]}


def test_trainings_that_are_gone_still_count_in_the_tests(recorded, results, study):
    at_tau_val = [
        (f"{model} − MR-CNN", f"{metric} (lesions) at tau_val")
        for model in ("IBMR-CNN", "IMR-CNN")
        for metric in ("precision", "recall")
    ]
    assert all(0.07 <= float(recorded[row][1]) <= 0.21 for row in at_tau_val)
    assert recorded["IBMR-CNN − MR-CNN", "IoU (masks)"][0] == "0.2 [−1.2, 1.6]"
    assert min(float(p_holm) for _, _, p_holm in recorded.values()) > 0.05
    # By hand: of 250 images, and of three trainings with a population sd of 2.6 and of 2.1.
    terms = [((5.7 - 1.7) / 3.92) ** 2, 2.6**2 / 2, 2.1**2 / 2]
    df = sum(terms) ** 2 / (terms[0] ** 2 / 249 + terms[1] ** 2 / 2 + terms[2] ** 2 / 2)
    t = stats.t(df, scale=math.sqrt(sum(terms)))
    difference, p, _ = recorded["IBMR-CNN − MR-CNN", "recall (lesions) at tau_val"]
    low, high = 3.7 + t.ppf([0.025, 0.975])
    assert difference == f"3.7 [{low:.1f}, {high:.1f}]".replace("-", "−")
    assert float(p) == pytest.approx(2 * t.sf(3.7), abs=5e-4)
    with pytest.raises(FileNotFoundError):
        study.tests("not recorded", "main/nothing_*")


def test_the_page_is_what_its_command_makes_of_the_record(results, recorded, tmp_path):
    page = (results.DOCS / "results.md").read_text(encoding="utf-8")
    template = (SCRIPTS / "results.md.j2").read_text(encoding="utf-8")
    gone = results.Study(tmp_path / "gone", tmp_path, tmp_path)
    assert results.render(template, gone, page)[0] == page
    findings = results.sections(page)["## Findings"]
    for models in ("IMR-CNN − MR-CNN", "IBMR-CNN − MR-CNN"):
        (sentence,) = re.findall(rf"(?<!\w){models} is[^:]*:", findings)
        metrics = ("AP50_voc (masks)", "IoU (masks)")
        intervals = [recorded[models, metric][0].partition(" ")[2] for metric in metrics]
        assert re.findall(r"\[.*?\]", sentence) == intervals


def test_a_section_stays_where_a_run_of_it_is_missing_or_has_not_finished(results, study, runs):
    kept, absent, made = "main/imrcnn_seed2", "long/imrcnn", "main/imrcnn_seed1"
    template = "# New\n\n## Words\n\nnew\n\n" + "".join(
        f"## {heading}\n\n{{{{ study.metrics({{'x': '{run}'}}, {{'TP': 'lesion/TP'}}) }}}}\n\n"
        for heading, run in (("Kept", kept), ("Absent", absent), ("Made", made))
    )
    page = "# Old\n\n## Made\n\nold\n\n## Kept\n\nold values\n\n"
    record = runs / kept / "run.json"
    finished = record.read_text()
    record.write_text(finished.replace('"2026"', "null"))
    text, missing = results.render(template, study, page)
    assert missing == {"## Kept": str(runs / kept), "## Absent": str(runs / absent)}
    assert text.startswith("# New\n\n## Words\n\nnew\n\n## Kept\n\nold values\n\n## Made\n\n")
    assert last_row(text.rstrip()) == ["x", f"{metrics(runs / made)['lesion']['TP']:.0f}"]

    record.write_text(finished)
    again, missing = results.render(template, study, text)
    assert missing.keys() == {"## Absent"} and "old values" not in again
    assert results.render(template, study, again)[0] == again


def test_every_section_of_the_page_is_one_of_its_template(results):
    paths = results.DOCS / "results.md", SCRIPTS / "results.md.j2"
    page, template = (results.sections(path.read_text(encoding="utf-8")) for path in paths)
    assert [heading for heading in template if heading in page] == list(page)
    for heading, words in template.items():
        if heading in page and "study." not in words:
            assert page[heading] == words
