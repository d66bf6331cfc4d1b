"""Near-duplicate images: copies, re-framed copies, and frames taken moments apart.

Every image's local features are looked up among those of all images, as in Sivic and Zisserman,
"Video Google" (ICCV 2003): images that share distinctive features are candidates. A candidate is a
near-duplicate if one image, aligned to the other, correlates with it. A plain perceptual hash does
not do for endoscopy: it sees the dark frame and the light in the middle, which all images of an
endoscope share, and it misses the same picture stored with another frame.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

__all__ = ["MIN_CORRELATION", "Pair", "find_near_duplicates", "group_labels"]

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


def find_near_duplicates(
    paths: Sequence[Path], min_correlation: float = MIN_CORRELATION
) -> list[Pair]:
    """Compares all images with one another; turned and mirrored copies are found as well.

    It is the picture that is compared, so images of one lesion from two sides are no pair. The
    same files in the same order give the same pairs. About 1 MB of memory for ten images.

    Args:
        paths: the images, of any sizes.
        min_correlation: of the aligned images, in (0, 1]; see `MIN_CORRELATION`.

    Returns:
        the pairs, sorted.
    """
    points, descriptors, owners = _features(paths)
    candidates = _candidates(descriptors, owners)
    pairs = []
    for a, b in tqdm(sorted(candidates), desc="Comparing images", unit="pair"):
        matches = np.array(sorted(candidates[a, b]))
        correlation = _correlation(paths[a], paths[b], *points[matches].transpose(1, 0, 2))
        if correlation >= min_correlation:
            pairs.append(Pair(a, b, round(correlation, 3)))
    return pairs


def group_labels(count: int, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """Labels items that are connected by pairs, over any number of steps, alike: (count,) int."""
    edges = np.array(list(pairs), dtype=int).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _features(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (F, 2), RootSIFT descriptors (F, 128) and image indices (F,) of all features."""
    sift = cv2.SIFT_create(nfeatures=_FEATURES, contrastThreshold=0.02)
    equaliser = cv2.createCLAHE(3, (8, 8))  # mucosa has little contrast
    points, descriptors = [np.empty((0, 2), np.float32)], [np.empty((0, 128), np.float32)]
    for path in tqdm(paths, desc="Describing images", unit="image"):
        gray = _read(path)
        keypoints, found = sift.detectAndCompute(equaliser.apply(gray), _tissue(gray, 8))
        points.append(np.array([k.pt for k in keypoints], np.float32).reshape(-1, 2))
        descriptors.append(np.empty((0, 128), np.float32) if found is None else found)
    owners = np.repeat(np.arange(len(paths)), [len(p) for p in points[1:]])
    sift_values = np.concatenate(descriptors)
    # "RootSIFT", Arandjelovic and Zisserman, CVPR 2012
    values = np.sqrt(sift_values / np.maximum(sift_values.sum(axis=1, keepdims=True), 1e-6))
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
    cv2.setRNGSeed(0)  # the trees are drawn at random
    index = cv2.flann_Index(descriptors, {"algorithm": 1, "trees": 4})
    candidates = {}
    for queries, least in ((_mirrored(descriptors), _MIN_MIRRORED), (descriptors, _MIN_MATCHES)):
        found = defaultdict(set)
        neighbours, squares = index.knnSearch(queries, _NEIGHBOURS, params={"checks": 96})
        near = squares < _DISTINCT**2 * squares[:, -1:]
        rows, columns = np.nonzero(near & (owners[neighbours] != owners[:, None]))
        for i, j in zip(rows, neighbours[rows, columns], strict=True):
            i, j = sorted((int(i), int(j)))
            found[int(owners[i]), int(owners[j])].add((i, j))
        for pair, matches in found.items():
            if len(matches) >= max(least, len(candidates.get(pair, ()))):
                candidates[pair] = matches
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
    """Whether an alignment moves nothing: of other images than copies, it is that of the screen."""
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
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((_SIZE, _SIZE), Image.Resampling.BOX))
