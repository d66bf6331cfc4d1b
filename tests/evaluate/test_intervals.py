import math

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.detection.results import OperatingPoint
from imrcnn_d2.evaluation.statistics import resampled_metrics


@pytest.fixture(scope="module")
def case(dataset, region):
    """
    Ten images: nine with a lesion, one without. In 1 to 6 the lesion is hit, with overlaps of their
    own; in 7 there is a false alarm instead, in 8 and 9 nothing; 10 is silent.
    """
    results = [region(i, 0, 0, 10, 4 + i, score=0.7 + i / 100) for i in range(1, 7)]
    results.append(region(7, 20, 20, 10, 10, score=0.9))
    return dataset(10, [region(i, 0, 0, 10, 10) for i in range(1, 10)]), results


@pytest.fixture(scope="module")
def scored(case):
    return evaluate_lesions(*case, bootstrap=Bootstrap(resamples=500))


def test_without_a_bootstrap_there_are_none(case):
    assert evaluate_lesions(*case).intervals == {}


def test_percentiles_of_figures_of_drawn_images(case, scored):
    """Precision and recall worked out draw by draw."""
    rng = np.random.default_rng(0)
    hits, alarms = np.arange(1, 11) <= 6, np.arange(1, 11) == 7
    precision, recall, auroc = [], [], []
    score = np.array([0.71, 0.72, 0.73, 0.74, 0.75, 0.76, 0.9, 0, 0, 0])
    for _ in range(500):
        drawn = rng.integers(10, size=10)
        tp, fp = hits[drawn].sum(), alarms[drawn].sum()
        lesions = (drawn < 9).sum()
        precision.append(100 * tp / (tp + fp) if tp + fp else np.nan)
        recall.append(100 * tp / lesions)
        positive, negative = score[drawn[drawn < 9]], score[drawn[drawn == 9]]
        won = np.subtract.outer(positive, negative)
        auroc.append(100 * np.mean((won > 0) + 0.5 * (won == 0)) if won.size else np.nan)
    for group, name, samples in (
        ("lesion", "precision", precision),
        ("lesion", "recall", recall),
        ("image", "auroc", auroc),
    ):
        expected = np.nanpercentile(samples, (2.5, 97.5))
        assert scored.intervals[group][name] == pytest.approx(expected)
    assert scored.undefined_shares["image.auroc"] == pytest.approx(np.isnan(auroc).mean())
    assert scored.undefined_shares["image.auroc"] == pytest.approx(0.9**10, abs=0.07)
    assert "lesion.recall" not in scored.undefined_shares


def test_every_figure_but_counts_has_one(scored):
    for group, figures in {**scored.groups(), "froc": scored.froc}.items():
        names = set(figures) - {"TP", "FP", "FN", "TN", "selection"}
        if group in ("bbox", "segm"):
            names -= {"AP", "AP75", "APs", "APm", "APl"}
        assert set(scored.intervals[group]) == names
        for name in names:
            low, high = scored.intervals[group][name]
            if not math.isnan(low):
                assert low <= figures[name] <= high
    assert not math.isnan(scored.intervals["segm"]["AP50"][0])


def test_all_of_coco_on_request(case):
    asked = evaluate_lesions(*case, bootstrap=Bootstrap(resamples=100, all_coco=True))
    low, high = asked.intervals["segm"]["AP"]
    assert 0 < low < asked.segm["AP"] < high < 100
    samples = resampled_metrics(asked.metrics, Bootstrap(resamples=100, all_coco=True))["segm"]
    assert np.all(samples["AP"] <= samples["AP50"] + 1e-9)


def test_exact_where_a_proportion_is_0_or_100_percent(scored):
    # Specificity and image-level precision are 100 %: of one image, of seven called.
    for group, name, whole in (
        ("image", "specificity", 1),
        ("image", "precision", 7),
    ):
        assert scored.groups()[group][name] == 100
        low, high = proportion_confint(whole, whole, method="beta")
        assert scored.intervals[group][name] == pytest.approx((100 * low, 100 * high))


@pytest.mark.parametrize("found", [0, 5])
def test_f1_by_way_of_a_proportion(dataset, region, found):
    """All of five lesions found, or none: s = TP / (TP + FP + FN), F1 = 2s / (1 + s)."""
    truth = dataset(5, [region(i, 0, 0, 10, 10) for i in range(1, 6)])
    results = [region(i, 0, 0, 10, 10, score=0.9) for i in range(1, 1 + found)]
    scored = evaluate_lesions(truth, results, bootstrap=Bootstrap(resamples=50))
    ends = np.array(proportion_confint(found, 5, method="beta"))
    assert scored.lesion["f1"] == (100 if found else 0)
    assert scored.intervals["lesion"]["f1"] == pytest.approx(100 * 2 * ends / (1 + ends))
    assert scored.intervals["lesion"]["recall"] == pytest.approx(100 * ends)
    # All overlaps are equal: resamples say nothing of what another lesion's would be.
    assert all(map(math.isnan, scored.intervals["lesion"]["iou"]))
    assert all(map(math.isnan, scored.intervals["segm"]["AP50"]))


def test_a_figure_that_is_undefined_has_none(dataset, region):
    truth = dataset(3, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)])
    truth["images"] = truth["images"][:2]
    scored = evaluate_lesions(
        truth, [region(1, 0, 0, 10, 9, score=0.9)], bootstrap=Bootstrap(resamples=50)
    )
    for group, name in (("lesion", "specificity"), ("image", "specificity"), ("image", "auroc")):
        assert all(map(math.isnan, scored.intervals[group][name]))
        assert f"{group}.{name}" not in scored.undefined_shares


@pytest.mark.parametrize("images", [0, 2])
def test_no_ground_truth_at_all(dataset, region, images):
    results = [region(1, 0, 0, 10, 10, score=0.9)] if images else []
    bootstrap = Bootstrap(resamples=20, all_coco=True)
    scored = evaluate_lesions(dataset(images), results, bootstrap=bootstrap)
    for group in ("bbox", "segm", "froc"):
        assert np.isnan(list(scored.intervals[group].values())).all()
    assert np.isnan(scored.intervals["lesion"]["recall"]).all()


def test_nothing_detected(dataset, region):
    scored = evaluate_lesions(
        dataset(3, [region(1, 0, 0, 10, 10)]), [], bootstrap=Bootstrap(50, all_coco=True)
    )
    assert scored.intervals["lesion"]["recall"] == pytest.approx((0, 97.5))
    assert np.isnan(scored.intervals["lesion"]["precision"]).all()


def test_at_a_second_threshold(case):
    point = OperatingPoint(0.745, "f1", "validation")
    both = evaluate_lesions(*case, operating_point=point, bootstrap=Bootstrap(resamples=100))
    alone = evaluate_lesions(*case, tau=0.745, bootstrap=Bootstrap(resamples=100))
    assert [both.tau_val[key] for key in ("tau", "rule", "dataset")] == [0.745, "f1", "validation"]
    assert both.lesion["TP"] == 6
    for group in ("lesion", "image"):
        figures = {k: v for k, v in getattr(alone, group).items() if k in both.tau_val[group]}
        assert both.tau_val[group] == pytest.approx(figures, nan_ok=True)
        for name, interval in both.intervals[f"tau_val.{group}"].items():
            assert interval == pytest.approx(alone.intervals[group][name], nan_ok=True)


def test_models_on_the_same_units_see_the_same_resamples(case):
    truth, results = case
    better = [*results, *({**r, "image_id": r["image_id"] + 7} for r in results[:2])]
    one, two = (
        resampled_metrics(evaluate_lesions(truth, found).metrics, Bootstrap(resamples=200))
        for found in (results, better)
    )
    # The second finds what the first does and two lesions more, in every resample.
    assert np.array_equal(one["image"]["TN"], two["image"]["TN"])
    assert (two["lesion"]["TP"] >= one["lesion"]["TP"]).all()
    assert (two["lesion"]["TP"] > one["lesion"]["TP"]).mean() > 0.8


def simulate(rng, patients, box):
    """
    Patients with one to three images, most with a lesion. Patients differ: in some the lesions are
    easy and images quiet, so that images of a patient resemble each other.
    """
    images, annotations, results = [], [], []
    for patient in range(patients):
        easy, noise, ill = rng.beta(2, 1), rng.gamma(1, 0.5), rng.random() < 0.7
        for _ in range(rng.integers(1, 4)):
            id_ = len(images) + 1
            images.append({"id": id_, "patient_id": patient})
            if ill:
                annotations.append({**box(id_, 0), "id": id_, "area": 100})
                if rng.random() < easy:
                    results.append({**box(id_, 0), "score": rng.beta(4, 2)})
            for place in range(rng.poisson(noise)):
                results.append({**box(id_, 20 * (place + 1)), "score": rng.beta(2, 4)})
    categories = [{"id": 1, "name": "lesion"}]
    return {"images": images, "categories": categories, "annotations": annotations}, results


@pytest.mark.slow
def test_coverage():
    """
    Of 150 studies of 60 patients each, about 95 % of the intervals hold the truth, which is what a
    study of 6,000 patients finds. (Of 400 studies with 1,000 resamples it was 92.2 to 95.0 %, by
    figure: percentile intervals of few, unlike patients are somewhat short.)
    """

    def box(id_, x):
        return {"image_id": id_, "category_id": 1, "bbox": [x, 0, 10, 10]}

    def study(patients, seed, **options):
        truth, results = simulate(np.random.default_rng(seed), patients, box)
        return evaluate_lesions(truth, results, tau=0.5, iou_type="bbox", **options)

    names = {
        "lesion": ("recall", "precision", "f1", "fp_per_image"),
        "image": ("specificity", "accuracy", "auroc"),
        "patient": ("recall", "accuracy"),
        "bbox": ("AP50", "AP50_voc"),
        "froc": ("sensitivity_at_0.5",),
    }
    wanted = [(group, name) for group, own in names.items() for name in own]
    whole = study(6000, 0)
    truth = {**whole.groups(), "froc": whole.froc}
    studies = 150
    held = dict.fromkeys(wanted, 0)
    for seed in range(1, studies + 1):
        intervals = study(60, seed, bootstrap=Bootstrap(resamples=200)).intervals
        for group, name in wanted:
            low, high = intervals[group][name]
            held[group, name] += low <= truth[group][name] <= high
    coverage = {key: number / studies for key, number in held.items()}
    # A standard error of the simulation is 2 %; the figures share their studies.
    assert min(coverage.values()) > 0.86, coverage
    assert 0.89 < np.mean(list(coverage.values())) < 0.98, coverage
