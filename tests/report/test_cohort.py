import json
import shutil
from pathlib import Path

import pytest

from imrcnn_d2.report.cohort import cohort
from imrcnn_d2.report.runs import load_run
from imrcnn_d2.utils.files import file_sha256


def test_what_a_prepared_data_set_holds(study, study_runs):
    data = study / "datasets" / "study"
    found = cohort(study_runs["MR-CNN"])
    assert [split["name"] for split in found["splits"]] == ["Training", "Validation", "Test"]
    assert [split["tested"] for split in found["splits"]] == [False, False, True]
    people, images = set(), 0
    for name, split in zip(("train", "val", "test"), found["splits"], strict=True):
        coco = json.loads((data / "annotations" / f"{name}.json").read_text())
        with_lesion = {a["image_id"] for a in coco["annotations"]}
        own = {image["patient_id"] for image in coco["images"]}
        assert split["images"] == len(coco["images"])
        assert split["lesions"] == len(coco["annotations"])
        assert split["lesion_free"] == len(coco["images"]) - len(with_lesion)
        assert split["patients"] == len(own)
        people |= own
        images += len(coco["images"])
    assert (found["images"], found["patients"]) == (images, len(people)) == (40, len(people))
    assert (found["offered"], found["excluded"]) == (43, 3)
    assert found["reasons"] == [("mask is empty", 2), ("duplicate", 1)]
    assert found["rejected"][2] == ("2.jpg", "duplicate: same content as a.jpg")
    assert found["notes"] == []
    assert "1:1:3, seed 0; images of one patient are in one split" in found["caption"]


def move(study, tmp_path, change):
    """A copy of the study's first run whose data set ``change`` has worked on."""
    data = shutil.copytree(study / "datasets" / "study", tmp_path / "datasets" / "study")
    folder = shutil.copytree(study / "runs" / "MR-CNN", tmp_path / "run")
    metrics = folder / "inference" / "study_test" / "metrics.json"
    document = json.loads(metrics.read_text())
    gt = Path(change(data))
    document["meta"] |= {"gt": str(gt), "gt_sha256": file_sha256(gt)}
    metrics.write_text(json.dumps(document))
    return load_run(folder)


def test_nothing_but_the_test_set(study, tmp_path):
    def change(data):
        return shutil.copy(data / "annotations" / "test.json", tmp_path / "alone.json")

    found = cohort(move(study, tmp_path, change))
    assert [split["name"] for split in found["splits"]] == ["alone"]
    assert found["offered"] is None
    assert "no record of training images" in found["notes"][0]


def test_a_patient_in_two_splits_is_pointed_out(study, tmp_path):
    def change(data):
        train, test = data / "annotations" / "train.json", data / "annotations" / "test.json"
        coco = json.loads(train.read_text())
        patient = json.loads(test.read_text())["images"][0]["patient_id"]
        coco["images"][0]["patient_id"] = patient
        train.write_text(json.dumps(coco))
        return test

    (note,) = cohort(move(study, tmp_path, change))["notes"]
    assert note.startswith("Patients are in more than one split (1 times)")


def test_crowds_are_no_lesions(study, study_runs, tmp_path):
    def change(data):
        test = data / "annotations" / "test.json"
        coco = json.loads(test.read_text())
        coco["annotations"][0]["iscrowd"] = 1
        test.write_text(json.dumps(coco))
        return test

    before = cohort(study_runs["MR-CNN"])["splits"][2]["lesions"]
    assert cohort(move(study, tmp_path, change))["splits"][2]["lesions"] == before - 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"split_by": "group", "ratio": [1, 1, 3], "seed": 4},
            "Split at random 1:1:3, seed 4; near-duplicates, and images of one patient",
        ),
        ({"split_by": "prefix", "ratio": [1, 1, 3], "seed": 4}, "Split as the file names state;"),
        ({"split_by": "group", "fold": 1, "folds": 5, "seed": 4}, "Fold 1 of 5, seed 4; near-dup"),
    ],
)
def test_how_the_data_were_split(study, tmp_path, settings, expected):
    def change(data):
        splits = json.loads((data / "splits.json").read_text())
        (data / "splits.json").write_text(json.dumps({**splits, **settings}))
        return data / "annotations" / "test.json"

    assert cohort(move(study, tmp_path, change))["caption"].startswith(expected)
