"""Write COCO annotations for LabelMe, CVAT, or as mask images, to correct them there.

    imrcnn export-annotations --annotations datasets/egc/annotations/train.json \\
        --images datasets/egc/images --to labelme --output egc_labelme

imrcnn prepare-dataset labelme, cvat and masks --kind files read the corrected files.
"""

import argparse
import sys
from pathlib import Path

from imrcnn_d2.cli import new_parser
from imrcnn_d2.data.formats import FORMATS, export, read_coco
from imrcnn_d2.utils.files import Rejects, for_terminal


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--annotations", type=Path, required=True, help="COCO instance JSON")
    add("--images", type=Path, required=True, help="folder of the file_name entries")
    add(
        "--to",
        choices=[name for name, form in FORMATS.items() if form.write],
        required=True,
        help="labelme: one JSON per image; cvat: one XML, and the labels to make a task with; "
        "masks: one PNG per instance",
    )
    add("--output", type=Path, required=True, help="folder to make")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    try:
        # The images are measured where they are, and nothing of them is written.
        source = read_coco(args.annotations, args.images, Rejects(follow_links=True))
        notes = export(source, FORMATS[args.to], args.output)
    except (OSError, ValueError) as error:
        sys.exit(for_terminal(error))
    print(for_terminal("\n".join([*notes, f"{args.output}: written"])))
