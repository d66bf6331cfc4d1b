"""Which evaluation a run is, and where its ground truth, images and predictions are found."""

import json
import logging

import numpy as np
import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.output import write_results
from imrcnn_d2.report import load_run
from imrcnn_d2.utils.files import file_sha256

RESULTS = "coco_instances_results.json"


@pytest.fixture
def gt(tmp_path, monkeypatch):
    """The test set of a prepared data set "kvasir_seg" of two images, in $IMRCNN_DATASETS."""
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path / "datasets"))
    root = tmp_path / "datasets" / "kvasir_seg"
    for folder in ("images", "annotations"):
        (root / folder).mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2)]
    content = {"images": images, "categories": [{"id": 1, "name": "polyp"}]}
    content["annotations"] = [rectangle(i, 0, 0, 10, 10) for i in (1, 2)]
    for split in ("val", "test"):
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root / "annotations" / "test.json"


@pytest.fixture
def trained(gt, tmp_path):
    """A function that writes an OUTPUT_DIR evaluated on the data sets named: one hit of IoU 0.8,
    one miss.
    """

    def do(*names, run=None, config=None, **meta):
        output = tmp_path / "runs" / "mine"
        dt = [rectangle(1, 0, 0, 8, 10, score=0.6)]
        results = evaluate_lesions(gt, dt, tau=0.5)
        for name in names:
            write_results(results, output / "inference" / name, dataset=name, **meta)
            (output / "inference" / name / RESULTS).write_text(json.dumps(dt))
        if run:
            (output / "run.json").write_text(json.dumps(run))
        if config:
            (output / "config.yaml").write_text(config)
        return output

    return do


def test_a_training_without_run_json_and_config(trained, gt, monkeypatch):
    output = trained("kvasir_seg_test", "kvasir_seg_val")
    run = load_run(output)
    assert (run.name, run.model, run.dataset) == ("mine", "mine", "kvasir_seg_test")
    assert run.folder.name == "kvasir_seg_test" and run.run_folder.name == "mine"
    assert (run.seed, run.fold, run.backbone) == (None,) * 3 and not run.record and not run.config
    assert run.gt_path == gt and run.image_root == gt.parent.parent / "images"
    # Scored again at the recorded threshold, 0.5, which the detection of 0.6 reaches.
    assert run.results.lesion["TP"] == run.metrics["lesion"]["TP"] == 1
    assert run.results.lesion["iou"] == pytest.approx(80) and run.results.tau_val is None
    path = output / "inference" / "kvasir_seg_test" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps(metrics | {"tau_val": {"tau": 0.61, "rule": "f1", "dataset": "v"}}))
    results = load_run(output).results
    assert results.tau_val["tau"] == 0.61 and results.tau_val["dataset"] == "v"
    assert results.tau_val["lesion"]["TP"] == 0 and results.lesion["TP"] == 1

    assert load_run(f"ours (300)={output}").name == "ours (300)"
    assert load_run(output, name="given").name == "given"
    monkeypatch.chdir(output)
    assert load_run(".").name == "mine"
    odd = output.with_name("lr=1e-5")
    output.rename(odd)
    assert load_run(str(odd)).name == "lr=1e-5"  # a folder, not a label
    (odd / "inference" / "kvasir_seg_test" / RESULTS).unlink()
    with pytest.raises(FileNotFoundError, match=RESULTS):
        _ = load_run(f"a={odd}").results


def test_run_json_and_config(trained, caplog):
    record = {"model": "IMR-CNN", "backbone": "R-50", "seed": 3, "fold": {"index": 1, "of": 5}}
    config = "DATASETS:\n  TEST: [theirs]\n  VAL: [kvasir_seg_test]\n"
    with caplog.at_level(logging.WARNING):
        run = load_run(trained("kvasir_seg_test", "theirs", run=record, config=config))
    assert "has not finished training" in caplog.text
    assert (run.dataset, run.model, run.backbone, run.seed) == ("theirs", "IMR-CNN", "R-50", 3)
    assert run.fold == {"index": 1, "of": 5}
    assert run.settings["DATASETS.VAL"] == ["kvasir_seg_test"]
    # The folder of an evaluation finds the training it is part of.
    inner = load_run(run.run_folder / "inference" / "kvasir_seg_test")
    assert (inner.name, inner.model, inner.dataset) == ("mine", "IMR-CNN", "kvasir_seg_test")


def test_which_evaluation(trained, tmp_path):
    output = trained("kvasir_seg_val", config="DATASETS:\n  TEST: [kvasir_seg_test]\n")
    with pytest.raises(FileNotFoundError, match="kvasir_seg_test.*kvasir_seg_val"):
        load_run(output)  # validation is not taken for the test set
    (output / "config.yaml").unlink()
    trained("kvasir_seg_test", "other_test")
    with pytest.raises(ValueError, match="kvasir_seg_test, other_test"):
        load_run(output)
    assert load_run(output, dataset="other_test").folder.name == "other_test"
    with pytest.raises(FileNotFoundError, match="egc_test"):
        load_run(output, dataset="egc_test")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=str(folder)):
            load_run(folder)


def test_the_recorded_ground_truth(trained, gt, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_bytes(gt.read_bytes())
    output = trained("kvasir_seg_test", gt=str(elsewhere), gt_sha256=file_sha256(gt))
    assert load_run(output).gt_path == elsewhere
    elsewhere.write_text(elsewhere.read_text() + "\n")  # changed: the prepared one was scored
    assert load_run(output).gt_path == gt
    elsewhere.unlink()
    assert load_run(output).gt_path == gt
    gt.write_text(gt.read_text() + "\n")
    with pytest.raises(ValueError, match=str(gt)):
        _ = load_run(output).gt_path
    gt.unlink()
    with pytest.raises(FileNotFoundError, match="elsewhere.json.*test.json"):
        _ = load_run(output).results


@pytest.mark.parametrize("masks", [False, True])
def test_results_scored_without_a_training(gt, tmp_path, masks):
    """Masks are not detections: those next to their metrics have scores that nobody predicted."""
    dt, scores = tmp_path / "dt", tmp_path / "scores"
    if masks:
        dt.mkdir()
        mask = np.zeros((40, 50), np.uint8)
        mask[:10, :10] = 255
        for name in ("1.png", "2.png"):
            Image.fromarray(mask).save(dt / name)
        scores.mkdir()
        (scores / RESULTS).write_text("[]")
    else:
        dt.write_text(json.dumps([rectangle(1, 0, 0, 10, 10, score=0.9)]))
    write_results(evaluate_lesions(gt, dt), scores, gt=str(gt), dt=str(dt))
    run = load_run(scores)
    assert (run.name, run.dataset, run.run_folder, run.record) == ("scores", None, None, {})
    images = gt.parent.parent / "images"
    assert run.gt_path == gt and run.image_root == images
    assert run.results.lesion["TP"] == 1 + masks
    assert np.isnan(run.results.segm["AP50_voc"]) == masks
    images.rmdir()
    with pytest.raises(FileNotFoundError, match="images"):
        _ = load_run(scores).image_root
    dt.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=str(dt)):
        _ = load_run(scores).results
