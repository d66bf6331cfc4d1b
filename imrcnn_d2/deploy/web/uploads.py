"""Uploaded files: each has a path that nothing else has, until it is looked at, or for an hour."""

import shutil
import tempfile
from pathlib import Path

__all__ = ["KEPT", "Uploads"]

KEPT = 3600  # seconds at most, where nothing comes and reads it


class Uploads:
    """
    The files of a folder that were uploaded and not looked at yet. No other file is ever taken.

    Attributes:
        folder (Path): where they lie.
    """

    def __init__(self, folder):
        """
        Args:
            folder (Path): empty.
        """
        self.folder = folder.resolve()
        self._waiting = set()

    def keep(self, files):
        """
        Args:
            files (list[BinaryIO]):

        Returns:
            list[str]: paths of copies.

        Raises:
            OSError: the disk is full; none is left.
        """
        paths = []
        try:
            for file in files:
                handle, path = tempfile.mkstemp(dir=self.folder)
                paths.append(path)
                self._waiting.add(path)
                with open(handle, "wb") as copy:
                    shutil.copyfileobj(file, copy)
        except BaseException:
            self.drop(paths)
            raise
        return paths

    def take(self, path):
        """
        Args:
            path (str): of :meth:`keep`.

        Returns:
            Path: the file, which is the caller's from now on.

        Raises:
            KeyError: there is no such upload, or it was taken before.
        """
        self._waiting.remove(path)
        return Path(path)

    def drop(self, paths):
        """
        Delete those that nobody took.

        Args:
            paths (list[str]):
        """
        for path in self._waiting.intersection(paths):
            self._waiting.discard(path)
            Path(path).unlink(missing_ok=True)
