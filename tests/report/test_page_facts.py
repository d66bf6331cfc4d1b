import dataclasses

import pytest

from imrcnn_d2.report.html.page import UNKNOWN, config_differences, configs, facts


@pytest.fixture(scope="module")
def runs(study_runs):
    return [study_runs["MR-CNN"], study_runs["IMR-CNN"]]


def test_what_is_recorded(runs):
    table = {label: values for label, *values in facts(runs, {"sha256": "e" * 64})}
    assert table["Model"] == ["MR-CNN", "IMR-CNN"]
    assert table["Backbone"] == ["tf_efficientnet_lite0"] * 2
    assert table["Seed"] == ["3", "3"]
    assert table["Code revision"] == ["0123abc, with uncommitted changes"] * 2
    assert table["Split, sha256"] == ["e" * 16 + "…"] * 2
    assert table["Weights, sha256"] == ["c" * 16 + "…"] * 2
    assert table["τ chosen on validation"] == ["0.62 (f1, on study_val)"] * 2
    assert table["Intervals"] == ["60 resamples of patients, seed 0"] * 2
    assert table["Training"] == ["0.25 h, finished 2026-01-01T10:15:00"] * 2
    assert "torch " in table["Versions"][0]


def test_what_an_older_run_does_not_tell(runs):
    recorded = {k: v for k, v in runs[0].recorded.items() if k != "tau_val"}
    kept = ("tau", "iou_threshold", "iou_type", "gt", "gt_sha256")
    recorded["meta"] = {k: recorded["meta"][k] for k in kept}
    old = dataclasses.replace(runs[0], run=None, config=None, recorded=recorded)
    table = dict(facts([old], {}))
    told = {label for label, value in table.items() if value != UNKNOWN}
    assert told == {"Fold", "Ground truth, sha256", "Score threshold τ", "Hit", "Intervals"}
    assert configs([old]) == [("MR-CNN", "")]
    assert config_differences([old, runs[1]]) == []


def test_training_that_has_not_finished(runs):
    going_on = dataclasses.replace(runs[0], run={**runs[0].run, "finished": None})
    assert dict(facts([going_on], {}))["Training"].endswith("not finished")


def test_only_what_differs(runs):
    assert config_differences(runs) == [["MODEL.PAFPN.ATTENTION", "", "cbam"]]
    (_, text), _ = configs(runs)
    assert "SEED: 3" in text
