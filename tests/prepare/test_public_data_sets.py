"""Public data sets in the layout, names and file types of their downloads."""

import json
import struct
from collections import Counter

import cv2
import numpy as np
import pytest

from imrcnn_d2.data.formats import FORMATS, PublicDataSet
from imrcnn_d2.data.formats.cvc_clinicdb import frame_fields
from imrcnn_d2.utils.files import BadInputError, Rejects

PUBLIC = [name for name, form in FORMATS.items() if isinstance(form, PublicDataSet)]


def square(x=10, y=5, value=255):
    """A mask with a lesion of 20 x 15 pixels."""
    mask = np.zeros((40, 60), np.uint8)
    mask[y : y + 15, x : x + 20] = value
    return mask


NOTHING = np.zeros((40, 60), np.uint8)


def test_polypgen(save, prepare, tmp_path):
    # JPEG masks, of some hospitals in RGB; C4's names begin with the number of a sequence.
    save("data_C1/images_C1/100H0050.jpg")
    save("data_C1/masks_C1/100H0050_mask.jpg", np.dstack([square()] * 3))
    save("data_C3/images_C3/C3_EndoCV2021_00489_.jpg")  # of the download, with its underscore
    save("data_C3/masks_C3/C3_EndoCV2021_00489_mask.jpg", square() | square(36, 20))
    for number in (1006, 87):
        save(f"data_C4/images_C4/10_endocv2021_positive_{number}.jpg")
        save(f"data_C4/masks_C4/10_endocv2021_positive_{number}_mask.jpg", NOTHING)
    save("sequenceData/positive/seq2/images_seq2/3_endocv2021_positive_167.jpg")
    save("sequenceData/positive/seq2/masks_seq2/3_endocv2021_positive_167_mask.jpg", square())
    (tmp_path / "download/sequenceData/positive/seq2/masks_seq2/3_167.txt").write_text("polyp 1")
    save("sequenceData/negativeOnly/seq1_neg/seq1_C6_12.jpg")
    records, content, text = prepare("polypgen", "--all-test")
    facts = {
        n: (r.get("centre"), r.get("sequence_id"), r.get("frame"), len(lesions))
        for n, (r, lesions) in records.items()
    }
    assert facts == {
        "C1/100H0050.jpg": ("C1", None, None, 1),
        "C3/C3_EndoCV2021_00489_.jpg": ("C3", None, None, 2),
        "C4/10_endocv2021_positive_1006.jpg": ("C4", "C4_10", 1006, 0),
        "C4/10_endocv2021_positive_87.jpg": ("C4", "C4_10", 87, 0),
        "seq2/3_endocv2021_positive_167.jpg": (None, "seq2", 167, 1),
        "seq1_neg/seq1_C6_12.jpg": ("C6", "seq1_neg", 12, 0),
    }
    form = FORMATS["polypgen"]
    assert (content["info"]["url"], content["info"]["terms"]) == (form.url, form.terms)
    assert form.terms in text and "4 images in data_C*/images_C*, 1537 were published" in text
    assert "2 images in data_C4/images_C4, 227 were published" in text


def test_masks_of_0_and_1_are_no_empty_masks(save, tmp_path):
    """Saved anew as PNG, they would make all images lesion-free."""
    save("data_C1/images_C1/a.jpg"), save("data_C1/masks_C1/a_mask.png", square(value=1))
    with pytest.raises(BadInputError, match="a_mask.png: .*highest is 1"):
        list(FORMATS["polypgen"].read_folder(tmp_path / "download", Rejects()).samples)
    save("data_C1/masks_C1/a_mask.png", NOTHING)
    source = FORMATS["polypgen"].read_folder(tmp_path / "download", Rejects())
    assert [sample.annotations for sample in source.samples] == [[]]


def test_a_copy_in_a_published_set_is_listed(polypgen_4, prepare, tmp_path):
    """Image 1030 of hospital C2 is 1029, with another mask: the first is taken."""
    for folder, suffix in (("images", ""), ("masks", "_mask")):
        (tmp_path / "download/data_C2" / f"{folder}_C2").mkdir(parents=True)
        for number in (1028, 1029, 1030):
            name = f"data_C2/{folder}_C2/EndoCV2021_00{number}{suffix}.jpg"
            (tmp_path / "download" / name).symlink_to(polypgen_4 / name)
    records, _, text = prepare("polypgen", "--all-test", "--follow-links")
    assert [name[-8:-4] for name in records] == ["1028", "1029"]
    rejected = (tmp_path / "out/rejected.csv").read_text()
    assert "001030.jpg: copy of" in text and "001029.jpg with different annotations" in rejected


@pytest.mark.slow
def test_polypgen_of_four_hospitals(polypgen_4, read):
    samples, source, errors = read(FORMATS["polypgen"].read_folder, root=polypgen_4)
    assert len(samples) == 1240 and len({s.file_name for s in samples}) == 1240
    assert sum(not sample.annotations for sample in samples) == 119
    centres = [sample.fields["centre"] for sample in samples]
    assert [centres.count(f"C{i}") for i in (1, 2, 3, 4)] == [256, 300, 457, 227]
    assert len({s.fields["sequence_id"] for s in samples if s.fields["centre"] == "C4"}) == 31
    assert len(errors) == 1 and any("1241 images" in note for note in source.notes)


def mistag(path):
    """Tag the three channels of a TIFF as gray, as CVC-ClinicDB's are."""
    rgb, gray = (struct.pack("<HHIH", 262, 3, 1, value) for value in (2, 1))
    content = path.read_bytes()
    assert content.count(rgb) == 1
    path.write_bytes(content.replace(rgb, gray))


def sequences(records):
    return {n: (r.get("sequence_id"), r.get("frame")) for n, (r, _) in records.items()}


def test_cvc_clinicdb(save, prepare, tmp_path):
    for number in (1, 25, 26, 104, 612):
        mistag(save(f"Original/{number}.tif"))
        save(f"Ground Truth/{number}.tif", square())
    records, _, text = prepare("cvc-clinicdb", "--ratio", "1:1:1")
    expected = {"1": ("1", 0), "25": ("1", 24), "26": ("2", 0), "104": ("6", 0), "612": ("29", 20)}
    assert sequences(records) == {f"{name}.png": facts for name, facts in expected.items()}
    assert records["1.png"][0]["split"] == records["25.png"][0]["split"]  # of one sequence
    assert "5 images in Original, 612 were published" in text
    (rgb,) = (cv2.imread(str(tmp_path / "out/images/1.png")),)
    assert rgb.std(axis=2).max() > 0  # OpenCV alone would have read one channel of the TIFF
    save("Original/cut.tif"), save("Ground Truth/cut.tif", square())
    with pytest.raises(BadInputError, match="Original/cut.tif: .*612"):
        FORMATS["cvc-clinicdb"].read_folder(tmp_path / "download", Rejects())


def test_cvc_clinicdb_has_612_frames_in_29_sequences():
    facts = [frame_fields(f"{number}.tif") for number in range(1, 613)]
    lengths = Counter(fact["sequence_id"] for fact in facts)
    assert [*lengths] == [str(i) for i in range(1, 30)] and max(lengths.values()) == 26
    assert [fact["frame"] for fact in facts[:26]] == [*range(25), 0]


@pytest.mark.parametrize("suffix", ["bmp", "tiff"])
def test_cvc_colondb(save, prepare, suffix):
    for number in (1, 12):
        for name in (f"p{number}", f"s{number}", f"c{number}"):  # polyp, no information, contour
            save(f"{name}.{suffix}", square() if name[0] == "p" else NOTHING)
        save(f"{number}.{suffix}")
    records, _, text = prepare("cvc-colondb", "--all-test")
    assert sorted(records) == [f"1.{suffix}", f"12.{suffix}"]
    assert "2 images in p[0-9]*, 300 were published" in text and "--split-by group" in text


def test_cvc_colondb_in_folders(save, prepare):
    save("images/7.png"), save("masks/7.png", square())
    assert [*prepare("cvc-colondb", "--all-test")[0]] == ["7.png"]


def test_endoscene_in_its_own_split(save, prepare):
    expected = {"CVC-300/76": "train", "CVC-300/77": "val", "CVC-300/149": "test"}
    expected |= {"CVC-612/26": "train", "CVC-612/51": "val", "CVC-612/25": "test"}
    for name in expected:
        folder, number = name.split("/")
        save(f"{folder}/bbdd/{number}.bmp")
        for region in ("gtlumen", "gtspecular", "gtvoid", "gtpolyp"):
            suffix = "tif" if (folder, region) == ("CVC-612", "gtpolyp") else "bmp"
            save(f"{folder}/{region}/{number}.{suffix}", square())
    records, _, _ = prepare("cvc-300")
    assert {n.removesuffix(".bmp"): r["split"] for n, (r, _) in records.items()} == expected
    assert sequences(records)["CVC-612/51.bmp"] == ("CVC-612/3", 0)
    assert sequences(records)["CVC-300/76.bmp"] == (None, None)


def test_splits_name_images_before_they_are_converted(save, prepare):
    for number in (25, 26, 51):
        mistag(save(f"CVC-612/bbdd/{number}.tif"))
        save(f"CVC-612/gtpolyp/{number}.tif", square())
    for number in (76, 149):
        save(f"CVC-300/bbdd/{number}.bmp"), save(f"CVC-300/gtpolyp/{number}.bmp", square())
    records, _, text = prepare("cvc-300")
    expected = {"CVC-612/25.png": "test", "CVC-612/26.png": "train", "CVC-612/51.png": "val"}
    assert {name: records[name][0]["split"] for name in expected} == expected
    assert "are gone" not in text


def test_endoscene_has_547_183_and_182_images():
    fields = FORMATS["cvc-300"].fields
    names = [
        (folder, n)
        for folder, last in (("CVC-300", 300), ("CVC-612", 612))
        for n in range(1, last + 1)
    ]
    counts = Counter(fields(f"{folder}/{n}.bmp")["split"] for folder, n in names)
    assert counts == {"train": 547, "val": 183, "test": 182}
    records = [fields(f"CVC-612/{number}.bmp") for number in range(1, 613)]
    splits_of = {(record["sequence_id"], record["split"]) for record in records}
    assert len(splits_of) == 29  # no sequence is in two splits


def test_the_60_test_images_of_cvc_300(save, prepare):
    save("images/149.png"), save("masks/149.png", square())
    records, _, text = prepare("cvc-300")
    assert {n: r["split"] for n, (r, _) in records.items()} == {"149.png": "test"}
    assert "1 images in images, 60 were published" in text


@pytest.mark.parametrize("suffix", ["tif", "png", "bmp"])
def test_etis_larib(save, prepare, suffix):
    save(f"ETIS-LaribPolypDB/1.{suffix}"), save("Ground Truth/p1.tif", square())
    save(f"ETIS-LaribPolypDB/2.{suffix}"), save("Ground Truth/p2.tif", square() | square(36, 20))
    records, _, text = prepare("etis-larib", "--all-test")
    assert [len(lesions) for _, lesions in records.values()] == [1, 2]
    assert "2 images in ETIS-LaribPolypDB, 196 were published" in text


@pytest.mark.parametrize("nested", [True, False])
def test_bkai_igh(save, prepare, nested):
    """Red polyps are neoplastic, green ones are not; JPEG blurs the colours."""
    train, gt = ("train/train", "train_gt/train_gt") if nested else ("train", "train_gt")
    colours = np.zeros((80, 120, 3), np.uint8)
    colours[8:32, 8:48, 0] = colours[48:72, 64:112, 1] = 255
    save(f"{train}/0081835cf877e004e8bfb905b78a9139.jpeg", np.full((80, 120, 3), 90, np.uint8))
    save(f"{gt}/0081835cf877e004e8bfb905b78a9139.jpeg", colours, quality=75)
    save(f"{'test/test' if nested else 'test'}/019410b1fcf0625f608b4ce97629ab55.jpeg")
    records, content, text = prepare("bkai-igh", "--ratio", "1:0:0")
    ((_, lesions),) = records.values()
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert [names[lesion["category_id"]] for lesion in lesions] == ["neoplastic", "non-neoplastic"]
    assert np.abs(np.array(lesions[0]["bbox"]) - [8, 8, 40, 24]).max() <= 1
    assert np.abs(np.array(lesions[1]["bbox"]) - [64, 48, 48, 24]).max() <= 1
    assert "1 images in train" in text


def test_hyperkvasir_segmented(save, prepare, tmp_path):
    name = "147257f5-7401-4f3a-bacb-7c16611c2ef1"
    (
        save(f"segmented-images/images/{name}.jpg"),
        save(f"segmented-images/masks/{name}.jpg", square()),
    )
    box = {"label": "polyp", "xmin": 40, "ymin": 5, "xmax": 59, "ymax": 20}
    boxes = {name: {"height": 40, "width": 60, "bbox": [box]}}
    path = tmp_path / "download/segmented-images/bounding-boxes.json"
    path.write_text(json.dumps(boxes))
    records, content, text = prepare("hyperkvasir", "--ratio", "1:0:0")
    assert [*records] == [f"{name}.jpg"] and content["info"]["terms"] == "CC BY 4.0"
    assert "overlaps the mask's box by only 0.00" in text and "bounding-box file" in text


def test_endotect(save, prepare):
    for name in "abcde":
        (
            save(f"segmented-images/images/{name}.jpg"),
            save(f"segmented-images/masks/{name}.jpg", square()),
        )
    test = "EndoTect_2020_Segmentation_Test_Dataset"
    save(f"{test}/images/x.jpg"), save(f"{test}/masks/x.jpg", square())
    records, _, _ = prepare("endotect")
    splits = Counter((n.partition("/")[0], r["split"]) for n, (r, _) in records.items())
    assert splits == {("development", "train"): 4, ("development", "val"): 1, ("test", "test"): 1}


def test_official_splits_give_way_to_requested_ones(save, prepare, tmp_path):
    save("images/x.jpg"), save("masks/x.jpg", square())
    records, _, text = prepare("endotect", "--ratio", "1:0:0")
    assert [r["split"] for r, _ in records.values()] == ["train"]
    assert "other splits than the official ones" in text


def test_a_requested_ratio_may_be_the_default(save, prepare):
    test = "EndoTect_2020_Segmentation_Test_Dataset"
    save("segmented-images/images/x.jpg"), save("segmented-images/masks/x.jpg", square())
    save(f"{test}/images/y.jpg"), save(f"{test}/masks/y.jpg", square())
    records, _, text = prepare("endotect", "--ratio", "4:1:0")
    assert len(records) == 2 and "test" not in [r["split"] for r, _ in records.values()]
    assert "other splits than the official ones" in text


KVASIR_V2 = FORMATS["kvasir-v2"].layouts[0]


def test_kvasir_v2(save, prepare):
    for label in KVASIR_V2:
        for number in range(3):
            save(f"{label}/{number}.jpg")
    records, content, text = prepare("kvasir-v2", "--ratio", "1:1:1")
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert [*names.values()] == sorted(KVASIR_V2) and len(KVASIR_V2) == 8
    for name, (_, (annotation,)) in records.items():
        assert names[annotation["category_id"]] == name.partition("/")[0]
    assert "3 images in polyps, 1000 were published" in text


def test_hyperkvasir_labels(save, prepare, tmp_path):
    rows = ["file-name;class-name;split-index"]
    for folder in (
        "lower-gi-tract/pathological-findings/polyps",
        "upper-gi-tract/anatomical-landmarks/z-line",
    ):
        for i in range(24):
            name = f"{i}-{folder[-4:]}.jpg"
            save(f"labeled-images/{folder}/{name}")
            rows.append(f"{name};{folder.rpartition('/')[2]};{i % 2}")
    (tmp_path / "download/labeled-images/image-labels.csv").write_text("Video file,Organ\n")
    (tmp_path / "download/2_fold_split.csv").write_text("\n".join(rows))
    records, _, text = prepare("hyperkvasir-labels")
    counts = Counter((n.partition("/")[0], r["split"]) for n, (r, _) in records.items())
    assert {split for _, split in counts} == {"train", "val", "test"}
    assert counts["polyps", "test"] == counts["z-line", "test"] == 12
    record, _ = records["polyps/1-lyps.jpg"]
    assert (record["organ"], record["split"]) == ("lower-gi-tract", "test")
    assert "2_fold_split.csv" in text and "48 images in labeled-images" in text
