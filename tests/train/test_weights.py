"""The operating point goes from validation through the checkpoint to the final test."""

import hashlib
import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from imrcnn_d2.engine import Trainer, load_weights
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.results import choose_operating_point


def test_json(tmp_path, name):
    return json.loads((tmp_path / "output" / "inference" / name / "metrics.json").read_text())


test_json.__test__ = False


def test_the_operating_point_chosen_on_validation_is_that_of_the_test(
    tiny_cfg, tiny_datasets, tmp_path
):
    tiny_cfg.TEST.EVAL_PERIOD = tiny_cfg.SOLVER.MAX_ITER  # one validation, whose results stay
    tiny_cfg.MODEL.IMRCNN.TAU_RULE = "recall>=50"
    trainer = Trainer(tiny_cfg)
    results = trainer.train()

    output = tmp_path / "output"
    val = test_json(tmp_path, tiny_datasets["val"])
    scored = evaluate_lesions(
        trainer.build_evaluator(tiny_cfg, tiny_datasets["val"])._coco._coco_api.dataset,
        output / "inference" / tiny_datasets["val"] / "coco_instances_results.json",
    )
    best = output / "model_best.pth"
    point = torch.load(best, weights_only=True)["operating_point"]
    assert point == {
        "tau": choose_operating_point(scored, "recall>=50").tau,
        "rule": "recall>=50",
        "dataset": tiny_datasets["val"],
    }
    assert "tau_val" not in val and val["meta"]["bootstrap"] is None

    test = test_json(tmp_path, tiny_datasets["test"])
    assert {key: test["tau_val"][key] for key in point} == point
    assert test["meta"]["bootstrap"]["resamples"] == 2000
    assert "recall_ci" in test["image"]
    assert test["meta"]["checkpoint"] == str(best)
    assert test["meta"]["checkpoint_sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert "tau_val" not in results["lesion"], "no threshold is chosen on the test set"


@pytest.mark.slow
def test_of_several_validation_sets_the_first_gives_the_operating_point(
    tiny_cfg, tiny_datasets, tmp_path
):
    tiny_cfg.DATASETS.VAL = (tiny_datasets["val"], tiny_datasets["train"])
    tiny_cfg.TEST.EVAL_PERIOD = tiny_cfg.SOLVER.MAX_ITER
    Trainer(tiny_cfg).train()
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    taus = [line for line in logged if f"{tiny_datasets['val']}/lesion/tau_val" in line][-1]
    point = torch.load(tmp_path / "output" / "model_best.pth", weights_only=True)["operating_point"]
    assert point["dataset"] == tiny_datasets["val"]
    assert point["tau"] == taus[f"{tiny_datasets['val']}/lesion/tau_val"]


@pytest.mark.slow
def test_a_checkpoint_without_operating_point_gives_no_tau_val(tiny_cfg, tiny_datasets, tmp_path):
    tiny_cfg.DATASETS.VAL = ()
    Trainer(tiny_cfg).train()
    test = test_json(tmp_path, tiny_datasets["test"])
    assert "tau_val" not in test
    final = tmp_path / "output" / "model_final.pth"
    assert test["meta"]["checkpoint"] == str(final)

    model = Trainer.build_model(tiny_cfg)
    weights = load_weights(DetectionCheckpointer(model), str(final))
    assert weights.operating_point is None
    assert weights.sha256 == hashlib.sha256(final.read_bytes()).hexdigest()
    assert all(
        torch.equal(value, model.state_dict()[key])
        for key, value in torch.load(final, weights_only=True)["model"].items()
        if key in model.state_dict()
    )


def test_a_model_of_no_checkpoint(tiny_cfg):
    weights = load_weights(DetectionCheckpointer(Trainer.build_model(tiny_cfg)), "")
    assert (weights.path, weights.sha256, weights.operating_point) == (None, None, None)


def test_a_bad_rule_is_named_before_training(tiny_cfg):
    tiny_cfg.MODEL.IMRCNN.TAU_RULE = "precision"
    with pytest.raises(ValueError, match="'precision'"):
        Trainer(tiny_cfg)
