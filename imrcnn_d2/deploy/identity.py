"""Which run results are of, and which input in which state: what may be gone on with."""

import hashlib
import json
import os
import reprlib

__all__ = [
    "check_run",
    "in_utf8",
    "input_key",
    "is_done",
    "outdated",
    "printable",
    "run_record",
    "signature",
]

# Of the records that are read back. 1 knew DICOM files by their names, and not what was written.
FORMAT = 2
DICOM_NAME = "dicom-{}.dcm"


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
        # Names are relative to it. Its path may hold a patient's name, which even a hash of it
        # would give away to whoever guesses: its number in the file system does not.
        "inputs": os.stat(root).st_ino,
        "format": FORMAT,
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
            + ", ".join(
                f"{printable(k)} ({reprlib.repr(there.get(k))}, now {reprlib.repr(now.get(k))})"
                for k in sorted(differing)
            )
            + ". Choose another --output"
        )


def input_key(name):
    """str: a hash of an input's name, which is one that every output may have."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def in_utf8(name):
    """str: a file's name as UTF-8 has it, where the file system's is none."""
    return name.encode(errors="backslashreplace").decode()


def printable(name):
    """str: a name for a terminal, which obeys control characters; these are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


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


def outdated(records, sources):
    """
    Find the DICOM files that failed and are gone. Known by their content, they are others once they
    are repaired; by their name, another input takes its own place.

    Args:
        records (iterable of object): what is on record of inputs, with ``error`` and ``name``.
        sources (iterable of Source): all inputs there are.

    Returns:
        list: those of the records.
    """
    names, prefix = {source.name for source in sources}, DICOM_NAME.partition("{")[0]
    return [
        record
        for record in records
        if record.error is not None and record.name.startswith(prefix) and record.name not in names
    ]
