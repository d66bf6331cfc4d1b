"""The threshold at which a detector is used is chosen on validation data."""

import logging
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.data.masks import PART_SHARE, encode, parts_of_others
from imrcnn_d2.evaluation import (
    Bootstrap,
    OperatingPoint,
    choose_operating_point,
    evaluate_lesions,
)

SURE = Bootstrap(200)


def sampled_once(data, results, times):
    """A data set with so many copies of each image."""
    images, copies = [], ([], [])
    for image, number in zip(data["images"], times, strict=True):
        for _ in range(number):
            images.append({**image, "id": len(images) + 1})
            for records, copied in zip((data["annotations"], results), copies, strict=True):
                of_image = [r for r in records if r["image_id"] == image["id"]]
                copied += [{**record, "image_id": len(images)} for record in of_image]
    annotations = [{**a, "id": number} for number, a in enumerate(copies[0], 1)]
    return {**data, "images": images, "annotations": annotations}, copies[1]


def at_every_score(data, results, thresholds):
    """The values by which a rule decides, at each threshold: F1, recall, false alarms an image."""
    at = {}
    for tau in thresholds:
        lesion = evaluate_lesions(data, results, tau=tau).lesion
        recall = Fraction(int(lesion["TP"]), int(lesion["TP"] + lesion["FN"]))
        alarms = Fraction(int(lesion["FP"]), len(data["images"]))
        at[tau] = (lesion["f1"], recall, alarms)
    return at


def chosen_of(at, rule):
    """What the rules say, one at a time."""
    if rule == "f1":
        return max(at, key=lambda tau: (round(at[tau][0], 9), tau))
    if rule == "fp_per_image<=0.7":
        few = [tau for tau in at if at[tau][2] <= Fraction("0.7")]
        return min(few) if few else max(at)
    most = min(Fraction("0.6"), max(recall for _, recall, _ in at.values()))
    return max(tau for tau in at if at[tau][1] >= most)


@settings(deadline=None, max_examples=4)
@given(
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(["f1", "recall>=60", "fp_per_image<=0.7"]),
    resamples=st.integers(3, 4),
    per_patient=st.booleans(),
)
def test_the_median_of_the_thresholds_of_resamples(random_case, seed, rule, resamples, per_patient):
    """Against scoring copies of the images at every score, in each resample of the units."""
    data, detected = random_case(seed, "tied", num_images=4)
    if per_patient:
        for image in data["images"]:
            image["patient_id"] = image["id"] // 2
    results = evaluate_lesions(data, detected)
    if not results.matching.evaluated.any() or not results.ground_truth.lesions.any():
        return
    bootstrap = Bootstrap(resamples, seed % 100)
    thresholds = set(results.detections.score[results.matching.evaluated].tolist())
    units = [image.get("patient_id", image["id"]) for image in data["images"]]
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    taus = []
    for weights in next(bootstrap.weights(len(numbers))):
        copies = sampled_once(data, detected, [int(weights[numbers[unit]]) for unit in units])
        if any(not a["iscrowd"] for a in copies[0]["annotations"]):
            taus.append(chosen_of(at_every_score(*copies, thresholds), rule))
    if not taus:
        return
    tau = choose_operating_point(results, rule, bootstrap=bootstrap).tau
    assert tau == sorted(taus)[(len(taus) - 1) // 2]


@pytest.mark.parametrize("rule", ["f1", "recall>=80", "fp_per_image<=0.3", "risk<=0.3"])
def test_a_map_of_the_scores_maps_the_threshold(random_case, rule):
    data, detected = random_case(5, "distinct", num_images=8)
    mapped = [{**d, "score": 1 / (1 + math.exp(2 - 5 * d["score"]))} for d in detected]
    taus = [choose_operating_point(evaluate_lesions(data, d), rule).tau for d in (detected, mapped)]
    assert 0 < taus[0] < 1 and taus[1] == 1 / (1 + math.exp(2 - 5 * taus[0]))


def simulated(rng, region, dataset, num_images):
    """One lesion in each image, found in 97 %, and false alarms with lower scores, some not."""
    places, alarms = [region(i, 0, 0, 10, 10) for i in range(1, num_images + 1)], []
    hits = [{**place, "score": 1 / (1 + np.exp(-rng.normal(3, 2)))} for place in places]
    for image in range(1, num_images + 1):
        for number in range(rng.poisson(0.8)):
            score = 1 / (1 + np.exp(-rng.normal(-0.5, 2)))
            alarms.append(region(image, 15 + number, 20, 10, 10, score=score))
    kept = [detection for detection in hits if rng.random() < 0.97]
    return evaluate_lesions(dataset(num_images, places), kept + alarms, iou_type="bbox")


def test_the_threshold_depends_less_on_the_validation_set(region, dataset):
    """Precision and recall on other images vary less from validation set to validation set than
    with the threshold of the largest F1 of each set."""
    rng = np.random.default_rng(0)
    test = simulated(rng, region, dataset, 1500)
    lesions = test.ground_truth.lesions.sum()
    largest, median = [], []
    for _ in range(30):
        val = simulated(rng, region, dataset, 80)
        order = np.argsort(-val.detections.score)
        tp, number = np.cumsum(val.matching.hit[order]), np.arange(1, len(order) + 1)
        best = np.argmax(2 * tp / (number + val.ground_truth.lesions.sum()))
        taus = val.detections.score[order[best]], choose_operating_point(val, bootstrap=SURE).tau
        for tau, values in zip(taus, (largest, median), strict=True):
            above = test.detections.score >= tau
            hits = test.matching.hit[above]
            values.append((hits.mean(), hits.sum() / lesions))
    assert (np.std(median, axis=0) < 0.9 * np.std(largest, axis=0)).all()


def test_risk_by_hand(region, dataset, caplog):
    """Patients a (two lesions in two frames), b, c and d (one each), e (none). Their losses by the
    hits above a threshold: a half, or none; of b, c, d one, or none. Over n = 4 patients with a
    lesion (M + 1) / 5 is (3.5 + 1) / 5 after the first hit, of a, then 0.7, 0.6, 0.4 and 0.2."""
    lesions = [region(image, 0, 0, 10, 10) for image in range(1, 6)]
    data = dataset(6, lesions, patients=("a", "a", "b", "c", "d", "e"))
    scores = {1: 0.9, 3: 0.8, 2: 0.7, 4: 0.6, 5: 0.5}
    detected = [region(image, 0, 0, 10, 10, score=score) for image, score in scores.items()]
    detected += [region(6, 0, 0, 10, 10, score=0.95), region(1, 25, 0, 10, 10, score=0.65)]
    results = evaluate_lesions(data, detected)
    for risk, tau in (("0.9", 0.9), ("0.7", 0.8), ("0.69", 0.7), ("0.4", 0.6), ("0.2", 0.5)):
        rule = f"risk<={risk}"
        assert choose_operating_point(results, rule, "v") == OperatingPoint(tau, rule, "v")
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        point = choose_operating_point(results, "risk<=0.19", "val")
    assert (point.tau, point.rule) == (0.5, "risk<=0.19, not reached")
    assert "0.2 " in caplog.text and "val" in caplog.text and "0.19" in caplog.text
    for image in data["images"]:  # images are the units: a's two lesions are in two of them
        del image["patient_id"]
    assert choose_operating_point(evaluate_lesions(data, detected), "risk<=0.5").tau == 0.7


def patients_of(rng, number, missed):
    """Patients as (unit, score) of their lesions: one to six each, whose scores have a patient's
    part in common; a share ``missed`` has a score of -1, as no detection hits it."""
    lesions = rng.integers(1, 7, number)
    unit = np.repeat(np.arange(number), lesions)
    logit = rng.normal(1, 1.5, number)[unit] + rng.normal(0, 1.5, len(unit))
    score = np.where(rng.random(len(unit)) < missed, -1, 1 / (1 + np.exp(-logit)))
    return unit, score


def results_of(unit, score):
    """What is read of LesionResults: every patient is one image, and detections hit but one."""
    number, is_found = unit.max() + 1, score >= 0
    alarm_score = np.append(score[is_found], 0.5)
    return SimpleNamespace(
        detections=SimpleNamespace(
            score=alarm_score,
            scored=True,
            regions=SimpleNamespace(image=np.append(unit[is_found], 0)),
        ),
        matching=SimpleNamespace(
            hit=np.append(np.ones(is_found.sum(), bool), False),
            evaluated=np.ones(len(alarm_score), bool),
        ),
        ground_truth=SimpleNamespace(lesions=np.bincount(unit, minlength=number)),
        metrics=SimpleNamespace(unit_of_image=np.arange(number), num_units=number),
    )


@pytest.mark.slow
@pytest.mark.parametrize("missed", [0, 0.02])
@pytest.mark.parametrize(("alpha", "number"), [(0.05, 30), (0.05, 150), (0.1, 20), (0.2, 8)])
def test_the_mean_risk_of_new_patients_is_within_the_limit(alpha, number, missed, caplog):
    """Angelopoulos et al. 2022: theorem 1 and, from below, theorem 2. Over 3,000 validation sets of
    the share of lesions missed in new patients. The threshold whose share in the validation set
    itself is within the limit is not: its risk is larger."""
    rng = np.random.default_rng(round(1000 * alpha) + number)
    unit, score = patients_of(rng, 40_000, missed)
    order = np.argsort(-score)
    losses = 1 - np.cumsum(1 / np.bincount(unit)[unit[order]]) / 40_000  # by falling score
    ascending = score[order][::-1]

    def new_risk(tau):
        above = len(ascending) - np.searchsorted(ascending, tau)
        return losses[above - 1] if above else 1.0

    risks, naive = [], []
    for _ in range(3000):
        caplog.clear()
        val_unit, val_score = patients_of(rng, number, missed)
        tau = choose_operating_point(results_of(val_unit, val_score), f"risk<={alpha}").tau
        risks.append(0.0 if caplog.records else new_risk(tau))
        val_order = np.argsort(-val_score)
        loss = 1 - np.cumsum(1 / np.bincount(val_unit)[val_unit[val_order]]) / number
        within = np.flatnonzero(loss <= alpha + 1e-9)
        naive.append(new_risk(max(val_score[val_order[within[0]]], 0)))
    error = 3 * np.std(risks) / np.sqrt(len(risks))
    assert np.mean(risks) <= alpha + error
    if not missed:
        assert np.mean(risks) >= alpha - 2 / (number + 1) - error
        assert np.mean(naive) > alpha + error


def test_operating_points_by_hand(worked, dataset, region, caplog):
    """Of five lesions in four images: F1 at 0.9 is 2/(1+5), at 0.8 2/(2+5), at 0.7 4/(4+5), at 0
    6/(6+5)."""
    results = evaluate_lesions(*worked)
    with caplog.at_level(logging.WARNING):
        assert choose_operating_point(results, "recall>=100", "val").tau == 0
        assert "of val" in caplog.text and "60.0 %" in caplog.text
        caplog.clear()
        for rule in ("f1", "recall>=20", "fp_per_image<=1"):
            choose_operating_point(results, rule)
        assert not caplog.text
    data = dataset(2, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10)])
    places = ((1, 20, 0.9), (1, 0, 0.6), (2, 20, 0.5), (2, 0, 0.4))
    results = evaluate_lesions(data, [region(i, x, 0, 10, 10, score=s) for i, x, s in places])
    with caplog.at_level(logging.WARNING):
        point = choose_operating_point(results, "fp_per_image<=0.4", "val")
    assert (point.tau, point.rule) == (0.9, "fp_per_image<=0.4, not reached")
    assert "val" in caplog.text and "0.5" in caplog.text


def test_thresholds_that_cannot_be_chosen(worked, dataset):
    data, results = worked
    wrong = ("F1", "recall", "recall>=0", "recall>=100.1", "recall>=-5", "recall<=95", "risk<=1")
    for rule in (*wrong, "risk<=0", "risk>=0.05", "fp_per_image<=-1", "fp<=1", "risk<=0.05 ", ""):
        with pytest.raises(ValueError, match=repr(rule)):
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


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0, 0.3, 0.55, 1.1]))
def test_metrics_at_another_threshold(random_case, seed, tau):
    data, detected = random_case(seed, num_images=4)
    for image in data["images"]:
        image["patient_id"] = image["id"] // 2
    at = evaluate_lesions(data, detected, tau=0.7).at(tau if tau <= 1 else math.nan)
    scored = evaluate_lesions(data, detected, tau=tau)
    assert list(at) == ["lesion", "image", "patient"]
    for name, values in at.items():
        expected = getattr(scored, name)
        assert values == pytest.approx({k: expected[k] for k in values}, nan_ok=True)
        assert expected.keys() - values.keys() <= {"auroc"}


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), number=st.integers(0, 7))
def test_parts_of_other_detections(seed, number):
    """Against pixels, one pair after another: a part is not what another part lies in."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((number, 12, 12), bool)
    for mask in masks:
        (top, left), (height, width) = rng.integers(0, 5, 2), rng.integers(0, 9, 2)
        mask[top : top + height, left : left + width] = True
    scores, categories = rng.integers(0, 4, number) / 4, rng.integers(1, 3, number)
    parts = set()
    for i in sorted(range(number), key=lambda i: (-scores[i], i)):
        for j in set(range(number)) - parts - {i}:
            ahead = scores[j] > scores[i] or (scores[j] == scores[i] and j < i)
            inside = (masks[i] & masks[j]).sum()
            if ahead and categories[i] == categories[j] and masks[i].any():
                if inside / masks[i].sum() >= PART_SHARE:
                    parts.add(i)
    is_part = parts_of_others([encode(mask) for mask in masks], scores, categories)
    assert set(np.flatnonzero(is_part)) == parts
