import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import check_estimator

from imrcnn_d2.data.audit.validity import MultiViewKPlaneClustering


def crossing_planes(seed, views=2, count=120, features=3, noise=0.02):
    """Samples on three planes through the origin in each view, in no order; their planes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(3), count))
    data = []
    for _ in range(views):
        view = np.empty((3 * count, features))
        for plane in range(3):
            axes = np.linalg.qr(rng.normal(size=(features, features)))[0]
            where = rng.uniform(-1, 1, (count, features))
            where[:, 0] = rng.normal(0, noise, count)
            view[labels == plane] = where @ axes.T
        data.append(view)
    return data, labels


@pytest.mark.parametrize("seed", range(4))
def test_planes_that_k_means_cannot_tell_apart(seed):
    views, labels = crossing_planes(seed, views=3)
    by_centres = KMeans(3, n_init=5, random_state=0).fit_predict(np.hstack(views))
    assert adjusted_rand_score(labels, by_centres) < 0.1
    by_planes = MultiViewKPlaneClustering(3, random_state=0).fit(views)
    assert adjusted_rand_score(labels, by_planes.labels_) > 0.9


def test_one_view_is_not_enough_where_two_are():
    views, labels = crossing_planes(2, features=5)
    alone, together = (
        adjusted_rand_score(labels, MultiViewKPlaneClustering(3, random_state=0).fit_predict(x))
        for x in (views[:1], views)
    )
    assert alone < 0.5 and together > 0.9


def test_a_plane_is_the_eigenvectors():
    """The plane of each cluster has the least value of the criterion, among many others."""
    views, labels = crossing_planes(1, views=1, noise=0.1)
    model = MultiViewKPlaneClustering(3, repulsion=0.3, init=labels, max_iter=1)
    with pytest.warns(ConvergenceWarning):
        model.fit(views)

    def criterion(normal, offset, cluster):
        squares = (views[0] @ normal + offset) ** 2
        return squares[labels == cluster].mean() - 0.3 * squares[labels != cluster].mean()

    rng = np.random.default_rng(0)
    for cluster in range(3):
        normal, offset = model.normals_[0][cluster], model.offsets_[0][cluster]
        assert np.linalg.norm(normal) == pytest.approx(1)
        best = criterion(normal, offset, cluster)
        for size in (0.01, 0.1, 1.0):
            for _ in range(50):
                other = normal + size * rng.normal(size=3)
                other /= np.linalg.norm(other)
                assert criterion(other, offset + size * rng.normal(), cluster) > best


def test_without_repulsion_a_plane_is_the_smallest_principal_component():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(200, 4)) * [3, 2, 1, 0.1] + 5
    model = MultiViewKPlaneClustering(1, repulsion=0).fit(sample)
    assert abs(model.normals_[0][0, 3]) > 0.99
    assert model.offsets_[0][0] == pytest.approx(-model.normals_[0][0] @ sample.mean(axis=0))
    expected = np.abs(sample @ model.normals_[0][0] + model.offsets_[0][0]) / model.scales_[0]
    np.testing.assert_allclose(model.transform(sample)[:, 0], expected)


def test_the_same_seed_gives_the_same_and_scale_of_a_view_plays_no_part():
    views, _ = crossing_planes(3)
    one = MultiViewKPlaneClustering(3, random_state=0).fit(views)
    again = MultiViewKPlaneClustering(3, random_state=0).fit(views)
    scaled = MultiViewKPlaneClustering(3, random_state=0).fit([views[0] * 1000, views[1]])
    assert (one.labels_ == again.labels_).all() and one.inertia_ == again.inertia_
    assert (one.labels_ == scaled.labels_).all()
    assert one.inertia_ == pytest.approx(scaled.inertia_)


def test_new_samples_go_to_the_nearest_planes():
    views, labels = crossing_planes(0)
    model = MultiViewKPlaneClustering(3, random_state=0).fit([view[:300] for view in views])
    found = model.predict([view[300:] for view in views])
    assert adjusted_rand_score(labels[300:], found) > 0.8
    assert (model.predict([view[:300] for view in views]) == model.labels_).all()


def test_scikit_learns_own_checks_pass_for_one_view():
    check_estimator(MultiViewKPlaneClustering(), on_skip=None)


def test_equal_samples_and_as_many_clusters_as_samples():
    same = np.ones((12, 3))
    assert set(MultiViewKPlaneClustering(2).fit(same).labels_) == {0, 1}
    few = np.random.default_rng(0).normal(size=(4, 2))
    assert sorted(MultiViewKPlaneClustering(4).fit(few).labels_) == [0, 1, 2, 3]


def test_an_empty_cluster_takes_the_sample_farthest_from_its_plane():
    line = np.c_[np.linspace(0, 1, 20), np.zeros(20)]
    sample = np.r_[line, [[0.5, 0.2]]]
    labels = MultiViewKPlaneClustering(2, init=np.zeros(21, int)).fit(sample).labels_
    assert (labels[:20] == labels[0]).all() and labels[20] != labels[0]


def test_what_is_wrong_is_said():
    views, labels = crossing_planes(0)
    for arguments, problem in (
        ({"n_clusters": 0}, "n_clusters=0"),
        ({"n_clusters": 400}, "n_clusters=400"),
        ({"repulsion": 1.0}, "repulsion is 1.0"),
        ({"init": "random"}, "'random'"),
        ({"init": labels[:5]}, "360 labels"),
        ({"init": labels + 1, "n_clusters": 3}, "from 0 to 2"),
        ({"max_iter": 0}, "max_iter"),
    ):
        with pytest.raises(ValueError, match=problem):
            MultiViewKPlaneClustering(**arguments).fit(views)
    with pytest.raises(ValueError, match=r"\[360, 359\] samples"):
        MultiViewKPlaneClustering().fit([views[0], views[1][1:]])
    with pytest.raises(ValueError, match="NaN"):
        MultiViewKPlaneClustering().fit([views[0], np.where(views[1] > 0.9, np.nan, views[1])])
    model = MultiViewKPlaneClustering(3, random_state=0)
    with pytest.raises(NotFittedError):
        model.predict(views)
    with pytest.raises(ValueError, match="fitted had"):
        model.fit(views).predict([views[0], views[1][:, :2]])
