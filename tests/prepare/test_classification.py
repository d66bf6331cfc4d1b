"""Folders and tables of images with a class each: what is read, split and refused."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.cli import prepare_dataset as command
from imrcnn_d2.data.formats import classification, read_class_folders, read_label_csv
from imrcnn_d2.data.formats.classification import carve_validation
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.splits import FixedTest
from imrcnn_d2.utils.files import BadInputError, Rejects

CLASSES = ("cancer", "ulcer", "gastritis")
SPLITS = ("train", "val", "test")


@pytest.fixture
def root(tmp_path, noise):
    """One folder per class, with 12, 16 and 20 images."""
    for k, (name, number) in enumerate(zip(CLASSES, (12, 16, 20), strict=True)):
        (tmp_path / "raw" / name).mkdir(parents=True)
        for i in range(number):
            image = Image.fromarray(noise(8, 9, 100 * k + i))
            image.save(tmp_path / "raw" / name / f"{i:02}.png")
    return tmp_path / "raw"


@pytest.fixture
def table(root):
    """A function that writes rows of file, label, patient_id and split as a CSV and reads it."""

    def read(rows, header="file,label,patient_id,split", separator=",", classes=None):
        lines = [header.split(","), *rows]
        path = root.parent / "labels.csv"
        text = "\n".join(separator.join(map(str, line)) for line in lines)
        path.write_text(text + "\n", encoding="utf-8-sig")
        return read_label_csv(path, root, Rejects(), classes)

    return read


def all_rows(root, patient=lambda i: "", split=lambda i: ""):
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    return [[name, name.split("/")[0], patient(i), split(i)] for i, name in enumerate(files)]


def prepared(source, out, rejects=None, **options):
    return prepare_dataset(source, out, SplitOptions(**options), rejects or Rejects())


def labels(content):
    """{file_name: class} of a COCO file."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    assert len(content["annotations"]) == len(files)
    assert all(set(a) == {"id", "image_id", "category_id"} for a in content["annotations"])
    return {files[a["image_id"]]: names[a["category_id"]] for a in content["annotations"]}


def test_folders_become_a_data_set(root, tmp_path):
    source = read_class_folders(root, Rejects())
    coco = prepared(source, tmp_path / "out").coco
    categories = coco["test"]["categories"]
    assert [c["name"] for c in categories] == sorted(CLASSES) and source.splits == {}
    assert [c["supercategory"] for c in categories] == ["cancer", "benign", "benign"]
    counts = {split: Counter(labels(content).values()) for split, content in coco.items()}
    # 12:3:5 of 12, 16 and 20, whole images, 48 in all
    assert [sum(count.values()) for count in counts.values()] == [29, 7, 12]
    for name, number in zip(CLASSES, (12, 16, 20), strict=True):
        assert sum(count[name] for count in counts.values()) == number
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
    assert Counter(labels(coco["val"]).values()) == dict.fromkeys(CLASSES, 1)
    settings = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert (settings["test_per_class"], settings["val_percent"]) == (5, 10)
    assert "ratio" not in settings
    with pytest.raises(ValueError, match="12 images"):
        prepared(source, tmp_path / "other", ratio=FixedTest(12))
    for wrong in ((0, 10), (5, 0), (5, 100)):
        with pytest.raises(ValueError, match=f"{wrong[0]} .* {wrong[1]} %"):
            FixedTest(*wrong)


def test_classes_and_named_cancers(root):
    (root / ".cache").mkdir()
    source = read_class_folders(root, Rejects(), CLASSES, ["ulcer", "cancer"])
    kinds = [(c["id"], c["name"], c["supercategory"]) for c in source.categories]
    assert kinds == [(1, "cancer", "cancer"), (2, "ulcer", "cancer"), (3, "gastritis", "benign")]
    assert any("cancer, ulcer" in note for note in source.notes)
    with pytest.raises(ValueError, match="polyp: .*cancer, ulcer"):
        read_class_folders(root, Rejects(), CLASSES, ["polyp"])
    for wrong in (CLASSES[:1], [*CLASSES, "ulcer"]):
        with pytest.raises(BadInputError, match="all different"):
            read_class_folders(root, Rejects(), wrong)
    shutil.rmtree(root / "gastritis")
    for old, new in (("ulcer", "Carcinoma"), ("cancer", "polyp"), ("Carcinoma", "ulcer")):
        (root / old).rename(root / new)
        source = read_class_folders(root, Rejects())  # of two classes: both cancer, one, none
        assert ["supercategory" in c for c in source.categories] == [new == "polyp"] * 2
    for name, error in (("none", FileNotFoundError), ("ulcer", ValueError)):
        with pytest.raises(error, match=name):
            read_class_folders(root / name, Rejects())
    for split in ("train", "test"):
        (root / "splits" / split).mkdir(parents=True)
    with pytest.raises(ValueError, match="test, train"):
        read_class_folders(root / "splits", Rejects())


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_of_patients_that_gives_the_splits(root, table, tmp_path, separator):
    rows = all_rows(root, lambda i: f"p{i // 3}", lambda i: (*SPLITS, "")[i // 3 % 4])
    values = np.linspace(0, 65000, 72, dtype=np.uint16).reshape(8, 9)
    Image.fromarray(values).save(root / "ulcer" / "deep.tiff")
    more = [[*row, "A"] for row in (*rows, ["ulcer/deep.tiff", "ulcer", "", "test"])]
    source = table(more, "file,label,patient_id,split,centre", separator)
    assert "ulcer/deep.tiff" in {sample.file_name for sample in source.samples}  # as tables have it
    data_set = prepared(source, tmp_path / "out", earlier=source.splits)
    coco = data_set.coco
    assert any("deep.tiff: " in note for note in data_set.notes)
    for name, label, _, split in rows:
        assert not split or labels(coco[split])[name] == label
    assert labels(coco["test"])["ulcer/deep.png"] == "ulcer"  # converted
    assert sum(len(labels(content)) for content in coco.values()) == 49
    patients = [{image.get("patient_id") for image in c["images"]} for c in coco.values()]
    assert sum(len(part - {None}) for part in patients) == len(set.union(*patients) - {None}) == 16
    assert {image["centre"] for c in coco.values() for image in c["images"]} == {"A"}


def test_validation_is_carved_from_training_and_never_from_the_test_set(
    root, table, tmp_path, monkeypatch
):
    rows = all_rows(root, lambda i: f"p{i // 2}", lambda i: "train" if i // 2 % 4 else "test")
    source = table(rows)
    given = source.splits
    carved = carve_validation(source, 25)
    assert carved["test"] == given["test"]
    assert sorted(carved["train"] + carved["val"]) == sorted(given["train"])
    assert len(carved["val"]) == pytest.approx(len(given["train"]) / 4, abs=2)
    patient = {row[0]: row[2] for row in rows}
    by_image = carve_validation(source, 50, split_by="image")
    by_group = carve_validation(source, 25, split_by="group")
    for splits in (carved, by_image, by_group):
        train, val = ({patient[name] for name in splits[split]} for split in ("train", "val"))
        assert train.isdisjoint(val) == (splits is not by_image)
    # Near-duplicates stay together too: here each image and the one 16 after it.
    far = [[i, i + 16] for i in range(16)]
    monkeypatch.setattr(classification, "find_groups", lambda files, fields: ([], far))
    by_group = carve_validation(source, 50, split_by="group")
    train = [s.file_name for s in source.samples if s.file_name in {*given["train"]}]
    assert all((train[i] in by_group["val"]) == (train[j] in by_group["val"]) for i, j in far)
    coco = prepared(source, tmp_path / "out", earlier=carved).coco
    assert sorted(labels(coco["test"])) == sorted(given["test"])
    for wrong in (0, 100):
        with pytest.raises(ValueError, match=f"{wrong} %"):
            carve_validation(source, wrong)
    assert carve_validation(source, 1)["test"] == given["test"]
    assert carve_validation(source, 25, seed=1)["val"] != carved["val"]
    # Those that are given are left alone, and none are made where there is nothing to train.
    with_val = {**given, "val": given["train"][:3], "train": given["train"][3:]}
    for source.splits in (with_val, {"test": given["test"]}):
        assert carve_validation(source, 25) == source.splits


def test_requested_sizes_win_over_the_splits_of_a_table(root, table, tmp_path, capsys):
    table(all_rows(root, split=lambda i: ("train", "test")[i % 2]))
    options = ["--root", root, "--csv", root.parent / "labels.csv", "--out", tmp_path / "out"]
    command.main(["classification", *map(str, options), "--all-test"])
    tested = json.loads((tmp_path / "out" / "annotations" / "test.json").read_text())
    assert len(labels(tested)) == 48 and "as requested" in capsys.readouterr().out


def put(root, name, content):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(content)


def test_bad_files_are_listed_and_left_out(root, tmp_path):
    put(root, "ulcer/x.png", b"no image")
    put(root, "ulcer/y.png", (root / "cancer/00.png").read_bytes())
    put(root, "ulcer/z.png", (root / "ulcer/01.png").read_bytes())
    (root / "polyp").mkdir()
    rejects = Rejects("reject")
    source = read_class_folders(root, rejects)
    coco = prepared(source, tmp_path / "out", rejects).coco
    names = [error.file.removeprefix(f"{root}/") for error in rejects.errors]
    assert names == ["polyp", "ulcer/x.png", "cancer/00.png", "ulcer/y.png", "ulcer/z.png"]
    assert "'cancer', but 'ulcer'" in rejects.errors[2].reason
    assert sum(len(labels(content)) for content in coco.values()) == 47
    assert [c["name"] for c in source.categories] == sorted(CLASSES)
    with pytest.raises(BadInputError, match="polyp: empty class"):
        read_class_folders(root, Rejects())
    put(root, "polyp/x.png", b"x")
    with pytest.raises(BadInputError, match="'polyp'; .*cancer"):
        read_class_folders(root, Rejects(), CLASSES)


FIRST = ["cancer/00.png", "cancer", "", ""]
TWO_SPLITS = [["cancer/00.png", "cancer", "", "train"], ["copy.png", "cancer", "", "test"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["cancer/00.png", "", "", ""]], "line 2: has no label"),
        ([["cancer/00.png", "cancr", "", ""]], "line 2: .*'cancr'"),
        ([["cancer/00.png", "cancer", "", "training"]], "'training'"),
        ([["../raw/cancer/00.png", "cancer", "", ""]], "line 2: .*../raw"),
        ([["cancer/none.png", "cancer", "", ""]], "none.png: cannot be opened"),
        ([FIRST] * 2, "line 3: cancer/00.png .* line 2"),
        (TWO_SPLITS, "00.png: .*'train', but 'test' .*copy.png"),
        ([FIRST, ["ulcer/00.png", "ulcer", "", ""]], "gastritis"),
    ],
)
def test_bad_tables(root, table, rows, message):
    put(root, "copy.png", (root / "cancer/00.png").read_bytes())
    with pytest.raises(BadInputError, match=message):
        table(rows, classes=CLASSES)


def test_splits_that_cannot_be(root, table, tmp_path):
    source = table(all_rows(root, split=lambda i: "train" if i < 12 else SPLITS[i % 3]))
    with pytest.raises(ValueError, match="val has no image of cancer"):
        prepared(source, tmp_path / "out", earlier=source.splits)
    assert not (tmp_path / "out").exists()
    source = table(all_rows(root, lambda i: f"p{i // 2}", lambda i: SPLITS[i % 3]))
    with pytest.raises(ValueError, match="patient p"):
        prepared(source, tmp_path / "out", earlier=source.splits)
