"""How far annotators agree: two or more COCO files of the same images, and a model as one more.
Or whether readers are better with AI than without it.

    imrcnn agreement --annotations anna.json ben.json --images DIR --output agreement/
    imrcnn agreement --annotations anna.json ben.json eva.json --dt predictions.json --output ...
    imrcnn agreement --readers ratings.csv --baseline without --margin 5 --output readers/

The first two print for every pair F1 of lesions, IoU and Dice of the lesions that both annotated
and of all that each annotated in an image, and Cohen's kappa of images with a lesion against those
without; with three or more annotators Fleiss' kappa; all with 95 % intervals, in percent but for
kappa. Writes agreement.json, agreement.csv, per_image.csv, missing.csv (images that not all files
have), a plot of the matrix and, with --images, a contact sheet of the images that differ most.
Images are the same if their file_name is.

With --readers, a table with one row per reader, modality and case: the columns reader, modality
(such as without and with), case, truth (1: there is a lesion, or 0) and rating; perhaps patient_id;
and for lesions that were marked lesions, hits and false_marks. Prints AUC, sensitivity and
specificity of both modalities, and their difference with a 95 % interval for other readers and
other cases (Obuchowski and Rockette); writes readers.json, readers.csv and a plot.
"""

import argparse
from pathlib import Path

from imrcnn_d2.cli import add_tau, new_parser, one_line_errors, refuse_options
from imrcnn_d2.utils.files import file_sha256, for_terminal


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    given = parser.add_mutually_exclusive_group(required=True)
    text = "COCO instance annotations, one file per annotator"
    given.add_argument("--annotations", nargs="+", type=Path, metavar="FILE", help=text)
    text = "ratings of several readers, with and without AI"
    given.add_argument("--readers", type=Path, metavar="CSV", help=text)
    text = "the modality that --readers compares with (default: that of the first row)"
    parser.add_argument("--baseline", metavar="NAME", help=text)
    text = "least rating of --readers that counts as positive (default: 1 of ratings 0 and 1)"
    parser.add_argument("--positive-from", type=float, metavar="RATING", help=text)
    text = "in points: also test that the other modality of --readers is not worse by this much"
    parser.add_argument("--margin", type=float, help=text)
    text = "folder of `imrcnn evaluate` on the cases of --readers, whose curves are plotted too"
    parser.add_argument("--model", type=Path, metavar="DIR", help=text)
    text = "of the annotators (default: the files' names)"
    parser.add_argument("--names", nargs="+", metavar="NAME", help=text)
    text = "a model's predictions.json or COCO results (of the images of the first file), or a "
    parser.add_argument("--dt", type=Path, help=f"{text}folder of masks")
    text = "score threshold of --dt (0.7; 0.5 where it has a raw_score too)"
    add_tau(parser, help=text)
    parser.add_argument("--model-name", default="model", metavar="NAME", help="of --dt (model)")
    text = "least overlap of two annotations of one lesion (0.5)"
    parser.add_argument("--iou", type=float, default=0.5, help=text)
    text = "of the bootstrap (2000); 0: no intervals"
    parser.add_argument("--resamples", type=int, default=2000, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    text = "folder that file_name is relative to, for a contact sheet"
    parser.add_argument("--images", type=Path, help=text)
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    of_readers = ("baseline", "positive_from", "margin", "model")
    of_annotators = ("names", "dt", "tau", "model_name", "iou", "resamples", "seed", "images")
    others = of_annotators if args.readers else of_readers
    refuse_options(parser, args, others, "does not go with the other options")
    with one_line_errors(parser):
        (compare_readers if args.readers else compare_annotators)(args)


def compare_readers(args: argparse.Namespace) -> None:
    """Compare readers with and without AI, write, plot and print."""
    from imrcnn_d2.evaluation.readers import read_readers, reader_metrics, write_readers
    from imrcnn_d2.report.readers import plot_readers, readers_table

    study = read_readers(args.readers, args.baseline)
    metrics = reader_metrics(study, args.positive_from)
    table = readers_table(study, metrics, args.margin)
    plot_readers(study, metrics, args.output / "readers.png", args.model)
    settings = {"margin": args.margin, "positive_from": args.positive_from}
    source = {"file": str(args.readers.absolute()), "sha256": file_sha256(args.readers)}
    paths = write_readers(study, metrics, args.output, **settings, **source)
    positive = int(study.positive.sum())
    print(
        f"{len(study.readers)} readers, {len(study.cases)} cases, {positive} with a lesion. "
        f"{study.modalities[1]} minus {study.modalities[0]}; 95 % intervals are for other readers "
        f"and other cases.\n\n{for_terminal(table)}\n"
    )
    names = [*(path.name for path in paths), "readers.png"]
    print(f"Written to {args.output}: {', '.join(names)}")


def compare_annotators(args: argparse.Namespace) -> None:
    """Compare annotators, write, plot and print."""
    from imrcnn_d2.evaluation import Bootstrap, annotator_agreement
    from imrcnn_d2.report.agreement import agreement_table, plot_agreement, plot_disagreements

    names = args.names or unique_names(args.annotations)
    if len(names) != len(args.annotations):
        raise ValueError(f"{len(args.annotations)} files, but {len(names)} --names.")
    annotators = list(map(annotator_agreement.read_annotator, names, args.annotations))
    files, model, tau = [*args.annotations], None, None
    if args.dt is not None:
        files, first = [*files, args.dt], annotators[0]
        model = annotator_agreement.read_model(args.model_name, args.dt, args.tau, first)
        tau = model.tau
    bootstrap = Bootstrap(args.resamples, args.seed) if args.resamples else None
    settings = dict(iou_threshold=args.iou, bootstrap=bootstrap)
    result = annotator_agreement.agreement(annotators, model, **settings)
    paths = annotator_agreement.write_agreement(
        result,
        args.output,
        files=[str(file.absolute()) for file in files],
        sha256=[file_sha256(file) if file.is_file() else None for file in files],
        tau=tau,
    )
    paths.append(args.output / "agreement.png")
    plot_agreement(result, paths[-1])
    sheet = args.output / "disagreements.png"
    if args.images and plot_disagreements(result, args.images, sheet) is not None:
        paths.append(sheet)
    print(f"{len(result.images)} images")
    for note in result.notes:
        print(for_terminal(note))
    if result.missing:
        print(f"{len(result.missing)} images left out, since not all files have them:")
        for file, lacking in result.missing.items():
            print(for_terminal(f"  {file}: not in {', '.join(lacking)}"))
    print(f"\n{agreement_table(result)}\n")
    print(f"Written to {args.output}: {', '.join(path.name for path in paths)}")


def unique_names(files):
    """The files' stems; where two are the same, with their folders."""
    stems = [file.stem for file in files]
    same = len(set(stems)) < len(stems)
    return [str(file.with_suffix("")) for file in files] if same else stems
