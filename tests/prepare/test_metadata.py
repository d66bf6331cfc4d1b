"""Tables joined to images, patients and lesions; what does not match is told."""

import json

import pytest

from imrcnn_d2.data.formats import read_coco
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.metadata import read_metadata, with_metadata
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.utils.files import BadInputError, Rejects, csv_text


@pytest.fixture
def folder(coco_folder):
    """1.png and 2.png of patient 7 with lesions L1 and L2, 3.png of patient "x" without."""

    def edit(coco):
        for record, patient in zip(coco["images"], (7, 7, "x"), strict=True):
            record["patient_id"] = patient
        for annotation in coco["annotations"]:
            annotation["lesion_id"] = f"L{annotation['image_id']}"
        coco["images"][0]["centre"] = "A"

    return coco_folder(edit)


@pytest.fixture
def join(folder, tmp_path):
    """A function: the samples by file name and the notes after joining tables, given as text."""

    def joined(*texts, rejects=None, **how):
        rejects = rejects or Rejects()
        paths = [tmp_path / f"{i}.csv" for i in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        source = read_coco(*folder, rejects)
        tables = [read_metadata(path, rejects) for path in paths]
        source = with_metadata(source, tables, rejects, **how)
        samples = {sample.file_name: sample for sample in source.samples}
        return samples, [note.replace(f"{tmp_path}/", "") for note in source.notes]

    return joined


def fields(samples, column):
    return [sample.fields.get(column) for sample in samples.values()]


def test_by_file(join):
    samples, notes = join(
        "file,device,year,light,score,ward\n"
        "1.png,EVIS,2019,true,1.5,\n./2.png,007,2020,false,2,\n4.png,,,,,\n"
    )
    assert fields(samples, "device") == ["EVIS", "007", None]
    assert fields(samples, "year") == [2019, 2020, None]
    assert fields(samples, "light") == [True, False, None]
    assert fields(samples, "score") == [1.5, 2.0, None]
    assert all("ward" not in sample.fields for sample in samples.values())
    assert notes == [
        "1 images have no row in 0.csv: 3.png",
        "1 rows of 0.csv match nothing: 4.png (line 4)",
    ]


def test_by_patient(join):
    samples, notes = join("patient_id;age\n7;61\ny;50\n")
    assert fields(samples, "age") == [61, 61, None]
    assert fields(samples, "patient_id") == ["7", "7", "x"]
    assert notes == [
        "1 patients have no row in 0.csv: x",
        "1 rows of 0.csv match nothing: y (line 3)",
    ]


def test_by_lesion(join):
    samples, notes = join("lesion_id,paris,size_mm\nL1,0-Is,8\nL3,0-IIa,12\n")
    of = [[(a.get("paris"), a.get("size_mm")) for a in s.annotations] for s in samples.values()]
    assert of == [[("0-Is", 8)], [(None, None)], []]
    assert fields(samples, "size_mm") == [None] * 3
    assert notes == [
        "1 lesions have no row in 0.csv: L2",
        "1 rows of 0.csv match nothing: L3 (line 3)",
    ]


def test_lesions_that_are_numbered_anew_in_each_patient(folder, tmp_path):
    content = json.loads(folder[0].read_text())
    content["images"][1]["patient_id"] = "x"
    for annotation in content["annotations"]:
        annotation["lesion_id"] = 1
    folder[0].write_text(json.dumps(content))
    table = tmp_path / "lesions.csv"
    table.write_text("patient_id,lesion_id,size_mm\n7,1,8\nx,1,20\n")
    rejects = Rejects()
    tables = [read_metadata(table, rejects)]
    samples = list(with_metadata(read_coco(*folder, rejects), tables, rejects).samples)
    assert [a["size_mm"] for s in samples for a in s.annotations] == [8, 20]


def test_several_tables(coco_folder, tmp_path):
    """Whatever their order: patients that one tells are those that another one is of."""
    (tmp_path / "age.csv").write_text("patient_id,age\n7,61\nx,50\n")
    (tmp_path / "who.csv").write_text("file,patient_id,device\n1.png,7,A\n2.png,7,B\n3.png,x,A\n")
    folder, rejects = coco_folder(), Rejects()
    for order in (("age", "who"), ("who", "age")):
        tables = [read_metadata(tmp_path / f"{name}.csv", rejects) for name in order]
        source = with_metadata(read_coco(*folder, rejects), tables, rejects)
        samples = {sample.file_name: sample for sample in source.samples}
        assert fields(samples, "age") == [61, 61, 50]
        assert fields(samples, "patient_id") == ["7", "7", "x"]
        assert fields(samples, "device") == ["A", "B", "A"]
        assert source.notes == []


def test_what_is_said_twice_must_agree(join):
    samples, _ = join("file,centre,patient_id\n1.png,A,7\n2.png,B,7\n3.png,C,x\n")
    assert fields(samples, "centre") == ["A", "B", "C"]
    with pytest.raises(BadInputError, match=r"1\.png: centre is 'A', but 'B' in .*, line 2"):
        join("file,centre\n1.png,B\n")
    rejects = Rejects("reject")
    samples, notes = join("file,centre\n1.png,B\n2.png,C\n", rejects=rejects)
    assert list(samples) == ["2.png", "3.png"]
    assert [error.reason.split(",")[0] for error in rejects.errors] == ["centre is 'A'"]
    with pytest.raises(BadInputError, match="patient_id is '7', but '07'"):
        join("file,patient_id\n1.png,07\n")


def test_a_column_that_is_almost_numbers(join):
    samples, notes = join("file,size\n1.png,5\n2.png,NA\n3.png,7\n")
    assert fields(samples, "size") == ["5", "NA", "7"]
    assert notes == ["0.csv: size is text, since 'NA' in line 3 is no number"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,x\na,1\n", "none of the columns file, patient_id, lesion_id.*it has name, x"),
        ("file,width,id\n1.png,5,3\n", "columns id, width are COCO's"),
        ("lesion_id,area\nL1,5\n", "columns area are COCO's"),
        ("file,x\n,1\n", "line 2: has no file"),
        ("file,x\n1.png,1\n./1.png,2\n", "line 3: 1.png is in line 2 already"),
        ("file,x\none.png,1\n", r"no file in it is .* one\.png \(line 2\).*set 1\.png, 2\.png"),
        ("lesion_id,x\nL9,1\n", r"no lesion_id in it .*L9 \(line 2\); the data set L1, L2"),
    ],
)
def test_tables_that_cannot_be_meant(join, text, message):
    with pytest.raises(BadInputError, match=message):
        join(text)


def test_images_without_lesion_ids_are_named(coco_folder, tmp_path):
    table = tmp_path / "lesions.csv"
    table.write_text("lesion_id,x\nL1,1\n")
    rejects = Rejects()
    source = with_metadata(
        read_coco(*coco_folder(), rejects), [read_metadata(table, rejects)], rejects
    )
    with pytest.raises(BadInputError, match=r"the data set 1\.png \(no lesion_id\)"):
        list(source.samples)


def test_bad_rows_are_listed(join):
    rejects = Rejects("reject")
    samples, notes = join("file,x\n1.png,1\n,2\n1.png,3\n2.png,4\n", rejects=rejects)
    assert fields(samples, "x") == [1, 4, None]
    assert [error.reason for error in rejects.errors] == [
        "has no file",
        "1.png is in line 2 already",
    ]


def test_through_the_files_to_the_rows_of_an_evaluation(folder, tmp_path):
    """Numbers are numbers in the JSON and in per_image.csv's rows; lesions keep theirs."""
    (tmp_path / "images.csv").write_text(
        "file,device,year\n1.png,A,2019\n2.png,B,2020\n3.png,A,1\n"
    )
    (tmp_path / "lesions.csv").write_text("lesion_id,size_mm\nL1,8.5\nL2,9\n")
    rejects = Rejects()
    tables = [read_metadata(tmp_path / f"{name}.csv", rejects) for name in ("images", "lesions")]
    source = with_metadata(read_coco(*folder, rejects), tables, rejects)
    out = prepare_dataset(source, tmp_path / "out", SplitOptions((1, 0, 0)), rejects).out
    written = json.loads((out / "annotations" / "train.json").read_text())
    assert [a["size_mm"] for a in written["annotations"]] == [8.5, 9.0]
    rows = evaluate_lesions(written, []).per_image
    assert [(row["device"], row["year"]) for row in rows] == [("A", 2019), ("B", 2020), ("A", 1)]
    assert {"device", "year"} <= set(csv_text(rows, []).splitlines()[0].split(","))
