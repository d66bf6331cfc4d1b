"""`imrcnn COMMAND`, and the same commands as scripts of a checkout."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, run_script

import imrcnn
from imrcnn_d2.cli import export, predict
from imrcnn_d2.deploy.outputs import OUTPUTS
from imrcnn_d2.deploy.runtimes import EXPORTS, RUNTIMES

CLI = Path(ROOT, "imrcnn_d2", "cli")
MODULES = sorted(path.stem for path in CLI.glob("[!_]*.py"))
TOOLS = sorted(path.name for path in Path(ROOT, "tools").glob("*.py"))

# Prints which of the slow imports a command's --help waits for.
IMPORTED = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(f"imrcnn_d2.cli.{name}")
    if name != "cross_validate":
        module.argument_parser()
slow = ("deploy", "engine", "evaluation", "report")
print(*[name for name in sys.modules if name in [f"imrcnn_d2.{package}" for package in slow]])
print(*[name for name in ("matplotlib.pyplot", "pandas", "scipy") if name in sys.modules])
"""


@pytest.mark.parametrize("tool", TOOLS)
def test_every_script_starts(tool):
    done = run_script(f"tools/{tool}", "--help")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "usage:" in done.stdout or tool == "cross_validate.py"


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    """`imrcnn` puts the name of its command there."""
    monkeypatch.setattr(sys, "argv", ["imrcnn"])


def test_every_command_has_a_module_and_a_script(capsys):
    assert sorted(name.replace("-", "_") for name in imrcnn.COMMANDS) == MODULES
    names = {"train_net": "train", "lazyconfig_train_net": "train"}
    assert {names.get(stem := tool[:-3], stem) for tool in TOOLS} == set(MODULES)
    imrcnn.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in imrcnn.COMMANDS)


@pytest.mark.parametrize("command", ["prepare-dataset", "prepare_dataset", "install-detectron2"])
def test_a_command_calls_itself_as_it_was_called(capsys, command):
    with pytest.raises(SystemExit) as end:
        imrcnn.main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: imrcnn {command.replace('_', '-')} ")


def test_an_unknown_command_is_refused():
    assert "'prepare'" in imrcnn.main(["prepare"])


def test_without_detectron2_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(imrcnn, "find_spec", lambda name: None)
    assert imrcnn.main(["predict"]).count("imrcnn install-detectron2") == 1


def test_the_list_of_commands_imports_nothing_slow():
    code = "import imrcnn, sys; imrcnn.main([]); print({'torch', 'imrcnn_d2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_help_imports_nothing_slow():
    command = [sys.executable, "-W", "ignore", "-c", IMPORTED, *MODULES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "\n\n", done.stderr


def test_the_options_are_those_of_the_package():
    """The parsers list these by hand, since importing them takes seconds."""
    help_text = " ".join(predict.argument_parser().format_help().split())
    assert all(name in help_text for name in (*RUNTIMES, *(f"--{kind}" for kind in OUTPUTS)))
    help_text = export.argument_parser().format_help()
    assert all(form in help_text for form in EXPORTS)
    precisions = {name for runtime in EXPORTS.values() for name in runtime.precisions}
    assert precisions == set(export.BOUNDS) - {"exact"}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "cross_validate"])
def test_wrong_options_end_with_status_2(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"imrcnn_d2.cli.{name}").main(["--no-such-option"])
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err
