"""`imrcnn COMMAND`, and the same commands as scripts of a checkout."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, run_script

import imrcnn
from imrcnn_d2.cli import export, predict
from imrcnn_d2.deploy.outputs import OUTPUTS
from imrcnn_d2.deploy.runtimes import EXPORTS, RUNTIMES

MODULES = sorted(path.stem for path in Path(ROOT, "imrcnn_d2", "cli").glob("[!_]*.py"))
TOOLS = sorted(path.name for path in Path(ROOT, "tools").glob("*.py"))

# Prints the slow imports that the commands' --help waits for.
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


def test_every_command_has_a_module_and_a_script(capsys):
    assert sorted(name.replace("-", "_") for name in imrcnn.COMMANDS) == MODULES
    scripts = {"train" if "train_net" in tool else tool.removesuffix(".py") for tool in TOOLS}
    assert scripts == set(MODULES)
    imrcnn.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in imrcnn.COMMANDS)


def test_a_command_names_itself_and_needs_to_exist_and_detectron2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["imrcnn"])
    for command in ("prepare-dataset", "prepare_dataset", "install-detectron2"):
        with pytest.raises(SystemExit, match="^0$"):
            imrcnn.main([command, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: imrcnn {command.replace('_', '-')} ")
    assert "'prepare'" in imrcnn.main(["prepare"])
    monkeypatch.setattr(imrcnn, "find_spec", lambda name: None)
    assert imrcnn.main(["predict"]).count("imrcnn install-detectron2") == 1


def test_help_imports_nothing_slow():
    listed = "import imrcnn, sys; imrcnn.main([]); print({'torch', 'imrcnn_d2'} & set(sys.modules))"
    for code, last in ((listed, "set()\n"), (IMPORTED, "\n\n")):
        command = [sys.executable, "-W", "ignore", "-c", code, *MODULES]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert f"\n{done.stdout}".endswith(f"\n{last}"), done.stdout + done.stderr


def test_the_options_are_those_of_the_package():
    help_text = " ".join(predict.argument_parser().format_help().split())
    assert all(name in help_text for name in (*RUNTIMES, *(f"--{kind}" for kind in OUTPUTS)))
    help_text = export.argument_parser().format_help()
    assert all(form in help_text for form in EXPORTS)
    precisions = {name for runtime in EXPORTS.values() for name in runtime.precisions}
    assert precisions == set(export.BOUNDS) - {"exact"}
