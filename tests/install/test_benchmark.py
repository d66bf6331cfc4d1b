import json
import math
import os

import backbones_benchmark
import benchmark
import data_benchmark
import inference_benchmark
import machine
import model_benchmark
import numpy as np
import page
import peers_benchmark
import pytest
import torch
import video_benchmark
from detectron2.modeling.backbone import FPN
from processes import ROOT

from imrcnn_d2.cli import prepare_dataset
from imrcnn_d2.data.catalog import load_catalog
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.modeling import PAFPN

LITE = ROOT / "configs" / "imrcnn_lite.yaml"
DATA = ["DATASETS.ROOT", "synthetic", "MODEL.TIMM.WEIGHTS", ""]
SMALL = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    out = tmp_path / "datasets" / "synthetic"
    prepare_dataset.main(["synthetic", "--out", str(out), "--num-images", "10", "--size", "96"])
    monkeypatch.setenv("IMRCNN_DATASETS", str(out.parent))
    return out


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


def test_multiply_adds_of_attention_equal_a_count_by_hand():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 8, 4, stride=4)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)[:, None]  # (1, 1, 16, 8)
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    convolution, attention = 16 * 8 * 3 * 4 * 4, 2 * 16 * 16 * 8
    assert backbones_benchmark.multiply_adds(Attention(), 16) == convolution + attention


def test_the_table_of_backbones_says_what_fails_and_why():
    row, causes = backbones_benchmark.check_backbone("inception_v3")
    assert set(row.values()) == {"–"} and "inception_v3" in causes["builds"]
    entry = {"made with": "timm", "row": row, "causes": causes}
    lines = backbones_benchmark.table({"inception_v3": entry}).split("\n")
    assert lines[2].startswith("| `inception_v3` | – |")
    assert lines[-1].startswith("- `inception_v3`, builds: ValueError: MODEL.TIMM.NAME")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_small_backbones_work_everywhere(name):
    row, causes = backbones_benchmark.check_backbone(name)
    assert (
        not causes
        and [row[c] for c in ("trains", "torch", "ONNX Runtime", "OpenVINO")] == ["yes"] * 4
    )


@pytest.mark.slow
def test_synthetic_data_have_the_stated_shares(tmp_path):
    data_benchmark.write_evaluation("200", tmp_path)
    truth, results = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("gt", "dt"))
    assert np.bincount([r["image_id"] for r in results])[1:].tolist() == [5] * 200
    scored = evaluate_lesions(truth, results)
    assert 60 < scored.segm["AP50_voc"] < 99 and 30 < scored.segm["AP"] < 80
    data_benchmark.write_coco(200, tmp_path / "coco.json")
    lesions = np.bincount([a["image_id"] for a in truth["annotations"]], minlength=201)[1:]
    for counts in (lesions, load_catalog(tmp_path / "coco.json", "images").lesion_counts):
        assert len(counts) == 200 and set(counts) == {0, 1, 2}
        assert np.mean(counts == 0) == pytest.approx(0.1, abs=0.06)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Two quick benchmarks in place of the real ones, and the rows that they return."""
    rows = {
        "training": {"IMR-CNN light": {"times as fast": 1.8}},
        "neck": {"light": {"ms": math.nan}},
    }

    def run(name):
        if isinstance(rows[name], Exception):
            raise rows[name]
        return rows[name]

    runs = {name: lambda short, name=name: run(name) for name in rows}
    monkeypatch.setattr(benchmark, "BENCHMARKS", runs)
    monkeypatch.setattr(benchmark, "in_a_process", lambda run, short: run(short))
    monkeypatch.setattr(benchmark, "data_set", lambda: tmp_path / "kvasir_seg")
    monkeypatch.setattr(benchmark, "SHORT", tmp_path / "results")
    return rows


def record(folder):
    return json.loads(next(folder.glob("*.json")).read_text())["benchmarks"]


def test_the_page_is_what_the_command_makes_of_the_records(tmp_path, monkeypatch):
    """It is not edited by hand."""
    assert page.page(tmp_path).count("\nNot measured yet.\n") == len(benchmark.BENCHMARKS) + 1
    monkeypatch.setattr(benchmark, "PAGE", tmp_path / "performance.md")
    assert benchmark.main(["page"]) == 0
    written = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert written == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "{{" not in written


def test_an_interrupted_run_goes_on_with_what_is_missing(suite, tmp_path, capsys):
    suite["neck"] = RuntimeError("out of memory")
    assert benchmark.main(["all", "--short"]) == 1
    folder = tmp_path / "results"
    assert list(record(folder)) == ["training"]
    assert "out of memory" in capsys.readouterr().err

    suite["neck"], suite["training"] = {"light": {"ms": math.nan}}, RuntimeError("is there already")
    assert benchmark.main(["all", "--short"]) == 0
    assert record(folder)["neck"]["rows"] == {"light": {}}
    assert record(folder)["training"]["rows"]["IMR-CNN light"] == {"times as fast": 1.8}

    suite["training"] = {"IMR-CNN light": {"times as fast": 1.2}}
    assert benchmark.main(["all", "--short", "--only", "training"]) == 0
    assert record(folder)["training"]["rows"]["IMR-CNN light"] == {"times as fast": 1.2}
    assert list(record(folder)) == ["training", "neck"], "in one order, whatever was run last"


def test_values_of_another_library_do_not_stay(suite, tmp_path, monkeypatch):
    assert benchmark.main(["all", "--short"]) == 0
    monkeypatch.setitem(machine.LIBRARIES, "torch", "not-a-package")
    assert benchmark.main(["all", "--short", "--only", "neck"]) == 0
    assert list(record(tmp_path / "results")) == ["neck"]


def test_the_page_says_what_is_met_and_what_is_not_measured(suite, tmp_path):
    def lines(speed):
        suite["training"] = {"IMR-CNN light": {"times as fast": speed}}
        assert benchmark.main(["all", "--short", "--only", "training"]) == 0
        path, folder = next((tmp_path / "results").glob("*.json")), tmp_path / "two"
        folder.mkdir(exist_ok=True)
        ours = {"name": "here", "instructions": ["AVX2"]}  # whatever this processor has
        other = {"name": "intel-xeon-amx-4-cores", "instructions": ["AMX bf16"]}
        for file, names in (("a.json", ours), ("b.json", other)):
            content = json.loads(path.read_text())
            content["machine"] |= names
            (folder / file).write_text(json.dumps(content))
        return page.page(folder).splitlines()

    for speed, without, with_amx in ((1.69, "not met", "not met"), (1.8, "met", "not met")):
        written = lines(speed)
        training = next(line for line in written if line.startswith("| Training step"))
        cells = [cell.strip() for cell in training.split("|")[2:5]]
        assert cells == ["at least 1.7, 2 with AMX", f"{speed}, {without}", f"{speed}, {with_amx}"]
    assert written.count("**intel-xeon-amx-4-cores**: not measured on this machine") >= 5
    targets = [line for line in written if line.startswith("| ") and "at most" in line]
    assert targets and all(line.count("not measured on this machine") == 2 for line in targets)


@pytest.mark.parametrize(
    ("model", "instructions", "cores", "expected"),
    [
        ("AMD EPYC", ["AVX2"], 2, "amd-epyc-avx2-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8488C", ["AVX-512", "AMX bf16"], 2, "intel-xeon-amx-2-cores"),
        ("INTEL(R) XEON(R) CPU @ 2.30GHz", ["AVX2", "AVX-512"], 1, "intel-xeon-avx512-1-core"),
        ("13th Gen Intel(R) Core(TM) i7-13700K", ["AVX2"], 16, "intel-core-avx2-16-cores"),
        ("arm64", [], 8, "arm64-8-cores"),
    ],
)
def test_the_name_of_a_machine(model, instructions, cores, expected):
    assert machine.name(model, instructions, cores) == expected


def test_without_pypi_the_table_says_so(monkeypatch):
    ours = {"OpenVINO": {"ms": 80.0}}, {"G multiply-adds": 2.4, "ms at best": 34.0}
    monkeypatch.setattr(benchmark, "compare_predictions", lambda *args, **options: ours)
    monkeypatch.setattr(benchmark, "load_for_prediction", lambda *args: None)
    monkeypatch.setattr(peers_benchmark, "install", lambda: False)
    rows = benchmark.prediction(short=True)
    assert rows["OpenVINO"] == {"ms": 80.0}
    assert any("yolo11s-seg" in name and "PyPI" in name and not row for name, row in rows.items())


@pytest.mark.slow
def test_procedures(tmp_path):
    """Of REAL-Colon's 13 % of frames with a lesion; masks are matched where there are some."""
    measured = video_benchmark.measure_sizes(3000, masks=True)
    assert 0 < measured["seconds"] and 0.1 < measured["peak GiB"] < 4
    video_benchmark.write_procedures(3000, tmp_path)
    truth = json.loads((tmp_path / "gt.json").read_text())
    assert len(truth["images"]) == 3000 and len(truth["videos"]) == 60
    assert len(truth["annotations"]) / 3000 == pytest.approx(0.13, abs=0.04)


@pytest.mark.slow
def test_evaluation_and_catalogue():
    measured = data_benchmark.compare_evaluations(20, runs=1)
    assert measured["ratio"] == pytest.approx(measured["ours, s"] / measured["COCOeval, s"])
    assert all(50 < measured[f"{side}, MiB"] < 5000 for side in ("ours", "COCOeval"))
    assert 0 < measured["ratio without boundaries"] < measured["ratio"]
    alone = data_benchmark.compare_evaluations(20, runs=1, baseline=False)
    assert set(alone) == {"ours, s", "ours, wall s", "ours, MiB"}

    measured = data_benchmark.compare_catalogs(300, baseline=True)
    assert set(measured) == {"ours", "Detectron2"}
    for side in measured.values():
        assert 50 < side["peak MiB"] < 5000 and 0 <= side["MiB more, peak"] < 200
        # Two forked workers share nearly all pages.
        assert side["MiB of all, PSS"] < 1.5 * side["peak MiB"]


@pytest.mark.slow
def test_train_compares_the_same_training(prepared, tmp_path):
    torch.manual_seed(0)  # with some weights, rounding makes other proposals
    options = ["MODEL.DEVICE", "cpu", *DATA, *SMALL, "INPUT.MIN_SIZE_TRAIN", "(96,)"]
    cfg = benchmark.load(
        LITE, [*options, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.AMP.PRECISION", "fp32"]
    )
    measured, ours, theirs = model_benchmark.compare_steps(cfg, 3)
    assert measured["bits"] == 32
    assert measured["ours, s"] > 0 and measured["Detectron2, processor s"] > 0
    # The same weights, batches and random numbers: only rounding differs.
    assert measured["first loss, relative difference"] < 1e-4 and len(ours) == 4
    assert ours == pytest.approx(theirs, rel=0.02)
    assert 0 <= measured["data time, % of ours"] < 100
    model_benchmark.plot_losses(ours, theirs, plot := tmp_path / "losses.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_inference_compares_the_same_model(prepared, monkeypatch):
    # The other sides take another ten seconds of start each.
    monkeypatch.setattr(inference_benchmark, "TORCH", {})
    monkeypatch.setattr(inference_benchmark, "EXPORTED", {"OpenVINO": ("openvino", "fp32")})
    opts = [*DATA, *SMALL, "INPUT.MIN_SIZE_TEST", "96"]
    measured, best = inference_benchmark.compare_predictions(
        benchmark.load_for_prediction(LITE, "", opts),
        "",
        isa="avx2",
        bf16=False,
        threads=1,
        runs=3,
        accuracy=2,
        peers={"network": (fixed_network,)},
    )
    stock, torchvision, ours = (measured[k] for k in ("Detectron2", "torchvision R-50", "OpenVINO"))
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ
    assert stock["times as fast"] == stock["times less processor time"] == 1
    assert torchvision["ms"] > ours["ms"] > measured["network"]["ms"] > 0
    assert "detections" not in measured["network"], "peers are only timed"
    assert all(100 < side["MiB at most"] < 4000 for side in measured.values())
    assert stock["detections"] == ours["detections"] > 10  # random weights give distinct ones
    assert ours["in one only, %"] < 10 and ours["scores differ by"] < 1e-3
    assert ours["masks overlap"] > 0.99
    assert best["ms at best"] == pytest.approx(1000 * best["G multiply-adds"] / best["G a second"])


def fixed_network():
    return lambda path: None
