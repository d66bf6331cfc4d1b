"""The LazyConfigs describe the models of the YAML files, and train."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from omegaconf import ListConfig

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.trainer import LazyTrainer, evaluate


@pytest.fixture(scope="module", params=["R_50", "lite"])
def models(request):
    """The model of the LazyConfig and that of the YAML file, with the same random weights."""
    lazy_cfg = LazyConfig.load(f"configs/lazy/imrcnn_{request.param}.py")
    yaml_cfg = load_config(
        f"configs/kvasir_seg/imrcnn_{request.param}.yaml",
        ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0],
    )
    lazy_cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    torch.manual_seed(0)
    lazy_model, yaml_model = instantiate(lazy_cfg.model), build_model(yaml_cfg)
    for module in yaml_model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            # Without statistics of real features they grow into the thousands, and boxes vanish.
            module.weight.fill_(0.3)
    lazy_model.load_state_dict(yaml_model.state_dict())
    return lazy_model, yaml_model


def test_lazy_and_yaml_models_are_equal(models):
    lazy_model, yaml_model = models
    for (name, a), (other, b) in zip(
        lazy_model.named_parameters(), yaml_model.named_parameters(), strict=True
    ):
        assert (name, a.shape, a.requires_grad) == (other, b.shape, b.requires_grad)
    assert list(lazy_model.state_dict()) == list(yaml_model.state_dict())

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        a, b = (m.eval()([{"image": image}])[0]["instances"] for m in models)
    assert len(a) == 100
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(a.get(field), b.get(field)), field
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def settings(module):
    """The plain values that a module was made with: thresholds, batch sizes, feature names."""
    plain = {}
    for key, value in vars(module).items():
        if isinstance(value, (tuple, list, ListConfig)) and key != "conv_norm_relus":
            plain[key] = list(value)
        elif isinstance(value, (int, float, str, dict)) and not key.startswith("_"):
            plain[key] = value
    # Weights of 1 are said by YAML for one loss and left to the default for the others.
    if isinstance(plain.get("loss_weight"), dict):
        plain["loss_weight"] = {k: v for k, v in plain["loss_weight"].items() if v != 1.0}
    return plain


@pytest.mark.parametrize(
    "part",
    [
        "proposal_generator",
        "proposal_generator.anchor_generator",
        "roi_heads",
        "roi_heads.box_pooler.pooler",
        "roi_heads.mask_pooler.pooler",
        "roi_heads.box_predictor",
        "roi_heads.mask_head",
    ],
)
def test_lazy_and_yaml_heads_have_the_same_settings(models, part):
    ours, theirs = (settings(m.get_submodule(part)) for m in models)
    assert len(ours) > 1
    assert ours == theirs


@pytest.fixture
def lazy_cfg(tiny_datasets, tmp_path):
    """The light LazyConfig on the tiny data set, with random weights."""
    cfg = LazyConfig.load("configs/lazy/imrcnn_lite.py")
    overrides = [
        "train.max_iter=2",
        "train.eval_period=1",
        "train.checkpointer.period=1",
        "train.device=cpu",
        f"train.output_dir={tmp_path / 'output'}",
        "model.backbone.bottom_up.weights=''",
        "dataloader.train.num_workers=0",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[96]",
    ]
    for split in ("train", "val", "test"):
        overrides.append(f"dataloader.{split}.dataset.names={tiny_datasets[split]}")
        if split != "train":
            overrides += [
                f"dataloader.{split}.num_workers=0",
                f"dataloader.{split}.mapper.augmentations.0.short_edge_length=96",
                f"dataloader.{split}_evaluator.dataset_name={tiny_datasets[split]}",
            ]
    return LazyConfig.apply_overrides(cfg, overrides)


def test_a_lazy_config_trains_resumes_and_evaluates(lazy_cfg, tmp_path):
    trainer = LazyTrainer(lazy_cfg)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert results["lesion"]["TN"] + results["lesion"]["FP"] >= 1
    assert (tmp_path / "output" / "model_best.pth").is_file()
    changed = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    assert any("pan_down" in k for k in changed)
    assert not any("bottom_up.body.conv_stem" in k for k in changed), "a frozen layer moved"

    lazy_cfg.train.max_iter = 3
    resumed = LazyTrainer(lazy_cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    assert resumed.best.best_score == trainer.best.best_score is not None
    again, _ = evaluate(lazy_cfg, trainer.model, "test")
    for group, figures in results.items():
        assert again[group] == pytest.approx(figures, nan_ok=True), group
