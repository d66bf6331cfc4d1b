"""A line for each look at a test set."""

import csv
import hashlib
import os
from datetime import datetime, timedelta, timezone

import pytest

from imrcnn_d2.evaluation.output import log_test_evaluation, read_test_log


@pytest.fixture
def root(tmp_path):
    """A prepared data set, as far as the log sees it."""
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    (tmp_path / "set" / "splits.json").write_text("{}")
    return tmp_path / "set"


def test_each_evaluation_is_a_line(root, tmp_path):
    gt = root / "annotations" / "test.json"
    before = datetime.now(timezone.utc) - timedelta(seconds=1)  # the log has whole seconds
    digests = [hashlib.sha256(bytes([i])).hexdigest() for i in range(2)]
    for digest in digests:
        log_test_evaluation(gt, what="a, b.pth", sha256=digest, output=tmp_path / "out")
    log_test_evaluation(str(gt), what="masks", sha256=None, output="out")
    with open(root / "test_evaluations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sha256"] for row in rows] == [*digests, ""]
    assert read_test_log(gt) == rows
    assert rows[0]["what"].endswith("/a, b.pth") and rows[0]["output"] == str(tmp_path / "out")
    date = datetime.fromisoformat(rows[-1]["date"])
    assert before <= date <= datetime.now(timezone.utc)


def test_only_the_test_part_of_a_prepared_data_set_is_logged(root, tmp_path):
    foreign = tmp_path / "annotations" / "test.json"
    for gt in (root / "annotations" / "val.json", root / "test.json", foreign, None):
        log_test_evaluation(gt, what="x", sha256="y", output="z")
        assert read_test_log(gt) == []
    assert not list(tmp_path.rglob("test_evaluations.csv"))


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_cannot_be_written_to_is_warned_of(root, caplog, kind):
    gt, log = root / "annotations" / "test.json", root / "test_evaluations.csv"
    if kind == "folder":
        log.mkdir()  # also root cannot append to a folder
    elif kind == "link":
        log.symlink_to(
            root / "splits.json"
        )  # as a data set from elsewhere may hold one, to any file
    else:
        os.mkfifo(log)
    log_test_evaluation(gt, what="x", sha256="y", output="z")
    assert (root / "splits.json").read_text() == "{}"
    assert str(root / "test_evaluations.csv") in caplog.text
    assert caplog.records[0].levelname == "WARNING"
