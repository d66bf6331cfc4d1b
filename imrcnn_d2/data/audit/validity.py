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

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import LocalOutlierFactor

from imrcnn_d2.data.audit.audit import Audit
from imrcnn_d2.data.audit.examine import in_threads
from imrcnn_d2.data.audit.findings import Finding, finding
from imrcnn_d2.data.audit.records import AuditedData, Entry
from imrcnn_d2.data.image_views import colour_histogram, texture_histogram
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.plane_clustering import MultiViewKPlaneClustering

__all__ = ["MIN_IMAGES", "check_validity", "validity_findings"]

MIN_IMAGES = 40  # in all, and of each label
_COMPONENTS = 16  # of each view
_REPULSION = 0.3
_FOLDS = 5
# Chosen on crops of Kvasir-SEG, of polyps and of mucosa without, of which five in six lie nearest
# to their own label: flags 1 to 2 % of those that are right and half of those that were exchanged.
_MIN_MARGIN = 0.75
_MIN_AGREEMENT = 0.7  # mean share of a label's images that lie nearest to its planes
# Chosen on Kvasir-SEG with 25 pictures of other things among its images: all of these are above,
# and of 1,000 images one; among fewer images up to 2 %.
_MIN_OUTLIER = 1.6
_NEIGHBORS = 20


def validity_findings(result: Audit) -> list[Finding]:
    """The validity check of an audited data set: `check_validity` of the images that can be read.

    Their labels are their classes, or "lesion" and "none" where lesions are outlined.

    Args:
        result: of `audit`; without embeddings there are two views only.

    Raises:
        ModuleNotFoundError: scikit-image is missing; the error says how to install it.
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
        views: (N, D) float arrays, whose distances tell how alike two images are.

    Returns:
        findings of the kinds "cluster_disagrees", with a score from 0.75 to 1, and "outlier", with
        the mean local outlier factor, of which 1 is usual; and as info what could not be checked.
    """
    if len(images) < MIN_IMAGES:
        detail = f"{len(images)} images: too few to say which is unlike the others."
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
    own = np.searchsorted(names, labels[known])
    squares = _squares_of_unseen(views, own, len(names))
    agreement = _agreement(squares.argmin(axis=1), own)
    free = MultiViewKPlaneClustering(len(names), random_state=0).fit(views)
    about = (
        f"Of {', '.join(f'{name} ({counts[name]})' for name in names)}, {100 * agreement:.0f} % "
        f"lie nearest to the planes of their own label (mean over the labels); clusters found "
        f"without the labels agree with them to {100 * _best_agreement(free.labels_, own):.0f} %."
    )
    if skipped:
        about += f" Too few to be checked: {', '.join(skipped)}."
    if agreement < _MIN_AGREEMENT:
        about += " The labels do not show in these views, so no image is named."
        return [finding("cluster_disagrees", (), (), about, severity="info")]
    rows = np.arange(len(known))
    others = squares.copy()
    others[rows, own] = np.inf
    nearest = others.argmin(axis=1)
    mine, other = squares[rows, own], squares[rows, nearest]
    margin = (mine - other) / np.maximum(mine + other, 1e-12)
    chosen = np.flatnonzero(margin > _MIN_MARGIN)
    findings = [
        finding(
            "cluster_disagrees",
            (images[known[i]],),
            (splits[known[i]],),
            f"Labelled {names[own[i]]}, but much nearer to the planes of {names[nearest[i]]}: "
            f"{margin[i]:.2f}, where 1 is upon them and -1 upon its own label's.",
            score=round(float(margin[i]), 3),
        )
        for i in chosen[np.argsort(-margin[chosen])]
    ]
    return [finding("cluster_disagrees", (), (), about, severity="info"), *findings]


def _squares_of_unseen(views: Sequence[np.ndarray], own: np.ndarray, count: int) -> np.ndarray:
    """(N, count) squared distances from the labels' planes, each image's found without it."""
    squares = np.empty((len(own), count))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0).split(own, own)
    for rest, unseen in folds:
        planes = MultiViewKPlaneClustering(count, repulsion=_REPULSION, init=own[rest], max_iter=1)
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
