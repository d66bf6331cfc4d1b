"""Every planted fault is found, clean images are left alone; splits are fixed only where needed."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image
from planted_faults import Planted
from rectangles import rectangle

from imrcnn_d2.cli import audit_dataset
from imrcnn_d2.data.audit import KINDS, Audit, Finding, audit, checks, groups, read_entries
from imrcnn_d2.data.audit.findings import AuditedData, Entry
from imrcnn_d2.data.masks import encode
from imrcnn_d2.data.prepare import synthetic
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset, write_fixed_splits
from imrcnn_d2.data.prepare.splits import SPLITS, read_splits
from imrcnn_d2.utils.files import BadInputError, Rejects

SIZE = 100


def test_every_planted_fault_is_found(tmp_path):
    planted = Planted(tmp_path)
    planted.plant_all(25)  # thresholds were chosen on Kvasir-SEG, not on synthetic images
    audited = audit(read_entries("planted", planted.write(), planted.images))
    areas = ("files", "annotations", "leakage")
    assert dict(planted.faults).keys() == {k for k, kind in KINDS.items() if kind.area in areas}
    findings = [(finding.kind, set(finding.images)) for finding in audited.findings]
    for kind, names in planted.faults:
        assert any(kind == key and set(names) <= images for key, images in findings), (kind, names)
    # One finding for each; another one on the same image is no surprise to a user.
    assert len(findings) <= 1.3 * len(planted.faults)
    flagged = {name for _, name in audited.flagged} & set(planted.clean)
    assert len(flagged) <= 0.02 * len(planted.clean), flagged
    # what crosses splits is an error; groups hold duplicates and patients
    leaks = ("exact_duplicate", "near_duplicate", "patient_across_splits")
    for finding in audited.findings:
        if finding.kind in leaks:
            crosses = len(set(finding.splits)) > 1
            assert finding.severity == ("error" if crosses else "warning"), finding
    entries = audited.data.entries
    together = groups(entries, audited.duplicates)
    expected = [sorted(names) for kind, names in planted.faults if kind in leaks]
    assert sorted(sorted(entries[i].name for i in g) for g in together) == sorted(expected)


def shown(name, annotations=(), text=(), masks=(), **fields):
    """An image as examined, with these annotations, lines of writing and decoded masks."""
    entry = Entry(name, "train", None, fields, tuple(annotations))
    measures = SimpleNamespace(text=[*text], width=400, height=400)
    decoded = [checks.DecodedAnnotation({}, encode(mask), int(mask.sum())) for mask in masks]
    return checks.Examined(entry, measures, decoded, [])


def test_a_processors_writing_is_one_finding_and_a_name_in_few_images_another():
    unit, name = (10, 20, 90, 30), (10, 300, 80, 312)
    moved = (13, 17, 99, 30)  # a little
    north = [shown(f"n{i}", text=[unit if i % 2 else moved], centre="north") for i in range(40)]
    north += [shown(f"name{i}", text=[unit, name], centre="north") for i in range(2)]
    # of a small centre nothing is usual
    others = [shown(f"s{i}", text=[unit], centre="south") for i in range(3)] + [shown("none")]
    others.append(shown("null", text=[name], centre=None))
    findings = [*checks.overlay_findings(north + others)]
    single = [f.images for f in findings if f.kind == "text_outside_view"]
    assert single == [("name0",), ("name1",), ("s0",), ("s1",), ("s2",), ("null",)]
    (usual,) = (f for f in findings if f.kind == "overlay")
    assert (usual.images, usual.score) == (("n0",), 42) and "north" in usual.detail


def test_duplicates_with_other_labels():
    lesion, ulcer = {"category_id": 1}, {"category_id": 2}
    left, right = np.zeros((2, 50, 50), bool)
    left[10:20, 10:20] = right[10:20, 30:40] = True
    images = [
        shown("lesion", [lesion], masks=[left]),
        shown("elsewhere", [lesion], masks=[right]),
        shown("free"),
        shown("ulcer", [ulcer], masks=[left]),
        shown("also free"),
    ]
    pairs = [
        checks.DuplicatePair(a, b, kind, 0.9, "")
        for kind in ("exact_duplicate", "near_duplicate")
        for a, b in ((0, 0), (0, 1), (0, 2), (0, 3), (2, 4))
    ]
    names = [(f.images[1], f.severity) for f in checks.contradiction_findings(images, pairs)]
    # a mask may lie elsewhere in a frame of a moment later
    assert names == [
        *((name, "error") for name in ("elsewhere", "free", "ulcer")),
        *((name, "warning") for name in ("free", "ulcer")),
    ]


def test_the_strongest_come_first():
    """Within kind and severity by score, whatever the names; areas smallest first."""
    result = Audit(AuditedData("own", (), (), ()), [], [], [])
    for kind, scores in {"tiny": (9.0, 2.0, 5.0), "blur": (0.6, 0.9, 0.7)}.items():
        result.add(Finding(kind, (f"{s}.png",), ("",), "", score=s) for s in scores)
    result.add([Finding("blur", ("z.png",), ("",), "", score=0.1, severity="error")])
    expected = [*(("blur", s) for s in (0.1, 0.9, 0.7, 0.6)), *(("tiny", s) for s in (2, 5, 9))]
    assert [(finding.kind, finding.score) for finding in result.findings] == expected
    assert result.counts() == {"blur": Counter(warning=3, error=1), "tiny": Counter(warning=3)}


def kinds(*annotations, view=None):
    """[(kind, id of the annotation)] of what is found in an image with these annotations."""
    records = [{"id": i, "category_id": 1, **record} for i, record in enumerate(annotations, 1)]
    entry = Entry("a.png", "train", None, {}, tuple(records))
    decoded, findings = checks.decode_annotations(entry, SIZE, SIZE, {1, 2})
    view = np.ones((SIZE, SIZE), bool) if view is None else view
    findings += checks.annotation_findings(entry, decoded, view)
    return [(finding.kind, finding.annotation_id) for finding in findings]


def polygon(*values):
    return {"segmentation": [[float(value) for value in values]]}


def box(*box, **fields):
    return rectangle(1, *box, size=(SIZE, SIZE), **fields)


SQUARE = polygon(10, 10, 50, 10, 50, 50, 10, 50)
FAULTS = {
    None: [
        SQUARE,
        box(10, 10, 10, 6),
        # a small loop in a large contour; tools leave lines out and back, and corners on a side
        polygon(10, 10, 80, 10, 80, 80, 40, 80, 50, 84, 50, 80, 10, 80),
        polygon(10, 10, 50, 10, 80, 10, 50, 10, 50, 50, 10, 50),
        polygon(10, 10, 50, 10, 50, 50, 30, 10, 10, 50),
    ],
    "self_crossing": [polygon(10, 10, 50, 50, 50, 10, 10, 50)],
    "tiny": [polygon(10, 10, 12, 10, 12, 12, 10, 12), box(10, 10, 5, 2)],
    "empty": [{}, {"segmentation": []}, polygon(200, 200, 250, 200, 250, 250)],
    "malformed": [
        *(polygon(1, 2, 3, 4, 5), polygon(1, 1, 1, 1), {"segmentation": "text"}),
        *(SQUARE | {"category_id": 3}, SQUARE | {"iscrowd": 2}),
        {"segmentation": {"size": [SIZE, SIZE], "counts": [5]}},
    ],
}


@pytest.mark.parametrize("kind, annotation", [(k, a) for k in FAULTS for a in FAULTS[k]])
def test_single_annotations(kind, annotation):
    assert kinds(annotation) == ([] if kind is None else [(kind, 1)])


def test_annotations_next_to_the_view_and_on_each_other():
    view = np.zeros((SIZE, SIZE), bool)
    view[:, 40:] = True
    first, second, third = box(10, 10, 40, 40), box(11, 10, 40, 40), box(30, 10, 40, 40)
    for found, *annotations, shown in (
        ([], box(30, 10, 40, 20), view),  # exactly a quarter
        ([("outside_view", 1)], SQUARE, view),
        ([], SQUARE, np.zeros_like(view)),  # a black frame has no view
        ([("overlapping", 1)], first, third, second, None),
        ([], first, second | {"category_id": 2}, None),
        ([], first, second | {"iscrowd": 1}, None),
    ):
        assert kinds(*annotations, view=shown) == found
    # Compared in pairs, 20,000 would take 3 GB and minutes; a note says that some were not.
    many = kinds(*(box(10 + i % 3, 10, 40, 40, id=i) for i in range(checks.PAIRED + 50)))
    assert len(many) == checks.PAIRED * (checks.PAIRED - 1) // 2 + 1


def test_classes_of_very_different_size_and_repeated_ids(coco_folder):
    categories = [{"id": i, "name": name} for i, name in enumerate(("polyp", "ulcer", "cancer"))]
    for *counts, expected in (
        (100, 10, 50, {}),
        (0, 0, 0, {}),
        (100, 9, 50, {"ulcer": 100 / 9}),
        (100, 60, 0, {"cancer": None}),
    ):
        annotations = [{"category_id": i} for i, n in enumerate(counts) for _ in range(n)]
        findings = checks.category_findings(categories, annotations)
        assert {finding.detail.split(":")[0]: finding.score for finding in findings} == expected

    # Ids repeat in one file; two splits may number theirs alike, and none needs an id.
    def entry(name, split, *ids):
        return Entry(name, split, None, {}, tuple({"id": i} for i in ids))

    entries = [entry("a", "train", 1, 2, None, None), entry("b", "train", 2, 3, 3)]
    entries.append(entry("c", "test", 1, 2))
    findings = [(f.images, f.splits, f.annotation_id) for f in checks.repeated_id_findings(entries)]
    assert findings == [(("a", "b"), ("train", "train"), 2), (("b",), ("train",), 3)]
    # and a patient that is neither text nor a number
    file, images = coco_folder(lambda coco: coco["images"][0].update(patient_id=["p"]))
    with pytest.raises(BadInputError, match=f"{file.name}: 1.png"):
        read_entries("own", {"": file}, images)


def test_images_and_sizes_of_every_kind(coco_folder):
    """A DICOM file and 16 bits next to a copy each, a size in fractions, a centre of null."""

    def edit(coco):
        for image, name in zip(coco["images"], ("1.png", "1.dcm", "16.png"), strict=True):
            image.update(file_name=name, width=60.0, height=40.0, centre=None)
        coco["annotations"][0]["segmentation"] = [[1, 1, 3, 1, 3, 3, 1, 3]]

    file, images = coco_folder(edit)
    with Image.open(images / "1.png") as image:
        gray = np.asarray(image.convert("L"))
    Image.fromarray(gray).save(images / "1.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(images / "16.png")
    write_dicom(images / "1.dcm", gray)
    audited = audit(read_entries("own", {"": file}, images))
    copies = [f.images for f in audited.findings if f.kind == "exact_duplicate"]
    assert copies == [("1.dcm", "1.png"), ("1.png", "16.png")]
    assert audited.images_of("tiny") == {("", "1.png")}


@pytest.fixture(scope="module")
def synthetic_data(tmp_path_factory):
    """Synthetic images, several of a patient, split image by image."""
    out = tmp_path_factory.mktemp("datasets") / "synthetic"
    source = synthetic.generate(tmp_path_factory.mktemp("scratch"), 20, 96, seed=1)
    prepare_dataset(source, out, SplitOptions(split_by="image"), Rejects())
    return out


def read(path):
    return json.loads(path.read_text())


def annotations(folder, split):
    return read(folder / "annotations" / f"{split}.json")


def edit(folder, split, change):
    content = annotations(folder, split)
    change(content)
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def records(folder, key):
    """Images or annotations of all splits, by rising id."""
    records = [record for split in SPLITS for record in annotations(folder, split)[key]]
    return sorted(records, key=lambda record: record["id"])


def torn(folder):
    """Patients with images in several splits."""
    patients = Counter()
    for split in SPLITS:
        patients.update({image["patient_id"] for image in annotations(folder, split)["images"]})
    return [patient for patient, splits in patients.items() if splits > 1]


def test_patients_are_brought_together(synthetic_data, tmp_path, capsys, monkeypatch):
    """Of a short name, and with a link that leads out of the folder."""
    monkeypatch.delenv("IMRCNN_DATASETS", raising=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    shutil.copytree(synthetic_data, tmp_path / "synthetic")
    image = next((tmp_path / "synthetic" / "images").iterdir())
    image.rename(tmp_path / "private.png")
    image.symlink_to(tmp_path / "private.png")
    settings = read(tmp_path / "synthetic" / "splits.json")
    text = json.dumps({**settings, "left_out": "centre=C4"})  # of which images may move
    (tmp_path / "synthetic" / "splits.json").write_text(text)
    fixed, output = tmp_path / "fixed" / "synthetic", tmp_path / "audit"
    arguments = ["--dataset", "synthetic", "--output", str(output), "--fix-splits", str(fixed)]
    with pytest.raises(SystemExit):
        audit_dataset.main(arguments)
    assert f"{image.name}: is a link" in capsys.readouterr().err and not fixed.exists()
    audit_dataset.main([*arguments, "--follow-links"])
    assert (fixed / "images" / image.name).is_file()
    assert "left_out" not in read(fixed / "splits.json")
    printed, document = capsys.readouterr().out, read(output / "audit.json")
    across = [f for f in document["findings"] if f["kind"] == "patient_across_splits"]
    assert len(across) == len(torn(synthetic_data)) > 0
    assert all(finding["severity"] == "error" for finding in across)
    moved = printed.count(" -> ")
    assert f"{moved} images moved" in printed and moved > 0 and not torn(fixed)

    arguments = ["--dataset", str(fixed), "--output", str(output)]
    audit_dataset.main([*arguments, "--fix-splits", str(tmp_path / "no"), "--follow-links"])
    assert not (tmp_path / "no").exists(), "there is nothing to move"
    findings = read(output / "audit.json")["findings"]
    assert not [finding for finding in findings if finding["severity"] == "error"]


def test_refused_before_a_long_audit(synthetic_data, tmp_path, capsys):
    fixed, bare = tmp_path / "fixed", tmp_path / "bare"
    for folder in (fixed / "images", bare / "annotations", bare / "images"):
        folder.mkdir(parents=True)
    (tmp_path / "a.json").write_text("[]")
    for arguments, code, named in (
        (["--dataset", synthetic_data, "--fix-splits", fixed], 1, "fixed"),  # is not empty
        (["--dataset", bare, "--fix-splits", tmp_path / "new"], 1, "splits.json"),  # is not there
        (["--dataset", tmp_path], 1, str(tmp_path)),
        (["--annotations", tmp_path / "a.json", "--images", tmp_path], 1, "a.json"),
        (["--dataset", "a", "--annotations", "b"], 2, "--dataset"),
        ([], 2, "--dataset"),
        (["--annotations", "b"], 2, "--images"),
        (["--annotations", "b", "--images", "c", "--fix-splits", "d"], 2, "--fix-splits"),
    ):
        with pytest.raises(SystemExit) as end:
            audit_dataset.main([*map(str, arguments), "--output", str(tmp_path / "o")])
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == code and named in lines[-1] and (code == 2 or len(lines) == 1)
        assert not (tmp_path / "o").exists()


@pytest.fixture
def prepared(synthetic_data, tmp_path):
    """The data set as fold 1 of 5, with further fields, and no patients; and its splits."""
    folder = tmp_path / "own"
    shutil.copytree(synthetic_data, folder)

    def add_fields(content):
        content["info"] = {"a": 1}
        for image in content["images"]:
            image["site"] = image["file_name"]
            del image["patient_id"]

    for split in SPLITS:
        edit(folder, split, add_fields)
    settings = read(folder / "splits.json") | {"fold": 1, "folds": 5}
    (folder / "splits.json").write_text(json.dumps(settings))
    return folder, read_splits(folder / "splits.json")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("**/*.*")}


def test_groups_are_brought_together(prepared, tmp_path):
    """Those across splits take their groups of before along, whose numbers do not stay."""
    (folder, old), out = prepared, tmp_path / "fixed"
    a, b, c, alone, *others = old["train"]
    numbers = {a: 1, b: 1, alone: 2}

    def number(content):
        for image in content["images"]:
            image["group_id"] = numbers.get(image["file_name"])

    edit(folder, "train", number)
    before, (x, y) = contents(folder), (old["test"][0], old["val"][0])
    moves = write_fixed_splits(folder, out, [[a, x], [c, y], others[:2]])
    assert contents(folder) == before and contents(out / "images") == contents(folder / "images")

    new = read_splits(out / "splits.json")
    split_of = {name: split for split, names in new.items() for name in names}
    together = sorted(map(sorted, [[a, b, x], [c, y], others[:2]]))
    assert all(len({split_of[name] for name in group}) == 1 for group in together)
    moved = [(n, s, split_of[n]) for s in SPLITS for n in old[s] if n not in new[s]]
    assert [(m.name, m.source, m.target) for m in moves] == sorted(moved)
    assert {name for name, *_ in moved} < {a, b, c, x, y}  # all others stay
    group_of = {name: i for i, group in enumerate(together, 1) for name in group}
    for split, names in new.items():
        assert abs(len(names) - len(old[split])) <= 1
        content = annotations(out, split)
        assert [image["file_name"] for image in content["images"]] == names
        ids = {image["id"] for image in content["images"]}
        assert all(lesion["image_id"] in ids for lesion in content["annotations"])
        assert content["info"] == {"a": 1}
    assert records(out, "annotations") == records(folder, "annotations")
    for old_image, image in zip(records(folder, "images"), records(out, "images"), strict=True):
        group = group_of.get(image["file_name"])
        assert {"group_id": None, **image} == {**old_image, "group_id": group}
    settings = read(out / "splits.json")
    assert settings["split_by"] == "group" and settings["seed"] == 0
    assert not {"fold", "folds"} & set(settings)  # these splits are no fold any more
    assert settings["fixed_from"] == read(folder / "splits.json")["sha256"]


def test_splits_that_cannot_be_fixed(prepared, tmp_path):
    (folder, old), out = prepared, tmp_path / "fixed"
    assert write_fixed_splits(folder, out, [old["train"][:2]]) == []  # none to be moved
    group, train = [old["train"][0], old["test"][0]], annotations(folder, "train")
    with pytest.raises(FileExistsError, match="own"):
        write_fixed_splits(folder, folder, [group])
    before = (folder / "annotations" / "test.json").read_text()
    for key, change, named in (
        ("images", {"file_name": group[0]}, f"{group[0]}.* is in train and test"),
        ("images", {"id": train["images"][0]["id"]}, "images has the id .* twice"),
        ("annotations", {"id": train["annotations"][0]["id"]}, "annotations has the id .* twice"),
        ("annotations", {"image_id": 99}, "image 99"),
    ):
        edit(folder, "test", lambda c, key=key, change=change: c[key][0].update(change))
        with pytest.raises(BadInputError, match=named):
            write_fixed_splits(folder, out, [group])
        (folder / "annotations" / "test.json").write_text(before)
        assert not out.exists()
