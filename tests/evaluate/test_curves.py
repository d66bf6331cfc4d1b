"""What ranks detections by score: precision-recall, AUROC, FROC, COCO's AP, calibration, and the
choice of a threshold; against other libraries, brute force and copies of the detections."""

import contextlib
import io
import logging
import math

import numpy as np
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rectangles import rectangles
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from imrcnn_d2.evaluation import OperatingPoint, choose_operating_point, evaluate_lesions
from imrcnn_d2.evaluation.calibration import BINS
from imrcnn_d2.evaluation.detection.curves import (
    FROC,
    RATES,
    RankedDetections,
    Ranking,
    pr_curve,
    weighted_auroc,
)

RECALLS = np.linspace(0, 1, 101)


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
    # The mean over ground truths of the best precision with at least that many hits.
    best = [curve.precision[curve.tp >= k].max(initial=0) for k in range(1, num_gt + 1)]
    assert curve.area == pytest.approx(np.mean(best))
    # Without the envelope it is scikit-learn's average precision, of the recall reached.
    if any(hits):
        plain = average_precision_score(hits, score) * sum(hits) / num_gt
        steps = np.diff(curve.recall, prepend=0) * curve.precision
        assert steps.sum() == pytest.approx(plain)
        assert curve.area >= plain - 1e-12


def weighed(hit, unit, lesions, weights):
    """Detections in order of score."""
    ranking = Ranking(-np.arange(len(hit), dtype=float), np.array(unit, int))
    ranked = RankedDetections(ranking, np.array(hit, bool), np.array(lesions))
    return ranked.weigh(np.array(weights))


def test_a_recall_that_is_met_exactly():
    """As floats compare: 7 hits of 100 are a recall of 0.07, COCO's recalls are k / 100."""
    for number in range(1, 101):
        curve = weighed(np.arange(100) < number, [0] * 100, [100], [[1]])
        reached = sum(recall <= number / 100 for recall in RECALLS)
        assert curve.sampled_area == pytest.approx(reached / 101)


@st.composite
def resamples(draw):
    """Detections of distinct score in up to five units, and how often a resample has each unit."""
    units = draw(st.integers(1, 5))
    number = draw(st.integers(0, 12))
    unit = draw(st.lists(st.integers(0, units - 1), min_size=number, max_size=number))
    hit = draw(st.lists(st.booleans(), min_size=number, max_size=number))
    missed = draw(st.lists(st.integers(0, 2), min_size=units, max_size=units))
    times = draw(st.lists(st.integers(0, 4), min_size=units, max_size=units))
    lesions = np.bincount(unit, hit, minlength=units).astype(int) + missed
    return np.array(hit, bool), np.array(unit, int), lesions, np.array(times)


@settings(deadline=None, max_examples=300)
@given(case=resamples(), alarms=st.integers(0, 20))
def test_weights_are_copies(case, alarms):
    """Equal to what is computed on a data set that holds the copies."""
    hit, unit, lesions, times = case
    curve = weighed(hit, unit, lesions, [times])
    score = np.repeat(-np.arange(len(hit), dtype=float), times[unit])
    total = int(times @ lesions)
    other = pr_curve(score, np.repeat(hit, times[unit]), total)
    assert curve.area == pytest.approx(other.area, nan_ok=True)
    assert curve.break_even_point == pytest.approx(other.break_even_point, nan_ok=True)
    if not total:
        assert np.isnan(curve.sampled_area[0])
        return
    reached = [other.precision[other.recall >= r].max(initial=0) for r in RECALLS]
    assert curve.sampled_area == pytest.approx(np.mean(reached))
    # Each threshold that keeps to the false alarms: after every score.
    tp = [0] + [
        other.tp[i]
        for i in range(len(score))
        if other.fp[i] <= alarms and (i + 1 == len(score) or score[i + 1] < score[i])
    ]
    assert curve.sensitivity(np.array([[alarms]])) == pytest.approx(max(tp) / total)


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


@pytest.fixture
def worked(dataset, region):
    """Four images, five lesions of two classes and a crowd, one image without. From the highest
    score down: hit, false alarm, hit and false alarm at 0.7, on the crowd alone, false alarm, hit.
    """
    data = dataset(
        4,
        rectangles(
            "1 0 0 10 10; 1 20 0 10 10 class 2; 2 0 0 10 10; 2 20 0 10 10; 3 0 0 10 10 class 2; "
            "3 20 20 20 20 crowd"
        ),
        classes=("a", "b"),
    )
    # (6) of the other class
    results = rectangles(
        "1 0 0 10 10 @0.9; 4 0 0 10 10 @0.8; 2 0 0 10 10 @0.7; 2 0 20 10 10 @0.7; "
        "3 20 20 10 10 @0.6; 3 0 0 10 10 @0.5; 1 20 0 10 10 class 2 @0.4"
    )
    return data, results


def test_froc_by_hand(worked):
    froc = evaluate_lesions(*worked).metrics.froc
    assert froc.curve()["score"].tolist() == [0.9, 0.8, 0.7, 0.5, 0.4]  # ties together
    assert froc.curve()["fp"].tolist() == [0, 1, 2, 3, 3]
    # 1/8 of an alarm in each of four images is half an alarm: none. 0.7 brings the second.
    expected = dict(zip(RATES, (20, 20, 40, 60, 60, 60, 60), strict=True))
    expected = {f"sensitivity_at_{rate:g}": value for rate, value in expected.items()}
    assert froc.values() == pytest.approx({**expected, "mean": 320 / 7})


def test_undefined_froc(dataset, region, worked):
    without_lesions = evaluate_lesions(dataset(2), [region(1, 0, 0, 10, 10, score=0.5)])
    assert np.isnan(list(without_lesions.froc.values())).all()
    assert list(evaluate_lesions(worked[0], []).froc.values()) == [0] * 8
    froc = evaluate_lesions(*worked).metrics.froc
    unscored = FROC(np.ones(6), froc.hit, froc.image, froc.lesions, scored=False)
    assert np.isnan(list(unscored.values().values())).all()
    assert not len(unscored.curve()["score"])


@settings(deadline=None, max_examples=30)
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
@given(seed=st.integers(0, 10**6), iou_type=st.sampled_from(["segm", "bbox"]))
def test_ap_is_pycocotools(random_case, seed, iou_type):
    data, results = random_case(seed)
    if not results:
        return
    # Of masks the area, which decides the size class, is the mask's: loadRes takes it from there
    # only where there is no box.
    unused = "bbox" if iou_type == "segm" else "segmentation"
    bare = [{key: value for key, value in r.items() if key != unused} for r in results]
    values = evaluate_lesions(data, results).groups()[iou_type]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(bare), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = [100 * s if s >= 0 else math.nan for s in evaluation.stats[:6]]
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [values[name] for name in names] == pytest.approx(expected, nan_ok=True)


def test_ap_where_cocoeval_fails(dataset, region):
    """It takes a match with the annotation of id 0 for none, and overflows on 256 masks."""
    data = dataset(3, [region(i, 0, 0, 10, 10) for i in (1, 2, 3)])
    data["annotations"][0]["id"] = 0
    results = [region(1 + i % 3, 0, 0, 10, 10, score=0.5 + i / 1000) for i in range(300)]
    assert evaluate_lesions(data, results).segm["AP"] == pytest.approx(100)
    crowd = dataset(1, [region(1, 0, 0, 10, 10, iscrowd=1)])
    for detected in (results[:1], []):
        assert np.isnan(list(evaluate_lesions(crowd, detected).segm.values())).all()


def test_size_of_a_detection_is_that_of_its_mask(dataset, region):
    """A false alarm that is medium by its box but small by its mask does not touch APm."""
    truth = dataset(1, [region(1, 0, 0, 40, 30)])
    hit = region(1, 0, 0, 40, 30, score=0.5)
    alarm = region(1, 45, 0, 5, 10, score=0.9) | {"bbox": [0, 0, 40, 30]}
    segm = evaluate_lesions(truth, [alarm, hit]).segm
    assert (segm["APm"], segm["AP"]) == (pytest.approx(100), pytest.approx(50))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_calibration_is_scikit_learns(random_case, seed, scores):
    """Scores on the bins' edges, which "tied" ones all are, too; several classes and crowds."""
    calibration = evaluate_lesions(*random_case(seed, scores)).metrics.calibration
    score, hit = calibration.score, calibration.hit
    values, diagram = calibration.values(), calibration.diagram()
    if len(set(hit)) < 2:  # scikit-learn needs both
        expected = 100 * np.mean((score - hit) ** 2) if len(hit) else math.nan
        assert values["brier"] == pytest.approx(expected, nan_ok=True)
        return
    assert values["brier"] == pytest.approx(100 * brier_score_loss(hit, score, pos_label=True))
    means = {"n": len(hit), "mean_score": 100 * score.mean(), "hit_rate": 100 * hit.mean()}
    assert {name: values[name] for name in means} == pytest.approx(means)
    rate, mean = calibration_curve(hit, score, n_bins=BINS)
    filled = diagram["detections"] > 0
    assert diagram["hit_rate"][filled] == pytest.approx(100 * rate)
    assert diagram["mean_score"][filled] == pytest.approx(100 * mean)
    weight = diagram["detections"][filled] / len(score)
    assert values["ece"] == pytest.approx(100 * np.sum(weight * np.abs(rate - mean)))


def test_scores_that_are_no_probabilities(dataset, region, caplog):
    data = dataset(1, [region(1, 0, 0, 10, 10)])
    scored = evaluate_lesions(data, [region(1, 0, 0, 10, 10, score=87.0)])
    assert "above 1" in caplog.text
    assert np.isnan(scored.calibration["ece"]) and scored.calibration["n"] == 0


def test_operating_points_by_hand(worked, dataset, region, caplog):
    """Of five lesions: F1 at 0.9 is 2/(1+5), at 0.8 2/(2+5), at 0.7 4/(4+5), at 0.4 6/(6+5)."""
    results = evaluate_lesions(*worked)
    assert choose_operating_point(results, dataset="val") == OperatingPoint(0.4, "f1", "val")
    for rule, tau in (("recall>=20", 0.9), ("recall>=20.5", 0.7), ("recall>=60", 0.4)):
        assert choose_operating_point(results, rule) == OperatingPoint(tau, rule, None)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        assert choose_operating_point(results, "recall>=95", "val").tau == 0.4
    assert "of val reach a recall of 60.0 %" in caplog.text
    # Of equal F1 the highest threshold. After one of three: 2/(1+2); after all: 4/(4+2).
    data = dataset(2, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)])
    places = ((1, 0, 0.9), (1, 20, 0.6), (2, 20, 0.5), (2, 0, 0.4))
    tied = [region(image, x, 0, 10, 10, score=score) for image, x, score in places]
    assert choose_operating_point(evaluate_lesions(data, tied)).tau == 0.9


def test_thresholds_that_cannot_be_chosen(worked, dataset):
    data, results = worked
    for rule in ("F1", "recall", "recall>=0", "recall>=101", "recall>=-5"):
        with pytest.raises(ValueError, match=rule):
            choose_operating_point(evaluate_lesions(data, results), rule)
    unscored = [{**result, "score": None} for result in results]
    without_lesions = evaluate_lesions(dataset(4, classes=("a", "b")), results)
    for scored, missing in (
        (evaluate_lesions(data, []), "detection of val"),
        (without_lesions, "lesion of val"),
        (evaluate_lesions(data, unscored), "score of val"),
    ):
        with pytest.raises(ValueError, match=missing):
            choose_operating_point(scored, dataset="val")


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_operating_points_against_scoring_at_every_threshold(random_case, seed, scores):
    data, detected = random_case(seed, scores, num_images=3)
    results = evaluate_lesions(data, detected)
    if not results.matching.evaluated.any() or not results.ground_truth.lesions.any():
        return
    candidates = set(results.detections.score[results.matching.evaluated].tolist())
    at = {t: evaluate_lesions(data, detected, tau=t).lesion for t in candidates}
    best = choose_operating_point(results).tau
    assert at[best]["f1"] == max(metrics["f1"] for metrics in at.values())
    assert all(at[t]["f1"] < at[best]["f1"] for t in at if t > best)
    requested = choose_operating_point(results, "recall>=50").tau
    if any(metrics["recall"] >= 50 for metrics in at.values()):
        assert at[requested]["recall"] >= 50
        assert all(at[t]["recall"] < 50 for t in at if t > requested)
