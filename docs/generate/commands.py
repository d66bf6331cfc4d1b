"""The page of commands, made from their argument parsers."""

import argparse
import importlib
import sys
import textwrap
from pathlib import Path
from types import ModuleType

INTRODUCTION = """# Commands

`imrcnn COMMAND --help` prints the same. `python tools/COMMAND.py` in a checkout is the same command
(`tools/train_net.py` for `train`). Metrics are printed in percent, except counts, rates, times
and distances. Scores and thresholds lie between 0 and 1.
"""
# Scripts of a checkout, in benchmarks/ and packaging/.
SCRIPTS = {"benchmark": "benchmarks/benchmark.py", "bundle": "packaging/bundle.py"}


def commands_page(root: Path) -> str:
    """The page, in Markdown: the commands in the order of `imrcnn --help`, then the scripts."""
    sys.path += [str(root), *(str((root / path).parent) for path in SCRIPTS.values())]
    commands = importlib.import_module("imrcnn").COMMANDS
    sections = [
        _section(
            f"imrcnn {name}", importlib.import_module(f"imrcnn_d2.cli.{name.replace('-', '_')}")
        )
        for name in commands
    ]
    sections += [_section(path, importlib.import_module(name)) for name, path in SCRIPTS.items()]
    return "\n".join([INTRODUCTION, *sections])


def _section(title: str, module: ModuleType) -> str:
    parts = [f"## {title}\n"]
    for paragraph in module.__doc__.strip().split("\n\n"):
        literal = paragraph.startswith("    ")
        parts.append(f"```\n{textwrap.dedent(paragraph)}\n```" if literal else _text(paragraph))
    if hasattr(module, "argument_parser"):
        parts += _options(module.argument_parser())
    return "\n\n".join(parts) + "\n"


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Definitions of the options; those that all subcommands share, then each one's others."""
    parts = ["\n".join(_definitions(parser))]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help for choice in action._choices_actions}
            lists = {name: _definitions(choice) for name, choice in action.choices.items()}
            first, *rest = lists.values()
            shared = [item for item in first if all(item in items for items in rest)]
            for name, definitions in lists.items():
                others = [item for item in definitions if item not in shared]
                parts += [f"**{name}**: {texts[name]}", "\n".join(others)]
            parts += ["**All of these**:", "\n".join(shared)] if shared else []
    return [part for part in parts if part]


def _definitions(parser: argparse.ArgumentParser) -> list[str]:
    return [
        _definition(action, parser._get_formatter())
        for action in parser._actions
        if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
    ]


def _definition(action: argparse.Action, formatter: argparse.HelpFormatter) -> str:
    flags = ", ".join(action.option_strings) or action.dest
    values = ""
    if action.choices:
        values = " {" + ",".join(map(str, action.choices)) + "}"
    elif action.metavar:
        names = action.metavar
        values = " " + (names if isinstance(names, str) else " ".join(names))
    required = " *(required)*" if action.required and action.option_strings else ""
    text = _text(formatter._expand_help(action)) if action.help else "—"
    return f"`{flags}{values}`{required}\n:   {text}\n"


def _text(paragraph: str) -> str:
    return " ".join(line.strip() for line in paragraph.splitlines())
