"""Images that look like those of another label, and images like no other.

Three views: colours, textures, deep features. Multi-view k-proximal plane clustering separates the
labels: each has the planes that its images lie nearest to and the others' far from. An image that
lies much nearer to another label's planes is one to look at. An image like no other lies in a thin
place of the views, by the local outlier factor (Breunig et al., SIGMOD 2000): distances from
planes, along which a sample may be anywhere, do not show it.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.cluster import SpectralClustering
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from imrcnn_d2.data.audit.checks import Audit
from imrcnn_d2.data.audit.findings import Finding
from imrcnn_d2.data.images import in_threads, read_image

_SIDE = 128  # pixels that images are squeezed to
_GRAPH_NEIGHBORS = 10  # of each sample in the graph of the spectral clustering
_MOST_FOR_ARPACK = 500  # samples
_HSV_BINS = (12, 4, 4)
_RINGS = ((8, 1), (16, 2), (24, 3))  # points and radius, in pixels, of a local binary pattern


def colour_histogram(image: np.ndarray) -> np.ndarray:
    """Return shares of the colours by hue, saturation and value: (192,) float, adding up to 1."""
    hsv = cv2.cvtColor(_squeezed(image), cv2.COLOR_RGB2HSV)
    counts = cv2.calcHist([hsv], [0, 1, 2], None, _HSV_BINS, [0, 180, 0, 256, 0, 256])
    return counts.ravel().astype(float) / counts.sum()


def texture_histogram(image: np.ndarray) -> np.ndarray:
    """Return shares of uniform local binary patterns (Ojala et al., "Multiresolution gray-scale and
    rotation invariant texture classification", PAMI 2002) on three scales: (54,) float."""
    from skimage.feature import local_binary_pattern

    gray = cv2.cvtColor(_squeezed(image), cv2.COLOR_RGB2GRAY)
    shares = []
    for points, radius in _RINGS:
        patterns = local_binary_pattern(gray, points, radius, method="uniform").astype(int)
        counts = np.bincount(patterns.ravel(), minlength=points + 2)
        shares.append(counts / counts.sum())
    return np.concatenate(shares)


def _squeezed(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


class MultiViewKPlaneClustering(TransformerMixin, ClusterMixin, BaseEstimator):
    """Clusters samples by the plane that they lie nearest to, in all views together.

    Each cluster has a plane ``normal · x + offset = 0`` in each view: of all planes the one with
    the least

        mean (normal · x + offset)² over its samples - repulsion · that over all others.

    Its normal is the eigenvector of a symmetric matrix with the least eigenvalue. Samples then go
    to the cluster whose planes are nearest, by squared distances added up over the views, and so in
    turn until the labels settle. The means, where Shao et al. have sums, keep the problem bounded
    for clusters of any sizes.

    A view with more features than a cluster has samples holds planes through all of them, so it is
    to be reduced before, e.g. by `sklearn.decomposition.PCA`. Scaling a whole view changes nothing.

    Args:
        repulsion: of the samples of other clusters, in [0, 1); 0 is k-plane clustering (Bradley and
            Mangasarian, 2000).
        init: "spectral" for multi-view spectral clustering, or (N,) labels to start from.
        random_state: seed of the spectral clustering.

    Attributes:
        labels_: (N,) int, 0 to n_clusters - 1.
        normals_, offsets_: of each view (n_clusters, features), of length 1, and (n_clusters,).
        scales_: of each view, by which distances are divided: root of the features' mean variance.
        inertia_: mean of the samples' squared distances from their cluster's planes, scaled.
        n_iter_: rounds until the labels settled.
    """

    def __init__(
        self, n_clusters=2, *, repulsion=0.05, init="spectral", max_iter=100, random_state=None
    ):
        self.n_clusters = n_clusters
        self.repulsion = repulsion
        self.init = init
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X, y=None):
        """Find the planes of a list of views, (N, features) each, or of one view as an array.

        Raises:
            ValueError: views of different lengths, values not finite, or parameters out of range.
        """
        views = self._views(X, reset=True)
        count = len(views[0])
        if not 1 <= self.n_clusters <= count:
            raise ValueError(f"n_clusters={self.n_clusters} of {count} samples (n_samples={count})")
        if not 0 <= self.repulsion < 1:
            raise ValueError(f"repulsion is {self.repulsion}; it must lie in [0, 1)")
        if self.max_iter < 1:
            raise ValueError(f"max_iter is {self.max_iter}; it must be at least 1")
        self.scales_ = [float(np.sqrt(view.var(axis=0).mean())) or 1.0 for view in views]
        labels, seen = self._first_labels(views), set()
        for iteration in range(1, self.max_iter + 1):
            self.n_iter_ = iteration
            seen.add(labels.tobytes())
            planes = [_planes(view, labels, self.n_clusters, self.repulsion) for view in views]
            self.normals_, self.offsets_ = map(list, zip(*planes, strict=True))
            squares = self._squares(views)
            labels = _filled(squares.argmin(axis=1), squares)
            if labels.tobytes() in seen:  # settled, or round in a circle
                break
        else:
            warnings.warn(
                f"The labels had not settled after max_iter={self.max_iter} rounds",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.labels_ = labels
        self.inertia_ = float(squares[np.arange(count), labels].mean())
        return self

    def transform(self, X):
        """Return root mean square distances from the clusters' planes, (N, n_clusters)."""
        check_is_fitted(self)
        return np.sqrt(self._squares(self._views(X)))

    def predict(self, X):
        """Return the cluster of each sample, (N,) int."""
        return self.transform(X).argmin(axis=1)

    def _views(self, X, reset=False):
        if not isinstance(X, list | tuple) or not X or np.ndim(X[0]) < 2:
            views = [validate_data(self, X, reset=reset, dtype=np.float64)]
        else:
            views = [check_array(view, dtype=np.float64, input_name="a view") for view in X]
        lengths, widths = ([view.shape[axis] for view in views] for axis in (0, 1))
        if len(set(lengths)) > 1:
            raise ValueError(f"The views have {lengths} samples; each must have all of them")
        if reset:
            self._widths = widths
        elif widths != self._widths:
            raise ValueError(f"The views have {widths} features, those fitted had {self._widths}")
        return views

    def _first_labels(self, views):
        count = len(views[0])
        if isinstance(self.init, str):
            if self.init != "spectral":
                raise ValueError(f"init is {self.init!r}; give 'spectral' or an array of labels")
            return _spectral(views, self.n_clusters, self.random_state)
        labels = np.asarray(self.init)
        if labels.shape != (count,) or not np.isin(labels, np.arange(self.n_clusters)).all():
            raise ValueError(f"init has not {count} labels from 0 to {self.n_clusters - 1}")
        return labels.astype(np.int64)

    def _squares(self, views):
        """(N, n_clusters) squared distances, averaged over the views."""
        parts = zip(views, self.normals_, self.offsets_, self.scales_, strict=True)
        return np.mean([((x @ w.T + b) / s) ** 2 for x, w, b, s in parts], axis=0)


def _planes(view, labels, count, repulsion):
    """Normals (count, D) and offsets (count,) of the clusters in one view."""
    normals, offsets = np.zeros((count, view.shape[1])), np.zeros(count)
    for cluster in range(count):
        members, others = view[labels == cluster], view[labels != cluster]
        if not len(members):  # of the labels to start from
            offsets[cluster] = np.inf
            continue
        share = repulsion if len(others) else 0.0
        center, matrix = members.mean(axis=0), np.zeros((view.shape[1],) * 2)
        if share:  # where the best plane of any normal goes through
            center = (center - share * others.mean(axis=0)) / (1 - share)
            matrix = -share * _moments(others, center)
        normals[cluster] = np.linalg.eigh(matrix + _moments(members, center))[1][:, 0]
        offsets[cluster] = -normals[cluster] @ center
    return normals, offsets


def _moments(samples, center):
    moved = samples - center
    return moved.T @ moved / len(samples)


def _filled(labels, squares):
    """Labels with no cluster empty: one that is takes the sample farthest from its planes."""
    count = squares.shape[1]
    for cluster in range(count):
        sizes = np.bincount(labels, minlength=count)
        if sizes[cluster] == 0:
            distances = np.where(sizes[labels] > 1, squares[np.arange(len(labels)), labels], -1)
            labels[distances.argmax()] = cluster
    return labels


def _spectral(views, count, random_state):
    """Spectral clustering of the views' neighbourhood graphs, added up: (N,) labels.

    The graphs have the local scaling of Zelnik-Manor and Perona, "Self-tuning spectral clustering",
    NIPS 2004; Kumar, Rai and Daume, NIPS 2011, compare ways to join them, adding up among them.
    """
    size = len(views[0])
    if count in (1, size):
        return np.arange(size) % count
    clustering = SpectralClustering(
        count,
        affinity="precomputed",
        # ARPACK's time grows much faster than the number of samples; LOBPCG fails for few of them.
        eigen_solver="lobpcg" if size > _MOST_FOR_ARPACK else "arpack",
        random_state=check_random_state(random_state).randint(2**31 - 1),
    )
    with warnings.catch_warnings():  # a graph in parts is good
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        labels = clustering.fit_predict(sum(map(_graph, views)))
    missing = np.setdiff1d(np.arange(count), labels)
    if len(missing):  # equal samples
        largest = np.flatnonzero(labels == np.bincount(labels).argmax())
        labels[largest[1 : len(missing) + 1]] = missing
    return labels.astype(np.int64)


def _graph(view):
    """Symmetric (N, N) sparse affinities in [0, 1] of a view's nearest neighbours."""
    neighbors = min(_GRAPH_NEIGHBORS, len(view) - 1)
    distances, others = NearestNeighbors(n_neighbors=neighbors).fit(view).kneighbors()
    width = np.maximum(distances[:, -1], 1e-12)
    values = np.exp(-(distances**2) / (width[:, None] * width[others]))
    rows = np.repeat(np.arange(len(view), dtype=np.int32), neighbors)
    columns = others.ravel().astype(np.int32)  # scikit-learn takes no wider ones
    graph = csr_array((values.ravel(), (rows, columns)), shape=(len(view),) * 2)
    return graph.maximum(graph.T)


MIN_IMAGES = 40  # in all, and of each label
_COMPONENTS = 16  # of each view
_REPULSION = 0.3
_FOLDS = 5
# Chosen on crops of Kvasir-SEG, of polyps and of mucosa without, of which five in six lie nearest
# to their label: flags 1 to 2 % of those that are right and half of those that were exchanged.
_MIN_MARGIN = 0.75
_MIN_AGREEMENT = 0.7  # mean share of a label's images that lie nearest to its planes
# Chosen on Kvasir-SEG with 25 images of other things among its images: all of these are above,
# and of 1,000 images one; among fewer images up to 2 %.
_MIN_OUTLIER = 1.6
_NEIGHBORS = 20


def validity_findings(result: Audit) -> list[Finding]:
    """Return `check_validity` of the images that can be read, whose labels are their classes, or
    "lesion" and "none" where lesions are annotated."""
    entries = [result.data.entries[i] for i in result.readable]
    if not entries:
        return []
    described = in_threads(_describe, [entry.path for entry in entries], "Colour and texture")
    views = [np.array(view) for view in zip(*described, strict=True)]
    if result.embeddings is not None:
        views.append(result.embeddings)
    if result.data.classified:
        names = {category["id"]: str(category["name"]) for category in result.data.categories}
        classes = [e.annotations[0]["category_id"] if e.annotations else None for e in entries]
        labels = [names.get(number) for number in classes]
    else:
        labels = ["lesion" if entry.annotations else "none" for entry in entries]
    return check_validity([e.name for e in entries], [e.split for e in entries], labels, views)


def _describe(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Square roots of the histograms: distances of these are Hellinger's."""
    image = read_image(path)
    return np.sqrt(colour_histogram(image)), np.sqrt(texture_histogram(image))


def check_validity(
    images: Sequence[str],
    splits: Sequence[str],
    labels: Sequence[str | None],
    views: Sequence[np.ndarray],
) -> list[Finding]:
    """Find images whose looks disagree with their label, and outliers.

    Args:
        images: N file names.
        labels: such as "lesion" and "none", or the class; None without one.
        views: (N, D) float arrays, whose distances are small between similar images.

    Returns:
        "cluster_disagrees", with a score from 0.75 to 1, and "outlier", with the mean local outlier
        factor, of which 1 is usual; and as info what could not be checked.
    """
    if len(images) < MIN_IMAGES:
        return [_info("outlier", f"{len(images)} images: too few to find outliers.")]
    reduced = []
    for view in views:
        view = view[:, np.ptp(view, axis=0) > 0].astype(float)
        components = min(_COMPONENTS, len(view) // 4, view.shape[1])
        reduced.append(PCA(components, whiten=True, svd_solver="full").fit_transform(view))
    places = list(zip(images, splits, strict=True))
    labels = np.array([label or "" for label in labels])
    return [*_outliers(places, reduced), *_disagreements(places, labels, reduced)]


def _info(kind: str, detail: str) -> Finding:
    return Finding(kind, (), (), detail, severity="info")


def _outliers(places: Sequence[tuple], views: Sequence[np.ndarray]) -> list[Finding]:
    neighbors = min(_NEIGHBORS, len(places) // 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate values")
        factors = [-LocalOutlierFactor(neighbors).fit(v).negative_outlier_factor_ for v in views]
    scores = np.mean(factors, axis=0)
    below = (
        f"mean of {len(views)} views; of half of the images it is below {np.median(scores):.2f}."
    )
    details = [f"Local outlier factor {score:.2f}, {below}" for score in scores]
    return _findings_above("outlier", places, scores, _MIN_OUTLIER, details)


def _findings_above(
    kind: str, places: Sequence[tuple], scores: np.ndarray, least: float, details: Sequence[str]
) -> list[Finding]:
    """A finding for each image with a score above ``least``, the highest first."""
    return [
        Finding(
            kind, (places[i][0],), (places[i][1],), details[i], score=round(float(scores[i]), 3)
        )
        for i in np.argsort(-scores)[: np.count_nonzero(scores > least)]
    ]


def _disagreements(
    places: Sequence[tuple], labels: np.ndarray, views: Sequence[np.ndarray]
) -> list[Finding]:
    counts = Counter(labels[labels != ""].tolist())
    sizes = {name: f"{name} ({count})" for name, count in sorted(counts.items())}
    names = [name for name in sizes if counts[name] >= MIN_IMAGES]
    skipped = [size for name, size in sizes.items() if name not in names]
    if len(names) < 2:
        detail = (
            f"Labels were not checked: fewer than two of them have {MIN_IMAGES} images; there are "
            f"{', '.join(sizes.values()) or 'none'}."
        )
        return [_info("cluster_disagrees", detail)]
    known = np.flatnonzero(np.isin(labels, names))
    views = [view[known] for view in views]
    labels = np.searchsorted(names, labels[known])
    squares = _squares_of_unseen(views, labels, len(names))
    agreement = np.diagonal(_shares(squares.argmin(axis=1), labels)).mean()
    clusters = MultiViewKPlaneClustering(len(names), random_state=0).fit(views)
    shares = _shares(clusters.labels_, labels)
    best = shares[linear_sum_assignment(shares, maximize=True)].mean()
    summary = (
        f"Of {', '.join(sizes[name] for name in names)}, {100 * agreement:.0f} % lie nearest to "
        "the planes of their label (mean over the labels); clusters found without labels agree "
        f"with them to {100 * best:.0f} %."
    )
    if skipped:
        summary += f" Too few to be checked: {', '.join(skipped)}."
    if agreement < _MIN_AGREEMENT:
        summary += " The labels do not show in these views, so no image is named."
        return [_info("cluster_disagrees", summary)]

    rows = np.arange(len(known))
    expected = squares[rows, labels]
    others = squares.copy()
    others[rows, labels] = np.inf
    nearest, other = others.argmin(axis=1), others.min(axis=1)
    margin = (expected - other) / np.maximum(expected + other, 1e-12)
    details = [
        f"Labelled {names[label]}, but much nearer to the planes of {names[other_label]}: "
        f"{value:.2f}, where 1 is on them and -1 on those of its label."
        for label, other_label, value in zip(labels, nearest, margin, strict=True)
    ]
    places = [places[i] for i in known]
    return [
        _info("cluster_disagrees", summary),
        *_findings_above("cluster_disagrees", places, margin, _MIN_MARGIN, details),
    ]


def _squares_of_unseen(views: Sequence[np.ndarray], labels: np.ndarray, count: int) -> np.ndarray:
    """(N, count) squared distances from the labels' planes, each image's found without it."""
    squares = np.empty((len(labels), count))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0).split(labels, labels)
    for rest, unseen in folds:
        planes = MultiViewKPlaneClustering(
            count, repulsion=_REPULSION, init=labels[rest], max_iter=1
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # there is one round
            planes.fit([view[rest] for view in views])
        squares[unseen] = planes.transform([view[unseen] for view in views]) ** 2
    return squares


def _shares(clusters: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(K, K): of each label's images, the share in each cluster."""
    count = labels.max() + 1
    counts = np.array([np.bincount(clusters[labels == k], minlength=count) for k in range(count)])
    return counts / counts.sum(axis=1, keepdims=True)
