#!/usr/bin/env python
"""Prepares a data set for training: checked COCO annotations, linked images and splits.

python tools/prepare_dataset.py kvasir-seg --root DIR --out datasets/kvasir_seg
python tools/prepare_dataset.py coco --annotations FILE --images DIR --out datasets/egc
python tools/prepare_dataset.py synthetic --num-images 160 --size 256 --out datasets/synthetic
"""

import argparse
import sys
import tempfile
from pathlib import Path

from imrcnn_d2.data import coco, kvasir_seg, synthetic
from imrcnn_d2.data.prepare import Source, SplitOptions, prepare_dataset
from imrcnn_d2.data.rejects import BadInputError, Rejects
from imrcnn_d2.data.splits import parse_ratio, read_splits
from imrcnn_d2.data.summary import summarise


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder to make")
    common.add_argument(
        "--ratio", type=_ratio, default=(12, 3, 5), help="train:val:test (default 12:3:5)"
    )
    common.add_argument("--seed", type=int, default=0, help="of the splits and of drawing (0)")
    common.add_argument(
        "--split-by",
        choices=("patient", "image"),
        default="patient",
        help="patient (default): images of one patient stay in one split, where patients are known",
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

    own = commands.add_parser(
        "coco", parents=[common], help="own data: a COCO instance JSON and a folder of images"
    )
    own.add_argument("--annotations", type=Path, required=True, help="COCO instance JSON")
    own.add_argument("--images", type=Path, required=True, help="folder of the file_name entries")

    drawn = commands.add_parser("synthetic", parents=[common], help="draw the embedded data set")
    drawn.add_argument("--num-images", type=int, required=True)
    drawn.add_argument("--size", type=int, required=True, help="width and height in pixels")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    rejects = Rejects(args.on_error)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            source = _read(args, rejects, Path(scratch))
            options = SplitOptions(
                ratio=args.ratio,
                seed=args.seed,
                by_patient=args.split_by == "patient",
                earlier=None if args.splits is None else read_splits(args.splits),
                folds=args.folds,
            )
            prepared = prepare_dataset(source, args.out, options, rejects)
    except BadInputError as error:
        sys.exit(f"{error}\nCorrect it, or list such files and go on with --on-error reject.")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(summarise(prepared.coco, args.ratio, prepared.notes, rejects.errors))
    print(f"\n{args.out}: {'already there, unchanged' if prepared.unchanged else 'written'}")


def _read(args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
    if args.command == "kvasir-seg":
        return kvasir_seg.read_kvasir_seg(args.root, rejects, args.negatives, args.min_area)
    if args.command == "coco":
        return coco.read_coco(args.annotations, args.images, rejects)
    return synthetic.generate(scratch, args.num_images, args.size, args.seed)


def _ratio(text: str) -> tuple[int, ...]:
    try:
        return parse_ratio(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    main()
