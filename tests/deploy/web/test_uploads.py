"""Only what was uploaded is taken, once."""

import io

import pytest

from imrcnn_d2.deploy.web.uploads import Uploads


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
