#!/usr/bin/env python
"""Print what leakage does to the metrics, from the runs of `make ... main groups leakage`.

    python examples/kvasir_seg_study/leakage.py output/study datasets

The first table: synthetic patients with two to five images each, split by image and by patient,
means of three random data sets. The second: Kvasir-SEG split at random and with near-identical
images kept together; of the random split's test images also those with a duplicate elsewhere, and
the others.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.output import RESULTS
from imrcnn_d2.report.runs import load_run
from imrcnn_d2.report.tables import format_value, markdown_table

COLUMNS = {
    "AP50_voc": "segm/AP50_voc",
    "AP": "segm/AP",
    "IoU": "lesion/iou",
    "F1": "lesion/f1",
    "mIoU": "image/miou",
}
SEEDS = 3


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("data", type=Path, help="folder of the splits")
    args = parser.parse_args(argv)
    print(markdown_table(pd.DataFrame(synthetic(args.runs))), end="\n\n")
    print(markdown_table(pd.DataFrame(kvasir(args.runs, args.data))))


def synthetic(runs):
    """Rows of mean ± population sd over the seeds."""
    for by in ("image", "patient"):
        values = pd.DataFrame(
            {heading: recorded_value(metrics, name)[0] for heading, name in COLUMNS.items()}
            for metrics in (
                load_run(runs / "leakage" / f"by_{by}_{seed}").recorded for seed in range(SEEDS)
            )
        )
        cells = {
            heading: f"{values[heading].mean():.1f} ± {values[heading].std(ddof=0):.1f}"
            for heading in COLUMNS
        }
        yield {"synthetic, split": f"by {by}", **cells}


def recorded_value(metrics, name):
    """A metric of a metrics.json and its interval or None; name is like "tau_val.lesion/f1"."""
    group, _, key = name.rpartition("/")
    for part in group.split("."):
        metrics = metrics[part]
    value = metrics[key]
    return float("nan") if value is None else value, metrics.get(f"{key}_ci")


def kvasir(runs, data):
    """Rows of metrics with 95 % intervals."""
    random, groups = (
        evaluated(data / split / "kvasir_seg", runs / run)
        for split, run in (("random", "main/imrcnn_seed0"), ("groups", "groups/imrcnn"))
    )
    pairs = json.loads((data / "groups/kvasir_seg/near_duplicates.json").read_text("utf-8"))[
        "pairs"
    ]
    tested = {image["file_name"] for image in random[0]["images"]}
    duplicates = {
        name
        for pair in pairs
        for name in pair["images"]
        if name in tested and not set(pair["images"]) <= tested
    }
    yield row("at random", *random)
    yield row("– with a duplicate elsewhere", *part(random, duplicates))
    yield row("– the others", *part(random, tested - duplicates))
    yield row("near-identical images together", *groups)


def evaluated(data_set, run):
    """Ground truth and results of a run's test images."""
    truth = json.loads((data_set / "annotations/test.json").read_text("utf-8"))
    results = json.loads((run / "inference/kvasir_seg_test" / RESULTS).read_text("utf-8"))
    return truth, results


def part(whole, names):
    """Ground truth and results of the images of these names."""
    truth, results = whole
    images = [image for image in truth["images"] if image["file_name"] in names]
    ids = {image["id"] for image in images}
    annotations = [a for a in truth["annotations"] if a["image_id"] in ids]
    truth = {**truth, "images": images, "annotations": annotations}
    return truth, [result for result in results if result["image_id"] in ids]


def row(label, truth, results):
    scored = evaluate_lesions(truth, results, bootstrap=Bootstrap(all_coco=True))
    cells = {"Kvasir-SEG, split": label, "test images": str(len(truth["images"]))}
    for heading, path in COLUMNS.items():
        group, _, key = path.rpartition("/")
        interval = scored.intervals.get(group, {}).get(key)
        cells[heading] = format_value(key, scored.groups()[group][key], interval)
    return cells


if __name__ == "__main__":
    main()
