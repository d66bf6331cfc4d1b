"""Images that show the same, and patients in several splits."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from imrcnn_d2.data.audit.examine import Examined, in_threads
from imrcnn_d2.data.audit.findings import Finding, finding
from imrcnn_d2.data.audit.records import Entry
from imrcnn_d2.data.near_duplicates import compare_images, describe_image, group_labels

__all__ = ["MIN_CORRELATION", "Twins", "exact_twins", "groups", "near_twins", "twin_findings"]

# Of aligned images. Above it all pairs of Kvasir-SEG show the same scene; see near_duplicates.py,
# whose lower limit is for keeping images together, where a pair too many does no harm.
MIN_CORRELATION = 0.31
_ALIKE = 8  # images that are compared with each one, by embedding
_ALIKE_BY_HASH = 3  # and by perceptual hash, turned and mirrored ones as well
_HASH_BITS = 80  # of 256, by which these may differ; those of unrelated frames mostly do by more
_BLOCK = 512  # images that are looked up at once


@dataclass(frozen=True)
class Twins:
    """Two images that show the same.

    Attributes:
        a, b: their places among the entries, a < b.
        kind: "exact_duplicate" or "near_duplicate".
        correlation: of the aligned images; 1 of exact duplicates.
        detail: in what they are the same.
    """

    a: int
    b: int
    kind: str
    correlation: float
    detail: str


def exact_twins(examined: Sequence[Examined]) -> list[Twins]:
    """Images with the same bytes or the same pixels, each with the one before it."""
    twins = []
    for places in _places(e.measures.pixel_hash if e.measures else None for e in examined).values():
        for a, b in pairwise(places):
            files = [examined[i].measures.file_hash for i in (a, b)]
            what = "files" if files[0] == files[1] else "pixels"
            twins.append(Twins(a, b, "exact_duplicate", 1.0, f"The {what} are the same."))
    return sorted(twins, key=lambda pair: (pair.a, pair.b))


def near_twins(examined: Sequence[Examined], embeddings: np.ndarray | None) -> list[Twins]:
    """Images that show the same scene, exact duplicates left out.

    The images most alike by their embeddings or perceptual hashes are aligned with each other and
    correlated. The work grows with the number of images, but for the look-up, whose share is small.

    Args:
        examined: the images.
        embeddings: (N, D) rows of length 1, of the images in their order; None to go by the hashes
            alone, which find copies but few frames of a moment later.
    """
    # One image of each set of exact duplicates stands for all.
    known = _places(e.measures.pixel_hash if e.measures else None for e in examined)
    places = sorted(own[0] for own in known.values())
    if len(places) < 2:
        return []
    hashes = np.stack([examined[i].measures.hashes for i in places])
    vectors = None if embeddings is None else embeddings[places]
    neighbours = _neighbours(hashes, vectors)
    paths = [examined[i].entry.path for i in places]
    features = in_threads(describe_image, paths, "Describing")
    tasks = [
        (paths[i], features[i], [(paths[j], features[j]) for j in neighbours[i]], neighbours[i], i)
        for i in range(len(places))
    ]
    best: dict[tuple[int, int], float] = {}
    for found in in_threads(_compare, tasks, "Comparing"):
        for pair, correlation in found.items():
            best[pair] = max(correlation, best.get(pair, -1))
    return [
        Twins(
            *sorted((places[a], places[b])),
            "near_duplicate",
            round(correlation, 3),
            f"Aligned with each other, they correlate with {correlation:.2f}.",
        )
        for (a, b), correlation in sorted(best.items())
        if correlation >= MIN_CORRELATION
    ]


def _compare(task) -> dict[tuple[int, int], float]:
    path, features, others, neighbours, i = task
    correlations = compare_images(path, features, others)
    return {
        (min(i, j), max(i, j)): correlation
        for j, correlation in zip(neighbours, correlations, strict=True)
        if correlation > 0
    }


def _neighbours(hashes: np.ndarray, vectors: np.ndarray | None) -> list[list[int]]:
    """Of each image the places of those that may be its twins, (N, 8, 32) hashes given."""
    bits = np.unpackbits(hashes, axis=2).astype(np.float32) * 2 - 1
    upright, count = bits[:, 0], len(bits)
    found: list[set[int]] = [set() for _ in range(count)]
    for start in range(0, count, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, count))
        differ = np.full((len(rows), count), np.inf, np.float32)
        for turn in range(bits.shape[1]):
            np.minimum(differ, (256 - bits[rows, turn] @ upright.T) / 2, out=differ)
        _add_best(found, rows, -differ, _ALIKE_BY_HASH, -_HASH_BITS)
        if vectors is not None:
            _add_best(found, rows, vectors[rows] @ vectors.T, _ALIKE, -1.0)
    return [sorted(own) for own in found]


def _add_best(
    found: list[set[int]], rows: np.ndarray, alike: np.ndarray, number: int, least: float
) -> None:
    alike[np.arange(len(rows)), rows] = -np.inf
    number = min(number, alike.shape[1] - 1)
    columns = np.argpartition(-alike, number - 1, axis=1)[:, :number]
    for row, own, values in zip(
        rows.tolist(), columns, np.take_along_axis(alike, columns, axis=1), strict=True
    ):
        found[row].update(own[values >= least].tolist())


def twin_findings(entries: Sequence[Entry], twins: Iterable[Twins]) -> list[Finding]:
    """A finding for each pair; an error where it crosses splits."""
    findings = []
    for pair in twins:
        a, b = entries[pair.a], entries[pair.b]
        crosses = a.split != b.split
        where = f" They are in {a.split} and {b.split}." if crosses else ""
        findings.append(
            finding(
                pair.kind,
                (a.name, b.name),
                (a.split, b.split),
                pair.detail + where,
                severity="error" if crosses else "warning",
                score=pair.correlation,
            )
        )
    return findings


def patient_findings(entries: Sequence[Entry]) -> list[Finding]:
    """Patients whose images are in several splits."""
    findings = []
    for patient, places in _places(e.record.get("patient_id") for e in entries).items():
        own = [entries[i] for i in places]
        splits = list(dict.fromkeys(entry.split for entry in own))
        if len(splits) > 1:
            counts = ", ".join(f"{sum(e.split == s for e in own)} in {s}" for s in splits)
            told = f"Patient {patient} has {len(own)} images: {counts}."
            names = [entry.name for entry in own]
            findings.append(finding("patient_across_splits", names, [e.split for e in own], told))
    return findings


def groups(entries: Sequence[Entry], twins: Iterable[Twins]) -> list[list[int]]:
    """Places of images that must not be parted: twins and those of one patient, two or more."""
    edges = [(pair.a, pair.b) for pair in twins]
    of_patient = _places(entry.record.get("patient_id") for entry in entries)
    edges += [edge for places in of_patient.values() for edge in pairwise(places)]
    labels = group_labels(len(entries), edges).tolist()
    return [places for places in _places(labels).values() if len(places) > 1]


def _places(values: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    """Places of each value but None."""
    places = defaultdict(list)
    for place, value in enumerate(values):
        if value is not None:
            places[value].append(place)
    return dict(places)
