"""Rank a data set's annotations by how much models that never saw them disagree.

    imrcnn annotation-suspects --runs output/cross_validation --output suspects/

reads the runs of a cross-validation (imrcnn cross-validate), several models and seeds together,
and compares each one's predictions for its test fold with the annotations: confident detections
where nothing is annotated, annotations that no model finds, and annotations that fit badly. Writes
suspects.csv with all of them, the most suspect first; and of the first images suspects.json
(findings as an audit has them), suspects.png with both contours, and labelme/, files to open in
LabelMe. A model can be wrong as well: this is a list to look at, not one to correct by.
"""

import argparse
from pathlib import Path

from imrcnn_d2.cli import new_parser, one_line_errors
from imrcnn_d2.utils.files import for_terminal


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    text = "folder of a cross-validation, or of one or more trainings with their evaluations"
    parser.add_argument("--runs", required=True, type=Path, help=text)
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    text = "images to review (default %(default)s)"
    parser.add_argument("--number", type=int, default=24, help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.number < 1:
        parser.error("--number is at least 1")
    from tabulate import tabulate

    from imrcnn_d2.report.label_errors import COLUMNS, gather_label_errors, write_label_errors

    with one_line_errors(parser):
        cases, runs = gather_label_errors(args.runs)
        paths = write_label_errors(cases, runs, args.output, number=args.number)
    rows = [{"rank": rank, **case.row} for rank, case in enumerate(cases[: args.number], 1)]
    table = tabulate([[row[name] for name in COLUMNS] for row in rows], headers=COLUMNS)
    print(for_terminal(table))
    print(f"\n{len(runs)} runs, {len(cases)} annotations and detections compared")
    named = ", ".join(path.name for path in paths[:3])
    print(f"Written to {args.output}: {named}, labelme/ ({len(paths) - 3} files)")
