"""How far annotators agree: two or more COCO files of the same images, and a model as one more.

    tools/agreement.py --annotations anna.json ben.json --images DIR --output agreement/
    tools/agreement.py --annotations anna.json ben.json eva.json --dt predictions.json --output ...

prints, for every two, F1 of lesions, IoU and Dice of the lesions that both outlined and of all that
each outlined in an image, and Cohen's kappa of images with a lesion against those without; with
three or more Fleiss' kappa; all with 95 % intervals, in percent but for kappa. Writes
agreement.json, agreement.csv, per_image.csv, missing.csv (images that not all files have), a
picture of the matrix and, with --images, a contact sheet of the images that differ most. Images are
the same if their file_name is.
"""

import argparse
from pathlib import Path

from imrcnn_d2.evaluation import Bootstrap
from imrcnn_d2.evaluation.annotator_agreement import (
    agreement,
    read_annotator,
    read_model,
    write_agreement,
)
from imrcnn_d2.report.agreement import agreement_table, plot_agreement, plot_disagreements
from imrcnn_d2.utils.files import file_sha256, for_terminal


def main(argv=None):
    parser = argument_parser()
    args = parser.parse_args(argv)
    try:
        names = args.names or unique_names(args.annotations)
        if len(names) != len(args.annotations):
            raise ValueError(f"{len(args.annotations)} files, but {len(names)} --names.")
        annotators = [
            read_annotator(name, file) for name, file in zip(names, args.annotations, strict=True)
        ]
        model = None
        if args.dt is not None:
            model = read_model(args.model_name, args.dt, args.tau, annotators[0])
        bootstrap = Bootstrap(args.resamples, args.seed) if args.resamples else None
        found = agreement(annotators, model, iou_threshold=args.iou, bootstrap=bootstrap)
        files = [*args.annotations, *([args.dt] if args.dt else [])]
        meta = {
            "files": [str(file.absolute()) for file in files],
            "sha256": [file_sha256(file) if file.is_file() else None for file in files],
            "tau": args.tau if args.dt else None,
        }
        paths = write_agreement(found, args.output, **meta)
        paths.append(args.output / "agreement.png")
        plot_agreement(found, paths[-1])
        if args.images:
            sheet = args.output / "disagreements.png"
            if plot_disagreements(found, args.images, sheet) is not None:
                paths.append(sheet)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {for_terminal(error)}\n")
    report(found)
    print(f"Written to {args.output}: {', '.join(path.name for path in paths)}")


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--annotations",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help="COCO instance annotations, a file for each annotator",
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="of the annotators (default: the files' names)"
    )
    parser.add_argument(
        "--dt",
        type=Path,
        help="a model's predictions.json or COCO results (of the images of the first file), or a "
        "folder of masks",
    )
    parser.add_argument("--tau", type=float, default=0.7, help="score threshold of --dt (0.7)")
    parser.add_argument("--model-name", default="model", metavar="NAME", help="of --dt (model)")
    parser.add_argument(
        "--iou", type=float, default=0.5, help="least overlap of outlines of one lesion (0.5)"
    )
    parser.add_argument(
        "--resamples", type=int, default=2000, help="of the bootstrap (2000); 0: no intervals"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument(
        "--images", type=Path, help="folder that file_name is relative to, for a contact sheet"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    return parser


def unique_names(files):
    """The files' stems; where two are the same, with their folders."""
    stems = [file.stem for file in files]
    same = len(set(stems)) < len(stems)
    return [str(file.with_suffix("")) for file in files] if same else stems


def report(found):
    """Print the figures and what was left out."""
    print(f"{len(found.images)} images")
    for note in found.notes:
        print(for_terminal(note))
    if found.missing:
        print(f"{len(found.missing)} images left out, since not all files have them:")
        for file, names in found.missing.items():
            print(for_terminal(f"  {file}: not in {', '.join(names)}"))
    print(f"\n{agreement_table(found)}\n")
