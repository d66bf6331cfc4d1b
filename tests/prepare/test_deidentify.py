"""A de-identified data set: keyed names, cropped images, fields by rule, and no byte leads back."""

import csv
import hmac
import json
import re
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


def test_names_are_keyed_hashes_in_a_table_next_to_the_key(names, tmp_path):
    path = tmp_path / "safe" / "key"
    key = bytes.fromhex(path.read_text())
    new = hmac.digest(key, "patient:B,ö".encode(), "sha256").hex()[:16]
    assert len(key) == 32 and names("patient", "B,ö") == new != names("image", "B,ö")
    assert Pseudonyms(tmp_path / "safe2" / "key", tmp_path / "out")("patient", "B,ö") != new
    again = Pseudonyms(path, tmp_path / "other")
    assert again("patient", "B,ö") == new
    image = again("image", "a/b.jpg")
    assert names.of_file("a/b.jpg") == image + ".png"
    names.write_table()
    again.write_table()
    with open(names.table, newline="", encoding="utf-8") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    images = ("image", "B,ö", names("image", "B,ö")), ("image", "a/b.jpg", image)
    assert rows == [*images, ("patient", "B,ö", new)]
    assert sorted(path.name for path in path.parent.iterdir()) == ["key", "key.names.csv"]

    rejects = PrivateRejects("reject", names)
    with rejects.catch():
        raise BadInputError("Musterfrau.jpg", "is no image, 12.08.1964")
    rejects.write_csv(tmp_path / "rejected.csv")
    text = (tmp_path / "rejected.csv").read_text()
    assert text.startswith("number,reason\n1,") and "Muster" not in text and "1964" not in text
    assert names.rejected.read_text() == 'file,reason\nMusterfrau.jpg,"is no image, 12.08.1964"\n'
    for private in (path, names.table, names.rejected):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    PrivateRejects("reject", again).write_csv(tmp_path / "rejected2.csv")  # of another data set
    assert "Musterfrau.jpg" in path.with_name("key.out.rejected.csv").read_text()
    assert path.with_name("key.other.rejected.csv").read_text() == "file,reason\n"


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
        categories = [{"id": 1, "name": "cancer", "keypoints": ["Arzt"]}]
        content = {"images": [], "annotations": [], "categories": categories}
        content |= {"info": {"contributor": "Dr. Arzt"}, "licenses": [{"name": "Klinik"}]}
        for i, name in enumerate(kept, 1):
            x, y = lesions[name]
            frame, _, _ = draw_frame("disc", inset="map", seed=i)
            Image.fromarray(frame).save(images / f"Muster_{name}.png")
            fields = {"patient_id": "P1", "site": "antrum", "size_mm": 4.5, "date": "2012-08-01"}
            content["images"].append({"id": i, "file_name": f"Muster_{name}.png", **fields})
            polygon = [[x, y, x + 120, y, x + 120, y + 60, x, y + 60]]
            lesion = {"id": i, "image_id": i, "category_id": 1, "segmentation": polygon}
            content["annotations"].append({**lesion, "lesion_id": "L1", "note": "Frau Muster"})
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
    mask = mask_util.decode(annotation.pop("segmentation"))
    assert mask.shape == new.shape[:2]
    assert mask[200 - y0 : 260 - y0, 350 - x0 : 470 - x0].all()
    expected = {"bbox": [350 - x0, 200 - y0, 120, 60], "area": 120 * 60, "category_id": 1}
    assert annotation == {**expected, "iscrowd": 0, "lesion_id": names("lesion", "L1")}
    assert "were cut" not in "".join(source.notes)

    assert sample.file_name == names.of_file("Muster_within.png") == sample.image.path.name
    assert sample.fields == {"patient_id": names("patient", "P1"), "site": "antrum", "size_mm": 4.5}
    assert source.categories == [{"id": 1, "name": "cancer"}] and not source.extra
    assert "Arzt" not in json.dumps(source.info)
    assert "fields left out: contributor, date, licenses, note" in source.notes
    assert names.table.exists()


def test_lesions_beyond_and_outside_the_view(frames, deidentify):
    source = frames(["beyond"])
    source.categories[0]["supercategory"] = "ward 7"
    source.samples = list(source.samples)
    crowd = np.zeros((480, 640), bool)
    crowd[10:30, 10:30] = True
    source.samples[0].annotations.append(annotation_from_mask(crowd, iscrowd=1))
    (sample,), source = deidentify(source)
    (lesion,) = sample.annotations  # the crowd lay outside
    assert lesion["iscrowd"] == 0 < lesion["area"] < 0.9 * 120 * 60
    assert "names of classes pass as they are: cancer, ward 7" in source.notes
    mask = mask_util.decode(lesion["segmentation"])
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
    image = inspect_image(tmp_path / "a.png")
    return Source([Sample("a.png", image, annotations, fields, label=1)], [], {})


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


def test_values_that_pass(deidentify, names, tmp_path):
    fields = {"size_mm": 4.5, "site": "antrum", "kind": "0-IIa, flat", "grade": 2, "seen": True}
    fields |= {"none": None, "free": "12 août", "low": -3.0, "day": 45000, "ratio": "1:2"}
    texts = ["size_mm=0:6e1", "site=corpus,antrum", 'kind=0-Is,"0-IIa, flat"', "grade=1,2"]
    texts += ["seen=true,false", "none=a", "low=-3:-3", "day=40000:50000", "ratio=1:2,"]
    source = small(tmp_path, {"lesion_id": "0", **fields}, {"lesion_id": "0", **fields})
    (kept,), source = deidentify(source, keep=parse_keep(texts, ["free", "odd"], source))
    assert {name: kept.fields[name] for name in fields} == fields
    fields |= {"category_id": 1, "lesion_id": names("lesion", "0")}
    assert (kept.annotations, kept.label) == ([fields], 1)
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
    for field in ("patient_id", "sequence_id", "area", "width", "group_id"):
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


def run(*args):
    prepare_dataset.main([str(arg) for arg in args])


def annotations(folder, split):
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def frame(seed):
    image, view, _ = draw_frame("octagon", inset="map", seed=seed, height=240, width=320)
    return patient_banner(image, view)[0]


@pytest.fixture
def sources(tmp_path):
    """COCO with images as PNG with texts, as JPEG with EXIF, and as DICOM; and a table."""
    images = tmp_path / "in" / "Musterfrau"
    images.mkdir(parents=True)
    exif, texts = Image.Exif(), PngInfo()
    exif[ExifTags.Base.Artist] = "Dr. Arzt, Klinik"
    exif[ExifTags.Base.DateTime] = "2012-08-01"
    texts.add_text("Comment", "Musterfrau, Erika, secret")
    info = {"contributor": "Klinik", "date_created": "2012-08-01", "description": "Erika"}
    content = {"info": info, "licenses": [{"id": 1, "name": "Klinik"}], "images": []}
    content |= {"annotations": [], "categories": [{"id": 1, "name": "polyp"}]}
    rows = ["file,size_mm,doctor"]
    for i, suffix in enumerate(("jpg", "png", "jpg", "png", "jpg", "png", "dcm", "bmp"), 1):
        path = images / f"Musterfrau_4711_{i}.{suffix}"
        if suffix == "bmp":
            path.write_bytes(b"Musterfrau: no image")
        elif suffix == "dcm":
            write_dicom(path, frame(i), StudyDate="20120801")
        else:
            options = {"exif": exif, "quality": 95} if suffix == "jpg" else {"pnginfo": texts}
            Image.fromarray(frame(i)).save(path, **options)
        name = f"Musterfrau/{path.name}"
        rows.append(f"{name},{i},Dr. Arzt")
        image = {"id": i, "file_name": name, "patient_id": f"KIS-4711-{i // 2}"}
        image |= {"date_captured": "2012-08-01 12:00", "anamnesis": "Erika, secret"}
        content["images"].append(image)
        polygon = [[150, 100, 210, 100, 210, 150, 150, 150]]
        lesion = {"id": i, "image_id": i, "category_id": 1, "segmentation": polygon}
        lesion |= {"lesion_id": f"Musterfrau-{i}", "reader": "Dr. Arzt"}
        content["annotations"].append(lesion)
    (tmp_path / "own.json").write_text(json.dumps(content))
    (tmp_path / "more.csv").write_text("\n".join(rows))
    where = "--annotations", tmp_path / "own.json", "--images", tmp_path / "in"
    return "coco", *where, "--metadata", tmp_path / "more.csv", "--on-error", "reject"


def test_nothing_leads_back(sources, tmp_path, capsys):
    out, key = tmp_path / "out", tmp_path / "safe" / "key"
    private = "--deidentify", "--key", key, "--keep", "size_mm=1:9"
    options = "--out", out, "--split-by", "group", "--folds", 2, "--ratio", "3:2:2"
    run(*sources, *private, "--review", tmp_path / "review", *options)
    files = [path for f in (out, tmp_path / "review") for path in f.rglob("*") if path.is_file()]
    expected = {"splits.json", "near_duplicates.json", "rejected.csv", "fold1.json", "test.json"}
    assert expected | {"sheet_001.jpg"} <= {path.name for path in files}
    words = "musterfrau erika kis-4711 _4711_ 2012-08-01 20120801 12.08.1964 klinik arzt".split()
    words = [w.lower().encode() for w in (*words, "secret", "anamnesis", *PATIENT.values())]
    for path in files:
        content = path.read_bytes().lower() + str(path.relative_to(tmp_path)).lower().encode()
        if path.suffix == ".png":  # some bytes of an image spell anything; its chunks do not
            with Image.open(path) as image:
                assert image.mode == "RGB" and not image.info and not image.getexif()
            content = path.name.lower().encode()
        assert not [word for word in words if word in content], path

    contents = [annotations(out, split) for split in SPLITS]
    keys = {"info", "categories", "images", "annotations"}
    assert all(set(content) == keys for content in contents)
    records = [record for content in contents for record in content["images"]]
    lesions = [lesion for content in contents for lesion in content["annotations"]]
    assert len(records) == len(lesions) == len(list((out / "images").iterdir())) == 7
    allowed = {"id", "file_name", "width", "height", "patient_id", "group_id", "size_mm"}
    assert all(set(record) <= allowed for record in records)
    assert len({record["patient_id"] for record in records}) == 4
    allowed = {"id", "image_id", "category_id", "segmentation", "area", "bbox", "iscrowd"}
    assert all(set(lesion) == allowed | {"lesion_id"} for lesion in lesions)

    # only who has the table can tell which is which
    with open(tmp_path / "safe" / "key.names.csv", encoding="utf-8") as file:
        old = {row["new"]: row["old"] for row in csv.DictReader(file)}
    for record in records:
        name = old[record["file_name"].removesuffix(".png")]
        number = int(re.fullmatch(r"Musterfrau/Musterfrau_4711_(\d)\.\w+", name)[1])
        assert record["size_mm"] == number
        assert old[record["patient_id"]] == f"KIS-4711-{number // 2}"
        with Image.open(out / "images" / record["file_name"]) as image:
            assert image.size == (record["width"], record["height"]) < (240, 240)
    assert "Musterfrau_4711_8.bmp" in (tmp_path / "safe" / "key.out.rejected.csv").read_text()
    assert (out / "rejected.csv").read_text().count("\n") == 2
    assert "writing inside the view is still there" in capsys.readouterr().out

    # once more is the same; another key gives other names
    run(*sources, *private, *options)
    assert capsys.readouterr().out.endswith("unchanged\n")
    other = "--deidentify", "--key", tmp_path / "safe" / "other", "--out", tmp_path / "out2"
    run(*sources, *other, "--keep-as-is", "date_captured")
    assert "NOT examined: date_captured" in capsys.readouterr().out
    images = annotations(tmp_path / "out2", "train")["images"]
    assert {image["date_captured"] for image in images} == {"2012-08-01 12:00"}
    names = [{path.name for path in (tmp_path / o / "images").iterdir()} for o in ("out", "out2")]
    assert len(names[1]) == 7 and not names[0] & names[1]


def test_a_sequence_stays_together(tmp_path, capsys):
    """Under a new id, and with a frame that stands still."""
    images = tmp_path / "in"
    images.mkdir()
    records = []
    for video in range(3):
        for i in range(4):
            Image.fromarray(frame(10 * video + max(i, 1))).save(images / f"{video}_{i}.png")
            record = {"file_name": f"{video}_{i}.png", "sequence_id": f"Erika {video}", "frame": i}
            records.append({"id": len(records), **record})
    records[-1]["sequence_id"] = "3"  # the number of its frame
    content = {"images": records, "annotations": [], "categories": [{"id": 1, "name": "polyp"}]}
    (tmp_path / "own.json").write_text(json.dumps(content))
    private = "--deidentify", "--key", tmp_path / "key", "--keep", "frame=0:99"
    where = "--annotations", tmp_path / "own.json", "--images", images, "--out", tmp_path / "out"
    run("coco", *where, *private, "--ratio", "1:1:1")
    with open(tmp_path / "key.names.csv", encoding="utf-8") as file:
        old = {row["new"]: row["old"] for row in csv.DictReader(file)}
    splits = {}
    for split in SPLITS:
        for image in annotations(tmp_path / "out", split)["images"]:
            name, sequence = old[image["file_name"].removesuffix(".png")], old[image["sequence_id"]]
            assert {"file_name": name, "sequence_id": sequence, "frame": image["frame"]} in [
                {key: record[key] for key in record if key != "id"} for record in records
            ]
            splits.setdefault(sequence, set()).add(split)
    assert len(splits) == 4 and all(len(parts) == 1 for parts in splits.values())


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
    # By the names of the files as they are, before the conversion of one.
    names = {split: [n.replace("_7.png", "_7.dcm") for n in splits[0][split]] for split in SPLITS}
    (tmp_path / "names.json").write_text(json.dumps(names))
    capsys.readouterr()
    run(*sources, *private, "--splits", tmp_path / "names.json", "--out", tmp_path / "third")
    assert "are gone" not in capsys.readouterr().out
    third = json.loads((tmp_path / "third" / "splits.json").read_text())
    assert all(third[split] == splits[1][split] for split in SPLITS)


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
        message = capsys.readouterr().err.splitlines()[-1] if code else error.value.code
        assert named in message
    assert not out.exists()
