"""A folder of images without a lesion, to count false alarms in."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from imrcnn_d2.data.images import inspect_image, list_files
from imrcnn_d2.data.prepare import Sample, Source
from imrcnn_d2.data.rejects import Rejects

__all__ = ["read_lesion_free", "with_lesion_free"]


def read_lesion_free(root: Path, rejects: Rejects) -> Source:
    """Reads images of which none shows a lesion.

    Args:
        root: folder of images, in folders of its own or not.
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
    """The data set and, behind its images, those of a folder of images without a lesion."""
    return replace(source, samples=chain(source.samples, _samples(root, rejects)))


def _samples(root: Path, rejects: Rejects) -> Iterator[Sample]:
    for path in tqdm(list_files(root, rejects), desc="Reading images", unit="image"):
        with rejects.catch():
            yield Sample(path.relative_to(root).as_posix(), inspect_image(path), [])
