"""examples/ as they are run, and what else a stranger's Detectron2 project would try."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from detectron2.modeling import RetinaNet, build_model

from imrcnn_d2 import add_imrcnn_config
from imrcnn_d2.data.prepare import synthetic
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.evaluation import LesionEvaluator
from imrcnn_d2.modeling import PAFPN, TimmBackbone
from imrcnn_d2.utils.files import Rejects

EXAMPLES = Path(__file__).parents[2] / "examples"
RETINANET = EXAMPLES / "retinanet" / "retinanet_R_50_PAFPN.yaml"
# Detectron2's keys only: these are other people's configs.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)"),
]
RESNET_18 = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]


def example(name):
    """The module of a script in examples/."""
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logged(output):
    """What a training last wrote of each quantity."""
    log = {}
    for line in (output / "metrics.json").read_text().splitlines():
        log.update(json.loads(line))
    return log


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder as tools/prepare_dataset.py writes it."""
    folder = tmp_path_factory.mktemp("prepared")
    out, drawn = folder / "synthetic", folder / "drawn"
    drawn.mkdir()
    prepare_dataset(synthetic.generate(drawn, 16, 96), out, SplitOptions(), Rejects("raise"))
    return out


@pytest.fixture(scope="module")
def registered(prepared):
    """Its splits under names of a stranger's, by Detectron2's own function."""
    names = {split: f"strangers_{split}" for split in ("train", "val")}
    for split, name in names.items():
        json_file = prepared / "annotations" / f"{split}.json"
        register_coco_instances(name, {}, str(json_file), str(prepared / "images"))
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("trunk", ["resnet", "timm"])
def test_detectron2_s_training_script_trains_a_retinanet_with_our_backbone(
    trunk, registered, tmp_path
):
    script = example("retinanet/train_net.py")
    assert script.imrcnn_d2  # the one line: here others have imported it before
    data = ["DATASETS.TRAIN", (registered["train"],), "DATASETS.TEST", (registered["val"],)]
    name = f"build_retinanet_{trunk}_pafpn_backbone"
    low = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]  # so that a random model detects something
    command = ["--config-file", str(RETINANET), *SMALL, *RESNET_18, "MODEL.BACKBONE.NAME", name]
    args = default_argument_parser().parse_args(command + low + ["OUTPUT_DIR", str(tmp_path)])
    args.opts += data
    script.main(args)
    log = logged(tmp_path)
    assert 0 < log["total_loss"] < 100

    weights = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    new = {k: v for k, v in weights.items() if k.startswith("backbone.pan_down")}
    wanted = {f"backbone.pan_down{k}.{part}" for k in (3, 4) for part in ("weight", "bias")}
    assert set(new) == wanted
    assert all(v.abs().sum() > 0 for v in new.values())  # they start at zero

    args.eval_only = True
    args.opts += ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    again = script.main(args)["bbox"]
    assert again["AP50"] >= 0
    assert again == pytest.approx({k: log[f"bbox/{k}"] for k in again}, nan_ok=True)


def test_the_example_s_config_is_the_zoo_s_but_for_what_it_names():
    cfg, zoo = get_cfg(), model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.merge_from_file(str(RETINANET))
    sizes = [torch.tensor(c.MODEL.ANCHOR_GENERATOR.SIZES) for c in (cfg, zoo)]
    assert torch.allclose(*sizes, atol=0.1)
    for c in (cfg, zoo):
        c.MODEL.BACKBONE.NAME = c.MODEL.ANCHOR_GENERATOR.SIZES = None
        c.MODEL.RETINANET.NUM_CLASSES = 1
    assert cfg.MODEL == zoo.MODEL


def test_detectron2_s_trainer_with_our_evaluator(prepared, tmp_path):
    script = example("lesion_evaluator.py")
    small = ["MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"]
    low = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]  # so that a random model detects something
    command = [str(prepared), *SMALL, *RESNET_18, *small, *low, "OUTPUT_DIR", str(tmp_path)]
    script.main(command)
    figures = json.loads((tmp_path / "inference" / "mine_val" / "metrics.json").read_text())
    truth = json.loads((prepared / "annotations" / "val.json").read_text())
    assert figures["lesion"]["TP"] + figures["lesion"]["FN"] == len(truth["annotations"])
    images = sum(figures["image"][name] for name in ("TP", "FP", "FN", "TN"))
    assert images == len(truth["images"])
    log = logged(tmp_path)
    for group in ("bbox", "segm", "lesion", "image"):  # what TensorBoard and the console show
        for name, figure in figures[group].items():
            if figure is not None:
                assert log[f"{group}/{name}"] == pytest.approx(figure)


@pytest.mark.parametrize(
    "zoo_file",
    [
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    ],
)
def test_models_that_we_ship_no_config_of_take_our_backbone(zoo_file):
    cfg = model_zoo.get_config(zoo_file)
    cfg.MODEL.DEVICE = "meta"  # shapes without memory
    cfg.MODEL.BACKBONE.NAME = "build_resnet_pafpn_backbone"
    cfg.freeze()
    with torch.device("meta"):
        model = build_model(cfg)
    assert isinstance(model.backbone, PAFPN)
    features = model.backbone(torch.zeros(1, 3, 64, 64, device="meta"))
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]


def test_the_zoo_s_lazy_configs_take_our_classes(registered, tmp_path):
    config = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
    config.model.backbone._target_ = PAFPN
    config.model.backbone.attention = "cbam"
    config.model.backbone.bottom_up = LazyCall(TimmBackbone)(name="resnet18")
    config.model.backbone.top_block.in_channels = 512
    config.model.num_classes = 1
    model = instantiate(config.model).eval()
    assert isinstance(model, RetinaNet) and isinstance(model.backbone, PAFPN)
    with torch.no_grad():
        (found,) = model([{"image": torch.zeros(3, 64, 64)}])
    assert found["instances"].image_size == (64, 64)

    evaluator = LazyCall(LesionEvaluator)(dataset_name=registered["val"], output_dir=str(tmp_path))
    evaluator = instantiate(evaluator)
    evaluator.reset()
    for record in DatasetCatalog.get(registered["val"]):
        evaluator.process([record], [found])
    assert evaluator.evaluate()["lesion"]["TP"] == 0


def test_weights_with_a_part_set_back_are_those_of_a_model_without_it(tmp_path):
    def model(name):
        cfg = get_cfg()
        add_imrcnn_config(cfg)
        cfg.merge_from_file(str(EXAMPLES.parent / "configs" / f"{name.lower()}_lite.yaml"))
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""])
        return build_model(cfg).eval().backbone

    whole, image = model("IMRCNN"), torch.randn(1, 3, 64, 64)
    for name, weight in whole.named_parameters():
        if "pan_down" in name or "cbam" in name:
            torch.nn.init.normal_(weight, std=0.1)  # as if trained
    backbone = {f"backbone.{name}": weight for name, weight in whole.state_dict().items()}
    torch.save({"model": backbone}, tmp_path / "whole.pth")
    without = example("kvasir_seg_study/without.py")
    without.main(["attention", str(tmp_path / "whole.pth"), str(tmp_path / "no_attention.pth")])
    without.main(["bottom_up", str(tmp_path / "no_attention.pth"), str(tmp_path / "neither.pth")])

    def pyramid(name, file):
        net = model(name)
        weights = torch.load(tmp_path / file, weights_only=True)["model"]
        net.load_state_dict(
            {key.removeprefix("backbone."): w for key, w in weights.items()},
            strict=name == "IMRCNN",
        )
        with torch.no_grad():
            return torch.cat([level.flatten() for level in net(image).values()])

    for smaller, file in (("IBMRCNN", "no_attention.pth"), ("MRCNN", "neither.pth")):
        expected = pyramid(smaller, "whole.pth")
        # layers that change nothing still round what they sum
        torch.testing.assert_close(pyramid("IMRCNN", file), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(pyramid("IMRCNN", "whole.pth"), expected, rtol=1e-2)
