"""Models averaged and compared, and tests of significance; by hand, statsmodels and simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from imrcnn_d2.evaluation import (
    Bootstrap,
    OperatingPoint,
    evaluate_lesions,
    model_figures,
    paired_difference,
)
from imrcnn_d2.evaluation.comparison import (
    corrected_resampled_t_test,
    holm,
    image_level_test,
    mcnemar_exact,
)


@pytest.fixture(scope="module")
def scored(random_case):
    """Three models' results of 12 images, all scores distinct."""
    gt, first = random_case(5, scores="distinct", num_images=12)
    rng = np.random.default_rng(0)
    others = [
        [result | {"score": float(rng.random())} for result in first if rng.random() < keep]
        for keep in (0.8, 0.7)
    ]
    point = OperatingPoint(0.3, "f1")
    return [evaluate_lesions(gt, dt, tau=0.5, operating_point=point) for dt in (first, *others)]


def test_outcomes_are_averaged_and_rank_metrics_too(scored):
    model = model_figures(scored)
    lesion = model.values["lesion"]
    tp, fp, fn = (np.mean([run.lesion[key] for run in scored]) for key in ("TP", "FP", "FN"))
    assert lesion["TP"] == pytest.approx(tp)
    assert lesion["precision"] == pytest.approx(100 * tp / (tp + fp))
    assert lesion["f1"] == pytest.approx(200 * tp / (2 * tp + fp + fn))
    # A mean over all hits of all runs, not of the runs' means.
    iou = sum(run.lesion["iou"] * run.lesion["TP"] for run in scored) / (3 * tp)
    assert lesion["iou"] == pytest.approx(iou)
    for group, name in (("segm", "AP50_voc"), ("bbox", "AP"), ("image", "auroc")):
        values = [run.groups()[group][name] for run in scored]
        assert model.values[group][name] == pytest.approx(np.mean(values))
        assert model.sd(group, name) == pytest.approx(np.std(values))
        assert model.sd(group, name, sample=True) == pytest.approx(np.std(values, ddof=1))
    recall = np.mean([run.tau_val["image"]["recall"] for run in scored])
    assert model.values["tau_val.image"]["recall"] == pytest.approx(recall)
    assert model.taus == [0.3, 0.3, 0.3]
    assert np.isnan(model_figures(scored[:1]).sd("segm", "AP50_voc"))


def test_resamples_are_averaged(scored):
    """Counts over two runs before they are divided; metrics of ranks themselves."""
    metrics, bootstrap = [run.metrics for run in scored[:2]], Bootstrap(6, seed=4)
    resampled = model_figures(scored[:2], bootstrap).resampled
    (weights,) = bootstrap.weights(metrics[0].num_units)
    runs = [metric(weights) for metric in metrics]
    tp, fp = (sum(run["lesion"][key] for run in runs) for key in ("TP", "FP"))
    assert resampled["lesion"]["precision"] == pytest.approx(100 * tp / (tp + fp))
    for group, name in (("segm", "AP50_voc"), ("bbox", "AP50"), ("image", "auroc")):
        expected = np.mean([run[group][name] for run in runs], axis=0)
        assert resampled[group][name] == pytest.approx(expected, nan_ok=True)


def test_differences_are_paired(scored):
    """Subtracted resample by resample: much less spread than of two independent resamplings."""
    first, second = (model_figures([run], Bootstrap(400)) for run in scored[:2])
    low, high = first.intervals["segm"]["AP50_voc"]
    assert low < first.values["segm"]["AP50_voc"] < high
    difference = paired_difference(first, second, "lesion", "recall")
    samples = first.resampled["lesion"]["recall"] - second.resampled["lesion"]["recall"]
    estimate = scored[0].lesion["recall"] - scored[1].lesion["recall"]
    assert difference.estimate == pytest.approx(estimate)
    # Student's t with 11 degrees of freedom; twelve images, so the variance is times 12 / 11.
    half = 2.200985 * samples.std(ddof=1) * np.sqrt(12 / 11)
    assert (difference.low, difference.high) == pytest.approx(
        (estimate - half, estimate + half), rel=1e-6
    )
    other = model_figures([scored[1]], Bootstrap(400, seed=9)).resampled["lesion"]["recall"]
    assert samples.std() < 0.9 * (first.resampled["lesion"]["recall"] - other).std()
    same = paired_difference(first, first, "segm", "AP50_voc")
    assert (same.estimate, same.p) == (0, 1) and np.isnan([same.low, same.high]).all()
    for group, name in (("segm", "AP"), ("patient", "recall"), ("nonsense", "recall")):
        assert np.isnan(paired_difference(first, first, group, name).p)  # not resampled


def test_image_level_test_by_hand(region, dataset):
    gt = dataset(4, [region(i, 0, 0, 10, 10) for i in (1, 2, 3)])
    # Right: the first on 1 and 4, the second on 1, 2, 3 and not on 4, which has no lesion.
    first = evaluate_lesions(gt, [region(1, 0, 0, 10, 10, score=0.9)])
    second = [region(i, 0, 0, 10, 10, score=0.8) for i in (1, 2, 3, 4)]
    second = evaluate_lesions(gt, second, operating_point=OperatingPoint(0.85, "f1"))
    result = image_level_test([first], [second])
    assert (result.only_first, result.only_second) == (1, 2)
    assert result.p == pytest.approx(1)  # 1 of 3 discordant: 2 (1 + 3) / 8
    # At its operating point the second finds nothing, which is right in image 4.
    at_tau_val = image_level_test([second], [second], tau_val=True)
    assert (at_tau_val.only_first, at_tau_val.p) == (0, 1)
    assert image_level_test([first], [second], tau_val=True) is None
    assert image_level_test([first, first], [second]) is None


def test_different_test_sets_are_refused(region, dataset):
    lesion, patients = region(1, 0, 0, 10, 10), ["a", "a", "b"]
    base = evaluate_lesions(dataset(3, [lesion], patients=patients), [])
    base.check_same_units(evaluate_lesions(dataset(3, [lesion], patients=patients), []))
    renamed = dataset(3, [lesion], patients=patients)
    renamed["images"][2]["file_name"] = "other.png"
    crowd = region(1, 0, 0, 10, 10, iscrowd=1)
    for gt, named in (
        (dataset(2, [lesion], patients=["a", "a"]), "A and B .*3 and 2 images"),
        (dataset(3, [lesion], patients=["a", "b", "b"]), "'a' and 'b'"),
        (dataset(3, [lesion]), "patients"),
        (renamed, "'3.png' and 'other.png'"),
        (dataset(3, [region(1, 0, 0, 11, 10)], patients=patients), "annotations or classes"),
        (dataset(3, [lesion], ("polyp",), patients=patients), "annotations or classes"),
        (dataset(3, [crowd], patients=patients), "annotations or classes"),
    ):
        with pytest.raises(ValueError, match=named):
            base.check_same_units(evaluate_lesions(gt, []), ("A", "B"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_statsmodels_on_the_discordant(cases):
    result = mcnemar_exact(*np.array(cases).T)
    b, c = sum(a and not z for a, z in cases), sum(z and not a for a, z in cases)
    assert (result.only_first, result.only_second) == (b, c)
    assert result.p == pytest.approx(mcnemar([[0, b], [c, 0]], exact=True).pvalue)


def test_nadeau_bengio_by_hand():
    """Mean 2, s^2 = 10 / 4 = 2.5; t = 2 / sqrt((1/5 + 1/4) 2.5) = 2 / 1.06066 = 1.88562."""
    result = corrected_resampled_t_test([0, 1, 2, 3, 4], n_train=640, n_test=160)
    # Quantile 2.776445 of t with four degrees of freedom, from a table.
    half = 2.776445 * 1.0606602
    assert result.estimate == 2
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    # For four degrees of freedom P(T > t) is (1 - x (3 - x^2) / 2) / 2 with x = t / sqrt(4 + t^2).
    x = 1.8856181 / np.sqrt(4 + 1.8856181**2)
    assert result.p == pytest.approx(1 - x * (3 - x**2) / 2, rel=1e-6)
    same = corrected_resampled_t_test([0, 0, 0], 2, 1)
    assert (same.estimate, same.p) == (0, 1) and np.isnan([same.low, same.high]).all()
    sevenths = 100 * np.array([5, 4, 3]) / 7 - 100 * np.array([4, 3, 2]) / 7  # in floats, not alike
    for differences in ([1.1, 1.1, 1.1], sevenths, [1, np.nan, 2]):
        assert np.isnan(corrected_resampled_t_test(differences, 2, 1).p)
    for differences, sizes, named in (
        *(([1.0], (2, 1), "1 fold"), ([1.0, 2.0], (0, 1), "n_train = 0")),
        ([1.0, 2.0], (1, 0), "n_test = 0"),
    ):
        with pytest.raises(ValueError, match=named):
            corrected_resampled_t_test(differences, *sizes)


def test_holm_by_hand_and_statsmodels():
    # Sorted 0.01 0.02 0.03 0.04, times 4 3 2 1 and never falling: 0.04 0.06 0.06 0.06.
    adjusted = holm([0.04, np.nan, 0.01, 0.03, 0.02])
    assert adjusted == pytest.approx([0.06, np.nan, 0.04, 0.06, 0.06], nan_ok=True)
    assert holm([0.6, 0.9]).tolist() == [1, 1]
    assert np.isnan(holm([np.nan])).all() and len(holm([])) == 0

    p_values = np.random.default_rng(0).integers(0, 50, 40) ** 2 / 9000  # with ties
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
