"""The page of commands, read off their source: nothing is imported."""

import ast
import textwrap
from pathlib import Path

__all__ = ["commands_page"]

INTRODUCTION = """# Commands

Every script says the same with `--help`. In percent are all figures they print but counts, scores
and thresholds, which lie between 0 and 1.
"""
# As a user meets them; what is new comes last.
ORDER = (
    "prepare_dataset",
    "export_annotations",
    "audit_dataset",
    "train",
    "train_lazy",
    "evaluate",
    "robustness",
    "compare",
    "agreement",
    "report",
    "predict",
    "demo_app",
    "export",
    "cross_validate",
    "annotation_suspects",
    "demo",
    "benchmark",
    "install_detectron2",
    "bundle",
)


def commands_page(*folders):
    """
    Args:
        folders (Path): of the scripts.

    Returns:
        str: the page, in Markdown. Files without a ``main`` are left out.
    """
    paths = [path for folder in folders for path in Path(folder).glob("*.py")]
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    scripts = {name: text for name, text in scripts.items() if "\ndef main(" in text}
    names = sorted(scripts, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    return "\n".join([INTRODUCTION, *(_section(name, scripts[name]) for name in names)])


def _section(name, source):
    tree = ast.parse(source)
    first, *rest = ast.get_docstring(tree).split("\n\n")
    parts = [f"## {name}.py\n", _text(first)]
    for paragraph in rest:
        literal = paragraph.startswith(("    ", "python ", "tools/"))
        parts.append(f"```\n{textwrap.dedent(paragraph)}\n```" if literal else _text(paragraph))
    for heading, arguments in _groups(tree).items():
        parts += [heading, "\n".join(arguments)] if heading else ["\n".join(arguments)]
    return "\n\n".join(parts) + "\n"


def _groups(tree):
    """{heading: definitions of the arguments below it}; subcommands have a heading each."""
    subcommands, sharing, groups, part_of = {}, {}, {}, {}
    nodes = [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.Assign) and _calls(node.value, "add_parser"):
            options = _options(node.value)
            name = ast.literal_eval(node.value.args[0])
            heading = f"**{name}**: {ast.literal_eval(options['help'])}"
            subcommands[node.targets[0].id] = heading
            for parent in options["parents"].elts if "parents" in options else ():
                sharing.setdefault(parent.id, []).append(f"**{name}**")
        elif isinstance(node, ast.Assign) and _calls(node.value, "add_mutually_exclusive_group"):
            part_of[node.targets[0].id] = ast.unparse(node.value.func.value)
        elif _calls(node, "add_argument"):
            parser = ast.unparse(node.func.value)
            parser = part_of.get(parser, parser)
            heading = subcommands.get(parser, parser)
            groups.setdefault(heading, []).append(_argument(node))
    return {
        heading if heading.startswith("**") else ", ".join(sharing.get(heading, ())): arguments
        for heading, arguments in groups.items()
    }


def _calls(node, method):
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == method
    )


def _options(call):
    return {keyword.arg: keyword.value for keyword in call.keywords}


def _text(paragraph):
    return " ".join(line.strip() for line in paragraph.splitlines())


def _argument(node):
    """A definition of one argument, with its help text."""
    options = _options(node)
    flags = ", ".join(ast.literal_eval(flag) for flag in node.args)
    values = ""
    if "choices" in options:
        try:
            values = " {" + ",".join(map(str, ast.literal_eval(options["choices"]))) + "}"
        except ValueError:  # a name of something in the package
            values = ""
    elif "metavar" in options:
        names = ast.literal_eval(options["metavar"])
        values = " " + (names if isinstance(names, str) else " ".join(names))
    try:
        text = ast.literal_eval(options["help"]) if "help" in options else ""
    except ValueError:  # an f-string
        text = "".join(
            part.value if isinstance(part, ast.Constant) else f"`{ast.unparse(part.value)}`"
            for part in options["help"].values
        )
    if "default" in options and "%(default)s" in text:
        text = text.replace("%(default)s", ast.unparse(options["default"]))
    required = " *(required)*" if "required" in options else ""
    return f"`{flags}{values}`{required}\n:   {text or '—'}\n"
