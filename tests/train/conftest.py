"""A data set of a few small images and a config that trains on it in seconds."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances

from imrcnn_d2.data.catalog import register_classification_dataset, register_lesion_dataset
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.engine import load_config

SIZE = 96
CLASSES = ("cancer", "ulcer", "gastritis")


def load(path):
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def changed(before, after):
    """Names of the tensors that differ between two states of a model."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def sample(height, width, boxes=()):
    """An image as the mapper gives it; the mask of each lesion is all of it."""
    truth, number = Instances((height, width)), len(boxes)
    truth.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    truth.gt_classes = torch.zeros(number, dtype=torch.int64)
    truth.gt_masks = BitMasks(torch.ones(number, height, width, dtype=torch.bool))
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": truth}


def write_coco(folder, images, annotations, names):
    """Write images and a COCO JSON with these annotations; returns its path."""
    folder.mkdir(parents=True)
    height, width = images[0].shape[:2]
    records = []
    for i, image in enumerate(images, 1):
        cv2.imwrite(str(folder / f"{i}.png"), image)
        records.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
    annotations = [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)]
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    coco = {"info": {}, "images": records, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(coco))
    return folder / "coco.json"


def _write_lesions(folder, num_images):
    """Write images with one bright disc each, every third without, and their COCO JSON."""
    rng = np.random.default_rng(num_images)
    images, annotations = [], []
    for i in range(1, num_images + 1):
        image = rng.integers(40, 80, (SIZE, SIZE, 3), dtype=np.uint8)
        if i % 3:
            centre, radius = rng.integers(30, 66, 2).tolist(), int(rng.integers(12, 26))
            cv2.circle(image, centre, radius, (60, 90, 230), -1)
            mask = cv2.circle(np.zeros((SIZE, SIZE), np.uint8), centre, radius, 1, -1)
            annotations.append(annotation_from_mask(mask.astype(bool), image_id=i))
        images.append(image)
    return write_coco(folder, images, annotations, ["lesion"])


def _write_classes(folder, counts):
    """Write small noisy images, each with a patch in its class's colour, and their COCO JSON."""
    rng = np.random.default_rng(sum(counts))
    labels = np.repeat(range(len(counts)), counts).tolist()
    images = []
    for label in labels:
        image = rng.integers(60, 120, (40, 40, 3), dtype=np.uint8)
        x, y = rng.integers(0, 20, 2)
        image[y : y + 20, x : x + 20, label] += 120
        images.append(image)
    annotations = [{"image_id": i, "category_id": label + 1} for i, label in enumerate(labels, 1)]
    return write_coco(folder, images, annotations, CLASSES)


def _registered(root, parts, write, register):
    """Yield the names of data sets, by part, that are written and registered; then remove them."""
    names = {split: f"{root.name}_{split}" for split in parts}
    for split, content in parts.items():
        json_file = write(root / split, content)
        register(names[split], json_file, json_file.parent)
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def tiny_datasets(tmp_path_factory):
    """Names of a train, a val and a test set with 6, 4 and 5 images."""
    parts, root = {"train": 6, "val": 4, "test": 5}, tmp_path_factory.mktemp("tiny")
    yield from _registered(root, parts, _write_lesions, register_lesion_dataset)


@pytest.fixture(scope="session")
def tiny_class_datasets(tmp_path_factory):
    """Names of a train, a val and a test set with 8, 6 and 3 images of three classes."""
    parts = {"train": (4, 2, 2), "val": (2, 2, 2), "test": (1, 1, 1)}
    root = tmp_path_factory.mktemp("classes")
    yield from _registered(root, parts, _write_classes, register_classification_dataset)


def _common(names, tmp_path):
    sets = [x for split in names for x in (f"DATASETS.{split.upper()}", (names[split],))]
    opts = ["DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""]
    return [*sets, *opts, "SOLVER.WARMUP_ITERS", 1, "OUTPUT_DIR", str(tmp_path / "output")]


@pytest.fixture
def tiny_opts(tiny_datasets, tmp_path):
    """Overrides that make any light config train on the tiny data set, a few iterations."""
    return [
        *_common(tiny_datasets, tmp_path),
        *("INPUT.MIN_SIZE_TRAIN", (SIZE,), "INPUT.MIN_SIZE_TEST", SIZE),
        *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),  # so that a random model detects something
        *("SOLVER.EMA_DECAY", 0.0),  # what is kept is what was trained
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4),
        *("SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2),
    ]


@pytest.fixture
def tiny_cfg(tiny_opts):
    """The light IMR-CNN on the tiny data set."""
    return load_config("configs/imrcnn_lite.yaml", tiny_opts)


@pytest.fixture
def tiny_classifier_opts(tiny_class_datasets, tmp_path):
    """Overrides that make any classifier's config train on the tiny data set: two phases of 3."""
    first = {"name": "one", "iterations": 3, "lr": 0.01, "trainable": "head"}
    second = {"name": "two", "iterations": 3, "lr": 0.001, "trainable": "stages from 4"}
    return [
        *_common(tiny_class_datasets, tmp_path),
        *("INPUT.SIZE", 32, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.PHASES", [first, second]),
        *("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINTS_TO_KEEP", 9, "TEST.EVAL_PERIOD", 0),
    ]


@pytest.fixture
def tiny_classifier_cfg(tiny_classifier_opts):
    """The light classifier on the tiny data set."""
    return load_config("configs/efficientnet_lite0.yaml", tiny_classifier_opts)


@pytest.fixture
def lazy_opts():
    """Overrides that make the light LazyConfig train on images of 96 pixels."""
    opts = ["train.device=cpu", "model.backbone.bottom_up.weights=''"]
    opts.append("dataloader.train.total_batch_size=2")
    for split, size in (("train", [SIZE]), ("val", SIZE), ("test", SIZE)):
        opts.append(f"dataloader.{split}.num_workers=0")
        opts.append(f"dataloader.{split}.mapper.augmentations.0.short_edge_length={size}")
    return opts


@pytest.fixture
def tiny_lazy_opts(tiny_datasets, lazy_opts, tmp_path):
    """The same, and the tiny data set."""
    opts = [f"dataloader.{split}.dataset.names={name}" for split, name in tiny_datasets.items()]
    for split in ("val", "test"):
        opts.append(f"dataloader.{split}_evaluator.dataset_name={tiny_datasets[split]}")
    return [*lazy_opts, *opts, f"train.output_dir={tmp_path / 'output'}"]
