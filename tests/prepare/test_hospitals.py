"""Several hospitals: their folders as they come, prepared sets merged, and centres left out."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import real_data
from PIL import Image

from imrcnn_d2.data.prepare.data_set import left_out_by, write_folds

SPLITS = ("train", "val", "test")


@pytest.fixture
def hospital(tmp_path, noise):
    """Returns a function that writes NAME/images and NAME/masks, and gives the arguments that name
    them; of each image the mask is `mask.format(image)`, with a square or, for every third, none.
    """

    def make(name, images, mask="{}", seed=0):
        for number, image in enumerate(images):
            pixels = np.zeros((32, 40), np.uint8)
            if number % 3 != 2:
                pixels[4:20, 6:20] = 255
            for kind, stem, values in (
                ("images", image, noise(32, 40, seed + number)),
                ("masks", mask.format(image), pixels),
            ):
                path = tmp_path / name / kind / f"{stem}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
        return "--images", tmp_path / name / "images", "--masks", tmp_path / name / "masks"

    return make


def contents(out):
    return {
        split: json.loads((out / "annotations" / f"{split}.json").read_text()) for split in SPLITS
    }


def images(out):
    """The records of images by file name."""
    return {i["file_name"]: i for content in contents(out).values() for i in content["images"]}


@pytest.mark.parametrize("mask", ["{}_mask", "{}_segmentation", "p{}", "seg-{}-1"])
def test_names_of_masks_are_found_and_reported(run, tmp_path, hospital, mask):
    folders = hospital("a", ["1", "2", "10", "11", "21"], mask)
    printed = run("masks", *folders, "--out", tmp_path / "out")
    assert f"{tmp_path}/a/masks: the mask of NAME is {mask.format('NAME')};" in printed
    counts = Counter(
        a["image_id"] for c in contents(tmp_path / "out").values() for a in c["annotations"]
    )
    names = {image["id"]: name for name, image in images(tmp_path / "out").items()}
    # By Path, "1.png" < "10.png"; the third and every third after it has an empty mask.
    assert sorted(names[id_] for id_ in counts) == ["1.png", "11.png", "2.png", "21.png"]


def test_a_suffix_that_is_given_is_the_only_one(run, tmp_path, hospital):
    folders = hospital("a", ["1", "2"], "{}_mask")
    message = run("masks", *folders, "--suffix", "_seg", "--out", tmp_path / "out", fails=True)
    assert "1_mask.png" in message


def test_masks_among_the_images_are_refused(run, tmp_path, hospital):
    folder = hospital("a", ["1", "2"])[1]
    args = "masks", "--images", folder, "--masks", folder, "--out", tmp_path / "out"
    message = run(*args, fails=True)
    assert str(folder) in message and "--masks" in message


def test_centres_are_the_folders_unless_something_else_gives_them(run, tmp_path, hospital):
    one, two = (
        hospital("data_C1", ["p1_1", "p1_2", "x"]),
        hospital("data_C2", ["p1_1", "y"], seed=9),
    )
    folders = one[:2] + two[1:2] + one[2:] + two[3:]
    printed = run("masks", *folders, "--out", tmp_path / "a")
    assert {name: i["centre"] for name, i in images(tmp_path / "a").items()} == {
        **{f"data_C1/images/{n}.png": "data_C1" for n in ("p1_1", "p1_2", "x")},
        **{f"data_C2/images/{n}.png": "data_C2" for n in ("p1_1", "y")},
    }
    assert "data_C2/images with the masks of" in printed
    pattern = r"(?P<centre>C\d)/images/(?P<patient_id>p\d)?"
    printed = run("masks", *folders, "--out", tmp_path / "b", "--metadata-pattern", pattern)
    described = images(tmp_path / "b").values()
    assert Counter(i["centre"] for i in described) == {"C1": 3, "C2": 2}
    assert Counter(i.get("patient_id") for i in described) == {"p1": 3, None: 2}
    line = next(line for line in printed.splitlines() if "patient_id" in line)
    assert "2 images" in line and "data_C1/images/x.png" in line and "data_C2/images/y.png" in line


def test_frames_are_numbers_and_nothing_is_contradicted(run, tmp_path, hospital):
    folders = hospital("a", ["s1_007", "s1_010", "s2_1"])
    out = tmp_path / "out"
    run(
        "masks",
        *folders,
        "--out",
        out,
        "--metadata-pattern",
        r"(?P<sequence_id>s\d)_(?P<frame>\d+)",
    )
    frames = {name: (i["sequence_id"], i["frame"]) for name, i in images(out).items()}
    assert frames == {"s1_007.png": ("s1", 7), "s1_010.png": ("s1", 10), "s2_1.png": ("s2", 1)}
    table = tmp_path / "table.csv"
    table.write_text("file,centre\ns1_007.png,Oslo\n")
    pattern = "--metadata-pattern", "(?P<centre>s)"
    message = run(
        "masks", *folders, "--out", tmp_path / "x", *pattern, "--metadata", table, fails=True
    )
    assert "s1_007.png" in message and "Oslo" in message
    for bad in ("(", "s1", "(?P<width>s1)"):
        message = run(
            "masks", *folders, "--out", tmp_path / "x", "--metadata-pattern", bad, fails=True
        )
        assert repr(bad) in message


def test_a_dry_run_lists_every_fault_and_writes_nothing(run, tmp_path, hospital):
    folders = hospital("a", ["1", "2", "3", "4", "5", "6"])
    root = tmp_path / "a"
    (root / "masks/1.png").unlink()
    (root / "images/2.png").write_bytes(b"no image")
    (root / "masks/other.png").write_bytes(b"")
    Image.new("L", (8, 8)).save(root / "masks/3.png")
    before = sorted(tmp_path.rglob("*"))
    args = "masks", *folders, "--out", tmp_path / "far/away/out"
    message = run(*args, "--dry-run", fails=True)
    for file in ("images/1.png", "images/2.png", "masks/other.png", "images/3.png"):
        assert f"{root}/{file}: " in message
    assert "(4)" in message
    assert sorted(tmp_path.rglob("*")) == before
    assert "--dry-run" in run(*args, fails=True)  # the first fault alone says how to see all
    for path in (root / "masks/other.png", root / "images/2.png", root / "images/1.png"):
        path.unlink()
    (root / "masks/2.png").unlink()
    Image.new("L", (40, 32)).save(root / "masks/3.png")
    printed = run(*args, "--dry-run")
    assert not (tmp_path / "far").exists()
    assert printed.splitlines()[1:4] == run(*args).splitlines()[1:4]


def test_a_centre_is_left_out_and_the_rest_is_train_and_val(run, tmp_path, hospital):
    one, two = (
        hospital("C1", [f"{i:02}" for i in range(15)]),
        hospital("C2", ["a", "b", "c"], seed=50),
    )
    args = "masks", *one[:2], two[1], *one[2:], two[3]
    for out, value in (("by_centre", "C2"), ("by_field", "centre=C2")):
        run(*args, "--out", tmp_path / out, "--leave-out", value)
        splits = json.loads((tmp_path / out / "splits.json").read_text())
        assert splits["test"] == [f"C2/images/{n}.png" for n in "abc"]
        assert [len(splits[split]) for split in SPLITS] == [12, 3, 3]  # 12:3
        assert splits["left_out"] == "centre=C2"
    message = run(*args, "--out", tmp_path / "x", "--leave-out", "C3", fails=True)
    assert "C3" in message and "C1, C2" in message
    message = run(*args, "--out", tmp_path / "x", "--leave-out", "C1", "C2", fails=True)
    assert "--leave-out" in message
    # A patient of both would be trained on and tested.
    (tmp_path / "patients.csv").write_text(
        "file,patient_id\nC1/images/00.png,p\nC2/images/a.png,p\n"
        + "".join(f"C1/images/{i:02}.png,\n" for i in range(1, 15))
        + "C2/images/b.png,\nC2/images/c.png,\n"
    )
    message = run(
        *args,
        "--out",
        tmp_path / "x",
        "--leave-out",
        "C2",
        "--patients",
        tmp_path / "patients.csv",
        fails=True,
    )
    assert "C1/images/00.png" in message and "C2/images/a.png" in message


def test_every_split_gets_its_share_of_a_field(run, tmp_path, hospital):
    names = [f"{device}{i}" for device, count in (("A", 40), ("B", 20)) for i in range(count)]
    folders = hospital("a", names)
    args = "masks", *folders, "--metadata-pattern", "(?P<device>[AB])", "--stratify-by"
    run(*args, "device", "--out", tmp_path / "out", "--ratio", "2:1:1")
    splits = json.loads((tmp_path / "out/splits.json").read_text())
    assert [Counter(n[0] for n in splits[s]) for s in SPLITS] == [
        {"A": 20, "B": 10},
        {"A": 10, "B": 5},
        {"A": 10, "B": 5},
    ]
    message = run(*args, "site", "--out", tmp_path / "x", fails=True)
    assert "site" in message and "device" in message


def test_images_without_a_given_split_are_named(run, tmp_path, hospital):
    folders = hospital("a", list("abcdefgh"))
    given = tmp_path / "splits.json"
    given.write_text(json.dumps({"train": ["a.png", "b.png"], "val": ["c.png"], "test": ["d.png"]}))
    printed = run("masks", *folders, "--out", tmp_path / "out", "--splits", given)
    line = next(line for line in printed.splitlines() if "e.png" in line)
    assert "4" in line and "f.png" in line


@pytest.fixture
def prepared(run, tmp_path, hospital):
    """Returns a function that prepares a hospital's folder, with images, as a data set NAME."""

    def make(name, names, *args, seed=0):
        run("masks", *hospital(f"raw/{name}", names, seed=seed), "--out", tmp_path / name, *args)
        return tmp_path / name

    return make


def test_merged_sets_keep_splits_centres_and_patients_apart(run, tmp_path, prepared):
    pattern = r"(?P<patient_id>p\d)_"
    a = prepared("a", [f"p{p}_{i}" for p in range(8) for i in "xyz"], "--metadata-pattern", pattern)
    field = "--metadata-pattern", r"(?P<patient_id>p\d)_(?P<centre>.)"
    b = prepared("b", [f"p{p}_{c}" for p in range(6) for c in "CD"], *field, seed=100)
    printed = run("merge", a, b, "--out", tmp_path / "out")
    for split in SPLITS:
        names = json.loads((tmp_path / "out/splits.json").read_text())[split]
        before = [json.loads((root / "splits.json").read_text())[split] for root in (a, b)]
        assert names == [f"{r}/{n}" for r, ns in zip("ab", before, strict=True) for n in ns]
    merged = images(tmp_path / "out")
    assert Counter(i["centre"] for i in merged.values()) == {"a": 24, "C": 6, "D": 6}
    assert len({i["patient_id"] for i in merged.values()}) == 8 + 6
    assert merged["b/p1_C.png"]["patient_id"] == "b/p1"
    # Every lesion is where it was.
    for root in (a, b):
        for split, content in contents(root).items():
            new = contents(tmp_path / "out")[split]
            by_id = {i["id"]: i["file_name"] for i in new["images"]}
            boxes = {(by_id[n["image_id"]], *n["bbox"]) for n in new["annotations"]}
            old = {i["id"]: f"{root.name}/{i['file_name']}" for i in content["images"]}
            assert boxes >= {(old[n["image_id"]], *n["bbox"]) for n in content["annotations"]}
    assert "written" in printed
    run("merge", a, b, "--out", tmp_path / "anew", "--ratio", "1:0:0")
    assert len(json.loads((tmp_path / "anew/splits.json").read_text())["train"]) == 36
    run("merge", a, b, "--out", tmp_path / "without_a", "--leave-out", "a")
    splits = json.loads((tmp_path / "without_a/splits.json").read_text())
    assert {n[0] for n in splits["test"]} == {"a"} and len(splits["test"]) == 24
    assert splits["train"] and splits["val"]
    by_name = images(tmp_path / "without_a")
    patients = [{by_name[n]["patient_id"] for n in splits[split]} for split in SPLITS]
    assert not patients[0] & patients[1]
    # Under new names too.
    private = "--deidentify", "--key", tmp_path / "key"
    run("merge", a, b, "--out", tmp_path / "private", *private)
    with open(tmp_path / "key.names.csv", encoding="utf-8") as file:
        old = {f"{row['new']}.png": row["old"] for row in csv.DictReader(file)}
    known, new = (
        json.loads((tmp_path / name / "splits.json").read_text()) for name in ("out", "private")
    )
    for split in SPLITS:
        assert sorted(old[name] for name in new[split]) == sorted(known[split])


def test_the_same_image_in_two_sets_is_taken_once_and_reported(run, tmp_path, prepared):
    a, b = prepared("a", ["1", "2", "3", "4"]), prepared("b", ["5", "6", "7"], seed=2)
    # Of a, images 3 and 4 are b's 5 and 6; other bytes of the same pixels are the same image.
    path = b / "images/5.png"
    image = Image.open(path)
    path.unlink()
    image.save(path, compress_level=0)
    printed = run("merge", a, b, "--out", tmp_path / "out")
    assert set(images(tmp_path / "out")) == {
        *(f"a/{n}.png" for n in "1234"),
        "b/7.png",
    }
    rejected = (tmp_path / "out/rejected.csv").read_text()
    lines = {n: line for line in rejected.splitlines() for n in "56" if f"b/images/{n}.png" in line}
    # The third image has no lesion in a, where the first has one in b.
    assert "other boxes" in lines["5"] and "the same boxes" in lines["6"]
    assert "2 images of b are in a" in printed


def test_near_duplicates_of_other_sets_and_splits_are_left_out(run, tmp_path):
    """Test images stay, whichever data set is named first; within one split both do."""
    kvasir = real_data("kvasir-seg-352")
    one_frame = ["test_0033", "test_0051"]
    others = [f"train_{number:04d}" for number in (5, 65, 125, 185)]

    def prepared(name, names, split):
        for folder in ("images", "masks"):
            (tmp_path / "raw" / name / folder).mkdir(parents=True)
            for image in names:
                shutil.copy(kvasir / folder / f"{image}.jpg", tmp_path / "raw" / name / folder)
        ratio = ("--ratio", "1:0:0") if split == "train" else ("--all-test",)
        run("kvasir-seg", "--root", tmp_path / "raw" / name, "--out", tmp_path / name, *ratio)
        return tmp_path / name

    a = prepared("a", [one_frame[0], *others[:2]], "train")
    b = prepared("b", [one_frame[1], *others[2:]], "test")
    both = prepared("both", [*one_frame, *others], "train")
    for roots in ((a, b), (b, a)):
        out = tmp_path / f"{roots[0].name}_first"
        printed = run("merge", *roots, "--out", out, "--without-near-duplicates")
        splits = json.loads((out / "splits.json").read_text())
        assert splits["train"] == [f"a/{name}.jpg" for name in others[:2]]
        assert len(splits["test"]) == 3
        assert "1 images show the same scene" in printed
        (row,) = (out / "rejected.csv").read_text().splitlines()[1:]
        assert "a/images/test_0033.jpg" in row.split(",")[0] and "b/images/test_0051.jpg" in row
    run("merge", both, "--out", tmp_path / "alone", "--without-near-duplicates")
    assert len(images(tmp_path / "alone")) == 6


def test_classes_agree_or_the_way_out_is_named(run, tmp_path, prepared):
    a = prepared("a", ["1", "2"], "--classes", "polyp")
    b = prepared("b", ["3", "4"], "--classes", "adenoma", seed=20)
    message = run("merge", a, b, "--out", tmp_path / "x", fails=True)
    for text in (str(a), str(b), "polyp", "adenoma", "--classes"):
        assert text in message
    for classes in (["lesion"], ["adenoma", "polyp"]):
        out = tmp_path / "_".join(classes)
        run("merge", a, b, "--out", out, "--classes", *classes)
        merged = contents(out)
        assert [c["name"] for c in merged["test"]["categories"]] == classes
        names = {i["id"]: i["file_name"] for c in merged.values() for i in c["images"]}
        labels = {
            (names[n["image_id"]][0], classes[n["category_id"] - 1])
            for content in merged.values()
            for n in content["annotations"]
        }
        expected = {("a", classes[-1]), ("b", classes[0])}
        assert labels == expected
    message = run(
        "merge", a, b, "--out", tmp_path / "x", "--classes", "polyp", "cancer", fails=True
    )
    assert str(b) in message and "adenoma" in message


def test_facts_of_the_data_sets_are_kept(run, tmp_path, prepared):
    a, b = prepared("a", ["1", "2", "3"]), prepared("b", ["4", "5", "6"], seed=20)
    for root in (a, b):
        for path in (root / "annotations").iterdir():
            coco = json.loads(path.read_text())
            coco["info"] |= {"url": f"https://{root.name}.org", "terms": f"{root.name} is cited"}
            coco["videos"] = [{"id": "v", "fps": 25.0, "num_frames": 9}]
            coco["licenses"] = [{"id": 1, "name": root.name}]
            for image in coco["images"]:
                image |= {"sequence_id": "v", "frame": image["id"]}
            for annotation in coco["annotations"]:
                annotation["lesion_id"] = "1"
            path.write_text(json.dumps(coco))
    printed = run("merge", a, b, "--out", tmp_path / "out", "--split-by", "image")
    coco = contents(tmp_path / "out")["train"]
    assert [video["id"] for video in coco["videos"]] == ["a/v", "b/v"]
    assert {i["sequence_id"] for i in images(tmp_path / "out").values()} == {"a/v", "b/v"}
    lesions = [
        n["lesion_id"] for c in contents(tmp_path / "out").values() for n in c["annotations"]
    ]
    assert set(lesions) == {"a/1", "b/1"}
    for root in "ab":
        assert (
            f"https://{root}.org" in coco["info"]["url"]
            and f"{root} is cited" in coco["info"]["terms"]
        )
    assert "licenses" not in coco and "licenses" in printed


def test_what_is_no_prepared_set_is_named(run, tmp_path, prepared):
    a = prepared("a", ["1", "2", "3"])
    (tmp_path / "raw_only").mkdir()
    for second in (tmp_path / "raw_only", a):
        assert str(second) in run("merge", a, second, "--out", tmp_path / "out", fails=True)
    archive = tmp_path / "b.zip"
    archive.write_bytes(b"")
    assert "extract" in run("merge", a, archive, "--out", tmp_path / "out", fails=True)
    file = tmp_path / "raw_only" / "annotations" / "train.json"  # of classified images
    shutil.copytree(a, tmp_path / "raw_only", dirs_exist_ok=True)
    content = json.loads(file.read_text())
    classes = [{"id": 1, "image_id": content["images"][0]["id"], "category_id": 1}]
    file.write_text(json.dumps({**content, "annotations": classes}))
    message = run("merge", a, file.parent.parent, "--out", tmp_path / "out", fails=True)
    assert str(file) in message and "classifiers" in message


def test_folds_by_centre_test_each_centre_once(run, tmp_path, prepared):
    field = "--metadata-pattern", "(?P<centre>[ABC])(?P<patient_id>p.)?"
    names = [f"{c}p{i % 4}_{i}" for c in "ABC" for i in range(8)]
    data = prepared("data", names, *field, "--split-by", "image")
    folds = write_folds(data, "centre")
    assert folds[0].parent.name == "data.folds_by_centre"
    for folder, centre in zip(folds, "ABC", strict=True):
        coco = contents(folder / "data")
        centres = [{i["centre"] for i in coco[split]["images"]} for split in SPLITS]
        assert centres == [{*"ABC"} - {centre}, {*"ABC"} - {centre}, {centre}]
        assert [len(coco[split]["images"]) for split in SPLITS] == [13, 3, 8]  # 4:1
        settings = json.loads((folder / "data/splits.json").read_text())
        assert settings["left_out"] == f"centre={centre}"
    assert [where.value for where in left_out_by(data, "centre")] == [*"ABC"]
    with pytest.raises(ValueError, match="hospital"):
        write_folds(data, "hospital")
    one = prepared("one", ["x", "y", "A1"], "--metadata-pattern", "(?P<centre>A)?", seed=70)
    with pytest.raises(ValueError, match="2 of 3 have none.*x.png"):
        write_folds(one, "centre")


@pytest.mark.slow
def test_polypgen_as_a_foreign_folder(run, tmp_path):
    root = real_data("polypgen-4-centres")
    folders = [f"data_C{i}" for i in (1, 2, 3, 4)]
    args = [
        *("--images", *(root / f / f"images_{f[-2:]}" for f in folders)),
        *("--masks", *(root / f / f"masks_{f[-2:]}" for f in folders)),
    ]
    message = run("masks", *args, "--out", tmp_path / "out", "--dry-run", fails=True)
    assert "(1)" in message and "EndoCV2021_001030.jpg" in message
    options = "--on-error", "reject", "--leave-out", "C4"
    printed = run("masks", *args, "--out", tmp_path / "out", *options)
    assert printed.count("NAME_mask") == 4
    counts = Counter(i["centre"] for i in images(tmp_path / "out").values())
    assert counts == {"C1": 256, "C2": 300, "C3": 457, "C4": 227}
    test = contents(tmp_path / "out")["test"]["images"]
    assert {i["centre"] for i in test} == {"C4"} and len(test) == 227
    assert Path(tmp_path / "out/rejected.csv").read_text().count("\n") == 2
