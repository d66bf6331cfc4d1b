"""What ranks detections by score, and thresholds; against other libraries and brute force."""

import math
from itertools import groupby, permutations, product

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.calibration import BINS, Calibration, ScoreMap
from imrcnn_d2.evaluation.detection.curves import (
    RATES,
    RankedDetections,
    Ranking,
    pr_curve,
    weighted_auroc,
)


def curve_of(score, hit, num_gt):
    return pr_curve(np.array(score, float), np.array(hit, bool), num_gt)


@pytest.mark.parametrize(
    ("score", "hit", "num_gt", "area", "break_even_point"),
    [
        *(([0.5, 0.5], [1, 0], 1, 1, 1), ([0.5, 0.5], [0, 1], 1, 0.5, 0)),  # ties stay in order
        *(([], [], 3, 0, 0), ([0.9], [0], 0, math.nan, math.nan)),
        ([0.9, 0.8], [1, 1], 3, 2 / 3, math.nan),  # fewer detections than ground truths
        ([0.9, 0.8, 0.7], [1, 1, 0], 3, 2 / 3, 2 / 3),
    ],
)
def test_edges_of_precision_recall(score, hit, num_gt, area, break_even_point):
    curve = curve_of(score, hit, num_gt)
    assert curve.area == pytest.approx(area, nan_ok=True)
    assert curve.break_even_point == pytest.approx(break_even_point, nan_ok=True)
    assert num_gt or np.isnan(curve.recall).all()


@settings(deadline=None, max_examples=50)
@given(
    hits=st.lists(st.booleans(), min_size=1, max_size=30),
    missed=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_area_agrees_with_others(hits, missed, seed):
    num_gt = sum(hits) + missed
    if not num_gt:
        return
    score = np.random.default_rng(seed).permutation(len(hits)) / len(hits)  # distinct
    curve = curve_of(score, hits, num_gt)
    assert curve.area == pytest.approx(voc_ap(curve.recall, curve.precision))  # Detectron2's
    # Without the envelope it is scikit-learn's average precision, of the recall reached.
    if any(hits):
        plain = average_precision_score(hits, score) * sum(hits) / num_gt
        steps = np.diff(curve.recall, prepend=0) * curve.precision
        assert steps.sum() == pytest.approx(plain)


def test_a_recall_that_is_met_exactly():
    """As floats compare: 7 hits of 100 are a recall of 0.07, COCO's recalls are k / 100."""
    ranking = Ranking(-np.arange(100.0), np.zeros(100, int))
    for number in range(1, 101):
        ranked = RankedDetections(ranking, np.arange(100) < number, np.array([100]))
        reached = sum(recall <= number / 100 for recall in np.linspace(0, 1, 101))
        assert ranked.weigh(np.array([[1]])).sampled_area == pytest.approx(reached / 101)


@settings(deadline=None, max_examples=100)
@given(
    cases=st.lists(
        st.tuples(st.booleans(), st.sampled_from([0, 0.2, 0.5, 0.9]), st.integers(0, 4)),
        min_size=1,
        max_size=20,
    ),
    times=st.lists(st.integers(0, 3), min_size=5, max_size=5),
)
def test_auroc_is_scikit_learns(cases, times):
    positive, score, unit = (np.array(column) for column in zip(*cases, strict=True))
    weights = np.stack([np.array(times), np.ones(5, int)])
    areas = weighted_auroc(positive, score, unit, weights)
    for area, row in zip(areas, weights, strict=True):
        taken = row[unit] > 0
        if len(set(positive[taken])) < 2:
            assert np.isnan(area)
        else:
            args = positive[taken], score[taken]
            assert area == pytest.approx(roc_auc_score(*args, sample_weight=row[unit][taken]))


def test_froc_by_hand(worked):
    froc = evaluate_lesions(*worked).metrics.froc
    assert froc.curve()["score"].tolist() == [0.9, 0.8, 0.7, 0.5, 0]  # ties together
    assert froc.curve()["fp"].tolist() == [0, 1, 2, 3, 3]
    # 1/8 of an alarm in each of four images is half an alarm: none. 0.7 brings the second.
    expected = dict(zip(RATES, (20, 20, 40, 60, 60, 60, 60), strict=True))
    expected = {f"sensitivity_at_{rate:g}": value for rate, value in expected.items()}
    assert froc.values() == pytest.approx({**expected, "mean": 320 / 7})


def test_undefined_froc(dataset, region, worked):
    without_lesions = evaluate_lesions(dataset(1), [region(1, 0, 0, 10, 10, score=0.5)])
    assert np.isnan(list(without_lesions.froc.values())).all()
    assert without_lesions.metrics.froc.curve()["fp_per_image"] == [1]
    assert list(evaluate_lesions(worked[0], []).froc.values()) == [0] * 8


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_froc_against_every_threshold(random_case, seed, scores):
    scored = evaluate_lesions(*random_case(seed, scores))
    froc = scored.metrics.froc
    for rate in RATES if froc.lesions.sum() else ():
        best = 0.0
        for threshold in {*froc.score.tolist(), 2.0}:
            above = froc.score >= threshold
            if (above & ~froc.hit).sum() / len(froc.lesions) <= rate:
                best = max(best, (above & froc.hit).sum() / froc.lesions.sum())
        assert scored.froc[f"sensitivity_at_{rate:g}"] == pytest.approx(100 * best)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_calibration_is_scikit_learns(random_case, seed, scores):
    """Scores on the bins' edges, which "tied" ones all are, too; several classes and crowds."""
    calibration = evaluate_lesions(*random_case(seed, scores)).metrics.calibration
    score, hit = calibration.score, calibration.hit
    values, diagram = calibration.values(), calibration.diagram()
    if len(set(hit)) < 2:  # scikit-learn needs both
        return
    assert values["brier"] == pytest.approx(100 * brier_score_loss(hit, score, pos_label=True))
    means = {"n": len(hit), "mean_score": 100 * score.mean(), "hit_rate": 100 * hit.mean()}
    assert {name: values[name] for name in means} == pytest.approx(means)
    rate, mean = calibration_curve(hit, score, n_bins=BINS)
    filled = diagram["detections"] > 0
    assert diagram["hit_rate"][filled] == pytest.approx(100 * rate)
    assert diagram["mean_score"][filled] == pytest.approx(100 * mean)
    weight = diagram["detections"][filled] / len(score)
    distance = np.abs(rate - mean)
    deviation = np.sqrt(rate * (1 - rate) / diagram["detections"][filled])
    varies = deviation > 0
    by_chance = np.zeros(len(rate))  # what chance adds to an absolute difference
    folded = stats.foldnorm(distance[varies] / deviation[varies], scale=deviation[varies])
    by_chance[varies] = folded.mean() - distance[varies]
    expected = max(0, 100 * np.sum(weight * (distance - by_chance)))
    assert values["ece"] == pytest.approx(expected, abs=1e-9)


def test_chance_is_no_calibration_error():
    """Scores that are right, and such that are too high by 10 points, in 400 samples of 300: the
    sum of absolute differences in bins finds more than 5 and 10 %."""
    rng = np.random.default_rng(0)
    for excess, most, plain in ((0, 3.7, 5), (0.1, 10, 10)):
        found, biased = [], []
        for _ in range(400):
            score = rng.uniform(0.1, 1, 300)
            hit = rng.random(300) < score - excess
            calibration = Calibration(score, hit, np.arange(300), 300)
            bins = calibration.diagram()
            filled = bins["detections"] > 0
            distance = np.abs(bins["mean_score"] - bins["hit_rate"])[filled]
            biased.append(bins["detections"][filled] @ distance / 300)
            found.append(calibration.values()["ece"])
        assert np.mean(biased) > plain
        assert 100 * excess - 1 < np.mean(found) < most


def test_scores_that_are_no_probabilities(dataset, region, caplog):
    data = dataset(1, [region(1, 0, 0, 10, 10)])
    scored = evaluate_lesions(data, [region(1, 0, 0, 10, 10, score=87.0)])
    assert "above 1" in caplog.text
    assert np.isnan(scored.calibration["ece"]) and scored.calibration["n"] == 0


def test_equal_scores_make_ap_depend_on_the_order_of_images(dataset, region, caplog):
    """A hit in one image and a false alarm in another, of one score: a warning gives the range."""
    results = [region(1, 0, 0, 10, 10, score=0.8), region(2, 0, 0, 10, 10, score=0.8)]
    for image, area in ((1, 100), (2, 50)):
        scored = evaluate_lesions(dataset(2, [region(image, 0, 0, 10, 10)]), results)
        assert scored.segm["AP50_voc"] == area
        assert scored.meta["tied_AP50_voc"] == {"bbox": (50, 100), "segm": (50, 100)}
        (warning,) = caplog.records
        assert warning.levelname == "WARNING" and "50.0 to 100.0 (segm)" in warning.getMessage()
        caplog.clear()
        scored.part(np.array([0]))  # the warning was of all images
        results[image - 1]["score"] = 0.79
        scored = evaluate_lesions(dataset(2, [region(image, 0, 0, 10, 10)]), results)
        assert "tied_AP50_voc" not in scored.meta and not caplog.records
        results[image - 1]["score"] = 0.8


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=6), st.integers(0, 2))
def test_areas_of_tied_scores_are_those_of_all_orders(detections, missed):
    detections.sort(key=lambda detection: -detection[0])
    score = np.array([score for score, _ in detections])
    hit = np.array([is_hit for _, is_hit in detections], dtype=bool)
    lesions = np.array([hit.sum() + missed])
    if not lesions[0]:
        return
    ranked = RankedDetections(Ranking(score, np.zeros(len(score), int)), hit, lesions)
    groups = [[h for _, h in group] for _, group in groupby(detections, key=lambda d: d[0])]
    areas = []
    for orders in product(*({*permutations(group)} for group in groups)):
        hits = np.cumsum([h for order in orders for h in order])
        areas.append(voc_ap(hits / lesions[0], hits / (np.arange(len(hits)) + 1)))
    assert ranked.tied_areas() == pytest.approx((min(areas), max(areas)))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_ap_per_image_is_that_of_matterports_mask_rcnn(random_case, seed):
    """utils.compute_ap of detections from 0.7, mean over the images with a lesion. A raw score
    decides, whose order is that of the mapped one."""
    data, results = random_case(seed, "distinct", num_images=5)
    data["annotations"] = [a for a in data["annotations"] if not a["iscrowd"]]
    for result in results:
        result |= {"raw_score": result["score"], "score": result["score"] ** 2}
    areas = []
    for image in data["images"]:
        truth = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        detected = [r for r in results if r["image_id"] == image["id"] and r["raw_score"] >= 0.7]
        detected.sort(key=lambda result: -result["raw_score"])
        if not truth:
            continue
        free, hit = set(range(len(truth))), []
        for result in detected:
            masks = [a["segmentation"] for a in truth]
            iou = mask_util.iou([result["segmentation"]], masks, [0] * len(masks))[0]
            same = [n for n in free if truth[n]["category_id"] == result["category_id"]]
            # Of equal overlaps any: here the last, as in pycocotools.
            best = max(same, key=lambda n: (iou[n], n), default=None)
            hit.append(best is not None and iou[best] >= 0.5)
            free -= {best} if hit[-1] else set()
        hits = np.cumsum(hit)
        areas.append(voc_ap(hits / len(truth), hits / (np.arange(len(hits)) + 1)))
    expected = 100 * np.mean(areas) if areas else math.nan
    scored = evaluate_lesions(data, results, bootstrap=Bootstrap(20))
    assert scored.paper["AP_per_image"] == pytest.approx(expected, nan_ok=True)
    assert "AP_per_image" in scored.intervals["paper"]
    unscored = [{**r, "score": None, "raw_score": None} for r in results]
    assert not results or math.isnan(evaluate_lesions(data, unscored).paper["AP_per_image"])


def test_a_score_map_finds_the_logistic_curve_that_hits_follow():
    """Against scikit-learn's logistic regression of the logit, without a penalty."""
    rng = np.random.default_rng(0)
    score = rng.uniform(0.02, 0.98, 4000)
    logit = np.log(score / (1 - score))
    hit = rng.random(4000) < 1 / (1 + np.exp(-(0.6 * logit - 1.2)))
    fitted = ScoreMap.fit(score, hit, "val")
    expected = LogisticRegression(C=1e9).fit(logit[:, None], hit)
    assert fitted.slope == pytest.approx(expected.coef_[0, 0], rel=0.01)
    assert fitted.offset == pytest.approx(expected.intercept_[0], rel=0.01)
    np.testing.assert_allclose(
        fitted(score), expected.predict_proba(logit[:, None])[:, 1], atol=2e-3
    )
    assert Calibration(fitted(score), hit, np.zeros(4000, int), 1).values()["ece"] < 3


def overconfident(rng, number):
    """Scores and hits of a detector whose detections hit less often than their scores say."""
    probability = rng.beta(0.5, 1.0, number)
    score = special.expit((special.logit(probability) + 2.5) / 0.85)
    return score, rng.random(number) < probability


def found_and_not(rng, number):
    """The same, not as Platt has it: scores of hits and of others are beta distributed."""
    hit = rng.random(number) < 0.35
    return np.where(hit, rng.beta(8, 0.7, number), rng.beta(0.9, 1.2, number)), hit


def expected_error(score, hit):
    """ECE in percent: ten bins of equal width."""
    bins = np.minimum((10 * score).astype(int), 9)
    return 100 / len(score) * sum(abs((score - hit)[bins == b].sum()) for b in range(10))


@pytest.mark.slow
@pytest.mark.parametrize("detect, most", [(overconfident, 4), (found_and_not, 5)])
def test_mapped_scores_are_probabilities_of_detections_that_no_map_was_fitted_to(detect, most):
    """Fitted to as many detections as 150 images have, 300 times."""
    rng, raw, mapped = np.random.default_rng(3), [], []
    for _ in range(300):
        score_map = ScoreMap.fit(*detect(rng, 400))
        score, hit = detect(rng, 2000)
        raw.append(expected_error(score, hit))
        mapped.append(expected_error(score_map(score), hit))
    assert np.mean(raw) > 10
    assert np.mean(mapped) < most and (np.array(mapped) < np.array(raw) / 2).all()


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    scores=st.sampled_from(["tied", "distinct"]),
    slope=st.floats(0.05, 1.5),
    offset=st.floats(-5, 5),
)
def test_a_map_changes_no_metric_of_all_scores(random_case, seed, scores, slope, offset):
    """Nor one at 0.7 of the raw scores: the group paper. A score of 0 is that of no detection."""
    dataset, results = random_case(seed, scores)
    results = [result for result in results if result["score"] > 0]
    score_map = ScoreMap(slope, offset)
    raw = evaluate_lesions(dataset, results, tau=0.5)
    mapped = evaluate_lesions(dataset, score_map.map_records(results), tau=float(score_map(0.5)))
    for name, values in {**raw.groups(), "froc": raw.froc}.items():
        np.testing.assert_array_equal(
            [*values.values()], [*{**mapped.groups(), "froc": mapped.froc}[name].values()], name
        )


def test_a_score_map_keeps_the_order_of_scores():
    score = np.random.default_rng(1).random(200).astype(np.float32)
    for hit in (np.zeros(200, bool), np.ones(200, bool)):
        assert ScoreMap.fit(score, hit) is None
    against = ScoreMap.fit(score, score < 0.5)  # hits have the lower scores
    assert against.slope > 0
    for mapped in (against(score), ScoreMap(0.3, -2.0)(score)):
        np.testing.assert_array_equal(np.argsort(mapped), np.argsort(score))
        assert ((mapped > 0) & (mapped < 1)).all()
