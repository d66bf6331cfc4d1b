"""Metrics of image classification: scikit-learn's on random cases, a case worked out by hand."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats
from sklearn import metrics

from imrcnn_d2.data.catalog import register_classification_dataset
from imrcnn_d2.evaluation import (
    Bootstrap,
    ClassificationEvaluator,
    Temperature,
    evaluate_classification,
)
from imrcnn_d2.evaluation.output import read_metrics, write_results
from imrcnn_d2.evaluation.statistics import clopper_pearson, proportion_interval
from imrcnn_d2.evaluation.subgroups import parse_by, with_groups
from imrcnn_d2.report.tables import groups_table
from imrcnn_d2.utils.files import BadInputError

CLASSES = ("gastric cancer", "ulcer", "gastritis")


def make_truth(labels, classes=CLASSES, cancer=("gastric cancer",), patients=()):
    """COCO image classification: image i + 1 has class labels[i]."""
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(1, len(labels) + 1)]
    for image, patient in zip(images, patients, strict=False):
        image["patient_id"] = patient
    return {
        "images": images,
        "categories": [
            {"id": 10 * k, "name": name, "supercategory": "cancer" if name in cancer else "benign"}
            for k, name in enumerate(classes, 1)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 10 * (label + 1)}
            for i, label in enumerate(labels, 1)
        ],
    }


def make_results(probability):
    return [
        {"image_id": i, "scores": [float(p) for p in row]} for i, row in enumerate(probability, 1)
    ]


def evaluate(labels, probability, *classes, bootstrap=None, **options):
    truth = make_truth(labels, *classes, **options)
    return evaluate_classification(truth, make_results(probability), bootstrap=bootstrap)


def random_case(seed, number, classes, tied=False):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(number) % classes)
    scores = rng.gamma(0.7, size=(number, classes))
    if tied:
        scores = rng.integers(0, 3, (number, classes)) + 0.25
    scores[np.arange(number), labels] += rng.random(number)
    return labels, scores / scores.sum(axis=1, keepdims=True)


def binary(truth, predicted):
    """scikit-learn's metrics of two classes, in percent."""
    return {
        "recall": 100 * metrics.recall_score(truth, predicted),
        "specificity": 100 * metrics.recall_score(~truth, ~predicted),
        "precision": 100 * metrics.precision_score(truth, predicted, zero_division=np.nan),
        "f1": 100 * metrics.f1_score(truth, predicted),
    }


@given(
    st.integers(0, 2**32), st.integers(2, 5), st.integers(5, 60), st.booleans(), st.integers(1, 4)
)
@settings(max_examples=15)
def test_metrics_are_those_of_scikit_learn(seed, classes, number, tied, cancers):
    labels, probability = random_case(seed, max(number, classes), classes, tied)
    names = [f"class {k}" for k in range(classes)]
    cancer = names[: min(cancers, classes - 1)]
    scored = evaluate(labels, probability, names, cancer)
    predicted = probability.argmax(axis=1)
    areas = [100 * metrics.roc_auc_score(labels == k, probability[:, k]) for k in range(classes)]
    expected = {
        "top1": 100 * metrics.accuracy_score(labels, predicted),
        "balanced_accuracy": 100 * metrics.balanced_accuracy_score(labels, predicted),
        "f1": 100 * metrics.f1_score(labels, predicted, average="macro"),
        "auroc": np.mean(areas),
        "cross_entropy": metrics.log_loss(labels, probability, labels=range(classes)),
    }
    for k, name in enumerate(names):
        values = binary(labels == k, predicted == k)
        values |= {"accuracy": values["recall"], "auroc": areas[k]}
        expected |= {f"{metric}_{name}": value for metric, value in values.items()}
    assert scored.recognition == pytest.approx(expected, nan_ok=True)
    confusion = metrics.confusion_matrix(labels, predicted, labels=range(classes))
    assert scored.confusion.rows() == confusion.tolist()

    is_cancer, says = labels < len(cancer), predicted < len(cancer)
    tn, fp, fn, tp = metrics.confusion_matrix(is_cancer, says, labels=[False, True]).ravel()
    table = {"TP": tp, "FP": fp, "FN": fn, "TN": tn, **binary(is_cancer, says)}
    table["accuracy"] = 100 * metrics.accuracy_score(is_cancer, says)
    together = probability[:, : len(cancer)].sum(axis=1)
    table["auroc"] = 100 * metrics.roc_auc_score(is_cancer, together)
    assert scored.cancer == pytest.approx(table, nan_ok=True)
    brier = metrics.brier_score_loss(predicted == labels, probability.max(axis=1), pos_label=True)
    assert scored.calibration["brier"] == pytest.approx(100 * brier)


def test_a_case_worked_out_by_hand():
    probability = [
        [0.7, 0.2, 0.1],  # cancer, predicted as cancer
        [0.2, 0.7, 0.1],  # cancer, predicted as ulcer
        [0.1, 0.8, 0.1],  # ulcer, predicted as ulcer
        [0.5, 0.5, 0.0],  # ulcer, predicted as cancer: of equal ones the first
        [0.1, 0.1, 0.8],  # gastritis, predicted as gastritis
        [0.0, 0.1, 0.9],  # gastritis, predicted as gastritis
    ]
    scored = evaluate([0, 0, 1, 1, 2, 2], probability)
    assert scored.confusion.rows() == [[1, 1, 0], [1, 1, 0], [0, 0, 2]]
    assert scored.recognition["auroc_gastric cancer"] == 100 * (4 + 3) / 8  # 0.5 beats 0.2 once
    # |mean score - share right| of the bins that end at 0.5, 0.7, 0.8 and 0.9; in the second, of
    # which one is right, less what chance adds to a distance of 0.2: its hit rate has sd 0.354.
    chance = stats.foldnorm(0.2 / 0.125**0.5, scale=0.125**0.5).mean() - 0.2
    ece = (1 * 0.5 + 2 * (0.7 - 0.5 - chance) + 2 * (1 - 0.8) + 1 * (1 - 0.9)) / 6
    assert scored.calibration["ece"] == pytest.approx(100 * ece)
    assert scored.right().tolist() == [1, 0, 1, 0, 1, 1] and scored.right(tau_val=True) is None
    row = {"image_id": 4, "label": "ulcer", "predicted": "gastric cancer", "outcome": "wrong"}
    assert {**row, "score": 0.5, "score_gastritis": 0}.items() <= scored.per_image[3].items()


def test_intervals_are_those_of_resampled_data_sets(t_interval):
    labels, probability = random_case(1, 40, 3)
    patients, bootstrap = [f"p{i // 3}" for i in range(40)], Bootstrap(50, seed=3)
    scored = evaluate(labels, probability, patients=patients, bootstrap=bootstrap)
    assert scored.meta["patients"] == 14 and scored.meta["bootstrap"]["unit"] == "patient"
    (weights,) = bootstrap.weights(14)
    samples = []
    for row in weights:
        chosen = np.repeat(np.arange(40), row[np.arange(40) // 3])
        samples.append(evaluate(labels[chosen], probability[chosen]).groups())
    names = (("recognition", "balanced_accuracy"), ("recognition", "auroc_ulcer"))
    for group, name in (*names, ("cancer", "auroc")):
        values = [groups[group][name] for groups in samples]
        expected = t_interval(scored.groups()[group][name], values, 14)
        assert scored.intervals[group][name] == pytest.approx(expected)
    # Above 0 only, so of the logarithm.
    values = [groups["recognition"]["cross_entropy"] for groups in samples]
    error = np.std(values, ddof=1) * 14 / 13 * stats.t(13).ppf(0.975)
    value = scored.recognition["cross_entropy"]
    expected = value * np.exp(np.array([-1, 1]) * error / value)
    assert scored.intervals["recognition"]["cross_entropy"] == pytest.approx(tuple(expected))
    # Shares of images, of which patients have three.
    right = np.bincount(np.arange(40) // 3, scored.right())
    top1 = proportion_interval(right, np.bincount(np.arange(40) // 3))
    assert scored.intervals["recognition"]["top1"] == pytest.approx(tuple(100 * np.array(top1)))
    assert "TP" not in scored.intervals["cancer"]


def test_what_is_always_right_has_the_exact_interval():
    scored = evaluate([0, 1, 2] * 5, np.eye(3)[[0, 1, 2] * 5], bootstrap=Bootstrap(20))
    intervals = scored.intervals["recognition"]
    for name, number in (("top1", 15), ("accuracy_ulcer", 5)):
        exact = [100 * end for end in clopper_pearson(number, number)]
        assert intervals[name] == pytest.approx(exact)
    share = 0.025 ** (1 / 5)
    assert intervals["f1_ulcer"] == pytest.approx((100 * 2 * share / (1 + share), 100))
    assert np.isnan(intervals["auroc_ulcer"]).all()


def test_classes_that_are_no_cancer_or_have_no_images():
    for cancer in ((), CLASSES):
        alike = evaluate([0, 1, 2], 1.009 * np.eye(3), cancer=cancer)  # as of rounded scores
        assert alike.cancer is None and list(alike.groups()) == ["recognition"]
        assert alike.calibration["mean_score"] == 100
    for labels, patients in (([0, 1, 1], ()), ([0, 1, 2], "aab")):
        with pytest.raises(ValueError, match="A and B"):
            alike.check_same_units(evaluate(labels, np.eye(3), patients=patients), ("A", "B"))
    absent = evaluate([0, 0, 1], np.eye(3)).recognition
    assert np.isnan(absent["accuracy_gastritis"])
    assert absent["balanced_accuracy"] == 25  # of the two there are


def test_groups_of_images_are_data_sets_of_their_own(tmp_path):
    labels, probability = random_case(3, 40, 3)
    truth = make_truth(labels, patients=[i // 2 for i in range(40)])
    for image in truth["images"]:
        image["age"] = image["id"]
    bootstrap = Bootstrap(30, 1)
    whole = evaluate_classification(truth, make_results(probability), bootstrap=bootstrap)
    grouped = with_groups(whole, [parse_by("age:15")], bootstrap=bootstrap)
    groups = grouped.by_group["age"].groups
    assert list(groups) == ["<15", ">=15"]
    for group, rows in zip(groups.values(), (range(14), range(14, 40)), strict=True):
        patients = [i // 2 for i in rows]
        alone = evaluate(labels[rows], probability[rows], patients=patients, bootstrap=bootstrap)
        assert group.n == {"images": len(rows), "patients": len(rows) // 2}
        for name, values in alone.groups().items():
            assert group.values[name] == pytest.approx(values, nan_ok=True)
        for name, interval in alone.intervals["recognition"].items():
            expected = pytest.approx(interval, nan_ok=True)
            assert group.intervals["recognition"][name] == expected, name
    write_results(grouped, tmp_path)
    assert "age,image,<15,14,7,recognition,top1," in (tmp_path / "by_group.csv").read_text()
    table = groups_table(grouped, "age")
    assert "| recognition top1" in table and "| cancer recall" in table and "lesions" not in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, r: t["annotations"][0].update(category_id=7), "label 7 of image 1"),
        (lambda t, r: t["annotations"][0].update(image_id=9), "image 9"),
        (lambda t, r: t["annotations"].pop(), "image 3 .3.png"),
        (lambda t, r: t["annotations"][0].update(image_id=2), "several classes to image 2"),
        (lambda t, r: t["images"][0].update(id=2), "id 2"),
        (lambda t, r: t.pop("annotations"), "annotations"),
        (lambda t, r: t.update(categories=t["categories"][:1]), "gastric cancer"),
        (lambda t, r: r.pop(), "1 of the 3 images, such as 3.png"),
        (lambda t, r: r[0].update(image_id=5), "image 5"),
        (lambda t, r: r.append(r[0]), "image 1 twice"),
        (lambda t, r: r[0].update(scores=[0.5, 0.5]), "image 1 2 scores, .* 3 classes"),
        (lambda t, r: r[0].update(scores=[True, 0, 0]), r"image 1 .*\[True, 0, 0\]"),
        (lambda t, r: r[0].update(scores=[1.02, 0, 0]), r"image 1 .*\[1.02, 0.0, 0.0\]"),
        (lambda t, r: r[0].update(scores=[1.5, -0.5, 0]), "image 1 .*-0.5"),
        (lambda t, r: r[0].update(scores=[float("nan")] * 3), "image 1 .*nan"),
    ],
)
def test_bad_input_is_named(change, message, tmp_path):
    truth, results = make_truth([0, 1, 2]), make_results(np.eye(3))
    change(truth, results)
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(truth))
    for gt in (truth, path):
        with pytest.raises(ValueError, match=message):
            evaluate_classification(gt, results)


NAME, LABELS = "evaluator_classification_test", [0, 1, 2, 0, 1, 2, 2, 1]


@pytest.fixture
def gt(tmp_path):
    """A registered data set of eight images."""
    content, path = make_truth(LABELS), tmp_path / "annotations" / "test.json"
    del content["categories"][1]["supercategory"]
    for image in content["images"]:
        image |= {"width": 9, "height": 9}
    for folder in ("annotations", "images"):
        (tmp_path / folder).mkdir()
    path.write_text(json.dumps(content))
    register_classification_dataset(NAME, path, tmp_path / "images")
    yield path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def probability():
    scores = np.random.default_rng(0).random((8, 3)) + 0.4 * np.eye(3)[LABELS]
    return torch.tensor(scores / scores.sum(axis=1, keepdims=True), dtype=torch.float32)


def run(evaluator, probability, images):
    evaluator.reset()
    for i in images:
        evaluator.process([{"image_id": i}], [{"scores": probability[i - 1]}])
    return evaluator.evaluate()


def test_evaluator(gt, probability, tmp_path):
    out, meta = tmp_path / "out", {"checkpoint": "best.pth"}
    evaluator = ClassificationEvaluator(NAME, output_dir=out, bootstrap=Bootstrap(40), meta=meta)
    values = run(evaluator, probability, [3, 1, 2, 8, 7, 6, 5, 4, 4, 3])  # a padded batch
    scored = evaluate_classification(gt, make_results(probability.double()))
    assert values == scored.groups()
    assert all(isinstance(v, float) for group in values.values() for v in group.values())
    written = json.loads((out / "metrics.json").read_text())
    assert len(written["recognition"]["balanced_accuracy_ci"]) == 2
    assert written["confusion_matrix"]["counts"] == scored.confusion.rows()
    assert written["calibration"]["ece"] == scored.calibration["ece"]
    meta |= {"task": "recognition", "dataset": NAME}
    meta |= {"images_of_class": [2, 3, 3], "cancer_classes": ["gastric cancer"]}
    assert meta.items() <= written["meta"].items()
    again = evaluate_classification(written["meta"]["gt"], written["meta"]["dt"])
    assert again.groups() == values
    assert (out / "per_image.csv").read_text().count("\n") == 9


def test_validation_fits_a_temperature_and_the_final_evaluation_applies_it(gt, tmp_path):
    probability = torch.tensor(0.02 + 0.94 * np.eye(3)[[0, 1, 2, 0, 1, 0, 1, 1]])  # two are wrong
    raw = make_results(probability)
    evaluator = ClassificationEvaluator(NAME, output_dir=tmp_path / "val", fits_map=True)
    metrics_of_validation = run(evaluator, probability, range(1, 9))
    fitted = Temperature.fit(probability.numpy(), np.array(LABELS), NAME)
    assert evaluator.score_map == fitted and fitted.temperature > 1.5
    assert metrics_of_validation["score_map"] == {"temperature": fitted.temperature}
    final = ClassificationEvaluator(NAME, output_dir=tmp_path / "test", score_map=fitted)
    values = run(final, probability, range(1, 9))
    assert "score_map" not in values
    plain = evaluate_classification(gt, raw)
    for name in ("val", "test"):
        written = read_metrics(tmp_path / name / "metrics.json")
        assert written["meta"]["score_map"] == vars(fitted)
        assert written["recognition"]["top1"] == plain.recognition["top1"] == 75
        assert written["recognition"]["cross_entropy"] < plain.recognition["cross_entropy"]
        assert written["calibration_raw"] == plain.calibration
        assert written["calibration"]["ece"] < plain.calibration["ece"] - 10
        results = json.loads((tmp_path / name / "recognition_results.json").read_text())
        assert [r["raw_scores"] for r in results] == [r["scores"] for r in raw]
        mapped = [r["scores"] for r in results]
        np.testing.assert_allclose(mapped, fitted(probability.numpy()), rtol=1e-12)
    all_right = torch.tensor(np.eye(3)[LABELS])
    assert "score_map" not in run(evaluator, all_right, range(1, 9))
    assert evaluator.score_map is None
    without = ClassificationEvaluator(NAME, output_dir=tmp_path / "plain")
    run(without, probability, range(1, 9))
    for path in ("recognition_results.json", "metrics.json"):
        text = (tmp_path / "plain" / path).read_text()
        assert "raw_scores" not in text and "calibration_raw" not in text
    again = evaluate_classification(gt, tmp_path / "test" / "recognition_results.json")
    part = again.part(np.arange(7), bootstrap=Bootstrap(40))
    assert part.calibration_raw == evaluate(LABELS[:7], probability[:7].numpy()).calibration
    low, high = part.intervals["calibration_raw"]["brier"]
    assert low <= part.calibration_raw["brier"] <= high
    results[1].pop("raw_scores")
    with pytest.raises(ValueError, match="image 2 the raw_scores None"):
        evaluate_classification(gt, results)


def test_processes_share_the_images(gt, probability, monkeypatch):
    alone = run(ClassificationEvaluator(NAME), probability, range(1, 9))
    parts = []
    for images in (range(1, 6), range(5, 9)):
        evaluator = ClassificationEvaluator(NAME)
        monkeypatch.setattr(comm, "gather", lambda part, dst: parts.append(part) or [[]])
        monkeypatch.setattr(comm, "is_main_process", lambda: False)
        assert run(evaluator, probability, images) == {}
    monkeypatch.setattr(comm, "gather", lambda part, dst: parts)
    monkeypatch.setattr(comm, "is_main_process", lambda: True)
    assert run(evaluator, probability, []) == alone


def test_evaluator_of_other_classes_or_images(gt, probability):
    with pytest.raises(ValueError, match=r"MODEL\.CLASSIFIER\.NUM_CLASSES"):
        run(ClassificationEvaluator(NAME), probability[:, :2], range(1, 9))
    with pytest.raises(ValueError, match="1 of the 8 images"):
        run(ClassificationEvaluator(NAME), probability, range(1, 8))
    DatasetCatalog.register("no_file", lambda: [])
    try:
        with pytest.raises(ValueError, match="register_classification_dataset"):
            ClassificationEvaluator("no_file")
    finally:
        DatasetCatalog.remove("no_file")


def overconfident(number, seed=0, factor=2.5):
    """(N,) labels sampled from the softmax of random logits, and (N, K) probabilities of logits
    that are ``factor`` times as large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=(number, 3))
    true = special.softmax(logits, axis=1)
    labels = (true.cumsum(axis=1) < rng.random((number, 1))).sum(axis=1)
    return labels, special.softmax(factor * logits, axis=1)


@pytest.mark.parametrize("factor", [0.5, 1, 2.5])
def test_a_temperature_is_that_of_the_least_cross_entropy(factor):
    """Against a search over its logarithm of scikit-learn's log_loss."""
    labels, probability = overconfident(2000, factor=factor)

    def loss(log_temperature):
        powers = probability ** np.exp(-log_temperature)
        return metrics.log_loss(labels, powers / powers.sum(axis=1, keepdims=True))

    expected = np.exp(optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)
    fitted = Temperature.fit(probability, labels, "val")
    assert fitted.temperature == pytest.approx(expected, rel=1e-3) == pytest.approx(factor, rel=0.1)
    assert fitted.dataset == "val"


def test_a_temperature_calibrates_the_other_half_and_changes_no_prediction():
    labels, probability = overconfident(4000)
    fitted = Temperature.fit(probability[:2000], labels[:2000])
    mapped = fitted(probability[2000:])
    before = evaluate(labels[2000:], probability[2000:])
    after = evaluate(labels[2000:], mapped)
    assert before.calibration["ece"] > 12 and after.calibration["ece"] < 3
    assert after.recognition["cross_entropy"] < before.recognition["cross_entropy"] - 0.1
    for name in ("top1", "balanced_accuracy", "f1"):
        assert after.recognition[name] == before.recognition[name]
    np.testing.assert_array_equal(mapped.argsort(axis=1), probability[2000:].argsort(axis=1))
    np.testing.assert_allclose(mapped.sum(axis=1), 1)
    sure = np.array([1, 0, 0], np.float32)  # a softmax that has underflowed
    assert np.isfinite(fitted(sure)).all() and fitted(sure).argmax() == 0


def test_where_no_temperature_can_be_fitted(caplog):
    probability = np.full((5, 2), [0.6, 0.4])
    assert Temperature.fit(probability, np.zeros(5, int)) is None
    assert Temperature.fit(np.empty((0, 2)), np.empty(0, int)) is None
    always_wrong = Temperature.fit(probability, np.ones(5, int))
    assert "no likelier" in caplog.text and always_wrong.temperature == pytest.approx(100)


@pytest.mark.parametrize(
    "value",
    [
        *({"temperature": t, "dataset": None} for t in (0, -1, np.nan, np.inf, "1", None, 10**400)),
        *({"temperature": 1.0}, {"temperature": 1.0, "dataset": 3}, [1.0], {"slope": 1.0}),
    ],
)
def test_what_is_no_temperature_is_refused(value, tmp_path):
    with pytest.raises(BadInputError, match="a.pth.*score_map.*temperature"):
        Temperature.of_file(value, tmp_path / "a.pth")
