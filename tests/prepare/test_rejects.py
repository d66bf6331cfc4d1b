import csv
import pickle

import pytest

from imrcnn_d2.utils.files import BadInputError, Rejects, for_terminal


def test_raise_stops_at_the_first():
    rejects = Rejects("raise")
    with pytest.raises(BadInputError, match="^a.jpg: is cut$"), rejects.catch():
        raise BadInputError("a.jpg", "is cut")
    assert rejects.errors == []


def test_reject_lists_and_goes_on(tmp_path):
    rejects = Rejects("reject")
    for name in ("a.jpg", "b, c.jpg"):
        with rejects.catch():
            raise BadInputError(name, 'says "no"')
    rejects.write_csv(tmp_path / "rejected.csv")
    with open(tmp_path / "rejected.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["file", "reason"], ["a.jpg", 'says "no"'], ["b, c.jpg", 'says "no"']]


def test_other_errors_are_never_swallowed():
    with pytest.raises(ZeroDivisionError), Rejects("reject").catch():
        1 / 0  # noqa: B018


def test_unknown_policy():
    with pytest.raises(ValueError, match="'ignore'; choose 'raise' or 'reject'"):
        Rejects("ignore")


def test_it_comes_back_from_another_process():
    error = pickle.loads(pickle.dumps(BadInputError("a.jpg", "is cut")))
    assert (error.file, error.reason, str(error)) == ("a.jpg", "is cut", "a.jpg: is cut")


def test_a_terminal_gets_no_commands():
    """Names in files can hold the escapes that colour, erase and reverse what is shown."""
    name = "a\x1b[2J\x9b\u202egnp\udcff.jpg"
    assert for_terminal(f"é\n{name}") == r"é" + "\n" + r"a\x1b[2J\x9b\u202egnp\udcff.jpg"
    assert str(BadInputError(name, "is bad")) == r"a\x1b[2J\x9b\u202egnp\udcff.jpg: is bad"
    assert BadInputError(name, "is bad").file == name
