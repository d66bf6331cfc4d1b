"""tools/audit_dataset.py, from a prepared data set to one whose splits are mended."""

import json
import shutil

import pytest

from imrcnn_d2.cli import audit_dataset
from imrcnn_d2.data.prepare import synthetic
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.utils.files import Rejects


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Drawn images, several of a patient, split image by image."""
    scratch = tmp_path_factory.mktemp("scratch")
    out = tmp_path_factory.mktemp("datasets") / "synthetic"
    source = synthetic.generate(scratch, 20, 96, seed=1)
    prepare_dataset(source, out, SplitOptions(split_by="image"), Rejects())
    return out


def patients(folder):
    """{patient: their splits}"""
    found = {}
    for split in SPLITS:
        content = json.loads((folder / "annotations" / f"{split}.json").read_text())
        for image in content["images"]:
            found.setdefault(image["patient_id"], set()).add(split)
    return found


def test_patients_are_found_and_brought_together(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit_dataset, "_embedding", lambda: (None, "by hash alone"))
    monkeypatch.setenv("IMRCNN_DATASETS", str(prepared.parent))
    torn = [patient for patient, splits in patients(prepared).items() if len(splits) > 1]
    assert torn
    fixed = tmp_path / "fixed" / "synthetic"
    output = tmp_path / "audit"
    audit_dataset.main(
        ["--dataset", "synthetic", "--output", str(output), "--fix-splits", str(fixed)]
    )
    printed = capsys.readouterr().out
    found = json.loads((output / "audit.json").read_text())
    said = [f for f in found["findings"] if f["kind"] == "patient_across_splits"]
    assert len(said) == len(torn) and all(f["severity"] == "error" for f in said)
    assert "Runs on the old split are void" in printed
    assert "by hash alone" in printed and found["notes"] == ["by hash alone"]
    moved = printed.count(" -> ")
    assert f"{moved} images moved" in printed and moved > 0
    assert all(len(splits) == 1 for splits in patients(fixed).values())

    audit_dataset.main(
        ["--dataset", str(fixed), "--output", str(output), "--fix-splits", str(tmp_path / "no")]
    )
    assert "there is nothing to move" in capsys.readouterr().out
    assert not (tmp_path / "no").exists()
    found = json.loads((output / "audit.json").read_text())
    assert not [f for f in found["findings"] if f["severity"] == "error"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--dataset", "a", "--annotations", "b"], "either --dataset or --annotations"),
        ([], "either --dataset or --annotations"),
        (["--annotations", "b"], "go together"),
        (["--annotations", "b", "--images", "c", "--fix-splits", "d"], "a prepared data set"),
    ],
)
def test_arguments(arguments, told, capsys):
    with pytest.raises(SystemExit):
        audit_dataset.main([*arguments, "--output", "o"])
    assert told in capsys.readouterr().err


def test_what_cannot_be_mended_is_said_before_the_audit(prepared, tmp_path):
    fixed, output = tmp_path / "fixed", tmp_path / "audit"
    fixed.mkdir()
    (fixed / "notes.txt").write_text("mine")
    call = ["--dataset", str(prepared), "--output", str(output), "--fix-splits", str(fixed)]
    with pytest.raises(SystemExit, match="choose another folder for --fix-splits"):
        audit_dataset.main(call)
    bare = tmp_path / "bare"
    for name in ("annotations", "images"):
        (bare / name).mkdir(parents=True)
    call[1], call[-1] = str(bare), str(tmp_path / "new")
    with pytest.raises(SystemExit, match="splits.json: not there"):
        audit_dataset.main(call)
    assert not output.exists()


def test_what_cannot_be_audited(tmp_path):
    with pytest.raises(SystemExit, match="no prepared data set is there"):
        audit_dataset.main(["--dataset", str(tmp_path), "--output", str(tmp_path / "o")])
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SystemExit, match="is no COCO instance file"):
        audit_dataset.main(
            ["--annotations", str(tmp_path / "a.json"), "--images", str(tmp_path)]
            + ["--output", str(tmp_path / "o")]
        )


def test_links_out_of_the_folder(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_dataset, "_embedding", lambda: (None, "by hash alone"))
    sent = tmp_path / "sent"
    shutil.copytree(prepared, sent)
    image = next((sent / "images").iterdir())
    image.rename(tmp_path / "private.png")
    image.symlink_to(tmp_path / "private.png")
    args = ["--dataset", str(sent), "--output", str(tmp_path / "audit")]
    args += ["--fix-splits", str(tmp_path / "fixed")]
    with pytest.raises(SystemExit, match=f"{image.name}: is a link that leads out of"):
        audit_dataset.main(args)
    assert not (tmp_path / "fixed").exists()
    audit_dataset.main([*args, "--follow-links"])
    assert (tmp_path / "fixed" / "images" / image.name).is_file()
