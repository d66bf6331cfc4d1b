"""A data set prepared with --deidentify has nothing in any of its bytes that leads back."""

import csv
import json

import numpy as np
import pytest
from dicoms import PATIENT, write_dicom
from endoscope_frames import draw_frame, patient_banner
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from imrcnn_d2.cli import prepare_dataset

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
        how = {"exif": exif, "quality": 95} if i % 2 else {"pnginfo": texts}
        Image.fromarray(frame(i)).save(images / name, **how)
    names.append("Musterfrau_4711_7.dcm")
    write_dicom(images / names[-1], frame(7), StudyDate="20120801")
    names.append("Musterfrau_4711_8.png")
    (images / names[-1]).write_bytes(b"Musterfrau: no image")
    outline = [[150, 100, 210, 100, 210, 150, 150, 150]]
    records = [
        {"id": i, "file_name": f"Musterfrau/{name}", "patient_id": f"KIS-4711-{i // 2}"}
        | {"date_captured": "2012-08-01 12:00", "anamnesis": "Erika, secret"}
        for i, name in enumerate(names, 1)
    ]
    annotations = [
        {
            "id": i,
            "image_id": i,
            "category_id": 1,
            "segmentation": outline,
            "bbox": [150, 100, 60, 50],
        }
        | {"lesion_id": f"Musterfrau-{i}", "reader": "Dr. Arzt"}
        for i in range(1, 8)
    ]
    content = {
        "info": {"contributor": "Klinik", "date_created": "2012-08-01", "description": "Erika"},
        "licenses": [{"id": 1, "name": "Klinik"}],
        "images": records,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "polyp"}],
    }
    (tmp_path / "own.json").write_text(json.dumps(content))
    rows = [f"{record['file_name']},{i},Dr. Arzt" for i, record in enumerate(records, 1)]
    (tmp_path / "more.csv").write_text("\n".join(["file,size_mm,doctor", *rows]) + "\n")
    where = "--annotations", tmp_path / "own.json", "--images", tmp_path / "in"
    return "coco", *where, "--metadata", tmp_path / "more.csv", "--on-error", "reject"


def test_nothing_leads_back(sources, tmp_path, capsys):
    out, key = tmp_path / "out", tmp_path / "safe" / "key"
    private = "--deidentify", "--key", key, "--keep", "size_mm=1:9", "--review", tmp_path / "review"
    run(*sources, *private, "--out", out, "--split-by", "group", "--folds", 2, "--ratio", "3:2:2")
    written = [path for folder in (out, tmp_path / "review") for path in folder.rglob("*")]
    files = [path for path in written if path.is_file()]
    expected = {"splits.json", "near_duplicates.json", "rejected.csv", "fold1.json", "test.json"}
    assert expected | {"sheet_001.jpg"} <= {path.name for path in files}
    words = [word.encode() for word in (*SECRETS, *PATIENT.values())]
    for path in files:
        content = path.read_bytes().lower() + str(path.relative_to(tmp_path)).lower().encode()
        if path.suffix == ".png":  # of a picture's bytes some spell anything; its chunks do not
            with Image.open(path) as image:
                assert image.mode == "RGB" and not image.info and not image.getexif()
            content = path.name.encode()
        assert not [word for word in words if word.lower() in content], path

    records, annotations = [], []
    for split in ("train", "val", "test"):
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
        pixels = np.asarray(Image.open(out / "images" / record["file_name"])).astype(int)
        box = (record["width"], record["height"])
        assert pixels.shape[1::-1] == box and box < (240, 240)
    assert "Musterfrau_4711_8.png" in (tmp_path / "safe" / "key.out.rejected.csv").read_text()
    assert (out / "rejected.csv").read_text().count("\n") == 2
    assert "writing inside the view is still there" in capsys.readouterr().out

    # once more is the same; another key gives other names
    run(
        *sources,
        *private[:5],
        "--out",
        out,
        "--split-by",
        "group",
        "--folds",
        2,
        "--ratio",
        "3:2:2",
    )
    assert capsys.readouterr().out.endswith("unchanged\n")
    other = "--deidentify", "--key", tmp_path / "safe" / "other", "--out", tmp_path / "out2"
    run(*sources, *other)
    names = [{path.name for path in (tmp_path / o / "images").iterdir()} for o in ("out", "out2")]
    assert len(names[1]) == 7 and not names[0] & names[1]


def test_published_splits_by_old_names(sources, tmp_path, capsys):
    plain, out = tmp_path / "plain", tmp_path / "out"
    run(*sources, "--out", plain, "--ratio", "3:2:2")
    splits = plain / "splits.json"
    run(*sources, "--deidentify", "--key", tmp_path / "key", "--splits", splits, "--out", out)
    assert "are gone" not in capsys.readouterr().out
    with open(tmp_path / "key.names.csv", encoding="utf-8") as file:
        new = {row["old"]: f"{row['new']}.png" for row in csv.DictReader(file)}
    old_splits, new_splits = (json.loads((f / "splits.json").read_text()) for f in (plain, out))
    for split in ("train", "val", "test"):
        assert sorted(new[name] for name in old_splits[split]) == sorted(new_splits[split])
    # and by those of an earlier data set with the same key
    again = tmp_path / "again"
    earlier = "--splits", out / "splits.json"
    run(*sources, "--deidentify", "--key", tmp_path / "key", *earlier, "--out", again)
    content = json.loads((again / "splits.json").read_text())
    assert all(content[split] == new_splits[split] for split in ("train", "val", "test"))


def test_classes(tmp_path, capsys):
    root = tmp_path / "root"
    for i in range(12):
        folder = root / ("cancer" if i % 2 else "ulcer")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame(i)).save(folder / f"Musterfrau{i}.png")
    out = tmp_path / "out"
    private = "--deidentify", "--key", tmp_path / "key", "--ratio", "2:2:2"
    run("classification", "--root", root, "--out", out, *private)
    for split in ("train", "val", "test"):
        text = (out / "annotations" / f"{split}.json").read_text()
        assert len(json.loads(text)["annotations"]) == 4 and "Muster" not in text


def test_options_that_do_not_fit(sources, tmp_path, capsys):
    out = "--out", tmp_path / "out"
    private = "--deidentify", "--key", tmp_path / "key"
    for options, said in (
        (["--deidentify"], "need each other"),
        (["--key", tmp_path / "key"], "need each other"),
        (["--keep", "site"], "belong to --deidentify"),
        (["--keep-as-is", "site"], "belong to --deidentify"),
        ([*private, "--review", tmp_path / "in"], "is not empty"),
        ([*private, "--review", tmp_path / "out" / "review"], "lies in the data set's folder"),
    ):
        with pytest.raises(SystemExit) as error:
            run(*sources, *out, *options)
        assert error.value.code == 2 and said in capsys.readouterr().err
    for options, said in (
        (["--key", tmp_path / "out" / "key"], "must not lie in the data set's folder"),
        (["--key", tmp_path / "key", "--split-by", "prefix"], "reads file names"),
        (["--key", tmp_path / "key", "--keep", "size_mm"], "--keep size_mm=1:7"),
    ):
        with pytest.raises(SystemExit) as error:
            run(*sources, *out, "--deidentify", *options)
        assert said in error.value.code
    assert not (tmp_path / "out").exists()


def test_a_column_that_nobody_examined(sources, tmp_path, capsys):
    private = "--deidentify", "--key", tmp_path / "key", "--keep-as-is", "date_captured"
    run(*sources, *private, "--out", tmp_path / "out")
    assert "NOT examined: date_captured" in capsys.readouterr().out
    images = json.loads((tmp_path / "out" / "annotations" / "train.json").read_text())["images"]
    assert {image["date_captured"] for image in images} == {"2012-08-01 12:00"}
