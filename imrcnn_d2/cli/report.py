"""Write one HTML page about a run, or about several on the same test set.

    imrcnn report output/imrcnn --output report.html --card model_card.md
    imrcnn report MR-CNN=output/mrcnn IMR-CNN=output/imrcnn --output report.html

RUN is the OUTPUT_DIR of a training, or a folder that imrcnn evaluate wrote; its detections are
scored anew. The page holds all it needs, the images included: pass it on only as the data set's
terms allow.
"""

import argparse
from pathlib import Path

from imrcnn_d2.cli import new_parser, one_line_errors, output_file


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="what to report on")
    parser.add_argument("--output", required=True, type=output_file, help="the page to write")
    text = "shares of images with a lesion, at which PPV and NPV are given (0.005 0.05)"
    parser.add_argument(
        "--prevalence", nargs="+", type=float, default=[0.005, 0.05], metavar="P", help=text
    )
    parser.add_argument(
        "--max-images", type=int, default=300, metavar="N", help="images in the gallery (300)"
    )
    text = "folder that file_name is relative to (images/ next to the ground truth's folder)"
    parser.add_argument("--images", type=Path, metavar="DIR", help=text)
    text = "write a model card of the one RUN, in Markdown"
    parser.add_argument("--card", type=output_file, metavar="FILE", help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.card and len(args.runs) > 1:
        parser.error("--card describes one model: give it with one RUN")
    if args.max_images < 0:
        parser.error(f"--max-images {args.max_images}: give 0 or more")
    from imrcnn_d2.report import load_run
    from imrcnn_d2.report.html import render_report
    from imrcnn_d2.report.model_card import write_model_card
    from imrcnn_d2.task import DETECTION

    with one_line_errors(parser):
        runs = [load_run(run, images=args.images) for run in args.runs]
        if args.card and runs[0].task is not DETECTION:
            raise ValueError("--card: there are no model cards of classifiers yet")
        render_report(runs, args.output, prevalences=args.prevalence, max_images=args.max_images)
        card = f", {write_model_card(runs[0], args.card)}" if args.card else ""
    print(f"Written: {args.output}{card}")
