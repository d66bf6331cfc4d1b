"""Writing CVAT's XML for images, version 1.1, and the labels of its task."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from imrcnn_d2.data.cvat_shapes import attributes_of, draw
from imrcnn_d2.data.prepare import Sample
from imrcnn_d2.data.rejects import BadInputError

__all__ = ["cvat_documents"]

# What XML 1.0 cannot hold, however it is written.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def cvat_documents(samples: Iterable[Sample], names: Mapping[int, str]) -> tuple[str, list[dict]]:
    """A data set in CVAT's two files.

    Masks become polygons, those with holes masks; further fields of annotations become attributes.

    Args:
        samples: with annotations that have a mask.
        names: of the classes by category id.

    Returns:
        XML text; and the labels with their attributes, as CVAT's "Raw" constructor takes them.

    Raises:
        BadInputError: a text that XML cannot hold.
    """
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    meta = SubElement(root, "meta")
    seen: dict[str, dict[str, list]] = {name: {} for name in names.values()}
    count: Counter[str] = Counter()
    for number, sample in enumerate(samples):
        width, height = sample.image.width, sample.image.height
        size = {"width": str(width), "height": str(height)}
        image = SubElement(root, "image", id=str(number), name=sample.file_name, **size)
        for group, annotation in enumerate(sample.annotations, start=1):
            label = names[annotation["category_id"]]
            count[label] += 1
            attributes = attributes_of(annotation)
            for key, value in attributes.items():
                seen[label].setdefault(key, []).append(value)
            for tag, own in draw(annotation, height, width, group):
                shape = SubElement(image, tag, label=label, **own)
                for key, value in attributes.items():
                    SubElement(shape, "attribute", name=key).text = _text(value)
    labels = [_label(name, attributes, count[name]) for name, attributes in seen.items()]
    task = SubElement(meta, "task")
    SubElement(task, "mode").text = "annotation"
    task.append(_labels_element(labels))
    indent(root)
    text = '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, "unicode") + "\n"
    if bad := _NO_XML.search(text):
        start = max(bad.start() - 30, 0)
        raise BadInputError(
            "annotations.xml", f"XML cannot hold {bad[0]!r}, behind {text[start : bad.start()]!r}"
        )
    return text, labels


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _label(name: str, attributes: Mapping[str, Sequence], count: int) -> dict:
    return {
        "name": name,
        "type": "any",
        "attributes": [
            _attribute(key, values, for_all=len(values) == count)
            for key, values in attributes.items()
        ],
    }


def _attribute(name: str, values: Sequence, for_all: bool) -> dict:
    """Of a kind that can hold all its values; a CVAT number is whole and has bounds.

    CVAT gives the default to instances without a value: where there are such, only a text, whose
    default is empty, does not make an unknown size 0.
    """
    if name == "iscrowd" or (for_all and all(isinstance(value, bool) for value in values)):
        kind, choices = "checkbox", ["false"]
    elif for_all and all(type(value) is int and value >= 0 for value in values):
        kind, choices = "number", ["0", str(max(values)), "1"]
    else:
        kind, choices = "text", [""]
    return {"name": name, "mutable": False, "input_type": kind, "values": choices}


def _labels_element(labels: Sequence[dict]) -> Element:
    element = Element("labels")
    for label in labels:
        own = SubElement(element, "label")
        SubElement(own, "name").text = label["name"]
        SubElement(own, "type").text = label["type"]
        attributes = SubElement(own, "attributes")
        for attribute in label["attributes"]:
            entry = SubElement(attributes, "attribute")
            SubElement(entry, "name").text = attribute["name"]
            SubElement(entry, "mutable").text = str(attribute["mutable"])
            SubElement(entry, "input_type").text = attribute["input_type"]
            SubElement(entry, "default_value").text = attribute["values"][0]
            SubElement(entry, "values").text = "\n".join(attribute["values"])
    return element
