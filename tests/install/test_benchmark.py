import json
import os
import time
from pathlib import Path

import benchmark
import data_benchmark
import inference_benchmark
import model_benchmark
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead, StandardROIHeads

from imrcnn_d2 import add_imrcnn_config
from imrcnn_d2.cli import prepare_dataset
from imrcnn_d2.data.catalog import load_catalog
from imrcnn_d2.deploy import Predictor
from imrcnn_d2.engine import load_config
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.modeling import PAFPN

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def features(channels, size):
    return [torch.randn(1, c, size // 2**k, size // 2**k) for k, c in enumerate(channels, start=2)]


def test_multiply_adds_are_those_counted_by_hand():
    channels, out, size = (4, 6), 8, 32
    args = (model_benchmark.GivenFeatures(channels), ["res2", "res3"], out)
    first, second = 8 * 8, 4 * 4  # positions at strides 4 and 8
    fpn = (4 * first + 6 * second) * out + (first + second) * out * out * 9
    fpn += first * out  # upsampled from the level above
    assert model_benchmark.count_multiply_adds(FPN(*args), features(channels, size)) == fpn
    down_and_output = 2 * second * out * out * 9
    cbam = 2 * 2 * (out * 2 + 2 * out)  # two levels, two pools, two layers by way of 2 units
    cbam += (first + second) * 2 * 49  # two maps into one, 7x7
    neck = PAFPN(*args, attention="cbam", cbam_reduction=4)
    total = model_benchmark.count_multiply_adds(neck, features(channels, size))
    assert total == fpn + down_and_output + cbam


def test_calls_take_turns_after_a_warm_up():
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.02)

    slow_times, fast_times = model_benchmark.time_in_turns(
        [slow, lambda: order.append("fast")], runs=3, clock=time.perf_counter
    )
    assert order == ["slow", "fast"] * 5
    assert len(slow_times) == len(fast_times) == 3
    assert min(slow_times) >= 20  # milliseconds


def test_one_thread_is_timed_by_the_time_it_runs():
    one, two = (model_benchmark.choose_clock("cpu", threads) for threads in (1, 2))
    waited = []
    for clock in (one, two):
        start = clock()
        time.sleep(0.05)
        waited.append(clock() - start)
    assert waited[0] < 0.04 < waited[1]


@pytest.mark.slow
@pytest.mark.parametrize("bound, status", [(0.0, 1), (1000.0, 0)])
def test_neck_writes_its_measured_and_exits_by_the_bound(
    tmp_path, monkeypatch, capsys, bound, status
):
    monkeypatch.setattr(benchmark, "NECK_BOUND", bound)
    file = tmp_path / "neck.json"
    command = ["neck", "--case", "light_352", "--runs", "2", "--device", "cpu"]
    assert benchmark.main([*command, "--output", str(file)]) == status
    measured = json.loads(file.read_text())["necks"]["light_352"]
    # 88x88 positions and 64 channels: the pyramid's own convolutions, then theirs and ours.
    assert measured["times more multiply-adds"] == pytest.approx(1.47, abs=0.005)
    quotient = measured["times longer"] / measured["times more multiply-adds"]
    assert measured["measured / predicted"] == pytest.approx(quotient)
    assert "light_352" in capsys.readouterr().out


def test_the_cases_are_the_shapes_of_the_shipped_models():
    for name, (channels, out_channels, size, channels_last) in model_benchmark.NECKS.items():
        model, side = name.rsplit("_", 1)
        cfg = get_cfg()
        add_imrcnn_config(cfg)
        cfg.merge_from_file(f"{CONFIGS}/imrcnn_{model.replace('light', 'lite')}.yaml")
        cfg.MODEL.TIMM.WEIGHTS = ""
        with torch.device("meta"):
            backbone = build_backbone(cfg, ShapeSpec(channels=3))
        shapes = backbone.bottom_up.output_shape()
        assert tuple(shapes[f].channels for f in backbone.in_features) == channels
        assert cfg.MODEL.FPN.OUT_CHANNELS == out_channels
        assert cfg.MODEL.CHANNELS_LAST == channels_last
        assert size == int(side)


def test_synthesised_data_are_as_stated():
    truth, results = data_benchmark.synthesise(200)
    assert len(truth["images"]) == 200
    assert np.bincount([r["image_id"] for r in results])[1:].tolist() == [5] * 200
    lesions = np.bincount([a["image_id"] for a in truth["annotations"]], minlength=201)[1:]
    assert set(lesions) == {0, 1, 2}
    assert np.mean(lesions == 0) == pytest.approx(0.1, abs=0.06)
    scored = evaluate_lesions(truth, results)
    assert 60 < scored.segm["AP50_voc"] < 99
    assert 30 < scored.segm["AP"] < 80


@pytest.mark.slow
def test_evaluate_writes_its_measured_and_exits_by_the_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "BOUND_IMAGES", 20)
    monkeypatch.setattr(benchmark, "EVALUATION_BOUND", 0.0)
    file = tmp_path / "evaluate.json"
    command = ["evaluate", "--images", "20", "--runs", "1", "--output", str(file)]
    assert benchmark.main(command) == 1
    measured = json.loads(file.read_text())["evaluate"]["20 images"]
    assert measured["ratio"] == pytest.approx(measured["ours, s"] / measured["COCOeval, s"])
    for side in ("ours", "COCOeval"):
        assert measured[f"{side}, s"] > 0
        assert 50 < measured[f"{side}, MiB"] < 5000  # Python with torch and more, not kilobytes
    assert "20 images" in capsys.readouterr().out


@pytest.mark.slow
def test_catalogue_writes_its_measured_and_exits_by_the_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CATALOGUE_BOUND", -1.0)
    file = tmp_path / "catalogue.json"
    command = ["catalogue", "--images", "300", "--baseline-up-to", "300", "--output", str(file)]
    assert benchmark.main(command) == 1
    measured = json.loads(file.read_text())["catalogue"]["300 images"]
    for side in ("ours", "Detectron2"):
        assert measured[f"{side}, s"] > 0
        assert 50 < measured[f"{side}, MiB before"] <= measured[f"{side}, peak MiB"] < 5000
        assert 0 <= measured[f"{side}, MiB more, peak"] < 200
        # Two workers that were forked share nearly all pages.
        assert measured[f"{side}, MiB of all, PSS"] < 1.5 * measured[f"{side}, peak MiB"]
    assert "300 images" in capsys.readouterr().out


def test_synthesised_files_are_as_stated(tmp_path):
    data_benchmark.write_coco(200, tmp_path / "coco.json")
    counts = load_catalog(tmp_path / "coco.json", "images").lesion_counts
    assert len(counts) == 200 and set(counts) == {0, 1, 2}
    assert np.mean(counts == 0) == pytest.approx(0.1, abs=0.06)


@pytest.fixture
def tiny_training(tmp_path, monkeypatch):
    """Arguments of the training benchmark for eight synthetic images."""
    out = tmp_path / "datasets" / "synthetic"
    prepare = ["synthetic", "--out", str(out), "--num-images", "8", "--size", "96"]
    prepare_dataset.main([*prepare, "--ratio", "1:0:0"])
    monkeypatch.setenv("IMRCNN_DATASETS", str(out.parent))
    torch.manual_seed(0)  # of some weights, rounding makes other proposals
    return [
        *("--config-file", f"{CONFIGS}/imrcnn_lite.yaml", "--device", "cpu"),
        *("--iterations", "3", "--precision", "fp32", "--threads", "1"),
        *("DATASETS.ROOT", "synthetic", "MODEL.TIMM.WEIGHTS", ""),
        *("INPUT.MIN_SIZE_TRAIN", "(96,)", "SOLVER.IMS_PER_BATCH", "2"),
        *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    ]


def test_train_compares_the_same_training(tiny_training, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "TRAIN_BOUND", 1000.0)
    file, picture = tmp_path / "train.json", tmp_path / "losses.png"
    command = ["train", "--output", str(file), "--picture", str(picture), *tiny_training]
    assert benchmark.main(command) == 1
    document = json.loads(file.read_text())
    measured = document["train"]
    assert measured["ours, s"] > 0 and measured["Detectron2, processor s"] > 0
    # The same weights, batches and random numbers: only rounding differs.
    assert measured["first loss, relative difference"] < 1e-4
    assert document["losses"]["ours"] == pytest.approx(document["losses"]["Detectron2"], rel=0.02)
    assert len(document["losses"]["ours"]) == 4
    assert 0 <= measured["data time, % of ours"] < 100
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "times as fast" in capsys.readouterr().out


def test_inference_compares_the_same_model(tmp_path, monkeypatch, capsys):
    out = tmp_path / "datasets" / "synthetic"
    prepare_dataset.main(["synthetic", "--out", str(out), "--num-images", "10", "--size", "96"])
    monkeypatch.setenv("IMRCNN_DATASETS", str(out.parent))
    # The other sides take another ten seconds of start each.
    monkeypatch.setattr(inference_benchmark, "TORCH", {})
    monkeypatch.setattr(inference_benchmark, "EXPORTED", {"OpenVINO": ("openvino", "fp32")})
    monkeypatch.setattr(benchmark, "INFERENCE_BOUNDS", {"": 1000.0, "bf16": 1000.0})
    file = tmp_path / "inference.json"
    command = ["inference", "--config-file", f"{CONFIGS}/imrcnn_lite.yaml"]
    command += ["--runs", "3", "--accuracy", "2", "--threads", "1", "--isa", "avx2"]
    command += [
        "--output",
        str(file),
        "DATASETS.ROOT",
        "synthetic",
        "INPUT.MIN_SIZE_TEST",
        "96",
        "MODEL.TIMM.WEIGHTS",
        "",
    ]
    command += ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]
    assert benchmark.main(command) == 1, "it is not a thousand times as fast"
    document = json.loads(file.read_text())
    measured = document["inference"]
    stock, torchvision, ours = (measured[k] for k in ("Detectron2", "torchvision R-50", "OpenVINO"))
    assert document["isa"] == "avx2" and "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert stock["times as fast"] == stock["times less processor time"] == 1
    assert torchvision["ms"] > ours["ms"] > 0
    assert all(300 < side["MiB at most"] < 4000 for side in measured.values())
    assert stock["detections"] == ours["detections"] > 2
    assert ours["in one only, %"] < 10 and ours["scores differ by"] < 1e-3
    assert ours["masks overlap"] > 0.99
    best = document["limit"]
    assert best["ms at best"] == pytest.approx(1000 * best["G multiply-adds"] / best["G a second"])
    printed = capsys.readouterr().out
    assert "times less processor time" in printed and "multiply-adds take" in printed


def test_the_limit_counts_the_networks_products(monkeypatch):
    monkeypatch.setattr(inference_benchmark, "_product_seconds", lambda: 2.0)
    model = torch.nn.Conv2d(3, 8, 3, padding=1)
    model.forward = lambda batch, conv=model.forward: conv(batch[0]["image"].float()[None])
    best = inference_benchmark.limit(model, torch.zeros(3, 10, 20, dtype=torch.uint8), 1)
    assert best["G multiply-adds"] == pytest.approx(10 * 20 * 3 * 8 * 9 / 1e9)
    assert best["G a second"] == pytest.approx(2048**3 / 2 / 1e9)


def test_random_weights_tell_detections_apart(tmp_path, monkeypatch):
    out = tmp_path / "datasets" / "synthetic"
    prepare_dataset.main(["synthetic", "--out", str(out), "--num-images", "10", "--size", "96"])
    monkeypatch.setenv("IMRCNN_DATASETS", str(out.parent))
    opts = ["DATASETS.ROOT", "synthetic", "MODEL.TIMM.WEIGHTS", ""]
    cfg = load_config(f"{CONFIGS}/imrcnn_lite.yaml", opts)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    weights = inference_benchmark._random_weights(cfg, tmp_path)
    predictor = Predictor(tmp_path / "config.yaml", weights, device="cpu")
    (found,) = predictor([DatasetCatalog.get("synthetic_train")[0]["file_name"]])
    assert len(found) > 10 and found.scores.std() > 0.05
    assert len(found.scores.unique()) > 0.9 * len(found)
    filled = found.pred_masks.float().sum((1, 2)) / found.pred_boxes.area().clamp(min=1)
    assert 0.05 < filled.mean() < 0.95, "masks are neither empty nor their boxes"


def test_accuracy_is_that_of_the_data_set(tmp_path, monkeypatch):
    out = tmp_path / "datasets" / "synthetic"
    prepare_dataset.main(["synthetic", "--out", str(out), "--num-images", "10", "--size", "96"])
    monkeypatch.setenv("IMRCNN_DATASETS", str(out.parent))
    opts = ["DATASETS.ROOT", "synthetic", "MODEL.TIMM.WEIGHTS", ""]
    cfg = load_config(f"{CONFIGS}/imrcnn_lite.yaml", opts)
    records = DatasetCatalog.get("synthetic_test")
    truth = json.loads((out / "annotations" / "test.json").read_text())
    classes = {c["id"]: i for i, c in enumerate(sorted(truth["categories"], key=lambda c: c["id"]))}
    found = [
        [
            {**a, "category_id": classes[a["category_id"]], "score": 0.9}
            for a in truth["annotations"]
            if a["image_id"] == record["image_id"]
        ]
        for record in records
    ]
    accuracy = inference_benchmark._accuracy(cfg, records, found)
    assert accuracy == {"AP50_voc": 100, "iou": 100}
    half = inference_benchmark._accuracy(cfg, records[:1], found[:1])
    assert half == {"AP50_voc": 100, "iou": 100}, "those left out are no misses"
    assert inference_benchmark._accuracy(cfg, records, [[] for _ in records])["AP50_voc"] == 0


def test_a_side_that_fails_says_why(tmp_path):
    side = inference_benchmark.Side(inference_benchmark._ours, None, tmp_path / "no.onnx", None)
    try:
        with pytest.raises(FileNotFoundError, match="no.onnx"):
            side.ask("seconds", "a.png")
    finally:
        side.stop()


def test_the_other_side_is_of_detectron2s_own_parts():
    cfg = load_config(f"{CONFIGS}/imrcnn_lite.yaml", ["MODEL.TIMM.WEIGHTS", ""])
    cfg.MODEL.DEVICE = "meta"
    model = build_model(model_benchmark.stock_config(cfg))
    assert type(model.roi_heads) is StandardROIHeads
    assert type(model.roi_heads.mask_head) is MaskRCNNConvUpsampleHead
    assert type(model.roi_heads.box_pooler) is ROIPooler
    assert type(model.proposal_generator.rpn_head) is StandardRPNHead
    assert model.state_dict().keys() == build_model(cfg).state_dict().keys()
