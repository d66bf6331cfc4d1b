"""From one tool to the other: what is exported comes back as a prepared data set."""

import json
import shutil
from pathlib import Path

import pytest

from imrcnn_d2.cli import export_annotations, prepare_dataset

FORMATS = Path(__file__).parent / "formats"


def run(capsys, module, *args):
    module.main([str(arg) for arg in args])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, kvasir_original):
    out = tmp_path_factory.mktemp("prepared") / "out"
    args = ("--root", str(kvasir_original), "--out", str(out), "--ratio", "1:0:0")
    prepare_dataset.main(["kvasir-seg", *args])
    return out


@pytest.mark.parametrize("to", ["labelme", "cvat", "masks"])
def test_there_and_back(capsys, tmp_path, prepared, to, no_polyp):
    exported, images = tmp_path / "exported", prepared / "images"
    args = ("--annotations", prepared / "annotations" / "train.json", "--images", images)
    args = (*args, "--to", to, "--output", exported)
    assert run(capsys, export_annotations, *args) == f"{exported}: written\n"
    source = {
        "labelme": ("--root", exported, "--images", images),
        "cvat": ("--annotations", exported / "annotations.xml", "--images", images),
        "masks": ("--masks", exported, "--images", images, "--kind", "files"),
    }[to]
    more = ("--out", tmp_path / "out", "--ratio", "1:0:0", "--negatives", no_polyp)
    printed = run(capsys, prepare_dataset, to, *source, *more)
    before = json.loads((prepared / "annotations" / "train.json").read_text())
    after = json.loads((tmp_path / "out" / "annotations" / "train.json").read_text())
    assert printed.splitlines()[1].split()[:4] == [
        "train", "15", str(len(before["annotations"])), "10",
    ]  # fmt: skip
    assert [c["name"] for c in after["categories"]] == ["polyp"]
    areas = [sorted(a["area"] for a in content["annotations"]) for content in (before, after)]
    assert areas[1] == pytest.approx(areas[0], rel=0.01)


def test_images_inside_labelme_files(capsys, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(FORMATS / "labelme" / "embedded.json", tmp_path / "in")
    args = ("--root", tmp_path / "in", "--out", tmp_path / "out", "--ratio", "1:0:0")
    printed = run(capsys, prepare_dataset, "labelme", *args)
    assert "its image is not there, the copy inside the file is used" in printed
    assert (tmp_path / "out" / "images" / "embedded.jpg").stat().st_size == 798


def test_errors_end_the_commands_without_a_traceback(tmp_path, prepared):
    annotations = ["--annotations", str(prepared / "splits.json"), "--images", str(tmp_path)]
    with pytest.raises(SystemExit) as error:
        export_annotations.main([*annotations, "--to", "cvat", "--output", str(tmp_path / "x")])
    assert "splits.json: is no COCO instance file" in error.value.code
    with pytest.raises(SystemExit) as error:
        prepare_dataset.main(["cvat", *annotations, "--out", str(tmp_path / "x")])
    assert "splits.json: is no XML" in error.value.code
    folders = ["--masks", str(tmp_path), "--images", str(tmp_path), "--classes", "a", "b"]
    with pytest.raises(SystemExit) as error:
        prepare_dataset.main(["masks", *folders, "--out", str(tmp_path / "x")])
    assert error.value.code == "masks of kind binary are of one class, not of 2"
