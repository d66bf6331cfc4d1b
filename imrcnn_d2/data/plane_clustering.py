"""Clustering by planes instead of centres, over several views of the same samples.

k-proximal plane clustering is of Shao, Bai, Wang, Hua and Deng, "Proximal plane clustering via
eigenvalues", Procedia Computer Science 17, 2013; over several views, begun by spectral clustering,
it is of "Multi-view k-proximal plane clustering", Applied Intelligence 2022,
doi 10.1007/s10489-022-03176-1. IMR-CNN's data were checked by the latter.
"""

import warnings

import numpy as np
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.cluster import SpectralClustering
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

__all__ = ["MultiViewKPlaneClustering"]


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
        own, others = view[labels == cluster], view[labels != cluster]
        share = repulsion if len(others) else 0.0
        center, matrix = own.mean(axis=0), np.zeros((view.shape[1],) * 2)
        if share:  # where the best plane of any normal goes through
            center = (center - share * others.mean(axis=0)) / (1 - share)
            matrix = -share * _moments(others, center)
        normals[cluster] = np.linalg.eigh(matrix + _moments(own, center))[1][:, 0]
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
            own = np.where(sizes[labels] > 1, squares[np.arange(len(labels)), labels], -1)
            labels[own.argmax()] = cluster
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
        # That it falls into parts is what one hopes for.
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
