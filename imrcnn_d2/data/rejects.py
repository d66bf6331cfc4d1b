"""What happens to bad input: an error at once, or a list of rejects."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from imrcnn_d2.data.csv_files import csv_lines

__all__ = ["BadInputError", "Rejects", "for_terminal"]

# What a terminal obeys, what turns the direction of writing, and bytes of file names that are no
# UTF-8; not the end of a line.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def for_terminal(text: object) -> str:
    """The text with control characters, which names in files can hold, as ``\\x1b`` and so on."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], str(text))


class BadInputError(ValueError):
    """An image, mask or annotation that cannot be used; names the file and the reason."""

    def __init__(self, file: str | Path, reason: str):
        super().__init__(for_terminal(f"{file}: {reason}"))
        self.file = str(file)
        self.reason = reason

    def __reduce__(self):  # else it could not come back from another process
        return type(self), (self.file, self.reason)


class Rejects:
    """Collects bad input under ``on_error="reject"``; under "raise" the first one stops the run.

    Args:
        on_error: "raise" or "reject".
        follow_links: whether links inside a folder of the user may lead out of it.
    """

    def __init__(self, on_error: str = "raise", follow_links: bool = False):
        if on_error not in ("raise", "reject"):
            raise ValueError(f"on_error is {on_error!r}; choose 'raise' or 'reject'")
        self.on_error, self.follow_links = on_error, follow_links
        self.errors: list[BadInputError] = []

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        """Ends the block at a `BadInputError`; if rejecting, lists it and goes on after it."""
        try:
            yield
        except BadInputError as error:
            if self.on_error == "raise":
                raise
            self.errors.append(error)

    def write_csv(self, path: Path) -> None:
        """Writes columns ``file, reason``, one row a reject, in the order met."""
        rows = [("file", "reason"), *((error.file, error.reason) for error in self.errors)]
        path.write_text(csv_lines(rows), encoding="utf-8", newline="")
