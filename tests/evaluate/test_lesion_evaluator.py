import hashlib
import json
import logging
import math
import uuid

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, print_csv_format, verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm

from imrcnn_d2.engine.launch import leave_process_groups
from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.detection.results import OperatingPoint, choose_operating_point
from imrcnn_d2.evaluation.evaluators import LesionEvaluator

SIZE = (40, 50)


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
    """[(input, output)] of a model that predicts the COCO results, one pair an image."""
    classes = {c["id"]: i for i, c in enumerate(dataset["categories"])}
    pairs = []
    for image in dataset["images"]:
        own = [result for result in results if result["image_id"] == image["id"]]
        boxes = torch.tensor([r["bbox"] for r in own], dtype=torch.float32).reshape(-1, 4)
        instances = Instances(
            SIZE,
            pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
            scores=torch.tensor([r["score"] for r in own], dtype=torch.float64),
            pred_classes=torch.tensor([classes[r["category_id"]] for r in own], dtype=torch.int64),
        )
        if masks:
            decoded = [mask_util.decode(r["segmentation"]) for r in own]
            instances.pred_masks = torch.tensor(np.array(decoded).reshape(-1, *SIZE)).bool()
        pairs.append(({"image_id": image["id"]}, {"instances": instances}))
    return pairs


def run(evaluator, pairs):
    evaluator.reset()
    for input_, output in pairs:
        evaluator.process([input_], [output])
    return evaluator.evaluate()


def same(figures):
    return pytest.approx(dict(figures), nan_ok=True)


@pytest.fixture
def case(random_case):
    """A random data set whose category ids are not the model's classes, and results."""
    dataset, results = random_case(3, scores="distinct", num_images=12)
    for record in (*dataset["categories"], *dataset["annotations"], *results):
        key = "category_id" if "category_id" in record else "id"
        record[key] = {1: 4, 2: 9}[record[key]]
    for image in dataset["images"]:
        image["patient_id"] = f"patient {image['id'] % 5}"
    return dataset, results


def test_agrees_with_detectron2_and_with_scoring_the_files(case, register, tmp_path):
    dataset, results = case
    name = register(dataset)
    pairs = to_outputs(dataset, results)
    own = run(LesionEvaluator(name, tau=0.4, output_dir=str(tmp_path / "out")), pairs)
    assert list(own) == ["bbox", "segm", "lesion", "image", "patient"]
    stock = run(COCOEvaluator(name, distributed=False, use_fast_impl=False), pairs)
    for group in ("bbox", "segm"):
        shared = {key: own[group][key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
        assert shared == same({key: stock[group][key] for key in shared})
        assert 0 < own[group]["AP50"] < 100
    for group, figures in evaluate_lesions(dataset, results, tau=0.4).groups().items():
        assert own[group] == same(figures)
    # The predictions it leaves are COCO results: scored again, they give the same.
    written = tmp_path / "out" / "coco_instances_results.json"
    for group, figures in evaluate_lesions(dataset, written, tau=0.4).groups().items():
        assert own[group] == same(figures)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["meta"]["dataset"] == name
    assert metrics["meta"]["tau"] == 0.4
    assert metrics["lesion"]["TP"] == own["lesion"]["TP"]
    assert (tmp_path / "out" / "per_image.csv").exists()
    assert (tmp_path / "out" / "pr_curve.csv").exists()


def test_a_final_evaluation_says_what_it_is_of(case, register, tmp_path):
    dataset, results = case
    name = register(dataset)
    evaluator = LesionEvaluator(
        name,
        output_dir=str(tmp_path / "out"),
        operating_point=OperatingPoint(0.35, "f1", "val"),
        bootstrap=Bootstrap(20),
        meta={"checkpoint": "model_best.pth", "checkpoint_sha256": "ab"},
    )
    own = run(evaluator, to_outputs(dataset, results))
    assert list(own) == ["bbox", "segm", "lesion", "image", "patient"]  # floats only, for hooks
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    gt = tmp_path / f"{name}.json"
    meta = metrics["meta"]
    assert (meta["gt"], meta["image_root"]) == (str(gt), str(tmp_path))
    assert meta["gt_sha256"] == hashlib.sha256(gt.read_bytes()).hexdigest()
    assert meta["dt"] == str(tmp_path / "out" / "coco_instances_results.json")
    assert (meta["checkpoint"], meta["checkpoint_sha256"]) == ("model_best.pth", "ab")
    assert meta["bootstrap"]["unit"] == "patient"
    at = evaluate_lesions(dataset, results, tau=0.35)
    assert metrics["tau_val"]["lesion"]["TP"] == at.lesion["TP"] != own["lesion"]["TP"]
    assert "recall_ci" in metrics["lesion"] and "recall_ci" in metrics["tau_val"]["patient"]
    assert (tmp_path / "out" / "per_patient.csv").exists()


def test_a_validation_chooses_a_threshold(case, register):
    dataset, results = case
    name = register(dataset)
    pairs = to_outputs(dataset, results)
    chosen = choose_operating_point(evaluate_lesions(dataset, results))
    own = run(LesionEvaluator(name, tau_rule="f1"), pairs)
    assert own["lesion"]["tau_val"] == chosen.tau
    assert "tau_val" not in run(LesionEvaluator(name), pairs)["lesion"]
    nothing = run(LesionEvaluator(name, tau_rule="f1"), to_outputs(dataset, []))
    assert math.isnan(nothing["lesion"]["tau_val"])


def test_detectron2_accepts_the_figures(case, register, caplog):
    dataset, results = case
    own = run(LesionEvaluator(register(dataset)), to_outputs(dataset, results))
    flat = flatten_results_dict(own)
    assert {"segm/AP50_voc", "lesion/selection", "image/auroc"} <= set(flat)
    assert all(type(value) is float for value in flat.values())
    with caplog.at_level(logging.INFO):
        print_csv_format(own)
    assert "Task: lesion" in caplog.text
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["lesion", "TP", own["lesion"]["TP"], 0.1]]
    assert verify_results(cfg, own)
    cfg.TEST.EXPECTED_RESULTS = [["lesion", "TP", own["lesion"]["TP"] + 1, 0.1]]
    with pytest.raises(SystemExit):
        verify_results(cfg, own)


def test_evaluates_twice_alike(case, register):
    dataset, results = case
    evaluator = LesionEvaluator(register(dataset))
    pairs = to_outputs(dataset, results)
    once = run(evaluator, pairs)
    again = evaluator.evaluate()
    fresh = run(evaluator, pairs)
    for group, figures in once.items():
        assert again[group] == same(figures)
        assert fresh[group] == same(figures)


def test_an_image_processed_twice_counts_once(case, register):
    dataset, results = case
    evaluator = LesionEvaluator(register(dataset))
    pairs = to_outputs(dataset, results)
    once = run(evaluator, pairs)
    padded = run(evaluator, pairs + pairs[:3])
    for group, figures in once.items():
        assert padded[group] == same(figures)


def test_images_that_never_came_count_as_silent(case, register, caplog):
    dataset, results = case
    evaluator = LesionEvaluator(register(dataset))
    partial = run(evaluator, to_outputs(dataset, results)[:8])
    assert "4 of the 12 images" in caplog.text
    silent = [r for r in results if r["image_id"] <= 8]
    for group, figures in evaluate_lesions(dataset, silent).groups().items():
        assert partial[group] == same(figures)


def test_nothing_detected(case, register, tmp_path):
    dataset, _ = case
    own = run(LesionEvaluator(register(dataset), output_dir=tmp_path), to_outputs(dataset, []))
    for group in ("bbox", "segm"):
        assert own[group]["AP"] == own[group]["AP50_voc"] == own[group]["BEP"] == 0
    assert math.isnan(own["lesion"]["precision"])
    assert own["lesion"]["recall"] == 0
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


def test_a_detector_without_masks(case, register):
    dataset, results = case
    own = run(LesionEvaluator(register(dataset)), to_outputs(dataset, results, masks=False))
    assert all(map(math.isnan, own["segm"].values()))
    assert math.isnan(own["lesion"]["iou"])
    by_boxes = evaluate_lesions(dataset, results, iou_type="bbox")
    assert own["bbox"] == same(by_boxes.bbox)
    assert own["lesion"]["TP"] == by_boxes.lesion["TP"]


def test_a_data_set_without_annotations(case, register, tmp_path):
    dataset, results = case
    pairs = to_outputs(dataset, results)
    del dataset["annotations"]
    own = run(LesionEvaluator(register(dataset), output_dir=tmp_path / "out"), pairs)
    assert own == {}
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {result["category_id"] for result in written} == {4, 9}


def test_a_data_set_in_detectron2s_own_format(case, tmp_path):
    dataset, results = case
    class_of = {4: 0, 9: 1}
    records = [
        {
            **{key: image[key] for key in ("file_name", "height", "width")},
            "image_id": image["id"],
            "annotations": [
                {
                    **{key: a[key] for key in ("bbox", "segmentation", "iscrowd")},
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": class_of[a["category_id"]],
                }
                for a in dataset["annotations"]
                if a["image_id"] == image["id"]
            ],
        }
        for image in dataset["images"]
    ]
    name = uuid.uuid4().hex
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["a", "b"])
    pairs = to_outputs(dataset, results)
    own = run(LesionEvaluator(name, output_dir=str(tmp_path)), pairs)
    expected = evaluate_lesions(dataset, results)
    assert own["segm"] == same(expected.segm)
    assert own["lesion"] == same(expected.lesion)
    assert "patient" not in own


def test_a_class_that_the_data_set_lacks(case, register):
    dataset, results = case
    pairs = to_outputs(dataset, results)
    pairs[0][1]["instances"].pred_classes[:] = 2
    with pytest.raises(ValueError, match="predicts class 2, but .* has only 2: set MODEL.ROI"):
        run(LesionEvaluator(register(dataset)), pairs)


def _evaluate_half(rank, store, json_file, pairs, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    register_coco_instances("halves", {}, json_file, folder)
    # The first has the later images, and the second one of them again, as if padded.
    half = pairs[5:] if rank == 0 else pairs[:6]
    results = run(LesionEvaluator("halves", output_dir=f"{folder}/{rank}"), half)
    torch.save(dict(results), f"{folder}/{rank}.pth")
    leave_process_groups()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(case, register, tmp_path):
    dataset, results = case
    name = register(dataset)
    pairs = to_outputs(dataset, results)
    alone = run(LesionEvaluator(name), pairs)
    json_file = MetadataCatalog.get(name).json_file
    args = (str(tmp_path / "store"), json_file, pairs, str(tmp_path))
    mp.start_processes(_evaluate_half, args, nprocs=2, start_method="forkserver")
    main, other = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert other == {}
    assert not (tmp_path / "1").exists()
    assert list(main) == list(alone)
    for group, figures in alone.items():
        assert list(main[group]) == list(figures)
        np.testing.assert_array_equal(list(main[group].values()), list(figures.values()))
