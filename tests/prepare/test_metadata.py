"""Tables as people bring them, joined to images, patients and lesions; patient ids."""

import csv
import io
import json
import re
from unittest.mock import Mock

import pytest
from dicoms import write_dicom
from hypothesis import given
from hypothesis import strategies as st

from imrcnn_d2.data.formats import FORMATS, read_coco
from imrcnn_d2.data.formats.base import Sample, Source
from imrcnn_d2.data.prepare import metadata
from imrcnn_d2.data.prepare.metadata import read_metadata, read_table, with_metadata, with_patients
from imrcnn_d2.utils.files import BadInputError, Rejects

read_kvasir_seg = FORMATS["kvasir-seg"].read_folder


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_as_spreadsheets_write_it(tmp_path, separator, newline):
    cell = "a" + separator + ",;\t".replace(separator, "") * 20 + "b"
    lines = ["file|note||", 'a.png|"two\nlines"||', "", "|||", " b.png ", f'c.png|"{cell}"']
    text = newline.join(lines).replace("|", separator)
    path = tmp_path / "table.csv"
    path.write_bytes(("\ufeff" + text).encode())
    read = read_table(path, ["file"])
    assert (read.columns, read.separator) == (["file", "note"], separator)
    cells = [list(row.cells.values()) for row in read.rows]
    assert cells == [["a.png", "two\nlines"], ["b.png", ""], ["c.png", cell]]
    assert read.rows[1].where.endswith("table.csv, line 6")


def test_no_table(tmp_path):
    path = tmp_path / "table.csv"
    for data, message in (
        (b"", "file"),
        (b"name,x\n", "file; .*name, x"),
        (b"file,x,x\n", "'x'"),
        (b"file,,x\n", "no name"),
        (b"file,x\na,1\nb,2,3\n", "line 3 has 3 cells"),
        (b'file\n"' + b"a" * 200_000 + b'"\n', "line 2"),
        (b"file,\xe4\n", "UTF-8"),
    ):
        path.write_bytes(data)
        with pytest.raises(BadInputError, match=f"table.csv: .*{message}"):
            read_table(path, ["file"])
    path.unlink()
    with pytest.raises(BadInputError, match="table.csv: .*No such file"):
        read_table(path, ["file"])


CODES = (["007", "12"], ["true", "1"], ["nan", "1"], ["1e999", "1"], ["1_000", "1"], ["١", "2"])


def test_types():
    for texts, values in (
        (["1", "", "-20", "9" * 15], [1, None, -20, 10**15 - 1]),
        (["1", "2.5", "1e3", ".5", "6.", "+3"], [1.0, 2.5, 1000.0, 0.5, 6.0, 3.0]),
        (["1", "9" * 16 + ".0"], [1.0, 1e16]),
        (["True", "false", ""], [True, False, None]),
        (["yes", "", ""], ["yes", None, None]),
        (["", ""], [None, None]),
        *((texts, texts) for texts in (*CODES, ["2023110100000017", "2023110100000018"])),
        *((texts, texts) for texts in (["9" * 5000], ["3,5"], [])),
    ):
        typed = metadata.typed(texts)
        assert typed == values and list(map(type, typed)) == list(map(type, values))
    assert metadata.typed(["3,5", "4", "5.5"], ";") == [3.5, 4.0, 5.5]
    assert metadata.typed(["1,000,5"], ";") == ["1,000,5"]


floats = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x % 1)
words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)
words = words.filter(lambda text: not re.match("'+[=+@-]", text))  # our mark of a formula
tables = st.lists(st.lists(words, min_size=2, max_size=2), min_size=1)
integers = st.lists(st.integers(-(10**12), 10**12) | st.none())


@given(integers, st.lists(floats, min_size=1), tables, st.sampled_from(",;\t"))
def test_numbers_and_cells_come_back(tmp_path_factory, integers, floats, rows, separator):
    texts = ["" if value is None else str(value) for value in integers]
    assert metadata.typed(texts) == integers
    assert metadata.typed([repr(value) for value in floats]) == floats
    path, text = tmp_path_factory.mktemp("table") / "table.csv", io.StringIO(newline="")
    csv.writer(text, delimiter=separator).writerows([["a", "b"], *rows])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    assert [list(row.cells.values()) for row in read_table(path).rows] == rows


@pytest.fixture
def join(coco_folder, tmp_path):
    """A function: the samples by file name and the notes after joining tables, given as text.
    1.png and 2.png are of patient 7 with lesions L1 and L2, 3.png is of patient "x" without."""

    def describe(coco):
        for record, patient in zip(coco["images"], (7, 7, "x"), strict=True):
            record["patient_id"] = patient
        for annotation in coco["annotations"]:
            annotation["lesion_id"] = f"L{annotation['image_id']}"
        coco["images"][0] |= {"centre": "A", "light": 2}

    json_file, images = coco_folder(describe)

    def joined(*texts, rejects=None, edit=lambda coco: None):
        rejects, content = rejects or Rejects(), json.loads(json_file.read_text())
        edit(content)
        json_file.write_text(json.dumps(content))
        tables = []
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.csv").write_text(text)
            tables.append(read_metadata(tmp_path / f"{i}.csv", rejects))
        source = with_metadata(read_coco(json_file, images, rejects), tables, rejects)
        samples = {sample.file_name: sample for sample in source.samples}
        return samples, [note.replace(f"{tmp_path}/", "") for note in source.notes]

    return joined


def fields(samples, column):
    return [sample.fields.get(column) for sample in samples.values()]


def test_by_file(join):
    samples, notes = join(
        "file,device,year,lit,score,ward,size\n"
        "1.png,EVIS,2019,true,1.5,,5\n.\\2.png,7,2020,false,2,,NA\n4.png,,,,,,7\n"
    )
    columns = ("device", "year", "lit", "score", "size", "ward")
    expected = [("EVIS", 2019, True, 1.5, "5"), ("7", 2020, False, 2.0, "NA"), [None] * 5]
    for column, values in zip(columns, [*zip(*expected, strict=True), [None] * 3], strict=True):
        assert fields(samples, column) == list(values)
    assert "ward" not in samples["1.png"].fields
    assert notes == [
        "0.csv: size is text, since 'NA' in line 3 is no number",
        "1 images have no row in 0.csv: 3.png",
        "1 rows of 0.csv match nothing: 4.png (line 4)",
    ]


def test_by_patient_and_lesion(join):
    samples, notes = join("patient_id;age\n7;61\ny;50\n", "lesion_id,size_mm\nL1,8\nL3,12\n")
    assert fields(samples, "age") == [61, 61, None]
    assert fields(samples, "patient_id") == ["7", "7", "x"]
    sizes = [[a.get("size_mm") for a in sample.annotations] for sample in samples.values()]
    assert sizes == [[8], [None], []] and fields(samples, "size_mm") == [None] * 3
    assert notes == [
        "1 patients have no row in 0.csv: x",
        "1 rows of 0.csv match nothing: y (line 3)",
        "1 lesions have no row in 1.csv: L2",
        "1 rows of 1.csv match nothing: L3 (line 3)",
    ]

    # and lesions that are numbered anew in each patient
    def edit(content):
        content["images"][1]["patient_id"] = "x"
        for annotation in content["annotations"]:
            annotation["lesion_id"] = 1

    samples, _ = join("patient_id,lesion_id,size_mm\n7,1,8\nx,1,20\n", edit=edit)
    assert [a["size_mm"] for sample in samples.values() for a in sample.annotations] == [8, 20]


def test_several_tables(join):
    """Whatever their order: patients of one table are those of the rows of another one."""
    join(edit=lambda content: [image.pop("patient_id") for image in content["images"]])
    tables = ["patient_id,age\n7,61\nx,50\n"]
    tables.append("file,patient_id,device\n1.png,7,A\n2.png,7,B\n3.png,x,A\n")
    for order in (tables, tables[::-1]):
        samples, notes = join(*order)
        assert fields(samples, "age") == [61, 61, 50] and notes == []
        assert fields(samples, "patient_id") == ["7", "7", "x"]
        assert fields(samples, "device") == ["A", "B", "A"]


def test_values_that_contradict_each_other(join):
    samples, _ = join("file,centre,patient_id,light\n1.png,A,7,2.0\n2.png,B,7,\n3.png,C,x\n")
    assert fields(samples, "centre") == ["A", "B", "C"]
    with pytest.raises(BadInputError, match=r"1\.png: centre is 'A', but 'B' in .*, line 2"):
        join("file,centre\n1.png,B\n")
    with pytest.raises(BadInputError, match="patient_id is '7', but '07'"):
        join("file,patient_id\n1.png,07\n")
    rejects = Rejects("reject")
    samples, _ = join("file,centre\n1.png,B\n2.png,C\n,D\n2.png,E\n", rejects=rejects)
    assert fields(samples, "centre") == ["C", None]
    places = [error.file.split(", ")[-1].split("/")[-1] for error in rejects.errors]
    assert places == ["line 4", "line 5", "1.png"]


def test_tables_that_cannot_be_meant(join):
    for text, message in (
        ("name,x\na,1\n", "file, patient_id, lesion_id.* name, x"),
        ("file,width,group_id\n1.png,5,3\n", "group_id, width"),
        ("lesion_id,score,area\nL1,1,5\n", "area, score"),
        ("file,x\n,1\n", "line 2: has no file"),
        ("patient_id,lesion_id,x\n,L1,1\n", "line 2: has no patient_id"),
        ("file,x\n1.png,1\n./1.png,2\n", "line 3: 1.png .* line 2"),
        (
            "file,x\na,1\nb,1\nc,1\nd,1\n",
            r"file.* a \(line 2\).*, c \(line 4\) and 1 more;.*, 3\.png$",
        ),
        ("lesion_id,x\nL9,1\n", r"lesion_id .*L9 \(line 2\); .* L1, L2"),
    ):
        with pytest.raises(BadInputError, match=f"0.csv.*{message}"):
            join(text)
    assert join("file,x\n")[1] == ["3 images have no row in 0.csv: 1.png, 2.png, 3.png"]
    join(edit=lambda content: [lesion.pop("lesion_id") for lesion in content["annotations"]])
    with pytest.raises(BadInputError, match=r"1\.png \(no lesion_id\)"):
        join("lesion_id,x\nL1,1\n")


NAMES = [f"p{p:02}_{view}" for p in range(6) for view in "abc"]


@pytest.fixture
def root(kvasir_folder):
    return kvasir_folder(NAMES)


def patients(source):
    """{name: patient_id} and the notes."""
    ids = {s.file_name.removesuffix(".png"): s.fields.get("patient_id") for s in source.samples}
    return ids, source.notes


def test_pattern(root):
    def read(pattern, on_error="raise"):
        rejects = Rejects(on_error)
        source = read_kvasir_seg(root, rejects)
        source = with_patients(source, metadata.patients_from_pattern(pattern), rejects)
        return *patients(source), rejects.errors

    assert read(r"^p\d+")[0] == {name: name[:3] for name in NAMES}
    ids, notes, errors = read(r"^(p0[0-4])_", "reject")
    assert len(ids) == 15 and "5 patients" in notes
    assert len(errors) == 3 and errors[0].file.endswith("p05_a.png")
    sample = next(iter(read_kvasir_seg(root, Rejects()).samples))
    groups = {r"p(\d+)_": "00", r"(p)(?P<patient>\d+)": "00", r"^[^_]+": "p00", r"(p)(\d)": "p"}
    for pattern, patient in (groups | {r"(?:p)\d\d": "p00", r"_a(\d)?": None}).items():
        assert metadata.patients_from_pattern(pattern)(sample) == patient
    with pytest.raises(ValueError, match=r"'\('"):
        metadata.patients_from_pattern("(")


def test_a_table_of_patients(root):
    path = root.parent / "patients.csv"

    def read(*rows, header="file,patient_id"):
        path.write_text("\n".join([header, *rows]) + "\n")
        source = read_kvasir_seg(root, Rejects())
        return metadata.with_patients_from_csv(source, path, Rejects())

    rows = [f"{name}.png,{name[2]},A" for name in NAMES[:-1]]
    source = read(*rows, f"{NAMES[-1]}.png,,A", "q.png,9,A", header="file,patient_id,centre")
    samples = list(source.samples)
    assert not any("centre" in sample.fields for sample in samples)
    ids = [sample.fields.get("patient_id") for sample in samples]
    assert ids == [*(name[2] for name in NAMES[:-1]), None]
    assert {"6 patients", f"{path}: centre not read; --metadata joins them"} < {*source.notes}
    assert f"1 rows of {path} match nothing: q.png (line 20)" in source.notes
    assert any(note.startswith("1 images of unknown patients") for note in source.notes)
    with pytest.raises(BadInputError, match=rf"p00_a\.png is not in {path}"):
        list(read(*(f"{name}.png,1" for name in NAMES[1:])).samples)
    with pytest.raises(BadInputError, match=f"{path}: .*file and patient_id"):
        read("1,2", header="patient_id,age")


def test_two_ids_for_one_image_are_bad_input(coco_folder):
    def edit(coco):
        coco["images"][0]["patient_id"], coco["images"][1]["patient_id"] = 1, 9

    folder, rejects = coco_folder(edit), Rejects()
    source = read_coco(*folder, rejects)
    with pytest.raises(BadInputError, match=r"2\.png: patient_id is 9 .*'2'"):
        list(with_patients(source, metadata.patients_from_pattern(r"\d"), rejects).samples)
    # Those that the data set has are kept where nothing else is known, all as text.
    source = with_patients(read_coco(*folder, rejects), lambda sample: None, rejects)
    assert patients(source)[0] == {"1": "1", "2": "9", "3": None}


def test_dicom(root, tmp_path, noise):
    files, rejects = tmp_path / "dicom", Rejects()
    files.mkdir()
    for name, suffix in zip(NAMES, [".dcm", "", ".DICOM"] * 6, strict=True):
        patient = "" if name == NAMES[-1] else f"{name[:3]} "
        write_dicom(files / f"{name}{suffix}", noise(8, 8), PatientID=patient)
    patient_of = metadata.patients_from_dicom(files)
    ids, notes = patients(with_patients(read_kvasir_seg(root, rejects), patient_of, rejects))
    assert ids == {**{name: name[:3] for name in NAMES}, NAMES[-1]: None}
    assert "6 patients" in notes and any("1 images of unknown patients" in n for n in notes)

    sample = next(iter(read_kvasir_seg(root, rejects).samples))
    for change, folder, message in (
        (lambda path: path.write_bytes(b"no"), files, r"p00_a\.dcm: is no readable DICOM file"),
        (lambda path: path.unlink(), files, rf"p00_a\.dcm in {files}"),
        (lambda path: None, None, r"p00_a\.png: is no readable DICOM file"),  # the image itself
    ):
        change(files / "p00_a.dcm")
        with pytest.raises(BadInputError, match=message):
            metadata.patients_from_dicom(folder)(sample)
    with pytest.raises(FileNotFoundError, match="none"):
        metadata.patients_from_dicom(tmp_path / "none")


def test_a_null_is_not_known():
    sample = Sample("p01_a.png", Mock(), [], {"patient_id": None, "centre": None})
    sample.defaults["centre"] = "north"
    source = Source([sample], [], {})
    source = metadata.with_pattern(source, r"(?P<patient_id>p\d+)_", Rejects())
    (sample,) = metadata.with_defaults(source).samples
    assert sample.fields == {"patient_id": "p01", "centre": "north"}
