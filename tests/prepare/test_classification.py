"""Folders and tables of images with a class each: what is read, split and refused."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.data.formats import read_class_folders, read_label_csv
from imrcnn_d2.data.formats.classification import carve_validation
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset, write_folds
from imrcnn_d2.data.prepare.splits import FixedTest
from imrcnn_d2.utils.files import BadInputError, Rejects

CLASSES = ("cancer", "ulcer", "gastritis")


@pytest.fixture
def root(tmp_path, picture):
    """One folder a class, with 12, 16 and 20 images."""
    for k, (name, number) in enumerate(zip(CLASSES, (12, 16, 20), strict=True)):
        (tmp_path / "raw" / name).mkdir(parents=True)
        for i in range(number):
            image = Image.fromarray(picture(8, 9, 100 * k + i))
            image.save(tmp_path / "raw" / name / f"{i:02}.png")
    return tmp_path / "raw"


@pytest.fixture
def table(root):
    """A function that writes rows of file, label, patient_id and split as a CSV."""

    def write(rows, header="file,label,patient_id,split", separator=","):
        lines = [header, *(separator.join(map(str, row)) for row in rows)]
        path = root.parent / "labels.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
        return path

    return write


def all_rows(root, patient=lambda i: "", split=lambda i: ""):
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    return [[name, name.split("/")[0], patient(i), split(i)] for i, name in enumerate(files)]


def prepared(source, out, given=None, **options):
    rejects = Rejects()
    return prepare_dataset(source, out, SplitOptions(earlier=given, **options), rejects)


def labels(content):
    """{file_name: class} of a COCO file."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    assert len(content["annotations"]) == len(files)
    assert all(set(a) == {"id", "image_id", "category_id"} for a in content["annotations"])
    return {files[a["image_id"]]: names[a["category_id"]] for a in content["annotations"]}


def test_folders_become_a_data_set(root, tmp_path):
    source = read_class_folders(root, Rejects())
    assert source.splits == {}
    coco = prepared(source, tmp_path / "out").coco
    assert [c["name"] for c in coco["test"]["categories"]] == sorted(CLASSES)
    assert [c["supercategory"] for c in coco["test"]["categories"]] == [
        "cancer",
        "benign",
        "benign",
    ]
    counts = {split: Counter(labels(content).values()) for split, content in coco.items()}
    # 12:3:5 of 12, 16 and 20, whole images, 48 in all
    assert {split: sum(own.values()) for split, own in counts.items()} == {
        "train": 29,
        "val": 7,
        "test": 12,
    }
    for name, number in zip(CLASSES, (12, 16, 20), strict=True):
        assert sum(own[name] for own in counts.values()) == number
        assert abs(counts["test"][name] - number / 4) <= 1
    for content in coco.values():
        for name, label in labels(content).items():
            assert name.startswith(f"{label}/")
            assert (tmp_path / "out" / "images" / name).read_bytes() == (root / name).read_bytes()


def test_a_test_set_of_fixed_size_as_published(root, tmp_path):
    source = read_class_folders(root, Rejects())
    coco = prepared(source, tmp_path / "out", ratio=FixedTest(5, 10)).coco
    assert Counter(labels(coco["test"]).values()) == dict.fromkeys(CLASSES, 5)
    # A tenth of 7 + 11 + 15 for validation.
    assert len(coco["val"]["images"]) == 3
    assert Counter(labels(coco["val"]).values()) == dict.fromkeys(CLASSES, 1)
    settings = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert (settings["test_per_class"], settings["val_percent"]) == (5, 10)
    assert "ratio" not in settings
    with pytest.raises(ValueError, match="test set of 12 images of each class leaves nothing"):
        prepared(source, tmp_path / "other", ratio=FixedTest(12))
    for wrong in ((0, 10), (5, 0), (5, 100)):
        with pytest.raises(ValueError, match="give at least 1, and 1 to 99"):
            FixedTest(*wrong)


def test_classes_have_the_order_asked_for_and_cancers_can_be_named(root):
    source = read_class_folders(root, Rejects(), CLASSES, ["ulcer", "cancer"])
    assert [(c["id"], c["name"], c["supercategory"]) for c in source.categories] == [
        (1, "cancer", "cancer"),
        (2, "ulcer", "cancer"),
        (3, "gastritis", "benign"),
    ]
    assert any("cancer, ulcer" in note for note in source.notes)
    with pytest.raises(ValueError, match="polyp: no such class; there are cancer, ulcer"):
        read_class_folders(root, Rejects(), CLASSES, ["polyp"])


def test_without_a_cancer_class_nothing_is_called_benign(root):
    (root / "cancer").rename(root / "polyp")
    source = read_class_folders(root, Rejects())
    assert not any("supercategory" in category for category in source.categories)


def test_a_table_with_patients(root, table, tmp_path):
    rows = all_rows(root, patient=lambda i: f"p{i // 3}")
    path = table([[*row[:3], "", "A"] for row in rows], "file,label,patient_id,split,centre")
    source = read_label_csv(path, root, Rejects())
    assert source.splits == {}
    coco = prepared(source, tmp_path / "out").coco
    patients = [{image["patient_id"] for image in c["images"]} for c in coco.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 16
    assert {image["centre"] for c in coco.values() for image in c["images"]} == {"A"}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_that_gives_the_splits(root, table, tmp_path, separator):
    rows = all_rows(root, split=lambda i: ("train", "val", "test", "")[i % 4])
    header = separator.join(("file", "label", "patient_id", "split"))
    source = read_label_csv(table(rows, header, separator), root, Rejects())
    coco = prepared(source, tmp_path / "out", source.splits).coco
    for name, label, _, split in rows:
        if split:
            assert labels(coco[split])[name] == label
    assert sum(len(labels(content)) for content in coco.values()) == 48


def test_validation_is_carved_from_training_and_never_from_the_test_set(root, table, tmp_path):
    rows = all_rows(root, lambda i: f"p{i // 2}", lambda i: "test" if i // 2 % 4 == 0 else "train")
    source = read_label_csv(table(rows), root, Rejects())
    given = source.splits
    carved = carve_validation(source, 25)
    assert carved["test"] == given["test"]
    assert sorted(carved["train"] + carved["val"]) == sorted(given["train"])
    assert len(carved["val"]) == pytest.approx(len(given["train"]) / 4, abs=2)
    patient = {row[0]: row[2] for row in rows}
    parts = [{patient[name] for name in carved[split]} for split in ("train", "val")]
    assert not parts[0] & parts[1]
    coco = prepared(source, tmp_path / "out", carved).coco
    assert sorted(labels(coco["test"])) == sorted(given["test"])
    with pytest.raises(ValueError, match="100 % of the training images"):
        carve_validation(source, 100)
    # Those that are given are left alone.
    source.splits = {**given, "val": given["train"][:3], "train": given["train"][3:]}
    assert carve_validation(source, 25) == source.splits


def test_folds_are_stratified_by_class(root, tmp_path):
    source = read_class_folders(root, Rejects())
    out = prepared(source, tmp_path / "gastric_recognition", folds=4).out
    tested = Counter()
    for folder in write_folds(out, 4):
        path = folder / "gastric_recognition" / "annotations" / "test.json"
        counts = Counter(labels(json.loads(path.read_text())).values())
        assert counts == {"cancer": 3, "ulcer": 4, "gastritis": 5}
        tested.update(list(labels(json.loads(path.read_text()))))
        split = json.loads((out / "folds" / f"{folder.name}.json").read_text())
        assert sorted(labels(json.loads(path.read_text()))) == split["test"]
    assert set(tested.values()) == {1} and len(tested) == 48


def test_a_converted_image_keeps_its_split(root, table, tmp_path):
    Image.fromarray(np.full((8, 9), 4000, np.uint16)).save(root / "ulcer" / "deep.tiff")
    rows = [*all_rows(root, split=lambda i: ("train", "val", "test")[i % 3])]
    rows.append(["ulcer/deep.tiff", "ulcer", "", "test"])
    Image.fromarray(np.linspace(0, 65000, 72, dtype=np.uint16).reshape(8, 9)).save(
        root / "ulcer" / "deep.tiff"
    )
    source = read_label_csv(table(rows), root, Rejects())
    coco = prepared(source, tmp_path / "out", source.splits).coco
    assert labels(coco["test"])["ulcer/deep.png"] == "ulcer"


def put(root, name, content):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: (r / "polyp").mkdir(), "polyp: empty class"),
        (lambda r: put(r, "ulcer/x.png", b"no image"), "x.png: is no readable image"),
        (lambda r: put(r, "ulcer/x.png", (r / "ulcer/00.png").read_bytes()[:90]), "x.png: is no"),
        (
            lambda r: put(r, "ulcer/x.png", (r / "cancer/00.png").read_bytes()),
            "two labels: 'cancer' here, 'ulcer' with the same content in .*ulcer/x.png",
        ),
        (lambda r: put(r, "polyp/x.png", b"x"), "unknown label 'polyp'; the classes are cancer"),
    ],
)
def test_bad_folders(root, change, message):
    change(root)
    with pytest.raises(BadInputError, match=message):
        read_class_folders(root, Rejects(), CLASSES if "unknown" in message else None)


def test_bad_files_are_listed_and_left_out(root, tmp_path):
    put(root, "ulcer/x.png", b"no image")
    put(root, "ulcer/y.png", (root / "cancer/00.png").read_bytes())
    put(root, "ulcer/z.png", (root / "ulcer/01.png").read_bytes())
    (root / "polyp").mkdir()
    rejects = Rejects("reject")
    source = read_class_folders(root, rejects)
    out = prepare_dataset(source, tmp_path / "out", SplitOptions(), rejects)
    reasons = [(error.file.removeprefix(f"{root}/"), error.reason) for error in rejects.errors]
    assert [name for name, _ in reasons] == [
        "polyp",
        "ulcer/x.png",
        "cancer/00.png",
        "ulcer/y.png",
        "ulcer/z.png",
    ]
    assert sum(len(labels(content)) for content in out.coco.values()) == 47
    assert [c["name"] for c in source.categories] == sorted(CLASSES)


def test_folders_that_are_no_classes(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_class_folders(root / "none", Rejects())
    with pytest.raises(ValueError, match="there is no folder in it"):
        read_class_folders(root / "ulcer", Rejects())
    for name in ("train", "test"):
        (tmp_path / "splits" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="test, train are splits, not classes"):
        read_class_folders(tmp_path / "splits", Rejects())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["cancer/00.png", "", "", ""]], "line 2: has no label"),
        ([["cancer/00.png", "cancr", "", ""]], "line 2: unknown label 'cancr'; the classes are"),
        ([["cancer/00.png", "cancer", "", "training"]], "unknown split 'training'"),
        ([["../raw/cancer/00.png", "cancer", "", ""]], "leads outside"),
        ([["cancer/none.png", "cancer", "", ""]], "none.png: cannot be opened: No such file"),
        ([["cancer/00.png", "cancer", "", ""]] * 2, "line 3: cancer/00.png is listed in line 2"),
        (
            [["cancer/00.png", "cancer", "", "train"], ["copy.png", "cancer", "", "test"]],
            "00.png: in two splits: train here, test with the same content in .*copy.png",
        ),
        (
            [["cancer/00.png", "cancer", "", ""], ["ulcer/00.png", "ulcer", "", ""]],
            "empty class: no image of gastritis",
        ),
    ],
)
def test_bad_tables(root, table, rows, message):
    put(root, "copy.png", (root / "cancer/00.png").read_bytes())
    with pytest.raises(BadInputError, match=message):
        read_label_csv(table(rows), root, Rejects(), CLASSES)


def test_a_table_without_its_columns(root, table, tmp_path):
    with pytest.raises(BadInputError, match="lacks the columns label; it has file, class"):
        read_label_csv(table([["a.png", "ulcer"]], "file,class"), root, Rejects())
    with pytest.raises(BadInputError, match="none.csv: cannot be opened"):
        read_label_csv(tmp_path / "none.csv", root, Rejects())


def test_every_split_needs_every_class(root, table, tmp_path):
    rows = all_rows(root, split=lambda i: "train" if i < 12 else ("train", "val", "test")[i % 3])
    source = read_label_csv(table(rows), root, Rejects())
    with pytest.raises(ValueError, match="val has no image of cancer: every split needs all 3"):
        prepared(source, tmp_path / "out", source.splits)
    assert not (tmp_path / "out").exists()


def test_a_patient_in_two_given_splits(root, table, tmp_path):
    rows = all_rows(root, lambda i: f"p{i // 2}", lambda i: ("train", "val", "test")[i % 3])
    source = read_label_csv(table(rows), root, Rejects())
    with pytest.raises(ValueError, match="have patient p.* in more than one part"):
        prepared(source, tmp_path / "out", source.splits)
