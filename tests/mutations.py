"""Damaged copies of files, for tests that no reader fails but by saying so."""

import copy
import json
from xml.etree.ElementTree import fromstring, tostring

from hypothesis import strategies as st

NASTY = ["", "0", "-1", "1e999", "nan", "../x", "/etc/hostname", "\0", "\ud800", "é\u202e"]
TEXTS = st.sampled_from([*NASTY, "a" * 300]) | st.text(max_size=8)
EXTREMES = [2**31, -(2**63), 10**30, 10**400, 1e308, -0.0, 1e-320]
NUMBERS = st.integers(-3, 70) | st.sampled_from(EXTREMES) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def _places(node):
    """[(container, key)] of all that a JSON document holds."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in ((node, key), *_places(node[key]))]


MISSING = object()
WRONG = (
    *(None, True, -1, 0.5, 10**300, 1e308, float("nan"), float("inf"), "", "x", "4@"),
    *([], {}, [[]], [None], {"size": [40, 50], "counts": "4@"}, [[0, 0, 1e9, 1e9, 0, 1e9]]),
    MISSING,
)


def with_wrong_values(document):
    """Yield (the change, a copy of a JSON document) with each value replaced by each of WRONG."""
    for number in range(len(_places(document))):
        for value in WRONG:
            damaged = copy.deepcopy(document)
            container, key = _places(damaged)[number]
            if value is MISSING:
                del container[key]
            else:
                container[key] = copy.deepcopy(value)
            yield f"value {number} ({key}) is {'missing' if value is MISSING else value!r}", damaged


@st.composite
def damaged_bytes(draw, data):
    """``data`` cut, or with bytes changed, left out or put in at up to three places."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "change", "remove", "insert"]))
        if kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=4))
        else:
            data[at : at + draw(st.integers(1, 9))] = b"" if kind == "remove" else b"\xff0"
    return bytes(data)


def _damaged_text(text):
    return damaged_bytes(text.encode("utf-8", "surrogatepass")).map(lambda d: d.decode("latin-1"))


@st.composite
def damaged_header(draw, data):
    """``data`` with another number in one to three places of its first 300 bytes."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(data), 300) - 1))
        size, order = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from(["little", "big"]))
        value = draw(st.sampled_from([0, 1, 8, 255, 9_000, 30_000, 65_535, 2**31 - 1, 2**32 - 1]))
        data[at : at + size] = (value % 256**size).to_bytes(size, order)
    return bytes(data)


@st.composite
def damaged_json(draw, document):
    """Bytes of ``document`` with values replaced, removed, repeated or bent; or damaged as text."""
    if draw(st.integers(0, 5)) == 0:
        return draw(damaged_bytes(json.dumps(document).encode()))
    document = {"": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "remove", "repeat", "bend", "add"]))
        value = container[key]
        if kind == "remove":
            del container[key]
        elif kind == "repeat" and isinstance(container, list):
            container.insert(key, copy.deepcopy(value))
        elif kind == "bend" and isinstance(value, str):
            container[key] = draw(_damaged_text(value))
        elif kind == "add" and isinstance(value, dict):
            value[draw(TEXTS)] = draw(VALUES)
        else:
            container[key] = draw(VALUES)
    return json.dumps(document.get("")).encode()


@st.composite
def damaged_xml(draw, text):
    """Bytes of an XML file with attributes, texts and elements changed; or damaged as text."""
    if draw(st.integers(0, 5)) == 0:
        return draw(damaged_bytes(text.encode()))
    root = fromstring(text)
    for _ in range(draw(st.integers(1, 3))):
        element = draw(st.sampled_from(list(root.iter())))
        kind = draw(st.sampled_from(["attribute", "bend", "text", "rename", "remove", "repeat"]))
        names = list(element.attrib)
        if kind in ("attribute", "bend") and names:
            name = draw(st.sampled_from([*names, "group_id", "rotation", "subset"]))
            value = draw(TEXTS | NUMBERS.map(str))
            if kind == "bend":
                value = draw(_damaged_text(element.get(name, "")))
            element.set(name, value)
        elif kind == "text":
            element.text = draw(TEXTS)
        elif kind == "rename":
            names = ["box", "mask", "ellipse", "polygon", "track", "image", "tag", "attribute"]
            element.tag = draw(st.sampled_from(names))
        elif len(element):
            child = draw(st.sampled_from(list(element)))
            if kind == "remove":
                element.remove(child)
            else:
                element.append(copy.deepcopy(child))
    return tostring(root, "unicode").encode("utf-8", "surrogatepass")


@st.composite
def damaged_csv(draw, text):
    """Bytes of a table with cells, rows and columns changed; or damaged as text."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(text.encode()))
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.sampled_from(rows))
        at = draw(st.integers(0, len(row) - 1)) if row else 0
        kind = draw(st.sampled_from(["replace", "remove", "insert", "repeat"]))
        if kind == "repeat":
            rows.append(list(row))
        elif kind == "insert":
            row.insert(at, draw(TEXTS))
        elif row:
            row[at : at + 1] = [draw(TEXTS | NUMBERS.map(str))] if kind == "replace" else []
    return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")
