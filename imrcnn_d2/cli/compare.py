"""Compare models: the paper's Tables 3, 4 and 5 and its Figure 4 for your runs; classifiers.

    imrcnn compare output/mrcnn output/ibmrcnn output/imrcnn --output comparison/
    imrcnn compare "MR-CNN=old/mrcnn" "IMR-CNN=old/imrcnn" --baseline MR-CNN --output comparison/

A run is the OUTPUT_DIR of a training or the folder of an evaluation; NAME=RUN names its model. Runs
of one model that differ by seed, and folds of a cross-validation, are grouped. comparison.md holds
everything; each table is there as Markdown, CSV and LaTeX too, the figure as PNG and SVG.
"""

import argparse

from imrcnn_d2.cli import new_parser, one_line_errors, output_folder
from imrcnn_d2.utils.files import for_terminal


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder, or NAME=FOLDER")
    parser.add_argument("--output", required=True, type=output_folder, help="folder for the files")
    text = "the one endpoint whose p-values are not adjusted (segm/AP50_voc; of classifiers "
    text += "recognition/balanced_accuracy)"
    parser.add_argument("--primary", metavar="GROUP/METRIC", help=text)
    parser.add_argument("--baseline", metavar="NAME", help="compare with this model only")
    parser.add_argument("--dataset", help="which evaluation, where a run has several")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    text = "intervals and tests of COCO's AP too, which is slow"
    parser.add_argument("--ci-all", action="store_true", help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    from imrcnn_d2.evaluation import Bootstrap
    from imrcnn_d2.report import load_run
    from imrcnn_d2.report.comparison import compare, gather, write_comparison

    with one_line_errors(parser):
        runs = [load_run(path, dataset=args.dataset) for path in args.runs]
        bootstrap = Bootstrap(args.resamples, args.seed, args.ci_all)
        comparison = compare(gather(runs), bootstrap, primary=args.primary, baseline=args.baseline)
        page, *files = write_comparison(comparison, args.output)
    print(for_terminal(page.read_text(encoding="utf-8")))
    print(f"Written: {', '.join(str(path) for path in (page, *files))}")
