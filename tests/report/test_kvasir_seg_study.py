"""examples/kvasir_seg_study: records of runs, the registered analysis, and the page."""

import dataclasses
import importlib
import json
import math
import re
import shutil
import sys
from itertools import chain, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.calibration import ScoreMap
from imrcnn_d2.evaluation.comparison import difference_by_t
from imrcnn_d2.evaluation.output import RESULTS, write_results
from imrcnn_d2.evaluation.subgroups import By, with_groups
from imrcnn_d2.utils.files import BadInputError, csv_text, file_sha256

SCRIPTS = Path(__file__).parents[2] / "examples" / "kvasir_seg_study"
SKILLS = {"mrcnn_lite": 0.6, "ibmrcnn_lite": 0.7, "imrcnn_lite": 0.9}


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    """The scripts find each other as when they are run."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))
    for name in ("records", "analysis", "results"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def records():
    return importlib.import_module("records")


@pytest.fixture(scope="module")
def analysis():
    return importlib.import_module("analysis")


@pytest.fixture(scope="module")
def results():
    return importlib.import_module("results")


def log_line(iteration, **values):
    return json.dumps({"iteration": iteration, **values}) + "\n"


def finished_run(write_run, gt, arm, fold, seed, **options):
    """A run folder as a fold's training leaves it."""
    record = {"iterations": 1500, "config_sha256": f"{seed}" * 64, "versions": {"torch": "2"}}
    record |= {"git": {"revision": "0123abc" * 5, "dirty": False}, "device": "cpu", "hours": 0.5}
    record |= {"precision": "fp32", "splits_sha256": "s" * 64}
    record["datasets"] = {"kvasir_seg_train": {"images": 64}, "kvasir_seg_val": {"images": 16}}
    options = {"skill": SKILLS[arm], "tau_val": 0.6, "tau": 0.5, "record": record, **options}
    place = f"kvasir_seg/{arm}/seed{seed}/fold{fold}"
    run = write_run(place, gt, seed=seed, fold=(fold, 5), model=arm, **options)
    validation = {"segm/AP50_voc": 80 + seed, "lesion/tau_val": float("nan"), "segm/AP": 50.04321}
    log = log_line(9, total_loss=2.5, loss_mask=0.71234567) + log_line(19, total_loss=9.0)
    log += log_line(19, total_loss=2.0, loss_mask=0.5) + log_line(19, **validation)
    (run / "metrics.json").write_text(log)
    return run


@pytest.mark.parametrize("score_map", [None, ScoreMap(0.6, -0.4, "kvasir_seg_val")])
def test_a_record_gives_the_metrics_of_the_run(records, write_gt, write_run, tmp_path, score_map):
    gt = write_gt(tmp_path / "test.json", images=40)
    run = finished_run(write_run, gt, "ibmrcnn_lite", 2, 1, score_map=score_map)
    records.main([str(run), "--output", str(tmp_path / "records")])
    path = tmp_path / "records" / "ibmrcnn_lite" / "fold2_seed1.json.gz"
    record, packed = records.Record.read(path), path.read_bytes()
    metrics = json.loads((run / "inference/kvasir_seg_test/metrics.json").read_text())
    at_tau_val = metrics["tau_val"]["lesion"]
    expected = {"AP50_voc": metrics["segm"]["AP50_voc"]}
    expected |= {"IoU": at_tau_val["iou"], "F1": at_tau_val["f1"]}
    assert all(0 < value < 100 for value in expected.values())
    assert record.content["metrics"] == pytest.approx(expected)
    assert record.values == pytest.approx(expected, abs=1e-4)
    once = record.metrics.once()
    for name in ("TP", "FP", "FN"):
        assert once["lesion"][name] == at_tau_val[name]
    for name, value in once["paper"].items():
        assert value == pytest.approx(metrics["paper"][name], nan_ok=True), name
    curves = record.content["curves"]
    assert curves["training"]["total_loss"] == [2.5, 2.0]
    assert curves["training"]["loss_mask"] == [0.71235, 0.5]
    (validation,) = curves["validation"]
    assert validation["segm/AP50_voc"] == 81 and validation["lesion/tau_val"] is None
    records.main([str(run), "--output", str(tmp_path / "records")])
    assert path.read_bytes() == packed


CENTRES = {"C1": slice(0, 14), "C2": slice(14, 40)}


def validated(run, gt, detections):
    """What imrcnn validate writes for a run, of images in two centres."""
    content = json.loads(gt.read_text())
    for name, part in CENTRES.items():
        for image in content["images"][part]:
            image["centre"] = name
    folder = run / "hospitals"
    results = evaluate_lesions(content, detections, tau=0.6)
    (run / "model_best.pth").write_bytes(b"weights")
    predictions = {"weights_sha256": file_sha256(run / "model_best.pth"), "score_map": None}
    write_results(with_groups(results, [By("centre")]), folder, predictions=predictions)
    (folder / "ground_truth.json").write_text(json.dumps(content))
    (folder / "predictions").mkdir()
    (folder / "predictions" / "predictions.json").write_text(json.dumps(detections))
    return folder


def test_a_record_of_another_hospital(records, write_gt, write_run, tmp_path):
    """Each centre has the metrics of its images alone."""
    gt = write_gt(tmp_path / "hospitals.json", images=40)
    run = finished_run(write_run, gt, "mrcnn_lite", 0, 2)
    detections = json.loads((run / "inference/kvasir_seg_test" / RESULTS).read_text())
    folder = validated(run, gt, detections)
    records.main([str(run), "--output", str(tmp_path), "--validation", str(folder)])
    content = json.loads(gt.read_text())
    for centre, part in CENTRES.items():
        images = content["images"][part]
        ids = {image["id"] for image in images}
        annotations = [a for a in content["annotations"] if a["image_id"] in ids]
        truth = {**content, "images": images, "annotations": annotations}
        inside = [d for d in detections if d["image_id"] in ids]
        expected = evaluate_lesions(truth, inside, tau=0.6).groups()
        record = records.Record.read(tmp_path / "mrcnn_lite" / f"{centre}_seed2.json.gz")
        assert record.content["centre"] == centre and record.metrics.num_units == len(images)
        for name, (group, key) in records.ENDPOINTS.items():
            assert record.values[name] == pytest.approx(expected[group][key], abs=1e-4), name
        assert record.content["metrics"] == pytest.approx(record.values, abs=1e-4)
    (run / "model_best.pth").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="hospitals"):
        records.validation_records(run, folder)


@pytest.mark.parametrize("column", ["group_id", "sequence_id"])
def test_images_of_a_group_are_one_unit(records, column, write_gt, write_run, tmp_path):
    gt = write_gt(tmp_path / "test.json", images=12)
    content = json.loads(gt.read_text())
    for image in content["images"][:3]:
        image[column] = "7"
    gt.write_text(json.dumps(content))
    run = finished_run(write_run, gt, "mrcnn_lite", 0, 0)
    assert records.Record(records.make_record(run)).metrics.num_units == 10


def test_only_finished_runs_are_recorded(records, write_gt, write_run, tmp_path):
    gt = write_gt(tmp_path / "test.json", images=12)
    run = finished_run(write_run, gt, "mrcnn_lite", 0, 0, tau_val=None)
    with pytest.raises(ValueError, match="tau_val"):
        records.make_record(run)
    run = finished_run(write_run, gt, "mrcnn_lite", 0, 0)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"finished": None}))
    with pytest.raises(ValueError, match="not finished"):
        records.make_record(run)
    (run / "run.json").write_text(json.dumps(facts))
    gt.write_text(gt.read_text() + " ")
    with pytest.raises(ValueError, match="changed"):
        records.make_record(run)
    (tmp_path / "no.json.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(BadInputError, match="no.json.gz"):
        records.Record.read(tmp_path / "no.json.gz")


def test_every_committed_record_has_the_metrics_of_its_run(records, analysis):
    """These are of real runs: the values of their metrics.json are computed again."""
    paths = sorted(records.RECORDS.rglob("*.json.gz"))
    assert all(path.stat().st_size <= records.MOST_BYTES for path in paths)
    assert sum(path.stat().st_size for path in paths) <= 20e6
    study = analysis.Study(records.RECORDS)
    for (config, fold, seed), record in study.records.items():
        content = record.content
        assert (content["fold"], content["seed"], content["iterations"]) == (fold, seed, 1500)
        assert content["precision"] == "fp32", config
    elsewhere = [runs for arms in study.hospitals.values() for runs in arms.values()]
    tested = [*study.records.values(), *chain(*elsewhere, *study.placements.values())]
    assert len(tested) + len(study.longer) == len(paths) > 40
    for record in tested:
        assert record.values == pytest.approx(record.content["metrics"], abs=1e-3), record.content


def simulated(rng, arms=3, folds=5, seeds=3, cell=0.5, seed=0.7):
    """Values without a difference between the arms."""
    fold = rng.normal(scale=2, size=(folds, 1))
    cells = rng.normal(scale=cell, size=(arms, folds, 1))
    return 90 + fold + cells + rng.normal(scale=seed, size=(arms, folds, seeds))


def test_mean_squares_are_those_of_an_analysis_of_variance(analysis):
    values = simulated(np.random.default_rng(0))
    places = [axis.ravel() for axis in np.indices(values.shape)]
    frame = pd.DataFrame({"arm": places[0], "fold": places[1], "y": values.ravel()})
    table = anova_lm(ols("y ~ C(arm) * C(fold)", frame).fit())
    mean_squares, mixed = table["mean_sq"], analysis.Mixed(values)
    assert mixed.ms_cell == pytest.approx(mean_squares["C(arm):C(fold)"])
    assert mixed.ms_seed == pytest.approx(mean_squares["Residual"])
    # The test of all arms at once is that of the model: of two arms F is the square of t.
    two = analysis.Mixed(values[:2])
    frame = frame[frame["arm"] < 2]
    means = anova_lm(ols("y ~ C(arm) * C(fold)", frame).fit())["mean_sq"]
    t = two.difference(0, 1).estimate / two.difference(0, 1).se
    assert t**2 == pytest.approx(means["C(arm)"] / means["C(arm):C(fold)"])
    paired = stats.ttest_rel(*values[:2].mean(axis=2))
    assert two.difference(0, 1).p == pytest.approx(paired.pvalue)


def test_intervals_and_power_hold_in_simulated_studies(analysis):
    rng, studies = np.random.default_rng(1), 1500
    mixed = [analysis.Mixed(simulated(rng)) for _ in range(studies)]
    tests = [m.difference(2, 0) for m in mixed]
    error = math.sqrt(0.25 / studies)
    assert np.mean([d.p < 0.05 for d in tests]) == pytest.approx(0.05, abs=0.018)
    se = math.sqrt(2 * (0.5**2 + 0.7**2 / 3) / 5)
    share = np.mean([abs(d.estimate + 1.2) / d.se > stats.t.isf(0.025, 8) for d in tests])
    assert analysis.power(se, 8, 1.2) == pytest.approx(share, abs=3 * error)
    shown = np.mean([analysis.equivalence(d, 1.0) < 0.05 for d in tests])
    assert analysis.power_of_equivalence(se, 8, 1.0) == pytest.approx(shown, abs=3 * error)
    assert 0.1 < shown < 0.9 and 0.1 < share < 0.9
    components = np.mean([(m.cell_variance, m.seed_variance) for m in mixed], axis=0)
    assert components == pytest.approx([0.25, 0.49], rel=0.1)


def test_verdicts(analysis):
    # Half width of the 90 % interval: 1.86 standard errors.
    cases = {
        (1.5, 0.4): "held",
        (0.9, 0.2): "held, but smaller",
        (0.4, 0.5): "not held",
        (-3.0, 0.5): "not held",
        (0.6, 1.0): "undecided",
        (1.9, 1.5): "undecided",
    }
    for (estimate, se), expected in cases.items():
        difference = difference_by_t(estimate, se, 8)
        assert analysis.verdict(difference, difference.p, 1.8) == expected, estimate
    significant = difference_by_t(1.5, 0.4, 8)
    assert analysis.verdict(significant, 0.06, 1.8) == "undecided"  # adjusted


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_gt, write_run_in, records):
    """Records of the paper's arms, five folds and two seeds; of fold 0 a third."""
    root = tmp_path_factory.mktemp("runs")
    for fold in range(5):
        gt = write_gt(root / f"test{fold}.json", images=30, first=1 + 30 * fold)
        for arm, seed in product(SKILLS, range(3 if fold == 0 else 2)):
            options = {"seed": seed, "skill": SKILLS[arm] - 0.04 * fold + 0.02 * seed}
            run = finished_run(write_run_in(root), gt, arm, fold, **options)
            records.main([str(run), "--output", str(root / "records")])
    return root / "records"


@pytest.fixture(scope="module")
def study(analysis, folder):
    return analysis.Study(folder)


def test_the_analysis_of_a_complete_study(study):
    assert (study.runs_of_minimum, study.seeds, study.complete) == (30, 2, True)
    primary, *others = study.tests
    assert primary.primary and len(others) == 8 and not any(test.primary for test in others)
    values = np.array(
        [
            [[study.records[arm, k, s].values["AP50_voc"] for s in (0, 1)] for k in range(5)]
            for arm in ("imrcnn_lite", "mrcnn_lite")
        ]
    )
    differences = -np.diff(values.mean(axis=2), axis=0)[0]
    assert primary.difference.estimate == pytest.approx(differences.mean())
    assert primary.difference.df == 8 and primary.published == 1.8
    # Nadeau and Bengio's variance: 1/5 + n_test / n_train.
    variance = differences.var(ddof=1) * (1 / 5 + 30 / 64)
    assert primary.by_folds.se == pytest.approx(math.sqrt(variance))
    assert primary.p == primary.difference.p
    raw = sorted(test.difference.p for test in others)
    assert min(test.p for test in others) == pytest.approx(min(1, 8 * raw[0]))
    assert {test.published for test in others} == {0.9, 1.4, 1.3, 0.1, None}
    ranks = study.mixed("AP50_voc").cells[[0, 1, 2]].T
    assert study.trend == stats.page_trend_test(ranks).pvalue
    sd, se, number = study.seeds_needed
    assert number == min(5, max(2, math.ceil(2 * sd**2 / se**2)))


def test_the_residual_arm_is_compared_outside_the_papers_family(study, analysis, folder, tmp_path):
    """Here with the trainings of MR-CNN in its place."""
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    shutil.copytree(more / "mrcnn_lite", more / "imrcnn_lite_residual")
    tests, before = analysis.Study(more).tests, study.tests
    assert [test.p for test in tests[1:9]] != [test.p for test in before[1:]]  # 12 df
    assert tests[0].difference.df == 12 and len(tests) == 15
    for test in tests[9:]:
        assert test.first == "imrcnn_lite_residual" and test.verdict == ""
        assert test.p == test.difference.p or math.isnan(test.p)
    estimates = {(t.second, t.endpoint): t.difference.estimate for t in tests[9:]}
    assert estimates["mrcnn_lite", "F1"] == 0
    assert estimates["imrcnn_lite", "IoU"] == -next(
        t.difference.estimate for t in before if (t.first, t.endpoint) == ("imrcnn_lite", "IoU")
    )


def test_the_standard_error_over_images_is_that_of_differences_of_images(study):
    """Of F1 it is near that of a linear approximation, image by image."""
    variances = []
    for fold in range(5):
        influences = 0
        for arm, sign in (("imrcnn_lite", 1), ("mrcnn_lite", -1)):
            for seed in range(2):
                metrics = study.records[arm, fold, seed].metrics
                counts = metrics.counts[""]
                tp, whole = 2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn
                ratio = tp.sum() / whole.sum()
                influences = influences + sign * (tp - ratio * whole) / whole.mean() / 2
        variances.append(np.var(influences) / len(influences))
    expected = 100 * math.sqrt(sum(variances)) / 5
    se = study.se_images("imrcnn_lite", "mrcnn_lite", "F1")
    assert se == pytest.approx(expected, rel=0.1)


def test_the_page_of_a_complete_study(results, study, folder, tmp_path):
    page = tmp_path / "docs" / "results.md"
    results.main(["--records", str(folder), "--output", str(page)])
    text = page.read_text(encoding="utf-8")
    assert "Undecided:" not in text
    verdicts = [test.verdict for test in study.tests if test.verdict]
    held, excluded, undecided = (
        sum(verdict.startswith(name) for verdict in verdicts)
        for name in ("held", "not held", "undecided")
    )
    counts = f"held {held}, not held {excluded}, undecided {undecided}."
    assert counts in text and len(verdicts) == 6
    row = next(line for line in text.splitlines() if "AP50_voc (primary)" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[3] == results.interval(study.tests[0].difference)
    assert cells[5] == study.tests[0].verdict
    plots = page.parent / "images" / "results"
    plotted = pd.read_csv(plots / results.PLOT_DATA)
    assert len(plotted) == 33 and (plots / results.PLOT).stat().st_size > 10_000
    value = study.records["mrcnn_lite", 3, 1].values["AP50_voc"]
    at = (plotted["arm"] == "MR-CNN") & (plotted["fold"] == 3) & (plotted["seed"] == 1)
    assert plotted[at]["AP50_voc"].item() == round(value, 1)


@pytest.mark.parametrize(
    ("estimate", "se", "answer", "advice"),
    [
        (2.0, 0.3, "is seen here**", "IMR-CNN is the better choice"),
        (0.9, 0.2, "is seen here, but smaller than published**", "IMR-CNN is the better choice"),
        (0.1, 0.3, "is not seen here**", "are equivalent within one point"),
        (-0.8, 0.4, "is not seen here**", "decides for no model"),
        (0.9, 0.9, "is neither shown nor excluded here**", "decides for no model"),
    ],
)
def test_three_sentences_answer(results, study, monkeypatch, estimate, se, answer, advice):
    primary, *others = study.tests
    difference = difference_by_t(estimate, se, 8)
    primary = dataclasses.replace(primary, difference=difference, p=difference.p)
    monkeypatch.setattr(study, "tests", [primary, *others])
    text = results.render(study).partition("## Claims")[0]
    assert answer in text and advice in text and results.interval(difference) in text


def test_an_incomplete_study_says_nothing_of_the_arms(results, analysis, folder, tmp_path):
    for path in folder.glob("*/fold[0-3]_*"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    study = analysis.Study(tmp_path)
    assert not study.complete and study.seeds == 0 and study.seeds_needed
    text = results.render(study)
    assert "**Undecided: 24 of 30 runs.**" in text and "## Claims" not in text
    before = text.partition("## The earlier study")[0].partition("## What the paper's")[0]
    assert not re.search(r"\bp\b|\[−?\d", before)


def test_exploratory_parts_of_the_page(results, records, analysis, folder, tmp_path):
    """Fold 0 in two hospitals, here its own test images, and two trainings of another placement."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for arm, seed in product(SKILLS, range(3)):
        content = records.Record.read(folder / arm / f"fold0_seed{seed}.json.gz").content
        for centre in ("C1", "C2"):
            path = tmp_path / "polypgen" / arm / f"{centre}_seed{seed}.json.gz"
            records.write_record({**content, "centre": centre}, path)
    for seed in range(2):
        name = f"fold0_seed{seed}.json.gz"
        path = tmp_path / "placement" / "backbone" / "imrcnn_lite" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "mrcnn_lite" / name, path)
    study = analysis.Study(tmp_path)
    text = results.render(study)
    arms = "imrcnn_lite", "mrcnn_lite"
    values = [[study.records[a, 0, s].values["F1"] for s in range(3)] for a in arms]
    difference = study.in_hospital("C2", *arms, "F1")
    assert difference.estimate == pytest.approx(np.mean(values[0]) - np.mean(values[1]))
    se = study.se_images(*arms, "F1", folds=[0], seeds=3)
    variance = se**2 + sum(np.var(v, ddof=1) / 3 for v in values)
    assert difference.se == pytest.approx(math.sqrt(variance))
    row = next(line for line in text.splitlines() if line.startswith("| F1") and "C2" in line)
    assert results.interval(difference) in row
    row = next(line for line in text.splitlines() if line.startswith("| backbone"))
    values = [study.records["mrcnn_lite", 0, s].values["AP50_voc"] for s in range(2)]
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in row


def test_runs_of_two_commits_are_no_study(records, analysis, folder, tmp_path):
    content = records.Record.read(folder / "mrcnn_lite/fold0_seed0.json.gz").content
    for seed in (0, 1):
        content = {**content, "seed": seed, "git": {"revision": str(seed), "dirty": False}}
        records.write_record(content, tmp_path / "mrcnn_lite" / f"fold0_seed{seed}.json.gz")
    with pytest.raises(ValueError, match="commits"):
        analysis.Study(tmp_path)


@pytest.mark.parametrize("key", ["splits_sha256", "gt_sha256"])
def test_runs_of_a_fold_with_other_images_are_no_study(key, records, analysis, folder, tmp_path):
    for arm, value in (("mrcnn_lite", "a" * 64), ("imrcnn_lite", "b" * 64)):
        content = records.Record.read(folder / arm / "fold0_seed0.json.gz").content
        records.write_record(content | {key: value}, tmp_path / arm / "fold0_seed0.json.gz")
    with pytest.raises(ValueError, match="b" * 64):
        analysis.Study(tmp_path)


def test_a_longer_training_is_compared_on_validation_images(records, analysis, folder, tmp_path):
    for arm in ("imrcnn_lite", "mrcnn_lite"):
        content = records.Record.read(folder / arm / "fold0_seed0.json.gz").content
        records.write_record(content, tmp_path / arm / "fold0_seed0.json.gz")
        assert analysis.Study(tmp_path).gain_of_length is None
        content["curves"]["validation"].append({"segm/AP50_voc": 83.0})
        content = {**content, "images": None}
        records.write_record(content, tmp_path / "length" / arm / "fold0_seed0.json.gz")
    assert analysis.Study(tmp_path).gain_of_length == pytest.approx(3.0)


def test_the_page_and_its_plot_are_what_the_records_give(results, analysis, records):
    study = analysis.Study(records.RECORDS)
    page = (results.DOCS / "results.md").read_text(encoding="utf-8")
    assert results.render(study) == page
    plots = results.DOCS / "images" / "results"
    assert (plots / results.PLOT).is_file() == study.complete
    if study.complete:
        rows = results.runs(study)
        plotted = (plots / results.PLOT_DATA).read_text(encoding="utf-8")
        assert plotted == csv_text(rows, list(rows[0]))
