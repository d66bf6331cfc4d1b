"""Opening files of others: regular ones only."""

import os
import stat
from pathlib import Path

from imrcnn_d2.data.rejects import BadInputError

__all__ = ["regular_file"]


def regular_file(path: Path) -> Path:
    """Returns `path`, which is a file whose end comes; nothing else is opened.

    Raises:
        BadInputError: there is no such file, or it is a folder, pipe, socket or device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInputError(path, f"cannot be opened: {reason}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise BadInputError(path, f"cannot be opened: is {kind}, not a file; give a copy as a file")
    return path
