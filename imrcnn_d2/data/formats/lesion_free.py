"""A folder of images without a lesion, to count false alarms in."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from imrcnn_d2.data.formats.base import Format, Sample, Source
from imrcnn_d2.data.images import inspect_image, list_files
from imrcnn_d2.utils.files import Rejects

__all__ = ["LesionFree", "read_lesion_free", "with_lesion_free"]


class LesionFree(Format):
    name = "lesion-free"
    help = "images without a lesion only, all for testing: a detector's false alarms"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--root", type=Path, required=True, help="folder of images")

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        return read_lesion_free(args.root, rejects)

    def ratio(self, args: argparse.Namespace) -> Sequence[int]:
        return args.ratio or (0, 0, 1)


def read_lesion_free(root: Path, rejects: Rejects) -> Source:
    """Reads images of which none shows a lesion.

    Args:
        root: folder of images, in subfolders or not.
        rejects: takes bad input.

    Raises:
        FileNotFoundError: no such folder (when the samples are read).
    """
    return Source(
        samples=_samples(root, rejects),
        categories=[{"id": 1, "name": "lesion"}],
        info={"description": "images without a lesion"},
    )


def with_lesion_free(source: Source, root: Path, rejects: Rejects) -> Source:
    """The data set and, after its images, those of a folder of images without a lesion."""
    return replace(source, samples=chain(source.samples, _samples(root, rejects)))


def _samples(root: Path, rejects: Rejects) -> Iterator[Sample]:
    for path in tqdm(list_files(root, rejects), desc="Reading images", unit="image"):
        with rejects.catch():
            yield Sample(path.relative_to(root).as_posix(), inspect_image(path), [])
