"""Splits and folds that keep the images of a unit (patient, sequence, group) together."""

import argparse
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePosixPath

import numpy as np

from imrcnn_d2.data.images import check_folder
from imrcnn_d2.utils.files import few, read_json

SPLITS = ("train", "val", "test")
DEFAULT_RATIO = (12, 3, 5)
_SPLIT_OF_PREFIX = {"train": "train", "val": "val", "valid": "val", "test": "test"}


@dataclass(frozen=True)
class Item:
    """An image to assign; all splits get their share of each `stratum` (a lesion or not, a class).

    Images of the same `unit` (kind and id) stay together; None leaves the image free.
    """

    name: str
    stratum: Hashable
    unit: tuple[str, str] | None = None


@dataclass(frozen=True)
class FixedTest:
    """A test set of `per_stratum` images of each stratum, and `val_percent` of the others."""

    per_stratum: int
    val_percent: int = 10

    def __post_init__(self):
        if self.per_stratum < 1 or not 0 < self.val_percent < 100:
            text = f"{self.per_stratum} test images of each class and {self.val_percent} %"
            raise ValueError(f"{text} of the others for validation: give at least 1, and 1 to 99")

    def targets(self, counts: np.ndarray) -> np.ndarray:
        """As `_targets`, from the (K,) images of each stratum."""
        if counts.size and counts.min() <= self.per_stratum:
            text = f"a class has only {counts.min()} images"
            raise ValueError(f"{text}: a test set of {self.per_stratum} leaves none for training")
        rest = _targets(counts - self.per_stratum, (100 - self.val_percent, self.val_percent))
        return np.vstack([rest, np.full(len(counts), self.per_stratum)])


@dataclass(frozen=True)
class Where:
    """Images whose `field` has a value, e.g. the centre "C4"."""

    field: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "Where":
        """Read FIELD=VALUE, or VALUE alone, which is a centre."""
        field, equals, value = text.partition("=")
        return cls(field, value) if equals else cls("centre", text)

    def __str__(self) -> str:
        return f"{self.field}={self.value}"

    def select(self, images: Sequence[Mapping]) -> list[Mapping]:
        """The records of images that have the value.

        Raises:
            ValueError: none has; it names the values that there are.
        """
        if chosen := [image for image in images if str(image.get(self.field)) == self.value]:
            return chosen
        values = sorted({str(i[self.field]) for i in images if i.get(self.field) is not None})
        text = f"no image has the {self.field} {self.value!r}"
        raise ValueError(f"{text}; there are {few(values, 20) if values else 'none with any'}")


def parse_ratio(text: str) -> tuple[int, ...]:
    """Read train:val:test, whole numbers that are not all 0, e.g. "12:3:5" or "0:0:1"."""
    if not re.fullmatch(r"\d+:\d+:\d+", text, re.ASCII) or not re.search("[1-9]", text):
        raise argparse.ArgumentTypeError(
            f"ratio {text!r}: give train:val:test as whole numbers, not all 0, e.g. 12:3:5"
        )
    return tuple(map(int, text.split(":")))


def largest_remainder(total: int, ratio: Sequence[int]) -> list[int]:
    """Share `total` by `ratio` in whole numbers that add up; earlier parts win ties."""
    shares = [divmod(total * part, sum(ratio)) for part in ratio]
    counts = [whole for whole, _ in shares]
    by_remainder = sorted(range(len(ratio)), key=lambda i: -shares[i][1])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def make_splits(
    items: Iterable[Item],
    ratio: Sequence[int] | FixedTest = DEFAULT_RATIO,
    seed: int = 0,
    earlier: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[str]]:
    """Assign images to train, val and test; return sorted file names by split.

    Sizes are exact by largest remainder, images of each stratum shared alike; with units they
    are as near as the units allow. The file names of `earlier`, and so their units, stay in their
    splits.

    Raises:
        ValueError: `earlier` has a unit in two splits, or a stratum is too small for a test set
            of fixed size.
    """
    split_of = {
        name: i for i, split in enumerate(SPLITS) for name in (earlier or {}).get(split, ())
    }
    return dict(zip(SPLITS, _partition(list(items), ratio, seed, split_of), strict=True))


def leave_out(
    items: Iterable[Item],
    test: Collection[str],
    ratio: Sequence[int] = (4, 1),
    seed: int = 0,
    earlier: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[str]]:
    """Splits whose test part is these file names; the others are train and val, by `ratio`.

    The train and val images of `earlier` stay there, unless they are left out.

    Raises:
        ValueError: images that must stay together are left out in part.
    """
    test, items = set(test), list(items)
    rest = [item for item in items if item.name not in test]
    units = {item.unit: item.name for item in items if item.name in test}
    units.pop(None, None)
    if torn := [item for item in rest if item.unit in units]:
        pairs = [f"{i.name} with {units[i.unit]} ({' '.join(i.unit)})" for i in torn]
        text = f"{len(torn)} images belong to images that are left out for testing: {few(pairs)}"
        raise ValueError(f"{text}; take them out, or part them with --split-by image")
    split_of = {
        name: i for i, split in enumerate(SPLITS[:2]) for name in (earlier or {}).get(split, ())
    }
    train, val = _partition(rest, ratio[:2], seed, split_of)
    return {"train": train, "val": val, "test": sorted(test)}


def make_folds(items: Iterable[Item], count: int, seed: int = 0) -> list[dict[str, list[str]]]:
    """Cross-validation: every image is in one fold's test part; the rest is train and val, 4:1.

    Raises:
        ValueError: fewer than 2 folds.
    """
    if count < 2:
        raise ValueError(f"{count} folds: cross-validation needs at least 2")
    items = list(items)
    tests = _partition(items, [1] * count, seed, {})
    return [leave_out(items, test, seed=seed) for test in tests]


def splits_from_prefixes(names: Iterable[str]) -> dict[str, list[str]]:
    """Read the split of each file from its prefix: train_, val_ or valid_, test_.

    The copies of Kvasir-SEG with the 800/100/100 split of EffiSegNet (Vezakis et al., 2024) carry
    such names.

    Raises:
        ValueError: a name has none of these prefixes.
    """
    splits = {split: [] for split in SPLITS}
    for name in sorted(names):
        prefix, underscore, _ = PurePosixPath(name).name.partition("_")
        if not underscore or prefix not in _SPLIT_OF_PREFIX:
            text = f"{name}: does not begin with one of {', '.join(_SPLIT_OF_PREFIX)} and _"
            raise ValueError(f"{text}; rename it, or choose another --split-by")
        splits[_SPLIT_OF_PREFIX[prefix]].append(name)
    return splits


def sha256(splits: Mapping[str, Sequence[str]]) -> str:
    """Hash of the three lists of file names; equal for equal splits."""
    lists = json.dumps([sorted(splits[split]) for split in SPLITS])
    return hashlib.sha256(lists.encode()).hexdigest()


def check_prepared(folder: Path) -> None:
    """Raise FileNotFoundError unless it is a prepared data set."""
    if folder.exists():
        check_folder(folder)
    if not (folder / "splits.json").is_file():
        remedy = "make it with imrcnn prepare-dataset, or set IMRCNN_DATASETS to its folder"
        raise FileNotFoundError(f"{folder}: no prepared data set (no splits.json); {remedy}")


def read_splits(path: Path) -> dict[str, list[str]]:
    """Read file names by split from a splits.json, ours or one written by hand.

    Raises:
        ValueError: no such lists, a name listed twice, or a list edited after its hash was written.
    """
    content = read_json(path)
    try:
        splits = {split: [str(name) for name in content[split]] for split in SPLITS}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no JSON object with lists train, val and test ({error!r})"
        ) from error
    twice = [name for name, n in Counter(sum(splits.values(), [])).items() if n > 1]
    if twice:
        raise ValueError(f"{path}: {twice[0]} is listed more than once")
    if content.get("sha256", sha256(splits)) != sha256(splits):
        raise ValueError(
            f"{path}: the lists were edited after their hash was written; remove sha256 if meant"
        )
    return splits


def _partition(
    items: list[Item], ratio: Sequence[int] | FixedTest, seed: int, part_of: Mapping[str, int]
) -> list[list[str]]:
    """Share items over the parts of `ratio`; `part_of` fixes those it names."""
    groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        groups[item.unit or ("", item.name)].append(item)
    # the largest groups first, so that small ones are left to fill the gaps
    keys = sorted(groups, key=lambda key: (-len(groups[key]), _rank(seed, key)))
    strata = sorted({item.stratum for item in items})
    counts = [Counter(item.stratum for item in groups[key]) for key in keys]
    sizes = np.array([[count[s] for s in strata] for count in counts], dtype=int)
    sizes = sizes.reshape(len(keys), len(strata))
    if isinstance(ratio, FixedTest):
        targets = ratio.targets(sizes.sum(axis=0))
        is_used = np.full(len(targets), True)
    else:
        targets = _targets(sizes.sum(axis=0), ratio)
        is_used = np.array(ratio) > 0

    parts = np.full(len(keys), -1)
    for g, key in enumerate(keys):
        fixed = {part_of[item.name] for item in groups[key] if item.name in part_of}
        if len(fixed) > 1:
            named = few([item.name for item in groups[key] if item.name in part_of])
            text = f"the given splits have {' '.join(key)} in more than one part ({named})"
            raise ValueError(f"{text}; keep them so with --split-by image, or assign all anew")
        if fixed:
            parts[g] = fixed.pop()
    is_free = parts < 0

    missing = targets.copy()  # (S, K), images that each part still needs
    np.subtract.at(missing, parts[~is_free], sizes[~is_free])
    for g in np.flatnonzero(is_free):
        # relative need, so that large and small units go to every part alike
        need = (missing / np.maximum(targets, 1)) @ sizes[g]
        fits = (missing >= sizes[g]).all(axis=1)
        parts[g] = max(range(len(targets)), key=lambda i: (is_used[i], fits[i], need[i]))
        missing[parts[g]] -= sizes[g]
    _improve(parts, is_free, sizes, missing, targets)
    return [
        sorted(item.name for g in np.flatnonzero(parts == part) for item in groups[keys[g]])
        for part in range(len(targets))
    ]


def _rank(seed: int, key: tuple) -> bytes:
    return hashlib.sha256(json.dumps([seed, *key]).encode()).digest()


def _targets(counts: np.ndarray, ratio: Sequence[int]) -> np.ndarray:
    """Images of each of K strata for each of S parts, (S, K), from the (K,) in all.

    The parts' sizes and the rarest stratum are exact by largest remainder. So are the rarest ones
    taken together, two, three and so on: what rounding leaves over falls to the frequent ones.
    """
    order = np.argsort(counts, kind="stable")
    sums = [largest_remainder(int(total), ratio) for total in counts[order].cumsum()]
    targets = np.empty((len(ratio), len(counts)), dtype=int)
    targets[:, order] = np.diff([[0] * len(ratio), *sums], axis=0).T
    return targets


def _improve(
    parts: np.ndarray,
    is_free: np.ndarray,
    sizes: np.ndarray,
    missing: np.ndarray,
    targets: np.ndarray,
) -> None:
    """Move or swap free groups while that brings sizes nearer; changes `parts` and `missing`."""

    def distance(gap: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Deviation per stratum plus twice that in size; empty parts or strata cost most."""
        lacking = ((target > 0) & (gap >= target)).sum(axis=-1)
        lacking = lacking + (gap.sum(axis=-1) >= max(target.sum(), 1))
        size = np.abs(gap).sum(axis=-1) + 2 * np.abs(gap.sum(axis=-1))
        return size + 4 * sizes.sum() * lacking

    while distance(missing, targets).any():
        best_gain, best = 0, None
        for a, b in combinations(range(len(missing)), 2):
            from_a, from_b = (_kinds(np.flatnonzero(is_free & (parts == p)), sizes) for p in (a, b))
            net = from_a[1][:, None] - from_b[1][None, :]
            before = distance(missing[a], targets[a]) + distance(missing[b], targets[b])
            after = distance(missing[a] + net, targets[a]) + distance(missing[b] - net, targets[b])
            gain = before - after
            i, j = np.unravel_index(np.argmax(gain), gain.shape)
            if gain[i, j] > best_gain:
                best_gain, best = gain[i, j], (a, b, from_a[0][i], from_b[0][j], net[i, j])
        if best is None:
            return
        a, b, group_a, group_b, net = best
        missing[a] += net
        missing[b] -= net
        if group_a >= 0:
            parts[group_a] = b
        if group_b >= 0:
            parts[group_b] = a


def _kinds(groups: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One group of each size, and -1 with size (0, 0) for none at all."""
    kinds, first = np.unique(sizes[groups], axis=0, return_index=True)
    return np.append(groups[first], -1), np.pad(kinds, ((0, 1), (0, 0)))
