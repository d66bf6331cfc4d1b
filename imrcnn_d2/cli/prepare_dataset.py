"""Prepare a data set for training: checked COCO annotations, linked images and splits.

imrcnn prepare-dataset kvasir-seg --root DIR --out datasets/kvasir_seg
imrcnn prepare-dataset coco --annotations FILE --images DIR --out datasets/egc
imrcnn prepare-dataset masks --images DIR --masks DIR --out datasets/egc
imrcnn prepare-dataset labelme --root DIR --out datasets/egc
imrcnn prepare-dataset cvat --annotations FILE --images DIR --out datasets/egc
imrcnn prepare-dataset classification --root DIR --out datasets/gastric_recognition
imrcnn prepare-dataset lesion-free --root DIR --out datasets/lesion_free
imrcnn prepare-dataset synthetic --num-images 160 --size 256 --out datasets/synthetic
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from imrcnn_d2.cli import new_parser
from imrcnn_d2.data.formats import classification, coco, cvat, kvasir_seg, labelme, mask_folder
from imrcnn_d2.data.formats import kvasir_seg as lesion_free
from imrcnn_d2.data.prepare import synthetic
from imrcnn_d2.data.prepare.data_set import (
    SPLIT_BY,
    Source,
    SplitOptions,
    is_empty,
    prepare_dataset,
    summarise,
    summarise_classes,
)
from imrcnn_d2.data.prepare.deidentify import PrivateRejects, Pseudonyms, deidentified, parse_keep
from imrcnn_d2.data.prepare.metadata import (
    patients_from_dicom,
    patients_from_pattern,
    read_metadata,
    with_metadata,
    with_patients,
    with_patients_from_csv,
)
from imrcnn_d2.data.prepare.splits import FixedTest, parse_ratio, read_splits
from imrcnn_d2.utils.files import BadInputError, Rejects, for_terminal


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder to make")
    common.add_argument(
        "--ratio", type=_ratio, help="train:val:test (default 12:3:5; of lesion-free 0:0:1)"
    )
    common.add_argument("--seed", type=int, default=0, help="of the splits and of drawing (0)")
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
        help="the key, outside OUT; made if it does not exist. FILE.names.csv says which became "
        "which: keep both from whoever gets the data set",
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
        help="also draw sheets of the new images there, for a person to look for writing in them",
    )

    kvasir = commands.add_parser(
        "kvasir-seg", parents=[common], help="images/ and masks/ in a folder"
    )
    kvasir.add_argument("--root", type=Path, required=True, help="has images/ and masks/")
    kvasir.add_argument("--negatives", type=Path, help="folder of images without a lesion to add")
    kvasir.add_argument(
        "--min-area",
        type=int,
        default=kvasir_seg.MIN_AREA,
        help="smaller parts of a mask, in pixels, are dropped as specks (default %(default)s)",
    )

    healthy = commands.add_parser(
        "lesion-free",
        parents=[common],
        help="images without a lesion only, all for testing: a detector's false alarms",
    )
    healthy.add_argument("--root", type=Path, required=True, help="folder of images")

    own = commands.add_parser(
        "coco", parents=[common], help="own data: a COCO instance JSON and a folder of images"
    )
    own.add_argument("--annotations", type=Path, required=True, help="COCO instance JSON")
    own.add_argument("--images", type=Path, required=True, help="folder of the file_name entries")

    outlined = argparse.ArgumentParser(add_help=False)
    outlined.add_argument(
        "--negatives", type=Path, metavar="DIR", help="folder of images without a lesion to add"
    )
    outlined.add_argument(
        "--classes",
        nargs="+",
        metavar="LABEL",
        help="the classes in their order (default: those found, sorted; of masks that name none, "
        "lesion)",
    )

    masks = commands.add_parser(
        "masks", parents=[common, outlined], help="own data: mask images, of four kinds"
    )
    masks.add_argument("--images", type=Path, required=True, help="folder of images")
    masks.add_argument("--masks", type=Path, required=True, help="folder of masks, named alike")
    masks.add_argument(
        "--kind",
        choices=mask_folder.KINDS,
        default="binary",
        help="binary (default): white is lesion, each connected part an instance; classes: pixels "
        "number the class; instances: pixels number the instance; files: a file for each instance, "
        "NAME_1.png or NAME/1.png, perhaps with its class, NAME_polyp_1.png",
    )
    masks.add_argument(
        "--suffix", default="", metavar="TEXT", help="of the masks' names, e.g. _segmentation"
    )
    masks.add_argument(
        "--min-area",
        type=int,
        default=kvasir_seg.MIN_AREA,
        help="smaller parts of a mask, in pixels, are dropped as specks (default %(default)s)",
    )

    by_labelme = commands.add_parser(
        "labelme", parents=[common, outlined], help="own data: LabelMe's JSON files"
    )
    by_labelme.add_argument("--root", type=Path, required=True, help="folder of the JSON files")
    by_labelme.add_argument(
        "--images",
        type=Path,
        help="folder of images, laid out as --root is (default: where each file says, in --root)",
    )

    by_cvat = commands.add_parser(
        "cvat", parents=[common, outlined], help="own data: CVAT's XML for images or video, 1.1"
    )
    by_cvat.add_argument(
        "--annotations", type=Path, nargs="+", required=True, help="XML of one or several tasks"
    )
    by_cvat.add_argument(
        "--images", type=Path, required=True, help="folder of the images or of the video's frames"
    )

    labelled = commands.add_parser(
        "classification", parents=[common], help="images with a class each: folders or a CSV"
    )
    labelled.add_argument(
        "--root", type=Path, required=True, help="has one folder a class, or the files of --csv"
    )
    labelled.add_argument(
        "--csv",
        type=Path,
        help="table with the columns file (relative to --root), label and, if known, patient_id "
        "and split (train, val, test or empty)",
    )
    labelled.add_argument(
        "--classes", nargs="+", help="the classes in their order (default: those found, sorted)"
    )
    labelled.add_argument(
        "--cancer",
        nargs="+",
        metavar="CLASS",
        help="classes that are cancer, for the two-class table of cancer against benign (default: "
        "those with cancer or carcinoma in their name)",
    )
    labelled.add_argument(
        "--test-per-class",
        type=int,
        metavar="N",
        help="a test set of N images of each class instead of --ratio; 150 as published",
    )
    labelled.add_argument(
        "--val-percent",
        type=int,
        default=10,
        metavar="P",
        help="validation images in percent of those not for testing, with --test-per-class or "
        "where the table has training and no validation images (default %(default)s)",
    )

    drawn = commands.add_parser("synthetic", parents=[common], help="draw the embedded data set")
    drawn.add_argument("--num-images", type=int, required=True)
    drawn.add_argument("--size", type=int, required=True, help="width and height in pixels")
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
            options = SplitOptions(
                # No default of the parsers: an argument that they share has one for all.
                ratio=args.ratio or ((0, 0, 1) if args.command == "lesion-free" else (12, 3, 5)),
                seed=args.seed,
                split_by=args.split_by,
                earlier=None if args.splits is None else read_splits(args.splits),
                folds=args.folds,
            )
            if args.command == "classification":
                if args.csv and (args.patients or args.patient_pattern or args.patients_from_dicom):
                    raise ValueError(f"patients of {args.csv} belong in its column patient_id")
                source, options = _read_classification(args, rejects, options)
            else:
                source = _read(args, rejects, Path(scratch))
            source = _described(source, args, rejects)
            if names:
                folder = Path(scratch, "deidentified")
                keep = parse_keep(args.keep, args.keep_as_is, source)
                source = deidentified(source, folder, names, rejects, keep)
                options = _renamed(options, names)
            prepared = prepare_dataset(source, args.out, options, rejects)
        if args.command == "classification":
            print(for_terminal(summarise_classes(prepared.coco, prepared.notes, rejects.errors)))
        else:
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


def _read(args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
    if args.command == "kvasir-seg":
        return kvasir_seg.read_kvasir_seg(args.root, rejects, args.negatives, args.min_area)
    if args.command == "coco":
        return coco.read_coco(args.annotations, args.images, rejects)
    if args.command == "lesion-free":
        return lesion_free.read_lesion_free(args.root, rejects)
    if args.command == "synthetic":
        return synthetic.generate(scratch, args.num_images, args.size, args.seed)
    source = _read_outlined(args, rejects, scratch)
    if args.negatives is not None:
        source = lesion_free.with_lesion_free(source, args.negatives, rejects)
    return source


def _read_outlined(args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
    """What was drawn in an annotation tool."""
    if args.command == "labelme":
        return labelme.read_labelme(args.root, rejects, scratch, args.images, args.classes)
    if args.command == "cvat":
        return cvat.read_cvat(args.annotations, args.images, rejects, args.classes)
    how = {"classes": args.classes, "suffix": args.suffix, "min_area": args.min_area}
    return mask_folder.read_mask_folder(args.images, args.masks, rejects, args.kind, **how)


def _described(source: Source, args: argparse.Namespace, rejects: Rejects) -> Source:
    """The data set with the patients and columns that tables, names or DICOM files tell."""
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


def _read_classification(
    args: argparse.Namespace, rejects: Rejects, options: SplitOptions
) -> tuple[Source, SplitOptions]:
    """The data set, and the options with the splits that its table gives."""
    chosen = rejects, args.classes, args.cancer
    if args.csv is None:
        source, given = classification.read_class_folders(args.root, *chosen)
    else:
        source, given = classification.read_label_csv(args.csv, args.root, *chosen)
    if given and options.earlier:
        raise ValueError(f"{args.csv} has a split column: leave it empty, or leave out --splits")
    if given:
        how = args.val_percent, options.seed, args.split_by != "image"
        options = replace(options, earlier=classification.carve_validation(source, given, *how))
    if args.test_per_class is not None:
        options = replace(options, ratio=FixedTest(args.test_per_class, args.val_percent))
    return source, options


def _ratio(text: str) -> tuple[int, ...]:
    try:
        return parse_ratio(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
