"""Defaults, foreign configs, and every YAML that is shipped."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from config_keys import flat
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN

from imrcnn_d2 import add_imrcnn_config
from imrcnn_d2.config import get_node
from imrcnn_d2.engine import load_config
from imrcnn_d2.modeling import PAFPN

CONFIGS = Path(__file__).parents[2] / "configs"
# Detectron2's: cross_validation/ has Hydra's.
SHIPPED = sorted(
    str(p.relative_to(CONFIGS))
    for p in CONFIGS.rglob("*.yaml")
    if p.parent.name != "cross_validation"
)
RUNNABLE = [name for name in SHIPPED if not name.startswith("Base-")]
CLASSIFIERS = ["efficientnet_lite0.yaml", "inception_v3.yaml", "resnet50.yaml", "vgg19.yaml"]
OPTS = ("MODEL.DEVICE", "cpu")


def load(name):
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def test_defaults():
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    assert dict(cfg.MODEL.PAFPN) == {
        "NORM": "",
        "INIT": "identity",
        "ACTIVATION": "",
        "ATTENTION": "",
        "ATTENTION_BEFORE": ("bottom_up",),
    }
    assert dict(cfg.MODEL.CBAM) == {"REDUCTION": 16, "KERNEL_SIZE": 7, "GATE": "double_sigmoid"}
    assert cfg.MODEL.IMRCNN.SCORE_THRESH == 0.7
    assert cfg.SOLVER.MAX_EPOCHS == 0
    assert cfg.SOLVER.NEW_LAYER_LR_FACTOR == 1
    ours = dict(flat(cfg))
    assert all(ours[key] == value for key, value in flat(get_cfg()))


def test_every_key_has_a_comment():
    lines = inspect.getsource(add_imrcnn_config).splitlines()
    for above, line in zip(lines, lines[1:], strict=False):
        if re.match(r"\s*cfg\.[A-Z_.]+ = (?!CN\()", line):
            assert above.lstrip().startswith("#"), line


def test_a_foreign_config_gets_the_defaults_and_keeps_its_own():
    cfg = get_cfg()
    assert get_node(cfg, "MODEL.PAFPN").INIT == "identity"
    assert "PAFPN" not in cfg.MODEL  # a look changes nothing
    cfg.MODEL.PAFPN = CfgNode({"INIT": "xavier"})
    assert get_node(cfg, "MODEL.PAFPN") is cfg.MODEL.PAFPN


@pytest.fixture(scope="module")
def structure():
    """Builds a model without memory, once for each MODEL section."""
    built = {}

    def build(cfg):
        cfg.MODEL.DEVICE = "meta"
        cfg.MODEL.TIMM.WEIGHTS = ""
        key = cfg.MODEL.dump()
        if key not in built:
            with torch.device("meta"):
                built[key] = build_model(cfg)
        return built[key]

    return build


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name not in CLASSIFIERS])
def test_every_shipped_config_builds_the_model_it_is_named_after(name, structure):
    cfg = load(name)
    # "kvasir_seg/imrcnn_R_50_paper.yaml" or "imrcnn_R_50.yaml"
    system, depth = re.search(r"(I?B?MRCNN|MRCNN)[-_](R_50|R_101|lite)", name, re.I).groups()
    model = structure(cfg)
    backbone = model.backbone
    attention = [n for n, _ in backbone.named_children() if n.startswith("cbam")]
    assert type(backbone) is {"mrcnn": FPN, "ibmrcnn": PAFPN, "imrcnn": PAFPN}[system]
    assert len(attention) == (4 if system == "imrcnn" else 0)
    blocks = {"R_50": 6, "R_101": 23}
    if depth in blocks:
        assert len(backbone.bottom_up.res4) == blocks[depth]
        assert cfg.MODEL.WEIGHTS == model_zoo.get_checkpoint_url(
            f"COCO-InstanceSegmentation/mask_rcnn_{depth}_FPN_3x.yaml"
        ).replace("https://dl.fbaipublicfiles.com/detectron2/", "detectron2://")
    else:
        assert "conv_stem" in dict(backbone.bottom_up.body.named_children())
    assert model.roi_heads.num_classes == 1
    assert list(backbone.output_shape()) == cfg.MODEL.RPN.IN_FEATURES


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_is_of_the_backbone_it_is_named_after(name, structure):
    cfg = load(name)
    stem = Path(name).stem
    assert cfg.MODEL.TIMM.NAME == (f"tf_{stem}" if stem.endswith("lite0") else stem)
    model = structure(cfg)
    assert type(model).__name__ == "ImageClassifier"
    assert model.head.out_features == 3
    assert [phase["trainable"] for phase in cfg.SOLVER.PHASES] == ["head", "all"]
    assert cfg.SOLVER.PHASES[0]["lr"] > cfg.SOLVER.PHASES[1]["lr"]


@pytest.mark.parametrize("depth", [50, 101])
def test_mr_cnn_is_the_zoo_s_mask_rcnn(depth, structure):
    zoo = model_zoo.get_config(f"COCO-InstanceSegmentation/mask_rcnn_R_{depth}_FPN_3x.yaml")
    zoo.MODEL.DEVICE = "meta"
    zoo.MODEL.ROI_HEADS.NUM_CLASSES = 1
    with torch.device("meta"):
        stock = build_model(zoo)
    ours = load(f"mrcnn_R_{depth}.yaml")
    assert {k: v.shape for k, v in structure(ours).state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }
    # Weights fit only the pixels, anchors and boxes they were trained with.
    for key in ("PIXEL_MEAN", "PIXEL_STD", "ANCHOR_GENERATOR", "RPN.BBOX_REG_WEIGHTS"):
        a, b = ours.MODEL, zoo.MODEL
        for part in key.split("."):
            a, b = a[part], b[part]
        assert a == b, key
    assert ours.INPUT.FORMAT == zoo.INPUT.FORMAT


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_config_to_run_takes_its_data_set_from_root(name):
    assert load(name).DATASETS == {**get_cfg().DATASETS, "ROOT": "", "VAL": ()}
    cfg = load_config(CONFIGS / name, ["DATASETS.ROOT", "some/folder/", *OPTS])
    for split in ("TRAIN", "VAL", "TEST"):
        assert cfg.DATASETS[split] == (f"folder_{split.lower()}",)
    stem = Path(name).stem
    demo = name == "imrcnn_lite_demo.yaml"
    assert cfg.OUTPUT_DIR == ("output/demo" if demo else f"output/folder/{stem}")
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    if name in CLASSIFIERS:
        return
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.05
    assert cfg.MODEL.IMRCNN.SCORE_THRESH == 0.7
    if stem.endswith("_paper"):
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (1e-5, 1e-8)
        assert cfg.SOLVER.MAX_EPOCHS == 100
        assert cfg.SOLVER.NEW_LAYER_LR_FACTOR == 1


# Paths of version 0.1.0 -> the config, the data set, OUTPUT_DIR.
DETECTORS = [f"{m}_{size}" for m in ("mrcnn", "ibmrcnn", "imrcnn") for size in ("R_50", "lite")]
EARLIER = {
    f"{data}/{stem}": (stem, data, f"output/{data}/{stem}")
    for data in ("kvasir_seg", "egc", "synthetic")
    for stem in [*DETECTORS, "imrcnn_R_101", "imrcnn_R_50_paper"]
}
EARLIER |= {
    f"recognition/{old}": (new, "gastric_recognition", f"output/recognition/{old}")
    for old, new in {"vgg19": "vgg19", "lite": "efficientnet_lite0"}.items()
}
EARLIER["synthetic/imrcnn_lite_demo"] = "imrcnn_lite_demo", "synthetic", "output/demo"
EARLIER["Base-IBMRCNN-R_101"] = "ibmrcnn_R_101", "", "./output"
EARLIER["Base-Recognition"] = "Base-Classifier", "gastric_recognition", "./output"


@pytest.mark.parametrize("name", EARLIER)
def test_paths_of_earlier_versions_give_the_same_config_with_a_warning(name, caplog):
    new, data, output = EARLIER[name]
    old_cfg = load_config(f"configs/{name}.yaml", OPTS)
    assert f"{new}.yaml" in caplog.text
    root = ["DATASETS.ROOT", data] if data else []
    assert old_cfg == load_config(f"{new}.yaml", [*root, *OPTS, "OUTPUT_DIR", output])


def test_a_users_config_may_be_based_on_an_earlier_path(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"_BASE_: {CONFIGS}/kvasir_seg/imrcnn_lite.yaml\nSOLVER: {{MAX_ITER: 7}}\n"
    )
    cfg = load_config(tmp_path / "mine.yaml", OPTS)
    assert (cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST) == (7, ("kvasir_seg_test",))
    assert cfg.OUTPUT_DIR == "output/kvasir_seg/imrcnn_lite"


def test_named_splits_win_over_root(tmp_path):
    root = ["DATASETS.ROOT", "mine", *OPTS]
    cfg = load_config("imrcnn_lite.yaml", [*root, "DATASETS.TEST", ("other",), "DATASETS.VAL", ()])
    assert cfg.DATASETS.TRAIN == ("mine_train",)
    assert (cfg.DATASETS.TEST, cfg.DATASETS.VAL) == (("other",), ())

    (tmp_path / "config.yaml").write_text(cfg.dump())  # as a run keeps it
    again = load_config(tmp_path / "config.yaml", ["DATASETS.ROOT", "theirs"])
    assert again.DATASETS.TRAIN == ("theirs_train",)
    assert (again.DATASETS.TEST, again.DATASETS.VAL) == (("other",), ())


def test_no_shipped_config_names_a_device():
    assert SHIPPED
    for name in SHIPPED:
        assert "DEVICE" not in yaml.safe_load((CONFIGS / name).read_text()).get("MODEL", {}), name
