"""examples/kvasir_seg_study/results.py on simulated runs."""

import importlib
import json
import statistics
import sys
from itertools import product
from pathlib import Path

import pytest

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
    compared = study.comparison(*(f"main/{name}_*" for name in MODELS))
    assert all(f"| {model}" in study.table(compared, 3) for model, _ in MODELS.values())
    tests = [line for line in study.tests(compared, "x").splitlines() if " − " in line]
    assert {t.endpoint for t in compared.tests if t.p_holm < 0.05} - set(results.JUDGED)
    shown = [t for t in compared.tests if t.endpoint in results.JUDGED or t.p_holm < 0.05]
    assert len(tests) == len(shown)
    assert "images/pr.png)" in study.pr_curves(compared, "pr")
    assert (tmp_path / "images" / "pr.png").stat().st_size > 10_000


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
