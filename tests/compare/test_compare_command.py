import json
import logging
import math

import numpy as np
import pytest
from scipy import stats

from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.report.comparison import compare, gather
from imrcnn_d2.report.runs import load_run

BOOTSTRAP = Bootstrap(60)


@pytest.fixture
def gt(tmp_path, write_gt):
    return write_gt(tmp_path / "data" / "annotations" / "test.json", images=24)


@pytest.fixture
def three(gt, write_run):
    """Runs of three models, the last clearly better."""
    skills = {"MR-CNN": 0.5, "IBMR-CNN": 0.6, "IMR-CNN": 0.97}
    return [
        load_run(write_run(model, gt, model=model, skill=skill, seed=number, tau_val=0.6))
        for number, (model, skill) in enumerate(skills.items())
    ]


def of(tests, endpoint):
    return {(test.first, test.second): test for test in tests if test.endpoint == endpoint}


def test_pairs(three):
    found = compare(gather(three), BOOTSTRAP)
    pairs = [("IBMR-CNN", "MR-CNN"), ("IMR-CNN", "MR-CNN"), ("IMR-CNN", "IBMR-CNN")]
    assert list(of(found.tests, "segm/AP50_voc")) == pairs
    baseline = compare(gather(three), BOOTSTRAP, baseline="IBMR-CNN")
    pairs = [("MR-CNN", "IBMR-CNN"), ("IMR-CNN", "IBMR-CNN")]
    assert list(of(baseline.tests, "lesion/f1")) == pairs
    with pytest.raises(ValueError, match="no model 'X' among MR-CNN, IBMR-CNN, IMR-CNN"):
        compare(gather(three), BOOTSTRAP, baseline="X")


def test_the_difference_is_of_the_figures(three):
    found = compare(gather(three), BOOTSTRAP)
    best, worst = three[2].results, three[0].results
    test = of(found.tests, "lesion/recall")["IMR-CNN", "MR-CNN"]
    assert test.estimate == pytest.approx(best.lesion["recall"] - worst.lesion["recall"])
    assert test.low < test.estimate < test.high and test.low > 0
    at_own = of(found.tests, "tau_val.lesion/recall")["IMR-CNN", "MR-CNN"]
    expected = best.tau_val["lesion"]["recall"] - worst.tau_val["lesion"]["recall"]
    assert at_own.estimate == pytest.approx(expected) and expected != test.estimate


def test_mcnemar_is_among_the_tests(three):
    found = compare(gather(three), BOOTSTRAP)
    test = of(found.tests, "image/accuracy")["IMR-CNN", "MR-CNN"]
    right = []
    for run in (three[2], three[0]):
        rows = run.results.per_image
        right.append(np.array([row["image_outcome"] in ("TP", "TN") for row in rows]))
    b, c = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    assert test.test == f"McNemar's exact, {b} : {c}"
    assert test.p == pytest.approx(stats.binomtest(b, b + c).pvalue)


def test_all_but_the_primary_endpoint_are_adjusted(three):
    for primary in ("segm/AP50_voc", "lesion/recall"):
        tests = compare(gather(three), BOOTSTRAP, primary=primary).tests
        assert {test.endpoint for test in tests if test.primary} == {primary}
        assert all(math.isnan(test.p_holm) for test in tests if test.primary)
        family = sorted((test for test in tests if not test.primary), key=lambda test: test.p)
        adjusted = 0
        for rank, test in enumerate(family):
            adjusted = max(adjusted, min(1, (len(family) - rank) * test.p))
            assert test.p_holm == pytest.approx(adjusted)


def test_seeds_are_one_model(gt, write_run):
    runs = [load_run(write_run(f"{seed}", gt, seed=seed)) for seed in (1, 2, 3)]
    found = compare(gather([*runs, load_run(write_run("b", gt, model="MR-CNN"))]), BOOTSTRAP)
    model = found.models["IMR-CNN"]
    values = [run.results.segm["AP50_voc"] for run in runs]
    assert model.values["segm"]["AP50_voc"] == pytest.approx(np.mean(values))
    assert model.sd("segm", "AP50_voc") == pytest.approx(np.std(values))
    # Three outcomes an image are not one: no McNemar's test.
    assert not of(found.tests, "image/accuracy")


def test_folds(tmp_path, write_gt, write_run):
    runs, values = [], {}
    for fold in range(3):
        gt = write_gt(tmp_path / f"fold{fold}.json", images=12 + fold, first=1 + 20 * fold)
        for model, skill in (("MR-CNN", 0.6), ("IMR-CNN", 0.9)):
            path = write_run(f"{model}{fold}", gt, model=model, skill=skill, fold=(fold, 3))
            runs.append(load_run(path))
            values.setdefault(model, []).append(runs[-1].results.lesion["recall"])
    found = compare(gather(runs), BOOTSTRAP)
    assert not found.tests and not found.models
    assert (found.n_train, found.n_test) == (64, 13)
    test = of(found.fold_tests, "lesion/recall")["IMR-CNN", "MR-CNN"]
    differences = np.subtract(values["IMR-CNN"], values["MR-CNN"])
    error = np.sqrt((1 / 3 + 13 / 64) * differences.var(ddof=1))
    assert test.estimate == pytest.approx(differences.mean())
    assert test.p == pytest.approx(2 * stats.t.sf(abs(differences.mean()) / error, 2))


def test_folds_of_unknown_size_are_not_tested(tmp_path, write_gt, write_run):
    runs = []
    for fold in range(2):
        gt = write_gt(tmp_path / f"{fold}" / "test.json", images=6, first=1 + 6 * fold)
        for model in ("a", "b"):
            path = write_run(f"{model}{fold}", gt, model=model, fold=(fold, 2), seed=fold)
            record = json.loads((path / "run.json").read_text())
            (path / "run.json").write_text(json.dumps(record | {"datasets": {}}))
            runs.append(load_run(path))
    found = compare(gather(runs), BOOTSTRAP)
    assert not found.fold_tests
    assert any("not tested" in remark for remark in found.remarks)


def test_endpoints_that_there_are_not(three):
    with pytest.raises(ValueError, match="'segm/AP' is not among .*--ci-all"):
        compare(gather(three), BOOTSTRAP, primary="segm/AP")
    with pytest.raises(ValueError, match="'recall' is not among"):
        compare(gather(three), BOOTSTRAP, primary="recall")
    slow = compare(gather(three[:2]), Bootstrap(20, all_coco=True), primary="segm/AP")
    assert of(slow.tests, "segm/AP")["IBMR-CNN", "MR-CNN"].primary
    # No image of a patient: no patient's figure.
    assert not of(slow.tests, "patient/recall")


def test_an_undefined_primary_endpoint_is_said(gt, write_run, make_detections):
    """Boxes only: no figure of masks."""
    boxes = [
        {key: value for key, value in found.items() if key != "segmentation"}
        for found in make_detections(gt, 0.8, 1)
    ]
    runs = [load_run(write_run(name, gt, model=name, dt=boxes)) for name in ("a", "b")]
    found = compare(gather(runs), BOOTSTRAP)
    assert not of(found.tests, "segm/AP50_voc")
    assert of(found.tests, "bbox/AP50_voc")["b", "a"].p == 1
    assert any("segm/AP50_voc is undefined" in remark for remark in found.remarks)


def test_old_runs_say_how_to_renew_them(gt, write_run, caplog):
    folder = write_run("old", gt, run_json=False)
    path = folder / "inference" / "kvasir_seg_test" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["lesion"]["TP"] += 1
    path.write_text(json.dumps(metrics))
    with caplog.at_level(logging.WARNING):
        remarks = compare(gather([load_run(folder)]), BOOTSTRAP).remarks
    assert len(remarks) == 3
    assert "(lesion/TP): those here were scored again" in remarks[0]
    assert "No operating point of its own (tau_val): old." in remarks[1]
    assert f"Without run.json, so of unknown model, seed and fold: {folder}" in remarks[2]
    assert remarks[0] in caplog.text


def test_patients_with_several_images(tmp_path, write_gt, write_run):
    for per_patient, clustered in ((3, True), (1, False)):
        gt = write_gt(tmp_path / f"{per_patient}.json", per_patient=per_patient)
        runs = [load_run(write_run(f"{m}{per_patient}", gt, model=m)) for m in ("a", "b")]
        found = compare(gather(runs), BOOTSTRAP)
        assert found.clustered is clustered
        assert found.settings["unit"] == "patient"
        assert of(found.tests, "patient/recall")
