"""Classified images and simulated classifiers: folders as preparing and training leave them."""

import json

import numpy as np
import yaml
from PIL import Image, ImageDraw

from imrcnn_d2.data.formats import read_class_folders
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.evaluation import Bootstrap, evaluate_classification
from imrcnn_d2.evaluation.output import CLASSIFICATION_RESULTS, write_results
from imrcnn_d2.utils.files import Rejects, file_sha256

CLASSES = ("gastric cancer", "gastric ulcer", "chronic gastritis")
COLOURS = ((190, 60, 70), (230, 220, 190), (220, 130, 120))


def draw_classes(root, numbers, size=48):
    """Write one folder per class, of images with a spot in the class's colour."""
    for k, (name, number) in enumerate(zip(CLASSES, numbers, strict=True)):
        (root / name).mkdir(parents=True)
        for i in range(number):
            rng = np.random.default_rng([k, i])
            image = Image.fromarray(rng.integers(120, 160, (size, size, 3), dtype=np.uint8))
            x, y = rng.integers(4, size // 2, 2).tolist()
            ImageDraw.Draw(image).ellipse((x, y, x + size // 3, y + size // 3), fill=COLOURS[k])
            image.save(root / name / f"{k}_{i:02}.png")
    return root


def prepare_classes(root, out, **options):
    rejects = Rejects()
    source = read_class_folders(root, rejects)
    return prepare_dataset(source, out, SplitOptions(**options), rejects)


def write_classifier(
    output, gt, *, skill=1.0, seed=0, backbone="resnet50", fold=None, temperature=None
):
    """Write an OUTPUT_DIR with an evaluation of simulated probabilities; return it."""
    dataset, content = "gastric_recognition_test", json.loads(gt.read_text())
    folder = output / "inference" / dataset
    ids = sorted(category["id"] for category in content["categories"])
    rng, results = np.random.default_rng(seed), []
    for annotation in content["annotations"]:
        scores = rng.normal(size=len(ids))
        scores[ids.index(annotation["category_id"])] += 2 * skill
        scores = np.exp(scores) / np.exp(scores).sum()
        results.append({"image_id": annotation["image_id"], "scores": scores.tolist()})
    meta = {"dataset": dataset, "gt": str(gt), "gt_sha256": file_sha256(gt)}
    if temperature is not None:
        results, meta["score_map"] = temperature.map_records(results), vars(temperature)
    scored = evaluate_classification(gt, results, bootstrap=Bootstrap(100))
    meta |= {"image_root": str(gt.parent.parent / "images"), "checkpoint_sha256": "c" * 64}
    write_results(scored, folder, **meta)
    (folder / CLASSIFICATION_RESULTS).write_text(json.dumps(results))
    config = {"DATASETS": {"TEST": [dataset], "TRAIN": ["train"]}, "SEED": seed}
    config["MODEL"] = {"META_ARCHITECTURE": "ImageClassifier", "TIMM": {"NAME": backbone}}
    (output / "config.yaml").write_text(yaml.safe_dump(config))
    record = {"model": "ImageClassifier", "backbone": backbone, "seed": seed, "fold": fold}
    record |= {"finished": "2026-01-01", "datasets": {"train": {"images": 20}}}
    head = {"name": "pre-training", "trainable": "head", "iterations": 30, "lr": 1e-3}
    record |= {"input": {"size": 224}, "phases": [head]}
    (output / "run.json").write_text(json.dumps(record))
    return output
