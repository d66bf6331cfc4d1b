"""A data set of a few small images and a config that trains on it in seconds."""

import json
import uuid

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as mask_util
from scipy.signal import correlate2d
from scipy.special import expit

from imrcnn_d2.data.catalog import register_classification_dataset, register_lesion_dataset
from imrcnn_d2.engine import load_config

SIZE = 96


def write_dataset(folder, num_images):
    """Write images with one bright disc each, every third without, and their COCO JSON."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(num_images)
    images, annotations = [], []
    for i in range(1, num_images + 1):
        image = rng.integers(40, 80, (SIZE, SIZE, 3), dtype=np.uint8)
        images.append({"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE})
        if i % 3:
            centre, radius = rng.integers(30, 66, 2).tolist(), int(rng.integers(12, 26))
            cv2.circle(image, centre, radius, (60, 90, 230), -1)
            mask = cv2.circle(np.zeros((SIZE, SIZE), np.uint8), centre, radius, 1, -1)
            rle = mask_util.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": float(mask_util.area(rle)),
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
        cv2.imwrite(str(folder / f"{i}.png"), image)
    categories = [{"id": 1, "name": "lesion"}]
    coco = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(coco))
    return folder / "coco.json"


def registered(root, parts, write, register):
    """Yield the names of data sets, by part, that are written and registered; then remove them."""
    prefix = uuid.uuid4().hex
    names = {}
    for split, what in parts.items():
        json_file = write(root / split, what)
        names[split] = f"{prefix}_{split}"
        register(names[split], json_file, json_file.parent)
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def tiny_datasets(tmp_path_factory):
    """Names of a train, a val and a test set with 6, 4 and 5 images."""
    parts = {"train": 6, "val": 4, "test": 5}
    root = tmp_path_factory.mktemp("tiny")
    yield from registered(root, parts, write_dataset, register_lesion_dataset)


@pytest.fixture
def tiny_opts(tiny_datasets, tmp_path):
    """Overrides that make any light config train on the tiny data set, a few iterations."""
    return [
        *("DATASETS.TRAIN", (tiny_datasets["train"],)),
        *("DATASETS.VAL", (tiny_datasets["val"],)),
        *("DATASETS.TEST", (tiny_datasets["test"],)),
        *("DATALOADER.NUM_WORKERS", 0),
        *("INPUT.MIN_SIZE_TRAIN", (SIZE,)),
        *("INPUT.MIN_SIZE_TEST", SIZE),
        *("MODEL.DEVICE", "cpu"),
        *("MODEL.TIMM.WEIGHTS", ""),
        *("MODEL.FPN.OUT_CHANNELS", 32),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 32),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
        *("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),  # so that a random model detects something
        *("SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.MAX_ITER", 4),
        *("SOLVER.EMA_DECAY", 0.0),  # what is kept is what was trained
        *("SOLVER.CHECKPOINT_PERIOD", 2),
        *("SOLVER.WARMUP_ITERS", 1),
        *("TEST.EVAL_PERIOD", 2),
        *("OUTPUT_DIR", str(tmp_path / "output")),
    ]


@pytest.fixture
def tiny_cfg(tiny_opts):
    """The light IMR-CNN on the tiny data set."""
    return load_config("configs/imrcnn_lite.yaml", tiny_opts)


CLASSES = ("cancer", "ulcer", "gastritis")


def write_classes(folder, counts):
    """Write small noisy images, each with a patch in its class's colour, and their COCO JSON."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(sum(counts))
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    images, annotations = [], []
    for i, label in enumerate(labels, 1):
        image = rng.integers(60, 120, (40, 40, 3), dtype=np.uint8)
        x, y = rng.integers(0, 20, 2)
        image[y : y + 20, x : x + 20, label] += 120
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 40})
        annotations.append({"id": i, "image_id": i, "category_id": label + 1})
        cv2.imwrite(str(folder / f"{i}.png"), image)
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    coco = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(coco))
    return folder / "coco.json"


@pytest.fixture(scope="session")
def tiny_class_datasets(tmp_path_factory):
    """Names of a train, a val and a test set with 8, 6 and 3 images of three classes."""
    parts = {"train": (4, 2, 2), "val": (2, 2, 2), "test": (1, 1, 1)}
    root = tmp_path_factory.mktemp("classes")
    yield from registered(root, parts, write_classes, register_classification_dataset)


@pytest.fixture
def tiny_classifier_opts(tiny_class_datasets, tmp_path):
    """Overrides that make any recognition config train on the tiny data set: two phases of 3."""
    return [
        *("DATASETS.TRAIN", (tiny_class_datasets["train"],)),
        *("DATASETS.VAL", (tiny_class_datasets["val"],)),
        *("DATASETS.TEST", (tiny_class_datasets["test"],)),
        *("DATALOADER.NUM_WORKERS", 0),
        *("INPUT.SIZE", 32),
        *("MODEL.DEVICE", "cpu"),
        *("MODEL.TIMM.WEIGHTS", ""),
        *("SOLVER.IMS_PER_BATCH", 4),
        *("SOLVER.CHECKPOINT_PERIOD", 1),
        *("SOLVER.WARMUP_ITERS", 1),
        *("SOLVER.CHECKPOINTS_TO_KEEP", 9),
        *(
            "SOLVER.PHASES",
            [
                {"name": "one", "iterations": 3, "lr": 0.01, "trainable": "head"},
                {"name": "two", "iterations": 3, "lr": 0.001, "trainable": "stages from 4"},
            ],
        ),
        *("TEST.EVAL_PERIOD", 0),
        *("OUTPUT_DIR", str(tmp_path / "output")),
    ]


@pytest.fixture
def tiny_classifier_cfg(tiny_classifier_opts):
    """The light classifier on the tiny data set."""
    return load_config("configs/efficientnet_lite0.yaml", tiny_classifier_opts)


def _cbam(x, weights, scale):
    """
    Equations 1 to 3 of Woo et al. (2018), image by image.

    Args:
        x (Tensor): (N, C, H, W).
        weights (dict[str, Tensor]): the state dict of a CBAM.
        scale (float): factor on each sigmoid.

    Returns:
        ndarray: (N, C, H, W).
    """
    first, second = (weights[f"channel.mlp.{i}.weight"].double().numpy() for i in (0, 2))
    kernel = weights["spatial.conv.weight"][0].double().numpy()

    def mlp(v):
        return second @ np.maximum(first @ v, 0)

    result = []
    for image in x.detach().double().numpy():
        flat = image.reshape(len(image), -1)
        refined = image * scale * expit(mlp(flat.mean(1)) + mlp(flat.max(1)))[:, None, None]
        pooled = (refined.mean(0), refined.max(0))
        logits = sum(correlate2d(p, k, mode="same") for p, k in zip(pooled, kernel, strict=True))
        result.append(refined * scale * expit(logits))
    return np.stack(result)


@pytest.fixture(scope="session")
def numpy_cbam():
    """The function above."""
    return _cbam
