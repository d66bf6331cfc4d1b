"""Patient ids from tables, names and DICOM files."""

import json
import re

import pytest

from imrcnn_d2.data.formats import read_coco, read_kvasir_seg
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.metadata import (
    patients_from_dicom,
    patients_from_pattern,
    with_patients,
    with_patients_from_csv,
)
from imrcnn_d2.utils.files import BadInputError, Rejects

NAMES = [f"p{p:02}_{view}" for p in range(6) for view in "abc"]


def patients(source):
    """{name: patient_id} and the notes."""
    found = {s.file_name.removesuffix(".png"): s.fields.get("patient_id") for s in source.samples}
    return found, source.notes


@pytest.fixture
def root(kvasir_folder):
    return kvasir_folder(NAMES)


def test_pattern(root, tmp_path):
    rejects = Rejects()
    source = with_patients(read_kvasir_seg(root, rejects), patients_from_pattern(r"^p\d+"), rejects)
    prepared = prepare_dataset(source, tmp_path / "out", SplitOptions((1, 1, 1)), rejects)
    assert "6 patients" in prepared.notes
    split_of = {}
    for split in ("train", "val", "test"):
        content = json.loads((tmp_path / "out" / "annotations" / f"{split}.json").read_text())
        assert len(content["images"]) == 6
        for image in content["images"]:
            assert image["patient_id"] == image["file_name"][:3]
            assert split_of.setdefault(image["patient_id"], split) == split
    assert json.loads((tmp_path / "out" / "splits.json").read_text())["split_by"] == "patient"


@pytest.mark.parametrize(
    ("pattern", "patient"),
    [
        (r"p(\d+)_", "00"),
        (r"(p)(?P<patient>\d+)", "00"),
        (r"^[^_]+", "p00"),
        (r"(?:p)\d\d", "p00"),
        (r"_a(\d)?", None),
    ],
)
def test_what_the_pattern_takes(root, pattern, patient):
    sample = next(iter(read_kvasir_seg(root, Rejects()).samples))
    assert patients_from_pattern(pattern)(sample) == patient


def test_names_that_do_not_match_are_bad_input(root):
    rejects = Rejects()
    source = read_kvasir_seg(root, rejects)
    pattern = r"^(p0[0-4])_"
    with pytest.raises(BadInputError, match=re.escape("p05_a.png does not match the pattern")):
        list(with_patients(source, patients_from_pattern(pattern), rejects).samples)
    rejects = Rejects("reject")
    source = with_patients(read_kvasir_seg(root, rejects), patients_from_pattern(pattern), rejects)
    assert len(list(source.samples)) == 15 and len(rejects.errors) == 3
    with pytest.raises(ValueError, match=r"'\(' is no regular expression: missing \)"):
        patients_from_pattern("(")


def table(root, rows, header="file,patient_id"):
    path = root.parent / "patients.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_csv(root):
    rejects = Rejects()
    rows = [f"{name}.png,{int(name[1:3])}" for name in NAMES[:-1]]
    path = table(root, [*rows, f"{NAMES[-1]}.png,", "q.png,9"])
    source = with_patients_from_csv(read_kvasir_seg(root, rejects), path, rejects)
    found, notes = patients(source)
    assert found == {**{name: str(int(name[1:3])) for name in NAMES}, NAMES[-1]: None}
    assert "6 patients" in notes
    assert any(note.startswith("1 images of unknown patients: each is split") for note in notes)
    assert f"1 rows of {path} match nothing: q.png (line 20)" in notes


def test_csv_with_more_columns(root):
    rows = [f"{name}.png,{name[:3]},A" for name in NAMES]
    path = table(root, rows, "file,patient_id,centre")
    source = with_patients_from_csv(read_kvasir_seg(root, Rejects()), path, Rejects())
    samples = list(source.samples)
    assert all(set(sample.fields) == {"patient_id"} for sample in samples)
    assert f"{path}: centre not read; --metadata joins them" in source.notes


def test_an_image_that_is_not_in_the_table_is_bad_input(root):
    path = table(root, [f"{name}.png,1" for name in NAMES[1:]])
    rejects = Rejects()
    source = with_patients_from_csv(read_kvasir_seg(root, rejects), path, rejects)
    with pytest.raises(BadInputError, match=r"p00_a\.png is not in .*patients\.csv"):
        list(source.samples)
    path = table(root, ["1,2"], "patient_id,age")
    with pytest.raises(BadInputError, match="no table of patients: it needs file and patient_id"):
        with_patients_from_csv(read_kvasir_seg(root, rejects), path, rejects)


def test_two_ids_for_one_image_are_bad_input(coco_folder):
    def edit(coco):
        coco["images"][0]["patient_id"] = 1
        coco["images"][1]["patient_id"] = 9

    rejects = Rejects()
    folder = coco_folder(edit)
    source = with_patients(read_coco(*folder, rejects), patients_from_pattern(r"\d"), rejects)
    with pytest.raises(BadInputError, match=r"2\.png: patient_id is 9 in the data set, but '2'"):
        list(source.samples)
    # Those that the data set has are kept where nothing else is known, all as text.
    source = with_patients(read_coco(*folder, rejects), lambda sample: None, rejects)
    found, notes = patients(source)
    assert found == {"1": "1", "2": "9", "3": None}


def dicom(path, **tags):
    pydicom = pytest.importorskip("pydicom", reason="the deploy extra is not installed")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.VLEndoscopicImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def test_dicom(root, tmp_path):
    files = tmp_path / "dicom"
    for name, suffix in zip(NAMES, [".dcm", "", ".DCM"] * 6, strict=True):
        dicom(files / f"{name}{suffix}", PatientID=f"{name[:3]} ", PatientName="Doe^Jane")
    dicom(files / f"{NAMES[-1]}.DCM", PatientName="Doe^Jane")
    rejects = Rejects()
    source = with_patients(read_kvasir_seg(root, rejects), patients_from_dicom(files), rejects)
    found, notes = patients(source)
    assert found == {**{name: name[:3] for name in NAMES}, NAMES[-1]: None}
    assert "6 patients" in notes and any("1 images of unknown patients" in n for n in notes)


def test_dicom_files_that_are_missing_or_none(root, tmp_path):
    files = tmp_path / "dicom"
    dicom(files / "other.dcm", PatientID="1")
    patient_of = patients_from_dicom(files)
    sample = next(iter(read_kvasir_seg(root, Rejects()).samples))
    with pytest.raises(BadInputError, match=r"there is no DICOM file p00_a\.dcm in"):
        patient_of(sample)
    (files / "p00_a.dcm").write_bytes(b"no DICOM")
    with pytest.raises(BadInputError, match=r"p00_a\.dcm: is no readable DICOM file"):
        patients_from_dicom(files)(sample)
    with pytest.raises(BadInputError, match=r"p00_a\.png: is no readable DICOM file"):
        patients_from_dicom()(sample)  # the image itself
    with pytest.raises(FileNotFoundError, match="no such folder"):
        patients_from_dicom(tmp_path / "none")
