"""A de-identified data set: keyed names, cropped images, fields by rule, and no byte leads back."""

import csv
import hmac
import json
import stat
from dataclasses import replace

import numpy as np
import pycocotools.mask as mask_util
import pytest
from dicoms import PATIENT, write_dicom
from endoscope_frames import draw_frame, patient_banner
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from imrcnn_d2.cli import prepare_dataset
from imrcnn_d2.data.endoscope_view import find_view
from imrcnn_d2.data.formats import Sample, Source, read_coco
from imrcnn_d2.data.images import inspect_image, read_image
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare.deidentify import PrivateRejects, Pseudonyms, deidentified, parse_keep
from imrcnn_d2.utils.files import BadInputError, Rejects

SPLITS = ("train", "val", "test")


@pytest.fixture
def names(tmp_path):
    return Pseudonyms(tmp_path / "safe" / "key", tmp_path / "out")


def test_a_name_is_the_keyed_hash(names, tmp_path):
    key = bytes.fromhex((tmp_path / "safe" / "key").read_text())
    expected = hmac.digest(key, b"patient:KIS-4711", "sha256").hex()[:16]
    assert len(key) == 32 and names("patient", "KIS-4711") == expected
    assert names("image", "KIS-4711") != expected
    other = Pseudonyms(tmp_path / "safe" / "other", tmp_path / "out")
    assert other("patient", "KIS-4711") != expected
    again = Pseudonyms(tmp_path / "safe" / "key", tmp_path / "out2")
    assert again("patient", "KIS-4711") == expected
    new = names.of_file("a/b.jpg")
    assert new == again("image", "a/b.jpg") + ".png"
    assert names.of_splits({"train": ["a/b.jpg"], "val": [new]}) == {"train": [new], "val": [new]}


def test_the_tables_lie_next_to_the_key(names, tmp_path):
    names("patient", "B,ö")
    names.write_table()
    key = tmp_path / "safe" / "key"
    again = Pseudonyms(key, tmp_path / "other")
    new = again("image", "a.png")
    again.write_table()
    with open(names.table, newline="", encoding="utf-8") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [("image", "a.png", new), ("patient", "B,ö", names("patient", "B,ö"))]
    assert sorted(path.name for path in key.parent.iterdir()) == ["key", "key.names.csv"]

    rejects = PrivateRejects("reject", names)
    with rejects.catch():
        raise BadInputError("Musterfrau.jpg", "is no image, 12.08.1964")
    rejects.write_csv(tmp_path / "rejected.csv")
    text = (tmp_path / "rejected.csv").read_text()
    assert text.startswith("number,reason\n1,") and "Muster" not in text and "1964" not in text
    assert names.rejected.read_text() == 'file,reason\nMusterfrau.jpg,"is no image, 12.08.1964"\n'
    for path in (key, names.table, names.rejected):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    PrivateRejects("reject", again).write_csv(tmp_path / "rejected2.csv")  # of another data set
    assert "Musterfrau.jpg" in (key.parent / "key.out.rejected.csv").read_text()
    assert (key.parent / "key.other.rejected.csv").read_text() == "file,reason\n"


def test_keys_that_are_none(tmp_path):
    out, key = tmp_path / "out", tmp_path / "key"

    def refused(path, message):
        with pytest.raises(BadInputError, match=f"{path.name}: .*{message}"):
            Pseudonyms(path, out)

    refused(out / "sub" / ".." / "key", str(out))
    assert not out.exists()
    texts = {"secret": "", "ab" * 16: "16 bytes", "00" * 32: "", "ab" * 32: ""}
    for text, message in texts.items():
        key.write_text(text)
        key.chmod(0o600)
        refused(key, message)
    key.write_text(bytes(range(32)).hex())
    Pseudonyms(key, out)
    key.chmod(0o640)
    refused(key, "chmod 600")
    (tmp_path / "link").symlink_to(out)
    out.mkdir()
    refused(tmp_path / "link" / "key", str(out))
    (out / "key").symlink_to(tmp_path / "elsewhere")  # the tables would lie in the data set
    refused(out / "key", str(out))


@pytest.fixture
def frames(tmp_path):
    """A function: a patient's frames, with a lesion within, beyond or outside the view."""
    images = tmp_path / "images"
    images.mkdir()
    lesions = {"within": (350, 200), "beyond": (560, 200), "outside": (20, 20)}

    def read(kept=lesions):
        content = {"info": {"contributor": "Dr. Arzt"}, "licenses": [{"name": "Klinik"}]}
        content["categories"] = [{"id": 1, "name": "cancer", "keypoints": ["Arzt"]}]
        content |= {"images": [], "annotations": []}
        for i, (name, (x, y)) in enumerate(lesions.items(), 1):
            if name not in kept:
                continue
            frame, _, _ = draw_frame("disc", inset="map", seed=i)
            Image.fromarray(frame).save(images / f"Muster_{name}.png")
            fields = {"patient_id": "P1", "site": "antrum", "size_mm": 4.5, "date": "2012-08-01"}
            content["images"].append({"id": i, "file_name": f"Muster_{name}.png", **fields})
            polygon = [[x, y, x + 120, y, x + 120, y + 60, x, y + 60]]
            fields = {"bbox": [x, y, 120, 60], "lesion_id": "L1", "note": "Frau Muster"}
            annotation = {"id": i, "image_id": i, "category_id": 1, "segmentation": polygon}
            content["annotations"].append(annotation | fields)
        (tmp_path / "own.json").write_text(json.dumps(content))
        return read_coco(tmp_path / "own.json", images, Rejects())

    return read


@pytest.fixture
def deidentify(names, tmp_path):
    """A function: samples and source after de-identification."""

    def run(source, rejects=None, keep=None):
        source = deidentified(source, tmp_path / "new", names, rejects or Rejects(), keep)
        return list(source.samples), source

    return run


def test_an_image_and_its_lesion_move_together(frames, names, deidentify, tmp_path):
    keep = {"site": frozenset(["antrum"]), "size_mm": (0, 9)}
    (sample,), source = deidentify(frames(["within"]), keep=keep)
    old = read_image(tmp_path / "images" / "Muster_within.png")
    new = read_image(sample.image.path)
    view = find_view(old)
    x0, y0, x1, y1 = view.box
    assert (sample.image.width, sample.image.height) == (x1 - x0, y1 - y0)
    assert x0 > 100 and new.shape[1] < old.shape[1]
    assert (new == np.where(view.mask[..., None], old, 0)[y0:y1, x0:x1]).all()
    (annotation,) = sample.annotations
    assert annotation["bbox"] == [350 - x0, 200 - y0, 120, 60]
    assert annotation["area"] == 120 * 60 and annotation["iscrowd"] == 0
    mask = mask_util.decode(annotation["segmentation"])
    assert mask.shape == new.shape[:2]
    assert mask[200 - y0 : 260 - y0, 350 - x0 : 470 - x0].all()
    assert "were cut" not in "".join(source.notes)

    assert sample.file_name == names.of_file("Muster_within.png") == sample.image.path.name
    assert sample.fields == {"patient_id": names("patient", "P1"), "site": "antrum", "size_mm": 4.5}
    assert annotation["lesion_id"] == names("lesion", "L1") and "note" not in annotation
    assert source.categories == [{"id": 1, "name": "cancer"}] and not source.extra
    assert "Arzt" not in json.dumps(source.info)
    assert "fields left out: contributor, date, licenses, note" in source.notes
    assert names.table.exists()


def test_lesions_beyond_and_outside_the_view(frames, deidentify):
    (sample,), source = deidentify(frames(["beyond"]))
    assert 0 < sample.annotations[0]["area"] < 0.9 * 120 * 60
    mask = mask_util.decode(sample.annotations[0]["segmentation"])
    blanked = ~read_image(sample.image.path)[mask > 0].any(axis=1)
    assert blanked.mean() < 0.01
    assert "1 lesions reached beyond the view and were cut" in source.notes
    rejects = Rejects("reject")
    assert len(deidentify(frames(), rejects)[0]) == 2
    (error,) = rejects.errors
    assert error.file.endswith("Muster_outside.png") and "20.0, 120.0, 60.0]" in str(error)
    with pytest.raises(BadInputError, match="Muster_outside.png"):
        deidentify(frames())


def small(tmp_path, fields, of_class=None):
    """A data set of one small image."""
    frame, _, _ = draw_frame("disc", height=120, width=160)
    Image.fromarray(frame).save(tmp_path / "a.png")
    annotations = [{"category_id": 1, **of_class}] if of_class else []
    return Source([Sample("a.png", inspect_image(tmp_path / "a.png"), annotations, fields)], [], {})


# Dates in ways that no pattern matches all of, and what else may tell of a person.
REVEALING = (
    *("20120812", 20120812, 20120812.0, "2012-8-2", "1964_08_12", "8/2/12", "1 Aug 2012"),
    *(240131, 120864, 1700000000, 45000, 45000.5, "45000", "240131", "1700000000", "3märz64"),
    *("12 août 1964", "12. elokuuta", "昭和39年8月12日", "ayer", "am Tag nach Neujahr"),
    *("2012\u20108\u20102", "2012\u20138\u20132", "\uff12\uff10\uff11\uff12\uff10\uff18"),
    *("Frau Muster", "antrum 12.08.1964", "ANTRUM", True, -1, 61, "12", ["antrum"], {"a": 12}),
)


PATIENTS = [("P1", "of P1"), ("P1", "P1"), ("4711", 4711.0), ("4711", 4711), ("004711", 4711)]
PATIENTS.append(("M\u00fcller", "of Mu\u0308ller"))
RULES = [["note=antrum,corpus"], ["note=0:60"]]
PATIENT_RULES = [["note=0:9999"], ["note=4711,P1,of P1"], []]  # not examined


@pytest.mark.parametrize(
    ("rules", "record", "lesion"),
    [
        *((rules, {"note": value}, None) for rules in RULES for value in REVEALING),
        *((rules, {}, {"note": value}) for rules in RULES for value in REVEALING),
        *((r, {"patient_id": p}, {"note": note}) for r in PATIENT_RULES for p, note in PATIENTS),
    ],
)
def test_values_that_nobody_named_or_that_reveal_the_patient(
    deidentify, tmp_path, rules, record, lesion
):
    source = small(tmp_path, record, lesion)
    keep = parse_keep(rules, [] if rules else ["note"], source)
    with pytest.raises(BadInputError, match="a.png: note is"):
        deidentify(source, keep=keep)


def test_values_that_pass(deidentify, tmp_path):
    fields = {"size_mm": 4.5, "site": "antrum", "kind": "0-IIa, flat", "grade": 2, "seen": True}
    fields |= {"none": None, "free": "12 août", "low": -3.0, "day": 45000, "ratio": "1:2"}
    texts = ["size_mm=0:6e1", "site=corpus,antrum", 'kind=0-Is,"0-IIa, flat"', "grade=1,2"]
    texts += ["seen=true,false", "none=a", "low=-3:-3", "day=40000:50000", "ratio=1:2,"]
    source = small(tmp_path, {"lesion_id": "0", **fields}, fields)
    (kept,), source = deidentify(source, keep=parse_keep(texts, ["free", "odd"], source))
    assert {name: kept.fields[name] for name in fields} == fields
    assert {name: kept.annotations[0][name] for name in fields} == fields
    assert "passed as they are, NOT examined: free, odd" in source.notes


def test_a_field_without_its_values(frames, deidentify):
    """The error names ways with values of the field, and they work."""
    with pytest.raises(ValueError, match=r"=4\.5; .*=4\.5:4\.5; .*--keep-as-is size_mm"):
        parse_keep(["site=antrum", "size_mm="], [], frames(["within"]))
    for texts, as_is in ((["size_mm=4.5"], []), (["size_mm=4.5:4.5"], []), ([], ["size_mm"])):
        keep = parse_keep(texts, as_is, frames(["within"]))
        (sample,), _ = deidentify(frames(["within"]), keep=keep)
        assert sample.fields["size_mm"] == 4.5
    with pytest.raises(ValueError, match="site"):  # named twice
        parse_keep(["site=antrum"], ["site"], frames(["within"]))
    for field in ("patient_id", "area", "width", "group_id"):
        with pytest.raises(ValueError, match=field):  # made anew
            deidentify(frames(["within"]), keep={field: None})


def test_dark_images_and_copies(frames, deidentify, names, tmp_path):
    source = frames(["within", "beyond"])
    within, beyond = source.samples
    dark, copy = tmp_path / "dark.png", tmp_path / "copy.png"
    Image.new("RGB", (60, 40), (2, 2, 2)).save(dark)
    changed = read_image(within.image.path).copy()
    changed[5:15, 5:15] = 255  # another date next to the view
    Image.fromarray(changed).save(copy)
    source.samples = [within, *(Sample(p.name, inspect_image(p), []) for p in (dark, copy))]
    rejects = Rejects("reject")
    assert len(deidentify(source, rejects)[0]) == 1
    assert [error.file for error in rejects.errors] == [str(dark), str(copy)]
    assert str(within.image.path) in rejects.errors[1].reason
    # two of one name: the first is kept, also where its file was linked before the second came
    first, second = replace(within, file_name="0.dcm"), replace(beyond, file_name="0.png")
    first.image = replace(first.image, needs_conversion=True)
    source.samples, rejects = [first, second], Rejects("reject")
    new = deidentified(source, tmp_path / "two", names, rejects)
    ((kept, before),) = ((sample, read_image(sample.image.path)) for sample in new.samples)
    assert (read_image(kept.image.path) == before).all()
    (error,) = rejects.errors
    assert error.file == str(beyond.image.path) and str(within.image.path) in error.reason


def test_classes_and_crowds(deidentify, frames):
    (sample,) = frames(["within"]).samples
    crowd = np.zeros((480, 640), bool)
    crowd[10:30, 10:30] = True
    sample.annotations.append(annotation_from_mask(crowd, iscrowd=1))
    categories = [{"id": 1, "name": "polyp", "supercategory": "ward 7"}]
    (kept,), new = deidentify(Source([sample], categories, {}))
    assert "names of classes pass as they are: polyp, ward 7" in new.notes
    assert [a["iscrowd"] for a in kept.annotations] == [0], "it lay outside the view"


# What the sources below are full of.
SECRETS = [
    *("musterfrau", "erika", "kis-4711", "_4711_", "2012-08-01", "20120801", "12.08.1964"),
    *("klinik", "dr. arzt", "secret", "anamnesis"),
]


def run(*args):
    prepare_dataset.main([str(arg) for arg in args])


def frame(seed):
    image, view, _ = draw_frame("octagon", inset="map", seed=seed, height=240, width=320)
    return patient_banner(image, view)[0]


@pytest.fixture
def sources(tmp_path):
    """COCO with images as PNG with texts, as JPEG with EXIF, and as DICOM; and a table."""
    images = tmp_path / "in" / "Musterfrau"
    images.mkdir(parents=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Dr. Arzt, Klinik"
    exif[ExifTags.Base.DateTime] = "2012-08-01"
    texts = PngInfo()
    texts.add_text("Comment", "Musterfrau, Erika, secret")
    names = [f"Musterfrau_4711_{i}.{'jpg' if i % 2 else 'png'}" for i in range(1, 7)]
    for i, name in enumerate(names, 1):
        options = {"exif": exif, "quality": 95} if i % 2 else {"pnginfo": texts}
        Image.fromarray(frame(i)).save(images / name, **options)
    names += ["Musterfrau_4711_7.dcm", "Musterfrau_4711_8.png"]
    write_dicom(images / names[-2], frame(7), StudyDate="20120801")
    (images / names[-1]).write_bytes(b"Musterfrau: no image")
    records = [
        {"id": i, "file_name": f"Musterfrau/{name}", "patient_id": f"KIS-4711-{i // 2}"}
        | {"date_captured": "2012-08-01 12:00", "anamnesis": "Erika, secret"}
        for i, name in enumerate(names, 1)
    ]
    polygon = [[150, 100, 210, 100, 210, 150, 150, 150]]
    lesion = {"category_id": 1, "segmentation": polygon, "bbox": [150, 100, 60, 50]}
    annotations = [
        {"id": i, "image_id": i, "lesion_id": f"Musterfrau-{i}", "reader": "Dr. Arzt", **lesion}
        for i in range(1, 8)
    ]
    info = {"contributor": "Klinik", "date_created": "2012-08-01", "description": "Erika"}
    content = {"info": info, "licenses": [{"id": 1, "name": "Klinik"}], "images": records}
    content |= {"annotations": annotations, "categories": [{"id": 1, "name": "polyp"}]}
    (tmp_path / "own.json").write_text(json.dumps(content))
    rows = [f"{record['file_name']},{i},Dr. Arzt" for i, record in enumerate(records, 1)]
    (tmp_path / "more.csv").write_text("\n".join(["file,size_mm,doctor", *rows]) + "\n")
    where = "--annotations", tmp_path / "own.json", "--images", tmp_path / "in"
    return "coco", *where, "--metadata", tmp_path / "more.csv", "--on-error", "reject"


def test_nothing_leads_back(sources, tmp_path, capsys):
    out, key = tmp_path / "out", tmp_path / "safe" / "key"
    private = "--deidentify", "--key", key, "--keep", "size_mm=1:9"
    options = "--out", out, "--split-by", "group", "--folds", 2, "--ratio", "3:2:2"
    run(*sources, *private, "--review", tmp_path / "review", *options)
    written = [path for folder in (out, tmp_path / "review") for path in folder.rglob("*")]
    files = [path for path in written if path.is_file()]
    expected = {"splits.json", "near_duplicates.json", "rejected.csv", "fold1.json", "test.json"}
    assert expected | {"sheet_001.jpg"} <= {path.name for path in files}
    words = [word.encode() for word in (*SECRETS, *PATIENT.values())]
    for path in files:
        content = path.read_bytes().lower() + str(path.relative_to(tmp_path)).lower().encode()
        if path.suffix == ".png":  # some bytes of an image spell anything; its chunks do not
            with Image.open(path) as image:
                assert image.mode == "RGB" and not image.info and not image.getexif()
            content = path.name.encode()
        assert not [word for word in words if word.lower() in content], path

    records, annotations = [], []
    for split in SPLITS:
        content = json.loads((out / "annotations" / f"{split}.json").read_text())
        assert set(content) == {"info", "categories", "images", "annotations"}
        records += content["images"]
        annotations += content["annotations"]
    assert len(records) == len(annotations) == len(list((out / "images").iterdir())) == 7
    allowed = {"id", "file_name", "width", "height", "patient_id", "group_id", "size_mm"}
    assert all(set(record) <= allowed for record in records)
    assert len({record["patient_id"] for record in records}) == 4
    allowed = {"id", "image_id", "category_id", "segmentation", "area", "bbox", "iscrowd"}
    assert all(set(a) == allowed | {"lesion_id"} for a in annotations)

    # only who has the table can tell which is which
    with open(tmp_path / "safe" / "key.names.csv", encoding="utf-8") as file:
        old = {row["new"]: row["old"] for row in csv.DictReader(file)}
    for record in records:
        name = old[record["file_name"].removesuffix(".png")]
        assert name.startswith("Musterfrau/Musterfrau_4711_")
        number = int(name.rsplit("_", 1)[1].split(".")[0])
        assert record["size_mm"] == number
        assert old[record["patient_id"]] == f"KIS-4711-{number // 2}"
        size = record["width"], record["height"]
        with Image.open(out / "images" / record["file_name"]) as image:
            assert image.size == size < (240, 240)
    assert "Musterfrau_4711_8.png" in (tmp_path / "safe" / "key.out.rejected.csv").read_text()
    assert (out / "rejected.csv").read_text().count("\n") == 2
    assert "writing inside the view is still there" in capsys.readouterr().out

    # once more is the same; another key gives other names
    run(*sources, *private, *options)
    assert capsys.readouterr().out.endswith("unchanged\n")
    other = "--deidentify", "--key", tmp_path / "safe" / "other", "--out", tmp_path / "out2"
    run(*sources, *other, "--keep-as-is", "date_captured")
    assert "NOT examined: date_captured" in capsys.readouterr().out
    images = json.loads((tmp_path / "out2" / "annotations" / "train.json").read_text())["images"]
    assert {image["date_captured"] for image in images} == {"2012-08-01 12:00"}
    names = [{path.name for path in (tmp_path / o / "images").iterdir()} for o in ("out", "out2")]
    assert len(names[1]) == 7 and not names[0] & names[1]


def test_published_splits_by_old_names(sources, tmp_path, capsys):
    plain, out, again = tmp_path / "plain", tmp_path / "out", tmp_path / "again"
    private = "--deidentify", "--key", tmp_path / "key"
    run(*sources, "--out", plain, "--ratio", "3:2:2")
    run(*sources, *private, "--splits", plain / "splits.json", "--out", out)
    assert "are gone" not in capsys.readouterr().out
    with open(tmp_path / "key.names.csv", encoding="utf-8") as file:
        new = {row["old"]: f"{row['new']}.png" for row in csv.DictReader(file)}
    run(*sources, *private, "--splits", out / "splits.json", "--out", again)  # of the same key
    splits = [json.loads((f / "splits.json").read_text()) for f in (plain, out, again)]
    for split in SPLITS:
        assert sorted(new[name] for name in splits[0][split]) == sorted(splits[1][split])
        assert splits[1][split] == splits[2][split]


def test_classified_images(tmp_path):
    for i in range(12):
        path = tmp_path / "in" / ("cancer" if i % 2 else "ulcer") / f"Musterfrau{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame(i)).save(path)
    private = "--deidentify", "--key", tmp_path / "key", "--ratio", "1:1:1"
    run("classification", "--root", tmp_path / "in", "--out", tmp_path / "out", *private)
    for split in SPLITS:
        text = (tmp_path / "out" / "annotations" / f"{split}.json").read_text()
        labels = [annotation["category_id"] for annotation in json.loads(text)["annotations"]]
        assert sorted(labels) == [1, 1, 2, 2] and "Muster" not in text


def test_options_that_do_not_fit(sources, tmp_path, capsys):
    key, out = tmp_path / "key", tmp_path / "out"
    private = "--deidentify", "--key", key
    for options, code, named in (
        (["--deidentify"], 2, "--key"),
        (["--key", key], 2, "--deidentify"),
        (["--keep", "site"], 2, "--deidentify"),
        (["--keep-as-is", "site"], 2, "--deidentify"),
        ([*private, "--review", tmp_path / "in"], 2, f"--review {tmp_path / 'in'}"),
        ([*private, "--review", out / "x"], 2, f"--review {out / 'x'}"),
        (["--deidentify", "--key", out / "key"], None, str(out / "key")),
        ([*private, "--split-by", "prefix"], None, "--split-by prefix"),
        ([*private, "--keep", "size_mm"], None, "--keep size_mm=1:7"),
    ):
        with pytest.raises(SystemExit) as error:
            run(*sources, "--out", out, *options)
        assert code in (None, error.value.code)
        assert named in (capsys.readouterr().err if code else error.value.code)
    assert not out.exists()
