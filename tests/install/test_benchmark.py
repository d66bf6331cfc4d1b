import json
import os

import benchmark
import data_benchmark
import inference_benchmark
import model_benchmark
import numpy as np
import pytest
import torch
import video_benchmark
from detectron2.modeling.backbone import FPN
from processes import ROOT

from imrcnn_d2.cli import prepare_dataset
from imrcnn_d2.data.catalog import load_catalog
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.modeling import PAFPN

LITE = f"{ROOT}/configs/imrcnn_lite.yaml"
DATA = ["DATASETS.ROOT", "synthetic", "MODEL.TIMM.WEIGHTS", ""]
SMALL = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    out = tmp_path / "datasets" / "synthetic"
    prepare_dataset.main(["synthetic", "--out", str(out), "--num-images", "10", "--size", "96"])
    monkeypatch.setenv("IMRCNN_DATASETS", str(out.parent))
    return out


def run(command, *options, output):
    status = benchmark.main([command, "--output", str(output), *options])
    return status, json.loads(output.read_text())


def test_multiply_adds_equal_a_count_by_hand():
    out, features = 8, [torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)]
    args = (model_benchmark.GivenFeatures((4, 6)), ["res2", "res3"], out)
    first, second = 8 * 8, 4 * 4  # positions at strides 4 and 8
    fpn = (4 * first + 6 * second) * out + (first + second) * out * out * 9
    fpn += first * out  # upsampled from the level above
    assert model_benchmark.count_multiply_adds(FPN(*args), features) == fpn
    down_and_output = 2 * second * out * out * 9
    cbam = 2 * 2 * (out * 2 + 2 * out)  # two levels, two pools, two layers by way of 2 units
    cbam += (first + second) * 2 * 49  # two maps into one, 7x7
    neck = PAFPN(*args, attention="cbam", cbam_reduction=4)
    total = model_benchmark.count_multiply_adds(neck, features)
    assert total == fpn + down_and_output + cbam


def test_synthetic_data_have_the_stated_shares(tmp_path):
    truth, results = data_benchmark.synthesise(200)
    assert np.bincount([r["image_id"] for r in results])[1:].tolist() == [5] * 200
    scored = evaluate_lesions(truth, results)
    assert 60 < scored.segm["AP50_voc"] < 99 and 30 < scored.segm["AP"] < 80
    data_benchmark.write_coco(200, tmp_path / "coco.json")
    lesions = np.bincount([a["image_id"] for a in truth["annotations"]], minlength=201)[1:]
    for counts in (lesions, load_catalog(tmp_path / "coco.json", "images").lesion_counts):
        assert len(counts) == 200 and set(counts) == {0, 1, 2}
        assert np.mean(counts == 0) == pytest.approx(0.1, abs=0.06)


@pytest.mark.slow
def test_video(tmp_path, monkeypatch):
    """Of REAL-Colon's 13 % of frames with a lesion; masks are matched where there are some."""
    monkeypatch.setitem(benchmark.VIDEO_BOUNDS, "peak GiB", 0)
    options = ["--frames", "3000", "--masks"]
    status, document = run("video", *options, output=tmp_path / "video.json")
    assert status == 1
    measured = document["video"]["3000 frames"]
    assert 0 < measured["seconds"] and 0.1 < measured["peak GiB"] < 4
    video_benchmark.write_procedures(3000, tmp_path)
    truth = json.loads((tmp_path / "gt.json").read_text())
    assert len(truth["images"]) == 3000 and len(truth["videos"]) == 60
    assert len(truth["annotations"]) / 3000 == pytest.approx(0.13, abs=0.04)


@pytest.mark.slow
def test_evaluate_and_catalogue(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "BOUND_IMAGES", 20)
    monkeypatch.setattr(benchmark, "EVALUATION_BOUND", 0.0)
    monkeypatch.setattr(benchmark, "CATALOGUE_BOUND", -1.0)
    options = ["--images", "20", "--runs", "1"]
    status, document = run("evaluate", *options, output=tmp_path / "evaluate.json")
    assert status == 1
    measured = document["evaluate"]["20 images"]
    assert measured["ratio"] == pytest.approx(measured["ours, s"] / measured["COCOeval, s"])
    assert all(50 < measured[f"{side}, MiB"] < 5000 for side in ("ours", "COCOeval"))

    options = ["--images", "300", "--baseline-up-to", "300"]
    status, document = run("catalogue", *options, output=tmp_path / "catalogue.json")
    assert status == 1
    measured = document["catalogue"]["300 images"]
    for side in ("ours", "Detectron2"):
        assert 50 < measured[f"{side}, MiB before"] <= measured[f"{side}, peak MiB"] < 5000
        assert 0 <= measured[f"{side}, MiB more, peak"] < 200
        # Two forked workers share nearly all pages.
        assert measured[f"{side}, MiB of all, PSS"] < 1.5 * measured[f"{side}, peak MiB"]


def test_train_compares_the_same_training(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "TRAIN_BOUND", 1000.0)
    torch.manual_seed(0)  # with some weights, rounding makes other proposals
    plot = tmp_path / "losses.png"
    options = ["--config-file", LITE, "--device", "cpu", "--iterations", "3", "--threads", "1"]
    options += ["--precision", "fp32", "--plot", str(plot), *DATA, *SMALL]
    options += ["INPUT.MIN_SIZE_TRAIN", "(96,)", "SOLVER.IMS_PER_BATCH", "2"]
    status, document = run("train", *options, output=tmp_path / "train.json")
    measured, losses = document["train"], document["losses"]
    assert status == 1 and measured["ours, s"] > 0 and measured["Detectron2, processor s"] > 0
    # The same weights, batches and random numbers: only rounding differs.
    assert measured["first loss, relative difference"] < 1e-4 and len(losses["ours"]) == 4
    assert losses["ours"] == pytest.approx(losses["Detectron2"], rel=0.02)
    assert 0 <= measured["data time, % of ours"] < 100
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_inference_compares_the_same_model(prepared, tmp_path, monkeypatch):
    # The other sides take another ten seconds of start each.
    monkeypatch.setattr(inference_benchmark, "TORCH", {})
    monkeypatch.setattr(inference_benchmark, "EXPORTED", {"OpenVINO": ("openvino", "fp32")})
    monkeypatch.setattr(benchmark, "INFERENCE_BOUNDS", {"": 1000.0, "bf16": 1000.0})
    options = ["--config-file", LITE, "--runs", "3", "--accuracy", "2", "--threads", "1"]
    options += ["--isa", "avx2", *DATA, *SMALL, "INPUT.MIN_SIZE_TEST", "96"]
    status, document = run("inference", *options, output=tmp_path / "inference.json")
    assert status == 1, "it is not a thousand times as fast"
    measured = document["inference"]
    stock, torchvision, ours = (measured[k] for k in ("Detectron2", "torchvision R-50", "OpenVINO"))
    assert document["isa"] == "avx2" and "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert stock["times as fast"] == stock["times less processor time"] == 1
    assert torchvision["ms"] > ours["ms"] > 0
    assert all(300 < side["MiB at most"] < 4000 for side in measured.values())
    assert stock["detections"] == ours["detections"] > 10  # random weights give distinct ones
    assert ours["in one only, %"] < 10 and ours["scores differ by"] < 1e-3
    assert ours["masks overlap"] > 0.99
    best = document["limit"]
    assert best["ms at best"] == pytest.approx(1000 * best["G multiply-adds"] / best["G a second"])
