"""
From nothing to a trained and evaluated IMR-CNN with its report, on generated images: the commands
that a user would give, one after the other. An interrupted demo goes on where it stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/imrcnn_lite_demo.yaml"


def run(command, env):
    """Show a command of this repository and run it."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, env=env, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo")
    output = parser.parse_args().output.resolve()
    data = output / "datasets" / "synthetic"
    env = {**os.environ, "IMRCNN_DATASETS": str(data.parent)}

    prepare = ["tools/prepare_dataset.py", "synthetic", "--out", str(data)]
    run([*prepare, "--num-images", "160", "--size", "256"], env)
    train = ["tools/train_net.py", "--config-file", CONFIG, "--data", str(data), "--resume"]
    run([*train, "OUTPUT_DIR", str(output)], env)

    report, card = output / "report.html", output / "model_card.md"
    run(["tools/report.py", str(output), "--output", str(report), "--card", str(card)], env)

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
    print(output / "model_best.pth")
    print(card)
    print(f"\nThe report, to open in a browser: {report}")
