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
    text = "what was chosen to be judged before any result was seen: METRIC as GROUP/METRIC "
    text += "(segm/AP50_voc; of classifiers recognition/balanced_accuracy) and, before it, where "
    text += "there are several pairs the one whose p-value is not adjusted, as FIRST:SECOND"
    form = ("[FIRST:SECOND]", "METRIC")
    parser.add_argument("--primary", nargs="+", metavar=form, help=text)
    parser.add_argument("--baseline", metavar="NAME", help="compare with this model only")
    text = "the smallest difference of the primary metric that would matter: test non-inferiority "
    text += "and equivalence (TOST) with it"
    parser.add_argument("--margin", type=float, metavar="DIFFERENCE", help=text)
    text = "power of such a comparison to find this difference of the primary metric, and how many "
    text += "runs or images would be needed"
    parser.add_argument("--plan", type=float, metavar="DIFFERENCE", help=text)
    parser.add_argument("--dataset", help="which evaluation, where a run has several")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    text = "intervals and tests of COCO's AP too, which is slow"
    parser.add_argument("--ci-all", action="store_true", help=text)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    *pair, primary = args.primary or [None]
    if len(pair) > 1:
        parser.error(
            f"--primary takes METRIC or FIRST:SECOND METRIC, not {' '.join(args.primary)}: give "
            "runs before it"
        )
    from imrcnn_d2.evaluation import Bootstrap
    from imrcnn_d2.report import load_run
    from imrcnn_d2.report.comparison import compare, gather, write_comparison

    with one_line_errors(parser):
        runs = [load_run(path, dataset=args.dataset) for path in args.runs]
        bootstrap = Bootstrap(args.resamples, args.seed, args.ci_all)
        options = {key: getattr(args, key) for key in ("baseline", "margin", "plan")}
        options |= {"primary": primary, "pair": pair[0] if pair else None}
        comparison = compare(gather(runs), bootstrap, **options)
        page, *files = write_comparison(comparison, args.output)
    print(for_terminal(page.read_text(encoding="utf-8")))
    print(f"Written: {', '.join(str(path) for path in (page, *files))}")
