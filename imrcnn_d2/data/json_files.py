"""Reading JSON that others wrote: anything wrong with the file is bad input, whatever it is."""

import json
import math
import re
from collections import Counter
from pathlib import Path

from imrcnn_d2.data.files import regular_file
from imrcnn_d2.data.rejects import BadInputError

__all__ = ["read_json"]

_MOST_BYTES = 2**30
_MOST_CONTAINERS = 20_000_000  # lists and objects; an empty one takes up to 60 times its text
_LONGEST_INTEGER = 300  # digits: larger ones cannot become a float
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> object:
    """Reads strict JSON in UTF-8, with or without a byte order mark.

    Raises:
        BadInputError: cannot be opened, is no JSON, has a key twice in one object, or holds what
            cannot be written again: NaN, infinite numbers, broken text. Or it is too large.
    """
    regular_file(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise BadInputError(path, f"is larger than {_MOST_BYTES:,} bytes; split it")
        text = path.read_text(encoding="utf-8-sig")
        if text.count("[") + text.count("{") > _MOST_CONTAINERS:
            raise BadInputError(
                path, f"has more than {_MOST_CONTAINERS:,} lists and objects; split it"
            )
        content = json.loads(
            text,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_unique,
        )
    except BadInputError:
        raise
    except OSError as error:
        raise BadInputError(path, f"cannot be opened: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(path, f"is no JSON ({error})") from error
    except MemoryError as error:
        raise BadInputError(path, "is too large for the memory of this machine") from error
    except RecursionError as error:
        raise BadInputError(path, "is nested too deeply to be read") from error
    if _HALF_CHARACTER.search(text):  # which JSON can spell, but no file can hold
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadInputError(path, f"is no JSON (broken text: {error.reason})") from error
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """json.loads takes the last of several values, so that the others would be lost unnoticed."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, times), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is there {times} times in one object, keep one")
    return content


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value, write null or leave the field out")


def _whole(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"the number {text[:20]}... is out of range")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is out of range")
    return value
