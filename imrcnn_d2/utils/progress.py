"""Progress of long work: a bar on a terminal, now and then a line in a log."""

import sys
import time

import tqdm as _tqdm


class tqdm(_tqdm.tqdm):
    """tqdm's bar, with its arguments; where stderr is no terminal, one line per minute, since a bar
    that is redrawn floods a file.
    """

    def __init__(self, *args, **options):
        if not sys.stderr.isatty():
            options |= {"file": _Log(), "ascii": True}
        super().__init__(*args, **options)


class _Log:
    """The file of a bar that writes its state to stderr as a line, at most once per `PERIOD`."""

    PERIOD = 60  # seconds

    def __init__(self):
        self._next = time.monotonic() + self.PERIOD

    def write(self, text: str) -> None:
        line = text.strip()
        if line and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.PERIOD
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
