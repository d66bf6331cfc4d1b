"""What a comparison says was shown and was not, with a margin, over folds; and its plan of another
one."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from imrcnn_d2.evaluation import Bootstrap
from imrcnn_d2.evaluation.comparison import difference_from_parts, holm, image_level_test
from imrcnn_d2.report import load_run
from imrcnn_d2.report.comparison import compare, gather, write_comparison
from imrcnn_d2.report.comparison.findings import findings
from imrcnn_d2.report.comparison.models import of_primary
from imrcnn_d2.report.comparison.pages import power_table

SEEDS = {"MR-CNN": 2, "IMR-CNN": 3, "IBMR-CNN": 1}
BOOTSTRAP = Bootstrap(100)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_gt, write_run_in):
    """Three models on 60 images with two, three and one seeds."""
    root = tmp_path_factory.mktemp("seeds")
    gt, write_run = write_gt(root / "test.json", images=60), write_run_in(root)
    return [
        load_run(write_run(f"{k}{seed}", gt, model=model, seed=10 * k + seed, skill=0.8 + 0.05 * k))
        for k, (model, seeds) in enumerate(SEEDS.items())
        for seed in range(seeds)
    ]


def with_one_test(comparison, **values):
    """The comparison with its primary test alone, of other values."""
    test = next(test for test in comparison.tests if test.primary)
    return replace(comparison, tests=[replace(test, **values)])


def test_a_difference_by_hand(runs):
    """SE² of images and of trainings, and Welch and Satterthwaite's degrees of freedom."""
    compared = compare(gather(runs[:5]), BOOTSTRAP)
    (test,) = of_primary(compared.tests, compared.primary)
    values = [
        [run.results.segm["AP50_voc"] for run in runs[:5] if run.model == m]
        for m in ("IMR-CNN", "MR-CNN")
    ]
    assert test.estimate == pytest.approx(np.mean(values[0]) - np.mean(values[1]))
    samples = [compared.models[m].resampled["segm"]["AP50_voc"] for m in ("IMR-CNN", "MR-CNN")]
    images = np.var(samples[0] - samples[1], ddof=1) * 60 / 59
    terms = images, np.var(values[0], ddof=1) / 3, np.var(values[1], ddof=1) / 2
    df = sum(terms) ** 2 / (images**2 / 59 + terms[1] ** 2 / 2 + terms[2] ** 2 / 1)
    assert (test.se, test.df) == pytest.approx((math.sqrt(sum(terms)), df))
    assert test.p == pytest.approx(2 * stats.t.sf(abs(test.estimate) / test.se, df))
    assert (test.low, test.high) == pytest.approx(
        stats.t.interval(0.95, df, test.estimate, test.se)
    )


@pytest.mark.parametrize("metric", ["segm/AP50_voc", "lesion/fp_per_image"])
def test_a_margin_tests_non_inferiority_and_equivalence(runs, metric):
    """Of false alarms fewer are better: there the first model must not have too many more."""
    compared = compare(gather(runs), BOOTSTRAP, primary=metric, pair="IMR-CNN:MR-CNN", margin=5.0)
    for test in of_primary(compared.tests, metric):
        added = {
            other.shows: other
            for other in compared.tests
            if (other.first, other.second) == (test.first, test.second)
            and other.shows != "difference"
        }
        t = [(5 + sign * test.estimate) / test.se for sign in (1, -1)]
        better = t[0] if metric == "segm/AP50_voc" else t[1]
        assert added["non-inferiority"].p == pytest.approx(
            max(stats.t.sf(better, test.df), test.least_p / 2)
        )
        assert added["equivalence"].p == pytest.approx(
            max(*stats.t.sf(t, test.df), test.least_p / 2)
        )
        low, high = stats.t.interval(0.9, test.df, test.estimate, test.se)
        for other in added.values():
            assert (other.low, other.high) == pytest.approx((low, high))
            assert other.primary == ((test.first, test.second) == ("IMR-CNN", "MR-CNN"))
    family = [test for test in compared.tests if not test.primary]
    assert compared.family == len(family)
    assert [test.p_holm for test in family] == pytest.approx(holm([test.p for test in family]))
    assert not any(t.shows != "difference" for t in compare(gather(runs), BOOTSTRAP).tests)


def test_what_is_shown_and_what_is_not(runs):
    compared = compare(gather(runs[:5]), BOOTSTRAP)
    clear = {"estimate": 4.0, "low": 1.0, "high": 7.0, "p": 0.01}
    (text,) = findings(with_one_test(compared, **clear))
    assert "4.0 [1.0, 7.0]" in text and "p = 0.010" in text and "adjusted" not in text
    assert "3 and 2 runs" in text and "checkpoints" not in text
    assert "was shown: the value of IMR-CNN is higher" in text
    mirrored = {"estimate": -4.0, "low": -7.0, "high": -1.0, "p": 0.01}
    (text,) = findings(with_one_test(compared, **mirrored))
    assert "was shown: the value of MR-CNN is higher" in text
    # Absence of evidence is no evidence of absence.
    (text,) = findings(with_one_test(compared, estimate=1.0, low=-2.0, high=4.0, p=0.5))
    assert "No difference was shown" in text and "from −2.0 to 4.0" in text
    assert "equal" not in text and "no difference between" not in text.casefold()
    # One of many tests: below 0.05 by itself only.
    (text,) = findings(with_one_test(compared, **clear, primary=False, p_holm=0.3))
    assert "p = 0.010, adjusted 0.300" in text and "No difference was shown" in text
    (text,) = findings(with_one_test(compared, **clear, primary=False, p_holm=0.04))
    assert "A difference was shown" in text


def test_runs_are_named_in_what_is_shown(runs):
    """Two checkpoints are not two methods."""
    single = compare(gather([runs[0], runs[2]]), BOOTSTRAP)
    (text,) = findings(single)
    assert "one run of each" in text and "two checkpoints" in text
    mixed = compare(gather([*runs[:2], runs[5]]), BOOTSTRAP)
    (text,) = findings(mixed)
    assert "checkpoints" not in text and "IBMR-CNN has one run" in text and "MR-CNN." in text
    several = findings(compare(gather(runs), BOOTSTRAP, pair="IBMR-CNN:IMR-CNN"))
    assert len(several) == 3 and several[0].startswith("IBMR-CNN − IMR-CNN")
    assert not findings(compare(gather(runs[:2]), BOOTSTRAP))  # one model


def test_two_models_that_agree_throughout_are_not_shown_to_be_equivalent(runs):
    """As where both find every lesion of a few images."""
    same = replace(runs[2], labelled=True, name="again")
    compared = compare(gather([runs[2], same]), BOOTSTRAP, margin=2.0, plan=9.0)
    (text,) = findings(compared)
    assert "equivalence was not shown (p = n/a)" in text and "compatible" not in text
    assert "A difference was shown" not in text
    (row,) = power_table(compared).cells.values
    assert "n/a" in row and "none suffices" not in row


def test_with_a_margin_it_says_what_of_it_was_shown(runs):
    compared = compare(gather(runs[:5]), BOOTSTRAP, margin=2.0)
    difference, *margin = (test for test in compared.tests if test.primary)
    assert [test.shows for test in margin] == ["non-inferiority", "equivalence"]
    tests = [difference, replace(margin[0], p=0.01), replace(margin[1], p=0.3)]
    (text,) = findings(replace(compared, tests=tests))
    assert "margin of 2 points" in text
    assert f"non-inferiority of {difference.first} was shown (p = 0.010)" in text
    assert "equivalence was not shown (p = 0.300)" in text


def test_mcnemars_test_has_an_interval_of_its_own(runs):
    pair = [runs[2], runs[0]]
    compared = compare(gather(pair[::-1]), BOOTSTRAP)
    (test,) = (test for test in compared.tests if test.test.startswith("McNemar"))
    right = [run.results.right() for run in pair]
    expected = image_level_test(*([run.results] for run in pair))
    assert test.estimate == pytest.approx(100 * (right[0].mean() - right[1].mean()))
    assert (test.low, test.high, test.p) == (expected.low, expected.high, expected.p)
    assert (test.p < 0.05) == (test.low > 0 or test.high < 0)
    primary = compare(gather(pair), BOOTSTRAP, primary="image/accuracy").tests
    assert [t.test.split()[0] for t in primary if t.endpoint == "image/accuracy"] == [
        "paired",
        "McNemar's",
    ]
    assert [t.test.split()[0] for t in primary if t.primary] == ["paired"]


def test_without_lesion_free_images_mcnemars_test_is_of_recall(tmp_path, write_gt, write_run_in):
    """Accuracy is undefined there."""
    gt = write_gt(tmp_path / "test.json", images=30)
    content = json.loads(gt.read_text())
    content["images"] = [image for image in content["images"] if image["id"] % 3]
    gt.write_text(json.dumps(content))
    write_run = write_run_in(tmp_path)
    pair = [
        load_run(write_run(f"m{skill}", gt, model=f"m{skill}", skill=skill)) for skill in (1, 0.4)
    ]
    compared = compare(gather(pair[::-1]), Bootstrap(30))
    (test,) = (test for test in compared.tests if test.test.startswith("McNemar"))
    recall = [run.results.image["recall"] for run in pair]
    assert test.endpoint == "image/recall"
    assert test.estimate == pytest.approx(recall[0] - recall[1]) and test.estimate > 0


@pytest.fixture(scope="module")
def folds(tmp_path_factory, write_gt, write_run_in):
    """Two models on three folds, with two seeds each."""
    root, paths = tmp_path_factory.mktemp("folds"), []
    for fold in range(3):
        gt = write_gt(root / f"fold{fold}.json", images=12, first=1 + 12 * fold)
        for model, skill in (("MR-CNN", 0.6), ("IMR-CNN", 0.9)):
            for seed in range(2):
                name, options = f"{model}{fold}{seed}", {"model": model, "skill": skill}
                options |= {"fold": (fold, 3), "seed": 10 * fold + seed}
                paths.append(write_run_in(root)(name, gt, **options))
    return [load_run(path) for path in paths]


def test_folds_with_seeds(folds, runs):
    """Mean over seeds, then the corrected t-test; one family with the tests on one split."""
    for number, run in enumerate(folds):
        run.record["seed"] = number % 2
    (text,) = findings(compare(gather(folds), BOOTSTRAP))
    assert "over 3 folds with 2 seeds each" in text and "checkpoints" not in text
    compared = compare(gather([*runs[:5], *folds]), BOOTSTRAP, margin=3.0)
    test = next(t for t in compared.fold_tests if t.endpoint == "lesion/recall")
    values = np.array([run.results.lesion["recall"] for run in folds]).reshape(3, 2, 2)
    differences = values[:, 1].mean(axis=1) - values[:, 0].mean(axis=1)
    se = differences.std(ddof=1) * math.sqrt(1 / 3 + 12 / 64)
    assert (test.estimate, test.se, test.df) == pytest.approx((differences.mean(), se, 2))
    assert test.p == pytest.approx(2 * stats.t.sf(abs(test.estimate) / se, 2))
    assert {t.shows for t in compared.fold_tests if t.endpoint == compared.primary} == {
        *("difference", "non-inferiority", "equivalence")
    }
    # The pair and metric are judged once without adjustment: on the same images.
    assert all(test.primary == (test.endpoint == compared.primary) for test in compared.tests)
    assert not any(test.primary for test in compared.fold_tests)
    family = [test for test in (*compared.tests, *compared.fold_tests) if not test.primary]
    assert [test.p_holm for test in family] == pytest.approx(holm([test.p for test in family]))
    assert len(findings(compared)) == 2


def test_a_plan(runs):
    compared = compare(gather(runs[:5]), BOOTSTRAP, plan=9.0)
    (test,) = of_primary(compared.tests, compared.primary)
    (row,) = power_table(compared).data.to_dict("records")
    assert (row["units"], row["runs"], row["effect"]) == (60, 2, 9.0)

    def power(images, number, sd):
        """By the noncentral t distribution, of both models with as many runs: not quite right, as
        if the degrees of freedom were known."""
        se = test.se_images * math.sqrt(60 / images)
        planned = difference_from_parts(9.0, se, images, (sd, sd), (number, number))
        critical = stats.t.isf(0.025, planned.df)
        t = stats.nct(planned.df, 9.0 / planned.se)
        return t.sf(critical) + t.cdf(-critical)

    pooled = math.sqrt((2 * test.seed_sds[0] ** 2 + test.seed_sds[1] ** 2) / 3)
    assert row["sd_runs"] == pytest.approx(pooled)
    assert row["power"] == pytest.approx(100 * power(60, 2, pooled), abs=5)
    assert power(row["units_needed_with_10_runs"], 10, pooled) == pytest.approx(0.8, abs=0.02)
    # Of one run each nothing is known of trainings.
    single = compare(gather([runs[0], runs[2]]), BOOTSTRAP, plan=9.0)
    table = power_table(single)
    (row,) = table.data.to_dict("records")
    assert row["runs"] == 1 and row["runs_needed"] is None
    assert row["units_needed"] > 10 and "not known" in table.cells.loc[0, "runs needed"]


def test_the_files_have_what_was_shown_and_the_plan(runs, tmp_path):
    compared = compare(gather(runs[:5]), BOOTSTRAP, margin=2.0, plan=40.0)
    written = {path.name for path in write_comparison(compared, tmp_path)}
    assert {"plan.md", "plan.csv", "plan.tex"} <= written
    page = (tmp_path / "comparison.md").read_text()
    assert "## What was shown" in page and (tmp_path / "plan.md").read_text() in page
    document = json.loads((tmp_path / "comparison.json").read_text())
    assert document["family"] == compared.family
    assert document["settings"]["pair"] == ["IMR-CNN", "MR-CNN"]
    (plan,) = document["plan"]
    assert plan["effect"] == 40 and plan["power"] > 80 and plan["runs_needed"] == 2
    test = next(test for test in document["tests"] if test["primary"])
    (expected,) = of_primary(compared.tests, compared.primary)
    for name in ("se", "df", "se_images", "shows", "test"):
        assert test[name] == getattr(expected, name)
    with (tmp_path / "differences.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert float(first["se"]) == expected.se and first["shows"] == "difference"


def test_margins_and_plans_that_there_cannot_be(runs, folds):
    for number, run in enumerate(folds):
        run.record["seed"] = number % 2
    for options, members, named in (
        ({"margin": -1.0}, runs, "-1.0"),
        ({"plan": 0.0}, runs, "0.0"),
        ({"plan": math.nan}, runs, "nan"),
        ({"plan": 2.0}, folds, "segm/AP50_voc"),
        ({"plan": 2.0}, runs[:2], "segm/AP50_voc"),
    ):
        with pytest.raises(ValueError, match=named):
            compare(gather(members), Bootstrap(5), **options)
