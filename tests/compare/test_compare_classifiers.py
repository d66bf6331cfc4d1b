"""Classifiers side by side: grouped, tested, tabled, with what was published."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from recognition_runs import CLASSES, draw_classes, prepare_classes, write_classifier

from imrcnn_d2.evaluation.classification import evaluate_classification
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.report.comparison import compare, gather, write_comparison
from imrcnn_d2.report.comparison.tables import class_table
from imrcnn_d2.report.names import published_accuracy
from imrcnn_d2.report.runs import load_run

BACKBONES = {"vgg19": 0.5, "resnet50.a1_in1k": 1.0, "inception_v3": 0.8}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A prepared data set and three classifiers, one of them trained with two seeds."""
    root = tmp_path_factory.mktemp("recognition_study")
    draw_classes(root / "raw", (20, 24, 28), size=24)
    out = prepare_classes(root / "raw", root / "gastric_recognition", ratio=(1, 1, 2)).out
    gt = out / "annotations" / "test.json"
    for number, (backbone, skill) in enumerate(BACKBONES.items()):
        how = dict(skill=skill, seed=number, backbone=backbone)
        write_classifier(root / "runs" / backbone, gt, **how)
    write_classifier(root / "runs" / "again", gt, skill=0.5, seed=9, backbone="vgg19")
    return root


@pytest.fixture(scope="module")
def comparison(study):
    names = [*BACKBONES, "again"]
    runs = [load_run(study / "runs" / name) for name in names]
    return compare(gather(runs), Bootstrap(60))


def test_runs_are_named_by_their_backbones_and_seeds_are_grouped(comparison):
    assert list(comparison.models) == ["VGG19", "ResNet50", "Inception-V3"]
    assert comparison.task == "recognition"
    assert comparison.primary == "recognition/balanced_accuracy"
    assert len(comparison.models["VGG19"].runs) == 2


def test_figures_of_seeds_are_those_of_averaged_confusions(comparison, study):
    model = comparison.models["VGG19"]
    results = [run.results for run in comparison.gathered.split["VGG19"]]
    counts = np.mean([own.confusion.counts for own in results], axis=0)
    recall = np.diag(counts) / counts.sum(axis=1)
    assert model.values["recognition"]["balanced_accuracy"] == pytest.approx(100 * recall.mean())
    precision = 100 * np.diag(counts) / counts.sum(axis=0)
    for k, name in enumerate(sorted(CLASSES)):
        assert model.values["recognition"][f"precision_{name}"] == pytest.approx(precision[k])
    areas = [own.recognition["auroc"] for own in results]
    assert model.values["recognition"]["auroc"] == pytest.approx(np.mean(areas))


def test_what_is_tested(comparison):
    tests = [t for t in comparison.tests if (t.first, t.second) == ("Inception-V3", "ResNet50")]
    assert [t.endpoint for t in tests if t.primary] == ["recognition/balanced_accuracy"]
    # Of one cancer class the sensitivity is its accuracy, tested already.
    assert "cancer/recall" not in {t.endpoint for t in tests}
    assert {"cancer/specificity", "recognition/accuracy_gastric ulcer"} <= {
        t.endpoint for t in tests
    }
    runs = [comparison.gathered.split[label][0].results for label in ("Inception-V3", "ResNet50")]
    right = [own.probability.argmax(axis=1) == own.ground_truth.label for own in runs]
    (mcnemar,) = (t for t in tests if t.test.startswith("McNemar"))
    assert mcnemar.endpoint == "recognition/top1"
    assert mcnemar.test.endswith(f"{(right[0] & ~right[1]).sum()} : {(right[1] & ~right[0]).sum()}")
    assert mcnemar.estimate == pytest.approx(100 * (right[0].mean() - right[1].mean()))


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
    model = comparison.models["ResNet50"]
    of_cancer = model.values["recognition"]["accuracy_gastric cancer"]
    assert content["models"]["ResNet50"]["figures"]["recognition"]["accuracy_gastric cancer"] == (
        of_cancer
    )
    assert content["published"] == {
        "gastric cancer": 93,
        "gastric ulcer": 92,
        "chronic gastritis": 88,
    }
    rows = pd.read_csv(tmp_path / "classes.csv")
    own = rows[(rows.model == "ResNet50") & (rows.source == "this comparison")]
    value = own[own.figure == "recognition/accuracy_gastric cancer"].value
    assert value.item() == pytest.approx(of_cancer)
    shown = class_table(comparison).cells
    assert shown.loc[1, "gastric cancer"].startswith(f"{of_cancer:.1f}")
    assert shown.iloc[-1]["gastric ulcer"] == "92.0"


def test_published_values_stand_beside_that_data_only():
    classes = ["gastric cancer", "gastric ulcer", "chronic gastritis"]
    assert published_accuracy("gastric_recognition_test", classes)["gastric ulcer"] == 92
    assert published_accuracy("own_test", classes) == {}
    assert published_accuracy(None, classes) == {}
    assert published_accuracy("gastric_recognition_test", ["polyp", "ulcer", "gastritis"]) == {}
    assert published_accuracy("gastric_recognition_test", [*classes, "normal"]) == {}


def test_folds(tmp_path):
    draw_classes(tmp_path / "raw", (9, 9, 9), size=16)
    runs = []
    for fold in range(3):
        out = prepare_classes(tmp_path / "raw", tmp_path / f"fold{fold}" / "set", seed=fold).out
        gt = out / "annotations" / "test.json"
        if fold:  # folds test other images each
            content = json.loads(gt.read_text())
            for image in content["images"]:
                image["file_name"] = f"{fold}/{image['file_name']}"
            gt.write_text(json.dumps(content))
        for backbone in ("vgg19", "resnet50"):
            output = tmp_path / "runs" / f"{backbone}{fold}"
            where = {"index": fold, "of": 3}
            write_classifier(output, gt, seed=fold + len(backbone), backbone=backbone, fold=where)
            record = json.loads((output / "run.json").read_text())
            (output / "run.json").write_text(json.dumps({**record, "seed": 0}))
            runs.append(load_run(output))
    comparison = compare(gather(runs), Bootstrap(20))
    files = {path.name for path in write_comparison(comparison, tmp_path / "out")}
    assert {"folds.csv", "fold_tests.csv", "confusion.png"} <= files
    rows = pd.read_csv(tmp_path / "out" / "folds.csv")
    row = rows[(rows.model == "VGG19") & (rows.figure == "recognition/balanced_accuracy")].iloc[0]
    values = [run.results.recognition["balanced_accuracy"] for run in runs[::2]]
    assert row["mean"] == pytest.approx(np.mean(values))
    assert row["sd_population"] == pytest.approx(np.std(values))
    test = comparison.fold_tests[0]
    assert test.test == "corrected resampled t-test" and test.primary


def test_what_cannot_be_compared(study, write_run, write_gt, tmp_path):
    run = load_run(study / "runs" / "inception_v3")
    lesions = load_run(write_run("detector", write_gt(tmp_path / "gt.json")))
    with pytest.raises(ValueError, match="of recognition.*of lesions"):
        gather([run, lesions])
    gt = run.gt_path
    content = json.loads(gt.read_text())
    content["categories"][0]["name"] = "something else"
    (tmp_path / "set").mkdir()
    other = tmp_path / "set" / "other.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="different test sets"):
        gather([run, load_run(write_classifier(tmp_path / "other", other, backbone="vgg19"))])
    with pytest.raises(ValueError, match="'lesion/iou' is not among"):
        compare(gather([run]), Bootstrap(5), primary="lesion/iou")
    assert evaluate_classification(gt, run.folder / "recognition_results.json")
