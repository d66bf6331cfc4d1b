"""From nothing to a trained and evaluated IMR-CNN with its report, on synthetic images.

The demo runs the commands that a user would give, one after the other. An interrupted demo goes on
where it stopped.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from imrcnn_d2.cli import new_parser

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "imrcnn_lite_demo.yaml"


def main(argv: list[str] | None = None) -> None:
    output = argument_parser().parse_args(argv).output.resolve()
    data = output / "datasets" / "synthetic"
    report, card = output / "report.html", output / "model_card.md"
    print(
        "160 synthetic images are prepared, the light IMR-CNN is trained on them, which takes some "
        f"minutes, and a report is written, all in {output}"
    )
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the command, which may save
    for command in (
        ("prepare-dataset", "synthetic", "--out", data, "--num-images", 160, "--size", 256),
        ("train", "--config-file", CONFIG, "--data", data, "--resume", "OUTPUT_DIR", output),
        ("report", output, "--output", report, "--card", card),
    ):
        command = list(map(str, command))
        print(f"\n$ imrcnn {shlex.join(command)}", flush=True)
        env = {**os.environ, "IMRCNN_DATASETS": str(data.parent)}
        finished = subprocess.run([sys.executable, "-m", "imrcnn", *command], env=env)
        if finished.returncode:  # the command has given the reason
            sys.exit(finished.returncode)
    print(
        f"\nThe report, to open in a browser: {report}\n"
        f"Predictions on the test images, for a first look: "
        f"{output / 'inference' / 'synthetic_test' / 'contact_sheet.png'}\n"
        "The same three commands train on your images: see imrcnn prepare-dataset --help"
    )


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="(%(default)s)")
    return parser
