import dataclasses

import numpy as np
import pytest

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.comparison import (
    AveragedMetrics,
    check_same_units,
    image_level_test,
    model_figures,
    paired_difference,
)
from imrcnn_d2.evaluation.detection.results import OperatingPoint
from imrcnn_d2.evaluation.statistics import Bootstrap


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
    return [
        evaluate_lesions(gt, own, tau=0.5, operating_point=OperatingPoint(0.3, "f1"))
        for own in results
    ]


def resampled(gt, results, drawn):
    """The data set that holds image i ``drawn[i]`` times, and the results for it."""
    images, annotations, found = [], [], []
    for image, times in zip(gt["images"], drawn, strict=True):
        for _ in range(times):
            id_ = len(images) + 1
            images.append(image | {"id": id_})
            for source, target in ((gt["annotations"], annotations), (results, found)):
                target += [r | {"image_id": id_} for r in source if r["image_id"] == image["id"]]
    annotations = [a | {"id": number} for number, a in enumerate(annotations, 1)]
    return gt | {"images": images, "annotations": annotations}, found


def test_equal_runs_are_as_one(scored):
    one = scored[0].metrics
    average = AveragedMetrics([one, one, one])
    weights = next(Bootstrap(20, seed=1).weights(one.num_units))
    for ours, theirs in (
        (average(weights), one(weights)),
        (average.once(), one.once()),
        (average.proportions(), one.proportions()),
    ):
        assert ours.keys() == theirs.keys()
        for group in ours:
            for name in theirs[group]:
                assert ours[group][name] == pytest.approx(theirs[group][name], nan_ok=True), name


def test_outcomes_are_averaged_and_rank_figures_too(scored):
    model = model_figures(scored)
    tp, fp, fn = (np.mean([one.lesion[key] for one in scored]) for key in ("TP", "FP", "FN"))
    assert model.values["lesion"]["TP"] == pytest.approx(tp)
    assert model.values["lesion"]["precision"] == pytest.approx(100 * tp / (tp + fp))
    assert model.values["lesion"]["f1"] == pytest.approx(200 * tp / (2 * tp + fp + fn))
    # A mean over all hits of all runs, not of the runs' means.
    iou = sum(one.lesion["iou"] * one.lesion["TP"] for one in scored) / (3 * tp)
    assert model.values["lesion"]["iou"] == pytest.approx(iou)
    for group, name in (("segm", "AP50_voc"), ("bbox", "AP"), ("image", "auroc")):
        values = [one.groups()[group][name] for one in scored]
        assert model.values[group][name] == pytest.approx(np.mean(values))
        assert model.sd(group, name) == pytest.approx(np.std(values))
        assert model.sd(group, name, sample=True) == pytest.approx(np.std(values, ddof=1))
    called = np.mean([one.tau_val["image"]["recall"] for one in scored])
    assert model.values["tau_val.image"]["recall"] == pytest.approx(called)
    assert model.taus == [0.3, 0.3, 0.3]
    assert np.isnan(model_figures(scored[:1]).sd("segm", "AP50_voc"))


def test_resamples_are_data_sets_of_repeated_images(case, scored):
    """Brute force: each resample built as a data set, scored, and averaged over two runs."""
    gt, results = case
    bootstrap = Bootstrap(6, seed=4)
    model = model_figures(scored[:2], bootstrap)
    (weights,) = bootstrap.weights(len(gt["images"]))
    for b, drawn in enumerate(weights):
        runs = [evaluate_lesions(*resampled(gt, own, drawn), tau=0.5) for own in results[:2]]
        tp, fp = (sum(run.lesion[key] for run in runs) for key in ("TP", "FP"))
        assert model.resampled["lesion"]["precision"][b] == pytest.approx(100 * tp / (tp + fp))
        for group, name in (("segm", "AP50_voc"), ("bbox", "AP50"), ("image", "auroc")):
            expected = np.mean([run.groups()[group][name] for run in runs])
            assert model.resampled[group][name][b] == pytest.approx(expected, nan_ok=True)


def test_intervals_are_percentiles_of_the_resamples(scored):
    model = model_figures(scored, Bootstrap(300))
    for group, name in (("segm", "AP50_voc"), ("lesion", "precision")):
        low, high = np.percentile(model.resampled[group][name], [2.5, 97.5])
        assert model.intervals[group][name] == pytest.approx((low, high))
        assert low < model.values[group][name] < high


def test_a_model_does_not_differ_from_itself(scored):
    model = model_figures(scored[:1], Bootstrap(50))
    difference = paired_difference(model, model, "segm", "AP50_voc")
    assert dataclasses.astuple(difference) == (0, 0, 0, 1, 0)


def test_differences_are_paired(scored):
    """Subtracted resample by resample: much less spread than of two independent resamplings."""
    bootstrap = Bootstrap(400)
    one, two = (model_figures([own], bootstrap) for own in scored[:2])
    difference = paired_difference(one, two, "lesion", "recall")
    samples = one.resampled["lesion"]["recall"] - two.resampled["lesion"]["recall"]
    assert difference.estimate == pytest.approx(
        scored[0].lesion["recall"] - scored[1].lesion["recall"]
    )
    assert (difference.low, difference.high) == pytest.approx(np.percentile(samples, [2.5, 97.5]))
    other = model_figures([scored[1]], Bootstrap(400, seed=9)).resampled["lesion"]["recall"]
    assert samples.std() < 0.9 * (one.resampled["lesion"]["recall"] - other).std()


def test_a_figure_that_was_not_resampled(scored):
    model = model_figures(scored[:1], Bootstrap(10))
    for group, name in (("segm", "AP"), ("patient", "recall"), ("nonsense", "recall")):
        assert np.isnan(paired_difference(model, model, group, name).p)


def test_image_level_test_by_hand(region, dataset):
    gt = dataset(4, [region(i, 0, 0, 10, 10) for i in (1, 2, 3)])
    # Right: the first on 1 and 4, the second on 1, 2, 3 and not on 4, which has no lesion.
    first = evaluate_lesions(gt, [region(1, 0, 0, 10, 10, score=0.9)])
    second = [region(i, 0, 0, 10, 10, score=0.8) for i in (1, 2, 3, 4)]
    second = evaluate_lesions(gt, second, operating_point=OperatingPoint(0.85, "f1"))
    result = image_level_test([first], [second])
    assert (result.only_first, result.only_second) == (1, 2)
    assert result.p == pytest.approx(1)  # 1 of 3 discordant: 2 (1 + 3) / 8
    # At its own threshold the second finds nothing, which is right in image 4.
    own = image_level_test([second], [second], tau_val=True)
    assert (own.only_first, own.p) == (0, 1)
    assert image_level_test([first], [second], tau_val=True) is None
    assert image_level_test([first, first], [second]) is None


def test_different_test_sets_are_refused(region, dataset):
    def score(gt):
        return evaluate_lesions(gt, [])

    lesion = region(1, 0, 0, 10, 10)
    base = score(dataset(3, [lesion], patients=["a", "a", "b"]))
    check_same_units(base, score(dataset(3, [lesion], patients=["a", "a", "b"])))
    with pytest.raises(ValueError, match="A and B have different images .3 and 2 images"):
        check_same_units(base, score(dataset(2, [lesion], patients=["a", "a"])), ("A", "B"))
    with pytest.raises(ValueError, match="different patients .* such as 'a' and 'b'"):
        check_same_units(base, score(dataset(3, [lesion], patients=["a", "b", "b"])))
    with pytest.raises(ValueError, match="different patients"):
        check_same_units(base, score(dataset(3, [lesion])))
    renamed = dataset(3, [lesion], patients=["a", "a", "b"])
    renamed["images"][2]["file_name"] = "other.png"
    with pytest.raises(ValueError, match="different images .* such as '3.png' and 'other.png'"):
        check_same_units(base, score(renamed))
    for annotations, classes in (
        ([region(1, 0, 0, 11, 10)], ("lesion",)),
        ([lesion], ("polyp",)),
        ([region(1, 0, 0, 10, 10, iscrowd=1)], ("lesion",)),
    ):
        other = dataset(3, annotations, classes, patients=["a", "a", "b"])
        with pytest.raises(ValueError, match="same images but different lesions or classes"):
            check_same_units(base, score(other))


def test_patients_are_the_units(region, dataset):
    """Two patients: a resample holds all images of one twice, or each once."""
    annotations = [region(i, 0, 0, 10, 10) for i in (1, 2, 3)]
    gt = dataset(3, annotations, patients=["a", "a", "b"])
    results = evaluate_lesions(gt, [region(3, 0, 0, 10, 10, score=0.9)])
    model = model_figures([results], Bootstrap(60))
    assert set(model.resampled["lesion"]["recall"].round(3)) == {0, 33.333, 100}
