"""Tables as people bring them: what is read, typed and refused."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imrcnn_d2.data.prepare.metadata import not_numbers, read_table, typed
from imrcnn_d2.utils.files import BadInputError


@pytest.fixture
def table(tmp_path):
    """A function that writes text as a table."""

    def write(text, encoding="utf-8"):
        path = tmp_path / "table.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_as_spreadsheets_write_it(table, separator, newline):
    lines = ["file,note,,", 'a.png,"two\nlines",,', "", ",,,", " b.png ,,", 'c.png,"a;b\t,c"']
    text = newline.join(lines)
    if separator != ",":
        quoted = '"a;b\t,c"'
        text = text.replace(quoted, "Q").replace(",", separator).replace("Q", quoted)
    read = read_table(table("\ufeff" + text), ["file"])
    assert (read.columns, read.separator) == (["file", "note"], separator)
    assert [row.cells for row in read.rows] == [
        {"file": "a.png", "note": "two\nlines"},
        {"file": "b.png", "note": ""},
        {"file": "c.png", "note": "a;b\t,c"},
    ]
    assert read.where(read.rows[1]).endswith("table.csv, line 6")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the columns file; it has none"),
        ("name,x\n", "lacks the columns file; it has name, x"),
        ("file,x,x\n", "two columns are named 'x'"),
        ("file,,x\n", "a column has no name"),
        ("file,x\na,1\nb,2,3\n", "line 3 has 3 cells, the first line names 2 columns; put text"),
        ('file\n"' + "a" * 200_000 + '"\n', "line 2: field larger"),
    ],
)
def test_no_table(table, text, message):
    with pytest.raises(BadInputError, match=message):
        read_table(table(text), ["file"])


def test_unreadable(table, tmp_path):
    with pytest.raises(BadInputError, match="cannot be read as a table in UTF-8"):
        read_table(table("file,ä\n", "latin-1"))
    with pytest.raises(BadInputError, match="No such file"):
        read_table(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["1", "", "-20"], [1, None, -20]),
        (["1", "2.5", "1e3"], [1.0, 2.5, 1000.0]),
        (["007", "12"], ["007", "12"]),
        (["True", "false", ""], [True, False, None]),
        (["true", "1"], ["true", "1"]),
        (["yes", ""], ["yes", None]),
        (["nan", "1"], ["nan", "1"]),
        (["1e999", "1"], ["1e999", "1"]),
        (["1_000", "1"], ["1_000", "1"]),
        (["١", "2"], ["١", "2"]),
        (["9" * 5000], ["9" * 5000]),
        (["3,5"], ["3,5"]),
        (["", ""], [None, None]),
        ([], []),
    ],
)
def test_types(texts, values):
    got = typed(texts)
    assert got == values and list(map(type, got)) == list(map(type, values))


def test_decimal_commas():
    assert typed(["3,5", "4", "5.5"], ";") == [3.5, 4.0, 5.5]
    assert typed(["1,000,5"], ";") == ["1,000,5"]


def test_what_keeps_a_column_from_being_numbers():
    assert not_numbers(["1", "2", "", "NA", "4"]) == [3]
    assert not_numbers(["1", "2"]) == []
    assert not_numbers(["a", "b", "3"]) == []  # of words
    assert not_numbers(["1,5", "2", "x"], ";") == [2]


@given(st.lists(st.one_of(st.integers(-(10**12), 10**12), st.none())))
def test_integers_come_back(values):
    assert typed(["" if value is None else str(value) for value in values]) == values


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x % 1), min_size=1)
)
def test_floats_come_back(values):
    assert typed([repr(value) for value in values]) == values


words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)


@given(st.lists(st.lists(words, min_size=2, max_size=2), min_size=1), st.sampled_from(",;\t"))
def test_cells_come_back(tmp_path_factory, rows, separator):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator).writerows([["a", "b"], *rows])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    assert [list(row.cells.values()) for row in read_table(path).rows] == rows
