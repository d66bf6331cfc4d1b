"""Runs of detectors and of classifiers are gathered, compared and tested."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from recognition_runs import CLASSES, draw_classes, prepare_classes, write_classifier

from imrcnn_d2.cli import compare as command
from imrcnn_d2.evaluation import Bootstrap, ScoreMap, paired_difference
from imrcnn_d2.evaluation.comparison import corrected_resampled_t_test, holm, image_level_test
from imrcnn_d2.report import load_run
from imrcnn_d2.report.comparison import compare, gather, models, pages, write_comparison
from imrcnn_d2.report.comparison.models import training_images
from imrcnn_d2.report.comparison.pages import class_table

BOOTSTRAP = Bootstrap(60)


@pytest.fixture
def gt(tmp_path, write_gt):
    return write_gt(tmp_path / "data" / "annotations" / "test.json", images=6)


@pytest.fixture
def make(write_run):
    """A function that writes a run and loads it, under a label if one is given."""

    def do(name, gt, label="", **options):
        output = write_run(name, gt, **options)
        return load_run(f"{label}={output}" if label else output)

    return do


@pytest.fixture
def fold_gts(tmp_path, write_gt):
    """Ground truths of three folds, other images in each."""
    return [
        write_gt(tmp_path / f"fold{i}" / "test.json", images=12 + i, first=1 + 20 * i)
        for i in range(3)
    ]


def names(groups):
    return {label: [run.run_folder.name for run in runs] for label, runs in groups.items()}


def test_runs_are_grouped_by_model_backbone_and_label(gt, make):
    runs = [make("a", gt, seed=2), make("b", gt, model="MR-CNN"), make("c", gt, seed=1)]
    gathered = gather(runs)
    assert names(gathered.split) == {"IMR-CNN": ["c", "a"], "MR-CNN": ["b"]}
    assert not gathered.folds and not gathered.remarks
    deeper = make("d", gt, backbone="R-101")
    assert list(gather([*runs, deeper]).split) == ["IMR-CNN R-50", "MR-CNN", "IMR-CNN R-101"]
    x, y, z = (load_run(f"{k}={run.run_folder}") for k, run in zip("xyx", runs, strict=True))
    assert names(gather([x, y, z]).split) == {"x": ["c", "a"], "y": ["b"]}
    old = make("old", gt, run_json=False)
    assert names(gather([old]).split) == {"old": ["old"]}
    with pytest.raises(ValueError, match="'IMR-CNN'"):
        gather([load_run(f"IMR-CNN={runs[0].run_folder}"), runs[2]])


def test_what_does_not_belong_together_is_refused_by_name(gt, make, write_gt, tmp_path):
    other = write_gt(tmp_path / "other.json", images=9)
    first, old = make("a", gt, seed=7), make("c", gt, "x", run_json=False)
    for run, second, fault in (
        (first, make("b", gt, seed=7), "runs/a and .*runs/b .*IMR-CNN .*seed 7"),
        (old, make("d", gt, "x", run_json=False), "runs/c and .*runs/d .* x .*no known seed"),
        (first, make("e", other, model="MR-CNN"), "runs/a .*test.json.*runs/e .*other.json"),
        (first, make("f", gt, model="MR-CNN", tau=0.5), "runs/a .*tau 0.7, .*runs/f with 0.5"),
    ):
        with pytest.raises(ValueError, match=fault):
            gather([run, second])


def test_mapped_and_raw_scores_are_not_compared_silently(gt, make):
    """0.5 of a probability and 0.6 of a raw score are two thresholds; so are 0.5 and 0.5."""
    score_map = ScoreMap(2.0, -1.0, "kvasir_seg_val")
    mapped = make("a", gt, tau=0.5, score_map=score_map, model="MR-CNN")
    with pytest.raises(ValueError, match="runs/a .*0.5 of mapped.*runs/b .*0.6 of raw.*--tau"):
        gather([mapped, make("b", gt, tau=0.6)])
    compared = compare(gather([mapped, make("c", gt, tau=0.5)]), Bootstrap(5))
    assert any("in MR-CNN (threshold 0.5)" in remark for remark in compared.remarks)
    alike = make("d", gt, tau=0.5, score_map=score_map)
    compared = compare(gather([mapped, alike]), Bootstrap(5))
    assert not any("mapped" in remark for remark in compared.remarks)


def test_a_fold_whose_validation_fitted_no_map(fold_gts, make, tmp_path):
    """Each fold is at the default threshold of its scores, 0.5 mapped or 0.7 raw: they are compared
    as they are, and every threshold is named."""
    score_map = ScoreMap(2.0, -1.0, "kvasir_seg_val")
    at = [{"tau": 0.7}, *2 * [{"tau": 0.5, "score_map": score_map}]]
    runs = [
        make(f"{model}{i}", path, model=model, fold=(i, 3), **(at[i] if model == "MR" else at[1]))
        for model in ("MR", "IMR")
        for i, path in enumerate(fold_gts)
    ]
    compared = compare(gather(runs), Bootstrap(5))
    (remark,) = (remark for remark in compared.remarks if "mapped" in remark)
    assert "in IMR and 2 of 3 runs of MR (threshold 0.5)" in remark
    assert "1 of 3 runs of MR (threshold 0.7" in remark
    write_comparison(compared, tmp_path / "out")
    raw = [load_run(make(f"raw{i}", path, fold=(i, 3)).path) for i, path in enumerate(fold_gts)]
    pooled = [
        list(pages._curves(compare(gather(of_model), Bootstrap(5)), "segm")["polyp"].values())[0]
        for of_model in (runs[:3], raw)
    ]
    assert pooled[0].area == pooled[1].area, "in the order of raw scores"
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert page.index("## What was shown") < page.index(remark[:20]) < page.index("## Tables")
    table = pd.read_csv(tmp_path / "out" / "table_5.csv")
    thresholds = {model: {*rows["threshold"]} for model, rows in table.groupby("model")}
    assert "0.5" in thresholds["IMR"]
    assert "0.5 of mapped scores, 0.7 of raw scores" in thresholds["MR"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["settings"]["tau"] is None
    with pytest.raises(ValueError, match="runs/MR0 .*tau"):
        gather([*runs[:5], make("x", fold_gts[2], model="IMR", fold=(2, 3), tau=0.6)])


def test_configs_that_differ_are_remarked(gt, make, caplog):
    with caplog.at_level(logging.WARNING):
        (remark,) = gather([make(f"{seed}", gt, seed=seed, lr=seed) for seed in (1, 2)]).remarks
    assert "IMR-CNN" in remark and "SOLVER.BASE_LR" in remark and remark in caplog.text


def test_folds_are_grouped(fold_gts, gt, make):
    runs = [
        make(f"{model}{i}{seed}", path, model=model, seed=seed, fold=(i, 3))
        for model, seeds in (("IMR", (0, 1)), ("MR", (0,)))
        for i, path in reversed(list(enumerate(fold_gts)))
        for seed in seeds
    ]
    gathered = gather(runs)
    assert not gathered.split and len(gathered.folds["MR"]) == 3
    assert [[run.run_folder.name for run in seeds] for seeds in gathered.folds["IMR"]] == [
        *(["IMR00", "IMR01"], ["IMR10", "IMR11"], ["IMR20", "IMR21"])
    ]
    assert training_images(runs[0]) == 64
    gathered = gather([*runs, make("one", gt, model="IMR")])
    assert names(gathered.split) == {"IMR": ["one"]} and len(gathered.folds["IMR"]) == 3


def test_folds_missing_doubled_or_other_ones(fold_gts, make):
    runs = [make(f"{i}", path, fold=(i, 3)) for i, path in enumerate(fold_gts)]
    again, of_5 = make("again", fold_gts[1], fold=(1, 3)), make("of5", fold_gts[1], fold=(1, 5))
    twice = make("twice", fold_gts[1], fold=(2, 3))

    def other(name, order):
        folds = enumerate(order)
        return [make(f"{name}{i}", fold_gts[k], model=name, fold=(i, len(order))) for i, k in folds]

    for members, fault in (
        ([runs[0], runs[2]], "IMR-CNN lacks fold 1 of 3"),
        ([*runs, again], "runs/1 and .*runs/again .*IMR-CNN of fold 1"),
        ([*runs, of_5], "runs/0 is one of 3 folds, .*runs/of5 one of 5"),
        ([*runs[:2], twice], "png is tested in fold 1 and again in fold 2"),
        ([*runs, *other("MR", [0, 1])], "IMR-CNN has 3 folds, MR has 2"),
        ([*runs, *other("IBMR", [0, 2, 1])], "different test sets"),
    ):
        with pytest.raises(ValueError, match=fault):
            gather(members)


def test_training_images_of_a_run_without_a_record(gt, make, write_gt):
    run = make("old", gt, run_json=False)
    assert training_images(run) is None
    write_gt(gt.with_name("train.json"), images=15)
    assert training_images(run) == 15


@pytest.fixture
def three(tmp_path, write_gt, make):
    """Runs of three models on 24 images, the last clearly better."""
    gt = write_gt(tmp_path / "test.json")
    skills = {"MR-CNN": 0.5, "IBMR-CNN": 0.6, "IMR-CNN": 0.97}
    return [
        make(model, gt, model=model, skill=skill, seed=number, tau_val=0.6)
        for number, (model, skill) in enumerate(skills.items())
    ]


def of(tests, endpoint):
    return {(test.first, test.second): test for test in tests if test.endpoint == endpoint}


def test_pairs_and_their_differences(three):
    compared = compare(gather(three), BOOTSTRAP)
    pairs = [("IBMR-CNN", "MR-CNN"), ("IMR-CNN", "MR-CNN"), ("IMR-CNN", "IBMR-CNN")]
    assert list(of(compared.tests, "segm/AP50_voc")) == pairs
    best, worst = three[2].results, three[0].results
    test = of(compared.tests, "lesion/recall")["IMR-CNN", "MR-CNN"]
    assert test.estimate == pytest.approx(best.lesion["recall"] - worst.lesion["recall"])
    assert 0 < test.low < test.estimate < test.high
    at_tau_val = of(compared.tests, "tau_val.lesion/recall")["IMR-CNN", "MR-CNN"].estimate
    expected = best.tau_val["lesion"]["recall"] - worst.tau_val["lesion"]["recall"]
    assert at_tau_val == pytest.approx(expected) and expected != test.estimate
    test = of(compared.tests, "image/accuracy")["IMR-CNN", "MR-CNN"]
    result = image_level_test([best], [worst])
    assert test.test == f"McNemar's exact, {result.only_first} : {result.only_second}"
    assert test.p == result.p < 0.05
    assert (test.low, test.high) == (result.low, result.high) and result.low > 0
    baseline = compare(gather(three), BOOTSTRAP, baseline="IBMR-CNN")
    pairs = [("MR-CNN", "IBMR-CNN"), ("IMR-CNN", "IBMR-CNN")]
    assert list(of(baseline.tests, "lesion/f1")) == pairs


def test_only_the_pair_and_metric_named_beforehand_are_not_adjusted(three):
    """Several pairs on the primary endpoint are several tests: none is left as it is unless it is
    the one named."""
    for options, spared in (
        ({}, []),
        ({"primary": "lesion/recall"}, []),
        ({"pair": "IMR-CNN:MR-CNN"}, [("IMR-CNN", "MR-CNN", "segm/AP50_voc")]),
        # In the direction that was named, which need not be that of the other tests.
        (
            {"pair": "MR-CNN:IBMR-CNN", "primary": "lesion/f1"},
            [("MR-CNN", "IBMR-CNN", "lesion/f1")],
        ),
    ):
        tests = compare(gather(three), BOOTSTRAP, **options).tests
        primary = [test for test in tests if test.primary]
        assert [(test.first, test.second, test.endpoint) for test in primary] == spared
        assert all(math.isnan(test.p_holm) for test in primary)
        family = [test for test in tests if not test.primary]
        assert {"segm/AP50_voc", "lesion/recall"} <= {test.endpoint for test in family}
        assert [t.p_holm for t in family] == pytest.approx(holm([t.p for t in family]))


def test_one_pair_is_the_pair_named_beforehand(three):
    for runs, options in ((three[1:], {}), (three[:2], {"baseline": "MR-CNN"})):
        tests = compare(gather(runs), BOOTSTRAP, **options).tests
        (primary,) = (test for test in tests if test.primary)
        assert primary.endpoint == "segm/AP50_voc" and primary.second == runs[0].name


def test_six_pairs_on_the_primary_endpoint_are_six_tests(gt, make, monkeypatch):
    """With p 0.03 in each of six pairs and 1 elsewhere, none is below 0.05."""
    runs = [make(name, gt, model=name, tau_val=0.6) for name in "abcd"]

    def difference(first, second, group, metric):
        p = 0.03 if (group, metric) == ("segm", "AP50_voc") else 1.0
        return replace(paired_difference(first, second, group, metric), p=p)

    monkeypatch.setattr(models, "paired_difference", difference)
    tests = compare(gather(runs), BOOTSTRAP).tests
    assert len(of(tests, "segm/AP50_voc")) == 6
    assert min(test.p if test.primary else test.p_holm for test in tests) > 0.05


def test_endpoints_and_baselines_that_there_are_not(three):
    for options, named in (
        ({"primary": "segm/AP"}, "'segm/AP'.*--ci-all"),
        ({"primary": "recall"}, "'recall'"),
        ({"primary": "calibration/ece"}, "'calibration/ece'"),
        ({"baseline": "X"}, "'X' among MR-CNN, IBMR-CNN, IMR-CNN"),
        ({"pair": "IMR-CNN:X"}, "'IMR-CNN:X'.* IBMR-CNN:MR-CNN"),
        ({"baseline": "MR-CNN", "pair": "IMR-CNN:IBMR-CNN"}, "'IMR-CNN:IBMR-CNN'"),
    ):
        with pytest.raises(ValueError, match=named):
            compare(gather(three), BOOTSTRAP, **options)
    slow = compare(gather(three[:2]), Bootstrap(20, all_coco=True), primary="segm/AP")
    assert of(slow.tests, "segm/AP")["IBMR-CNN", "MR-CNN"].primary
    assert not of(slow.tests, "patient/recall")  # no image of a patient


def test_folds_are_tested_with_their_sizes(fold_gts, make):
    runs, values = [], {}
    for fold, path in enumerate(fold_gts):
        for model, skill in (("MR-CNN", 0.6), ("IMR-CNN", 0.9)):
            run = make(f"{model}{fold}", path, model=model, skill=skill, fold=(fold, 3))
            runs.append(run)
            values.setdefault(model, []).append(run.results.lesion["recall"])
    compared = compare(gather(runs), BOOTSTRAP)
    assert not compared.tests and not compared.models
    assert (compared.n_train, compared.n_test) == (64, 13)
    test = of(compared.fold_tests, "lesion/recall")["IMR-CNN", "MR-CNN"]
    differences = np.subtract(values["IMR-CNN"], values["MR-CNN"])
    expected = corrected_resampled_t_test(differences, 64, 13)
    assert (test.estimate, test.p) == pytest.approx((expected.estimate, expected.p))
    assert not any("leaves out" in text for text in compared.remarks)
    for fold, run in enumerate(runs):
        run.record["left_out"] = f"centre=C{fold // 2 + 1}"
    assert any("(centre=C1, centre=C2, centre=C3)" in text for text in gather(runs).remarks)
    for run in runs:
        run.record["datasets"] = {}
    unknown = compare(gather(runs), BOOTSTRAP)
    assert not unknown.fold_tests and any("not tested" in text for text in unknown.remarks)


def test_an_undefined_primary_endpoint_is_remarked(gt, make):
    """Boxes only: no metric of masks."""
    runs = [make(name, gt, model=name, seed=1, boxes=True) for name in ("a", "b")]
    compared = compare(gather(runs), BOOTSTRAP)
    assert not of(compared.tests, "segm/AP50_voc")
    assert of(compared.tests, "bbox/AP50_voc")["b", "a"].p == 1
    assert compared.primary == "bbox/AP50_voc"
    compared = compare(gather(runs), BOOTSTRAP, primary="segm/AP50_voc")
    assert any("segm/AP50_voc is undefined" in remark for remark in compared.remarks)


def test_old_runs_say_how_to_renew_them(gt, write_run, caplog):
    folder = write_run("old", gt, run_json=False)
    path = folder / "inference" / "kvasir_seg_test" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["lesion"]["TP"] += 1
    path.write_text(json.dumps(metrics))
    with caplog.at_level(logging.WARNING):
        remarks = compare(gather([load_run(folder)]), BOOTSTRAP).remarks
    other_values, no_point, few, no_record = remarks
    assert "(lesion/TP)" in other_values and other_values in caplog.text
    assert "(tau_val): old." in no_point and str(folder) in no_record
    assert "only 6 images" in few


def test_patients_with_several_images(tmp_path, write_gt, make):
    for per_patient, clustered in ((3, True), (1, False)):
        gt = write_gt(tmp_path / f"{per_patient}.json", per_patient=per_patient)
        runs = [make(f"{m}{per_patient}", gt, model=m) for m in ("a", "b")]
        compared = compare(gather(runs), BOOTSTRAP)
        assert compared.clustered is clustered and compared.settings["unit"] == "patient"
        assert of(compared.tests, "patient/recall")


def test_the_command(gt, write_run, write_gt, tmp_path, capsys):
    runs = [str(write_run(name, gt, model=name, seed=i)) for i, name in enumerate("abc")]
    out = tmp_path / "out"
    options = ["--primary", "a:b", "segm/AP", "--ci-all", "--baseline", "b", "--resamples", "20"]
    command.main([*runs, "--output", str(out), *options, "--seed", "3"])
    printed = capsys.readouterr().out
    assert (out / "comparison.md").read_text() in printed and str(out / "table_3.tex") in printed
    document = json.loads((out / "comparison.json").read_text())
    assert (document["settings"]["resamples"], document["settings"]["seed"]) == (20, 3)
    pairs = {(test["first"], test["second"]) for test in document["tests"]}
    assert pairs == {("a", "b"), ("c", "b")}
    (primary,) = (test for test in document["tests"] if test["primary"])
    assert (primary["first"], primary["second"], primary["endpoint"]) == ("a", "b", "segm/AP")
    other = str(write_run("other", write_gt(tmp_path / "gt.json", images=4), model="other"))
    for second, options, named in (
        (other, [], "test sets"),
        (str(tmp_path / "nowhere"), [], "nowhere"),
        (runs[1], ["--seed", "-1"], "seed is -1"),
        (runs[1], ["--primary", "a:c", "segm/AP50_voc"], "'a:c'"),
        (runs[1], ["--primary", "segm/AP50_voc", runs[2], "x"], f"{runs[2]} x"),
        (runs[1], ["--output", f"{other}/run.json"], "run.json is a file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main([runs[0], second, "--output", str(tmp_path / "none"), *options])
        assert stopped.value.code and named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none").exists()


BACKBONES = {"vgg19": 0.5, "resnet50.a1_in1k": 1.0, "inception_v3": 0.8}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A prepared data set and three classifiers, one of them trained with two seeds."""
    root = tmp_path_factory.mktemp("classifiers")
    draw_classes(root / "raw", (20, 24, 28), size=24)
    out = prepare_classes(root / "raw", root / "gastric_recognition", ratio=(1, 1, 2)).out
    gt = out / "annotations" / "test.json"
    for number, (backbone, skill) in enumerate(BACKBONES.items()):
        write_classifier(root / "runs" / backbone, gt, skill=skill, seed=number, backbone=backbone)
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
    assert "recognition/balanced_accuracy" in endpoints
    assert not any(test.primary for test in comparison.tests)  # of three pairs none was named
    # Of one cancer class the sensitivity is its accuracy, tested already.
    assert "cancer/recall" not in endpoints
    assert {"cancer/specificity", "recognition/accuracy_gastric ulcer"} <= endpoints
    runs = [comparison.gathered.split[label][0].results for label in ("Inception-V3", "ResNet50")]
    result = image_level_test(*([run] for run in runs))
    (mcnemar,) = (t for t in tests if t.test.startswith("McNemar"))
    assert mcnemar.endpoint == "recognition/top1" and mcnemar.p == result.p
    assert mcnemar.test.endswith(f"{result.only_first} : {result.only_second}")
    top1 = [run.recognition["top1"] for run in runs]
    assert mcnemar.estimate == pytest.approx(top1[0] - top1[1])


def test_the_files(comparison, tmp_path, real_plots):
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


def test_folds(study, tmp_path):
    runs = []
    for fold in range(3):
        content = json.loads((study / "gastric_recognition/annotations/test.json").read_text())
        for image in content["images"]:  # folds test other images each
            image["file_name"] = f"{fold}/{image['file_name']}"
        gt = tmp_path / f"fold{fold}" / "annotations" / "test.json"
        gt.parent.mkdir(parents=True)
        gt.write_text(json.dumps(content))
        for backbone in ("vgg19", "resnet50"):
            output, seed = tmp_path / "runs" / f"{backbone}{fold}", fold + len(backbone)
            options = dict(seed=seed, backbone=backbone, fold={"index": fold, "of": 3})
            runs.append(load_run(write_classifier(output, gt, **options)))
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
