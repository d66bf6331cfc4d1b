"""Near-duplicate images: copies, re-framed copies, and frames taken moments apart.

Every image's local features are looked up among those of all images, as in Sivic and Zisserman,
"Video Google" (ICCV 2003): images that share distinctive features are candidates. A candidate is a
near-duplicate if one image, aligned to the other, correlates with it. A plain perceptual hash does
not do for endoscopy: it sees the dark frame and the light in the middle, which all images of an
endoscope share, and it misses the same image stored with another frame.
"""

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from imrcnn_d2.data.images import in_threads, open_image
from imrcnn_d2.utils.progress import tqdm

# Chosen by looking at the pairs of Kvasir-SEG: above 0.31 all show the same scene, under 0.25
# hardly any does. Between them both occur, and a pair too many harms a split less than one missed.
# What passes wrongly shares writing on the screen, the more so in a small set.
MIN_CORRELATION = 0.25

_SIZE = 352  # side that all images are resized to, in pixels; lengths below refer to it
_FEATURES = 300  # of an image
_NEIGHBOURS = 12  # features looked up for each one
_DISTINCT = 0.85  # of the distance to the last of them: nearer ones are matches
_MIN_MATCHES = 5
_MIN_MIRRORED = 12  # of the features of the mirrored image, with which only copies are looked for
_STAYS = 4  # matches that moved less may be of text on the screen
_HOPELESS, _GOOD = 0.1, 0.9  # correlations between which the alignment is refined
_MIN_OVERLAP = 0.3  # share of the image in which both show tissue


@dataclass(frozen=True)
class Pair:
    """Two near-duplicates: indices a < b of the images, and their correlation once aligned."""

    a: int
    b: int
    correlation: float


@dataclass(frozen=True)
class Features:
    """Local features of an image, in pixels of the size that all are resized to."""

    points: np.ndarray  # (F, 2) float32
    descriptors: np.ndarray  # (F, 128) uint8, SIFT


def find_near_duplicates(
    paths: Sequence[Path],
    min_correlation: float = MIN_CORRELATION,
    neighbours: Sequence[Sequence[int]] | None = None,
) -> list[Pair]:
    """Find pairs of images that show the same scene, turned and mirrored copies among them.

    Pixels are compared, so images of one lesion from two sides are no pair. The same files in the
    same order give the same pairs, sorted. About 1 MB of memory for ten images.

    Args:
        min_correlation: of the aligned images, in (0, 1]; see `MIN_CORRELATION`.
        neighbours: indices of the images to compare each image with, which takes time that grows
            with their number alone; None looks the features of each image up among all others.
    """
    features = in_threads(describe_image, paths, "Describing images")
    correlations: dict[tuple[int, int], float] = {}
    if neighbours is None:
        points, descriptors, owners = _joined_features(features)
        candidates = _candidates(descriptors, owners)
        for a, b in tqdm(sorted(candidates), desc="Comparing images", unit="pair"):
            matched = points[np.array(sorted(candidates[a, b]))].transpose(1, 0, 2)
            correlations[a, b] = _correlation(paths[a], paths[b], *matched)
    else:

        def compare(i: int) -> list[float]:
            images = [i, *neighbours[i]]
            return _compare([paths[j] for j in images], [features[j] for j in images])

        compared = in_threads(compare, range(len(paths)), "Comparing images")
        for i, values in enumerate(compared):
            for j, value in zip(neighbours[i], values, strict=True):
                pair = min(i, j), max(i, j)
                correlations[pair] = max(value, correlations.get(pair, -1.0))
    return [
        Pair(a, b, round(correlation, 3))
        for (a, b), correlation in sorted(correlations.items())
        if correlation >= min_correlation
    ]


def joined_groups(count: int, groups: Iterable[Sequence[int]]) -> list[list[int]]:
    """Join groups of items 0 to `count` - 1 that share an item, over any number of steps.

    Return groups of two items or more, sorted, of which no two share an item.
    """
    # Half of the time of `import imrcnn_d2`, and needed by few.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.array([edge for group in groups for edge in pairwise(group)], dtype=int)
    edges = edges.reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(count, count))
    labels = connected_components(graph, directed=False)[1].tolist()
    return [group for group in positions(labels).values() if len(group) > 1]


def positions(values: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    """The positions of each value but None."""
    by_value = defaultdict(list)
    for position, value in enumerate(values):
        if value is not None:
            by_value[value].append(position)
    return dict(by_value)


def describe_image(path: Path) -> Features:
    """The local features of an image."""
    sift = cv2.SIFT_create(nfeatures=_FEATURES, contrastThreshold=0.02)
    equaliser = cv2.createCLAHE(3, (8, 8))  # mucosa has little contrast
    gray = _read(path)
    keypoints, descriptors = sift.detectAndCompute(equaliser.apply(gray), _tissue(gray, 8))
    points = np.array([k.pt for k in keypoints], np.float32).reshape(-1, 2)
    if descriptors is None:
        return Features(points, np.empty((0, 128), np.uint8))
    # whole numbers up to 255, though of type float32
    return Features(points, descriptors.astype(np.uint8))


def _compare(paths: Sequence[Path], features: Sequence[Features]) -> list[float]:
    """Correlations of the first image with the others, -1 without enough matching features.

    Which features are distinct is judged by those of the others.
    """
    points, descriptors, owners = _joined_features(features)
    queried, others = descriptors[owners == 0], descriptors[owners > 0]
    correlations = [-1.0] * (len(paths) - 1)
    if len(others) <= _NEIGHBOURS:
        return correlations
    best: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for queries, least in ((_mirrored(queried), _MIN_MIRRORED), (queried, _MIN_MATCHES)):
        squares = 2 - 2 * queries @ others.T  # they have length 1
        furthest = np.partition(squares, _NEIGHBOURS - 1, axis=1)[:, _NEIGHBOURS - 1]
        rows, columns = np.nonzero(squares < _DISTINCT**2 * furthest[:, None])
        columns += len(queried)
        for i in np.unique(owners[columns]).tolist():
            of_image = owners[columns] == i
            if of_image.sum() >= max(least, len(best[i][0]) if i in best else 0):
                best[i] = rows[of_image], columns[of_image]
    for i, (rows, columns) in best.items():
        correlations[i - 1] = _correlation(paths[0], paths[i], points[rows], points[columns])
    return correlations


def _joined_features(features: Sequence[Features]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (F, 2), RootSIFT descriptors (F, 128) and image indices (F,) of all features."""
    points = [np.empty((0, 2), np.float32), *(image.points for image in features)]
    descriptors = [np.empty((0, 128), np.uint8), *(image.descriptors for image in features)]
    owners = np.repeat(np.arange(len(features)), [len(image.points) for image in features])
    values = np.concatenate(descriptors).astype(np.float32)
    # "RootSIFT", Arandjelovic and Zisserman, CVPR 2012
    values = np.sqrt(values / np.maximum(values.sum(axis=1, keepdims=True), 1e-6))
    return np.concatenate(points), values, owners


def _candidates(
    descriptors: np.ndarray, owners: np.ndarray
) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Pairs of images with their matching features.

    A feature matches those that are distinctly nearer than the last of its nearest. One that many
    images have, such as a letter on the screen, has many equally near ones and so matches none.
    """
    if len(owners) <= _NEIGHBOURS:
        return {}
    cv2.setRNGSeed(0)  # the trees are random
    index = cv2.flann_Index(descriptors, {"algorithm": 1, "trees": 4})
    candidates = {}
    for queries, least in ((_mirrored(descriptors), _MIN_MIRRORED), (descriptors, _MIN_MATCHES)):
        matches = defaultdict(set)
        neighbours, squares = index.knnSearch(queries, _NEIGHBOURS, params={"checks": 96})
        near = squares < _DISTINCT**2 * squares[:, -1:]
        rows, columns = np.nonzero(near & (owners[neighbours] != owners[:, None]))
        for i, j in zip(rows, neighbours[rows, columns], strict=True):
            i, j = sorted((int(i), int(j)))
            matches[int(owners[i]), int(owners[j])].add((i, j))
        for pair, features in matches.items():
            if len(features) >= max(least, len(candidates.get(pair, ()))):
                candidates[pair] = features
    return candidates


def _mirrored(descriptors: np.ndarray) -> np.ndarray:
    """Descriptors of the same features in the mirrored image.

    SIFT turns with a feature's direction; across it, cells swap and gradients change sign.
    """
    cells = descriptors.reshape(-1, 4, 4, 8)
    return np.ascontiguousarray(cells[:, ::-1][..., -np.arange(8) % 8].reshape(-1, 128))


def _correlation(a: Path, b: Path, points_a: np.ndarray, points_b: np.ndarray) -> float:
    """The best correlation of image `a`, aligned by the matching (M, 2) points, with `b`."""
    moved = np.abs(points_a - points_b).max(axis=1) > _STAYS
    best = -1.0
    for chosen in (np.ones_like(moved), moved):
        if chosen.sum() < _MIN_MATCHES:
            continue
        affine, _ = cv2.estimateAffine2D(
            points_a[chosen], points_b[chosen], ransacReprojThreshold=8, maxIters=1000
        )
        for aligned in _alignments(affine, a, b):
            best = max(best, aligned)
    return best


def _alignments(affine: np.ndarray | None, a: Path, b: Path) -> Iterator[float]:
    """The correlation after an alignment, and after its refinement where that may help."""
    if affine is None or not _is_plausible(affine):
        return
    first = _overlap_correlation(affine, a, b)
    yield first
    if not _HOPELESS <= first < _GOOD or _stays(affine):
        return
    half = cv2.invertAffineTransform(affine).astype(np.float32)
    half[:, 2] /= 2
    small = {"dsize": None, "fx": 0.5, "fy": 0.5}
    (detail_a, _), (detail_b, tissue_b) = _detail(a), _detail(b)
    try:
        _, half = cv2.findTransformECC(
            cv2.resize(detail_b, **small),
            cv2.resize(detail_a, **small),
            half,
            cv2.MOTION_AFFINE,
            (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 1e-3),
            cv2.resize(tissue_b, **small),
            5,
        )
    except cv2.error:  # did not converge
        return
    half[:, 2] *= 2
    if _is_plausible(half):
        yield _overlap_correlation(cv2.invertAffineTransform(half), a, b)


def _stays(affine: np.ndarray) -> bool:
    """Whether an alignment moves nothing: but for copies, it then aligns writing on the screen."""
    corners = np.array([[0, 0, 1], [_SIZE, 0, 1], [0, _SIZE, 1], [_SIZE, _SIZE, 1]])
    return bool(np.abs(corners @ affine.T - corners[:, :2]).max() <= _STAYS)


def _is_plausible(affine: np.ndarray) -> bool:
    """Whether an alignment scales and distorts little enough for two views of one scene."""
    largest, smallest = np.linalg.svd(affine[:, :2], compute_uv=False)
    return smallest > 0.4 and largest < 2.5 and largest < 2 * smallest


def _overlap_correlation(affine: np.ndarray, a: Path, b: Path) -> float:
    (detail_a, tissue_a), (detail_b, tissue_b) = _detail(a), _detail(b)
    moved = cv2.warpAffine(detail_a, affine, (_SIZE, _SIZE))
    both = (cv2.warpAffine(tissue_a, affine, (_SIZE, _SIZE)) & tissue_b) > 0
    if both.mean() < _MIN_OVERLAP or moved[both].std() == 0 or detail_b[both].std() == 0:
        return -1.0
    return float(np.corrcoef(moved[both], detail_b[both])[0, 1])


@functools.lru_cache(maxsize=256)
def _detail(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Detail of equal strength everywhere, (S, S) float32, and where there is tissue, (S, S) uint8.

    Light and shade are left out, and what is strong, highlights above all, counts no more.
    """
    gray = _read(path)
    values = gray.astype(np.float32)
    detail = cv2.GaussianBlur(values, (0, 0), 2) - cv2.GaussianBlur(values, (0, 0), 12)
    strength = np.sqrt(cv2.GaussianBlur(detail**2, (0, 0), 12)) + 4
    return np.clip(detail / strength, -2, 2), _tissue(gray, 12)


def _tissue(gray: np.ndarray, margin: int) -> np.ndarray:
    """Where an image is neither the dark frame, with its thin writing, nor near it: 0 or 1."""
    bright = cv2.morphologyEx((gray > 28).astype(np.uint8), cv2.MORPH_OPEN, np.ones((13, 13)))
    return cv2.erode(bright, np.ones((2 * margin + 1,) * 2), borderType=0, borderValue=0)


def _read(path: Path) -> np.ndarray:
    with open_image(path) as image:
        return np.asarray(image.convert("L").resize((_SIZE, _SIZE), Image.Resampling.BOX))
