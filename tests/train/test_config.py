"""Shipped configs and their earlier paths, foreign configs, overrides, data sets and devices."""

import re
from pathlib import Path

import pytest
import torch
from config_keys import flat
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN

from imrcnn_d2 import add_imrcnn_config, model_zoo
from imrcnn_d2.config import get_node
from imrcnn_d2.engine import choose_device, load_config
from imrcnn_d2.engine import config as engine_config
from imrcnn_d2.engine.checkpoint import pretrained
from imrcnn_d2.engine.config import (
    check_named_splits,
    check_resumable,
    find_config,
    load_config_text,
)
from imrcnn_d2.modeling import PAFPN
from imrcnn_d2.utils.safe_loading import load_safetensors

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))
RUNNABLE = [name for name in SHIPPED if not name.startswith("Base-")]
CLASSIFIERS = ["efficientnet_lite0.yaml", "inception_v3.yaml", "resnet50.yaml", "vgg19.yaml"]
CPU = ("MODEL.DEVICE", "cpu")


def test_a_foreign_config_gets_the_defaults_and_keeps_its_own():
    cfg = get_cfg()
    assert get_node(cfg, "MODEL.PAFPN").FORM == "panet"
    assert "PAFPN" not in cfg.MODEL  # a look changes nothing
    cfg.MODEL.PAFPN = CfgNode({"FORM": "residual"})
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
    assert attention == ([f"cbam{level}" for level in (2, 3, 4, 5)] if system == "imrcnn" else [])
    neck = ("residual", "double_sigmoid") if "_residual" in name else ("panet", "sigmoid")
    assert (cfg.MODEL.PAFPN.FORM, cfg.MODEL.CBAM.GATE) == neck
    if depth == "lite":
        assert "conv_stem" in dict(backbone.bottom_up.body.named_children())
    else:  # the zoo's Mask R-CNN with a neck
        zoo_file = f"COCO-InstanceSegmentation/mask_rcnn_{depth}_FPN_3x.yaml"
        path = cfg.MODEL.WEIGHTS.removeprefix("detectron2://")
        assert detectron2_zoo.get_checkpoint_url(zoo_file).endswith(f"/detectron2/{path}")
        zoo = detectron2_zoo.get_config(zoo_file)
        zoo.MODEL.ROI_HEADS.NUM_CLASSES = 1
        assert cfg.INPUT.FORMAT == zoo.INPUT.FORMAT
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
    assert cfg.TEST.SCORE_THRESH == 0.5
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


@pytest.mark.parametrize("base", ["imrcnn_lite.yaml", "configs/imrcnn_lite.yaml"])
def test_a_config_is_based_on_a_shipped_one_by_name(tmp_path, base):
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {base}\nSEED: 7\n")
    assert load_config(tmp_path / "mine.yaml", CPU) == load_config(base, [*CPU, "SEED", 7])
    (tmp_path / "imrcnn_lite.yaml").write_text("SEED: 8\n")  # a file comes first
    expected = 8 if base == "imrcnn_lite.yaml" else 7
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {base}\n" + "SEED: 7\n" * (expected == 7))
    assert load_config(tmp_path / "mine.yaml", CPU).SEED == expected


OF_0_1 = [  # what a config says of the neck: FORM and GATE that have its formula
    ("PAFPN: {INIT: identity, ACTIVATION: ''}, CBAM: {GATE: double_sigmoid}", "affine", "double"),
    ("PAFPN: {INIT: xavier, ACTIVATION: relu}, CBAM: {GATE: sigmoid}", "panet", "sigmoid"),
    ("PAFPN: {ACTIVATION: relu}", "panet", "double"),  # the default then
    ("PAFPN: {INIT: xavier}, CBAM: {GATE: sigmoid}", "affine", "sigmoid"),
    ("CBAM: {GATE: residual}", "affine", "residual"),
    ("PAFPN: {ATTENTION: cbam}", "panet", "sigmoid"),  # a recipe, of either version
]


@pytest.mark.parametrize("model, form, gate", OF_0_1)
def test_a_neck_of_version_0_1_keeps_its_formula(tmp_path, model, form, gate):
    base, path = CONFIGS / "ibmrcnn_lite.yaml", tmp_path / "mine.yaml"
    path.write_text(f"_BASE_: {base}\nMODEL: {{{model}}}\n")
    gate = "double_sigmoid" if gate == "double" else gate
    for cfg in (
        load_config(path, CPU),
        load_config_text(f"MODEL: {{{model}}}", "weights.safetensors", CPU),
    ):
        assert (cfg.MODEL.PAFPN.FORM, cfg.MODEL.CBAM.GATE) == (form, gate)
        path.write_text(cfg.dump())  # as a run keeps it
        again = load_config(path)
        assert (again.MODEL.PAFPN, again.MODEL.CBAM) == (cfg.MODEL.PAFPN, cfg.MODEL.CBAM)
        assert load_config(path, ["MODEL.PAFPN.FORM", "panet"]).MODEL.PAFPN.FORM == "panet"


@pytest.mark.parametrize("pafpn", ["FORM: panet, INIT: xavier", "ACTIVATION: gelu"])
def test_no_other_old_key_of_the_neck_is_read(tmp_path, pafpn):
    path = tmp_path / "mine.yaml"
    path.write_text(f"MODEL: {{PAFPN: {{{pafpn}}}}}")
    with pytest.raises(ValueError, match=r"mine.yaml.*MODEL.PAFPN.FORM"):
        load_config(path, CPU)
    with pytest.raises(ValueError, match=r"MODEL.PAFPN.INIT.*MODEL.PAFPN.FORM"):
        load_config("imrcnn_lite.yaml", ["MODEL.PAFPN.INIT", "identity"])


def test_thresholds_of_version_0_1_are_read_with_a_warning(tmp_path, caplog):
    """Its default was of scores that no map had made probabilities: it's that of today's 0.5."""
    path, base = tmp_path / "mine.yaml", tmp_path / "base.yaml"
    base.write_text("MODEL: {IMRCNN: {SCORE_THRESH: 0.7, TAU_RULE: 'recall>=95'}}")
    path.write_text(base.read_text())
    text = "MODEL: {IMRCNN: {SCORE_THRESH: %s, TAU_RULE: 'recall>=90'}, FPN: {NORM: GN}}"
    key, rule = "MODEL.IMRCNN.SCORE_THRESH", "MODEL.IMRCNN.TAU_RULE"
    cases = [
        (load_config, base, [], 0.5, "recall>=95"),
        (load_config_text, text % 0.6, ["a.safetensors"], 0.6, "recall>=90"),
        (load_config, "", [key, "0.65", rule, "recall>=80"], 0.65, "recall>=80"),
        (load_config, path, [key, 0.7, rule, "f1"], 0.5, "f1"),
    ]
    for read, source, more, tau, expected in cases:
        caplog.clear()
        more, opts = ([], more) if read is load_config else (more, [])
        cfg = read(source, *more, [*opts, *CPU])
        assert (cfg.TEST.SCORE_THRESH, cfg.TEST.TAU_RULE) == (tau, expected)
        assert "IMRCNN" not in cfg.MODEL and key in caplog.text and "TEST." in caplog.text
        assert (more[0] if more else str(source)) in caplog.text
    # Once for each, however often it is read.
    caplog.clear()
    load_config_text(text % 0.6, "a.safetensors", CPU)
    assert key not in caplog.text
    # A file's keys win over those of its base, of whichever version either is.
    path.write_text("_BASE_: base.yaml\nTEST: {TAU_RULE: 'recall>=70'}")
    assert load_config(path, CPU).TEST.TAU_RULE == "recall>=70"
    base.write_text("TEST: {TAU_RULE: 'recall>=70'}")
    path.write_text(f"_BASE_: base.yaml\n{text % 0.4}")
    cfg = load_config(path, CPU)
    assert (cfg.TEST.TAU_RULE, cfg.MODEL.FPN.NORM) == ("recall>=90", "GN")
    for content in ("MODEL: {IMRCNN: {TAU: f1}}", "MODEL: {IMRCNN: {SCORE_THRESH: high}}"):
        path.write_text(content)
        with pytest.raises(ValueError, match="mine.yaml"):
            load_config(path, CPU)
    caplog.clear()
    load_config("imrcnn_lite.yaml", CPU)
    assert "IMRCNN" not in caplog.text


def test_a_training_of_another_form_is_not_resumed(tmp_path):
    output, old = ["OUTPUT_DIR", str(tmp_path), *CPU], "MODEL: {PAFPN: {ACTIVATION: ''}}"
    models = [load_config(f"{name}.yaml", output) for name in ("imrcnn_lite", "mrcnn_lite")]
    check_resumable(models[0])  # nothing is there yet
    (tmp_path / "config.yaml").write_text(old)
    check_resumable(models[0])  # nor a training
    (tmp_path / "model_final.pth").touch()
    for text in (models[0].dump(), ""):  # of this form, or cut off
        (tmp_path / "config.yaml").write_text(text)
        check_resumable(models[0])
    (tmp_path / "config.yaml").write_text(old)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.yaml.*'affine'.*'panet'"):
        check_resumable(models[0])
    check_resumable(models[1])  # it has no such neck


def test_named_splits_win_over_root(tmp_path):
    root = ["DATASETS.ROOT", "mine", *CPU]
    cfg = load_config("imrcnn_lite.yaml", [*root, "DATASETS.TEST", ("other",), "DATASETS.VAL", ()])
    (tmp_path / "config.yaml").write_text(cfg.dump())  # as a run keeps it
    again = load_config(tmp_path / "config.yaml", ["DATASETS.ROOT", "new"])
    for sets, train in ((cfg.DATASETS, "mine_train"), (again.DATASETS, "new_train")):
        assert (sets.TRAIN, sets.VAL, sets.TEST) == ((train,), (), ("other",))


def test_a_split_that_wins_over_root_and_does_not_exist(tmp_path, monkeypatch):
    """It is refused before the training, and the message says who names it."""
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path))
    (tmp_path / "own.yaml").write_text('DATASETS: {TEST: ["kvasir_seg_test"]}')
    cfg = load_config(tmp_path / "own.yaml", ["DATASETS.ROOT", "mine", *CPU])
    names = r"DATASETS\.TEST.*kvasir_seg_test.*mine.*kvasir_seg/annotations/test\.json.*mine_test"
    with pytest.raises(FileNotFoundError, match=names):
        check_named_splits(cfg)
    check_named_splits(load_config("imrcnn_lite.yaml", ["DATASETS.ROOT", "mine", *CPU]))


@pytest.mark.parametrize(
    "content",
    ["MODEL: {NOSUCH: 1}", "just words", "[1, 2]", "SOLVER: {MAX_ITER: many}", "SEED:"],
)
def test_overrides_come_after_the_file_and_both_are_checked(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}")
    cfg = load_config(path, ["SOLVER.MAX_ITER", "9", *CPU])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (9, 0.5)
    for opts in (["MODEL.NOSUCH", "1"], ["SOLVER.MAX_ITER"], ["SEED", "x"], ["SEED", "None"]):
        with pytest.raises(ValueError, match="KEY VALUE"):
            load_config(path, opts)
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_config(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="a.yaml"):
        load_config(path)


def test_a_misspelt_key_is_answered_with_similar_ones(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("SOLVER: {MAX_ITERR: 7}")
    for given, opts in (
        (path, []),
        ("", ["SOLVER.MAX_ITERS", "5"]),
        ("", ["solver.max_iter", "5"]),
    ):
        with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITER\b"):
            load_config(given, [*opts, *CPU])


def test_only_a_shipped_name_stands_for_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("imrcnn_lite", "imrcnn_lite.yaml", "configs/imrcnn_lite.yaml"):
        assert find_config(name) == CONFIGS / "imrcnn_lite.yaml"
    assert find_config("configs/lazy/imrcnn_lite.py") == CONFIGS / "lazy" / "imrcnn_lite.py"
    for path in ("my/imrcnn_lite.yaml", "../imrcnn_lite.yaml", "/x/imrcnn_lite.yaml", "../LICENSE"):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(path)}: .*imrcnn_lite.yaml"):
            load_config(path)
    for typed, near in (("imrcn_R_50.yaml", "imrcnn_R_50"), ("configs/resnet", "resnet50")):
        with pytest.raises(FileNotFoundError, match=f": [^:]*: {near}.yaml, .*vgg19.yaml"):
            find_config(typed)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "imrcnn_lite.yaml").write_text("SEED: 7")
    assert load_config("configs/imrcnn_lite.yaml", CPU).SEED == 7
    assert load_config(model_zoo.get_config_file("imrcnn_lite.yaml"), CPU).SEED == 0


def test_model_zoo_lists_the_shipped_configs_and_builds_their_models():
    assert model_zoo.list() == [*RUNNABLE, "lazy/imrcnn_R_50.py", "lazy/imrcnn_lite.py"]
    cfg = model_zoo.get_config("imrcnn_R_50.yaml", device="cpu")
    assert cfg == load_config("imrcnn_R_50.yaml", CPU)
    assert model_zoo.get_config("lazy/imrcnn_lite.py", device="cpu").train.max_iter == 1000
    model = model_zoo.get("imrcnn_lite.yaml", trained=True, device="cpu")
    expected, _ = load_safetensors(pretrained("demo"))
    assert model.training and model.device.type == "cpu"
    assert all(torch.equal(model.state_dict()[k], v.float()) for k, v in expected.items())
    with pytest.raises(RuntimeError, match="mrcnn_lite.yaml.* imrcnn_lite.yaml"):
        model_zoo.get_config("mrcnn_lite.yaml", trained=True)


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
        with pytest.raises(OSError, match=f"390.157.*{re.escape(torch.__version__)}"):
            load_config("imrcnn_lite.yaml")
        assert load_config("imrcnn_lite.yaml", CPU).MODEL.DEVICE == "cpu"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert load_config("imrcnn_lite.yaml").MODEL.DEVICE == "cpu"
