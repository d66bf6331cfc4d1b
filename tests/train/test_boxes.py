"""Training on lesions that have boxes and no masks."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from imrcnn_d2.data.catalog import register_lesion_dataset
from imrcnn_d2.engine.config import load_config
from imrcnn_d2.engine.trainer import Trainer


@pytest.fixture
def box_cfg(tiny_opts, tiny_datasets, tmp_path):
    """The light IMR-CNN on the tiny data set without its masks."""
    names = {}
    for split, name in tiny_datasets.items():
        DatasetCatalog.get(name)
        metadata = MetadataCatalog.get(name)
        content = json.loads(open(metadata.json_file, encoding="utf-8").read())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps(content))
        names[split] = f"boxes_{name}"
        register_lesion_dataset(names[split], path, metadata.image_root)
    sets = [x for split in names for x in (f"DATASETS.{split.upper()}", (names[split],))]
    yield load_config("configs/imrcnn_lite.yaml", [*tiny_opts, *sets])
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_masks_are_not_learned_from_boxes(box_cfg):
    with pytest.raises(ValueError, match=r"\.png.*MODEL\.MASK_ON"):
        Trainer(box_cfg)
    box_cfg.MODEL.MASK_ON, box_cfg.INPUT.AUG.COPY_PASTE_PROB = False, 0.5
    with pytest.raises(ValueError, match=r"COPY_PASTE_PROB.*MODEL\.MASK_ON"):
        Trainer(box_cfg)


def test_a_detector_of_boxes_is_trained_and_validated(box_cfg, tmp_path):
    box_cfg.MODEL.MASK_ON = False
    trainer = Trainer(box_cfg)
    trainer.train()
    Trainer.test(box_cfg, trainer.model)
    (path,) = tmp_path.glob(f"output/inference/{box_cfg.DATASETS.TEST[0]}/metrics.json")
    metrics = json.loads(path.read_text())
    assert metrics["lesion"]["TP"] + metrics["lesion"]["FN"] == 4  # in five images
    assert metrics["meta"]["iou_type"] == "bbox" and metrics["segm"]["AP"] is None
    assert metrics["bbox"]["AP"] is not None
