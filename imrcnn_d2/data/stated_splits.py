"""Splits that the file names of a published copy of the data state."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from imrcnn_d2.data.splits import SPLITS

__all__ = ["splits_from_prefixes"]

_SPLIT_OF_PREFIX = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def splits_from_prefixes(names: Iterable[str]) -> dict[str, list[str]]:
    """Reads the split of each file from its prefix: train_, val_ or valid_, test_.

    The copies of Kvasir-SEG with the 800/100/100 split of EffiSegNet (Vezakis et al., 2024) carry
    such names.

    Args:
        names: file names, which may lie in folders.

    Returns:
        sorted file names by split.

    Raises:
        ValueError: a name has none of these prefixes.
    """
    splits = {split: [] for split in SPLITS}
    for name in sorted(names):
        prefix, underscore, _ = PurePosixPath(name).name.partition("_")
        if not underscore or prefix not in _SPLIT_OF_PREFIX:
            expected = ", ".join(f"{prefix}_" for prefix in _SPLIT_OF_PREFIX)
            raise ValueError(
                f"{name}: states no split (expected one of {expected} at its start); rename it, "
                "or choose another --split-by"
            )
        splits[_SPLIT_OF_PREFIX[prefix]].append(name)
    return splits
