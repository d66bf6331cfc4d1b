"""Pages and files about annotations: audit, agreement of annotators, suspects."""

import csv
import json
import shutil

import numpy as np
import pytest
from chromium import chromium, opened
from PIL import Image
from planted_faults import Planted
from rectangles import rectangle

from imrcnn_d2.cli.annotation_suspects import main
from imrcnn_d2.data.audit import Finding, audit, read_entries
from imrcnn_d2.evaluation import Bootstrap
from imrcnn_d2.evaluation.annotator_agreement import agreement, read_annotator, read_model
from imrcnn_d2.report.agreement import agreement_table, plot_agreement, plot_disagreements
from imrcnn_d2.report.audit import TILES, write_audit
from imrcnn_d2.report.label_errors import gather_label_errors

HOSTILE = "<img src=x onerror=alert(1)>.jpg"


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A few synthetic images: one with an annotation twice, two alike in two splits, one broken."""
    planted = Planted(tmp_path_factory.mktemp("data"))
    first = planted.add(name=HOSTILE, patient_id="<b>p</b>")
    planted.annotate(first, **planted._splits["train"]["annotations"][0])
    other = planted.add(split="test", patient_id="<b>p</b>")
    Image.open(planted.images / HOSTILE).save(planted.images / other["file_name"], quality=95)
    dark = planted.add(np.zeros((192, 192, 3), np.uint8), split="test")
    dark |= {"width": None, "height": None}
    broken = planted.add(split="val")
    (planted.images / broken["file_name"]).write_text("nothing")
    result = audit(read_entries("<i>title</i>", planted.write(), planted.images))
    result.notes.append("<u>note</u>")
    return result


@pytest.fixture(scope="module")
def output(audited, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    write_audit(audited, folder)
    return folder


def test_the_page(audited, output, parse):
    text = (output / "audit.html").read_text()
    tree, sections = parse(text)
    kinds = [finding.kind for finding in audited.findings]
    assert {"overlapping", "black_frame", "unreadable", "patient_across_splits"} <= set(kinds)
    assert set(sections) == {"results", "annotations", *kinds}
    for kind, words in (
        ("overlapping", "1 finding"),
        ("overlapping", f"{HOSTILE} train"),
        ("unreadable", "cannot be read"),
        ("results", "Blurred"),
        ("patient_across_splits", "Patient <b>p</b> has 2 images: 1 in train, 1 in test."),
    ):
        assert words in sections[kind]
    assert "Like no other image" not in sections["results"]
    # SVG's elements are in a name space of their own.
    paths = {e.get("class") for e in tree.iter() if str(e.tag).rpartition("}")[2] == "path"}
    assert {"alarm", "truth"} <= paths
    boxes = [e.get("viewBox") for e in tree.iter() if str(e.tag).rpartition("}")[2] == "svg"]
    # A size that is not stated is the image's.
    assert boxes.count("0 0 192 192") >= 2 and not [box for box in boxes if "None" in box]
    # Nothing in the data becomes markup.
    assert not any(markup in text for markup in ("<img src=x", "<i>title", "<b>p", "<u>note"))
    assert not list(tree.iter("script"))


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_files_state_the_same(audited, output):
    document = json.loads((output / "audit.json").read_text())
    for stated, finding in zip(document["findings"], audited.findings, strict=True):
        assert [stated[key] for key in ("kind", "severity")] == [finding.kind, finding.severity]
    assert document["images"] == 4 and document["flagged_images"] == len(audited.flagged)
    for row, finding in zip(rows(output / "findings.csv"), audited.findings, strict=True):
        assert row["detail"] == finding.detail
        assert tuple(filter(None, row["images"].split("; "))) == finding.images
        assert row["splits"].split("; ") == list(finding.splits or [""])
    images = {row["file_name"]: row for row in rows(output / "images.csv")}
    assert "overlapping" in images[HOSTILE]["flags"].split()
    assert (images["004.jpg"]["flags"], images["004.jpg"]["blur"]) == ("unreadable", "")


def test_many_findings_are_cut(audited, tmp_path):
    many = [Finding("outlier", (HOSTILE,), ("train",), f"No. {i}.") for i in range(TILES + 5)]
    before = audited.findings, audited.checked
    audited.add(many, "validity")
    page = write_audit(audited, tmp_path).read_text()
    audited.findings, audited.checked = before
    assert page.count("No. ") == TILES and f"first {TILES};" in page
    assert "Looks like another label" in page  # checked and not found


@pytest.mark.slow
def test_it_opens_in_a_browser(output):
    with chromium() as browser, opened(browser, output / "audit.html") as page:
        assert page.locator("#overlapping svg").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


def annotator(name, boxes):
    """Who annotated (image, height) boxes of four images."""
    size = {"height": 40, "width": 50}
    images = [{"id": i, "file_name": f"{i}.png", **size} for i in range(1, 5)]
    content = {"images": images, "categories": [{"id": 1, "name": "polyp"}]}
    content["annotations"] = [rectangle(image, 0, 0, 10, height) for image, height in boxes]
    return read_annotator(name, content)


@pytest.fixture(scope="module")
def result():
    """1.png alike, 2.png of Dice 2/3, 3.png of Anna alone, 4.png of nobody."""
    anna = annotator("anna", [(1, 10), (2, 10), (3, 10)])
    ben = annotator("ben", [(1, 10), (2, 5)])
    model = read_model("model", [rectangle(1, 0, 0, 10, 10, score=0.9)], 0.7, anna)
    return agreement([anna, ben], model, bootstrap=Bootstrap(100))


def test_table_and_matrices(result, tmp_path):
    lines = agreement_table(result).split("\n")
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    table = {row[1]: dict(zip(rows[0], row, strict=True)) for row in rows}
    assert table["anna vs ben"]["f1"].startswith(f"{result.values['anna vs ben']['f1']:.1f} [")
    assert table["anna vs ben"]["kappa"].startswith("0.50")
    assert "fleiss_kappa" in table[""] and table["annotators"]["fleiss_kappa"] == ""
    assert table["with_model"]["fleiss_kappa"] and not table["with_model"]["f1"]

    f1, _, kappa = plot_agreement(result, tmp_path / "matrix.png").axes
    values = np.array(f1.images[0].get_array().filled(np.nan))
    pairs = "anna vs ben", "anna vs model", "ben vs model"
    expected = np.array([result.values[pair]["f1"] / 100 for pair in pairs])
    np.testing.assert_allclose(values[[0, 0, 1], [1, 2, 2]], expected)
    np.testing.assert_equal(values, values.T)
    assert np.isnan(values.diagonal()).all()
    texts = {text.get_position(): text.get_text() for text in kappa.texts}
    assert texts[(1, 0)] == texts[(0, 1)] and texts[(1, 0)].startswith("0.50\n[")
    assert (tmp_path / "matrix.png").stat().st_size


def test_contact_sheet(result, tmp_path):
    for i in range(1, 5):
        Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")

    def sheet(compared, **options):
        return plot_disagreements(compared, tmp_path, tmp_path / "sheet.png", **options)

    first, c = annotator("a", [(1, 10), (2, 10)]), annotator("c", [])
    b = annotator("b", [(1, 5), (2, 8)])
    assert sheet(agreement([first, annotator("d", [(1, 10), (2, 10)])])) is None
    assert not (tmp_path / "sheet.png").exists()
    for compared, options, expected in (
        (agreement([first, b]), {"max_images": 1}, ["1.png\nDice 67 %"]),
        (agreement([first, c]), {}, ["1.png\na, not c", "2.png\na, not c"]),
        (result, {}, ["2.png\nanna, not model", "3.png\nanna, not ben"]),
    ):
        figure = sheet(compared, **options)
        assert [axes.get_title() for axes in figure.axes if axes.get_title()] == expected
    lines = figure.axes[0].lines  # 2.png: Anna's and Ben's
    assert len(lines) == 2 and lines[0].get_color() != lines[1].get_color()
    assert lines[1].get_ydata().max() == 4
    with pytest.raises(FileNotFoundError):
        plot_disagreements(result, tmp_path / "none", tmp_path / "none.png")


SIZE = 60, 60


def fold(root, write_run, index, faults):
    """A fold's data set, its ground truth with these faults, and runs of two models that find all
    lesions to a pixel. Image 10 * index + k of six has a lesion where k is not a multiple of 3."""
    data = root / f"fold{index}" / "kvasir_seg"
    gt = data / "annotations" / "test.json"
    for folder in ("annotations", "images"):
        (data / folder).mkdir(parents=True)
    images, annotations, dt = [], [], []
    rng = np.random.default_rng(index)
    for k in range(6):
        number, name = 10 * index + k, f"{index}_{k}.png"
        images.append({"id": number, "file_name": name, "height": 60, "width": 60})
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).save(data / "images" / name)
        x, *box = 8 + k, 10, 24, 20
        if k % 3:
            score = float(rng.uniform(0.9, 0.99))
            dt.append(rectangle(number, x + 1, *box, size=SIZE, score=score))
        invented = faults.get(k) == "invented"
        if invented or k % 3 and faults.get(k) != "forgotten":
            box = (40, 40, 12, 12) if invented else (x + 14 * (faults.get(k) == "moved"), *box)
            annotations.append(rectangle(number, *box, size=SIZE, id=100 + number))
    content = {"images": images, "categories": [{"id": 1, "name": "polyp"}]}
    gt.write_text(json.dumps({**content, "annotations": annotations}))
    for model in ("mrcnn", "imrcnn"):
        write_run(f"cv/{model}/fold{index}", gt, dt=dt, model=model, fold=(index, 2))


@pytest.fixture
def runs(tmp_path, write_run):
    fold(tmp_path, write_run, 0, {1: "forgotten", 3: "invented"})
    fold(tmp_path, write_run, 1, {2: "moved"})
    return tmp_path / "runs" / "cv"


def test_planted_faults_come_first(runs, tmp_path, capsys):
    out, again = tmp_path / "out", runs / "mrcnn" / "fold0"
    shutil.copytree(again, again / "earlier_20260101-120000")  # began anew: moved aside
    main(["--runs", str(runs), "--output", str(out), "--number", "3"])
    assert "4 runs" in capsys.readouterr().out
    with open(out / "suspects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = {row["file_name"]: (row["kind"], row["annotation_id"]) for row in rows[:3]}
    assert first == {
        "0_3.png": ("unmatched_outline", "103"),
        "0_1.png": ("unlabelled_lesion", ""),
        "1_2.png": ("badly_fitting_outline", "112"),
    }
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and scores[2] > 0.85 and scores[3] < 0.2
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
    assert {(row["test_set"], row["models"]) for row in rows} == {("fold0", "2"), ("fold1", "2")}

    document = json.loads((out / "suspects.json").read_text())
    findings = [(*finding["images"], finding["severity"]) for finding in document["findings"]]
    assert findings == [(f"{name}.png", "warning") for name in ("0_3", "1_2", "0_1")]
    assert min(Image.open(out / "suspects.png").size) > 300
    folder = out / "labelme"
    files = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    labels = {name: [shape["label"] for shape in file["shapes"]] for name, file in files.items()}
    mine, model = "polyp", "polyp (model)"
    assert labels == {"0_1.json": [model], "0_3.json": [mine], "1_2.json": [mine, model]}
    image = folder / files["1_2.json"]["imagePath"]
    assert image.resolve() == tmp_path / "fold1" / "kvasir_seg" / "images" / "1_2.png"


def test_corrected_files_stay(runs, tmp_path, caplog):
    arguments = ["--runs", str(runs), "--output", str(tmp_path / "out"), "--number"]
    main([*arguments, "2"])
    first, second = sorted((tmp_path / "out" / "labelme").iterdir())
    first.write_text("corrected")
    as_written = second.read_text()
    main([*arguments, "3"])
    assert first.read_text() == "corrected" and str(first) in caplog.text
    assert second.read_text() == as_written and str(second) not in caplog.text
    assert len(list((tmp_path / "out" / "labelme").iterdir())) == 3


def test_runs_that_cannot_be_used(runs, tmp_path, write_run, capsys):
    record = runs / "mrcnn" / "fold0" / "run.json"
    finished = record.read_text()
    gt = tmp_path / "fold0" / "kvasir_seg" / "annotations" / "test.json"
    datasets = {"train": {"images": 64, "gt": str(gt)}}
    record.write_text(json.dumps({**json.loads(finished), "datasets": datasets}))
    with pytest.raises(ValueError, match=f"{record.parent}.*0_0.png.*{gt}"):  # trained on it
        gather_label_errors(runs)
    record.write_text(finished)
    other = gt.with_name("corrected.json")
    other.write_text(json.dumps({**json.loads(gt.read_text()), "annotations": []}))
    write_run("cv/other", other, dt=[])
    with pytest.raises(ValueError, match="0_0.png.*test sets"):
        gather_label_errors(runs)
    with pytest.raises(SystemExit) as stop:
        main(["--runs", str(tmp_path / "fold0"), "--output", str(tmp_path / "out")])
    assert stop.value.code == 1 and "fold0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
