"""The LazyConfigs describe the models of the YAML files, and train."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from omegaconf import ListConfig

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.trainer import LazyTrainer

PARTS = [
    "proposal_generator",
    "proposal_generator.anchor_generator",
    *(f"roi_heads.{part}" for part in ("box_predictor", "mask_head")),
    *(f"roi_heads.{part}_pooler.pooler" for part in ("box", "mask")),
    "roi_heads",
]


def settings(module):
    """The plain values that a module was made with: thresholds, batch sizes, feature names."""
    plain = {}
    for key, value in vars(module).items():
        if isinstance(value, (tuple, list, ListConfig)) and key != "conv_norm_relus":
            plain[key] = list(value)
        elif isinstance(value, (int, float, str, dict)) and not key.startswith("_"):
            plain[key] = value
    # Weights of 1 are given by YAML for one loss and left to the default for the others.
    if isinstance(plain.get("loss_weight"), dict):
        plain["loss_weight"] = {k: v for k, v in plain["loss_weight"].items() if v != 1.0}
    return plain


@pytest.mark.parametrize("size", ["R_50", "lite"])
def test_lazy_and_yaml_models_are_equal(size):
    lazy_cfg = LazyConfig.load(f"configs/lazy/imrcnn_{size}.py")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    lazy_cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    torch.manual_seed(0)
    lazy_model = instantiate(lazy_cfg.model)
    yaml_model = build_model(load_config(f"configs/imrcnn_{size}.yaml", opts))
    for module in yaml_model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            # Without statistics of real features they grow into the thousands, and boxes vanish.
            module.weight.fill_(0.3)
    assert list(lazy_model.state_dict()) == list(yaml_model.state_dict())
    lazy_model.load_state_dict(yaml_model.state_dict())
    models = lazy_model, yaml_model
    parameters = [[(n, p.requires_grad) for n, p in m.named_parameters()] for m in models]
    assert parameters[0] == parameters[1]
    for part in PARTS:
        ours, theirs = (settings(model.get_submodule(part)) for model in models)
        assert ours == theirs and len(ours) > 1, part

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        a, b = (m.eval()([{"image": image}])[0]["instances"] for m in models)
    assert len(a) == 100
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(a.get(field), b.get(field)), field
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_a_lazy_config_trains_resumes_and_evaluates(tiny_datasets, lazy_opts, tmp_path):
    for split, name in tiny_datasets.items():
        lazy_opts.append(f"dataloader.{split}.dataset.names={name}")
        if split != "train":
            lazy_opts.append(f"dataloader.{split}_evaluator.dataset_name={name}")
    lazy_opts += ["train.eval_period=1", "train.checkpointer.period=1"]
    lazy_opts += [f"train.output_dir={tmp_path}", "train.max_iter=2"]
    cfg = LazyConfig.apply_overrides(LazyConfig.load("configs/lazy/imrcnn_lite.py"), lazy_opts)
    trainer = LazyTrainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert results["lesion"]["TN"] + results["lesion"]["FP"] >= 1
    for name in ("best", "0000000"):  # of the first iteration, by the period
        assert (tmp_path / f"model_{name}.pth").is_file(), name
    changed = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    assert any("pan_down" in k for k in changed)
    assert not any("bottom_up.body.conv_stem" in k for k in changed), "a frozen layer moved"

    cfg.train.max_iter = 3
    resumed = LazyTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    assert resumed.best.best_score == trainer.best.best_score is not None
    again, _ = LazyTrainer.evaluate(cfg, trainer.model, "test")
    for group, values in results.items():
        assert again[group] == pytest.approx(values, nan_ok=True), group
