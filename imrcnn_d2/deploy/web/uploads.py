"""Uploaded files: each has a path that nothing else has, until it is looked at, or for an hour."""

import contextlib
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from imrcnn_d2.evaluation.files import lock_folder

__all__ = ["KEPT", "Uploads", "upload_folder"]

KEPT = 3600  # seconds at most, where nothing comes and reads it
MAX_WAITING, MAX_WAITING_MB = 1000, 2000  # files, and of all together: then the oldest go
_PREFIX = "imrcnn-uploads-"


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """Yields an empty folder, which is gone at the end; those of pages that were killed go now."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        folder = Path(name)
        lock = lock_folder(folder, "temporary folder")  # which ends with the process
        try:
            for other in folder.parent.glob(f"{_PREFIX}*"):
                with contextlib.suppress(OSError, ValueError):  # it is in use, or gone by now
                    status = other.lstat()
                    if stat.S_ISDIR(status.st_mode) and status.st_uid == folder.stat().st_uid:
                        left = lock_folder(other, "temporary folder")
                        shutil.rmtree(other, ignore_errors=True)
                        left.release()
            files = folder / "files"
            files.mkdir(mode=0o700)
            yield files
        finally:
            lock.release()


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
        self._waiting = {}  # path -> bytes, the oldest first

    def keep(self, files):
        """
        Args:
            files (list[BinaryIO]):

        Returns:
            list[str]: paths of copies. For these, the oldest ones that wait may have been deleted.

        Raises:
            OSError: the disk is full; none is left.
        """
        paths = []
        try:
            for file in files:
                handle, path = tempfile.mkstemp(dir=self.folder)
                paths.append(path)
                self._waiting[path] = 0
                with open(handle, "wb") as copy:
                    shutil.copyfileobj(file, copy)
                    self._waiting[path] = copy.tell()
        except BaseException:
            self.drop(paths)
            raise
        self._drop_oldest()
        return paths

    def _drop_oldest(self):
        waiting = list(self._waiting.items())
        number, size = len(waiting), sum(size for _, size in waiting)
        for path, freed in waiting:
            if number <= MAX_WAITING and size <= 2**20 * MAX_WAITING_MB:
                return
            self.drop([path])
            number, size = number - 1, size - freed

    def take(self, path):
        """
        Args:
            path (str): of :meth:`keep`.

        Returns:
            Path: the file, which is the caller's from now on.

        Raises:
            KeyError: there is no such upload, or it was taken before.
        """
        del self._waiting[path]
        return Path(path)

    def drop(self, paths):
        """
        Delete those that nobody took.

        Args:
            paths (list[str]):
        """
        for path in paths:
            if self._waiting.pop(path, None) is not None:
                Path(path).unlink(missing_ok=True)
