"""Prepare a data set for training: checked COCO annotations, linked images and splits.

    imrcnn prepare-dataset kvasir-seg --root DIR --out datasets/kvasir_seg
    imrcnn prepare-dataset coco --annotations FILE --images DIR --out datasets/egc
    imrcnn prepare-dataset masks --images DIR --masks DIR --out datasets/egc
    imrcnn prepare-dataset labelme --root DIR --out datasets/egc
    imrcnn prepare-dataset cvat --annotations FILE --images DIR --out datasets/egc
    imrcnn prepare-dataset classification --root DIR --out datasets/gastric_recognition
    imrcnn prepare-dataset lesion-free --root DIR --out datasets/lesion_free
    imrcnn prepare-dataset synthetic --num-images 160 --size 256 --out datasets/synthetic

Each format lists its options with --help.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from imrcnn_d2.cli import new_parser
from imrcnn_d2.data.formats import FORMATS, Source
from imrcnn_d2.data.formats.lesion_free import with_lesion_free
from imrcnn_d2.data.prepare.data_set import SPLIT_BY, SplitOptions, prepare_dataset, summarise
from imrcnn_d2.data.prepare.deidentify import PrivateRejects, Pseudonyms, deidentified, parse_keep
from imrcnn_d2.data.prepare.metadata import (
    patients_from_dicom,
    patients_from_pattern,
    read_metadata,
    with_metadata,
    with_patients,
    with_patients_from_csv,
)
from imrcnn_d2.data.prepare.splits import parse_ratio, read_splits
from imrcnn_d2.utils.files import BadInputError, Rejects, for_terminal, is_empty


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder to make")
    common.add_argument(
        "--ratio", type=_ratio, help="train:val:test (default 12:3:5; of lesion-free 0:0:1)"
    )
    common.add_argument("--seed", type=int, default=0, help="of splits and synthetic images (0)")
    common.add_argument(
        "--split-by",
        choices=SPLIT_BY,
        default="patient",
        help="patient (default): images of one patient stay in one split, where patients are known;"
        " group: near-duplicates do as well, found by comparing all images; image: each image for "
        "itself; prefix: as file names state (train_, val_ or valid_, test_)",
    )
    common.add_argument(
        "--splits",
        type=Path,
        help="splits.json whose assignments are kept; other images are added to them",
    )
    common.add_argument(
        "--folds", type=int, default=0, help="also write split files for this many folds (e.g. 5)"
    )
    common.add_argument(
        "--on-error",
        choices=("raise", "reject"),
        default="raise",
        help="bad input stops the run (default), or is listed in OUT/rejected.csv and left out",
    )
    common.add_argument(
        "--follow-links",
        action="store_true",
        help="read through links that lead out of a folder given here, else bad input; the folder "
        "itself may be a link",
    )

    patients = common.add_mutually_exclusive_group()
    patients.add_argument(
        "--patients", type=Path, metavar="CSV", help="table with the columns file and patient_id"
    )
    patients.add_argument(
        "--patient-pattern",
        metavar="REGEX",
        help="finds the patient id in file names: its group named patient, else its first "
        "group, else all that matches",
    )
    patients.add_argument(
        "--patients-from-dicom",
        type=Path,
        nargs="?",
        const=True,  # of the images themselves
        metavar="DIR",
        help="PatientID of DIR/NAME.dcm for the image NAME.png; without DIR, of the images "
        "themselves",
    )
    common.add_argument(
        "--metadata",
        type=Path,
        metavar="CSV",
        action="append",
        default=[],
        help="join the columns of a table to images, patients or lesions by its column file, "
        "patient_id or lesion_id; may be given several times",
    )

    private = common.add_argument_group("de-identification")
    private.add_argument(
        "--deidentify",
        action="store_true",
        help="crop images to the endoscope's view, blank all around and over it, write them anew "
        "without metadata, and replace names and ids by keyed hashes; needs --key",
    )
    private.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="the key, outside OUT; made if it does not exist. FILE.names.csv lists old and new "
        "names: keep both from whoever gets the data set",
    )
    private.add_argument(
        "--keep",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUES",
        help="further fields of images and lesions that may pass, with the values that do: a list, "
        "site=antrum,corpus, or a range of numbers, size_mm=0:60; no others do",
    )
    private.add_argument(
        "--keep-as-is",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD",
        help="fields that pass whatever they hold: nobody looks for dates or names in them",
    )
    private.add_argument(
        "--review",
        type=Path,
        metavar="DIR",
        help="also plot sheets of the new images there, for a person to look for writing in them",
    )

    for name, form in FORMATS.items():
        form.add_arguments(commands.add_parser(name, parents=[common], help=form.help))
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.deidentify != (args.key is not None):
        parser.error("--deidentify and --key FILE need each other")
    if (args.keep or args.keep_as_is or args.review) and not args.deidentify:
        parser.error("--keep, --keep-as-is and --review belong to --deidentify")
    if args.review:
        if args.out.resolve() in (args.review.resolve(), *args.review.resolve().parents):
            parser.error(f"--review {args.review} lies in the data set's folder {args.out}")
        if args.review.exists() and not is_empty(args.review):
            parser.error(f"--review {args.review}: is not empty; choose another folder")
    try:
        names = Pseudonyms(args.key, args.out) if args.deidentify else None
        if names:
            rejects = PrivateRejects(args.on_error, names, args.follow_links)
        else:
            rejects = Rejects(args.on_error, args.follow_links)
        with tempfile.TemporaryDirectory() as scratch:
            form = FORMATS[args.command]
            earlier = None if args.splits is None else read_splits(args.splits)
            source = form.read(args, rejects, Path(scratch))
            if getattr(args, "negatives", None) is not None:
                source = with_lesion_free(source, args.negatives, rejects)
            options = SplitOptions(
                # No default of the parsers: an argument that they share has one for all.
                ratio=form.ratio(args),
                seed=args.seed,
                split_by=args.split_by,
                earlier=source.splits or earlier,
                folds=args.folds,
            )
            source = _described(source, args, rejects)
            if names:
                folder = Path(scratch, "deidentified")
                keep = parse_keep(args.keep, args.keep_as_is, source)
                source = deidentified(source, folder, names, rejects, keep)
                options = _renamed(options, names)
            prepared = prepare_dataset(source, args.out, options, rejects)
        ratio = options.sizes.get("ratio")
        print(for_terminal(summarise(prepared.coco, ratio, prepared.notes, rejects.errors)))
        print(f"\n{args.out}: {'already there, unchanged' if prepared.unchanged else 'written'}")
        if args.review:
            from imrcnn_d2.report.plots.images import plot_review_sheets

            plot_review_sheets(args.out / "images", args.review)
    except BadInputError as error:
        sys.exit(f"{error}\nCorrect it, or list such files and go on with --on-error reject.")
    except (OSError, ValueError) as error:
        sys.exit(for_terminal(error))


def _described(source: Source, args: argparse.Namespace, rejects: Rejects) -> Source:
    """The data set with the patients and columns of tables, file names or DICOM files."""
    if args.patients is not None:
        source = with_patients_from_csv(source, args.patients, rejects)
    elif args.patient_pattern is not None:
        source = with_patients(source, patients_from_pattern(args.patient_pattern), rejects)
    elif args.patients_from_dicom is not None:
        folder = None if args.patients_from_dicom is True else args.patients_from_dicom
        source = with_patients(source, patients_from_dicom(folder, rejects), rejects)
    return with_metadata(source, [read_metadata(f, rejects) for f in args.metadata], rejects)


def _renamed(options: SplitOptions, names: Pseudonyms) -> SplitOptions:
    """The options for images with new names."""
    if options.split_by == "prefix":
        raise ValueError(
            "--split-by prefix reads file names, which --deidentify replaces. Prepare the data set "
            "without it elsewhere, and give that one's splits.json as --splits"
        )
    earlier = options.earlier and names.of_splits(options.earlier)
    return replace(options, earlier=earlier)


def _ratio(text: str) -> tuple[int, ...]:
    try:
        return parse_ratio(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
