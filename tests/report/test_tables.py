import io
import re

import pandas as pd
import pytest

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
    ("arguments", "text"),
    [
        (("iou", 87.66, (83.02, 91.47)), "87.7 [83.0, 91.5]"),
        (("iou", 87.66, (NAN, NAN)), "87.7"),
        (("iou", NAN, (1, 2)), "n/a"),
        (("TP", 12.0), "12"),
        (("TP", 12.5), "12.5"),
        (("iou", -0.04), "0.0"),
        (("", -1.26, (-3, 0.5)), "−1.3 [−3.0, 0.5]"),
    ],
)
def test_figures(arguments, text):
    assert format_value(*arguments) == text


def test_standard_deviations():
    assert format_value("iou", 87.66, (83, 91), sd=0.44) == "87.7 ± 0.4 [83.0, 91.0]"
    assert format_value("iou", 87.66, sd=NAN) == "87.7"
    assert format_value("TP", 8.0, sd=NAN) == "8"
    assert format_value("TP", 8.0, sd=1.5) == "8.0 ± 1.5"


@pytest.fixture
def table():
    cells = pd.DataFrame({"model": ["a_b & c", "d|e"], "AP50_voc": ["87.7 ± 0.4", "92.5 †"]})
    data = pd.DataFrame({"model": ["a_b & c", "d|e"], "value": [87.71234567891234, NAN]})
    return Table("table_9", "50 % of AP50_voc, τ ≥ 0.7", cells, data, ("p < 5 %", "Second."))


def test_the_three_files(table, tmp_path):
    paths = write_table(table, tmp_path / "new")
    assert [path.name for path in paths] == ["table_9.md", "table_9.csv", "table_9.tex"]
    assert pd.read_csv(paths[1]).equals(table.data)
    assert paths[0].read_text().splitlines() == [
        "**50 % of AP50_voc, τ ≥ 0.7**",
        "",
        "| model   |   AP50_voc |",
        "|:--------|-----------:|",
        "| a_b & c | 87.7 ± 0.4 |",
        r"| d\|e    |     92.5 † |",
        "",
        "- p < 5 %",
        "- Second.",
    ]


def check_latex(text):
    """
    What pdflatex would stumble over: characters it does not know, special ones as they are,
    environments and braces that do not close, rows of another length than the layout.
    """
    assert text.isascii()
    body = re.sub(r"(?m)^%.*$", "", text)
    plain = re.sub(r"\$[^$]*\$", "", re.sub(r"\\[&%$#_{}\\]", "", body))
    assert "$" not in plain and "_" not in re.sub(r"\\label\{[^}]*\}", "", plain)
    assert plain.count("{") == plain.count("}")
    opened = re.findall(r"\\begin\{(\w+)\}", body)
    assert opened == list(reversed(re.findall(r"\\end\{(\w+)\}", body)))
    layout = re.search(r"\\begin\{tabular\}\{([lr]+)\}", body)[1]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert rows
    for row in rows:
        assert len(re.split(r"(?<!\\)&", row)) == len(layout)


def test_latex(table):
    text = table.latex()
    check_latex(text)
    assert r"\caption{50 \% of AP50\_voc, $\tau$ $\geq$ 0.7}" in text
    assert r"a\_b \& c & 87.7 $\pm$ 0.4 \\" in text
    assert r"d$|$e & 92.5 \dag{} \\" in text
    assert r"\par p $<$ 5 \%" in text
    assert [line for line in text.splitlines() if "rule" in line] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
    ]


def test_no_number_is_read_into_a_cell(table):
    """Cells are text: "1.50" stays so."""
    cells = pd.DataFrame({"a": ["1.50", "0007"]})
    lines = Table("t", "t", cells, cells, text_columns=0).markdown().splitlines()
    assert lines[4:6] == ["| 1.50 |", "| 0007 |"]
    assert pd.read_csv(io.StringIO(cells.to_csv(index=False)), dtype=str).equals(cells)
