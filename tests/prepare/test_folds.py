"""Fold data sets are what preparing the data with each fold's splits would give."""

import json
from collections import Counter
from pathlib import Path

import pytest

from imrcnn_d2.data.formats import read_kvasir_seg
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset, write_folds
from imrcnn_d2.data.prepare.splits import read_splits
from imrcnn_d2.data.prepare.synthetic import generate
from imrcnn_d2.utils.files import Rejects

SPLITS = ("train", "val", "test")


@pytest.fixture
def prepared(tmp_path):
    """A prepared data set with patients and lesion-free images, 24 images, and its folds' files."""
    (tmp_path / "drawn").mkdir()
    source = generate(tmp_path / "drawn", 24, 64, 0)
    options = SplitOptions(seed=3, folds=3)
    return prepare_dataset(source, tmp_path / "sets" / "synthetic", options, Rejects()).out


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.parent.is_symlink()
    }


def test_a_fold_is_what_preparing_with_its_splits_gives(prepared, tmp_path):
    roots = write_folds(prepared, 3)
    for i, root in enumerate(roots):
        source = generate(tmp_path / "drawn", 24, 64, 0)
        splits = prepared / "folds" / f"fold{i}.json"
        again = prepare_dataset(
            source, tmp_path / f"again{i}", SplitOptions(earlier=read_splits(splits)), Rejects()
        ).out
        fold = root / "synthetic"
        for split in SPLITS:
            name = f"annotations/{split}.json"
            assert (fold / name).read_bytes() == (again / name).read_bytes(), (i, split)
        assert (fold / "splits.json").read_bytes() == splits.read_bytes()
        assert json.loads((fold / "splits.json").read_text())["folds"] == 3


def test_every_image_is_tested_once_and_patients_stay_together(prepared):
    tested, patients = Counter(), Counter()
    for root in write_folds(prepared, 3):
        fold = root / "synthetic"
        in_split = {}
        for split in SPLITS:
            images = json.loads((fold / "annotations" / f"{split}.json").read_text())["images"]
            in_split[split] = {image["patient_id"] for image in images}
            for image in images:
                assert (fold / "images" / image["file_name"]).is_file()
                tested[image["file_name"]] += split == "test"
        assert not in_split["train"] & in_split["test"]
        assert not in_split["val"] & in_split["test"]
        patients.update(in_split["test"])
    assert len(tested) == 24 and set(tested.values()) == {1}
    assert set(patients.values()) == {1}


def test_folds_are_written_once(prepared):
    first = write_folds(prepared, 2)
    folder = prepared.with_name("synthetic.folds2")
    (first[0] / "synthetic" / "test_evaluations.csv").write_text("a look at the test set\n")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_folds(prepared, 2) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert sorted(path.name for path in prepared.parent.iterdir()) == [
        "synthetic",
        "synthetic.folds2",
    ]


def test_folds_of_other_data_are_refused(prepared):
    root = write_folds(prepared, 2)[1]
    train = root / "synthetic" / "annotations" / "train.json"
    train.write_text(train.read_text().replace("patient", "person"))
    with pytest.raises(FileExistsError, match="fold1/synthetic/annotations/train.json"):
        write_folds(prepared, 2)


def test_it_can_be_moved_with_its_data_set(prepared, tmp_path):
    write_folds(prepared, 2)
    moved = prepared.parent.rename(tmp_path / "moved")
    images = moved / "synthetic.folds2" / "fold1" / "synthetic" / "images"
    assert len(list(images.iterdir())) == 24


def test_what_was_rejected_is_known_to_the_folds(kvasir_folder, tmp_path):
    root = kvasir_folder([f"{i}" for i in range(8)])
    (root / "masks" / "3.png").unlink()
    rejects = Rejects("reject")
    source = read_kvasir_seg(root, rejects)
    prepared = prepare_dataset(source, tmp_path / "kvasir_seg", SplitOptions(), rejects).out
    for fold in write_folds(prepared, 2):
        copy = fold / "kvasir_seg" / "rejected.csv"
        assert copy.read_bytes() == (prepared / "rejected.csv").read_bytes()
        assert len(copy.read_text().splitlines()) == 2


def test_no_prepared_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_dataset.py"):
        write_folds(tmp_path / "kvasir_seg", 5)


@pytest.mark.parametrize(
    ("count", "named"), [(1, "at least 2"), (25, "nothing for fold .*'s test")]
)
def test_impossible_numbers_of_folds(prepared, count, named):
    with pytest.raises(ValueError, match=f"{count} folds.*{named}"):
        write_folds(prepared, count)
    assert not Path(f"{prepared}.folds{count}").exists()
