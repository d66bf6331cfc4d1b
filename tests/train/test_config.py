"""Shipped configs and their earlier paths, foreign configs, overrides, data sets and devices."""

import re
from pathlib import Path

import pytest
import torch
from config_keys import flat
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN

from imrcnn_d2 import add_imrcnn_config
from imrcnn_d2.config import get_node
from imrcnn_d2.engine import choose_device, load_config
from imrcnn_d2.engine import config as engine_config
from imrcnn_d2.modeling import PAFPN

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))
RUNNABLE = [name for name in SHIPPED if not name.startswith("Base-")]
CLASSIFIERS = ["efficientnet_lite0.yaml", "inception_v3.yaml", "resnet50.yaml", "vgg19.yaml"]
CPU = ("MODEL.DEVICE", "cpu")


def test_a_foreign_config_gets_the_defaults_and_keeps_its_own():
    cfg = get_cfg()
    assert get_node(cfg, "MODEL.PAFPN").INIT == "identity"
    assert "PAFPN" not in cfg.MODEL  # a look changes nothing
    cfg.MODEL.PAFPN = CfgNode({"INIT": "xavier"})
    assert get_node(cfg, "MODEL.PAFPN") is cfg.MODEL.PAFPN
    add_imrcnn_config(cfg)
    ours = dict(flat(cfg))
    assert all(ours[key] == value for key, value in flat(get_cfg())), "Detectron2's are kept"


def structure(cfg):
    """The model, without memory."""
    cfg.MODEL.DEVICE = "meta"
    if "TIMM" in cfg.MODEL:
        cfg.MODEL.TIMM.WEIGHTS = ""
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name not in CLASSIFIERS])
def test_every_shipped_config_builds_the_model_it_is_named_after(name):
    cfg = load_config(name, CPU)
    system, depth = re.match("(mrcnn|ibmrcnn|imrcnn)_(R_50|R_101|lite)", name).groups()
    model = structure(cfg)
    backbone = model.backbone
    attention = [n for n, _ in backbone.named_children() if n.startswith("cbam")]
    assert type(backbone) is (FPN if system == "mrcnn" else PAFPN)
    assert len(attention) == (4 if system == "imrcnn" else 0)
    if depth == "lite":
        assert "conv_stem" in dict(backbone.bottom_up.body.named_children())
    else:  # the zoo's Mask R-CNN with a neck, which begins as the identity
        zoo_file = f"COCO-InstanceSegmentation/mask_rcnn_{depth}_FPN_3x.yaml"
        path = cfg.MODEL.WEIGHTS.removeprefix("detectron2://")
        assert model_zoo.get_checkpoint_url(zoo_file).endswith(f"/detectron2/{path}")
        zoo = model_zoo.get_config(zoo_file)
        zoo.MODEL.ROI_HEADS.NUM_CLASSES = 1
        assert cfg.MODEL.PAFPN.INIT == "identity" and cfg.INPUT.FORMAT == zoo.INPUT.FORMAT
        # Weights fit only the pixels, anchors and boxes they were trained with.
        for key in ("PIXEL_MEAN", "PIXEL_STD", "ANCHOR_GENERATOR"):
            assert cfg.MODEL[key] == zoo.MODEL[key], key
        assert cfg.MODEL.RPN.BBOX_REG_WEIGHTS == zoo.MODEL.RPN.BBOX_REG_WEIGHTS
        new = ("backbone.pan_", "backbone.cbam")
        ours = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(new)}
        assert ours == {k: v.shape for k, v in structure(zoo).state_dict().items()}
    assert model.roi_heads.num_classes == 1
    assert list(backbone.output_shape()) == cfg.MODEL.RPN.IN_FEATURES
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.05
    assert cfg.MODEL.IMRCNN.SCORE_THRESH == 0.7
    if "_paper" in name:
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (1e-5, 1e-8)
        assert (cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.NEW_LAYER_LR_FACTOR) == (100, 1)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_is_of_the_backbone_it_is_named_after(name):
    cfg = load_config(name, CPU)
    stem = Path(name).stem
    assert cfg.MODEL.TIMM.NAME == (f"tf_{stem}" if stem.endswith("lite0") else stem)
    model = structure(cfg)
    assert model.head.out_features == 3
    if stem == "vgg19":  # 16 convolutions (Simonyan and Zisserman), and the head
        assert sum(p.numel() for p in model.parameters()) == 20_024_384 + 3 * (512 + 1)
    assert [phase["trainable"] for phase in cfg.SOLVER.PHASES] == ["head", "all"]
    assert cfg.SOLVER.PHASES[0]["lr"] > cfg.SOLVER.PHASES[1]["lr"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_config_to_run_takes_its_data_set_from_root(name):
    for shipped in (name, "Base-RCNN.yaml", "Base-Classifier.yaml"):
        content = (CONFIGS / shipped).read_text()
        assert "DEVICE:" not in content and "DATASETS:" not in content
    cfg = load_config(CONFIGS / name, ["DATASETS.ROOT", "some/folder/", *CPU])
    for split in ("TRAIN", "VAL", "TEST"):
        assert cfg.DATASETS[split] == (f"folder_{split.lower()}",)
    demo = name == "imrcnn_lite_demo.yaml"
    assert cfg.OUTPUT_DIR == ("output/demo" if demo else f"output/folder/{Path(name).stem}")
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS


EARLIER = {  # paths of version 0.1.0: the config, the data set, OUTPUT_DIR
    f"{data}/{stem}": (stem, data, f"output/{data}/{stem}")
    for data in ("kvasir_seg", "egc", "synthetic")
    for stem in ("mrcnn_R_50", "ibmrcnn_lite", "imrcnn_R_101", "imrcnn_R_50_paper")
} | {
    "recognition/vgg19": ("vgg19", "gastric_recognition", "output/recognition/vgg19"),
    "recognition/lite": ("efficientnet_lite0", "gastric_recognition", "output/recognition/lite"),
    "synthetic/imrcnn_lite_demo": ("imrcnn_lite_demo", "synthetic", "output/demo"),
    "Base-IBMRCNN-R_101": ("ibmrcnn_R_101", "", "./output"),
    "Base-Recognition": ("Base-Classifier", "gastric_recognition", "./output"),
}


@pytest.mark.parametrize("name", EARLIER)
def test_paths_of_earlier_versions_give_the_same_config_with_a_warning(name, caplog, tmp_path):
    new, data, output = EARLIER[name]
    root = ["DATASETS.ROOT", data] if data else []
    expected = load_config(f"{new}.yaml", [*root, *CPU, "OUTPUT_DIR", output])
    assert load_config(f"configs/{name}.yaml", CPU) == expected
    assert f"{new}.yaml" in caplog.text
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {CONFIGS}/{name}.yaml\nSEED: 7\n")
    expected.SEED = 7
    assert load_config(tmp_path / "mine.yaml", CPU) == expected


def test_named_splits_win_over_root(tmp_path):
    root = ["DATASETS.ROOT", "mine", *CPU]
    cfg = load_config("imrcnn_lite.yaml", [*root, "DATASETS.TEST", ("other",), "DATASETS.VAL", ()])
    (tmp_path / "config.yaml").write_text(cfg.dump())  # as a run keeps it
    again = load_config(tmp_path / "config.yaml", ["DATASETS.ROOT", "new"])
    for sets, train in ((cfg.DATASETS, "mine_train"), (again.DATASETS, "new_train")):
        assert (sets.TRAIN, sets.VAL, sets.TEST) == ((train,), (), ("other",))


@pytest.mark.parametrize(
    "content", ["MODEL: {NOSUCH: 1}", "just words", "[1, 2]", "SOLVER: {MAX_ITER: many}"]
)
def test_overrides_come_after_the_file_and_both_are_checked(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}")
    cfg = load_config(path, ["SOLVER.MAX_ITER", "9", *CPU])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (9, 0.5)
    for opts in (["MODEL.NOSUCH", "1"], ["SOLVER.MAX_ITER"], ["SEED", "x"]):
        with pytest.raises(ValueError, match="KEY VALUE"):
            load_config(path, opts)
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_config(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="a.yaml"):
        load_config(path)


@pytest.mark.parametrize("driver", [True, False])
def test_the_device_where_nobody_names_one(monkeypatch, tmp_path, driver):
    version = tmp_path / "version"
    monkeypatch.setattr(engine_config, "_NVIDIA_DRIVER", version)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if driver:
        version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  390.157\nGCC: 12\n")
        with pytest.raises(RuntimeError, match=f"390.157.*{re.escape(torch.__version__)}"):
            load_config("imrcnn_lite.yaml")
        assert load_config("imrcnn_lite.yaml", CPU).MODEL.DEVICE == "cpu"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert load_config("imrcnn_lite.yaml").MODEL.DEVICE == "cpu"
