"""Near-duplicate images: copies, re-framed copies, and frames taken moments apart.

One matcher serves preparing (`--split-by group`), audit, merging and validation. Each image is
summed up by its local features in a vector (VLAD: Jegou et al., "Aggregating local descriptors
into a compact image representation", CVPR 2010) and by a hash of its coarse detail; the images
most alike by either are candidates. A candidate is a near-duplicate if one image, aligned to the
other by their matching features, correlates with it. A plain perceptual hash does not do for
endoscopy: it sees the dark frame and the light in the middle, which all images of an endoscope
share, and it misses the same image stored with another frame.
"""

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from imrcnn_d2.data.images import in_threads, read_image
from imrcnn_d2.data.units import units_of

# Chosen by looking at the pairs of Kvasir-SEG: above 0.31 all show the same scene, under 0.25
# hardly any does. Between them both occur, and a pair too many harms a split less than one missed.
# What passes wrongly shares writing on the screen, the more so in a small set.
MIN_CORRELATION = 0.25

# Of the 256 bits of `fingerprint`, at most so many differ between copies of an image. Of 150 images
# of Kvasir-SEG and PolypGen, scaled to 128 pixels or more, squeezed, in JPEG of quality 30, in gray
# or brighter, at most 21 differ, without a border of 1 % at most 38; between the two data sets, of
# which none is in the other, at least 76.
MOST_DIFFERENT = 48

_SIZE = 352  # side that all images are resized to, in pixels; lengths below refer to it
_FEATURE_SIZE = 176  # and to look for features, in a quarter of the time
_FEATURES = 300  # of an image
_WORDS = 64  # of the vocabulary of features
_ALIKE = 32  # images that are compared with each one, by VLAD
_ALIKE_MIRRORED = 4  # and by that of the mirrored image
_ALIKE_BY_HASH = 4  # and by hash, of which at most
_HASH_LIMIT = 80  # bits differ
_DISTINCT = 0.8  # of the distance to the second nearest feature: nearer ones match
_MIN_MATCHES = 6
_MIN_MIRRORED = 12  # of the features of the mirrored image, with which only copies are looked for
_STAYS = 4  # matches that moved less may be of text on the screen
_HOPELESS, _GOOD = 0.1, 0.9  # correlations between which the alignment is refined
_MIN_OVERLAP = 0.3  # share of the image in which both show tissue
_GREEN = 60  # gray values by which green exceeds red in no mucosa
_MOST_COVERED = 0.3  # share of the image
_FLAT = 1e-3  # standard deviation of the detail, from -2 to 2, of an image without any
_BLOCK = 512  # images that are looked up at once


@dataclass(frozen=True)
class Pair:
    """Two near-duplicates: the images' positions a < b, and their correlation once aligned."""

    a: int
    b: int
    correlation: float


@dataclass(frozen=True)
class Features:
    """What an image is known by."""

    points: np.ndarray  # (F, 2) float32, in pixels of the size that all images are resized to
    descriptors: np.ndarray  # (F, 128) uint8, SIFT
    fingerprint: str  # see `fingerprint`


def find_near_duplicates(paths: Sequence[Path]) -> list[Pair]:
    """Find pairs of images that show the same scene, turned and mirrored copies among them.

    Pixels are compared, so images of one lesion from two sides are no pair. The same set of images
    gives the same pairs, whatever their names and order. Time grows with the number of images, but
    for the look-up of candidates, whose share is small up to some 10,000. About 1 MB of memory for
    ten images.
    """
    if len(paths) < 2:
        return []
    described = in_threads(describe_image, paths, "Describing images")
    # an order that depends on nothing but the pixels
    order = sorted(range(len(paths)), key=lambda i: _order(described[i]))
    features = [described[i] for i in order]
    vectors = [_root_sift(image.descriptors) for image in features]

    def compare(candidate: tuple[int, int, bool]) -> float:
        a, b, is_mirrored = candidate
        files = paths[order[a]], paths[order[b]]
        value = -1.0
        if fingerprint_distance(features[a].fingerprint, features[b].fingerprint) <= MOST_DIFFERENT:
            value = _overlap_correlation(np.eye(2, 3), *files)
        of_a, of_b = _mirrored(vectors[a]) if is_mirrored else vectors[a], vectors[b]
        matches = {*zip(*_matches(of_a, of_b), strict=True)}
        mutual = matches & {*zip(*_matches(of_b, of_a)[::-1], strict=True)}
        for chosen in (matches, mutual):  # these are fewer, and more of them are right
            if len(chosen) >= (_MIN_MIRRORED if is_mirrored else _MIN_MATCHES):
                rows, columns = np.array(sorted(chosen)).T
                matched = features[a].points[rows], features[b].points[columns]
                value = max(value, _correlation(*files, *matched))
        return value

    candidates = sorted(_candidates(features, vectors))
    correlations: dict[tuple[int, int], float] = {}
    compared = in_threads(compare, candidates, "Comparing images")
    for (i, j, _), value in zip(candidates, compared, strict=True):
        a, b = sorted((order[i], order[j]))
        correlations[a, b] = max(value, correlations.get((a, b), -1.0))
    return [
        Pair(a, b, round(value, 3))
        for (a, b), value in sorted(correlations.items())
        if value >= MIN_CORRELATION
    ]


def find_groups(
    paths: Sequence[Path], fields: Sequence[Mapping]
) -> tuple[list[Pair], list[list[int]]]:
    """Pairs of near-duplicates among images with these COCO fields, and the positions of those that
    are to stay together: near-duplicates, and images of a unit."""
    pairs = find_near_duplicates(paths)
    units = positions(units_of(fields)).values()
    return pairs, joined_groups(len(paths), [*((pair.a, pair.b) for pair in pairs), *units])


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


def fingerprint(image: np.ndarray) -> str:
    """Return a hash of 64 hexadecimal digits of an (H, W, 3) uint8 RGB or (H, W) gray image: the
    signs of the lowest frequencies of its detail, of equal strength everywhere. It hardly changes
    when an image is scaled, squeezed or compressed, see `MOST_DIFFERENT`."""
    gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    detail = small - cv2.GaussianBlur(small, (0, 0), 6)
    detail /= np.sqrt(cv2.GaussianBlur(detail**2, (0, 0), 6)) + 2
    lowest = cv2.dct(detail)[:18, :18].ravel()
    return np.packbits(lowest[1:257] > 0).tobytes().hex()


def fingerprint_distance(a: str, b: str) -> int:
    """The number of bits that differ, 0 to 256."""
    return (int(a, 16) ^ int(b, 16)).bit_count()


def fingerprint_bits(fingerprints: Sequence[str]) -> np.ndarray:
    """(N, 256) float32, -1 or 1; the product of two rows is 256 less twice the bits that differ."""
    data = np.frombuffer(bytes.fromhex("".join(fingerprints)), np.uint8)
    return np.unpackbits(data.reshape(-1, 32), axis=1).astype(np.float32) * 2 - 1


def describe_image(path: Path) -> Features:
    """The local features of an image, and its fingerprint."""
    sift = cv2.SIFT_create(nfeatures=_FEATURES, contrastThreshold=0.02)
    equaliser = cv2.createCLAHE(3, (8, 8))  # mucosa has little contrast
    gray, size = _read(path), (_FEATURE_SIZE, _FEATURE_SIZE)
    small = cv2.resize(equaliser.apply(gray), size, interpolation=cv2.INTER_AREA)
    tissue = cv2.resize(_tissue(gray, 8), size, interpolation=cv2.INTER_NEAREST)
    keypoints, descriptors = sift.detectAndCompute(small, tissue)
    points = np.array([k.pt for k in keypoints], np.float32).reshape(-1, 2)
    if descriptors is None:
        descriptors = np.empty((0, 128))
    # whole numbers up to 255, though of type float32
    return Features(
        points * (_SIZE / _FEATURE_SIZE), descriptors.astype(np.uint8), fingerprint(gray)
    )


def _order(image: Features) -> tuple[str, bytes]:
    return image.fingerprint, image.descriptors.tobytes()


def _root_sift(descriptors: np.ndarray) -> np.ndarray:
    """(F, 128) float32 rows of length 1: "RootSIFT", Arandjelovic and Zisserman, CVPR 2012."""
    values = descriptors.astype(np.float32)
    return np.sqrt(values / np.maximum(values.sum(axis=1, keepdims=True), 1e-6))


def _candidates(
    features: Sequence[Features], vectors: Sequence[np.ndarray]
) -> set[tuple[int, int, bool]]:
    """Pairs of images that may be near-duplicates, and whether one is to be mirrored."""
    words = _vocabulary(vectors)
    upright = np.stack([_vlad(rows, words) for rows in vectors])
    mirrored = np.stack([_vlad(_mirrored(rows), words) for rows in vectors])
    bits = fingerprint_bits([image.fingerprint for image in features])
    tables = (
        (upright, _ALIKE, 0.0),
        (mirrored, _ALIKE_MIRRORED, 0.0),
        (bits, _ALIKE_BY_HASH, 256.0 - 2 * _HASH_LIMIT),
    )
    pairs = set()
    for start in range(0, len(features), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(features)))
        for queries, number, least in tables:
            table = bits if queries is bits else upright
            alike = queries[rows] @ table.T
            alike[np.arange(len(rows)), rows] = -np.inf
            number = min(number, len(features))
            columns = np.argpartition(-alike, number - 1, axis=1)[:, :number]
            good = np.take_along_axis(alike, columns, axis=1) >= least
            for row, column in zip(rows[np.nonzero(good)[0]], columns[good], strict=True):
                pairs.add((*sorted((int(row), int(column))), queries is mirrored))
    return pairs


def _vocabulary(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """(W, 128) means of clusters of features, the strongest of images of all kinds."""
    rows = np.concatenate([np.zeros((1, 128), np.float32), *(r[:40] for r in vectors)])
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 20_000)).astype(int)]
    if len(rows) <= _WORDS:
        return rows
    cv2.setRNGSeed(0)
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 10, 1e-3)
    return cv2.kmeans(rows, _WORDS, None, criteria, 1, cv2.KMEANS_PP_CENTERS)[2]


def _vlad(rows: np.ndarray, words: np.ndarray) -> np.ndarray:
    """(W * 128,) float32 of length 1, or 0 without a feature: for each word the sum of differences
    of the features nearest to it, of equal weight; square roots against bursts of one feature."""
    nearest = np.argmin((words**2).sum(axis=1) - 2 * rows @ words.T, axis=1)
    sums = np.zeros_like(words)
    np.add.at(sums, nearest, rows - words[nearest])
    sums = np.sign(sums) * np.sqrt(np.abs(sums))
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
    return sums.ravel() / max(np.linalg.norm(sums), 1e-9)


def _matches(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the matching features of two images.

    A feature matches the nearest one of the other image, if that is distinctly nearer than all
    others: so letters, which look the same all over the screen, mostly do not.
    """
    if len(b) < 2:
        return np.empty(0, int), np.empty(0, int)
    alike, rows = a @ b.T, np.arange(len(a))
    nearest = alike.argmax(axis=1)
    first = alike[rows, nearest]
    alike[rows, nearest] = -1
    # squared distances of rows of length 1
    distinct = 2 - 2 * first < _DISTINCT**2 * (2 - 2 * alike.max(axis=1))
    return np.flatnonzero(distinct), nearest[distinct]


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
        if affine is None or not _is_plausible(affine):
            continue
        files = a, b
        if np.linalg.det(affine[:, :2]) ** 2 < 1:  # in the frame of the closer view
            affine, files = cv2.invertAffineTransform(affine), (b, a)
        best = max(best, *_alignments(affine, *files))
    return best


def _alignments(affine: np.ndarray, a: Path, b: Path) -> Iterator[float]:
    """The correlation after an alignment, and after its refinement where that may help."""
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
    if both.mean() < _MIN_OVERLAP or min(moved[both].std(), detail_b[both].std()) < _FLAT:
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
    """Gray values, (S, S) uint8; 0 where the processor's own display covers the view, such as the
    green one of the scope's position, which is the same in images that show nothing else alike."""
    small = Image.fromarray(read_image(path)).resize((_SIZE, _SIZE), Image.Resampling.BOX)
    gray = np.array(small.convert("L"))
    red, green, _ = (np.asarray(channel) for channel in small.split())
    covered = cv2.subtract(green, red) > _GREEN
    if covered.mean() < _MOST_COVERED:  # else it is dye or a filter
        gray[covered] = 0
    return gray
