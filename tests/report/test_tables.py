"""Tables as Markdown, CSV and LaTeX, and the published values."""

import re

import pandas as pd
import pytest

from imrcnn_d2.report.names import PAPER_DATA, metric_name, published_accuracy, published_values
from imrcnn_d2.report.tables import Table, format_value, metrics_table, write_table

NAN = float("nan")


def test_a_table_of_groups():
    groups = {
        "lesion": {"TP": 12.0, "precision": 100 / 3, "iou": NAN},
        "image": {"TP": 3.0, "precision": 100.0, "auroc": 97.256},
    }
    intervals = {"image": {"auroc": (95, 99.005), "precision": (NAN, NAN)}}
    assert metrics_table(groups, intervals).splitlines() == [
        "|           |   lesion |                image |",
        "|:----------|---------:|---------------------:|",
        "| TP        |       12 |                    3 |",
        "| precision |    33.33 |               100.00 |",
        "| iou       |      n/a |                      |",
        "| auroc     |          | 97.26 [95.00, 99.00] |",
    ]


@pytest.mark.parametrize(
    ("arguments", "sd", "text"),
    [
        (("iou", 87.66, (NAN, NAN)), NAN, "87.7"),
        (("iou", NAN, (1, 2)), None, "n/a"),
        (("TP", 12.0), NAN, "12"),
        (("TP", 12.5), None, "12.5"),
        (("iou", -0.04), None, "0.0"),
        (("", -1.26, (-3, 0.5)), None, "−1.3 [−3.0, 0.5]"),
        (("iou", 87.66, (83, 91)), 0.44, "87.7 ± 0.4 [83.0, 91.0]"),
        (("TP", 8.0), 1.5, "8.0 ± 1.5"),
    ],
)
def test_values(arguments, sd, text):
    assert format_value(*arguments, sd=sd) == text


def test_the_three_files(tmp_path):
    cells = pd.DataFrame({"model": ["a_b & c", "d|e"], "AP50_voc": ["87.7 ± 0.4", "1.50 †"]})
    data = pd.DataFrame({"model": ["a_b & c", "d|e"], "value": [87.71234567891234, NAN]})
    table = Table("table_9", "50 % of AP50_voc, τ ≥ 0.7", cells, data, ("p < 5 %", "Second."))
    paths = markdown, csv, latex = write_table(table, tmp_path / "new")
    assert [path.name for path in paths] == [f"table_9.{kind}" for kind in ("md", "csv", "tex")]
    assert pd.read_csv(csv).equals(data)
    assert markdown.read_text().splitlines() == [
        "**50 % of AP50_voc, τ ≥ 0.7**",
        "",
        "| model   |   AP50_voc |",
        "|:--------|-----------:|",
        "| a_b & c | 87.7 ± 0.4 |",
        r"| d\|e    |     1.50 † |",
        "",
        "- p < 5 %",
        "- Second.",
    ]
    text = latex.read_text()
    assert text.isascii()
    opened = re.findall(r"\\begin\{(\w+)\}", text)
    assert opened == re.findall(r"\\end\{(\w+)\}", text)[::-1] and "tabular" in opened
    assert r"\begin{tabular}{lr}" in text
    assert r"\caption{50 \% of AP50\_voc, $\tau$ $\geq$ 0.7}" in text
    assert r"model & AP50\_voc \\" in text
    assert r"a\_b \& c & 87.7 $\pm$ 0.4 \\" in text
    assert r"d$|$e & 1.50 \dag{} \\" in text
    assert r"\par p $<$ 5 \%" in text
    assert re.findall(r"\\\w+rule", text) == [r"\toprule", r"\midrule", r"\bottomrule"]


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        ("segm/AP50_voc", "AP50_voc (masks)"),
        ("lesion/iou_box", "IoU (boxes)"),
        ("tau_val.lesion/f1", "F1 (lesions) at tau_val"),
        ("image/auroc", "AUROC (images)"),
        ("patient/recall", "recall (patients)"),
    ],
)
def test_names(endpoint, name):
    assert metric_name(endpoint) == name


def published(dataset, table):
    rows = published_values(dataset, table)
    return {(row.model, row.figure): (row.value, row.sd) for row in rows}


def test_published_values_of_the_data_set():
    assert published("kvasir_seg_test", "3")["IMR-CNN", "segm/AP50_voc"] == (91.6, None)
    assert published("egc_val", "3")["IMR-CNN", "lesion/iou"] == (79.1, None)
    assert published("egc_test", "4")["MR-CNN", "segm/AP50_voc"] == (90.6, 0.4)
    assert len(published("kvasir_seg_test", "3")) == len(published("egc_test", "4")) == 6
    # The paper has neither folds nor an operating point for Kvasir-SEG.
    assert not published("kvasir_seg_test", "4") and not published("kvasir_seg_test", "5")
    for dataset in (None, "", "synthetic_test", "kvasir_segment", "egc2_test"):
        assert not any(published_values(dataset, table) for table in "345")
    five = published("egc_test", "5")
    metrics = [f"lesion/{name}" for name in ("precision", "recall", "f1")]
    precision, recall, f1 = (five["IMR-CNN", metric][0] for metric in metrics)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=0.06)
    # What cannot be compared is marked.
    rows = [
        r for data in PAPER_DATA for table in "345" for r in published_values(f"{data}_test", table)
    ]
    assert all(row.comparable == ("Not comparable" not in row.remarks[0]) for row in rows)
    marked = {row.figure for row in published_values("egc_test", "5") if not row.comparable}
    assert marked == {"lesion/specificity", "lesion/accuracy"}


def test_published_accuracy_is_of_that_data_only():
    classes = ["gastric cancer", "gastric ulcer", "chronic gastritis"]
    assert published_accuracy("gastric_recognition_test", classes)["gastric ulcer"] == 92
    assert published_accuracy("own_test", classes) == published_accuracy(None, classes) == {}
    for names in (["polyp", "ulcer", "gastritis"], [*classes, "normal"]):
        assert published_accuracy("gastric_recognition_test", names) == {}
