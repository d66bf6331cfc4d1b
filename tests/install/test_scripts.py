"""Each tool starts as a script: its imports are complete, and it says what it takes."""

from pathlib import Path

import pytest
from processes import ROOT, run_script

# The files *_benchmark.py hold what benchmark.py starts.
TOOLS = sorted(
    path.name
    for path in Path(ROOT, "tools").glob("*.py")
    if not path.name.endswith("_benchmark.py")
)


@pytest.mark.parametrize("tool", TOOLS)
def test_help(tool):
    done = run_script(f"tools/{tool}", "--help")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "usage:" in done.stdout or "Powered by Hydra" in done.stdout
    assert "Error" not in done.stderr
