"""Public data sets of videos in the layout, names and file types of their downloads."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write(tmp_path):
    """Returns a function: writes a text file of the download."""

    def call(name, text):
        path = tmp_path / "download" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return call


def voc(name, *lesions):
    """A REAL-Colon annotation of a frame of 60 x 40; of each lesion the id and its corners."""
    objects = "".join(
        f"<object><name>lesion</name><unique_id>{lesion}</unique_id><box_id>{number}</box_id>"
        f"<bndbox><xmin>{x}</xmin><xmax>{x_end}</xmax><ymin>{y}</ymin><ymax>{y_end}</ymax></bndbox>"
        "</object>"
        for number, (lesion, x, y, x_end, y_end) in enumerate(lesions, start=1)
    )
    return (
        "<annotation><version_fmt>1.0</version_fmt><folder>string</folder>"
        f"<filename>{name}.jpg</filename><source><database>cosmoimd</database></source><size>"
        f"<width>60</width><height>40</height><depth>3</depth></size>{objects}</annotation>"
    )


@pytest.fixture
def real_colon(save, write):
    """Procedures 001-001 with frames 0 to 5 and two lesions, and 002-013 without a lesion."""
    columns = "unique_video_name,age,sex,endoscope_brand,fps,num_frames,num_lesions,bbps"
    rows = "001-001,61,male,Fuji,25.0,6,2,9", "002-013,48,female,Olympus,29.97,8,0,6"
    write("video_info.csv", "\n".join((columns, *rows)))
    columns = "unique_object_id,unique_video_name,size [mm],site,histology_extended,histology_class"
    rows = "001-001_1,001-001,3.0,rectum,tubular adenoma,AD", "001-001_2,001-001,12.5,cecum,,SSL"
    write("lesion_info.csv", "\n".join((columns, *rows)))
    lesions = {2: [("001-001_1", 5, 6, 25, 26)], 3: [("001-001_1", 6, 6, 26, 26)]}
    lesions[3].append(("001-001_2", 40, 10, 60, 45))  # beyond the border
    for procedure, count in (("001-001", 6), ("002-013", 2)):
        for frame in range(count):
            name = f"{procedure}_{frame}"
            save(f"{procedure}_frames/{name}.jpg", np.full((40, 60, 3), 90, np.uint8))
            shown = lesions.get(frame, []) if procedure == "001-001" else []
            write(f"{procedure}_annotations/{name}.xml", voc(name, *shown))


def test_real_colon(real_colon, prepare):
    """The frames are as black as a lens cap: those of one procedure may all be the same."""
    records, content, text = prepare("real-colon")
    assert sorted(records) == [f"001-001_frames/001-001_{i}.jpg" for i in range(6)]
    image, lesions = records["001-001_frames/001-001_3.jpg"]
    keys = ("centre", "patient_id", "sequence_id", "frame", "split")
    assert [image[key] for key in keys] == ["001", "001-001", "001-001", 3, "train"]
    assert [lesion["bbox"] for lesion in lesions] == [[6, 6, 20, 20], [40, 10, 20, 30]]
    assert "segmentation" not in lesions[0] and lesions[1]["area"] == 600
    facts = {"size_mm": 12.5, "site": "cecum", "histology": "SSL", "lesion_id": "001-001_2"}
    assert facts.items() <= lesions[1].items()
    assert lesions[0]["histology_extended"] == "tubular adenoma"
    assert not records["001-001_frames/001-001_1.jpg"][1]
    assert content["videos"][0] == {
        **{"id": "001-001", "centre": "001", "fps": 25.0, "num_frames": 6, "num_lesions": 2},
        **{"age": 61, "sex": "male", "endoscope_brand": "Fuji", "bbps": 9},
    }
    assert content["videos"][1]["num_frames"] == 8  # as published, of which two are there
    assert "2 of 60 procedures" in text and "2 frames, video_info.csv says 8" in text
    assert "002-013_0.jpg: copy of" in text


def test_every_nth_frame_keeps_its_number(real_colon, prepare):
    records, content, _ = prepare("real-colon", "--every", "3", "--all-test")
    assert [image["frame"] for image, _ in records.values()] == [0, 3]
    assert [len(lesions) for _, lesions in records.values()] == [0, 2]
    assert {image["split"] for image, _ in records.values()} == {"test"}
    assert content["videos"][0]["num_frames"] == 6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda root: (root / "001-001_annotations/001-001_2.xml").unlink(), "001-001_2.xml"),
        (lambda root: (root / "001-001_annotations").rename(root / "x"), "001-001_annotations"),
        (lambda root: (root / "lesion_info.csv").unlink(), "figshare"),
        (lambda root: (root / "001-001_frames").rename(root / "003-001_frames"), "003-001_frames"),
        (lambda root: (root / "001-001_frames/001-001_a.jpg").write_bytes(b""), "001-001_frames"),
    ],
)
def test_half_a_download_of_real_colon(real_colon, run, tmp_path, change, named):
    root = tmp_path / "download"
    change(root)
    assert named in run("real-colon", "--root", root, "--out", tmp_path / "out", fails=True)


def test_ldpolypvideo(save, write, prepare):
    for part, video, texts in (
        ("TrainValid", 1, ["0\n", "1\n12 8 40 30\n"]),
        ("TrainValid", 5, ["2\n1 2 30 30\n35 10 50 39\n"]),
        ("Test", 101, ["0"]),
    ):
        for frame, text in enumerate(texts, start=1):
            save(f"{part}/Images/{video}/{frame:04}.jpg")
            write(f"{part}/Annotations/{video}/{frame:04}.txt", text)
    records, content, text = prepare("ldpolypvideo")
    facts = {
        name: (image["sequence_id"], image["frame"], image["split"], [a["bbox"] for a in lesions])
        for name, (image, lesions) in records.items()
    }
    assert facts == {
        "TrainValid/Images/1/0001.jpg": ("1", 1, "train", []),
        "TrainValid/Images/1/0002.jpg": ("1", 2, "train", [[12, 8, 28, 22]]),
        "TrainValid/Images/5/0001.jpg": ("5", 1, "val", [[1, 2, 29, 28], [35, 10, 15, 29]]),
        "Test/Images/101/0001.jpg": ("101", 1, "test", []),
    }
    assert {"id": "1", "num_frames": 3} in content["videos"]
    assert "which videos validate was not published" in text


@pytest.mark.parametrize("text", ["2\n1 2 30 30\n", "", "1\n1 2 30\n", "a", "1\n70 2 80 30\n"])
def test_annotations_of_ldpolypvideo_that_do_not_add_up(save, write, run, tmp_path, text):
    save("Test/Images/7/0001.jpg")
    write("Test/Annotations/7/0001.txt", text)
    arguments = "--root", tmp_path / "download", "--out", tmp_path / "out"
    assert "0001.txt" in run("ldpolypvideo", *arguments, fails=True)


def frame_of_sun(clip, number):
    return f"case_M_20181001100941_0U62372100109341_1_005_001-1_{clip}_ayy_image{number:04}"


@pytest.fixture
def sun(save, write):
    """Case 1 of two clips and case 1 without a polyp, in the folders of the archives."""
    lines = []
    for clip, number in (("a2", 1), ("a2", 2), ("a10", 1)):
        name = frame_of_sun(clip, number)
        save(f"sundatabase_positive_part1/case1/{name}.jpg")
        lines.append(f"{name}.jpg {number},4,{number + 20},24,0")
    write("sundatabase_positive_part1/annotation_txt/case1.txt", "\n".join(lines) + "\n")
    save(f"sundatabase_negative_part2/case1/{frame_of_sun('b1', 30)}.jpg")


def test_sun(sun, save, write, prepare):
    text = prepare("sun", "--all-test")[-1]
    assert "boxes only: masks are in SUN-SEG" in text and "3 of 3 annotations have a box" in text


def test_sun_with_masks_and_facts(sun, save, write, prepare):
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 3:18] = 255
    folder = "SUN-SEG-Annotation/TestEasyDataset/Seen/GT/case1_1"
    save(f"{folder}/{frame_of_sun('a2', 2)}.png", mask)
    table = "| ID | Frames | Duration (s) | Shape | Size | Location | Pathological diagnosis |\n"
    table += "|----|----|----|----|----|----|----|\n"
    table += "| 1_1 | 150 | 5.00 | Is | 6mm | C | Low-grade adenoma |\n"
    table += "| 24 | 150 | 5.00 | IIa(LST-NG) | 15mm- | S | Invasive cancer (T1b) |\n"
    write("SUN-SEG-Annotation/docs/INFO_POSITIVE_CASES.md", table)
    records, content, text = prepare("sun", "--all-test")
    of_frame = {(i["sequence_id"], i["frame"]): lesions for i, lesions in records.values()}
    places = sorted(of_frame)
    # the clip a10 before a2, each from where the one before ended
    assert places == [("case1", 1), ("case1", 3), ("case1", 4), ("negative_case1", 30)]
    lesions = [of_frame[place] for place in places]
    assert [len(annotations) for annotations in lesions] == [1, 1, 1, 0]
    assert "segmentation" not in lesions[1][0] and lesions[1][0]["bbox"] == [1, 4, 20, 20]
    assert lesions[2][0]["bbox"] == [3, 5, 15, 15] and lesions[2][0]["segmentation"]
    facts = {"size_mm": 6, "shape": "Is", "site": "cecum", "histology": "Low-grade adenoma"}
    assert all({"lesion_id": "case1", **facts}.items() <= a.items() for (a,) in lesions[:3])
    assert {video["fps"] for video in content["videos"]} == {30}


def test_a_frame_of_sun_without_its_box(sun, save, run, tmp_path):
    save(f"sundatabase_positive_part1/case1/{frame_of_sun('a2', 3)}.jpg")
    arguments = "--root", tmp_path / "download", "--out", tmp_path / "out"
    assert f"{frame_of_sun('a2', 3)}.jpg" in run("sun", *arguments, fails=True)


def test_piccolo(save, prepare, tmp_path):
    for number, split in enumerate(("train", "validation", "test"), start=3):
        for frame in (0, 12):
            name = f"{number:03}_VP1_frame{frame:04}"
            save(f"{split}/polyps/{name}.png")
            mask = np.zeros((40, 60), np.uint8)
            mask[5:20, 10:30] = 255
            save(f"{split}/masks/{name}_Corrected.tif", mask)
            save(f"{split}/void/{name}_void.tif", np.zeros((40, 60), np.uint8))
    records, _, text = prepare("piccolo")
    image, lesions = records["validation/004_VP1_frame0012.png"]
    keys = ("sequence_id", "frame", "split")
    assert [image[key] for key in keys] == ["004_VP1", 12, "val"]
    assert [(a["lesion_id"], a["bbox"]) for a in lesions] == [("004", [10, 5, 20, 15])]
    assert {image["split"] for image, _ in records.values()} == {"train", "val", "test"}
    assert "2 images in train/polyps, 2203 were published" in text and "--metadata" in text
    assert Image.open(tmp_path / "out/images/train/003_VP1_frame0000.png").size == (60, 40)
