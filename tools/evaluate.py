#!/usr/bin/env python
"""Score COCO results against COCO ground truth: no model needed.

    tools/evaluate.py --gt annotations/test.json --dt predictions.json --output scores/

writes metrics.json, per_image.csv, pr_curve.csv and pr_curve.png and prints the figures, in percent
but for counts and fp_per_image; n/a is undefined.
"""

import argparse
from pathlib import Path

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.files import write_results
from imrcnn_d2.report.pr_curve import draw_pr_curves, read_pr_curves
from imrcnn_d2.report.tables import figures_table


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gt", required=True, type=Path, help="COCO instance annotations")
    parser.add_argument(
        "--dt",
        required=True,
        type=Path,
        help="COCO results: a list, or a COCO file whose annotations have a score",
    )
    parser.add_argument("--tau", type=float, default=0.7, help="score threshold (0.7)")
    parser.add_argument("--iou", type=float, default=0.5, help="least overlap of a hit (0.5)")
    parser.add_argument(
        "--iou-type",
        choices=("segm", "bbox"),
        default="segm",
        help="match lesions by masks (default) or by boxes",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    args = parser.parse_args(argv)

    try:
        results = evaluate_lesions(
            args.gt, args.dt, tau=args.tau, iou_threshold=args.iou, iou_type=args.iou_type
        )
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    paths = write_results(results, args.output, gt=str(args.gt), dt=str(args.dt))
    picture = args.output / "pr_curve.png"
    curves = read_pr_curves(paths["pr_curve.csv"], results.meta["iou_type"])
    draw_pr_curves(curves, picture, tau=args.tau)

    groups = results.groups()
    print(figures_table({name: groups.pop(name) for name in ("bbox", "segm")}), end="\n\n")
    print(figures_table(groups), end="\n\n")
    print(f"Written: {', '.join(str(path) for path in (*paths.values(), picture))}")


if __name__ == "__main__":
    main()
