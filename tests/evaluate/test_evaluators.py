"""The evaluator gives what Detectron2's and ``evaluate_lesions`` do, in any number of processes."""

import hashlib
import json
import math
import uuid
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import (
    COCOEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm

from imrcnn_d2.cli import prepare_dataset
from imrcnn_d2.data.catalog import register_data_set
from imrcnn_d2.deploy import load_model, pretrained
from imrcnn_d2.engine import Trainer
from imrcnn_d2.engine.launch import leave_process_groups
from imrcnn_d2.evaluation import (
    Bootstrap,
    LesionEvaluator,
    OperatingPoint,
    ScoreMap,
    choose_operating_point,
    evaluate_lesions,
    evaluators,
)

from .test_curves import expected_error

SIZE = (40, 50)
RESULTS = "coco_instances_results.json"


@pytest.fixture
def register(tmp_path):
    """A function that registers a COCO dict and returns the name it got."""
    names = []

    def do(dataset):
        names.append(uuid.uuid4().hex)
        path = tmp_path / f"{names[-1]}.json"
        path.write_text(json.dumps(dataset))
        register_coco_instances(names[-1], {}, str(path), str(tmp_path))
        return names[-1]

    yield do
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def to_outputs(dataset, results, masks=True):
    """[(input, output)] of a model that predicts the COCO results, one pair per image."""
    classes = {c["id"]: i for i, c in enumerate(dataset["categories"])}
    pairs = []
    for image in dataset["images"]:
        detected = [result for result in results if result["image_id"] == image["id"]]
        boxes = torch.tensor([r["bbox"] for r in detected], dtype=torch.float32).reshape(-1, 4)
        predicted = [classes[r["category_id"]] for r in detected]
        instances = Instances(
            SIZE,
            pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
            scores=torch.tensor([r["score"] for r in detected], dtype=torch.float64),
            pred_classes=torch.tensor(predicted, dtype=torch.int64),
        )
        if masks:
            decoded = [mask_util.decode(r["segmentation"]) for r in detected]
            instances.pred_masks = torch.tensor(np.array(decoded).reshape(-1, *SIZE)).bool()
        pairs.append(({"image_id": image["id"]}, {"instances": instances}))
    return pairs


def run(evaluator, pairs):
    evaluator.reset()
    for input_, output in pairs:
        evaluator.process([input_], [output])
    return evaluator.evaluate()


def assert_same(groups, expected):
    for group, values in expected.items():
        assert groups[group] == pytest.approx(dict(values), nan_ok=True), group


@pytest.fixture
def case(random_case):
    """A random data set whose category ids are not the model's classes, results, and outputs."""
    dataset, results = random_case(3, scores="distinct", num_images=12)
    for record in (*dataset["categories"], *dataset["annotations"], *results):
        key = "category_id" if "category_id" in record else "id"
        record[key] = {1: 4, 2: 9}[record[key]]
    for image in dataset["images"]:
        image["patient_id"] = f"patient {image['id'] % 5}"
    return dataset, results, to_outputs(dataset, results)


def test_agrees_with_detectron2_and_with_scoring_the_files(case, register, tmp_path):
    dataset, results, pairs = case
    name = register(dataset)
    metrics = run(LesionEvaluator(name, tau=0.4, output_dir=str(tmp_path / "out")), pairs)
    assert list(metrics) == ["bbox", "segm", "lesion", "paper", "image", "patient"]
    stock = run(COCOEvaluator(name, distributed=False, use_fast_impl=False), pairs)
    for group in ("bbox", "segm"):
        shared = {key: metrics[group][key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
        assert_same({group: shared}, {group: {key: stock[group][key] for key in shared}})
        assert 0 < metrics[group]["AP50"] < 100
    # The predictions it leaves are COCO results: scored again, they give the same.
    for detected in (results, tmp_path / "out" / RESULTS):
        assert_same(metrics, evaluate_lesions(dataset, detected, tau=0.4).groups())
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (written["meta"]["dataset"], written["meta"]["tau"]) == (name, 0.4)
    assert written["lesion"]["TP"] == metrics["lesion"]["TP"]
    assert (tmp_path / "out" / "per_image.csv").exists()


def test_a_final_evaluation_records_its_sources(case, register, tmp_path):
    dataset, results, pairs = case
    name = register(dataset)
    checkpoint = {"checkpoint": "model_best.pth", "checkpoint_sha256": "ab"}
    point, bootstrap = OperatingPoint(0.35, "f1", "val"), Bootstrap(20)
    options = {"operating_point": point, "bootstrap": bootstrap, "meta": checkpoint}
    metrics = run(LesionEvaluator(name, output_dir=str(tmp_path / "out"), **options), pairs)
    groups = ["bbox", "segm", "lesion", "paper", "image", "patient"]
    assert list(metrics) == groups  # floats only, for hooks
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    gt, dt = tmp_path / f"{name}.json", tmp_path / "out" / RESULTS
    sources = {"gt": str(gt), "image_root": str(tmp_path), "dt": str(dt)}
    sources["gt_sha256"] = hashlib.sha256(gt.read_bytes()).hexdigest()
    assert {**sources, **checkpoint}.items() <= written["meta"].items()
    assert written["meta"]["bootstrap"]["unit"] == "patient"
    at = evaluate_lesions(dataset, results, tau=0.35)
    assert written["tau_val"]["lesion"]["TP"] == at.lesion["TP"] != metrics["lesion"]["TP"]
    assert "recall_ci" in written["lesion"] and "recall_ci" in written["tau_val"]["patient"]
    assert (tmp_path / "out" / "per_patient.csv").exists()


def test_a_validation_chooses_a_threshold(case, register, caplog, monkeypatch):
    dataset, results, pairs = case
    name = register(dataset)
    raw = evaluate_lesions(dataset, results)
    chosen = choose_operating_point(raw, "recall>=20").tau
    calibration = raw.metrics.calibration
    fitted = ScoreMap.fit(calibration.score, calibration.hit, name)
    evaluator = LesionEvaluator(name, tau_rule="recall>=20")
    evaluated = Mock(wraps=evaluate_lesions)
    with monkeypatch.context() as patch:
        patch.setattr(evaluators, "evaluate_lesions", evaluated)
        metrics = run(evaluator, pairs)
    assert evaluated.call_count == 1, "for the map, detections are matched and nothing else"
    assert metrics["score_map"] == {"slope": fitted.slope, "offset": fitted.offset}
    assert evaluator.score_map == fitted
    assert metrics["lesion"]["tau_val"] == pytest.approx(fitted(chosen), abs=1e-12)
    assert evaluator.results.meta["tau"] == 0.5
    for other, data, detected in (
        (name, dataset, []),
        (register({**dataset, "annotations": []}), {**dataset, "annotations": []}, results),
    ):  # without a hit, scores stay as they are
        evaluator = LesionEvaluator(other, tau_rule="f1")
        metrics = run(evaluator, to_outputs(data, detected))
        assert "score_map" not in metrics and evaluator.score_map is None
        assert f"in {other}, 0 hit" in caplog.records[-1].getMessage()
        assert math.isnan(metrics["lesion"]["tau_val"]) and evaluator.results.meta["tau"] == 0.7
    metrics = run(LesionEvaluator(name), pairs)
    assert "tau_val" not in metrics["lesion"] and "score_map" not in metrics
    with pytest.raises(ValueError, match="best"):
        LesionEvaluator(name, tau_rule="best")


@pytest.mark.parametrize("slope, offset", [(0.4, -1.5), (1.7, 0.8)])
def test_mapped_scores_give_the_same_metrics_at_the_mapped_threshold(
    case, register, tmp_path, slope, offset
):
    """As a map keeps the order of scores, only what scores mean is another."""
    dataset, results, pairs = case
    name, score_map = register(dataset), ScoreMap(slope, offset, "val")
    point, raw_tau, folder = OperatingPoint(0.35, "f1", "val"), 0.45, tmp_path / "out"
    mapped_point = replace(point, tau=float(score_map(point.tau)))
    options = {"output_dir": str(folder), "score_map": score_map}
    tau = float(score_map(raw_tau))
    metrics = run(LesionEvaluator(name, tau=tau, operating_point=mapped_point, **options), pairs)
    raw = evaluate_lesions(dataset, results, tau=raw_tau, operating_point=point)
    for group, values in raw.groups().items():
        assert metrics[group] == pytest.approx(values, nan_ok=True, abs=0, rel=1e-12), group
    written = json.loads((folder / "metrics.json").read_text())
    assert written["tau_val"]["lesion"]["TP"] == raw.tau_val["lesion"]["TP"]
    assert written["meta"]["score_map"] == {"slope": slope, "offset": offset, "dataset": "val"}
    assert written["meta"]["tau"] == tau
    records = json.loads((folder / RESULTS).read_text())
    raw_scores = [record["raw_score"] for record in records]
    assert sorted(raw_scores) == sorted(result["score"] for result in results)
    for record, score in zip(records, raw_scores, strict=True):
        # Platt's formula by hand: the odds to the power of the slope, times exp(offset).
        odds = (score / (1 - score)) ** slope * math.exp(offset)
        assert record["score"] == pytest.approx(odds / (1 + odds), abs=1e-9)


def test_the_threshold_is_of_mapped_scores_or_the_papers(case, register):
    name, score_map = register(case[0]), ScoreMap(0.5, -1.0)
    for given, mapped, expected in (
        (None, score_map, 0.5),
        (None, None, 0.7),
        (0.5, None, 0.7),
        *((0.6, each, 0.6) for each in (score_map, None)),
    ):
        tau = {} if given is None else {"tau": given}
        evaluator = LesionEvaluator(name, score_map=mapped, **tau)
        run(evaluator, case[2])
        assert evaluator.results.meta["tau"] == expected


def test_detectron2_accepts_the_metrics(case, register):
    metrics = run(LesionEvaluator(register(case[0]), tau_rule="f1"), case[2])
    flat = flatten_results_dict(metrics)
    assert {"segm/AP50_voc", "lesion/selection", "image/auroc"} <= set(flat)
    assert all(type(value) is float for value in flat.values())
    print_csv_format(metrics)
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["lesion", "TP", metrics["lesion"]["TP"], 0.1]]
    assert verify_results(cfg, metrics)


def test_images_that_are_processed_again_or_not_at_all(case, register, caplog):
    dataset, results, pairs = case
    evaluator = LesionEvaluator(register(dataset))
    expected = run(evaluator, pairs)
    assert_same(evaluator.evaluate(), expected)
    assert_same(run(evaluator, pairs + pairs[:3]), expected)  # a padded batch
    assert "of the 12 images" not in caplog.text
    partial = run(evaluator, pairs[:8])
    assert "4 of the 12 images" in caplog.text
    silent = [r for r in results if r["image_id"] <= 8]
    assert_same(partial, evaluate_lesions(dataset, silent).groups())


def test_no_detections_masks_or_annotations(case, register, tmp_path):
    dataset, results, pairs = case
    nothing = run(LesionEvaluator(register(dataset), output_dir=tmp_path), to_outputs(dataset, []))
    assert_same(nothing, evaluate_lesions(dataset, []).groups())
    assert json.loads((tmp_path / RESULTS).read_text()) == []
    boxes = run(LesionEvaluator(register(dataset)), to_outputs(dataset, results, masks=False))
    by_boxes = evaluate_lesions(dataset, results, iou_type="bbox")
    assert_same(boxes, {"bbox": by_boxes.bbox})
    assert boxes["lesion"]["TP"] == by_boxes.lesion["TP"]
    assert np.isnan([*boxes["segm"].values(), boxes["lesion"]["iou"]]).all()
    del dataset["annotations"]
    assert run(LesionEvaluator(register(dataset), output_dir=tmp_path / "out"), pairs) == {}
    written = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert {result["category_id"] for result in written} == {4, 9}


def test_a_data_set_in_detectron2s_format(case, register, tmp_path):
    dataset, results, pairs = case
    for annotation in dataset["annotations"]:  # the format has none
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    records, name = DatasetCatalog.get(register(dataset)), uuid.uuid4().hex
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["a", "b"])
    metrics = run(LesionEvaluator(name, output_dir=str(tmp_path)), pairs)
    expected = evaluate_lesions(dataset, results)
    assert_same(metrics, {"segm": expected.segm, "lesion": expected.lesion})
    assert "patient" not in metrics


def test_a_class_that_the_data_set_lacks(case, register):
    dataset, _, pairs = case
    pairs[0][1]["instances"].pred_classes[:] = 2
    with pytest.raises(ValueError, match=r"class 2, .*MODEL\.ROI_HEADS\.NUM_CLASSES"):
        run(LesionEvaluator(register(dataset)), pairs)


def _evaluate_half(rank, store, json_file, pairs, folder):
    torch.set_num_threads(1)
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **options)
    comm.create_local_process_group(2)
    register_coco_instances("halves", {}, json_file, folder)
    # The first has the later images, and the second one of them again, as if padded.
    half = pairs[5:] if rank == 0 else pairs[:6]
    evaluator = LesionEvaluator("halves", tau_rule="f1", output_dir=f"{folder}/{rank}")
    results = run(evaluator, half)
    torch.save(dict(results), f"{folder}/{rank}.pth")
    leave_process_groups()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(case, register, tmp_path):
    dataset, _, pairs = case
    name = register(dataset)
    alone = run(LesionEvaluator(name, tau_rule="f1"), pairs)
    json_file = MetadataCatalog.get(name).json_file
    args = (str(tmp_path / "store"), json_file, pairs, str(tmp_path))
    mp.start_processes(_evaluate_half, args, nprocs=2, start_method="forkserver")
    main, other = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert other == {} and not (tmp_path / "1").exists()
    assert_same(main, alone)


@pytest.mark.slow
def test_a_score_of_the_demo_weights_is_a_probability(kvasir_352, tmp_path):
    """On the 250 test images of their split, of which none was used to train or to fit the map."""
    data, demo = tmp_path / "kvasir_seg", pretrained("demo")
    prepare_dataset.main(["kvasir-seg", "--root", str(kvasir_352), "--out", str(data)])
    loaded = load_model(None, demo, device="cpu")
    register_data_set(data)
    loader = Trainer.build_test_loader(loaded.cfg, "kvasir_seg_test")
    options = {
        "score_map": loaded.weights.score_map,
        "operating_point": loaded.weights.operating_point,
    }
    evaluator = LesionEvaluator("kvasir_seg_test", **options)
    metrics = inference_on_dataset(loaded.model, loader, evaluator)
    results = evaluator.results
    assert results.meta["tau"] == 0.5 and results.meta["images"] == 250
    calibration = results.metrics.calibration
    assert expected_error(calibration.score, calibration.hit) < 4
    raw = results.detections.raw_score[results.matching.evaluated]
    assert expected_error(raw, results.matching.hit[results.matching.evaluated]) > 10
    # Their model card has these.
    assert metrics["lesion"]["precision"] == pytest.approx(90.6, abs=0.5)
    assert metrics["lesion"]["recall"] == pytest.approx(91.0, abs=0.5)
    assert [results.tau_val["lesion"][name] for name in ("TP", "FP", "FN")] == [232, 25, 23]
