"""A training that is stopped again and again ends as one that is not: see chaos.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_training_that_is_stopped_again_and_again(tmp_path):
    script = Path(__file__).with_name("chaos.py")
    ran = subprocess.run(
        [sys.executable, script, tmp_path, "--stops", "3"], capture_output=True, text=True
    )
    log = tmp_path / "log.txt"
    assert ran.returncode == 0, ran.stdout + ran.stderr + (log.read_text() if log.exists() else "")
    # Fewer than three, if it was done before.
    assert re.search("stopped [123] times: weights and states are bit-identical", ran.stdout)
