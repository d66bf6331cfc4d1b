"""Models on the same images, against brute force: resamples built as data sets and scored."""

import dataclasses

import numpy as np
import pytest

from imrcnn_d2.evaluation import (
    Bootstrap,
    OperatingPoint,
    evaluate_lesions,
    model_figures,
    paired_difference,
)
from imrcnn_d2.evaluation.comparison import AveragedMetrics, check_same_units, image_level_test


@pytest.fixture(scope="module")
def case(random_case):
    """A ground truth of 12 images and three models' results for it, all scores distinct."""
    gt, first = random_case(5, scores="distinct", num_images=12)
    rng = np.random.default_rng(0)
    others = [
        [result | {"score": float(rng.random())} for result in first if rng.random() < keep]
        for keep in (0.8, 0.7)
    ]
    return gt, [first, *others]


@pytest.fixture(scope="module")
def scored(case):
    gt, results = case
    point = OperatingPoint(0.3, "f1")
    return [evaluate_lesions(gt, dt, tau=0.5, operating_point=point) for dt in results]


def resampled(gt, results, counts):
    """The data set that holds image i ``counts[i]`` times, and the results for it."""
    images, annotations, dt = [], [], []
    for image, times in zip(gt["images"], counts, strict=True):
        for _ in range(times):
            id_ = len(images) + 1
            images.append(image | {"id": id_})
            for source, target in ((gt["annotations"], annotations), (results, dt)):
                target += [r | {"image_id": id_} for r in source if r["image_id"] == image["id"]]
    annotations = [a | {"id": number} for number, a in enumerate(annotations, 1)]
    return gt | {"images": images, "annotations": annotations}, dt


def test_equal_runs_are_as_one(scored):
    metrics = scored[0].metrics
    average = AveragedMetrics([metrics] * 3)
    weights = next(Bootstrap(20, seed=1).weights(metrics.num_units))
    for ours, theirs in (
        (average(weights), metrics(weights)),
        (average.once(), metrics.once()),
        (average.proportions(), metrics.proportions()),
    ):
        assert ours.keys() == theirs.keys()
        for group in ours:
            for name in theirs[group]:
                assert ours[group][name] == pytest.approx(theirs[group][name], nan_ok=True), name


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


def test_resamples_are_data_sets_of_repeated_images(case, scored):
    """Each resample is built as a data set, scored, and averaged over two runs."""
    gt, results = case
    bootstrap = Bootstrap(6, seed=4)
    model = model_figures(scored[:2], bootstrap)
    (weights,) = bootstrap.weights(len(gt["images"]))
    for b, counts in enumerate(weights):
        runs = [evaluate_lesions(*resampled(gt, dt, counts), tau=0.5) for dt in results[:2]]
        tp, fp = (sum(run.lesion[key] for run in runs) for key in ("TP", "FP"))
        assert model.resampled["lesion"]["precision"][b] == pytest.approx(100 * tp / (tp + fp))
        for group, name in (("segm", "AP50_voc"), ("bbox", "AP50"), ("image", "auroc")):
            expected = np.mean([run.groups()[group][name] for run in runs])
            assert model.resampled[group][name][b] == pytest.approx(expected, nan_ok=True)


def test_intervals_are_percentiles_and_differences_are_paired(scored):
    """Subtracted resample by resample: much less spread than of two independent resamplings."""
    first, second = (model_figures([run], Bootstrap(400)) for run in scored[:2])
    low, high = np.percentile(first.resampled["segm"]["AP50_voc"], [2.5, 97.5])
    assert first.intervals["segm"]["AP50_voc"] == pytest.approx((low, high))
    assert low < first.values["segm"]["AP50_voc"] < high
    difference = paired_difference(first, second, "lesion", "recall")
    samples = first.resampled["lesion"]["recall"] - second.resampled["lesion"]["recall"]
    estimate = scored[0].lesion["recall"] - scored[1].lesion["recall"]
    assert difference.estimate == pytest.approx(estimate)
    assert (difference.low, difference.high) == pytest.approx(np.percentile(samples, [2.5, 97.5]))
    other = model_figures([scored[1]], Bootstrap(400, seed=9)).resampled["lesion"]["recall"]
    assert samples.std() < 0.9 * (first.resampled["lesion"]["recall"] - other).std()
    same = paired_difference(first, first, "segm", "AP50_voc")
    assert dataclasses.astuple(same) == (0, 0, 0, 1, 0)
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
    check_same_units(base, evaluate_lesions(dataset(3, [lesion], patients=patients), []))
    renamed = dataset(3, [lesion], patients=patients)
    renamed["images"][2]["file_name"] = "other.png"
    crowd = region(1, 0, 0, 10, 10, iscrowd=1)
    for gt, named in (
        (dataset(2, [lesion], patients=["a", "a"]), "A and B .*3 and 2 images"),
        (dataset(3, [lesion], patients=["a", "b", "b"]), "'a' and 'b'"),
        (dataset(3, [lesion]), "patients"),
        (renamed, "'3.png' and 'other.png'"),
        (dataset(3, [region(1, 0, 0, 11, 10)], patients=patients), "lesions or classes"),
        (dataset(3, [lesion], ("polyp",), patients=patients), "lesions or classes"),
        (dataset(3, [crowd], patients=patients), "lesions or classes"),
    ):
        with pytest.raises(ValueError, match=named):
            check_same_units(base, evaluate_lesions(gt, []), ("A", "B"))


def test_patients_are_the_units(region, dataset):
    """Two patients: a resample holds all images of one twice, or each once."""
    annotations = [region(i, 0, 0, 10, 10) for i in (1, 2, 3)]
    gt = dataset(3, annotations, patients=["a", "a", "b"])
    results = evaluate_lesions(gt, [region(3, 0, 0, 10, 10, score=0.9)])
    model = model_figures([results], Bootstrap(60))
    assert set(model.resampled["lesion"]["recall"].round(3)) == {0, 33.333, 100}
