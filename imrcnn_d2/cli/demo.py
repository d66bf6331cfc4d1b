"""From nothing to a trained and evaluated IMR-CNN with its report, on synthetic images.

The demo runs the commands that a user would give, one after the other. An interrupted demo goes on
where it stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from imrcnn_d2.cli import new_parser

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "imrcnn_lite_demo.yaml"


def main(argv: list[str] | None = None) -> None:
    output = argument_parser().parse_args(argv).output.resolve()
    data = output / "datasets" / "synthetic"
    report, card = output / "report.html", output / "model_card.md"
    for command in (
        ("prepare-dataset", "synthetic", "--out", data, "--num-images", 160, "--size", 256),
        ("train", "--config-file", CONFIG, "--data", data, "--resume", "OUTPUT_DIR", output),
        ("report", output, "--output", report, "--card", card),
    ):
        command = list(map(str, command))
        print(f"\n$ imrcnn {shlex.join(command)}", flush=True)
        env = {**os.environ, "IMRCNN_DATASETS": str(data.parent)}
        subprocess.run([sys.executable, "-m", "imrcnn", *command], env=env, check=True)

    results = output / "inference" / "synthetic_test"
    metrics = json.loads((results / "metrics.json").read_text())
    segm, lesion = metrics["segm"], metrics["lesion"]
    print(
        f"\nOn the test images, masks: AP50 {segm['AP50']:.1f}, matched IoU {lesion['iou']:.1f}; "
        f"at score {metrics['meta']['tau']}: precision {lesion['precision']:.1f}, "
        f"recall {lesion['recall']:.1f}\n"
    )
    for name in ("metrics.json", "per_image.csv", "pr_curve.png", "contact_sheet.png"):
        print(results / name)
    print(f"{output / 'model_best.pth'}\n{card}\n\nThe report, to open in a browser: {report}")


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="(%(default)s)")
    return parser
