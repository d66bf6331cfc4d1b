"""HyperKvasir's labelled images: 10,662 images of 23 classes, in official splits."""

import argparse
from pathlib import Path

from imrcnn_d2.data.formats.base import PublicDataSet, Source
from imrcnn_d2.data.formats.classification import (
    LabelledFile,
    carve_validation,
    read_labelled_files,
)
from imrcnn_d2.data.formats.hyperkvasir import HyperKvasir
from imrcnn_d2.data.images import is_image_name, list_files
from imrcnn_d2.data.prepare.metadata import read_table
from imrcnn_d2.utils.files import BadInputError, Rejects, check_inside

_SPLIT_FILE = "2_fold_split.csv"
_VAL_PERCENT = 25  # of fold 0, in which the rarest class has three images


class HyperKvasirLabels(PublicDataSet):
    name = "hyperkvasir-labels"
    help = "HyperKvasir's labelled images: labeled-images/, 23 classes (classification)"
    title = HyperKvasir.title
    url = HyperKvasir.url
    terms = HyperKvasir.terms
    layouts = (
        ("labeled-images/lower-gi-tract", "labeled-images/upper-gi-tract"),
        ("lower-gi-tract", "upper-gi-tract"),
    )
    published = {"labeled-images/*-gi-tract/*/*": 10662, "*-gi-tract/*/*": 10662}

    def options(self, args: argparse.Namespace) -> dict:
        return {} if args.ratio or args.splits else {"split_by": args.split_by}

    def read_layout(self, root: Path, rejects: Rejects, split_by: str = "patient") -> Source:
        """Read the class folders. With 2_fold_split.csv of github.com/simula/hyper-kvasir in the
        folder, fold 1 is for the test and a quarter of fold 0 for
        validation."""
        split_file = root / _SPLIT_FILE
        fold_of = {}
        if split_file.is_file():
            table = read_table(split_file, needed=("file-name", "split-index"))
            fold_of = {row.cells["file-name"]: row.cells["split-index"] for row in table.rows}
        split_of_fold = {"0": "train", "1": "test"}
        images = root
        if (inner := root / "labeled-images").is_dir():
            images = check_inside(root, inner, rejects.follow_links)
        files = []
        for path in filter(is_image_name, list_files(images, rejects)):
            with rejects.catch():
                parts = path.relative_to(images).parts
                if len(parts) != 4:
                    raise BadInputError(path, "is in no folder ORGAN/CATEGORY/CLASS")
                organ, category, label, name = parts
                fields = {"organ": organ, "category": category}
                split = split_of_fold.get(fold_of.get(name))
                files.append(LabelledFile(path, f"{label}/{name}", label, split, fields))
        source = read_labelled_files(files, images, rejects)
        source.splits = carve_validation(source, _VAL_PERCENT, split_by=split_by)
        if source.splits:
            source.notes.append(f"splits of {split_file}: fold 1 is for the test")
        else:
            source.notes.append(f"no {_SPLIT_FILE} in {root}, so without the official splits")
        return source
