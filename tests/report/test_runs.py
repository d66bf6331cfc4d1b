import hashlib
import json
import logging

import numpy as np
import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.output import write_results
from imrcnn_d2.report.runs import load_run


def region(image_id, x, width=10, **fields):
    return rectangle(image_id, x, 0, width, 10, **fields)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The folder of a prepared data set "kvasir_seg" of two images, under $IMRCNN_DATASETS."""
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path / "datasets"))
    root = tmp_path / "datasets" / "kvasir_seg"
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2)]
    gt = {"images": images, "categories": [{"id": 1, "name": "polyp"}]}
    gt["annotations"] = [region(1, 0), region(2, 0)]
    for split in ("val", "test"):
        (root / "annotations" / f"{split}.json").write_text(json.dumps(gt))
    return root


@pytest.fixture
def trained(prepared, tmp_path):
    """
    A function that writes an OUTPUT_DIR evaluated on the data sets named: one hit of IoU 0.8, one
    miss.
    """

    def do(*names, run=None, config=None, **meta):
        output = tmp_path / "runs" / "mine"
        gt = prepared / "annotations" / "test.json"
        dt = [region(1, 0, 8, score=0.6)]
        for name in names:
            folder = output / "inference" / name
            write_results(evaluate_lesions(gt, dt, tau=0.5), folder, dataset=name, **meta)
            (folder / "coco_instances_results.json").write_text(json.dumps(dt))
        (output / "metrics.json").write_text('{"iteration": 1}\n{"iteration": 2}\n')
        if run:
            (output / "run.json").write_text(json.dumps(run))
        if config:
            (output / "config.yaml").write_text(config)
        return output

    return do


def test_a_training_of_the_time_before_run_json(trained, prepared):
    run = load_run(trained("kvasir_seg_test", "kvasir_seg_val"))
    assert (run.name, run.model, run.dataset) == ("mine", "mine", "kvasir_seg_test")
    assert run.folder.name == "kvasir_seg_test" and run.run_folder.name == "mine"
    assert (run.run, run.config, run.seed, run.fold, run.backbone) == (None,) * 5
    assert run.gt_path == prepared / "annotations" / "test.json"
    assert run.image_root == prepared / "images"
    # Scored again at the recorded threshold, 0.5, at which the detection of 0.6 counts.
    assert run.results.lesion["TP"] == run.metrics["lesion"]["TP"] == 1
    assert run.results.lesion["iou"] == pytest.approx(80)
    assert run.results is run.results


def test_what_run_json_and_config_tell(trained):
    record = {"model": "IMR-CNN", "backbone": "R-50", "seed": 3, "fold": {"index": 1, "of": 5}}
    config = "DATASETS:\n  TEST: [theirs]\n  VAL: [kvasir_seg_test]\n"
    output = trained("kvasir_seg_test", "theirs", run=record | {"finished": "x"}, config=config)
    run = load_run(output)
    assert run.dataset == "theirs"
    assert (run.model, run.backbone, run.seed) == ("IMR-CNN", "R-50", 3)
    assert run.fold == {"index": 1, "of": 5}
    assert run.config["DATASETS"]["VAL"] == ["kvasir_seg_test"]
    # The folder of an evaluation finds the training it is part of.
    inner = load_run(output / "inference" / "kvasir_seg_test")
    assert (inner.name, inner.model, inner.dataset) == ("mine", "IMR-CNN", "kvasir_seg_test")


def test_names(trained, monkeypatch):
    output = trained("kvasir_seg_test")
    assert load_run(f"ours (300)={output}").name == "ours (300)"
    assert load_run(output, name="given").name == "given"
    monkeypatch.chdir(output)
    assert load_run(".").name == "mine"
    odd = output.with_name("lr=1e-5")
    output.rename(odd)
    assert load_run(str(odd)).name == "lr=1e-5"  # a folder, not a label
    assert load_run(f"a={odd}").folder == odd / "inference" / "kvasir_seg_test"


def test_which_evaluation(trained):
    output = trained("kvasir_seg_test", "other_test", "kvasir_seg_val")
    with pytest.raises(ValueError, match="evaluated on kvasir_seg_test, other_test: give"):
        load_run(output)
    assert load_run(output, dataset="other_test").folder.name == "other_test"
    with pytest.raises(FileNotFoundError, match="no evaluation on egc_test; it has kvasir_seg_t"):
        load_run(output, dataset="egc_test")


def test_validation_is_not_taken_for_the_test_set(trained):
    config = "DATASETS:\n  TEST: [kvasir_seg_test]\n"
    with pytest.raises(FileNotFoundError, match="not evaluated on its test set.*kvasir_seg_val"):
        load_run(trained("kvasir_seg_val", config=config))


def test_no_evaluation(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no evaluation"):
        load_run(tmp_path)


def test_files_that_cannot_be_read(trained):
    output = trained("kvasir_seg_test")
    metrics = output / "inference" / "kvasir_seg_test" / "metrics.json"
    with pytest.raises(ValueError, match="metrics.json: lacks image, lesion"):
        metrics.write_text('{"meta": {}}')
        load_run(output)
    with pytest.raises(ValueError, match="metrics.json: is no JSON"):
        metrics.write_text('{"meta"')
        load_run(output)


def test_the_recorded_ground_truth(trained, prepared, tmp_path):
    there = tmp_path / "elsewhere.json"
    gt = prepared / "annotations" / "test.json"
    there.write_bytes(gt.read_bytes())
    sha256 = hashlib.sha256(gt.read_bytes()).hexdigest()
    output = trained("kvasir_seg_test", gt=str(there), gt_sha256=sha256)
    assert load_run(output).gt_path == there
    there.write_text(there.read_text() + "\n")  # changed: the prepared one is what was scored
    assert load_run(output).gt_path == gt
    there.unlink()
    assert load_run(output).gt_path == gt
    gt.write_text(gt.read_text() + "\n")
    with pytest.raises(ValueError, match="test.json is not the ground truth that was scored"):
        _ = load_run(output).gt_path
    gt.unlink()
    with pytest.raises(FileNotFoundError, match="elsewhere.json.*test.json"):
        _ = load_run(output).results


def test_detections_that_are_gone(trained):
    output = trained("kvasir_seg_test")
    (output / "inference" / "kvasir_seg_test" / "coco_instances_results.json").unlink()
    with pytest.raises(FileNotFoundError, match="coco_instances_results.json"):
        _ = load_run(output).results


def test_results_scored_without_a_training(prepared, tmp_path):
    dt = tmp_path / "dt.json"
    dt.write_text(json.dumps([region(1, 0, score=0.9)]))
    gt = prepared / "annotations" / "test.json"
    write_results(evaluate_lesions(gt, dt), tmp_path / "scores", gt=str(gt), dt=str(dt))
    run = load_run(tmp_path / "scores")
    assert (run.name, run.dataset, run.run_folder, run.run) == ("scores", None, None, None)
    assert run.gt_path == gt
    assert run.results.lesion["TP"] == 1
    assert run.image_root == prepared / "images"  # beside annotations/, as in every prepared one
    (prepared / "images").rmdir()
    with pytest.raises(FileNotFoundError, match="images"):
        _ = load_run(tmp_path / "scores").image_root


def test_a_folder_of_masks_is_scored_as_one(prepared, tmp_path):
    """The detections beside the figures are given scores of 1, which nobody predicted."""
    gt = prepared / "annotations" / "test.json"
    masks = tmp_path / "masks"
    masks.mkdir()
    outline = np.zeros((40, 50), np.uint8)
    outline[:10, :10] = 255
    for name in ("1.png", "2.png"):
        Image.fromarray(outline).save(masks / name)
    write_results(evaluate_lesions(gt, masks), tmp_path / "scores", gt=str(gt), dt=str(masks))
    (tmp_path / "scores" / "coco_instances_results.json").write_text("[]")
    results = load_run(tmp_path / "scores").results
    assert results.lesion["TP"] == 2 and np.isnan(results.segm["AP50_voc"])
    masks.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="predictions .*masks"):
        _ = load_run(tmp_path / "scores").results


def test_the_recorded_operating_point(trained):
    output = trained("kvasir_seg_test")
    path = output / "inference" / "kvasir_seg_test" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps(metrics | {"tau_val": {"tau": 0.61, "rule": "f1", "dataset": "v"}}))
    results = load_run(output).results
    assert results.tau_val["tau"] == 0.61 and results.tau_val["dataset"] == "v"
    assert results.tau_val["lesion"]["TP"] == 0 and results.lesion["TP"] == 1
    assert load_run(trained("kvasir_seg_test")).results.tau_val is None


def test_a_training_that_goes_on(trained, caplog):
    with caplog.at_level(logging.WARNING):
        load_run(trained("kvasir_seg_test", run={"model": "IMR-CNN", "finished": None}))
    assert "has not finished training" in caplog.text
