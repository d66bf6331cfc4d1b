"""What a report states of the data set is what its files hold."""

import json
import shutil

from imrcnn_d2.report.cohort import cohort


def test_a_prepared_data_set(study, study_runs):
    folder, data = study / "datasets" / "study", cohort(study_runs["MR-CNN"])
    assert [split["name"] for split in data["splits"]] == ["Training", "Validation", "Test"]
    assert [split["tested"] for split in data["splits"]] == [False, False, True]
    records = []
    for name, split in zip(("train", "val", "test"), data["splits"], strict=True):
        coco = json.loads((folder / "annotations" / f"{name}.json").read_text())
        images, annotations = coco["images"], coco["annotations"]
        numbers = [split[key] for key in ("images", "lesions", "lesion_free", "patients")]
        with_lesion = {annotation["image_id"] for annotation in annotations}
        patients = {image["patient_id"] for image in images}
        lesion_free = len(images) - len(with_lesion)
        assert numbers == [len(images), len(annotations), lesion_free, len(patients)]
        records += images
    patients = {image["patient_id"] for image in records}
    assert (data["images"], data["patients"]) == (40, len(patients))
    assert (data["offered"], data["excluded"], data["notes"]) == (43, 3, [])
    assert data["reasons"] == [("mask is empty", 2), ("duplicate", 1)]
    assert data["rejected"][2] == ("2.jpg", "duplicate: same content as a.jpg")
    assert "1:1:3, seed 0; images of one patient are in one split" in data["caption"]


def test_nothing_but_the_test_set(home, tmp_path):
    alone = shutil.copy(home.gt, tmp_path / "alone.json")
    home.change("metrics.json", {"meta.gt": str(alone)})
    data = cohort(home.load())
    assert [split["name"] for split in data["splits"]] == ["alone"]
    assert data["offered"] is None and "alone.json" in data["notes"][0]


def test_a_patient_in_two_splits_and_a_crowd(home):
    before, coco = cohort(home.load()), json.loads(home.gt.read_text())
    patient = coco["images"][0]["patient_id"]
    train = "annotations/train.json"
    home.change_data(lambda content: content["images"][0].update(patient_id=patient), train)
    home.change_data(lambda content: content["annotations"][0].update(iscrowd=1))
    data = cohort(home.load())
    assert len(before["notes"]) == 0 and "more than one split (1 " in data["notes"][0]
    assert data["splits"][2]["lesions"] == before["splits"][2]["lesions"] - 1


def test_how_the_data_were_split(home):
    group, common = {"split_by": "group"}, {"ratio": [1, 1, 3], "seed": 4}
    for settings, expected in (
        (group, "Split at random 1:1:3, seed 4; near-duplicates, and images of"),
        ({"split_by": "prefix"}, "Split as the file names state;"),
        ({**group, "fold": 1, "folds": 5}, "Fold 1 of 5, seed 4; near-dup"),
    ):
        home.change_data(lambda content, new=settings: content.update(common | new), "splits.json")
        assert cohort(home.load())["caption"].startswith(expected)
