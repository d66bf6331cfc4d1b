"""Only what was uploaded is taken, once."""

import io
import multiprocessing
import os
import signal
import tempfile

import pytest

from imrcnn_d2.deploy.web import server as uploads_module
from imrcnn_d2.deploy.web.server import Uploads, upload_folder


def test_kept_taken_dropped(tmp_path):
    uploads = Uploads(tmp_path)
    paths = uploads.keep([io.BytesIO(b"same"), io.BytesIO(b"same"), io.BytesIO(b"c")])
    assert len(set(paths)) == 3, "equal files are two"
    taken = uploads.take(paths[0])
    assert taken.read_bytes() == b"same"
    with pytest.raises(KeyError):
        uploads.take(paths[0])
    uploads.drop(paths)
    assert list(tmp_path.iterdir()) == [taken], "it is its taker's"
    with pytest.raises(KeyError):
        uploads.take(paths[1])


def test_other_files_are_never_taken(tmp_path):
    (tmp_path / "own").write_bytes(b"")
    uploads = Uploads(tmp_path)
    for path in (tmp_path / "own", "/etc/hosts", "http://example.com/a"):
        with pytest.raises(KeyError):
            uploads.take(str(path))
    uploads.drop([str(tmp_path / "own")])
    assert (tmp_path / "own").exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    class Full:
        def read(self, *_):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        Uploads(tmp_path).keep([io.BytesIO(b"first"), Full()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bound", "most", "left"),
    [("MAX_WAITING", 3, [2, 3, 4]), ("MAX_WAITING_MB", 30 / 2**20, [3, 4])],
)
def test_the_oldest_go_when_there_are_too_many(tmp_path, monkeypatch, bound, most, left):
    monkeypatch.setattr(uploads_module, bound, most)
    uploads = Uploads(tmp_path)
    paths = [uploads.keep([io.BytesIO(bytes([n]) * 12)])[0] for n in range(5)]
    assert {str(path) for path in tmp_path.iterdir()} == {paths[n] for n in left}
    with pytest.raises(KeyError):
        uploads.take(paths[0])
    assert uploads.take(paths[4]).read_bytes() == bytes([4]) * 12


def killed_page(folder):
    tempfile.tempdir = str(folder)
    with upload_folder() as files:
        (files / "patient.png").write_bytes(b"image")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_next_start_cleans_up_after_a_killed_page(tmp_path, monkeypatch):
    page = multiprocessing.get_context("forkserver").Process(target=killed_page, args=(tmp_path,))
    page.start()
    page.join(60)
    assert page.exitcode == -signal.SIGKILL and len(list(tmp_path.glob("*/files/patient.png"))) == 1
    own = tmp_path / "own"
    own.mkdir()
    (own / "file").touch()
    (tmp_path / "imrcnn-uploads-link").symlink_to(own)  # as anybody can make one in /tmp
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with upload_folder() as running:
        (running / "a").touch()
        with upload_folder() as other:
            assert not list(tmp_path.glob("*/files/patient.png"))
            assert list(running.iterdir()) == [running / "a"], "its page lives"
            assert list(other.iterdir()) == [] and other.stat().st_mode & 0o077 == 0
    assert {path.name for path in tmp_path.iterdir()} == {"own", "imrcnn-uploads-link"}
    assert list(own.iterdir()) == [own / "file"]
