"""The command robustness, from weights to plots."""

import json

import pytest
import torch
from detectron2.modeling import build_model

from imrcnn_d2.cli import robustness
from imrcnn_d2.data.formats import read_kvasir_seg
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.engine import load_config
from imrcnn_d2.evaluation.output import read_test_log
from imrcnn_d2.utils.files import Rejects

OPTS = [
    *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96, "MODEL.DEVICE", "cpu"),
    *("MODEL.TIMM.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.RPN.POST_NMS_TOPK_TEST", 3),
]


@pytest.fixture
def weights(kvasir_original, tmp_path, monkeypatch):
    """Of a tiny random model; five real images are the test set."""
    cfg = load_config("configs/imrcnn_lite.yaml", ["DATASETS.ROOT", "kvasir_seg", *OPTS])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    rejects, options = Rejects(), SplitOptions(ratio=(0, 0, 1))
    source = read_kvasir_seg(kvasir_original, rejects)
    prepare_dataset(source, tmp_path / "sets" / "kvasir_seg", options, rejects)
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path / "sets"))
    return tmp_path / "model.pth"


def run(*arguments):
    robustness.main([str(argument) for argument in arguments])


def test_evaluate_and_plot(weights, tmp_path, capsys):
    out = tmp_path / "one"
    common = ["--weights", weights, "--dataset", "kvasir_seg_test", "--num-images", 2]
    run(*common, "--distortions", "rotation", "--output", out, "--batch-size", 2, "--tau", 0.3)
    printed = capsys.readouterr().out
    assert "IMR-CNN: lesion/f1" in printed and "rotation" in printed
    document = json.loads((out / "robustness.json").read_text())
    assert len(document["rows"]) == 6
    assert document["meta"]["tau"] == 0.3
    assert document["meta"]["dataset"] == "kvasir_seg_test"
    assert document["meta"]["images"] == 2
    # the model sees what predict.py would: a detection of category 1, of a size that fits
    assert all(row["segm/AP50"] is not None for row in document["rows"])
    names = {path.name for path in out.iterdir()}
    assert names == {"robustness.json", "robustness.csv", "robustness.png", "distortions.jpg"}
    gt = tmp_path / "sets" / "kvasir_seg" / "annotations" / "test.json"
    assert [entry["output"] for entry in read_test_log(gt)] == [str(out)]

    run("--plot", f"A={out}", f"B={out}", "--output", tmp_path / "both", "--figure", "image/miou")
    assert (tmp_path / "both" / "robustness.png").stat().st_size
    assert "B: image/miou" in capsys.readouterr().out

    for arguments, message in (
        (["--plot", out, out, "--output", tmp_path / "x"], "two models are called IMR-CNN"),
        (["--plot", tmp_path, "--output", tmp_path / "x"], "robustness.json"),
        ([*common, "--output", out], "holds results with tau 0.3"),
        (["--weights", weights, "--output", out], "--weights needs --dataset"),
        ([*common, "--output", out, "--batch-size", 0], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err
