"""JSON that others wrote: what is strict passes, all else names the file."""

import pytest

from imrcnn_d2.utils import files as json_files
from imrcnn_d2.utils.files import BadInputError, read_json


def test_strict_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, "\\u00e9\\ud83d\\ude00", null]}', encoding="utf-8-sig")
    assert read_json(path) == {"a": [1, 2.5, "é😀", None]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is no JSON"),
        (b"[NaN]", "NaN is no JSON value, write null"),
        (b"[1e999]", "the number 1e999 is out of range"),
        (b"[-1" + b"0" * 400 + b"]", "the number -1000000000000000000... is out of range"),
        (b'["\\ud800"]', "broken text: surrogates not allowed"),
        (b'["\xff"]', "is no JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"", "is no JSON"),
        (b'{"annotations": [1], "x": 0, "annotations": []}', "the key 'annotations' is there 2"),
        (b'[{"a": {"\\u0061": 1, "a": 2}}]', "the key 'a' is there 2"),
    ],
)
def test_bad_json(tmp_path, data, message):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=f"a.json: .*{message}"):
        read_json(path)
    with pytest.raises(BadInputError, match="b.json: cannot be opened"):
        read_json(tmp_path / "b.json")


def test_size_is_bounded(tmp_path, monkeypatch):
    """Empty lists take many times the memory of their text."""
    path = tmp_path / "a.json"
    path.write_text("[[], {}]")
    monkeypatch.setattr(json_files, "_MOST_CONTAINERS", 2)
    with pytest.raises(BadInputError, match="a.json: has more than 2 lists and objects"):
        read_json(path)
    monkeypatch.setattr(json_files, "_MOST_BYTES", 7)
    with pytest.raises(BadInputError, match="a.json: is larger than 7 bytes"):
        read_json(path)
