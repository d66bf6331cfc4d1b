"""Graphs that OpenVINO compiled for this processor, kept in the user's cache folder."""

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path

from imrcnn_d2.utils.files import atomic_file

KEPT = 8  # the last used; a graph of the light IMR-CNN has 23 MB
_DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """``imrcnn_d2/openvino`` in XDG_CACHE_HOME, else in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "imrcnn_d2", "openvino")


def compile_model(core, model, content_sha256: str, options: dict):
    """The openvino.CompiledModel of an openvino.Model on the CPU, and as it was kept, if it was;
    ``content_sha256`` is of the file that the model is of.

    OpenVINO trusts what it reads. So entries begin with the SHA-256 of the rest, damaged ones are
    made anew, and the folder is used only if nobody but the user can write into it. Without such a
    folder nothing is kept.
    """
    import openvino

    facts = {
        "content": content_sha256,
        "shape": str(model.input(0).partial_shape),
        "openvino": openvino.__version__,
        "processor": core.get_property("CPU", "FULL_DEVICE_NAME"),
        **options,
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    # RuntimeError: OpenVINO's, and of a user without a home folder
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_folder() / f"{name}.blob"
        entry = path.read_bytes() if _is_private(path.parent) else b""
        if entry and hashlib.sha256(entry[_DIGEST:]).digest() == entry[:_DIGEST]:
            compiled = core.import_model(io.BytesIO(entry[_DIGEST:]), "CPU", options)
            path.touch()
            return compiled
    compiled = core.compile_model(model, "CPU", options)
    with contextlib.suppress(OSError, RuntimeError):
        _keep(cache_folder() / f"{name}.blob", compiled.export_model().getvalue())
    return compiled


def _keep(path, blob):
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(path.parent):
        return
    with atomic_file(path, f".{os.getpid()}") as file:  # other processes may write the same
        file.write(hashlib.sha256(blob).digest())
        file.write(blob)
    entries = sorted(path.parent.glob("*.blob"), key=lambda entry: entry.stat().st_mtime)
    for entry in entries[:-KEPT]:
        entry.unlink(missing_ok=True)


def _is_private(folder):
    """Whether only this user can write into it. Windows keeps home folders so."""
    status = folder.stat()
    return os.name == "nt" or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
