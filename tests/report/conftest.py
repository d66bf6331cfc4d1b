"""Simulated runs: folders as a training leaves them, scored on images of rectangles."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import html5lib
import numpy as np
import pytest
import yaml
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.synthetic import generate
from imrcnn_d2.evaluation import Bootstrap, OperatingPoint, evaluate_lesions
from imrcnn_d2.evaluation.output import write_results
from imrcnn_d2.report import load_run
from imrcnn_d2.utils.files import BadInputError, Rejects, file_sha256

SIZE = (60, 60)
STUDY_MODELS = {"MR-CNN": 0.6, "IBMR-CNN": 0.75, "IMR-CNN": 0.9}
# Of two files of the study: markup if they were not escaped.
HOSTILE_NAMES = ("<img src=x onerror=hacked=1>.jpg", "</script><script>hacked=1</script>.jpg")


def ground_truth(path, images=24, first=1, classes=("polyp",), per_patient=None, source=None):
    """Write a COCO file of images with 0, 1, 2, 0, 1, ... lesions, with the source of its images;
    returns its path."""
    rng = np.random.default_rng(first)
    records, annotations = [], []
    for number in range(first, first + images):
        record = {"id": number, "file_name": f"{number}.png", "height": 60, "width": 60}
        if per_patient:
            record["patient_id"] = f"p{number // per_patient}"
        records.append(record)
        for lesion in range(number % 3):
            x, y = 2 + 30 * lesion, int(rng.integers(2, 30))
            box = x, y, *rng.integers(12, 24, 2).tolist()
            category = int(rng.integers(1, len(classes) + 1))
            number_of = {"size": SIZE, "id": len(annotations) + 1}
            annotations.append(rectangle(number, *box, category, **number_of))
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    content = {"images": records, "annotations": annotations, "categories": categories}
    content["info"] = {"source": source} if source else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def detections(gt, skill, seed):
    """Most lesions, moved by a pixel or two, and false alarms: the fewer the higher the skill."""
    rng = np.random.default_rng(seed)
    content = json.loads(gt.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    results = []

    def add(image_id, *box, score):
        results.append(rectangle(image_id, *box, size=sizes[image_id], score=float(score)))

    for annotation in content["annotations"]:
        x, y, width, height = map(int, annotation["bbox"])
        if rng.random() < skill:
            box = x + int(rng.integers(0, 3)), y + int(rng.integers(0, 3)), width, height
            score = rng.uniform(0.5, 1)
            add(annotation["image_id"], *box, annotation["category_id"], score=score)
    for image in content["images"]:
        if rng.random() > skill:
            category = int(rng.integers(1, len(content["categories"]) + 1))
            add(image["id"], 40, 45, 15, 12, category, score=rng.uniform(0.1, 0.9))
    return results


def run_in(root):
    """A function that writes an OUTPUT_DIR into a folder, with its evaluation on a ground truth, as
    simulated detections have it, and with run.json and config.yaml; returns its path."""

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
        boxes=False,
        bootstrap=None,
        score_map=None,
        record=None,
        config=None,
        **meta,
    ):
        output = root / "runs" / name
        dt = detections(gt, skill, seed + 100) if dt is None else dt
        if score_map is not None:
            dt, meta["score_map"] = score_map.map_records(dt), vars(score_map)
        if boxes:
            dt = [{k: v for k, v in result.items() if k != "segmentation"} for result in dt]
        point = None if tau_val is None else OperatingPoint(tau_val, "f1", "kvasir_seg_val")
        options = {"tau": tau, "operating_point": point, "bootstrap": bootstrap}
        folder = output / "inference" / dataset
        meta |= {"dataset": dataset, "gt": str(gt), "gt_sha256": file_sha256(gt)}
        write_results(evaluate_lesions(gt, dt, **options), folder, **meta)
        (folder / "coco_instances_results.json").write_text(json.dumps(dt))
        sets = {"TEST": [dataset], "TRAIN": ["train"]}
        places = {"DATASETS": sets, "SEED": seed, "OUTPUT_DIR": str(output)}
        config = {**places, "SOLVER": {"BASE_LR": lr}, **(config or {})}
        (output / "config.yaml").write_text(yaml.safe_dump(config))
        if run_json:
            fields = {"model": model, "backbone": backbone, "seed": seed, "finished": "2026"}
            fields["fold"] = None if fold is None else {"index": fold[0], "of": fold[1]}
            fields["datasets"] = {"train": {"images": 64}, "val": {"images": 16}}
            (output / "run.json").write_text(json.dumps(fields | (record or {})))
        return output

    return do


@pytest.fixture(scope="session")
def write_gt():
    return ground_truth


@pytest.fixture(scope="session")
def write_run_in():
    return run_in


@pytest.fixture
def write_run(tmp_path):
    return run_in(tmp_path)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A folder with a prepared data set, ``datasets/study``, of synthetic images with patients, and
    three trained models, ``runs/<name of STUDY_MODELS>``. Among the test images are one that EXIF
    turns and two with HOSTILE_NAMES; they are of three centres."""
    root = tmp_path_factory.mktemp("study")
    data, rendered = root / "datasets" / "study", root / "rendered"
    rendered.mkdir()
    rejects = Rejects("reject")
    for reason in ("mask is empty", "mask is empty", "duplicate: same content as a.jpg"):
        rejects.errors.append(BadInputError(f"scans/{len(rejects.errors)}.jpg", reason))
    prepare_dataset(generate(rendered, 40, 96), data, SplitOptions(ratio=(1, 1, 3)), rejects)
    gt = data / "annotations" / "test.json"
    coco = json.loads(gt.read_text())
    for image, name in zip(coco["images"], HOSTILE_NAMES, strict=False):
        path = data / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (data / "images" / image["file_name"]).rename(path)
        image["file_name"] = name
    for number, image in enumerate(coco["images"]):  # three of the third
        image["centre"] = "Rome" if number < 3 else ("Bonn", "Lyon")[number % 2]
    turned = data / "images" / coco["images"][2]["file_name"]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    with Image.open(turned) as image:
        stored = image.transpose(Image.Transpose.ROTATE_90)
    turned.unlink()  # it is a hard link
    stored.save(turned, exif=exif, quality=95)
    gt.write_text(json.dumps(coco))
    record = {"iterations": 300, "git": {"revision": "0123abc", "dirty": True}, "device": "cpu"}
    record |= {"started": "2026-01-01T10:00:00", "finished": "2026-01-01T10:15:00", "hours": 0.25}
    record |= {"config_sha256": "d" * 64, "command": "tools/train_net.py", "datasets": {}}
    options = {"seed": 3, "backbone": "tf_efficientnet_lite0", "dataset": "study_test"}
    options |= {"tau_val": 0.62, "bootstrap": Bootstrap(60), "checkpoint_sha256": "c" * 64}
    for name, skill in STUDY_MODELS.items():
        config = {"MODEL": {"PAFPN": {"ATTENTION": "cbam" if name == "IMR-CNN" else ""}}}
        of_model = {"model": name, "skill": skill, "record": record, "config": config}
        run_in(root)(name, gt, **options, **of_model)
    return root


@pytest.fixture(scope="session")
def study_runs(study):
    """The study's runs by model, each scored once for all tests."""
    return {name: load_run(f"{name}={study / 'runs' / name}") for name in STUDY_MODELS}


@dataclasses.dataclass
class Home:
    """A user's folder: ``datasets/study`` and a run of another on it, ``run``."""

    path: Path

    @property
    def gt(self):
        return self.path / "datasets/study/annotations/test.json"

    def file(self, name):
        """Path of one of the run's files, by its name."""
        inner = "" if name in ("run.json", "config.yaml") else "inference/study_test"
        return self.path / "run" / inner / name

    def change(self, name, values):
        """Set values in a JSON file of the run, by names with dots; ... removes one."""
        document = json.loads(self.file(name).read_text())
        for key, value in values.items():
            *outer, last = key.split(".")
            node = functools.reduce(dict.__getitem__, outer, document)
            node[last] = value
            if value is ...:
                del node[last]
        self.file(name).write_text(json.dumps(document))

    def change_data(self, edit, name="annotations/test.json"):
        """Edit the content of a JSON file of the data set; the run knows the ground truth so."""
        path = self.path / "datasets/study" / name
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        sha256 = file_sha256(self.gt)
        self.change("metrics.json", {"meta.gt": str(self.gt), "meta.gt_sha256": sha256})

    def load(self, *args, **options):
        return load_run(self.path / "run", *args, **options)


@pytest.fixture
def home(study, tmp_path, monkeypatch):
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path / "datasets"))
    shutil.copytree(study / "datasets", tmp_path / "datasets")
    shutil.copytree(study / "runs" / "MR-CNN", tmp_path / "run")
    home = Home(tmp_path)
    home.change("metrics.json", {"meta.gt": str(home.gt)})
    return home


def parsed(text):
    """The elements of a page without a network, by strict rules, and the words of its sections."""
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
    ids = [node.get("id") for node in tree.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    assert {node.get("href")[1:] for node in tree.iter("a")} <= set(ids)
    for node in tree.iter():
        for key in ("aria-labelledby", "aria-describedby"):
            assert node.get(key, ids[0]) in ids
        for key in ("src", "srcset", "action"):
            assert node.get(key, "data:").startswith("data:")
    assert not list(tree.iter("link")) and tree.get("lang") == "en"
    (style,) = tree.iter("style")
    assert "@import" not in style.text and "url(" not in style.text
    assert "default-src 'none'" in text
    sections = tree.iter("section")
    return tree, {node.get("id"): " ".join(" ".join(node.itertext()).split()) for node in sections}


@pytest.fixture(scope="session")
def parse():
    return parsed
