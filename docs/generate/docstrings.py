"""Turns the roles of our docstrings, such as ``:func:`match```, into links for mkdocstrings."""

import re
from functools import partial

import griffe

ROLE = re.compile(r":(func|class|meth|mod|attr|data):`~?\.?([\w.]+)`")
# "...::" and an indented block, as reStructuredText wants it.
BLOCK = re.compile(r"::$", re.MULTILINE)


class Roles(griffe.Extension):
    """Links names of the package; other names, such as Detectron2's classes, become code."""

    def on_package(self, *, pkg, loader, **kwargs):
        objects = list(_objects(pkg))
        targets = {}  # (role, "evaluation.match") -> {"imrcnn_d2.evaluation.match"}
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
    """Prefer the object of this name that stands nearest to the docstring."""
    role, name = match.groups()
    paths = targets.get((role, name), set())
    near = {path for path in paths if path.rpartition(".")[0] in obj.path}
    (target,) = near if len(near) == 1 else paths if len(paths) == 1 else (None,)
    return f"[`{name}`][{target}]" if target else f"`{name}`"
