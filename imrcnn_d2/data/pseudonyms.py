"""New names for what leads back to a person: keyed hashes, and tables that stay with the key."""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from imrcnn_d2.data.csv_files import csv_lines, read_rows
from imrcnn_d2.data.files import regular_file
from imrcnn_d2.data.rejects import BadInputError, Rejects

__all__ = ["PrivateRejects", "Pseudonyms"]

_HEX_DIGITS = 16  # of a new name: 64 bits, so that two of a million images hardly share one
_KEY_BYTES = 32


class Pseudonyms:
    """New names for images, patients and lesions, by HMAC-SHA256 (RFC 2104) with a key.

    The same name gets the same new one with the same key. Which became which is written to
    a table beside the key: whoever has either can lead the data set back to its patients.

    Args:
        key_file: 64 hexadecimal digits; made, readable by its owner only, if it does not exist.
        out: the data set's folder, in which neither file may lie.

    Attributes:
        table: the file with which became which, grown by `write_table`.
        rejected: beside it, named after `out` too, for the list of what was left out.

    Raises:
        BadInputError: the file holds no key, others can read it, or it lies in `out`.
    """

    def __init__(self, key_file: Path, out: Path):
        beside = key_file.parent.resolve() / key_file.name  # where the tables go, if it is a link
        if out.resolve() in (*key_file.resolve().parents, *beside.parents):
            raise BadInputError(key_file, f"the key must not lie in the data set's folder {out}")
        self._key = _read_or_make_key(key_file)
        self.table = key_file.with_name(f"{key_file.name}.names.csv")
        self.rejected = key_file.with_name(f"{key_file.name}.{out.resolve().name}.rejected.csv")
        self._new: dict[tuple[str, str], str] = {}

    def __call__(self, kind: str, name: str) -> str:
        """Sixteen hexadecimal digits.

        Args:
            kind: "image", "patient" or "lesion", which have names of their own.
            name: the one to replace.
        """
        digest = hmac.new(self._key, f"{kind}:{name}".encode(), hashlib.sha256).hexdigest()
        new = self._new[kind, name] = digest[:_HEX_DIGITS]
        return new

    def of_file(self, name: str) -> str:
        """A new file name, ".png", for one as a data set has it."""
        return f"{self('image', name)}.png"

    def of_splits(self, splits: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Splits of old names as splits of new ones; names that are new already stay."""
        new = re.compile(rf"[0-9a-f]{{{_HEX_DIGITS}}}\.png")
        return {
            split: [name if new.fullmatch(name) else self.of_file(name) for name in names]
            for split, names in splits.items()
        }

    def write_table(self) -> None:
        """Adds the names given so far to the table: kind, old, new."""
        rows = dict(self._new)
        if self.table.exists():
            there = read_rows(self.table, ("kind", "old", "new"))
            rows |= {(row["kind"], row["old"]): row["new"] for row in there}
        lines = [("kind", "old", "new"), *((*key, new) for key, new in sorted(rows.items()))]
        _write_private(self.table, lines)


class PrivateRejects(Rejects):
    """Rejects that name no file in the data set: the list with names lies beside the key.

    Args:
        on_error: "raise" or "reject".
        names: whose key it is.
        follow_links: see `Rejects`.
    """

    def __init__(self, on_error: str, names: Pseudonyms, follow_links: bool = False):
        super().__init__(on_error, follow_links)
        self._private = names.rejected

    def write_csv(self, path: Path) -> None:
        """Writes how many there are to `path`, and the list itself beside the key."""
        rows = [(error.file, error.reason) for error in self.errors]
        _write_private(self._private, [("file", "reason"), *rows])
        numbered = [(n, "listed beside the key") for n in range(1, len(rows) + 1)]
        path.write_text(csv_lines([("number", "reason"), *numbered]), encoding="utf-8")


def _read_or_make_key(path: Path) -> bytes:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        key = secrets.token_bytes(_KEY_BYTES)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(key.hex() + "\n")
        return key
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise BadInputError(path, "the key can be read by others: chmod 600 it")
    try:
        key = bytes.fromhex(regular_file(path).read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise BadInputError(path, f"is no key file ({error})") from error
    if len(key) != _KEY_BYTES:
        raise BadInputError(path, f"is no key file: it has {len(key)} bytes, not {_KEY_BYTES}")
    if len(set(key)) < _KEY_BYTES // 4:  # of random bytes, more differ: all zero, or one repeated
        raise BadInputError(path, "is no random key, which can be guessed; let a new one be made")
    return key


def _write_private(path: Path, rows: Sequence[Sequence]) -> None:
    """A table that its owner only can read, replaced at once or not at all."""
    descriptor, beside = tempfile.mkstemp(prefix=".", dir=path.parent)  # readable by its owner only
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(csv_lines(rows))
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
