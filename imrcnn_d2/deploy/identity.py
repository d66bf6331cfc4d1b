"""Which run results are of, and of which state of an input: what may be gone on with."""

import hashlib
import json
import os

__all__ = ["check_run", "input_key", "is_done", "printable", "run_record", "signature"]


def run_record(predictor, root, save=()):
    """
    Args:
        predictor (Predictor):
        root (Path): folder that the names of inputs are relative to.
        save (iterable of str): of ``OUTPUTS``.

    Returns:
        dict: what all results in a folder of outputs share, of JSON types.
    """
    run = {
        **predictor.about,
        "runtime": predictor.asked_runtime,  # "auto" may find another the next time
        "classes": predictor.classes,
        "outputs": sorted(save),
        # Names are relative to it; in itself it may hold a patient's.
        "inputs": _hash(str(root)),
    }
    return json.loads(json.dumps(run))  # as it is read back


def check_run(folder, there, now):
    """
    Args:
        folder (Path): of outputs.
        there, now (dict): of the results in it and of those to come, see :func:`run_record`.

    Raises:
        ValueError: they are not of one run; the error says what differs.
    """
    differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if differing:
        raise ValueError(
            f"{folder} holds the predictions of another run: it differs in "
            + ", ".join(f"{k} ({there.get(k)}, now {now.get(k)})" for k in sorted(differing))
            + ". Choose another --output, or remove that folder"
        )


def input_key(name):
    """str: what stands for an input's name, which may be a patient's."""
    return _hash(name)


def printable(name):
    """str: a file's name as UTF-8 has it, where the file system's is none."""
    return name.encode(errors="backslashreplace").decode()


def signature(source):
    """
    Args:
        source (Source):

    Returns:
        list[int] or None: what changes when the file does; None where it is gone.
    """
    try:
        status = source.path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def is_done(there, source):
    """
    Args:
        there (object or None): what is on record of an input, with ``error`` and ``signature``.
        source (Source): the input.

    Returns:
        bool: whether it was done without an error and has not been changed since.
    """
    return there is not None and there.error is None and there.signature == signature(source)


def _hash(text):
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
