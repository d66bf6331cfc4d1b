#!/usr/bin/env python
"""Make trials.csv of the trials of the Makefile in this folder, by source of the validation images.

    python examples/demo_weights/trials.py datasets/demo_sources output/demo_weights/trials/*

Metrics are in percent, at the mapped score 0.5, of the last validation of each trial. The map was
fitted to the same images, so that ECE is a little too good. Rows of other trials stay.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.output import RESULTS
from imrcnn_d2.evaluation.subgroups import By, with_groups
from imrcnn_d2.utils.files import write_atomically

TABLE = Path(__file__).with_name("trials.csv")
METRICS = {
    "AP50": "segm/AP50",
    "IoU": "lesion/iou",
    "mIoU": "image/miou",
    "precision": "lesion/precision",
    "recall": "lesion/recall",
    "silent": "image/specificity",
    "ECE": "calibration/ece",
}


def rows(data: Path, run: Path) -> list[dict]:
    """One row per source, and one of all."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (predictions,) = run.glob(f"inference/*_val/{RESULTS}")
    results = evaluate_lesions(data / "annotations" / "val.json", predictions, tau=0.5)
    by_centre = with_groups(results, [By("centre")]).by_group["centre"].groups
    values = {name: group.values for name, group in by_centre.items()}
    values["all"] = {**results.groups(), "calibration": results.calibration}
    facts = {"trial": run.name, "iterations": record["iterations"]}
    options = record["command"].partition("MODEL.WEIGHTS")[2].partition("SOLVER.MAX_ITER")[0]
    ret = []
    for source, groups in values.items():
        row = {**facts, "source": source}
        for name, metric in METRICS.items():
            group, key = metric.split("/")
            row[name] = groups[group][key]
        ret.append({**row, "options": " ".join(options.split()[1:])})
    return ret


def main(data: str, *runs: str) -> None:
    table = pd.DataFrame([row for run in runs for row in rows(Path(data), Path(run))])
    if TABLE.is_file():
        earlier = pd.read_csv(TABLE)
        table = pd.concat([earlier[~earlier.trial.isin(table.trial)], table])
    text = table.to_csv(index=False, float_format="%.1f", lineterminator="\n")
    write_atomically(TABLE, text)
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
