"""Images that look like those of another label, and images like no other.

Three views: colours, textures, deep features. Multi-view k-proximal plane clustering tells labels
apart: for each label the planes that its images lie nearest to and the others' far from. An image
that lies much nearer to another label's planes is one to look at. What is like no other image lies
in a thin place of the views, by the local outlier factor (Breunig et al., SIGMOD 2000): distances
from planes, along which a sample may be anywhere, do not show it.
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

from imrcnn_d2.data.audit.audit import Audit
from imrcnn_d2.data.audit.checks import require
from imrcnn_d2.data.audit.findings import AuditedData, Entry, Finding, finding
from imrcnn_d2.data.images import in_threads, read_image

__all__ = [
    "MIN_IMAGES",
    "MultiViewKPlaneClustering",
    "check_validity",
    "colour_histogram",
    "texture_histogram",
    "validity_findings",
]


_SIDE = 128  # pixels that images are squeezed to
_HSV_BINS = (12, 4, 4)
_RINGS = ((8, 1), (16, 2), (24, 3))  # points and radius, in pixels, of a local binary pattern


def colour_histogram(image: np.ndarray) -> np.ndarray:
    """Shares of the colours by hue, saturation and value: (192,) float, adding up to 1."""
    hsv = cv2.cvtColor(_squeezed(image), cv2.COLOR_RGB2HSV)
    counts = cv2.calcHist([hsv], [0, 1, 2], None, _HSV_BINS, [0, 180, 0, 256, 0, 256])
    return counts.ravel().astype(float) / counts.sum()


def texture_histogram(image: np.ndarray) -> np.ndarray:
    """Shares of the uniform local binary patterns on three scales: (54,) float, adding up to 3.

    Ojala, Pietikainen and Maenpaa, "Multiresolution gray-scale and rotation invariant texture
    classification with local binary patterns", PAMI 2002.

    Raises:
        ModuleNotFoundError: scikit-image is missing.
    """
    feature = require("skimage.feature", "scikit-image")
    gray = cv2.cvtColor(_squeezed(image), cv2.COLOR_RGB2GRAY)
    shares = []
    for points, radius in _RINGS:
        patterns = feature.local_binary_pattern(gray, points, radius, method="uniform")
        counts = np.bincount(patterns.astype(int).ravel(), minlength=points + 2)
        shares.append(counts / counts.sum())
    return np.concatenate(shares)


def _squeezed(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


class MultiViewKPlaneClustering(TransformerMixin, ClusterMixin, BaseEstimator):
    """Clusters samples by the plane that they lie nearest to, in all views together.

    Each cluster has a plane ``normal · x + offset = 0`` in each view: of all planes the one with
    the least

        mean (normal · x + offset)² over its own samples - repulsion · that over all others.

    Its normal is the eigenvector of a symmetric matrix with the least eigenvalue. Samples then go
    to the cluster whose planes are nearest, by squared distances added up over the views, and so in
    turn until the labels settle. The means, where Shao et al. have sums, keep the problem bounded
    for clusters of any sizes.

    A view with more features than a cluster has samples holds planes through all of them, so it is
    to be reduced before, e.g. by `sklearn.decomposition.PCA`. Scaling a whole view changes nothing.

    Args:
        n_clusters: how many.
        repulsion: how much a plane shuns the samples of other clusters, in [0, 1); 0 is k-plane
            clustering (Bradley and Mangasarian, 2000).
        init: the labels to start from: "spectral" for multi-view spectral clustering, or (N,) ints
            from 0 to n_clusters - 1.
        n_neighbors: of each sample in the graph of the spectral clustering.
        max_iter: rounds at most.
        random_state: seed of the spectral clustering.

    Attributes:
        labels_: (N,) int, 0 to n_clusters - 1.
        normals_: of each view (n_clusters, features), of length 1.
        offsets_: of each view (n_clusters,).
        scales_: of each view, by which distances are divided: the features' mean variance, as a
            length.
        inertia_: mean of the samples' squared distances from their own planes, scaled.
        n_iter_: rounds until the labels settled.
    """

    def __init__(
        self,
        n_clusters=2,
        *,
        repulsion=0.05,
        init="spectral",
        n_neighbors=10,
        max_iter=100,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.repulsion = repulsion
        self.init = init
        self.n_neighbors = n_neighbors
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X, y=None):
        """Finds the planes.

        Args:
            X: a list of views, (N, features) each, or one view as an array.
            y: ignored.

        Raises:
            ValueError: views of different lengths, values that are not finite, or parameters out
                of range.
        """
        views = self._views(X, reset=True)
        count = len(views[0])
        if not 1 <= self.n_clusters <= count:
            raise ValueError(f"n_clusters={self.n_clusters} of {count} samples (n_samples={count})")
        if not 0 <= self.repulsion < 1:
            raise ValueError(f"repulsion is {self.repulsion}; it must lie in [0, 1)")
        if self.max_iter < 1 or self.n_neighbors < 1:
            raise ValueError("max_iter and n_neighbors are at least 1")
        self.scales_ = [float(np.sqrt(view.var(axis=0).mean())) or 1.0 for view in views]
        labels, seen = self._first_labels(views), set()
        for iteration in range(1, self.max_iter + 1):
            self.n_iter_ = iteration
            seen.add(labels.tobytes())
            planes = [_planes(view, labels, self.n_clusters, self.repulsion) for view in views]
            self.normals_, self.offsets_ = (list(part) for part in zip(*planes, strict=True))
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
        """Distances from the clusters' planes, (N, n_clusters): root mean square over the views.

        Args:
            X: as of `fit`.
        """
        check_is_fitted(self)
        return np.sqrt(self._squares(self._views(X)))

    def predict(self, X):
        """The cluster of each sample, (N,) int.

        Args:
            X: as of `fit`.
        """
        return self.transform(X).argmin(axis=1)

    def _views(self, X, reset=False):
        if not isinstance(X, list | tuple) or not X or np.ndim(X[0]) < 2:
            X = validate_data(self, X, reset=reset, dtype=np.float64)
            views = [X]
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
        if isinstance(self.init, str):
            if self.init != "spectral":
                raise ValueError(f"init is {self.init!r}; give 'spectral' or an array of labels")
            neighbors = min(self.n_neighbors, len(views[0]) - 1)
            return _spectral(views, self.n_clusters, neighbors, self.random_state)
        labels = np.asarray(self.init)
        count = len(views[0])
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
    """Labels with no cluster empty: one that is takes the sample farthest from its own planes."""
    count = squares.shape[1]
    for cluster in range(count):
        sizes = np.bincount(labels, minlength=count)
        if sizes[cluster] == 0:
            distances = np.where(sizes[labels] > 1, squares[np.arange(len(labels)), labels], -1)
            labels[distances.argmax()] = cluster
    return labels


def _spectral(views, count, neighbors, random_state):
    """Spectral clustering of the views' neighbourhood graphs, added up: (N,) labels.

    The graphs have the local scaling of Zelnik-Manor and Perona, "Self-tuning spectral clustering",
    NIPS 2004; adding them up is the plain one of the ways compared by Kumar, Rai and Daume,
    "Co-regularized multi-view spectral clustering", NIPS 2011.
    """
    size = len(views[0])
    if count == 1 or count == size:
        return np.arange(size) % count
    graph = 0
    for view in views:
        graph = graph + _graph(view, neighbors)
    clustering = SpectralClustering(
        count,
        affinity="precomputed",
        eigen_solver="lobpcg",  # ARPACK's time grows much faster than the number of samples
        random_state=check_random_state(random_state).randint(2**31 - 1),
    )
    with warnings.catch_warnings():
        # A graph in parts is good.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        labels = clustering.fit_predict(graph)
    missing = np.setdiff1d(np.arange(count), labels)
    if len(missing):  # equal samples
        labels[np.flatnonzero(labels == np.bincount(labels).argmax())[1 : len(missing) + 1]] = (
            missing
        )
    return labels.astype(np.int64)


def _graph(view, neighbors):
    """Symmetric (N, N) sparse affinities in [0, 1] of a view's nearest neighbours."""
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
# to their own label: flags 1 to 2 % of those that are right and half of those that were exchanged.
_MIN_MARGIN = 0.75
_MIN_AGREEMENT = 0.7  # mean share of a label's images that lie nearest to its planes
# Chosen on Kvasir-SEG with 25 images of other things among its images: all of these are above,
# and of 1,000 images one; among fewer images up to 2 %.
_MIN_OUTLIER = 1.6
_NEIGHBORS = 20


def validity_findings(result: Audit) -> list[Finding]:
    """The validity check of an audited data set: `check_validity` of the images that can be read.

    Their labels are their classes, or "lesion" and "none" where lesions are annotated.

    Args:
        result: of `audit`; without embeddings there are two views only.

    Raises:
        ModuleNotFoundError: scikit-image is missing.
    """
    data = result.data
    if not result.readable:
        return []
    entries = [data.entries[i] for i in result.readable]
    described = in_threads(_describe, [entry.path for entry in entries], "Colour and texture")
    views = [np.array(view) for view in zip(*described, strict=True)]
    if result.embeddings is not None:
        views.append(result.embeddings)
    names, splits = [entry.name for entry in entries], [entry.split for entry in entries]
    return check_validity(names, splits, [_label(data, entry) for entry in entries], views)


def _describe(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Square roots of the histograms: distances of these are Hellinger's."""
    image = read_image(path)
    return np.sqrt(colour_histogram(image)), np.sqrt(texture_histogram(image))


def _label(data: AuditedData, entry: Entry) -> str | None:
    if not data.classified:
        return "lesion" if entry.annotations else "none"
    names = {category["id"]: str(category["name"]) for category in data.categories}
    return names.get(entry.annotations[0]["category_id"]) if entry.annotations else None


def check_validity(
    images: Sequence[str],
    splits: Sequence[str],
    labels: Sequence[str | None],
    views: Sequence[np.ndarray],
) -> list[Finding]:
    """Finds images whose looks disagree with their label, and outliers.

    Args:
        images: N file names.
        splits: of each, "" for none.
        labels: of each, such as "lesion" and "none", or its class; None if it has none.
        views: (N, D) float arrays, whose distances are small between similar images.

    Returns:
        findings of the kinds "cluster_disagrees", with a score from 0.75 to 1, and "outlier", with
        the mean local outlier factor, of which 1 is usual; and as info what could not be checked.
    """
    if len(images) < MIN_IMAGES:
        detail = f"{len(images)} images: too few to find outliers."
        return [finding("outlier", (), (), detail, severity="info")]
    reduced = [_reduced(view) for view in views]
    return [
        *_outliers(images, splits, reduced),
        *_disagreements(images, splits, np.array([label or "" for label in labels]), reduced),
    ]


def _reduced(view: np.ndarray) -> np.ndarray:
    """(N, C) principal components, each of variance 1."""
    constant = np.ptp(view, axis=0) == 0
    view = view[:, ~constant].astype(float)
    components = min(_COMPONENTS, len(view) // 4, view.shape[1])
    return PCA(components, whiten=True, svd_solver="full").fit_transform(view)


def _outliers(
    images: Sequence[str], splits: Sequence[str], views: Sequence[np.ndarray]
) -> list[Finding]:
    neighbors = min(_NEIGHBORS, len(images) // 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate values")
        factors = [-LocalOutlierFactor(neighbors).fit(v).negative_outlier_factor_ for v in views]
    score = np.mean(factors, axis=0)
    return [
        finding(
            "outlier",
            (images[i],),
            (splits[i],),
            f"Local outlier factor {score[i]:.2f}, mean of {len(views)} views; of half of the "
            f"images it is below {np.median(score):.2f}.",
            score=round(float(score[i]), 3),
        )
        for i in np.flatnonzero(score > _MIN_OUTLIER)[np.argsort(-score[score > _MIN_OUTLIER])]
    ]


def _disagreements(
    images: Sequence[str],
    splits: Sequence[str],
    labels: np.ndarray,
    views: Sequence[np.ndarray],
) -> list[Finding]:
    counts = Counter(labels[labels != ""].tolist())
    names = sorted(name for name, count in counts.items() if count >= MIN_IMAGES)
    skipped = [f"{name} ({counts[name]})" for name in sorted(counts.keys() - set(names))]
    if len(names) < 2:
        detail = (
            f"Labels were not checked: fewer than two of them have {MIN_IMAGES} images; there are "
            f"{', '.join(f'{name} ({count})' for name, count in sorted(counts.items())) or 'none'}."
        )
        return [finding("cluster_disagrees", (), (), detail, severity="info")]
    known = np.flatnonzero(np.isin(labels, names))
    views = [view[known] for view in views]
    labels = np.searchsorted(names, labels[known])
    squares = _squares_of_unseen(views, labels, len(names))
    agreement = _agreement(squares.argmin(axis=1), labels)
    free = MultiViewKPlaneClustering(len(names), random_state=0).fit(views)
    summary = (
        f"Of {', '.join(f'{name} ({counts[name]})' for name in names)}, {100 * agreement:.0f} % "
        f"lie nearest to the planes of their label (mean over the labels); clusters found "
        f"without labels agree with them to {100 * _best_agreement(free.labels_, labels):.0f} %."
    )
    if skipped:
        summary += f" Too few to be checked: {', '.join(skipped)}."
    if agreement < _MIN_AGREEMENT:
        summary += " The labels do not show in these views, so no image is named."
        return [finding("cluster_disagrees", (), (), summary, severity="info")]
    rows = np.arange(len(known))
    others = squares.copy()
    others[rows, labels] = np.inf
    nearest = others.argmin(axis=1)
    mine, other = squares[rows, labels], squares[rows, nearest]
    margin = (mine - other) / np.maximum(mine + other, 1e-12)
    chosen = np.flatnonzero(margin > _MIN_MARGIN)
    findings = [
        finding(
            "cluster_disagrees",
            (images[known[i]],),
            (splits[known[i]],),
            f"Labelled {names[labels[i]]}, but much nearer to the planes of {names[nearest[i]]}: "
            f"{margin[i]:.2f}, where 1 is on them and -1 on those of its label.",
            score=round(float(margin[i]), 3),
        )
        for i in chosen[np.argsort(-margin[chosen])]
    ]
    return [finding("cluster_disagrees", (), (), summary, severity="info"), *findings]


def _squares_of_unseen(views: Sequence[np.ndarray], labels: np.ndarray, count: int) -> np.ndarray:
    """(N, count) squared distances from the labels' planes, each image's found without it."""
    squares = np.empty((len(labels), count))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0).split(labels, labels)
    for rest, unseen in folds:
        planes = MultiViewKPlaneClustering(
            count, repulsion=_REPULSION, init=labels[rest], max_iter=1
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one round is what is wanted
            planes.fit([view[rest] for view in views])
        squares[unseen] = planes.transform([view[unseen] for view in views]) ** 2
    return squares


def _agreement(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the labels of the share whose cluster has the label's number, 0 to 1."""
    return float(np.mean([(clusters[labels == label] == label).mean() for label in set(labels)]))


def _best_agreement(clusters: np.ndarray, labels: np.ndarray) -> float:
    """`_agreement` after numbering the clusters so that it is largest."""
    count = labels.max() + 1
    shares = [
        [(clusters[labels == label] == cluster).mean() for cluster in range(count)]
        for label in range(count)
    ]
    return float(np.mean(np.array(shares)[linear_sum_assignment(shares, maximize=True)]))
