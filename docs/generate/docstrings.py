"""Turns the roles of our docstrings, such as ``:func:`match```, into links for mkdocstrings."""

import re
from functools import partial

import griffe

ROLE = re.compile(r":(func|class|meth|mod|attr|data):`~?\.?([\w.]+)`")
# "...::" and an indented block, as reStructuredText wants it.
BLOCK = re.compile(r"::$", re.MULTILINE)


class Roles(griffe.Extension):
    """Links what the package has; what it has not, such as Detectron2's classes, is set as code."""

    def on_package(self, *, pkg, loader, **kwargs):
        objects = list(_objects(pkg))
        targets = {}
        for obj in objects:
            parts = obj.path.split(".")
            for k in range(1, len(parts) + 1):
                targets.setdefault((_role(obj), ".".join(parts[-k:])), set()).add(obj.path)
        for obj in objects:
            if obj.docstring:
                text = ROLE.sub(partial(_link, obj, targets), obj.docstring.value)
                obj.docstring.value = BLOCK.sub(":", text)


def _objects(obj):
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _role(obj):
    if obj.is_function:
        return "meth" if obj.parent.is_class else "func"
    return {"class": "class", "module": "mod"}.get(obj.kind.value)


def _link(obj, targets, match):
    role, name = match.groups()
    found = targets.get((role, name), set())
    own = {path for path in found if path.rpartition(".")[0] in obj.path}
    (target,) = own if len(own) == 1 else found if len(found) == 1 else (None,)
    return f"[`{name}`][{target}]" if target else f"`{name}`"
