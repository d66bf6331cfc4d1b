"""How often a test set was looked at: a line for each evaluation, beside the data set."""

import logging
import os
from datetime import datetime, timezone
from pathlib import Path

from ..data.csv_files import csv_line, read_rows

__all__ = ["TEST_LOG", "log_test_evaluation", "read_test_log"]

logger = logging.getLogger(__name__)

TEST_LOG = "test_evaluations.csv"
COLUMNS = ("date", "what", "sha256", "output")


def log_test_evaluation(gt_path, *, what, sha256, output):
    """
    Note that a test set was evaluated. Every look at it is a chance to choose what does well on it,
    so reports say how many there were.

    Appends a line to ``test_evaluations.csv`` beside ``splits.json`` where ``gt_path`` is the
    ``annotations/test.json`` of a prepared data set, and does nothing for any other file. A folder
    that cannot be written to is warned of, not fatal.

    Args:
        gt_path (str or Path or None): ground truth of the evaluation.
        what (str or Path): the checkpoint, or the results, that was evaluated.
        sha256 (str or None): of that file.
        output (str or Path): where the figures went.
    """
    path = _log_of(gt_path)
    if path is None:
        return
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = csv_line((date, Path(what).absolute(), sha256 or "", Path(output).absolute())).encode()
    try:
        with open(path, "ab", buffering=0, opener=_no_link) as file:
            # One write, at the end of the file: lines of evaluations at the same time stay whole.
            file.write(row if file.tell() else csv_line(COLUMNS).encode() + row)
    except OSError as error:
        logger.warning(f"{path}: this evaluation of the test set could not be noted ({error}).")


def read_test_log(gt_path):
    """
    Args:
        gt_path (str or Path): as of :func:`log_test_evaluation`.

    Returns:
        list[dict[str, str]]: date (UTC, ISO 8601), what, sha256 and output of each evaluation, in
            the order of time; empty if none was noted.

    Raises:
        ValueError: the log is no such table.
    """
    path = _log_of(gt_path)
    if path is None or not path.is_file():
        return []
    # Two first evaluations at once may both have written the header.
    return [row for row in read_rows(path, COLUMNS) if tuple(row.values()) != COLUMNS]


def _log_of(gt_path):
    """Path of the log, or None if this is not the test set of a prepared data set."""
    if gt_path is None:
        return None
    path = Path(gt_path).absolute()
    root = path.parent.parent
    is_test = (path.parent.name, path.name) == ("annotations", "test.json")
    return root / TEST_LOG if is_test and (root / "splits.json").is_file() else None


def _no_link(path, flags):
    """Of a data set from elsewhere, the log could be a link to any file, or a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
