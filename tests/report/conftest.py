"""Simulated runs: folders as a training leaves them, scored on images of rectangles."""

import hashlib
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import yaml
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.synthetic import generate
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.results import OperatingPoint
from imrcnn_d2.evaluation.output import write_results
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.report.runs import load_run
from imrcnn_d2.utils.files import BadInputError, Rejects

SIZE = 60


def ground_truth(path, images=24, first=1, classes=("polyp",), per_patient=None):
    """Write a COCO file of images with 0, 1, 2, 0, 1, ... lesions; returns its path."""
    rng = np.random.default_rng(first)
    records, annotations = [], []
    for number in range(first, first + images):
        record = {"id": number, "file_name": f"{number}.png", "height": SIZE, "width": SIZE}
        if per_patient:
            record["patient_id"] = f"p{number // per_patient}"
        records.append(record)
        for lesion in range(number % 3):
            x, y = 2 + 30 * lesion, int(rng.integers(2, 30))
            box = x, y, *rng.integers(12, 24, 2).tolist()
            category = int(rng.integers(1, len(classes) + 1))
            annotations.append(
                rectangle(number, *box, category, size=(SIZE, SIZE), id=len(annotations) + 1)
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"images": records, "annotations": annotations, "categories": categories})
    )
    return path


def detections(gt, skill, seed):
    """Most lesions, moved by a pixel or two, and false alarms: the fewer the higher the skill."""
    rng = np.random.default_rng(seed)
    content = json.loads(gt.read_text())
    found = []
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        if rng.random() < skill:
            box = x + int(rng.integers(0, 3)), y + int(rng.integers(0, 3)), width, height
            score = float(rng.uniform(0.5, 1))
            where = annotation["image_id"], *box, annotation["category_id"]
            found.append(rectangle(*where, size=(SIZE, SIZE), score=score))
    for image in content["images"]:
        if rng.random() > skill:
            category = int(rng.integers(1, len(content["categories"]) + 1))
            score = float(rng.uniform(0.1, 0.9))
            where = image["id"], 40, 45, 15, 12, category
            found.append(rectangle(*where, size=(SIZE, SIZE), score=score))
    return found


@pytest.fixture(scope="session")
def write_gt():
    return ground_truth


@pytest.fixture(scope="session")
def make_detections():
    return detections


def run_in(root):
    """
    A function that writes an OUTPUT_DIR into a folder, with its evaluation on a ground truth, as
    simulated detections have it, and with run.json and config.yaml; returns its path.
    """

    def do(
        name,
        gt,
        *,
        skill=0.8,
        seed=0,
        model="IMR-CNN",
        backbone="R-50",
        fold=None,
        tau=0.7,
        tau_val=None,
        dataset="kvasir_seg_test",
        lr=0.001,
        run_json=True,
        dt=None,
    ):
        output = root / "runs" / name
        folder = output / "inference" / dataset
        dt = detections(gt, skill, seed + 100) if dt is None else dt
        point = None if tau_val is None else OperatingPoint(tau_val, "f1", "kvasir_seg_val")
        results = evaluate_lesions(gt, dt, tau=tau, operating_point=point)
        sha256 = hashlib.sha256(gt.read_bytes()).hexdigest()
        write_results(results, folder, dataset=dataset, gt=str(gt), gt_sha256=sha256)
        (folder / "coco_instances_results.json").write_text(json.dumps(dt))
        config = f"DATASETS:\n  TEST: [{dataset}]\n  TRAIN: [train]\nSEED: {seed}\n"
        (output / "config.yaml").write_text(config + f"SOLVER:\n  BASE_LR: {lr}\n")
        if run_json:
            record = {"model": model, "backbone": backbone, "seed": seed, "finished": "2026"}
            record["fold"] = None if fold is None else {"index": fold[0], "of": fold[1]}
            record["datasets"] = {"train": {"images": 64}, "val": {"images": 16}}
            (output / "run.json").write_text(json.dumps(record))
        return output

    return do


# The names of two files of the study: markup if they were not escaped.
STUDY_MODELS = {"MR-CNN": 0.6, "IBMR-CNN": 0.75, "IMR-CNN": 0.9}
HOSTILE_NAMES = ("<img src=x onerror=hacked=1>.jpg", "</script><script>hacked=1</script>.jpg")


def found_in(coco, skill, seed):
    """Most lesions, their masks moved by some pixels, and false alarms: few at a high skill."""
    rng = np.random.default_rng(seed)
    found = []

    def add(image_id, mask, score):
        rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
        counts = {"size": rle["size"], "counts": rle["counts"].decode()}
        bbox = mask_util.toBbox(rle).tolist()
        found.append(
            {"image_id": image_id, "category_id": 1, "score": float(score), "bbox": bbox}
            | {"segmentation": counts}
        )

    for annotation in coco["annotations"]:
        if rng.random() < skill + 0.1:
            mask = mask_util.decode(annotation["segmentation"])
            moved = np.roll(mask, rng.integers(-6, 7, 2), (0, 1))
            add(annotation["image_id"], moved, rng.uniform(0.45, 1))
    for image in coco["images"]:
        if rng.random() > skill:
            y, x = np.mgrid[: image["height"], : image["width"]]
            centre, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.04, 0.12) * image["width"]
            round_ = np.hypot(y - centre[0] * len(y), x - centre[1] * len(y)) < radius
            add(image["id"], round_, rng.uniform(0.2, 0.95))
    return found


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """
    A folder with a prepared data set, ``datasets/study``, of drawn images with patients, and three
    trained models, ``runs/<name of STUDY_MODELS>``. Among the test images are one that EXIF turns
    and two with HOSTILE_NAMES.
    """
    root = tmp_path_factory.mktemp("study")
    data, drawn = root / "datasets" / "study", root / "drawn"
    drawn.mkdir()
    rejects = Rejects("reject")
    for reason in ("mask is empty", "mask is empty", "duplicate: same content as a.jpg"):
        rejects.errors.append(BadInputError(f"scans/{len(rejects.errors)}.jpg", reason))
    options = SplitOptions(ratio=(1, 1, 3))
    prepare_dataset(generate(drawn, 40, 96), data, options, rejects)
    gt = data / "annotations" / "test.json"
    coco = json.loads(gt.read_text())
    for image, name in zip(coco["images"], HOSTILE_NAMES, strict=False):
        path = data / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (data / "images" / image["file_name"]).rename(path)
        image["file_name"] = name
    turned = data / "images" / coco["images"][2]["file_name"]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    with Image.open(turned) as image:
        stored = image.transpose(Image.Transpose.ROTATE_90)
    turned.unlink()  # it is a hard link
    stored.save(turned, exif=exif, quality=95)
    gt.write_text(json.dumps(coco))
    for number, (name, skill) in enumerate(STUDY_MODELS.items()):
        write_study_run(root / "runs" / name, name, gt, found_in(coco, skill, number))
    return root


@pytest.fixture(scope="session")
def study_runs(study):
    """dict[str, Run]: the study's models by name, each scored once for all tests."""
    return {name: load_run(f"{name}={study / 'runs' / name}") for name in STUDY_MODELS}


def write_study_run(output, name, gt, dt):
    folder = output / "inference" / "study_test"
    point = OperatingPoint(0.62, "f1", "study_val")
    results = evaluate_lesions(gt, dt, operating_point=point, bootstrap=Bootstrap(60))
    sha256 = hashlib.sha256(gt.read_bytes()).hexdigest()
    meta = {"dataset": "study_test", "gt": str(gt), "gt_sha256": sha256}
    write_results(results, folder, checkpoint_sha256="c" * 64, **meta)
    (folder / "coco_instances_results.json").write_text(json.dumps(dt))
    config = {"MODEL": {"WEIGHTS": "", "PAFPN": {"ATTENTION": "cbam" if name == "IMR-CNN" else ""}}}
    config |= {"DATASETS": {"TEST": ["study_test"]}, "SEED": 3, "OUTPUT_DIR": str(output)}
    (output / "config.yaml").write_text(yaml.safe_dump(config))
    record = {"model": name, "backbone": "tf_efficientnet_lite0", "seed": 3, "iterations": 300}
    record |= {"git": {"revision": "0123abc", "dirty": True}, "device": "cpu", "hours": 0.25}
    record |= {"started": "2026-01-01T10:00:00", "finished": "2026-01-01T10:15:00"}
    record |= {"config_sha256": "d" * 64, "command": "tools/train_net.py", "fold": None}
    (output / "run.json").write_text(json.dumps(record | {"datasets": {}, "splits_sha256": None}))


@pytest.fixture(scope="session")
def write_run_in():
    return run_in


@pytest.fixture
def write_run(tmp_path):
    return run_in(tmp_path)
