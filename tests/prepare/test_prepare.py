"""What lies on disk afterwards, and that nothing else does."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from imrcnn_d2.data.formats import read_coco, read_kvasir_seg, with_lesion_free
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset, write_folds
from imrcnn_d2.data.prepare.splits import Item, make_splits, read_splits
from imrcnn_d2.utils.files import BadInputError, Rejects

NAMES = [f"{i:02d}" for i in range(20)]


def prepare(root, out, on_error="raise", negatives=None, **options):
    rejects = Rejects(on_error)
    source = read_kvasir_seg(root, rejects)
    if negatives is not None:
        source = with_lesion_free(source, negatives, rejects)
    return prepare_dataset(source, out, SplitOptions(**options), rejects)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_json(path):
    return json.loads(path.read_text())


def test_layout(kvasir_folder, tmp_path):
    root, out = kvasir_folder(NAMES), tmp_path / "sets" / "kvasir_seg"
    prepared = prepare(root, out)
    assert not prepared.unchanged
    assert sorted(path.name for path in out.iterdir()) == ["annotations", "images", "splits.json"]
    assert os.listdir(out.parent) == ["kvasir_seg"]
    for name in NAMES:
        assert os.path.samefile(root / "images" / f"{name}.png", out / "images" / f"{name}.png")

    splits = read_json(out / "splits.json")
    assert {k: splits[k] for k in ("seed", "ratio", "split_by")} == {
        "seed": 0,
        "ratio": [12, 3, 5],
        "split_by": "image",
    }
    assert [len(splits[s]) for s in ("train", "val", "test")] == [12, 3, 5]
    for split in ("train", "val", "test"):
        images = read_json(out / "annotations" / f"{split}.json")["images"]
        assert [image["file_name"] for image in images] == splits[split]


def test_pycocotools_reads_it_and_ids_are_contiguous(kvasir_folder, tmp_path):
    prepare(kvasir_folder(NAMES), tmp_path / "out")
    files = [COCO(str(path)) for path in sorted((tmp_path / "out" / "annotations").iterdir())]
    assert sorted(i for coco in files for i in coco.getImgIds()) == list(range(1, 21))
    assert sorted(i for coco in files for i in coco.getAnnIds()) == list(range(1, 21))
    for coco in files:
        for annotation in coco.loadAnns(coco.getAnnIds()):
            name = coco.loadImgs(annotation["image_id"])[0]["file_name"]
            mask = np.zeros((40, 60), bool)
            mask[10:30, 5 + int(name[:2]) : 25 + int(name[:2])] = True
            assert np.array_equal(coco.annToMask(annotation), mask)


def test_byte_for_byte(kvasir_folder, tmp_path):
    root = kvasir_folder(NAMES)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(root, tmp_path / name, seed=seed, folds=5)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a["splits.json"] != c["splits.json"]


def test_real_data_gives_600_150_250(kvasir_352, tmp_path):
    prepared = prepare(kvasir_352, tmp_path / "out")
    assert [len(coco["images"]) for coco in prepared.coco.values()] == [600, 150, 250]
    # counted with SciPy: 1,067 components, 4 of them specks of one pixel
    assert sum(len(coco["annotations"]) for coco in prepared.coco.values()) == 1063
    assert "4 specks of fewer than 16 pixels left out of the masks" in prepared.notes


def test_negatives_are_shared_alike(kvasir_folder, no_polyp, tmp_path):
    prepared = prepare(kvasir_folder(NAMES), tmp_path / "out", negatives=no_polyp)
    healthy = []
    for coco in prepared.coco.values():
        with_lesion = {annotation["image_id"] for annotation in coco["annotations"]}
        healthy.append(sum(image["id"] not in with_lesion for image in coco["images"]))
    assert sum(healthy) == 10
    assert np.abs(np.array(healthy) - (6, 1.5, 2.5)).max() < 1


def test_same_job_again_changes_nothing(kvasir_folder, tmp_path):
    root, out = kvasir_folder(NAMES), tmp_path / "out"
    prepare(root, out)
    (out / "test_evaluations.csv").write_text("grows with every look at the test set\n")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare(root, out).unchanged
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"ratio": (1, 1, 1)}, {"folds": 2}, {"on_error": "reject"}]
)
def test_another_job_is_refused(kvasir_folder, tmp_path, change):
    root, out = kvasir_folder(NAMES), tmp_path / "out"
    prepare(root, out)
    before = contents(out)
    with pytest.raises(FileExistsError, match="holds a data set made from other data or"):
        prepare(root, out, **change)
    assert contents(out) == before
    assert sorted(os.listdir(tmp_path)) == ["kvasir", "out"]


def test_other_images_are_refused(kvasir_folder, tmp_path):
    root, out = kvasir_folder(NAMES), tmp_path / "out"
    prepare(root, out)
    brighter = Image.open(root / "images" / "03.png").point(lambda value: min(255, value + 9))
    (root / "images" / "03.png").unlink()  # the prepared one is the same file
    brighter.save(root / "images" / "03.png")
    with pytest.raises(FileExistsError, match="images/03.png would change"):
        prepare(root, out)


def test_what_is_no_data_set_is_refused_at_once(kvasir_folder, tmp_path):
    root, out = kvasir_folder(), tmp_path / "thesis"
    out.mkdir()
    prepare(root, out / "new")  # a folder in it is fine
    (tmp_path / "file").write_text("x")
    for occupied in (out, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="exists and is no prepared data set"):
            prepare(root, occupied)
    (tmp_path / "empty").mkdir()
    assert len(contents(tmp_path / "empty")) == 0
    prepare(root, tmp_path / "empty")
    assert (tmp_path / "empty" / "splits.json").is_file()


def test_a_failed_run_leaves_nothing(kvasir_folder, tmp_path):
    root = kvasir_folder()
    (root / "masks" / "c.png").unlink()
    with pytest.raises(BadInputError):
        prepare(root, tmp_path / "out")
    assert os.listdir(tmp_path) == ["kvasir"]


def test_rejects_are_listed_and_leave_no_file(kvasir_folder, tmp_path):
    root, out = kvasir_folder(), tmp_path / "out"
    (root / "masks" / "b.png").unlink()
    prepare(root, out, "reject")
    header, row = (out / "rejected.csv").read_text().splitlines()
    assert header == "file,reason"
    assert row.startswith(f"{root}/images/b.png,has no mask")
    assert sorted(os.listdir(out / "images")) == ["a.png", "c.png"]


def test_nothing_usable(kvasir_folder, tmp_path):
    root = kvasir_folder(["a"])
    (root / "masks" / "a.png").write_text("x")
    with pytest.raises(BadInputError, match="no usable image"):
        prepare(root, tmp_path / "out", "reject")


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("images/b.png", "copy.png", "copy.png: duplicate: same content as .*images/b.png"),
        ("masks/b.png", "b.png", "negatives/b.png: duplicate: b.png was already made from"),
    ],
)
def test_duplicates(kvasir_folder, tmp_path, file, name, message):
    root, negatives = kvasir_folder(), tmp_path / "negatives"
    negatives.mkdir()
    shutil.copy(root / file, negatives / name)
    with pytest.raises(BadInputError, match=message):
        prepare(root, tmp_path / "out", negatives=negatives)
    prepare(root, tmp_path / "out", "reject", negatives)
    assert sorted(os.listdir(tmp_path / "out" / "images")) == ["a.png", "b.png", "c.png"]


def test_converted_images(kvasir_folder, tmp_path):
    root, out = kvasir_folder(["a", "b"]), tmp_path / "out"
    picture = Image.open(root / "images" / "a.png").convert("CMYK")
    picture.save(root / "images" / "a.tif")
    (root / "images" / "a.png").unlink()
    prepared = prepare(root, out)
    assert sorted(os.listdir(out / "images")) == ["a.png", "b.png"]
    assert Image.open(out / "images" / "a.png").mode == "RGB"
    assert f"{root}/images/a.tif: CMYK converted to 8-bit RGB PNG" in prepared.notes


def test_folds(kvasir_folder, tmp_path):
    root, out = kvasir_folder(NAMES), tmp_path / "out"
    prepare(root, out, folds=5)
    folds = [read_splits(path) for path in sorted((out / "folds").iterdir())]
    assert len(folds) == 5
    assert sorted(n for fold in folds for n in fold["test"]) == [f"{n}.png" for n in NAMES]
    # a fold can be prepared from its file
    fold = prepare(root, tmp_path / "fold", earlier=folds[2])
    for split, coco in fold.coco.items():
        assert [image["file_name"] for image in coco["images"]] == folds[2][split]


def test_earlier_splits(kvasir_folder, tmp_path):
    root = kvasir_folder(NAMES)
    prepare(root, tmp_path / "old", seed=7)
    earlier = read_splits(tmp_path / "old" / "splits.json")
    gone = earlier["test"][0]
    for folder in ("images", "masks"):
        (root / folder / gone).rename(root / folder / "new.png")
    prepared = prepare(root, tmp_path / "new", earlier=earlier)
    now = read_splits(tmp_path / "new" / "splits.json")
    assert now["train"] == earlier["train"]
    assert set(now["test"]) == {*earlier["test"], "new.png"} - {gone}
    assert f"1 files of the given splits are gone: {gone}" in prepared.notes


def own_data(coco_folder, tmp_path, **options):
    def edit(coco):
        for image, patient in zip(coco["images"], ("p", "p", "q"), strict=True):
            image["patient_id"] = patient
        coco["annotations"][0]["lesion_id"] = "l"

    rejects = Rejects()
    source = read_coco(*coco_folder(edit), rejects)
    return prepare_dataset(source, tmp_path / "out", SplitOptions(**options), rejects)


def test_patients_of_own_data(coco_folder, tmp_path):
    prepared = own_data(coco_folder, tmp_path, ratio=(1, 0, 1))
    patients = [
        {image["patient_id"] for image in coco["images"]} for coco in prepared.coco.values()
    ]
    assert sorted(map(len, patients)) == [0, 1, 1]
    assert read_json(Path(tmp_path / "out" / "splits.json"))["split_by"] == "patient"
    annotations = [a for coco in prepared.coco.values() for a in coco["annotations"]]
    assert annotations[0]["lesion_id"] == "l"


def test_own_data_by_image(coco_folder, tmp_path):
    prepared = own_data(coco_folder, tmp_path, ratio=(1, 1, 1), split_by="image")
    assert [len(coco["images"]) for coco in prepared.coco.values()] == [1, 1, 1]
    assert read_json(Path(tmp_path / "out" / "splits.json"))["split_by"] == "image"


def test_splits_from_file_names(kvasir_folder, tmp_path):
    more = [f"test_{letter}" for letter in "bcdefgh"]
    root = kvasir_folder(["train_a", "train_b", "valid_a", "test_a", *more])
    prepared = prepare(root, tmp_path / "out", split_by="prefix", folds=2)
    splits = read_json(tmp_path / "out" / "splits.json")
    assert [splits[s] for s in ("train", "val", "test")] == [
        ["train_a.png", "train_b.png"],
        ["valid_a.png"],
        ["test_a.png", *(f"{name}.png" for name in more)],
    ]
    assert (splits["split_by"], "ratio" in splits) == ("prefix", False)
    assert [len(content["images"]) for content in prepared.coco.values()] == [2, 1, 8]
    folder = write_folds(tmp_path / "out", 2)[0]
    for path in (tmp_path / "out" / "folds" / "fold0.json", folder / "out" / "splits.json"):
        assert read_json(path)["split_by"] == "image"
    earlier = {"train": ["test_a.png"], "val": [], "test": []}
    with pytest.raises(ValueError, match="earlier"):
        prepare(root, tmp_path / "other", split_by="prefix", earlier=earlier)


def test_near_duplicates_stay_together(kvasir_352, tmp_path):
    root, twins = tmp_path / "in", ("test_0033", "test_0051")
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
        for name in (*twins, *(f"train_{i:04d}" for i in range(5, 245, 60))):
            shutil.copyfile(kvasir_352 / folder / f"{name}.jpg", root / folder / f"{name}.jpg")
    names = {f"{name}.jpg" for name in twins}
    parted = 0
    for seed in range(4):
        out = tmp_path / str(seed)
        prepared = prepare(root, out, split_by="group", seed=seed, ratio=(1, 1, 1), folds=3)
        splits = read_json(out / "splits.json")
        assert splits["split_by"] == "group"
        assert [len(splits[s]) for s in ("train", "val", "test")] == [2, 2, 2]
        assert sum(names <= set(splits[s]) for s in ("train", "val", "test")) == 1
        for fold in (out / "folds").iterdir():
            assert sum(names <= set(part) for part in read_splits(fold).values()) == 1
        by_image = make_splits(
            [Item(path.name, True) for path in (out / "images").iterdir()], (1, 1, 1), seed
        )
        parted += not any(names <= set(part) for part in by_image.values())
    assert parted  # else the seeds would have shown nothing
    assert read_json(out / "near_duplicates.json")["groups"] == [sorted(names)]
    images = [image for content in prepared.coco.values() for image in content["images"]]
    assert {image["file_name"] for image in images if image.get("group_id") == 1} == names
    assert sum("group_id" in image for image in images) == 2
    assert any(
        "1 pairs of near-duplicates; 2 images in 1 groups" in note for note in prepared.notes
    )
    # and so do the folds that are written beside it
    for folder in write_folds(out, 3):
        fold = read_splits(next(folder.iterdir()) / "splits.json")
        assert sum(names <= set(part) for part in fold.values()) == 1
