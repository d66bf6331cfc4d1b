"""Figures of image classification: scikit-learn's on random cases, a case worked out by hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from imrcnn_d2.evaluation import Bootstrap, evaluate_classification
from imrcnn_d2.evaluation.output import write_results
from imrcnn_d2.evaluation.statistics import clopper_pearson
from imrcnn_d2.evaluation.subgroups import parse_by, with_groups
from imrcnn_d2.report.plots import draw_all
from imrcnn_d2.report.tables import groups_table

CLASSES = ("gastric cancer", "ulcer", "gastritis")


def make_truth(labels, classes=CLASSES, cancer=("gastric cancer",), patients=None):
    """COCO image classification: image i + 1 has class labels[i]."""
    categories = [{"id": 10 * k, "name": name} for k, name in enumerate(classes, 1)]
    for category in categories:
        category["supercategory"] = "cancer" if category["name"] in cancer else "benign"
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(1, len(labels) + 1)]
    for image, patient in zip(images, patients or (), strict=False):
        image["patient_id"] = patient
    annotations = [
        {"id": i, "image_id": i, "category_id": 10 * (label + 1)}
        for i, label in enumerate(labels, 1)
    ]
    return {"images": images, "categories": categories, "annotations": annotations}


def make_results(probability):
    return [
        {"image_id": i, "scores": [float(p) for p in row]} for i, row in enumerate(probability, 1)
    ]


def random_case(seed, number, classes, tied=False):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(number) % classes)
    scores = rng.gamma(0.7, size=(number, classes))
    if tied:
        scores = rng.integers(0, 3, (number, classes)) + 0.25
    scores[np.arange(number), labels] += rng.random(number)
    return labels, scores / scores.sum(axis=1, keepdims=True)


@given(
    st.integers(0, 2**32), st.integers(2, 5), st.integers(5, 60), st.booleans(), st.integers(1, 4)
)
@settings(max_examples=30)
def test_figures_are_those_of_scikit_learn(seed, classes, number, tied, cancers):
    labels, probability = random_case(seed, max(number, classes), classes, tied)
    names = [f"class {k}" for k in range(classes)]
    cancer = names[: min(cancers, classes - 1)]
    scored = evaluate_classification(make_truth(labels, names, cancer), make_results(probability))
    called = probability.argmax(axis=1)
    ours = scored.recognition
    areas = [metrics.roc_auc_score(labels == k, probability[:, k]) for k in range(classes)]
    expected = {
        "top1": metrics.accuracy_score(labels, called),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, called),
        "f1": metrics.f1_score(labels, called, average="macro"),
        "auroc": np.mean(
            [metrics.roc_auc_score(labels == k, probability[:, k]) for k in range(classes)]
        ),
    }
    nan = np.nan
    for k, name in enumerate(names):
        mine, theirs = labels == k, called == k
        expected[f"accuracy_{name}"] = metrics.recall_score(mine, theirs)
        expected[f"recall_{name}"] = metrics.recall_score(mine, theirs)
        expected[f"precision_{name}"] = metrics.precision_score(mine, theirs, zero_division=nan)
        expected[f"specificity_{name}"] = metrics.recall_score(~mine, ~theirs)
        expected[f"f1_{name}"] = metrics.f1_score(mine, theirs)
        expected[f"auroc_{name}"] = areas[k]
    expected = {name: 100 * value for name, value in expected.items()}
    expected["cross_entropy"] = metrics.log_loss(labels, probability, labels=range(classes))
    assert ours == pytest.approx(expected, nan_ok=True)
    assert (
        scored.confusion.rows()
        == metrics.confusion_matrix(labels, called, labels=range(classes)).tolist()
    )

    is_cancer, says = labels < len(cancer), called < len(cancer)
    tn, fp, fn, tp = metrics.confusion_matrix(is_cancer, says, labels=[False, True]).ravel()
    table = {"TP": tp, "FP": fp, "FN": fn, "TN": tn}
    table["recall"] = 100 * metrics.recall_score(is_cancer, says)
    table["specificity"] = 100 * metrics.recall_score(~is_cancer, ~says)
    table["precision"] = 100 * metrics.precision_score(is_cancer, says, zero_division=nan)
    table["accuracy"] = 100 * metrics.accuracy_score(is_cancer, says)
    table["f1"] = 100 * metrics.f1_score(is_cancer, says)
    together = probability[:, : len(cancer)].sum(axis=1)
    table["auroc"] = 100 * metrics.roc_auc_score(is_cancer, together)
    assert scored.cancer == pytest.approx(table, nan_ok=True)

    assert scored.calibration["brier"] == pytest.approx(
        100 * metrics.brier_score_loss(called == labels, probability.max(axis=1), pos_label=True)
    )


def test_a_case_worked_out_by_hand():
    probability = [
        [0.7, 0.2, 0.1],  # cancer, called cancer
        [0.2, 0.7, 0.1],  # cancer, called ulcer
        [0.1, 0.8, 0.1],  # ulcer, called ulcer
        [0.5, 0.5, 0.0],  # ulcer, called cancer: of equal ones the first
        [0.1, 0.1, 0.8],  # gastritis, called gastritis
        [0.0, 0.1, 0.9],  # gastritis, called gastritis
    ]
    scored = evaluate_classification(make_truth([0, 0, 1, 1, 2, 2]), make_results(probability))
    assert scored.confusion.rows() == [[1, 1, 0], [1, 1, 0], [0, 0, 2]]
    figures = scored.recognition
    assert figures["top1"] == pytest.approx(100 * 4 / 6)
    assert figures["balanced_accuracy"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 1) / 3)
    assert figures["accuracy_gastric cancer"] == 50
    assert figures["specificity_gastric cancer"] == 75
    assert figures["auroc_gastric cancer"] == 100 * (4 + 3) / 8  # 0.5 beats 0.2 once
    assert {key: scored.cancer[key] for key in ("TP", "FP", "FN", "TN")} == {
        "TP": 1,
        "FP": 1,
        "FN": 1,
        "TN": 3,
    }
    # |mean score - share right| of the bins that end at 0.5, 0.7, 0.8 and 0.9
    ece = (1 * 0.5 + 2 * (0.7 - 0.5) + 2 * (1 - 0.8) + 1 * (1 - 0.9)) / 6
    assert scored.calibration["ece"] == pytest.approx(100 * ece)
    row = scored.per_image[3]
    assert (row["image_id"], row["label"], row["predicted"]) == (4, "ulcer", "gastric cancer")
    assert (row["outcome"], row["score"], row["score_gastritis"]) == ("wrong", 0.5, 0)


def test_intervals_are_those_of_resampled_data_sets():
    labels, probability = random_case(1, 40, 3)
    patients = [f"p{i // 3}" for i in range(40)]
    truth, bootstrap = make_truth(labels, patients=patients), Bootstrap(50, seed=3)
    scored = evaluate_classification(truth, make_results(probability), bootstrap=bootstrap)
    assert scored.meta["patients"] == 14 and scored.meta["bootstrap"]["unit"] == "patient"
    (weights,) = bootstrap.weights(14)
    figures = []
    for row in weights:
        chosen = np.repeat(np.arange(40), row[np.arange(40) // 3])
        again = evaluate_classification(
            make_truth(labels[chosen]), make_results(probability[chosen])
        )
        figures.append({**again.recognition, **{f"cancer {k}": v for k, v in again.cancer.items()}})
    for name in (
        "top1",
        "balanced_accuracy",
        "auroc_ulcer",
        "cross_entropy",
        "precision_gastritis",
    ):
        low, high = np.percentile([one[name] for one in figures], (2.5, 97.5))
        assert scored.intervals["recognition"][name] == pytest.approx((low, high))
    low, high = np.percentile([one["cancer auroc"] for one in figures], (2.5, 97.5))
    assert scored.intervals["cancer"]["auroc"] == pytest.approx((low, high))
    assert "TP" not in scored.intervals["cancer"]


def test_what_is_always_right_has_the_exact_interval():
    probability = np.eye(3)[[0, 1, 2] * 5]
    scored = evaluate_classification(
        make_truth([0, 1, 2] * 5), make_results(probability), bootstrap=Bootstrap(20)
    )
    of = scored.intervals["recognition"]
    assert of["top1"] == pytest.approx([100 * end for end in clopper_pearson(15, 15)])
    assert of["accuracy_ulcer"] == pytest.approx([100 * end for end in clopper_pearson(5, 5)])
    assert of["f1_ulcer"][0] < 100 and np.isnan(of["auroc_ulcer"]).all()


def test_without_a_cancer_class_there_is_no_table_of_cancer():
    scored = evaluate_classification(make_truth([0, 1, 2], cancer=()), make_results(np.eye(3)))
    assert scored.cancer is None
    assert list(scored.groups()) == ["recognition"]


def test_a_class_without_images_is_undefined():
    scored = evaluate_classification(make_truth([0, 0, 1]), make_results(np.eye(3)))
    assert np.isnan(scored.recognition["accuracy_gastritis"])
    assert scored.recognition["balanced_accuracy"] == 25  # of the two there are


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
        part = make_truth(labels[rows], patients=[i // 2 for i in rows])
        alone = evaluate_classification(part, make_results(probability[rows]), bootstrap=bootstrap)
        assert group.n == {"images": len(rows), "patients": len(rows) // 2}
        for name, figures in alone.groups().items():
            assert group.values[name] == pytest.approx(figures, nan_ok=True)
        for name, interval in alone.intervals["recognition"].items():
            own = group.intervals["recognition"][name]
            assert own == pytest.approx(interval, nan_ok=True), name
    write_results(grouped, tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())["by_group"]["age"]["groups"]
    assert figures["<15"]["recognition"]["top1"] == groups["<15"].values["recognition"]["top1"]
    assert "age,image,<15,14,7,recognition,top1," in (tmp_path / "by_group.csv").read_text()
    draw_all(grouped, tmp_path)
    assert (tmp_path / "by_age.png").stat().st_size
    table = groups_table(grouped, "age")
    assert "| recognition top1" in table and "| cancer recall" in table and "lesions" not in table


def broken(change):
    truth, results = make_truth([0, 1, 2]), make_results(np.eye(3))
    change(truth, results)
    return truth, results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, r: t["annotations"][0].update(category_id=7), "unknown label 7 of image 1"),
        (lambda t, r: t["annotations"][0].update(image_id=9), "class to image 9"),
        (lambda t, r: t["annotations"].pop(), "no class to image 3 .3.png"),
        (lambda t, r: t["annotations"][0].update(image_id=2), "several classes to image 2"),
        (lambda t, r: t["images"][0].update(id=2), "two images with id 2"),
        (lambda t, r: t.pop("annotations"), "no list of annotations"),
        (lambda t, r: t.update(categories=t["categories"][:1]), "one class, gastric cancer"),
        (lambda t, r: r.pop(), "lack 1 of the 3 images, such as 3.png"),
        (lambda t, r: r[0].update(image_id=5), "image 5, which the ground truth lacks"),
        (lambda t, r: r.append(r[0]), "image 1 twice"),
        (lambda t, r: r[0].update(scores=[0.5, 0.5]), "2 scores, but there are 3 classes"),
        (lambda t, r: r[0].update(scores=[2, 1, 0]), "no probabilities"),
        (lambda t, r: r[0].update(scores=[float("nan")] * 3), "no probabilities"),
    ],
)
def test_bad_input_is_named(change, message, tmp_path):
    truth, results = broken(change)
    with pytest.raises(ValueError, match=message):
        evaluate_classification(truth, results)
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=message):
        evaluate_classification(path, results)
