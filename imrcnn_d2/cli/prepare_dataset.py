"""Prepare a data set for training: checked COCO annotations, linked images and splits.

    imrcnn prepare-dataset kvasir-seg --root DIR --out datasets/kvasir_seg
    imrcnn prepare-dataset polypgen --root DIR --out datasets/polypgen
    imrcnn prepare-dataset coco --annotations FILE --images DIR --out datasets/egc
    imrcnn prepare-dataset masks --images DIR --masks DIR --out datasets/egc
    imrcnn prepare-dataset labelme --root DIR --out datasets/egc
    imrcnn prepare-dataset cvat --annotations FILE --images DIR --out datasets/egc
    imrcnn prepare-dataset classification --root DIR --out datasets/gastric_recognition
    imrcnn prepare-dataset lesion-free --root DIR --out datasets/lesion_free
    imrcnn prepare-dataset synthetic --num-images 160 --size 256 --out datasets/synthetic
    imrcnn prepare-dataset merge datasets/egc datasets/kvasir_seg --out datasets/both

Each format lists its options with --help.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from imrcnn_d2.cli import new_parser
from imrcnn_d2.data.formats import FORMATS, Format, PublicDataSet, Source
from imrcnn_d2.data.prepare import metadata
from imrcnn_d2.data.prepare.data_set import SPLIT_BY, SplitOptions, prepare_dataset, summarise
from imrcnn_d2.data.prepare.deidentify import PrivateRejects, Pseudonyms, deidentified, parse_keep
from imrcnn_d2.data.prepare.splits import Where, parse_ratio, read_splits
from imrcnn_d2.utils.files import BadInputError, Rejects, few, for_terminal, is_empty


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    title = "formats and public data sets"
    commands = parser.add_subparsers(title=title, dest="command", metavar="FORMAT", required=True)
    for name, form in FORMATS.items():
        command = commands.add_parser(name, help=form.help, description=form.help)
        command.register("action", None, _Once)
        form.add_arguments(command)
        _add_common_arguments(command, form)
    return parser


class _Once(argparse.Action):
    """Stores the value of an option; given again, it is an error: the first would be dropped."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = vars(namespace).setdefault("given", set())
        if self.dest in given:
            values = ", with all its values" if self.nargs == "+" else ""
            raise argparse.ArgumentError(self, f"is given twice: give it once{values}")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def _add_common_arguments(parser: argparse.ArgumentParser, form: Format) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make")
    default = ":".join(map(str, form.default_ratio or ())) or "each keeps its split"
    if isinstance(form, PublicDataSet):
        default = f"the official splits if there are any, else {default}"
    sizes = parser.add_mutually_exclusive_group()
    help_ = f"train:val:test, e.g. 1:0:0 for training alone (default: {default})"
    sizes.add_argument("--ratio", type=parse_ratio, help=help_)
    sizes.add_argument(
        "--all-test",
        dest="ratio",
        action="store_const",
        const=(0, 0, 1),
        help="all images into annotations/test.json, to check a model on them",
    )
    add(
        "--leave-out",
        type=Where.parse,
        nargs="+",
        metavar="CENTRE",
        default=(),
        help="images of these centres are the test split, the others train and val by --ratio; by "
        "another field than centre as FIELD=VALUE",
    )
    help_ = "a field, such as centre, of whose values every split gets its share"
    add("--stratify-by", metavar="FIELD", help=help_)
    add("--seed", type=int, default=0, help="of splits and synthetic images (0)")
    add(
        "--split-by",
        choices=SPLIT_BY,
        default="patient",
        help="patient (default): images of one patient stay in one split, and so do those of one "
        "sequence where its patient is not known; group: near-duplicates do as well, looked for by "
        "comparing all images; image: each image for itself; prefix: as file names state (train_, "
        "val_ or valid_, test_)",
    )
    add("--splits", type=Path, help="splits.json whose assignments are kept; others are added")
    add("--folds", type=int, default=0, help="also write split files for this many folds (e.g. 5)")
    add(
        "--on-error",
        choices=("raise", "reject"),
        default="raise",
        help="bad input stops the run (default), or is listed in OUT/rejected.csv and left out",
    )
    help_ = "list all bad input at once, and what would be made of the rest; write nothing"
    add("--dry-run", action="store_true", help=help_)
    add(
        "--follow-links",
        action="store_true",
        help="read through links that lead out of a folder given here, else bad input; the folder "
        "itself may be a link",
    )

    patients = parser.add_mutually_exclusive_group()
    help_ = "table with the columns file and patient_id"
    patients.add_argument("--patients", type=Path, metavar="CSV", help=help_)
    patients.add_argument(
        "--patient-pattern",
        metavar="REGEX",
        help="matches the patient id in file names: its group named patient, else its first "
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
    add(
        "--metadata",
        type=Path,
        metavar="CSV",
        action="append",
        default=[],
        help="join the columns of a table to images, patients or lesions by its column file, "
        "patient_id or lesion_id; may be given several times",
    )
    add(
        "--metadata-pattern",
        metavar="REGEX",
        help="its named groups are fields of the images whose file names, folders included, it "
        r"matches, e.g. '(?P<centre>C\d)/(?P<patient_id>p\d+)?'; others are counted",
    )

    add = parser.add_argument_group("de-identification").add_argument
    add(
        "--deidentify",
        action="store_true",
        help="crop images to the endoscope's view, blank all around and over it, write them anew "
        "without metadata, and replace names and ids by keyed hashes; needs --key",
    )
    add(
        "--key",
        type=Path,
        metavar="FILE",
        help="the key, outside OUT; made if it does not exist. FILE.names.csv lists old and new "
        "names: keep both from whoever gets the data set",
    )
    add(
        "--keep",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUES",
        help="further fields of images and lesions that may pass, with the values that do: a list, "
        "site=antrum,corpus, or a range of numbers, size_mm=0:60; no others do",
    )
    add(
        "--keep-as-is",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD",
        help="fields that pass whatever they hold: nobody looks for dates or names in them",
    )
    add(
        "--review",
        type=Path,
        metavar="DIR",
        help="also plot sheets of the new images there, for a person to look for writing in them",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.deidentify != (args.key is not None):
        parser.error("--deidentify and --key FILE need each other")
    if (args.keep or args.keep_as_is or args.review) and not args.deidentify:
        parser.error("--keep, --keep-as-is and --review belong to --deidentify")
    if args.dry_run and args.deidentify:
        parser.error("--dry-run makes no key: give it without --deidentify")
    if args.review:
        if args.out.resolve() in (args.review.resolve(), *args.review.resolve().parents):
            parser.error(f"--review {args.review} lies in the data set's folder {args.out}")
        if args.review.exists() and not is_empty(args.review):
            parser.error(f"--review {args.review}: is not empty; choose another folder")
    try:
        _prepare(args)
    except (OSError, ValueError) as error:
        sys.exit(for_terminal(error))


def _prepare(args: argparse.Namespace) -> None:
    names = Pseudonyms(args.key, args.out) if args.deidentify else None
    if names:
        rejects = PrivateRejects(args.on_error, names, args.follow_links)
    else:
        on_error = "reject" if args.dry_run else args.on_error
        rejects = Rejects(on_error, args.follow_links)
    with _explained(rejects, args.dry_run), tempfile.TemporaryDirectory() as scratch:
        form = FORMATS[args.command]
        earlier = None if args.splits is None else read_splits(args.splits)
        source = form.read(args, rejects, Path(scratch))
        earlier = source.splits or earlier
        ratio = form.ratio(args)
        source = _described(source, args, rejects)
        if names:
            keep = parse_keep(args.keep, args.keep_as_is, source)
            source = deidentified(source, Path(scratch, "deidentified"), names, rejects, keep)
            if args.split_by == "prefix":
                raise ValueError(
                    "--split-by prefix reads file names, which --deidentify replaces: prepare the "
                    "data set without it elsewhere, and give its splits.json as --splits"
                )
        options = SplitOptions(
            ratio,
            args.seed,
            args.split_by,
            earlier,
            args.folds,
            leave_out=args.leave_out,
            stratify_by=args.stratify_by,
            renamed=names.of_splits if names else dict,
        )
        prepared = prepare_dataset(source, args.out, options, rejects, args.dry_run)
    ratio = None if source.splits else options.sizes.get("ratio")
    faults = [e for e in rejects.errors if args.dry_run and e.can_be_rejected]
    left_out = [error for error in rejects.errors if error not in faults]
    print(for_terminal(summarise(prepared.coco, ratio, prepared.notes, left_out)))
    if faults:
        raise ValueError(_list(faults))
    state = "already there, unchanged" if prepared.unchanged else "written"
    print(f"\n{args.out}: {'could be written' if args.dry_run else state}")
    if args.review:
        from imrcnn_d2.report.plots.images import plot_review_sheets

        plot_review_sheets(args.out / "images", args.review)


@contextlib.contextmanager
def _explained(rejects: Rejects, dry_run: bool) -> Iterator[None]:
    """Add to bad input how to go on without it or, if it has been left out, why that was; to what
    ends a dry run all bad input before it."""
    left_out = rejects.errors
    try:
        yield
    except (OSError, ValueError) as error:
        if dry_run and left_out:
            raise ValueError(f"{error}\n\n{_list(left_out)}") from error
        if not isinstance(error, BadInputError):
            raise
        reason = error.reason
        if error.can_be_rejected:
            reason += "; correct it, or leave out such files with --on-error reject; --dry-run "
            reason += "lists all"
        elif left_out:
            reason += f"; left out ({len(left_out)}): {few(left_out, separator='; ')}"
        raise BadInputError(error.file, reason) from error


def _list(faults: Sequence[BadInputError]) -> str:
    lines = [f"Bad input ({len(faults)}), nothing was written:", *(f"  {f}" for f in faults)]
    return "\n".join(lines)


def _described(source: Source, args: argparse.Namespace, rejects: Rejects) -> Source:
    """The data set with the patients and columns of tables, file names or DICOM files."""
    if args.metadata_pattern is not None:
        source = metadata.with_pattern(source, args.metadata_pattern, rejects)
    if args.patients is not None:
        source = metadata.with_patients_from_csv(source, args.patients, rejects)
    patient_of = None
    if args.patient_pattern is not None:
        patient_of = metadata.patients_from_pattern(args.patient_pattern)
    elif args.patients_from_dicom is not None:
        folder = None if args.patients_from_dicom is True else args.patients_from_dicom
        patient_of = metadata.patients_from_dicom(folder, rejects)
    if patient_of is not None:
        source = metadata.with_patients(source, patient_of, rejects)
    tables = [metadata.read_metadata(path, rejects) for path in args.metadata]
    return metadata.with_defaults(metadata.with_metadata(source, tables, rejects))
