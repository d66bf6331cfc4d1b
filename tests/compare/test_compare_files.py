"""The files of a comparison have the values of the runs, and those published next to them."""

import csv
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.evaluation import Bootstrap
from imrcnn_d2.evaluation.detection.curves import pr_curve
from imrcnn_d2.report import load_run
from imrcnn_d2.report.comparison import compare, gather, write_comparison

MODELS = {"MR-CNN": 0.6, "IMR-CNN": 0.9}


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(path):
    """The rows of the first Markdown table in a file, by column."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in body]


def only(table, **values):
    """The one row with these values."""
    (row,) = (row for row in table if all(row[key] == value for key, value in values.items()))
    return row


def write_in(folder, paths):
    """Compare runs and write the files; returns the folder and the comparison."""
    comparison = compare(gather([load_run(path) for path in paths]), Bootstrap(50))
    files = write_comparison(comparison, folder / "out")
    assert sorted(files) == sorted((folder / "out").iterdir())
    return folder / "out", comparison


@pytest.fixture(scope="module")
def split(tmp_path_factory, write_gt, write_run_in):
    """Two models on the paper's data, one with two seeds: the results, folder and comparison."""
    root = tmp_path_factory.mktemp("split")
    gt, write_run = write_gt(root / "test.json", source="egc"), write_run_in(root)
    options = dict(dataset="egc_test", tau_val=0.55)
    paths = [
        write_run("a", gt, model="MR-CNN", skill=0.6, **options),
        write_run("b0", gt, skill=0.9, **options),
        write_run("b1", gt, skill=0.9, seed=1, **options),
    ]
    return [load_run(path).results for path in paths], *write_in(root, paths)


@pytest.fixture(scope="module")
def folds(tmp_path_factory, write_gt, write_run_in):
    """Two models on three folds: the runs' results by model, folder and comparison."""
    root = tmp_path_factory.mktemp("folds")
    paths, results = [], {}
    for fold in range(3):
        place = {"images": 12, "first": 1 + 12 * fold, "source": "egc"}
        gt = write_gt(root / f"fold{fold}.json", **place)
        for model, skill in MODELS.items():
            options = dict(model=model, skill=skill, fold=(fold, 3), seed=fold)
            paths.append(write_run_in(root)(f"{model}{fold}", gt, dataset="egc_test", **options))
            results.setdefault(model, []).append(load_run(paths[-1]).results)
    return results, *write_in(root, paths)


def test_all_files_of_one_split(split):
    results, folder, comparison = split
    tables, suffixes = ("table_3", "table_5", "differences"), ("md", "csv", "tex")
    expected = {f"{table}.{suffix}" for table in tables for suffix in suffixes}
    expected |= {f"figure_4{kind}.{suffix}" for kind in ("", "_boxes") for suffix in ("png", "svg")}
    expected |= {"comparison.md", "comparison.json"}
    assert {path.name for path in folder.iterdir()} == expected
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
    page = (folder / "comparison.md").read_text()
    assert all((folder / f"{table}.md").read_text() in page for table in tables)
    assert "![Precision-recall curves](figure_4.png)" in page
    assert "Sci Rep 14:7847" in page and "annotations record egc" in page
    assert "50 resamples of images with seed 0" in page

    document = json.loads((folder / "comparison.json").read_text(), parse_constant=pytest.fail)
    model = document["models"]["MR-CNN"]["figures"]
    assert model["lesion"]["TP"] == results[0].lesion["TP"]
    assert model["segm"]["APl"] is None and math.isnan(results[0].segm["APl"])
    assert [len(model["runs"]) for model in document["models"].values()] == [1, 2]
    assert [run["seed"] for run in document["runs"]] == [0, 0, 1]
    assert len(document["tests"]) == len(comparison.tests)
    assert document["settings"]["resamples"] == 50


def test_table_3(split):
    (results, *seeds), folder, comparison = split
    table, data = cells(folder / "table_3.md"), rows(folder / "table_3.csv")
    low, high = comparison.models["MR-CNN"].intervals["bbox"]["AP50_voc"]
    boxes = only(table, model="MR-CNN", regions="boxes")
    assert boxes["AP50_voc"] == f"{results.bbox['AP50_voc']:.1f} [{low:.1f}, {high:.1f}]"
    assert boxes["AP"] == f"{results.bbox['AP']:.1f}"
    assert boxes["IoU"].startswith(f"{results.lesion['iou_box']:.1f} [")
    values = [seed.segm["AP50_voc"] for seed in seeds]
    masks = only(table, model="IMR-CNN", regions="masks")
    assert masks["AP50_voc"].startswith(f"{np.mean(values):.1f} ± {np.std(values):.1f} [")
    published = [row for row in table if row["regions"] == "not stated"]
    assert [(row["AP50_voc"], row["IoU"]) for row in published] == [
        *(("90.7", "78.3"), ("91.5", "78.8"), ("93.5", "79.1"))
    ]
    assert published[2]["model"] == "IMR-CNN, published"
    ours = {"model": "IMR-CNN", "figure": "segm/AP50_voc"}
    row = only(data, source="this comparison", **ours)
    assert float(row["value"]) == pytest.approx(np.mean(values), rel=1e-12)
    assert float(row["sd_population"]) == pytest.approx(np.std(values))
    assert float(row["sd_sample"]) == pytest.approx(np.std(values, ddof=1))
    assert row["runs"] == "2"
    paper = only(data, source="published", **ours)
    assert float(paper["value"]) == 93.5 and "AP50_voc" in paper["remarks"]


def test_table_5(split):
    (results, *_), folder, _ = split
    table = cells(folder / "table_5.md")
    for threshold, groups in (("0.7", results.groups()), ("tau_val = 0.55", results.tau_val)):
        for group, name in (("lesion", "lesions"), ("image", "images")):
            row = only(table, model="MR-CNN", threshold=threshold, cases=name)
            for key in ("TP", "FP", "FN", "TN"):
                assert row[key] == f"{groups[group][key]:.0f}"
            for key in ("precision", "recall", "specificity", "accuracy", "f1"):
                cell = row["F1" if key == "f1" else key]
                assert cell.partition(" ")[0] == f"{groups[group][key]:.1f}"
    ours = only(table, model="MR-CNN", cases="as the paper")
    assert ours["threshold"] == "0.7" and ours["TN"] == f"{results.paper['TN']:.0f}"
    assert ours["specificity"].partition(" ")[0] == f"{results.paper['specificity']:.1f}"
    paper = only(table, model="IMR-CNN, published", cases="as the paper")
    assert (paper["precision"], paper["F1"]) == ("92.9", "94.1")
    assert (paper["specificity"], paper["accuracy"]) == ("92.5", "93.9")
    # Next to what means the same.
    only(table, model="IMR-CNN", cases=paper["cases"])
    published = [row for row in rows(folder / "table_5.csv") if row["source"] == "published"]
    assert {row["figure"].partition("/")[0] for row in published} == {"paper"}


def test_differences(split):
    _, folder, comparison = split
    table, data = cells(folder / "differences.md"), rows(folder / "differences.csv")
    assert len(table) == len(data) == len(comparison.tests)
    first = comparison.tests[0]
    assert table[0]["metric"] == "AP50_voc (masks) (primary)"
    assert table[0]["models"] == "IMR-CNN − MR-CNN" and table[0]["p (Holm)"] == ""
    numbers = [f"{n:.1f}".replace("-", "−") for n in (first.estimate, first.low, first.high)]
    assert table[0]["difference"] == "{} [{}, {}]".format(*numbers)
    assert float(data[0]["p"]) == first.p and data[0]["primary"] == "True"


@pytest.mark.slow
def test_table_4(folds):
    results, folder, comparison = folds
    values = [fold.segm["AP50_voc"] for fold in results["IMR-CNN"]]
    table = cells(folder / "table_4.md")
    row = only(table, model="IMR-CNN", metric="AP50_voc (masks)")
    assert [row[f"fold {i}"] for i in range(3)] == [f"{value:.1f}" for value in values]
    assert row["mean ± sd"] == f"{np.mean(values):.1f} ± {np.std(values):.1f}"
    published = [row["mean ± sd"] for row in table if "published" in row["model"]]
    assert published[:3] == ["90.6 ± 0.4", "78.4 ± 0.2", "91.5 ± 0.4"]
    assert published[3:] == ["78.8 ± 0.3", "93.5 ± 0.5", "79.0 ± 0.3"]
    keys = {"model": "IMR-CNN", "figure": "segm/AP50_voc", "source": "this comparison"}
    row = only(rows(folder / "table_4.csv"), **keys)
    assert float(row["sd_sample"]) == pytest.approx(np.std(values, ddof=1))
    assert float(row["fold_2"]) == pytest.approx(values[2])
    assert len(rows(folder / "table_4_tests.csv")) == len(comparison.fold_tests) > 0
    assert "n_test / n_train = 12 / 64" in (folder / "table_4_tests.md").read_text()


def test_folds_alone_are_pooled(folds):
    """Table 5 adds up; Figure 4 ranks the detections of all folds together."""
    results, folder, _ = folds
    row = only(cells(folder / "table_5.md"), model="MR-CNN", cases="lesions", threshold="0.7")
    tp, fp = (sum(fold.lesion[key] for fold in results["MR-CNN"]) for key in ("TP", "FP"))
    assert row["TP"] == f"{tp:.0f}" and row["precision"] == f"{100 * tp / (tp + fp):.1f}"
    curves = [curve for f in results["MR-CNN"] for kind, _, curve in f.curves if kind == "segm"]
    score = np.concatenate([curve.score for curve in curves])
    hit = np.concatenate([np.diff(curve.tp, prepend=0) for curve in curves]) == 1
    pooled = pr_curve(score, hit, sum(curve.num_gt for curve in curves))
    label = f"MR-CNN (3 folds pooled): AP50_voc {100 * pooled.area:.1f}"
    # In an SVG the words are shapes, with the text as a comment.
    assert label in (folder / "figure_4.svg").read_text()
    assert not (folder / "table_3.md").exists()


@pytest.mark.parametrize("source", [None, "polyps", "kvasir_seg"])
def test_published_values_of_the_paper_s_data_only(source, tmp_path, write_gt, write_run):
    """A data set called egc, as one's own often was, is not the paper's for its name."""
    gt = write_gt(tmp_path / "gt.json", images=6, source=source)
    folder, _ = write_in(tmp_path, [write_run("a", gt, dataset="egc_test")])
    tables = [(folder / f"table_{number}.md").read_text() for number in "35"]
    document = json.loads((folder / "comparison.json").read_text())
    known = source == "kvasir_seg"
    assert ("91.6" in tables[0]) == known and bool(document["published"]) == known
    assert not re.search("93.5|92.9", "".join(tables))
    page = (folder / "comparison.md").read_text()
    assert ("Sci Rep 14:7847" in page) == known
    assert f"annotations record {source or 'no source'}" in page


@pytest.mark.slow
def test_several_classes(tmp_path, write_gt, write_run):
    gt = write_gt(tmp_path / "gt.json", images=40, classes=("cancer", "ulcer"), per_patient=4)
    options = {"dataset": "own_test"}
    paths = [write_run(m, gt, model=m, skill=skill, **options) for m, skill in MODELS.items()]
    folder, _ = write_in(tmp_path, paths)
    figure, page = ((folder / name).read_text() for name in ("figure_4.svg", "comparison.md"))
    assert figure.count("<!-- MR-CNN: AP50_voc") == 2
    for name in ("cancer", "ulcer"):
        assert f"<!-- Precision and recall, masks at IoU 0.5: {name} -->" in figure
    areas = [c.area for kind, _, c in load_run(paths[0]).results.curves if kind == "segm"]
    assert cells(folder / "table_3.md")[0]["AP50_voc"].startswith(f"{100 * np.mean(areas):.1f} [")
    # Patients have four images each, which the bootstrap respects and McNemar's test does not.
    assert "McNemar's test" in (folder / "differences.md").read_text()
    assert "50 resamples of patients" in page
    cases = {row["cases"] for row in cells(folder / "table_5.md")}
    assert cases == {"lesions", "images", "patients"}


def test_the_curve_of_several_seeds_is_the_median_run(tmp_path, write_gt, write_run):
    gt = write_gt(tmp_path / "gt.json")
    paths = [write_run(f"{s}", gt, seed=s, skill=k) for s, k in enumerate((0.5, 0.9, 0.7))]
    folder, _ = write_in(tmp_path, paths)
    areas = sorted(load_run(path).results.segm["AP50_voc"] for path in paths)
    label = f"IMR-CNN (median of 3 runs): AP50_voc {areas[1]:.1f}"
    assert label in (folder / "figure_4.svg").read_text()


def test_one_model_without_a_detection(tmp_path, write_gt, write_run):
    gt = write_gt(tmp_path / "gt.json")
    paths = [write_run("none", gt, model="none", dt=[]), write_run("some", gt, model="some")]
    folder, comparison = write_in(tmp_path, paths)
    row = cells(folder / "table_3.md")[0]
    assert row["AP50_voc"].startswith("0.0") and row["IoU"] == "n/a"
    endpoints = {test.endpoint for test in comparison.tests}
    assert "lesion/recall" in endpoints and "lesion/iou" not in endpoints


def test_latex_of_every_table(folds, split):
    tables = [path for _, folder, _ in (folds, split) for path in folder.glob("*.tex")]
    assert len(tables) == 6
    for path in tables:
        text = path.read_text()
        assert text.isascii() and f"tab:{path.stem}" in text
        assert text.count("{") == text.count("}") and text.count("$") % 2 == 0
        layout = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
        for row in re.findall(r"(?m)^(.*)\\\\$", text):
            assert len(re.split(r"(?<!\\)&", row)) == len(layout)
