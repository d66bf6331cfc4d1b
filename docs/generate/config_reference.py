"""The page of config keys, from the source of `add_imrcnn_config`: nothing is imported."""

import ast
import io
import re
import tokenize
from typing import NamedTuple

INTRODUCTION = """# Config keys

`imrcnn_d2.add_imrcnn_config(cfg)` adds these to Detectron2's, with these defaults; all others are
[Detectron2's](https://detectron2.readthedocs.io/en/latest/modules/config.html#yaml-config-references).
In a project that does not use it the backbones run with these defaults. A config file changes
them, and so does the end of a command: `KEY VALUE KEY VALUE …`.
"""
# Names of keys and modules, and quoted values.
CODE = re.compile(
    r'"[^"\s]*"|(?<![\w"])(?:[A-Z]+(?:\.[A-Z0-9_]+)+|[A-Z]+_[A-Z0-9_]+|[a-z]+_[a-z]*\*?|[a-z]+\*|'
    r"\w+\{\w\})"
)


class Key(NamedTuple):
    name: str  # such as "MODEL.PAFPN.FORM"
    default: str  # Python source
    comment: str  # the lines above it, as one paragraph
    section: str  # title of the part of the file it is in


def read_keys(source: str) -> list[Key]:
    """The keys of the module that defines `add_imrcnn_config`, in its order."""
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "add_imrcnn_config"
    )
    sections = {0: (0, "General")}  # first line -> last line, title
    for line, text in comments.items():
        if text.startswith("---- "):
            end = line
            while not text.endswith("."):
                end += 1
                text += " " + comments[end]
            sections[line] = (end, text.removeprefix("---- ").rstrip("."))
    keys = []
    for node in function.body:
        if not isinstance(node, ast.Assign) or isinstance(node.value, ast.Call):
            continue  # the docstring, and nodes: cfg.MODEL.PAFPN = CN()
        end, section = sections[max(line for line in sections if line < node.lineno)]
        first = node.lineno
        while first - 1 in comments and first - 1 > end:
            first -= 1
        name = ast.unparse(node.targets[0]).removeprefix("cfg.")
        comment = " ".join(comments[line] for line in range(first, node.lineno))
        keys.append(Key(name, ast.get_source_segment(source, node.value), comment, section))
    return keys


def config_page(source: str) -> str:
    """The page, in Markdown; the anchor of a key is its name in lower case with dashes."""
    parts, section = [INTRODUCTION], None
    for key in read_keys(source):
        if key.section != section:
            section = key.section
            title = re.split(r" \(|,|:", section)[0]
            parts.append(f"## {title}\n")
            if title != section:
                parts.append(_markdown(section) + ".\n")
        anchor = re.sub("[._]", "-", key.name.lower())
        parts.append(f"### `{key.name}` {{ #{anchor} }}\n\nDefault: `{key.default}`\n")
        parts.append(_markdown(key.comment) + "\n")
    return "\n".join(parts)


def _markdown(comment: str) -> str:
    """Names as code, everything else escaped."""
    text, start = "", 0
    for match in CODE.finditer(comment):
        text += _plain(comment[start : match.start()]) + f"`{match[0]}`"
        start = match.end()
    return text + _plain(comment[start:])


def _plain(text: str) -> str:
    return re.sub(r"([*_`<\[\]])", r"\\\1", text)
