"""What lies on disk after preparing; folds; near-duplicates stay together; synthetic images."""

import csv
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from PIL import Image, ImageEnhance, ImageOps

from imrcnn_d2.data.catalog import load_catalog
from imrcnn_d2.data.formats import FORMATS, with_lesion_free
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset, summarise, write_folds
from imrcnn_d2.data.prepare.duplicates import (
    MIN_CORRELATION,
    MOST_DIFFERENT,
    find_near_duplicates,
    fingerprint,
    fingerprint_distance,
    joined_groups,
)
from imrcnn_d2.data.prepare.splits import SPLITS, read_splits
from imrcnn_d2.data.prepare.synthetic import generate, render_view
from imrcnn_d2.utils.files import BadInputError, Rejects

read_kvasir_seg = FORMATS["kvasir-seg"].read_folder

NAMES = [f"{i:02d}" for i in range(20)]


def prepare(root, out, on_error="raise", negatives=None, **options):
    rejects = Rejects(on_error)
    source = with_lesion_free(read_kvasir_seg(root, rejects), negatives, rejects)
    return prepare_dataset(source, out, SplitOptions(**options), rejects)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def read_json(path):
    return json.loads(path.read_text())


def test_layout(kvasir_folder, tmp_path):
    root, out = kvasir_folder(NAMES), tmp_path / "sets" / "kvasir_seg"
    assert not prepare(root, out).unchanged
    assert sorted(os.listdir(out)) == ["annotations", "images", "splits.json"]
    assert os.listdir(out.parent) == ["kvasir_seg"]
    for name in NAMES:
        assert os.path.samefile(root / "images" / f"{name}.png", out / "images" / f"{name}.png")
    splits = read_json(out / "splits.json")
    settings = {"seed": 0, "ratio": [12, 3, 5], "split_by": "image"}
    assert {key: splits[key] for key in settings} == settings
    assert [len(splits[s]) for s in SPLITS] == [12, 3, 5]

    contents = [read_json(out / "annotations" / f"{split}.json") for split in SPLITS]
    for key in ("images", "annotations"):
        ids = sorted(record["id"] for content in contents for record in content[key])
        assert ids == list(range(1, 21))
    for content, split in zip(contents, SPLITS, strict=True):
        names = {image["id"]: image["file_name"] for image in content["images"]}
        assert list(names.values()) == splits[split]
        for lesion in content["annotations"]:
            assert lesion["bbox"][0] == 5 + int(names[lesion["image_id"]][:2])


def test_real_data_is_split_600_150_250_and_read_as_by_detectron2(kvasir_352, tmp_path):
    prepared = prepare(kvasir_352, tmp_path / "out")
    assert [len(coco["images"]) for coco in prepared.coco.values()] == [600, 150, 250]
    # counted with SciPy: 1,067 components, 4 of them specks of one pixel
    assert sum(len(coco["annotations"]) for coco in prepared.coco.values()) == 1063
    assert "4 specks of fewer than 16 pixels left out of the masks" in prepared.notes
    files = tmp_path / "out" / "annotations" / "test.json", tmp_path / "out" / "images"
    for ours, theirs in zip(load_catalog(*files), load_coco_json(*map(str, files)), strict=True):
        for annotation in theirs["annotations"]:
            annotation["category_id"] -= 1  # Detectron2 counts from 0 under a registered name only
        assert {key: ours[key] for key in theirs} == theirs and Path(ours["file_name"]).is_file()


def test_same_job_again_changes_nothing_and_another_is_refused(kvasir_folder, tmp_path):
    root, out = kvasir_folder(NAMES), tmp_path / "out"
    prepare(root, out, folds=5)
    prepare(root, tmp_path / "other", folds=5)
    assert contents(out) == contents(tmp_path / "other")
    (out / "test_evaluations.csv").write_text("grows with every look at the test set\n")
    before = times(out)
    assert prepare(root, out, folds=5).unchanged
    for change in ({"seed": 1}, {"ratio": (1, 1, 1)}, {"folds": 2}, {"on_error": "reject"}):
        with pytest.raises(FileExistsError, match=str(out)):
            prepare(root, out, **{"folds": 5, **change})
    assert times(out) == before
    assert sorted(os.listdir(tmp_path)) == ["kvasir", "other", "out"]
    brighter = Image.open(root / "images" / "03.png").point(lambda value: min(255, value + 9))
    (root / "images" / "03.png").unlink()  # the prepared one is the same file
    brighter.save(root / "images" / "03.png")
    with pytest.raises(FileExistsError, match="images/03.png"):
        prepare(root, out, folds=5)


def test_what_is_no_data_set_is_refused_at_once(kvasir_folder, tmp_path):
    root, out, empty = kvasir_folder(), tmp_path / "thesis", tmp_path / "thesis" / "empty"
    empty.mkdir(parents=True)
    assert (prepare(root, empty).out / "splits.json").is_file()  # in a folder of others
    (tmp_path / "file").write_text("x")
    for occupied in (out, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=str(occupied)):
            prepare(root, occupied)


def test_rejects_are_listed_and_leave_no_file(kvasir_folder, tmp_path):
    """An image without a mask; among the lesion-free ones a name and a content of before."""
    root, out, negatives = kvasir_folder("abcdefgh"), tmp_path / "out", tmp_path / "negatives"
    (root / "masks" / "b.png").unlink()
    negatives.mkdir()
    shutil.copy(root / "masks" / "c.png", negatives)
    shutil.copy(root / "images" / "d.png", negatives / "copy.png")
    with pytest.raises(BadInputError):
        prepare(root, out)
    assert sorted(os.listdir(tmp_path)) == ["kvasir", "negatives"]
    earlier = {"train": [], "val": ["b.png"], "test": ["a.png", "c.png"]}
    prepared = prepare(root, out, "reject", negatives, earlier=earlier)
    assert {"a.png", "c.png"} <= set(read_splits(out / "splits.json")["test"])
    assert "1 files of the given splits are gone: b.png" in prepared.notes
    with open(out / "rejected.csv", newline="") as file:
        rejects = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    files = root / "images" / "b.png", negatives / "c.png", negatives / "copy.png"
    assert [*rejects] == [str(path) for path in files]
    for path, original in zip(files[1:], "cd", strict=True):
        assert rejects[str(path)].endswith(f"{root}/images/{original}.png")
    assert sorted(os.listdir(out / "images")) == [f"{name}.png" for name in "acdefgh"]
    for fold in write_folds(out, 2):
        copied = fold / "out" / "rejected.csv"
        assert copied.read_bytes() == (out / "rejected.csv").read_bytes()
    for path in (root / "masks").iterdir():
        path.write_text("x")
    with pytest.raises(BadInputError, match=str(tmp_path / "none")):
        prepare(root, tmp_path / "none", "reject")


def test_splits_from_file_names(kvasir_folder, tmp_path):
    names = ["train_a", "train_b", "valid_a", *(f"test_{letter}" for letter in "abcdefgh")]
    root, out = kvasir_folder(names), tmp_path / "out"
    assert not any("by ratio" in note for note in prepare(root, out, split_by="prefix").notes)
    splits = read_json(out / "splits.json")
    assert [len(splits[s]) for s in SPLITS] == [2, 1, 8] and splits["val"] == ["valid_a.png"]
    assert (splits["split_by"], "ratio" in splits) == ("prefix", False)
    assert read_json(write_folds(out, 2)[0] / "out" / "splits.json")["split_by"] == "image"
    for path in (out / "annotations").iterdir():  # a patient is a letter: a has three images
        content = read_json(path)
        for image in content["images"]:
            image["patient_id"] = image["file_name"][-5]
        path.write_text(json.dumps(content))
    for fold in write_folds(out, 3):
        splits = read_json(fold / "out" / "splits.json")
        letters = [{name[-5] for name in splits[s]} for s in SPLITS]
        assert splits["split_by"] == "patient" and sum(map(len, letters)) == 8
    with pytest.raises(ValueError, match="earlier"):
        prepare(root, tmp_path / "other", split_by="prefix", earlier={"train": ["test_a.png"]})


def test_near_duplicates_and_patients_stay_together(kvasir_352, tmp_path):
    root, pair = tmp_path / "in", ["test_0033", "test_0051"]  # of one frame
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
        for name in (*pair, *(f"train_{i:04d}" for i in range(5, 245, 60))):
            shutil.copyfile(kvasir_352 / folder / f"{name}.jpg", root / folder / f"{name}.jpg")
    names = {f"{name}.jpg" for name in pair}
    for seed in range(4):
        out = tmp_path / str(seed)
        prepared = prepare(root, out, split_by="group", seed=seed, ratio=(1, 1, 1), folds=3)
        splits = read_splits(out / "splits.json")
        assert read_json(out / "splits.json")["split_by"] == "group"
        assert [len(part) for part in splits.values()] == [2, 2, 2]
        # the folds that are written next to it as well
        folds = [next(folder.iterdir()) / "splits.json" for folder in write_folds(out, 3)]
        for path in (out / "splits.json", *(out / "folds").iterdir(), *folds):
            assert sum(names <= set(part) for part in read_splits(path).values()) == 1
    listed = read_json(out / "near_duplicates.json")
    assert listed["groups"] == [sorted(names)]
    ((correlation, images),) = (tuple(sorted(pair.items())) for pair in listed["pairs"])
    assert listed["min_correlation"] < correlation[1] <= 1 and sorted(images[1]) == sorted(names)
    images = [image for content in prepared.coco.values() for image in content["images"]]
    assert {image["file_name"] for image in images if image.get("group_id") == 1} == names
    assert sum("group_id" in image for image in images) == 2

    # joined over a patient of one of them
    source = read_kvasir_seg(root, Rejects())
    source.samples = list(source.samples)
    for sample, patient in zip(source.samples, (None, 1, 1, 1, 2, 3), strict=True):
        sample.fields["patient_id"] = patient
    prepare_dataset(source, tmp_path / "out", SplitOptions(split_by="group"), Rejects())
    together = [f"{n}.jpg" for n in (*pair, "train_0005", "train_0065")]
    assert read_json(tmp_path / "out" / "near_duplicates.json")["groups"] == [together]


def test_images_of_a_sequence_stay_together_where_the_patient_is_unknown(kvasir_folder, tmp_path):
    source = read_kvasir_seg(kvasir_folder([f"{i:02}" for i in range(12)]), Rejects())
    source.samples = list(source.samples)
    for i, sample in enumerate(source.samples):
        sample.fields["sequence_id"] = f"s{i // 3}"
        if i in (2, 3):  # known to be of one patient, as both sequences then are
            sample.fields["patient_id"] = "p"
    prepare_dataset(source, tmp_path / "out", SplitOptions(ratio=(1, 1, 1)), Rejects())
    assert read_json(tmp_path / "out" / "splits.json")["split_by"] == "patient"
    home = {
        name: s for s, part in read_splits(tmp_path / "out/splits.json").items() for name in part
    }
    for unit in ("00 01 02 03 04 05", "06 07 08", "09 10 11"):
        assert len({home[f"{stem}.png"] for stem in unit.split()}) == 1


@pytest.fixture
def prepared(tmp_path):
    """A prepared data set with patients and lesion-free images, 24 images, and its folds' files."""
    (tmp_path / "raw").mkdir()
    source = generate(tmp_path / "raw", 24, 64, 0)
    options = SplitOptions(seed=3, folds=3)
    return prepare_dataset(source, tmp_path / "sets" / "synthetic", options, Rejects()).out


def test_a_fold_is_what_preparing_with_its_splits_gives(prepared, tmp_path):
    for i, root in enumerate(write_folds(prepared, 3)):
        source = generate(tmp_path / "raw", 24, 64, 0)
        splits = prepared / "folds" / f"fold{i}.json"
        options = SplitOptions(earlier=read_splits(splits))
        again = prepare_dataset(source, tmp_path / f"again{i}", options, Rejects()).out
        fold, patients = root / "synthetic", []
        for name in (f"annotations/{split}.json" for split in SPLITS):
            assert (fold / name).read_bytes() == (again / name).read_bytes(), (i, name)
            images = read_json(fold / name)["images"]
            assert all((fold / "images" / image["file_name"]).is_file() for image in images)
            patients.append({image["patient_id"] for image in images})
        assert sum(map(len, patients)) == len(set.union(*patients))
        assert (fold / "splits.json").read_bytes() == splits.read_bytes()
        assert read_json(fold / "splits.json")["folds"] == 3


def test_folds_are_written_once_or_refused(prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "kvasir_seg")):
        write_folds(tmp_path / "kvasir_seg", 5)
    for count, named in ((1, ""), (25, "fold .*'s test")):
        with pytest.raises(ValueError, match=f"{count} folds.*{named}"):
            write_folds(prepared, count)
    first = write_folds(prepared, 2)
    folder = prepared.with_name("synthetic.folds2")
    (first[0] / "synthetic" / "test_evaluations.csv").write_text("a look at the test set\n")
    before = times(folder)
    assert write_folds(prepared, 2) == first and times(folder) == before
    names = ["synthetic", "synthetic.folds2"]
    assert sorted(path.name for path in prepared.parent.iterdir()) == names
    moved = prepared.parent.rename(tmp_path / "moved")  # with its data set
    fold = moved / "synthetic.folds2" / "fold1" / "synthetic"
    assert len(list((fold / "images").iterdir())) == 24
    train = fold / "annotations" / "train.json"
    train.write_text(train.read_text().replace("patient", "person"))
    with pytest.raises(FileExistsError, match="fold1/synthetic/annotations/train.json"):
        write_folds(moved / "synthetic", 2)


def test_summary():
    def content(num_images, lesions, patient=None):
        size = {"width": 10, "height": 10, "patient_id": patient}
        keys = ("image_id", "area", "iscrowd")
        records = [dict(zip(keys, lesion, strict=True), bbox=[]) for lesion in lesions]
        return {"images": [{"id": i, **size} for i in range(num_images)], "annotations": records}

    train = content(6, [(0, 1, 0), (0, 15, 0), (1, 100, 0), (2, 30, 1)], patient="p")
    coco = {"train": train, "val": content(2, [(0, 4, 0)]), "test": content(2, [])}
    errors = [BadInputError("x.jpg", "is cut")]
    lines = summarise(coco, (12, 3, 5), ["something"], errors).splitlines()
    cells = [line.split() for line in lines]
    assert cells[1] == ["train", "6", "4", "4", "1", "6.0", "(+0.0)"]
    assert cells[2] == ["val", "2", "1", "1", "-", "1.5", "(+0.5)"]
    assert cells[3] == ["test", "2", "0", "2", "-", "2.5", "(-0.5)"]
    assert cells[6][:2] == ["10x10", "10"]
    assert [line.split("%")[1].split()[0] for line in lines if " %" in line] == [*"0110111"]
    assert lines[-5:] == ["Notes (1):", "  something", "", "Rejected (1):", "  x.jpg: is cut"]
    shown = summarise(coco, (12, 3, 5), [], errors * 300).splitlines()
    assert shown[-21:-1] == ["  x.jpg: is cut"] * 20 and "280" in shown[-1]


# Found in Kvasir-SEG by looking: a frame stored twice, one with and without the endoscope's screen,
# and one moments later.
KNOWN = [("test_0016", "train_0222"), ("test_0033", "test_0051"), ("train_0515", "valid_0075")]


def reframed(image):
    """The frame smaller and off the middle, as on a screen with other writing."""
    screen = Image.new("RGB", image.size, "black")
    width, height = image.size
    screen.paste(image.resize((int(0.8 * width), int(0.85 * height))), (width // 8, height // 12))
    return screen


CHANGES = {
    "recompressed": lambda image: image.resize((500, 420)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    "turned": lambda image: image.rotate(90, expand=True),
    "mirrored": ImageOps.mirror,
    "mirrored and turned": lambda image: ImageOps.flip(image).rotate(90, expand=True),
    "reframed": reframed,
}


def test_copies_and_duplicates_stand_out(kvasir_352, tmp_path):
    frames = sorted((kvasir_352 / "images").iterdir())[5::40]  # no two of them show the same
    known = [kvasir_352 / "images" / f"{name}.jpg" for pair in KNOWN for name in pair]
    # frames that have hardly a feature that looks the same in a mirror
    mirrored = {frames[i]: (f"mirror {i}", ImageOps.mirror) for i in (11, 12, 15)}
    changes = dict(zip(frames, CHANGES.items(), strict=False)) | mirrored
    for frame, (name, change) in changes.items():
        with Image.open(frame) as image:
            change(image).save(tmp_path / f"{name}.jpg", quality=60)
    paths = [*frames, *known, *(tmp_path / f"{name}.jpg" for name, _ in changes.values())]
    pairs = find_near_duplicates(paths)
    assert pairs == sorted(pairs, key=lambda pair: (pair.a, pair.b))
    assert all(MIN_CORRELATION <= pair.correlation <= 1 and pair.a < pair.b for pair in pairs)
    correlations = {(paths[pair.a].stem, paths[pair.b].stem): pair.correlation for pair in pairs}
    copies = {(frame.stem, name) for frame, (name, _) in changes.items()}
    expected = copies | {*KNOWN}
    assert {pair for pair, correlation in correlations.items() if correlation > 0.5} == expected
    assert len(pairs) <= len(expected) + 1
    assert min(correlations[pair] for pair in copies) > 0.9
    # aligned to the pixel; by the few features that look the same in a mirror it is 0.97 at most
    assert min(correlations[frame.stem, name] for frame, (name, _) in mirrored.items()) > 0.98
    assert correlations[KNOWN[0]] > 0.95 > correlations[KNOWN[2]]
    # whatever the order, which the audit has by split
    last = len(paths) - 1
    turned = {(last - pair.b, last - pair.a): pair for pair in find_near_duplicates(paths[::-1])}
    assert {places: pair.correlation for places, pair in turned.items()} == {
        (pair.a, pair.b): pair.correlation for pair in pairs
    }


def test_frames_moments_apart_are_found_whichever_comes_first(polypgen_4):
    """The second shows the polyp larger, or turned: from one side, the alignment fails."""
    names = ("C3/images_C3/C3_EndoCV2021_00116", "C3/images_C3/C3_EndoCV2021_00117")
    names += ("C2/images_C2/EndoCV2021_001028", "C2/images_C2/EndoCV2021_001030")
    paths = [polypgen_4 / f"data_{name}.jpg" for name in names]
    pairs = find_near_duplicates(paths)
    assert [(pair.a, pair.b) for pair in pairs] == [(0, 1), (2, 3)]
    assert all(pair.correlation > 0.6 for pair in pairs)


def test_a_fingerprint_is_of_the_content_not_the_file(kvasir_352):
    paths = sorted((kvasir_352 / "images").iterdir())[5::40]
    images = [np.array(Image.open(path).convert("RGB")) for path in paths]
    prints = [fingerprint(image) for image in images]
    assert all(len(text) == 64 for text in prints)
    for image, text in zip(images, prints, strict=True):
        small = Image.fromarray(image).resize((224, 160))
        small.save(buffer := io.BytesIO(), "JPEG", quality=40)
        copy = fingerprint(np.array(Image.open(buffer)))
        assert fingerprint_distance(copy, text) <= MOST_DIFFERENT / 2
        assert [fingerprint_distance(copy, o) <= MOST_DIFFERENT for o in prints].count(True) == 1


def test_images_without_detail_and_groups(tmp_path):
    flat = [tmp_path / f"{value}.png" for value in (0, 90, 255)]
    for path in flat:
        Image.new("RGB", (60, 40), (int(path.stem),) * 3).save(path)
    assert find_near_duplicates(flat) == find_near_duplicates([]) == []
    assert joined_groups(6, [(0, 3), (5, 3)]) == [[0, 3, 5]]
    assert joined_groups(4, [(0, 1, 2), [3]]) == [[0, 1, 2]]
    assert joined_groups(3, []) == []


def read(folder, num_images, size, seed=0):
    folder.mkdir()
    return list(generate(folder, num_images, size, seed).samples)


@pytest.mark.parametrize(
    ("num_images", "num_healthy", "size"),
    [(1, 0, 64), (8, 1, 100), (20, 3, 64), (40, 5, 64), (1, 0, 357)],
)
def test_counts_seeds_and_sizes(tmp_path, num_images, num_healthy, size):
    samples = read(tmp_path / "a", num_images, size)
    assert len({sample.file_name for sample in samples}) == num_images
    assert sum(not sample.annotations for sample in samples) == num_healthy
    patients = Counter(sample.fields["patient_id"] for sample in samples)
    kinds = {(sample.fields["patient_id"], bool(sample.annotations)) for sample in samples}
    assert len(kinds) == len(patients) and max(patients.values()) <= 5  # with a lesion, or healthy
    assert num_images < 40 or num_images / len(patients) > 2
    pairs = [(sample.image.sha256, sample.annotations) for sample in samples]
    for seed in (0, 1):
        others = read(tmp_path / f"{seed}", num_images, size, seed)
        assert (pairs == [(b.image.sha256, b.annotations) for b in others]) == (seed == 0)
    sample = samples[0]
    assert (sample.image.width, sample.image.height, sample.image.mode) == (size, size, "RGB")
    image = np.asarray(Image.open(sample.image.path))
    assert image[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 16
    assert image[size // 3 : -size // 3, size // 3 : -size // 3].mean() > 40
    for wrong in ((0, 64), (5, 32)):
        with pytest.raises(ValueError, match="{} images of {} pixels".format(*wrong)):
            generate(tmp_path, *wrong)


@pytest.mark.parametrize("patient", range(12))
def test_lesions_differ_from_the_mucosa_around_them(patient):
    image, masks = render_view(192, 0, patient, 0)
    assert 1 <= len(masks) <= 2
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(float)
    for mask in masks:
        assert 0.005 < mask.mean() < 0.2
        near = cv2.dilate(mask.astype(np.uint8), np.ones((31, 31))) > 0
        around = near & ~np.any(masks, axis=0) & (image.max(axis=2) > 25)
        inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5))) > 0
        difference = np.median(lab[inner], axis=0) - np.median(lab[around], axis=0)
        assert np.linalg.norm(difference) > 8  # a just noticeable difference is about 2


def test_views_share_a_look_and_differ_in_pose():
    colours = []
    for patient in range(6):
        views = [render_view(96, 0, patient, view, healthy=True)[0] for view in range(4)]
        centre = [view[24:72, 24:72].reshape(-1, 3).astype(float) for view in views]
        # the ratio of red to green does not depend on the light's strength
        colours.append([np.median(c[:, 0] / np.maximum(c[:, 1], 1)) for c in centre])
        assert not np.array_equal(views[0], views[1])
    assert np.var(np.mean(colours, axis=1)) > 2 * np.mean(np.var(colours, axis=1))
