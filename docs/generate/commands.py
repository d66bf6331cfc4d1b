"""The page of commands, read off the source of the scripts in tools/: nothing is imported."""

import ast
from pathlib import Path

__all__ = ["commands_page"]

INTRODUCTION = """# Commands

Every script says the same with `--help`. In percent are all figures they print but counts, scores
and thresholds, which lie between 0 and 1.
"""
# As a user meets them; what is new comes last.
ORDER = (
    "prepare_dataset",
    "train_net",
    "lazyconfig_train_net",
    "evaluate",
    "compare",
    "report",
    "cross_validate",
    "demo",
    "benchmark",
    "install_detectron2",
)


def commands_page(tools):
    """
    Args:
        tools (Path): folder of the scripts.

    Returns:
        str: the page, in Markdown. Scripts are files that can be started: with ``__main__``.
    """
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in Path(tools).glob("*.py")}
    scripts = {name: text for name, text in scripts.items() if '"__main__"' in text}
    names = sorted(scripts, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    return "\n".join([INTRODUCTION, *(_section(name, scripts[name]) for name in names)])


def _section(name, source):
    tree = ast.parse(source)
    first, *rest = ast.get_docstring(tree).split("\n\n")
    parts = [f"## {name}.py\n", _text(first)]
    for paragraph in rest:
        is_command = "tools/" in paragraph and paragraph.lstrip().startswith(("tools/", "python "))
        parts.append(f"```\n{_unindent(paragraph)}\n```" if is_command else _text(paragraph))
    arguments = [_argument(node) for node in ast.walk(tree) if _is_argument(node)]
    if arguments:
        parts.append("\n".join(arguments))
    return "\n\n".join(parts) + "\n"


def _text(paragraph):
    return " ".join(line.strip() for line in paragraph.splitlines())


def _unindent(paragraph):
    return "\n".join(line.strip() for line in paragraph.splitlines())


def _is_argument(node):
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
    )


def _argument(node):
    """A definition of one argument, with its help text."""
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    flags = ", ".join(ast.literal_eval(flag) for flag in node.args)
    values = ""
    if "choices" in options:
        try:
            values = " {" + ",".join(map(str, ast.literal_eval(options["choices"]))) + "}"
        except ValueError:  # a name of something in the package
            values = ""
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
