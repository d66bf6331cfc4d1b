"""examples/ as they are run, and other uses of our parts in a stranger's Detectron2 project."""

import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser
from detectron2.modeling import RetinaNet, build_model

from imrcnn_d2.cli.prepare_dataset import main as prepare_dataset
from imrcnn_d2.data.prepare.metadata import read_table
from imrcnn_d2.engine import Trainer
from imrcnn_d2.evaluation import LesionEvaluator
from imrcnn_d2.modeling import PAFPN, TimmBackbone
from imrcnn_d2.utils.files import leads_out

EXAMPLES = Path(__file__).parents[2] / "examples"
RETINANET = EXAMPLES / "retinanet" / "retinanet_R_50_PAFPN.yaml"
# Detectron2's keys only: these are other people's configs. Without a least score, so that a model
# of random weights detects something.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
]


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logged(output):
    lines = (output / "metrics.json").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "synthetic"
    prepare_dataset(["synthetic", "--out", str(out), "--num-images", "16", "--size", "96"])
    return out


@pytest.fixture(scope="module")
def registered(prepared):
    """Registers its splits by Detectron2's function."""
    for split in ("train", "val"):
        json_file = prepared / "annotations" / f"{split}.json"
        register_coco_instances(f"strangers_{split}", {}, str(json_file), str(prepared / "images"))


@pytest.mark.parametrize("trunk", [pytest.param("resnet", marks=pytest.mark.slow), "timm"])
def test_detectron2s_training_script_trains_a_retinanet_with_our_neck(trunk, registered, tmp_path):
    script = example("retinanet/train_net.py")
    assert script.imrcnn_d2  # the one line: here others have imported it before
    name = f"build_retinanet_{trunk}_pafpn_backbone"
    command = ["--config-file", str(RETINANET), *SMALL, "MODEL.BACKBONE.NAME", name]
    args = default_argument_parser().parse_args([*command, "OUTPUT_DIR", str(tmp_path)])
    args.opts += ["DATASETS.TRAIN", ("strangers_train",), "DATASETS.TEST", ("strangers_val",)]
    script.main(args)
    log = logged(tmp_path)
    assert 0 < log["total_loss"] < 100 and log["bbox/AP50"] >= 0
    weights = torch.load(tmp_path / "model_final.pth", weights_only=False)["model"]
    new = {k: v for k, v in weights.items() if k.startswith("backbone.pan_down")}
    assert len(new) == 4 and all(v.any() for v in new.values())


def test_detectron2s_trainer_with_our_evaluator(prepared, tmp_path):
    example("lesion_evaluator.py").main([str(prepared), *SMALL, "OUTPUT_DIR", str(tmp_path)])
    metrics = json.loads((tmp_path / "inference" / "mine_val" / "metrics.json").read_text())
    truth = json.loads((prepared / "annotations" / "val.json").read_text())
    assert metrics["lesion"]["TP"] + metrics["lesion"]["FN"] == len(truth["annotations"])
    assert sum(metrics["image"][key] for key in ("TP", "FP", "FN", "TN")) == len(truth["images"])
    log = logged(tmp_path)
    for group in ("bbox", "segm", "lesion", "image"):  # what TensorBoard and the console show
        defined = {f"{group}/{k}": v for k, v in metrics[group].items() if v is not None}
        assert {name: log[name] for name in defined} == pytest.approx(defined)


def test_build_evaluator_in_detectron2s_scripts(registered, tmp_path):
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_list([*SMALL, "OUTPUT_DIR", str(tmp_path), "MODEL.ROI_HEADS.NUM_CLASSES", 1])
    cfg.DATASETS.TEST = ("strangers_val",)
    model, named = build_model(cfg), tmp_path / "named"
    for folder in (tmp_path / "inference" / "strangers_val", named):
        arguments = [str(named)] if folder == named else []
        evaluator = Trainer.build_evaluator(cfg, "strangers_val", *arguments)
        metrics = DefaultTrainer.test(cfg, model, evaluators=[evaluator])
        written = json.loads((folder / "metrics.json").read_text())
        assert written["lesion"]["FN"] == metrics["lesion"]["FN"] > 0


@pytest.mark.parametrize(
    "zoo_file", ["Keypoints/keypoint_rcnn_R_50_FPN_1x", "PanopticSegmentation/panoptic_fpn_R_50_1x"]
)
def test_models_without_a_config_of_ours_take_our_backbone(zoo_file):
    cfg = model_zoo.get_config(f"COCO-{zoo_file}.yaml")
    cfg.MODEL.DEVICE = "meta"  # shapes without memory
    cfg.MODEL.BACKBONE.NAME = "build_resnet_pafpn_backbone"
    with torch.device("meta"):
        backbone = build_model(cfg).backbone
    assert isinstance(backbone, PAFPN)
    features = backbone(torch.zeros(1, 3, 64, 64, device="meta"))
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]


def test_the_lazy_configs_of_the_zoo_take_our_classes(registered, tmp_path):
    config = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
    config.model.backbone._target_ = PAFPN
    config.model.backbone.attention = "cbam"
    config.model.backbone.bottom_up = LazyCall(TimmBackbone)(name="resnet18")
    config.model.backbone.top_block.in_channels = 512
    config.model.num_classes = 1
    model = instantiate(config.model).eval()
    assert isinstance(model, RetinaNet) and isinstance(model.backbone, PAFPN)
    with torch.no_grad():
        (output,) = model([{"image": torch.zeros(3, 64, 64)}])
    assert output["instances"].image_size == (64, 64)
    evaluator = LesionEvaluator("strangers_val", output_dir=str(tmp_path))
    evaluator.reset()
    for record in DatasetCatalog.get("strangers_val"):
        evaluator.process([record], [output])
    assert evaluator.evaluate()["lesion"]["TP"] == 0


def test_the_classes_say_nothing_of_the_centre(tmp_path):
    """Images of 100 pixels; lesions of 4 and 5 cover 4 and 5 % of them, two of 4 are large."""
    areas = {"A": [[], [], [4], [4], [4], [5], [4, 4]], "B": [[], [4], [9]], "C": [[4], [9]]}
    images, annotations = [], []
    for centre, number, lesions in ((c, n, x) for c in areas for n, x in enumerate(areas[c])):
        images.append({"id": len(images), "file_name": f"{centre}/{number}.jpg", "centre": centre})
        images[-1] |= {"width": 10, "height": 10}
        annotations += [{"image_id": images[-1]["id"], "area": area} for area in lesions]
    (tmp_path / "annotations").mkdir()
    content = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "annotations" / "train.json").write_text(content)
    example("classification/labels.py").main(str(tmp_path), str(tmp_path / "labels.csv"))
    rows = [row.cells for row in read_table(tmp_path / "labels.csv", needed=("file",)).rows]
    classes = ("no polyp", "small polyp", "large polyp")
    expected = {("A", name): 2 for name in classes} | {("B", name): 1 for name in classes}
    assert Counter((row["centre"], row["label"]) for row in rows) == expected
    assert {row["file"] for row in rows if row["label"] == "large polyp"} == {
        *("A/5.jpg", "A/6.jpg", "B/2.jpg")
    }


def test_a_centre_is_left_out(prepared, tmp_path):
    """Its images of training and validation become a test set, and no test image is seen."""
    sources, out = tmp_path / "sources", tmp_path / "without" / "A"
    shutil.copytree(prepared, sources)
    expected = {}
    for path in sorted((sources / "annotations").glob("*.json")):
        coco = json.loads(path.read_text())
        for image in coco["images"]:
            image["centre"] = "AB"[image["id"] % 2]
        path.write_text(json.dumps(coco))
        expected[path.stem] = {i["file_name"]: i["centre"] for i in coco["images"]}
    out.parent.mkdir()
    example("demo_weights/leave_out.py").main(sources, "A", out)

    def images(folder, split):
        coco = json.loads((out / folder / "annotations" / f"{split}.json").read_text())
        names = {image["file_name"] for image in coco["images"]}
        paths = [out / folder / "images" / name for name in names]
        assert all(path.is_file() for path in paths)
        assert not any(leads_out(out, path) for path in paths)  # which commands refuse
        return names

    for split in ("train", "val"):
        others = {name for name, centre in expected[split].items() if centre == "B"}
        assert images("others", split) == others and others
    left_out = {n for s in ("train", "val") for n, c in expected[s].items() if c == "A"}
    assert images("A", "test") == left_out and left_out
    assert not images("others", "test")
