import json
import time
from pathlib import Path

import benchmark
import evaluation_benchmark
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import FPN

from imrcnn_d2 import add_imrcnn_config
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
    args = (benchmark.GivenFeatures(channels), ["res2", "res3"], out)
    first, second = 8 * 8, 4 * 4  # positions at strides 4 and 8
    fpn = (4 * first + 6 * second) * out + (first + second) * out * out * 9
    fpn += first * out  # upsampled from the level above
    assert benchmark.count_multiply_adds(FPN(*args), features(channels, size)) == fpn
    down_and_output = 2 * second * out * out * 9
    cbam = 2 * 2 * (out * 2 + 2 * out)  # two levels, two pools, two layers by way of 2 units
    cbam += (first + second) * 2 * 49  # two maps into one, 7x7
    neck = PAFPN(*args, attention="cbam", cbam_reduction=4)
    total = benchmark.count_multiply_adds(neck, features(channels, size))
    assert total == fpn + down_and_output + cbam


def test_calls_take_turns_after_a_warm_up():
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.02)

    slow_times, fast_times = benchmark.time_in_turns(
        [slow, lambda: order.append("fast")], runs=3, clock=time.perf_counter
    )
    assert order == ["slow", "fast"] * 5
    assert len(slow_times) == len(fast_times) == 3
    assert min(slow_times) >= 20  # milliseconds


def test_one_thread_is_timed_by_the_time_it_runs():
    one, two = (benchmark.choose_clock("cpu", threads) for threads in (1, 2))
    waited = []
    for clock in (one, two):
        start = clock()
        time.sleep(0.05)
        waited.append(clock() - start)
    assert waited[0] < 0.04 < waited[1]


@pytest.mark.slow
@pytest.mark.parametrize("bound, status", [(0.0, 1), (1000.0, 0)])
def test_neck_writes_its_figures_and_exits_by_the_bound(
    tmp_path, monkeypatch, capsys, bound, status
):
    monkeypatch.setattr(benchmark, "BOUND", bound)
    file = tmp_path / "neck.json"
    command = ["neck", "--case", "light_352", "--runs", "2", "--device", "cpu"]
    assert benchmark.main([*command, "--output", str(file)]) == status
    figures = json.loads(file.read_text())["necks"]["light_352"]
    # 88x88 positions and 128 channels: the pyramid's own convolutions, then theirs and ours.
    assert figures["times more multiply-adds"] == pytest.approx(1.48, abs=0.005)
    quotient = figures["times longer"] / figures["times more multiply-adds"]
    assert figures["measured / predicted"] == pytest.approx(quotient)
    assert "light_352" in capsys.readouterr().out


def test_the_cases_are_the_shapes_of_the_shipped_models():
    for name, (channels, out_channels, size, channels_last) in benchmark.NECKS.items():
        model, side = name.rsplit("_", 1)
        cfg = get_cfg()
        add_imrcnn_config(cfg)
        cfg.merge_from_file(f"{CONFIGS}/Base-IMRCNN-{model.replace('light', 'lite')}.yaml")
        cfg.MODEL.TIMM.WEIGHTS = ""
        with torch.device("meta"):
            backbone = build_backbone(cfg, ShapeSpec(channels=3))
        shapes = backbone.bottom_up.output_shape()
        assert tuple(shapes[f].channels for f in backbone.in_features) == channels
        assert cfg.MODEL.FPN.OUT_CHANNELS == out_channels
        assert cfg.MODEL.CHANNELS_LAST == channels_last
        assert size == int(side)


def test_synthesised_data_are_as_stated():
    truth, results = evaluation_benchmark.synthesise(200)
    assert len(truth["images"]) == 200
    assert np.bincount([r["image_id"] for r in results])[1:].tolist() == [5] * 200
    lesions = np.bincount([a["image_id"] for a in truth["annotations"]], minlength=201)[1:]
    assert set(lesions) == {0, 1, 2}
    assert np.mean(lesions == 0) == pytest.approx(0.1, abs=0.06)
    scored = evaluate_lesions(truth, results)
    assert 60 < scored.segm["AP50_voc"] < 99
    assert 30 < scored.segm["AP"] < 80


@pytest.mark.slow
def test_evaluate_writes_its_figures_and_exits_by_the_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "BOUND_IMAGES", 20)
    monkeypatch.setattr(benchmark, "EVALUATION_BOUND", 0.0)
    file = tmp_path / "evaluate.json"
    command = ["evaluate", "--images", "20", "--runs", "1", "--output", str(file)]
    assert benchmark.main(command) == 1
    figures = json.loads(file.read_text())["evaluate"]["20 images"]
    assert figures["ratio"] == pytest.approx(figures["ours, s"] / figures["COCOeval, s"])
    for side in ("ours", "COCOeval"):
        assert figures[f"{side}, s"] > 0
        assert 50 < figures[f"{side}, MiB"] < 5000  # Python with torch and more, not kilobytes
    assert "20 images" in capsys.readouterr().out
