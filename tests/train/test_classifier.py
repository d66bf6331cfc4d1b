import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from imrcnn_d2.engine import load_config
from imrcnn_d2.modeling import ImageClassifier
from imrcnn_d2.modeling.classifier import timm_input


def images(count, size=64):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return [{"image": torch.from_numpy(p), "label": i % 3} for i, p in enumerate(pixels)]


@pytest.fixture
def resnet18():
    torch.manual_seed(0)
    model = ImageClassifier("resnet18", 3)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def test_what_a_model_was_trained_on_is_timm_s():
    inception, resnet = timm_input("inception_v3"), timm_input("resnet50")
    assert inception == {"size": 299, "pixel_mean": [127.5] * 3, "pixel_std": [127.5] * 3}
    assert resnet["size"] == 224
    # ImageNet's mean and standard deviation, 0.485 and so on, of red, green and blue.
    assert resnet["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert resnet["pixel_std"] == pytest.approx([58.395, 57.12, 57.375])


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(ValueError, match="'resnet5O': timm .* no such model; near it are resnet50"):
        timm_input("resnet5O")


def test_scores_are_those_of_timm_s_own_classifier(resnet18):
    state = {k.removeprefix("backbone."): v for k, v in resnet18.state_dict().items()}
    for key in ("pixel_mean", "pixel_std"):
        del state[key]
    state["fc.weight"], state["fc.bias"] = state.pop("head.weight"), state.pop("head.bias")
    reference = timm.create_model("resnet18", num_classes=3).eval()
    reference.load_state_dict(state)
    batch = images(4)
    pixels = np.stack([sample["image"].numpy() for sample in batch]) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inputs = (pixels - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = reference(torch.from_numpy(inputs).float()).softmax(1)
        found = resnet18.eval()(batch)
    # its input is rounded at another place, and sums of eighteen layers carry that on
    scores = torch.stack([r["scores"] for r in found])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("smoothing", "weights"), [(0.0, None), (0.3, None), (0.0, [0.5, 1.0, 3.0])]
)
def test_the_loss_is_the_cross_entropy(resnet18, smoothing, weights):
    model = ImageClassifier("resnet18", 3, label_smoothing=smoothing, class_weights=weights)
    model.load_state_dict(resnet18.state_dict())
    batch = images(5)
    with torch.no_grad():
        scores = torch.stack([r["scores"] for r in model.eval()(batch)]).double().numpy()
    target = np.full((5, 3), smoothing / 3)
    labels = [sample["label"] for sample in batch]
    target[range(5), labels] += 1 - smoothing
    each = -(target * np.log(scores)).sum(1)
    weigh = np.asarray(weights or [1, 1, 1])[labels]
    expected = (each * weigh).sum() / weigh.sum()
    model.train()
    model.backbone.eval()  # batch norms as for the scores above
    assert model(batch)["loss_cls"].item() == pytest.approx(expected, rel=1e-4)


def test_frozen_layers_learn_nothing(resnet18):
    model = ImageClassifier("resnet18", 3, freeze_at=2)
    fixed = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(fixed) and ".bn" not in name and "bn1" not in name
    }, "their batch norms have become constants"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(images(4))["loss_cls"].backward()
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith(fixed) for name in moved), "running statistics moved"
    assert model.backbone.layer2[0].conv1.weight.grad is not None


def test_frozen_bn_freezes_all_of_them():
    model = ImageClassifier("resnet18", 3, norm="FrozenBN")
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_vgg_is_its_convolutions_and_a_head():
    with torch.device("meta"):
        model = ImageClassifier("vgg19", 3)
    # 16 convolutions of VGG19 (Simonyan and Zisserman): 20,024,384; the head: 3 x (512 + 1).
    assert sum(p.numel() for p in model.parameters()) == 20_024_384 + 1539


@pytest.mark.parametrize("name", ["resnet18", "inception_v3"])
def test_imagenet_weights_from_a_file(tmp_path, name):
    source = timm.create_model(name)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = ImageClassifier(name, 3, weights=str(tmp_path / "weights.safetensors"))
    expected = source.state_dict()
    found = model.backbone.state_dict()
    assert set(expected) - set(found) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="'hf download timm/resnet18.* model.safetensors'; then here"):
        ImageClassifier("resnet18", 3, weights="timm")


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, 2.0, 0.0], "equal"])
def test_wrong_class_weights_are_named(weights):
    with pytest.raises(ValueError, match="CLASS_WEIGHTS is .* 3 positive numbers"):
        ImageClassifier("resnet18", 3, class_weights=weights)


def test_balanced_weights_need_the_trainer():
    model = ImageClassifier("resnet18", 3, class_weights="balanced")
    assert len(model.eval()(images(2))) == 2, "inference needs no weights"
    with pytest.raises(ValueError, match="'balanced', for which .* Trainer"):
        model.train()(images(2))


def test_images_of_different_sizes_are_refused(resnet18):
    with pytest.raises(ValueError, match=r"differ in size: \[\(3, 32, 32\), \(3, 64, 64\)\]"):
        resnet18.eval()([*images(1), *images(1, size=32)])


def test_a_config_with_another_colour_order_is_refused():
    cfg = load_config("configs/efficientnet_lite0.yaml", ["MODEL.DEVICE", "cpu"])
    cfg.INPUT.FORMAT = "BGR"
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'BGR'"):
        ImageClassifier(cfg)
