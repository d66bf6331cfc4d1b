"""Groups of images that must not be parted: near-duplicates, and those of one patient."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from imrcnn_d2.data.near_duplicates import MIN_CORRELATION, find_near_duplicates, group_labels

__all__ = ["group_images"]


def group_images(
    folder: Path, names: Sequence[str], patients: Sequence[str | int | None]
) -> tuple[dict[str, int], dict]:
    """Groups images by near-duplicates and, where patients are known, by patient.

    Args:
        folder: of the images.
        names: their file names.
        patients: of each; None if not known.

    Returns:
        group by file name, counted from 1, of the images that share it with another one; and for
        the user, as JSON, the ``groups`` as lists of names, and the ``pairs`` of near-duplicates
        with their ``correlation``.
    """
    pairs = find_near_duplicates([folder / name for name in names])
    of_patient = defaultdict(list)
    for i, patient in enumerate(patients):
        if patient is not None:
            of_patient[patient].append(i)
    edges = [(pair.a, pair.b) for pair in pairs]
    edges += [edge for images in of_patient.values() for edge in pairwise(images)]

    members = defaultdict(list)
    for name, label in zip(names, group_labels(len(names), edges), strict=True):
        members[label].append(name)
    groups = [group for group in members.values() if len(group) > 1]
    return (
        {name: i for i, group in enumerate(groups, start=1) for name in group},
        {
            "min_correlation": MIN_CORRELATION,
            "groups": groups,
            "pairs": [
                {"images": [names[pair.a], names[pair.b]], "correlation": pair.correlation}
                for pair in pairs
            ],
        },
    )
