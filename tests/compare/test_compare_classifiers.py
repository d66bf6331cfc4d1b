"""Classifiers in comparison: grouped, tested, tabled, next to what was published."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from recognition_runs import CLASSES, draw_classes, prepare_classes, write_classifier

from imrcnn_d2.evaluation import Bootstrap
from imrcnn_d2.report import load_run
from imrcnn_d2.report.comparison import compare, gather, write_comparison
from imrcnn_d2.report.comparison.tables import class_table

BACKBONES = {"vgg19": 0.5, "resnet50.a1_in1k": 1.0, "inception_v3": 0.8}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A prepared data set and three classifiers, one of them trained with two seeds."""
    root = tmp_path_factory.mktemp("classifiers")
    draw_classes(root / "raw", (20, 24, 28), size=24)
    out = prepare_classes(root / "raw", root / "gastric_recognition", ratio=(1, 1, 2)).out
    gt = out / "annotations" / "test.json"
    for number, (backbone, skill) in enumerate(BACKBONES.items()):
        options = dict(skill=skill, seed=number, backbone=backbone)
        write_classifier(root / "runs" / backbone, gt, **options)
    write_classifier(root / "runs" / "again", gt, skill=0.5, seed=9, backbone="vgg19")
    return root


@pytest.fixture(scope="module")
def comparison(study):
    runs = [load_run(study / "runs" / name) for name in (*BACKBONES, "again")]
    return compare(gather(runs), Bootstrap(60))


def test_seeds_are_grouped_and_their_confusions_averaged(comparison):
    assert list(comparison.models) == ["VGG19", "ResNet50", "Inception-V3"]
    assert comparison.task.name == "recognition"
    assert comparison.primary == "recognition/balanced_accuracy"
    values = comparison.models["VGG19"].values["recognition"]
    results = [run.results for run in comparison.gathered.split["VGG19"]]
    assert len(results) == 2
    counts = np.mean([run.confusion.counts for run in results], axis=0)
    recall = np.diag(counts) / counts.sum(axis=1)
    assert values["balanced_accuracy"] == pytest.approx(100 * recall.mean())
    precision = 100 * np.diag(counts) / counts.sum(axis=0)
    for k, name in enumerate(sorted(CLASSES)):
        assert values[f"precision_{name}"] == pytest.approx(precision[k])
    areas = [run.recognition["auroc"] for run in results]
    assert values["auroc"] == pytest.approx(np.mean(areas))


def test_what_is_tested(comparison):
    tests = [t for t in comparison.tests if (t.first, t.second) == ("Inception-V3", "ResNet50")]
    endpoints = {t.endpoint for t in tests}
    assert [t.endpoint for t in tests if t.primary] == ["recognition/balanced_accuracy"]
    # Of one cancer class the sensitivity is its accuracy, tested already.
    assert "cancer/recall" not in endpoints
    assert {"cancer/specificity", "recognition/accuracy_gastric ulcer"} <= endpoints
    runs = [comparison.gathered.split[label][0].results for label in ("Inception-V3", "ResNet50")]
    first, second = (r.probability.argmax(axis=1) == r.ground_truth.label for r in runs)
    (mcnemar,) = (t for t in tests if t.test.startswith("McNemar"))
    assert mcnemar.endpoint == "recognition/top1"
    assert mcnemar.test.endswith(f"{(first & ~second).sum()} : {(second & ~first).sum()}")
    assert mcnemar.estimate == pytest.approx(100 * (first.mean() - second.mean()))


def test_the_files(comparison, tmp_path):
    page, document, *files = write_comparison(comparison, tmp_path)
    text = page.read_text()
    assert "ResNet50, published" in text and "the best of its three models" in text
    for path in files:
        if path.suffix == ".png":
            assert f"]({path.name})" in text
            assert np.asarray(Image.open(path).convert("L")).std() > 5
    names = {path.name for path in files}
    assert {"confusion.svg", "roc.svg", "calibration.svg", "classes.tex"} <= names
    content = json.loads(document.read_text())
    key = "accuracy_gastric cancer"
    value = comparison.models["ResNet50"].values["recognition"][key]
    assert content["models"]["ResNet50"]["figures"]["recognition"][key] == value
    published = {"gastric cancer": 93, "gastric ulcer": 92, "chronic gastritis": 88}
    assert content["published"] == published
    rows = pd.read_csv(tmp_path / "classes.csv").set_index(["model", "source", "figure"])
    row = rows.loc["ResNet50", "this comparison", f"recognition/{key}"]
    assert row["value"] == pytest.approx(value)
    shown = class_table(comparison).cells
    assert shown.loc[1, "gastric cancer"].startswith(f"{value:.1f}")
    assert shown.iloc[-1]["gastric ulcer"] == "92.0"


def test_folds(tmp_path):
    draw_classes(tmp_path / "raw", (9, 9, 9), size=16)
    runs = []
    for fold in range(3):
        out = prepare_classes(tmp_path / "raw", tmp_path / f"fold{fold}" / "set", seed=fold).out
        gt = out / "annotations" / "test.json"
        content = json.loads(gt.read_text())
        for image in content["images"]:  # folds test other images each
            image["file_name"] = f"{fold}/{image['file_name']}"
        gt.write_text(json.dumps(content))
        for backbone in ("vgg19", "resnet50"):
            options = dict(backbone=backbone, fold={"index": fold, "of": 3})
            output = tmp_path / "runs" / f"{backbone}{fold}"
            runs.append(
                load_run(write_classifier(output, gt, seed=fold + len(backbone), **options))
            )
            runs[-1].record["seed"] = 0
    comparison = compare(gather(runs), Bootstrap(20))
    files = {path.name for path in write_comparison(comparison, tmp_path / "out")}
    assert {"folds.csv", "fold_tests.csv", "confusion.png"} <= files
    rows = pd.read_csv(tmp_path / "out" / "folds.csv").set_index(["model", "figure"])
    row = rows.loc["VGG19", "recognition/balanced_accuracy"]
    values = [run.results.recognition["balanced_accuracy"] for run in runs[::2]]
    assert row["mean"] == pytest.approx(np.mean(values))
    assert row["sd_population"] == pytest.approx(np.std(values))
    test = comparison.fold_tests[0]
    assert test.test == "corrected resampled t-test" and test.primary


def test_what_cannot_be_compared(study, write_run, write_gt, tmp_path):
    run = load_run(study / "runs" / "inception_v3")
    lesions = load_run(write_run("detector", write_gt(tmp_path / "gt.json")))
    content = json.loads(run.gt_path.read_text())
    content["categories"][0]["name"] = "something else"
    renamed = tmp_path / "set" / "other.json"
    renamed.parent.mkdir()
    renamed.write_text(json.dumps(content))
    other = load_run(write_classifier(tmp_path / "other", renamed, backbone="vgg19"))
    for second, fault in ((lesions, "recognition.*lesions"), (other, "different test sets")):
        with pytest.raises(ValueError, match=fault):
            gather([run, second])
    with pytest.raises(ValueError, match="'lesion/iou'"):
        compare(gather([run]), Bootstrap(5), primary="lesion/iou")
