import csv
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.evaluation.detection.curves import pr_curve
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.report.comparison import compare, gather, write_comparison
from imrcnn_d2.report.names import metric_name
from imrcnn_d2.report.runs import load_run

MODELS = {"MR-CNN": 0.6, "IMR-CNN": 0.9}


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(table):
    """[{column: cell}] of the first Markdown table in a text."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in body]


def write_in(folder, paths):
    """Compare runs and write the files, as (folder, comparison)."""
    comparison = compare(gather([load_run(path) for path in paths]), Bootstrap(50))
    files = write_comparison(comparison, folder / "out")
    assert sorted(files) == sorted((folder / "out").iterdir())
    return folder / "out", comparison


@pytest.fixture
def write(tmp_path):
    return lambda paths: write_in(tmp_path, paths)


@pytest.fixture(scope="module")
def split(tmp_path_factory, write_gt, write_run_in):
    """
    Two models on one split, one of them with two seeds, under the name of the paper's data, as
    (runs, folder, comparison).
    """
    root = tmp_path_factory.mktemp("split")
    gt, write_run = write_gt(root / "test.json"), write_run_in(root)
    options = dict(dataset="egc_test", tau_val=0.55)
    paths = [
        write_run("a", gt, model="MR-CNN", skill=0.6, **options),
        write_run("b0", gt, skill=0.9, **options),
        write_run("b1", gt, skill=0.9, seed=1, **options),
    ]
    return paths, *write_in(root, paths)


@pytest.fixture(scope="module")
def folds(tmp_path_factory, write_gt, write_run_in):
    """Two models on three folds, as (runs, folder, comparison)."""
    root = tmp_path_factory.mktemp("folds")
    write_run, paths = write_run_in(root), []
    for fold in range(3):
        gt = write_gt(root / f"fold{fold}.json", images=12, first=1 + 12 * fold)
        for model, skill in MODELS.items():
            options = dict(model=model, skill=skill, fold=(fold, 3), seed=fold)
            paths.append(write_run(f"{model}{fold}", gt, dataset="egc_test", **options))
    return paths, *write_in(root, paths)


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        ("segm/AP50_voc", "AP50_voc (masks)"),
        ("bbox/AP", "AP (boxes)"),
        ("lesion/iou", "IoU (masks)"),
        ("lesion/iou_box", "IoU (boxes)"),
        ("tau_val.lesion/f1", "F1 (lesions) at tau_val"),
        ("image/auroc", "AUROC (images)"),
        ("patient/recall", "recall (patients)"),
    ],
)
def test_names(endpoint, name):
    assert metric_name(endpoint) == name


def test_all_files_of_one_split(split):
    paths, folder, comparison = split
    names = {path.name for path in folder.iterdir()}
    tables = {
        f"{t}.{s}" for t in ("table_3", "table_5", "differences") for s in ("md", "csv", "tex")
    }
    figures = {f"figure_4{of}.{s}" for of in ("", "_boxes") for s in ("png", "svg")}
    assert names == {"comparison.md", "comparison.json"} | tables | figures
    for name in ("figure_4.png", "figure_4_boxes.png"):
        with Image.open(folder / name) as image:
            image.load()
    page = (folder / "comparison.md").read_text()
    for table in ("table_3", "table_5", "differences"):
        assert (folder / f"{table}.md").read_text() in page
    assert "![Precision-recall curves](figure_4.png)" in page
    assert "mean over IoU 0.50 to 0.95" in page and "Sci Rep 14:7847" in page
    assert "50 resamples of images with seed 0" in page


def test_table_3(split):
    paths, folder, comparison = split
    table = cells((folder / "table_3.md").read_text())
    results = load_run(paths[0]).results
    low, high = comparison.models["MR-CNN"].intervals["bbox"]["AP50_voc"]
    boxes = next(row for row in table if (row["model"], row["regions"]) == ("MR-CNN", "boxes"))
    assert boxes["AP50_voc"] == f"{results.bbox['AP50_voc']:.1f} [{low:.1f}, {high:.1f}]"
    assert boxes["AP"] == f"{results.bbox['AP']:.1f}"
    assert boxes["IoU"].startswith(f"{results.lesion['iou_box']:.1f} [")
    seeds = [load_run(path).results.segm["AP50_voc"] for path in paths[1:]]
    masks = next(row for row in table if (row["model"], row["regions"]) == ("IMR-CNN", "masks"))
    assert masks["AP50_voc"].startswith(f"{np.mean(seeds):.1f} ± {np.std(seeds):.1f} [")
    published = [row for row in table if row["regions"] == "not stated"]
    assert [(row["model"], row["AP50_voc"], row["IoU"]) for row in published] == [
        ("MR-CNN, published", "90.7", "78.3"),
        ("IBMR-CNN, published", "91.5", "78.8"),
        ("IMR-CNN, published", "93.5", "79.1"),
    ]
    data = rows(folder / "table_3.csv")
    one = next(r for r in data if (r["model"], r["figure"]) == ("IMR-CNN", "segm/AP50_voc"))
    assert float(one["value"]) == pytest.approx(np.mean(seeds), rel=1e-12)
    assert float(one["sd_population"]) == pytest.approx(np.std(seeds))
    assert float(one["sd_sample"]) == pytest.approx(np.std(seeds, ddof=1))
    assert one["runs"] == "2"
    paper = next(r for r in data if r["source"] == "published" and r["model"] == "IMR-CNN")
    assert float(paper["value"]) == 93.5 and "AP50_voc" in paper["remarks"]


def test_table_5(split):
    paths, folder, _ = split
    table = cells((folder / "table_5.md").read_text())
    results = load_run(paths[0]).results
    for threshold, groups in (("0.7", results.groups()), ("tau_val = 0.55", results.tau_val)):
        for group, name in (("lesion", "lesions"), ("image", "images")):
            row = next(
                row
                for row in table
                if (row["model"], row["threshold"], row["cases"]) == ("MR-CNN", threshold, name)
            )
            for key in ("TP", "FP", "FN", "TN"):
                assert row[key] == f"{groups[group][key]:.0f}"
            for key in ("precision", "recall", "specificity", "accuracy", "f1"):
                cell = row["F1" if key == "f1" else key]
                assert cell.partition(" ")[0] == f"{groups[group][key]:.1f}"
    paper = table[-1]
    assert paper["model"] == "IMR-CNN, published"
    assert (paper["precision"], paper["F1"]) == ("92.9", "94.1")
    assert (paper["specificity"], paper["accuracy"]) == ("92.5 †", "93.9 †")
    assert "- † Published, not comparable: " in (folder / "table_5.md").read_text()
    marked = {r["figure"] for r in rows(folder / "table_5.csv") if r["comparable"] == "False"}
    assert marked == {"lesion/specificity", "lesion/accuracy"}


def test_differences(split):
    paths, folder, comparison = split
    table = cells((folder / "differences.md").read_text())
    data = rows(folder / "differences.csv")
    assert len(table) == len(data) == len(comparison.tests)
    first = comparison.tests[0]
    assert table[0]["metric"] == "AP50_voc (masks) (primary)"
    assert table[0]["models"] == "IMR-CNN − MR-CNN" and table[0]["p (Holm)"] == ""
    numbers = [f"{n:.1f}".replace("-", "−") for n in (first.estimate, first.low, first.high)]
    assert table[0]["difference"] == "{} [{}, {}]".format(*numbers)
    assert float(data[0]["p"]) == first.p and data[0]["primary"] == "True"


def test_json(split):
    paths, folder, comparison = split
    text = (folder / "comparison.json").read_text()
    document = json.loads(text, parse_constant=refuse)
    model = document["models"]["MR-CNN"]
    results = load_run(paths[0]).results
    assert model["figures"]["lesion"]["TP"] == results.lesion["TP"]
    assert model["figures"]["segm"]["APl"] is None and math.isnan(results.segm["APl"])
    assert [len(one["runs"]) for one in document["models"].values()] == [1, 2]
    assert [run["seed"] for run in document["runs"]] == [0, 0, 1]
    assert len(document["tests"]) == len(comparison.tests)
    assert document["settings"]["resamples"] == 50


@pytest.mark.slow
def test_table_4(folds):
    paths, folder, comparison = folds
    values = [load_run(path).results.segm["AP50_voc"] for path in paths[1::2]]
    table = cells((folder / "table_4.md").read_text())
    key = ("IMR-CNN", "AP50_voc (masks)")
    row = next(row for row in table if (row["model"], row["metric"]) == key)
    assert [row[f"fold {i}"] for i in range(3)] == [f"{value:.1f}" for value in values]
    assert row["mean ± sd"] == f"{np.mean(values):.1f} ± {np.std(values):.1f}"
    assert [row["mean ± sd"] for row in table if "published" in row["model"]] == [
        "90.6 ± 0.4",
        "78.4 ± 0.2",
        "91.5 ± 0.4",
        "78.8 ± 0.3",
        "93.5 ± 0.5",
        "79.0 ± 0.3",
    ]
    (data,) = [
        row
        for row in rows(folder / "table_4.csv")
        if (row["model"], row["figure"], row["source"])
        == ("IMR-CNN", "segm/AP50_voc", "this comparison")
    ]
    assert float(data["sd_sample"]) == pytest.approx(np.std(values, ddof=1))
    assert float(data["fold_2"]) == pytest.approx(values[2])
    assert len(rows(folder / "table_4_tests.csv")) == len(comparison.fold_tests) > 0
    tests = (folder / "table_4_tests.md").read_text()
    assert "n_test / n_train = 12 / 64" in tests and "for validation left out" in tests


def test_folds_alone_are_pooled(folds):
    """Table 5 adds up; Figure 4 ranks the detections of all folds together."""
    paths, folder, _ = folds
    results = [load_run(path).results for path in paths[::2]]
    row = next(
        row
        for row in cells((folder / "table_5.md").read_text())
        if (row["model"], row["cases"]) == ("MR-CNN", "lesions")
    )
    tp, fp = (sum(one.lesion[key] for one in results) for key in ("TP", "FP"))
    assert row["TP"] == f"{tp:.0f}" and row["precision"] == f"{100 * tp / (tp + fp):.1f}"
    curves = [next(c for kind, _, c in one.curves if kind == "segm") for one in results]
    score = np.concatenate([curve.score for curve in curves])
    hit = np.concatenate([np.diff(curve.tp, prepend=0) for curve in curves]) == 1
    pooled = pr_curve(score, hit, sum(curve.num_gt for curve in curves))
    label = f"MR-CNN (3 folds pooled): AP50_voc {100 * pooled.area:.1f}"
    # In an SVG the words are shapes, with the text as a comment.
    assert label in (folder / "figure_4.svg").read_text()
    assert not (folder / "table_3.md").exists()


@pytest.mark.slow
def test_several_classes(tmp_path, write_gt, write_run, write):
    gt = write_gt(tmp_path / "gt.json", images=40, classes=("cancer", "ulcer"), per_patient=4)
    paths = [
        write_run(model, gt, model=model, skill=skill, dataset="own_test")
        for model, skill in MODELS.items()
    ]
    folder, comparison = write(paths)
    picture = (folder / "figure_4.svg").read_text()
    assert picture.count("<!-- MR-CNN: AP50_voc") == 2
    for name in ("cancer", "ulcer"):
        assert f"<!-- Precision and recall, masks at IoU 0.5: {name} -->" in picture
    curves = [c for kind, _, c in load_run(paths[0]).results.curves if kind == "segm"]
    mean = 100 * np.mean([curve.area for curve in curves])
    table = cells((folder / "table_3.md").read_text())
    assert table[0]["AP50_voc"].startswith(f"{mean:.1f} [")
    # Patients have four images each: the bootstrap knows, McNemar's test does not.
    differences = (folder / "differences.md").read_text()
    assert "McNemar's test takes images for independent" in differences
    assert "50 resamples of patients" in (folder / "comparison.md").read_text()
    assert {row["cases"] for row in cells((folder / "table_5.md").read_text())} == {
        "lesions",
        "images",
        "patients",
    }
    # Other data than the paper's: nothing published beside it.
    assert "published" not in (folder / "comparison.md").read_text().lower()


def test_the_curve_of_several_seeds_is_the_median_run(tmp_path, write_gt, write_run, write):
    gt = write_gt(tmp_path / "gt.json")
    paths = [write_run(f"{s}", gt, seed=s, skill=k) for s, k in enumerate((0.5, 0.9, 0.7))]
    folder, _ = write(paths)
    areas = sorted(load_run(path).results.segm["AP50_voc"] for path in paths)
    label = f"IMR-CNN (median of 3 runs): AP50_voc {areas[1]:.1f}"
    assert label in (folder / "figure_4.svg").read_text()


def test_one_model_without_a_detection(tmp_path, write_gt, write_run, write):
    gt = write_gt(tmp_path / "gt.json")
    paths = [write_run("none", gt, model="none", dt=[]), write_run("some", gt, model="some")]
    folder, comparison = write(paths)
    row = cells((folder / "table_3.md").read_text())[0]
    assert row["AP50_voc"].startswith("0.0") and row["IoU"] == "n/a"
    assert {test.endpoint for test in comparison.tests} & {"lesion/recall", "lesion/iou"} == {
        "lesion/recall"
    }


def test_latex_of_every_table(folds, split):
    tables = [path for _, folder, _ in (folds, split) for path in folder.glob("*.tex")]
    assert len(tables) == 6
    for path in tables:
        text = path.read_text()
        assert text.isascii()
        assert text.count("{") == text.count("}") and text.count("$") % 2 == 0
        layout = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
        for row in re.findall(r"(?m)^(.*)\\\\$", text):
            assert len(re.split(r"(?<!\\)&", row)) == len(layout)
        assert "tab:" + path.stem in text
