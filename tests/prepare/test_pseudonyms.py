"""Keyed hashes as the standard has them; the key and the tables are their owner's only."""

import csv
import hashlib
import hmac
import stat

import pytest

from imrcnn_d2.data.prepare.deidentify import PrivateRejects, Pseudonyms
from imrcnn_d2.utils.files import BadInputError


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def names(tmp_path):
    return Pseudonyms(tmp_path / "safe" / "key", tmp_path / "out")


def test_a_name_is_the_keyed_hash(names, tmp_path):
    key = bytes.fromhex((tmp_path / "safe" / "key").read_text())
    assert len(key) == 32
    expected = hmac.digest(key, b"patient:KIS-4711", "sha256").hex()[:16]
    assert names("patient", "KIS-4711") == expected
    assert names("image", "KIS-4711") != expected
    assert hashlib.sha256(b"patient:KIS-4711").hexdigest()[:16] != expected
    other = Pseudonyms(tmp_path / "safe" / "other", tmp_path / "out")
    assert other("patient", "KIS-4711") != expected
    again = Pseudonyms(tmp_path / "safe" / "key", tmp_path / "out2")
    assert again("patient", "KIS-4711") == expected
    assert again.of_file("a/b.jpg") == names("image", "a/b.jpg") + ".png"


def test_the_table_grows(names, tmp_path):
    names("patient", "B,ö")
    names.write_table()
    again = Pseudonyms(tmp_path / "safe" / "key", tmp_path / "other")
    again("image", "a.png")
    again.write_table()
    with open(names.table, newline="", encoding="utf-8") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("image", "a.png", again("image", "a.png")),
        ("patient", "B,ö", names("patient", "B,ö")),
    ]
    assert mode(names.table) == mode(tmp_path / "safe" / "key") == 0o600
    assert sorted(p.name for p in (tmp_path / "safe").iterdir()) == ["key", "key.names.csv"]


def test_splits(names):
    new = names.of_file("a.jpg")
    assert names.of_splits({"train": ["a.jpg"], "val": [new]}) == {"train": [new], "val": [new]}


def test_keys_that_are_none(tmp_path):
    out, key = tmp_path / "out", tmp_path / "key"
    with pytest.raises(BadInputError, match="must not lie in the data set's folder"):
        Pseudonyms(out / "sub" / ".." / "key", out)
    assert not out.exists()
    for text, reason in (
        ("secret", "is no key file"),
        ("ab" * 16, "16 bytes, not 32"),
        ("00" * 32, "is no random key"),
        ("ab" * 32, "is no random key"),
    ):
        key.write_text(text)
        key.chmod(0o600)
        with pytest.raises(BadInputError, match=reason):
            Pseudonyms(key, out)
    key.write_text("ab" * 32)
    key.chmod(0o640)
    with pytest.raises(BadInputError, match="can be read by others: chmod 600"):
        Pseudonyms(key, out)
    (tmp_path / "link").symlink_to(out)
    out.mkdir()
    with pytest.raises(BadInputError, match="must not lie"):
        Pseudonyms(tmp_path / "link" / "key", out)
    (out / "key").symlink_to(tmp_path / "elsewhere")  # the tables would lie in the data set
    with pytest.raises(BadInputError, match="must not lie"):
        Pseudonyms(out / "key", out)


def test_rejects_name_nothing(names, tmp_path):
    rejects = PrivateRejects("reject", names)
    with rejects.catch():
        raise BadInputError("Musterfrau.jpg", "is no image, 12.08.1964")
    rejects.write_csv(tmp_path / "rejected.csv")
    text = (tmp_path / "rejected.csv").read_text()
    assert text == "number,reason\n1,listed beside the key\n"
    assert names.rejected.read_text() == 'file,reason\nMusterfrau.jpg,"is no image, 12.08.1964"\n'
    assert mode(names.rejected) == 0o600
    # of another data set with the same key
    other = PrivateRejects("reject", Pseudonyms(tmp_path / "safe" / "key", tmp_path / "out2"))
    other.write_csv(tmp_path / "rejected2.csv")
    assert "Musterfrau.jpg" in (tmp_path / "safe" / "key.out.rejected.csv").read_text()
    assert (tmp_path / "safe" / "key.out2.rejected.csv").read_text() == "file,reason\n"
