"""The command as users give it, from arguments to printed counts and exit status."""

import json
import shutil

import pytest
from PIL import Image

from imrcnn_d2.cli import prepare_dataset


def run(capsys, *args):
    prepare_dataset.main([str(arg) for arg in args])
    return capsys.readouterr().out


def num_images(out):
    splits = json.loads((out / "splits.json").read_text())
    return [len(splits[split]) for split in ("train", "val", "test")]


def test_kvasir_seg(capsys, tmp_path, kvasir_original, no_polyp):
    out = tmp_path / "out"
    args = ("kvasir-seg", "--root", kvasir_original, "--negatives", no_polyp, "--out", out)
    printed = run(capsys, *args, "--seed", 3, "--folds", 5, "--min-area", 1)
    assert num_images(out) == [9, 2, 4]
    assert json.loads((out / "splits.json").read_text())["seed"] == 3
    assert len(list((out / "folds").iterdir())) == 5
    assert printed.splitlines()[1].split()[:4] == [
        "train",
        "9",
        *printed.splitlines()[1].split()[2:4],
    ]
    assert printed.endswith(f"{out}: written\n")
    assert run(capsys, *args, "--seed", 3, "--folds", 5, "--min-area", 1).endswith("unchanged\n")


def test_synthetic(capsys, tmp_path):
    out = tmp_path / "out"
    printed = run(capsys, "synthetic", "--out", out, "--num-images", 24, "--size", 64)
    assert sum(num_images(out)) == 24
    assert "64x64     24 " in printed
    sizes = {Image.open(path).size for path in (out / "images").iterdir()}
    assert sizes == {(64, 64)}
    # by patient: the views of one are in one split only
    splits = json.loads((out / "splits.json").read_text())
    patients = [{name.split("_")[0] for name in splits[s]} for s in ("train", "val", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients))


def test_synthetic_is_deterministic(capsys, tmp_path):
    contents = []
    for name in ("a", "b"):
        out = tmp_path / name
        run(capsys, "synthetic", "--out", out, "--num-images", 6, "--size", 64)
        files = [path for path in out.rglob("*") if path.is_file()]
        contents.append({path.relative_to(out): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 6 + 3 + 1


def test_coco(capsys, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    polygon = [[5, 5, 20, 5, 20, 20]]
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cancer"}]}
    for i in (1, 2, 3):
        Image.new("RGB", (30, 30), (40 * i, 0, 0)).save(images / f"{i}.png")
        coco["images"].append({"id": i, "file_name": f"{i}.png"})
        coco["annotations"].append(
            {"id": i, "image_id": i, "category_id": 5 if i == 2 else 1, "segmentation": polygon}
        )
    (tmp_path / "own.json").write_text(json.dumps(coco))
    args = ("coco", "--annotations", tmp_path / "own.json", "--images", images)
    args += ("--out", tmp_path / "out")
    with pytest.raises(SystemExit) as error:
        run(capsys, *args)
    assert "2.png: annotation 2: there is no category with id 5" in error.value.code
    assert "--on-error reject" in error.value.code
    assert not (tmp_path / "out").exists()
    printed = run(capsys, *args, "--on-error", "reject", "--ratio", "1:0:1", "--split-by", "image")
    assert num_images(tmp_path / "out") == [1, 0, 1]
    assert f"  {images}/2.png: annotation 2: there is no category with id 5" in printed
    assert "2.png" in (tmp_path / "out" / "rejected.csv").read_text()


def test_splits_are_kept(capsys, tmp_path, kvasir_original):
    names = sorted(path.name for path in (kvasir_original / "images").iterdir())
    earlier = {"train": names[:1], "val": names[1:4], "test": names[4:]}
    (tmp_path / "splits.json").write_text(json.dumps(earlier))
    out = tmp_path / "out"
    args = ("--root", kvasir_original, "--out", out, "--splits", tmp_path / "splits.json")
    run(capsys, "kvasir-seg", *args)
    assert num_images(out) == [1, 3, 1]


def test_errors_end_the_command_without_a_traceback(capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        run(capsys, "kvasir-seg", "--root", tmp_path / "none", "--out", tmp_path / "out")
    assert error.value.code == f"{tmp_path}/none/images: no such folder"
    with pytest.raises(SystemExit):
        run(capsys, "synthetic", "--out", "x", "--num-images", 1, "--size", 64, "--ratio", "3:1")
    assert "give train:val:test as whole numbers, e.g. 12:3:5" in capsys.readouterr().err


def test_lesion_free(capsys, tmp_path, no_polyp):
    printed = run(capsys, "lesion-free", "--root", no_polyp, "--out", tmp_path / "out")
    assert num_images(tmp_path / "out") == [0, 0, 10]
    assert printed.splitlines()[3].split()[:4] == ["test", "10", "0", "10"]


def test_splits_of_file_names(capsys, tmp_path, kvasir_original):
    for folder in ("images", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        paths = sorted((kvasir_original / folder).iterdir())
        for path, split in zip(paths, ("train", "train", "train", "valid", "test"), strict=True):
            shutil.copyfile(path, tmp_path / "in" / folder / f"{split}_{path.name}")
    args = ("kvasir-seg", "--root", tmp_path / "in", "--out", tmp_path / "out")
    printed = run(capsys, *args, "--split-by", "prefix")
    assert num_images(tmp_path / "out") == [3, 1, 1]
    assert "wanted by ratio" not in printed
    with pytest.raises(SystemExit) as error:
        run(
            capsys, "kvasir-seg", "--root", kvasir_original, "--out", tmp_path / "o",
            "--split-by", "prefix",
        )  # fmt: skip
    assert "states no split" in error.value.code


def test_patients_from_dicom_files_of_this_folder(capsys, tmp_path, no_polyp, monkeypatch):
    """ "." is a folder as others are, not the images themselves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as here:
        run(capsys, "lesion-free", "--root", no_polyp, "--out", "out", "--patients-from-dicom", ".")
    with pytest.raises(SystemExit) as itself:
        run(capsys, "lesion-free", "--root", no_polyp, "--out", "out", "--patients-from-dicom")
    assert "there is no DICOM file" in here.value.code
    assert "there is no DICOM file" not in itself.value.code


def test_patients_and_metadata(capsys, tmp_path, kvasir_original):
    names = sorted(path.name for path in (kvasir_original / "images").iterdir())
    rows = [f"{name},p{i // 2}" for i, name in enumerate(names)]
    (tmp_path / "patients.csv").write_text("\n".join(["file,patient_id", *rows]))
    (tmp_path / "devices.csv").write_text("patient_id;age;device\np0;61,5;EVIS\np1;50;EVIS\n")
    (tmp_path / "sites.csv").write_text(f"file,site\n{names[0]},antrum\nnone.jpg,cardia\n")
    tables = ("--metadata", tmp_path / "devices.csv", "--metadata", tmp_path / "sites.csv")
    common = ("kvasir-seg", "--root", kvasir_original, "--ratio", "1:1:1")
    ways = {
        "csv": ("--patients", tmp_path / "patients.csv"),
        "pattern": ("--patient-pattern", "^."),
    }
    for name, how in ways.items():
        run(capsys, *common, "--out", tmp_path / name, *how)
    printed = run(capsys, *common, "--out", tmp_path / "out", *ways["csv"], *tables)
    assert "  3 patients\n" in printed
    assert "rows of" in printed and "match nothing: none.jpg (line 3)" in printed
    assert "1 patients have no row in" in printed and ": p2\n" in printed
    images = {}
    for split in ("train", "val", "test"):
        content = json.loads((tmp_path / "out" / "annotations" / f"{split}.json").read_text())
        images |= {image["file_name"]: image for image in content["images"]}
    got = [[images[n].get(c) for c in ("patient_id", "age", "device", "site")] for n in names]
    assert got == [
        ["p0", 61.5, "EVIS", "antrum"],
        ["p0", 61.5, "EVIS", None],
        ["p1", 50.0, "EVIS", None],
        ["p1", 50.0, "EVIS", None],
        ["p2", None, None, None],
    ]
    for wrong, message in (
        (("--patient-pattern", "^q"), "does not match the pattern '^q'"),
        (("--patient-pattern", "("), "is no regular expression"),
        (("--patients", tmp_path / "devices.csv"), "is no table of patients"),
        (("--patients-from-dicom", tmp_path / "none"), "no such folder"),
        (("--metadata", tmp_path / "none.csv"), "none.csv: cannot be opened"),
    ):
        with pytest.raises(SystemExit) as error:
            run(capsys, *common, "--out", tmp_path / "wrong", *wrong)
        assert message in str(error.value)
    own = ("classification", "--root", tmp_path, "--csv", tmp_path / "labels.csv")
    with pytest.raises(SystemExit, match="belong in its column patient_id"):
        run(capsys, *own, "--out", tmp_path / "wrong", *ways["pattern"])
    assert not (tmp_path / "wrong").exists()


def linked(folder, command):
    """A folder that someone else sent: of its five images, e.png lies elsewhere; the arguments."""
    images, masks, names = folder / "images", folder / "masks", "abcde"
    images.mkdir(parents=True)
    masks.mkdir()
    records = []
    for i, name in enumerate(names):
        path = images / f"{name}.png"
        if name == "e":
            path.symlink_to(folder.parent / "private.png")
            path = folder.parent / "private.png"
        Image.new("RGB", (60, 40), (40 * i, 9, 0)).save(path)
        Image.new("L", (60, 40), 255).save(masks / f"{name}.png")
        records.append({"id": i, "file_name": f"{name}.png"})
        shape = {"label": "polyp", "shape_type": "rectangle", "points": [[5, 5], [20, 20]]}
        document = {"shapes": [shape], "imagePath": f"{name}.png", "imageData": None}
        (images / f"{name}.json").write_text(json.dumps(document))
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "segmentation": [[5, 5, 20, 5, 20, 20]]}
        for i in range(len(names))
    ]
    categories = [{"id": 1, "name": "polyp"}]
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "own.json").write_text(json.dumps(content))
    elements = "".join(f'<image name="{name}.png" width="60" height="40"/>' for name in names)
    xml = f"<annotations><version>1.1</version>{elements}</annotations>"
    (folder / "own.xml").write_text(xml)
    rows = "".join(f"{name}.png,{'cancer' if name in 'ab' else 'ulcer'}\n" for name in names)
    (folder / "own.csv").write_text(f"file,label\n{rows}")
    if command not in ("labelme",):
        for path in images.glob("*.json"):
            path.unlink()
    where = {
        "kvasir-seg": ["--root", folder],
        "masks": ["--images", images, "--masks", masks],
        "coco": ["--annotations", folder / "own.json", "--images", images],
        "labelme": ["--root", images],
        "cvat": ["--annotations", folder / "own.xml", "--images", images, "--classes", "polyp"],
        "lesion-free": ["--root", images],
        "classification": ["--csv", folder / "own.csv", "--root", images],
    }
    # A class in each split is more than five images give.
    how = ["--ratio", "1:0:0"] if command == "classification" else []
    return [command, *where[command], *how]


@pytest.mark.parametrize(
    "command", ["kvasir-seg", "masks", "coco", "labelme", "cvat", "lesion-free", "classification"]
)
def test_links_out_of_the_folder(capsys, tmp_path, command):
    args = [*linked(tmp_path / "sent", command), "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as error:
        run(capsys, *args)
    assert "e.png: is a link that leads out of" in error.value.code
    assert "--follow-links" in error.value.code
    run(capsys, *args, "--on-error", "reject")
    assert sum(num_images(tmp_path / "out")) == 4
    assert 'e.png,"is a link that leads out' in (tmp_path / "out" / "rejected.csv").read_text()
    private = (tmp_path / "private.png").read_bytes()
    assert all(p.read_bytes() != private for p in (tmp_path / "out" / "images").iterdir())
    shutil.rmtree(tmp_path / "out")
    run(capsys, *args, "--follow-links")
    assert sum(num_images(tmp_path / "out")) == 5
    assert not (tmp_path / "out" / "images" / "e.png").is_symlink()


def test_links_to_whole_folders(capsys, tmp_path):
    """A folder that is named may be a link; images/ of Kvasir-SEG and a class's folder may not."""
    linked(tmp_path / "sent", "masks")
    (tmp_path / "sent" / "images" / "e.png").unlink()
    (tmp_path / "sent" / "masks" / "e.png").unlink()
    (tmp_path / "root").symlink_to("sent")
    run(capsys, "kvasir-seg", "--root", tmp_path / "root", "--out", tmp_path / "out")
    (tmp_path / "torn").mkdir()
    for name in ("images", "masks"):
        (tmp_path / "torn" / name).symlink_to(tmp_path / "sent" / name)
    for command in ("kvasir-seg", "classification"):
        args = [command, "--root", tmp_path / "torn", "--out", tmp_path / "out2"]
        with pytest.raises(SystemExit, match="images: is a link that leads out of"):
            run(capsys, *args)
    args = ["kvasir-seg", "--root", tmp_path / "torn", "--out", tmp_path / "out2"]
    run(capsys, *args, "--follow-links")
    assert num_images(tmp_path / "out2") == num_images(tmp_path / "out")
