"""examples/kvasir_seg_study/results.py on simulated runs."""

import json
import statistics
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "kvasir_seg_study"
SKILLS = {"mrcnn": 0.6, "ibmrcnn": 0.75, "imrcnn": 0.9}
MODELS = {"mrcnn": "MR-CNN", "ibmrcnn": "IBMR-CNN", "imrcnn": "IMR-CNN"}


@pytest.fixture
def results(monkeypatch):
    """The script, which finds leakage.py beside it as it does when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results

    yield results
    for name in ("results", "leakage"):
        del sys.modules[name]


@pytest.fixture
def runs(tmp_path, write_gt, write_run):
    gt = write_gt(tmp_path / "test.json")
    for model, skill in SKILLS.items():
        for seed in range(3):
            name = f"main/{model}_seed{seed}"
            write_run(name, gt, skill=skill, seed=seed, model=MODELS[model], tau_val=0.6)
    return tmp_path / "runs"


def metrics(run):
    return json.loads((run / "inference/kvasir_seg_test/metrics.json").read_text())


def test_tables_have_the_figures_of_the_runs_files(results, runs, tmp_path):
    study = results.Study(runs, tmp_path, tmp_path / "images" / "results")
    one = study.figures(
        {"seed 1": "main/imrcnn_seed1"},
        {"IoU": "lesion/iou", "F1": "tau_val.lesion/f1"},
    )
    read = metrics(runs / "main/imrcnn_seed1")
    cells = [cell.strip() for cell in one.splitlines()[-1].split("|")]
    figures = read["lesion"]["iou"], read["tau_val"]["lesion"]["f1"]
    assert cells[1:-1] == ["seed 1", *(f"{figure:.1f}" for figure in figures)]

    mean = study.means({"IMR-CNN": "main/imrcnn_*"}, {"alarms": "lesion/fp_per_image"})
    every = [metrics(path)["lesion"]["fp_per_image"] for path in runs.glob("main/imrcnn_*")]
    expected = f"{statistics.fmean(every):.2f} ({min(every):.2f}–{max(every):.2f})"
    assert [cell.strip() for cell in mean.splitlines()[-1].split("|")][1:-1] == [
        *("IMR-CNN", "3", expected)
    ]


def test_models_are_compared_over_their_seeds(results, runs, tmp_path):
    (tmp_path / "images" / "results").mkdir(parents=True)
    study = results.Study(runs, tmp_path, tmp_path / "images" / "results")
    compared = study.comparison("main/mrcnn_*", "main/ibmrcnn_*", "main/imrcnn_*")
    table = study.table(compared, 3)
    for model in MODELS.values():
        assert f"| {model}" in table
    tests = [line for line in study.tests(compared, "x").splitlines() if " − " in line]
    significant = {t.endpoint for t in compared.tests if t.p_holm < 0.05}
    assert significant - set(results.JUDGED)
    assert len(tests) == sum(
        t.endpoint in results.JUDGED or t.p_holm < 0.05 for t in compared.tests
    )
    assert study.pr_curves(compared, "pr") == "![Precision-recall curves](images/results/pr.png)"
    assert (tmp_path / "images" / "results" / "pr.png").stat().st_size > 10_000


def test_a_section_stays_where_a_run_of_it_is_missing_or_has_not_finished(results, runs, tmp_path):
    study = results.Study(runs, tmp_path, tmp_path)
    template = "# New\n\n## Words\n\nnew\n\n" + "".join(
        f"## {heading}\n\n{{{{ study.figures({{'x': '{run}'}}, {{'TP': 'lesion/TP'}}) }}}}\n\n"
        for heading, run in (
            ("Kept", "main/imrcnn_seed2"),
            ("Absent", "long/imrcnn"),
            ("Made", "main/imrcnn_seed1"),
        )
    )
    page = "# Old\n\n## Made\n\nold\n\n## Kept\n\nold figures\n\n"
    record = runs / "main/imrcnn_seed2/run.json"
    finished = record.read_text()
    record.write_text(json.dumps({**json.loads(finished), "finished": None}))

    made, missing = results.render(template, study, page)
    assert missing == {
        "## Kept": str(runs / "main/imrcnn_seed2"),
        "## Absent": str(runs / "long/imrcnn"),
    }
    tp = metrics(runs / "main/imrcnn_seed1")["lesion"]["TP"]
    assert made.startswith("# New\n\n## Words\n\nnew\n\n## Kept\n\nold figures\n\n## Made\n\n")
    assert [cell.strip() for cell in made.splitlines()[-2].split("|")][1:-1] == ["x", f"{tp:.0f}"]

    record.write_text(finished)
    again, missing = results.render(template, study, made)
    assert missing.keys() == {"## Absent"}
    assert "old figures" not in again
    assert results.render(template, study, again)[0] == again


def test_every_section_of_the_page_is_one_of_its_template(results):
    page, template = (
        results.sections(path.read_text(encoding="utf-8"))
        for path in (results.DOCS / "results.md", SCRIPTS / "results.md.j2")
    )
    assert [heading for heading in template if heading in page] == list(page)
    for heading, words in template.items():
        if heading in page and "study." not in words:
            assert page[heading] == words
