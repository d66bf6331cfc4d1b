"""Planes that tell labels apart, the views they are found in, and the images that are named."""

import cv2
import numpy as np
import pytest
from PIL import Image
from planted_faults import Planted
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import check_estimator

from imrcnn_d2.data.audit import audit, read_entries, validity
from imrcnn_d2.data.audit.validity import MultiViewKPlaneClustering
from imrcnn_d2.data.images import read_image

pytest.importorskip("skimage")


def crossing_planes(seed, views=2, count=120, features=3, noise=0.02):
    """Samples on three planes through the origin in each view, in no order; their planes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(3), count))
    data = np.empty((views, 3 * count, features))
    for view, plane in np.ndindex(views, 3):
        axes = np.linalg.qr(rng.normal(size=(features, features)))[0]
        coordinates = rng.uniform(-1, 1, (count, features))
        coordinates[:, 0] = rng.normal(0, noise, count)
        data[view, labels == plane] = coordinates @ axes.T
    return list(data), labels


def clustering(views, **options):
    return MultiViewKPlaneClustering(3, random_state=0, **options).fit(views)


@pytest.mark.parametrize("seed", range(4))
def test_planes_that_k_means_cannot_separate(seed):
    views, labels = crossing_planes(seed, views=3)
    by_centres = KMeans(3, n_init=5, random_state=0).fit_predict(np.hstack(views))
    assert adjusted_rand_score(labels, by_centres) < 0.1
    assert adjusted_rand_score(labels, clustering(views).labels_) > 0.9
    views, labels = crossing_planes(2, features=5)  # one view is not enough where two are
    assert adjusted_rand_score(labels, clustering(views[:1]).labels_) < 0.5
    assert adjusted_rand_score(labels, clustering(views).labels_) > 0.9


@pytest.mark.parametrize("repulsion", [0, 0.3])
def test_a_plane_has_the_least_value_of_the_criterion(repulsion):
    views, labels = crossing_planes(1, views=1, noise=0.1)
    with pytest.warns(ConvergenceWarning):
        model = clustering(views, repulsion=repulsion, init=labels, max_iter=1)

    def criterion(normal, offset, cluster):
        squares = (views[0] @ normal + offset) ** 2
        return squares[labels == cluster].mean() - repulsion * squares[labels != cluster].mean()

    rng = np.random.default_rng(0)
    for cluster in range(3):
        normal, offset = model.normals_[0][cluster], model.offsets_[0][cluster]
        assert np.linalg.norm(normal) == pytest.approx(1)
        distances = np.abs(views[0] @ normal + offset) / views[0].var(axis=0).mean() ** 0.5
        np.testing.assert_allclose(model.transform(views)[:, cluster], distances)
        best = criterion(normal, offset, cluster)
        for size in np.repeat((0.01, 0.1, 1.0), 50):
            other = normal + size * rng.normal(size=3)
            other /= np.linalg.norm(other)
            assert criterion(other, offset + size * rng.normal(), cluster) > best


@pytest.mark.filterwarnings("error")
def test_seed_scale_and_clusters_that_are_never_empty():
    views, _ = crossing_planes(3)
    model, again, scaled = (clustering([s * views[0], views[1]]) for s in (1, 1, 1000))
    for labels in (again.labels_, scaled.labels_, model.predict(views)):
        assert (model.labels_ == labels).all()
    assert model.inertia_ == again.inertia_ == pytest.approx(scaled.inertia_)
    # of few samples alike no eigenvectors can be found by iteration
    pairs = MultiViewKPlaneClustering(2, random_state=0).fit(np.repeat(np.eye(3)[:2], 10, axis=0))
    assert (pairs.labels_[:10] != pairs.labels_[10]).all() and len({*pairs.labels_[:10]}) == 1
    # neither of equal samples nor of as many as clusters; one takes the sample farthest off
    assert set(MultiViewKPlaneClustering(2).fit(np.ones((12, 3))).labels_) == {0, 1}
    few = np.random.default_rng(0).normal(size=(4, 2))
    assert sorted(MultiViewKPlaneClustering(4).fit(few).labels_) == [0, 1, 2, 3]
    sample = np.r_[np.c_[np.linspace(0, 1, 20), np.zeros(20)], [[0.5, 0.2]]]
    labels = MultiViewKPlaneClustering(2, init=np.zeros(21, int)).fit(sample).labels_
    assert (labels[:20] == labels[0]).all() and labels[20] != labels[0]


def test_wrong_arguments_and_scikit_learns_checks():
    check_estimator(MultiViewKPlaneClustering(), on_skip=None)
    views, labels = crossing_planes(0)
    wrong = [{"n_clusters": 0}, {"n_clusters": 400}, {"repulsion": 1.0}, {"init": "random"}]
    for arguments in (*wrong, {"init": labels[:5]}, {"init": labels + 1}, {"max_iter": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            MultiViewKPlaneClustering(**arguments).fit(views)
    for second, named in ((views[1][1:], "360, 359"), (views[1] * np.nan, "NaN")):
        with pytest.raises(ValueError, match=named):
            clustering([views[0], second])
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        clustering(views).predict([views[0], views[1][:, :2]])


def test_histograms_show_hue_and_texture_not_light_direction_or_size(kvasir_original):
    red, blue = (np.full((50, 60, 3), colour, np.uint8) for colour in ([200, 0, 0], [0, 0, 200]))
    shares = validity.colour_histogram(red), validity.colour_histogram(blue)
    assert [share.max() for share in shares] == [1, 1] and shares[0] @ shares[1] == 0

    images = [read_image(path) for path in sorted((kvasir_original / "images").iterdir())]
    texture = validity.texture_histogram(images[0])
    assert texture.shape == (54,) and texture.sum() == pytest.approx(3)
    noise = np.random.default_rng(0).integers(0, 256, images[0].shape).astype(np.uint8)
    far = np.abs(validity.texture_histogram(noise) - texture).sum()
    for same in ((images[0] * 0.7).astype(np.uint8), np.ascontiguousarray(images[0][:, ::-1])):
        assert np.abs(validity.texture_histogram(same) - texture).sum() < 0.15 * far
    small = [np.array(Image.fromarray(i).resize((256, 256), Image.Resampling.BOX)) for i in images]
    for describe in (validity.colour_histogram, validity.texture_histogram):
        large, reduced = (np.sqrt([describe(i) for i in group]) for group in (images, small))
        distances = np.linalg.norm(large[:, None] - reduced[None], axis=2)
        assert distances.argmin(axis=1).tolist() == list(range(len(images)))


def clouds(seed, counts=(80, 80), apart=5.0):
    """Names, splits, labels and three views of images, those of each label about random points."""
    rng = np.random.default_rng(seed)
    labels, views = np.repeat(np.arange(len(counts)), counts), []
    for width in (9, 12, 16):
        centres = apart * rng.normal(size=(len(counts), width))
        views.append(centres[labels] + rng.normal(size=(len(labels), width)))
    names = [f"{i}.png" for i in range(len(labels))]
    return names, [""] * len(names), [f"class {label}" for label in labels], views


def flagged(findings, kind):
    """Names of the images that findings of a kind are about."""
    chosen = [finding for finding in findings if finding.kind == kind and finding.flags]
    scores = [finding.score for finding in chosen]
    assert scores == sorted(scores, reverse=True) and min(scores, default=1) > 0.75
    return [finding.images[0] for finding in chosen]


def test_exchanged_labels_and_outliers_come_first():
    names, splits, labels, views = clouds(0, (80, 60, 70))
    wrong = [3, 50, 90, 150, 200]
    for i in wrong:
        labels[i] = "class 0" if labels[i] != "class 0" else "class 2"
    findings = validity.check_validity(names, splits, labels, views)
    assert {*flagged(findings, "cluster_disagrees")} == {names[i] for i in wrong}
    assert not flagged(findings, "outlier")
    names, splits, labels, views = clouds(1, (400, 45))  # the number of images plays no part
    labels[420] = "class 0"
    findings = validity.check_validity(names, splits, labels, views)
    assert flagged(findings, "cluster_disagrees") == ["420.png"]
    names, splits, labels, views = clouds(4, (100,))
    for view, image, shift in ((0, 7, 40), (1, 7, -40), (2, 60, -60), (1, 60, 60), (0, 60, 60)):
        views[view][image] += shift
    findings = validity.check_validity(names, splits, labels, views)
    assert flagged(findings, "outlier") == ["60.png", "7.png"]


def test_what_cannot_be_checked_is_reported():
    findings = validity.check_validity(*clouds(2, apart=0.0))  # labels do not show
    assert [f.flags for f in findings if f.kind == "cluster_disagrees"] == [False]
    names, splits, labels, views = clouds(3, (60, 50, 10))
    infos = [f for f in validity.check_validity(names, splits, labels, views) if not f.flags]
    assert "class 0 (60), class 1 (50)" in infos[0].detail and "class 2 (10)" in infos[0].detail
    alike = validity.check_validity(names, splits, ["lesion"] * len(names), views)
    assert any("lesion (120)" in f.detail for f in alike)
    few = [values[:20] for values in (names, splits, labels)]
    (info,) = validity.check_validity(*few, [view[:20] for view in views])
    assert not info.flags and "20 images" in info.detail


def test_an_audited_data_set(tmp_path):
    """Two classes by their colour and grain, one image of each under the other's name."""
    rng, planted = np.random.default_rng(0), Planted(tmp_path)
    for number in range(101):
        kind = number % 2
        noise = cv2.GaussianBlur(rng.normal(size=(96, 96)), (0, 0), 3 + 3 * kind)
        gray = 120 + 30 * noise / noise.std() + rng.normal(scale=5)
        tint = np.array([[1.2, 0.8, 0.7], [0.9, 1.0, 0.6]][kind]) + rng.normal(scale=0.02, size=3)
        if number == 60:
            gray, tint = np.tile(255.0 * (np.arange(96) % 8 < 4), (96, 1)), [0.3, 0.4, 1.5]
        pixels = np.clip(gray[..., None] * tint, 0, 255).astype(np.uint8)
        record = planted.add(pixels, name=f"{number}.png")
        planted.annotate(record, category_id=2 - kind if number in (8, 31) else kind + 1)
    (planted.images / "100.png").write_bytes(b"no image")
    audited = audit(read_entries("", planted.write(), planted.images))
    findings = validity.validity_findings(audited)
    disagreeing = {*flagged(findings, "cluster_disagrees")}
    assert disagreeing & {"8.png", "31.png"} and disagreeing <= {"8.png", "31.png", "60.png"}
    assert flagged(findings, "outlier")[0] == "60.png"
    assert any("polyp (50)" in f.detail for f in findings)
