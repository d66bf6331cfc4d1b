import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.curves import FROC, RATES


def froc_of(data, results):
    return evaluate_lesions(data, results).metrics.froc


@pytest.fixture
def worked(dataset, region):
    """
    Four images, five lesions of two classes and a crowd, one image without. From the highest score
    down: hit, false alarm, hit and false alarm at 0.7, on the crowd alone, false alarm, hit.
    """
    data = dataset(
        4,
        [
            region(1, 0, 0, 10, 10),
            region(1, 20, 0, 10, 10, category_id=2),
            region(2, 0, 0, 10, 10),
            region(2, 20, 0, 10, 10),
            region(3, 0, 0, 10, 10, category_id=2),
            region(3, 20, 20, 20, 20, iscrowd=1),
        ],
        classes=("a", "b"),
    )
    results = [
        region(1, 0, 0, 10, 10, score=0.9),
        region(4, 0, 0, 10, 10, score=0.8),
        region(2, 0, 0, 10, 10, score=0.7),
        region(2, 0, 20, 10, 10, score=0.7),
        region(3, 20, 20, 10, 10, score=0.6),
        region(3, 0, 0, 10, 10, score=0.5),  # of the other class
        region(1, 20, 0, 10, 10, category_id=2, score=0.4),
    ]
    return data, results


def test_worked_by_hand(worked):
    froc = froc_of(*worked)
    curve = froc.curve()
    assert curve["score"].tolist() == [0.9, 0.8, 0.7, 0.5, 0.4]
    assert curve["tp"].tolist() == [1, 1, 2, 2, 3]
    assert curve["fp"].tolist() == [0, 1, 2, 3, 3]
    assert curve["sensitivity"] == pytest.approx([20, 20, 40, 40, 60])
    assert curve["fp_per_image"] == pytest.approx([0, 0.25, 0.5, 0.75, 0.75])
    figures = froc.values()
    # 1/8 of an alarm in each of four images is half an alarm: none. 0.7 brings the second.
    expected = {0.125: 20, 0.25: 20, 0.5: 40, 1: 60, 2: 60, 4: 60, 8: 60}
    for rate, sensitivity in expected.items():
        assert figures[f"sensitivity_at_{rate}"] == pytest.approx(sensitivity)
    assert figures["mean"] == pytest.approx(320 / 7)


def test_a_tie_is_let_through_together(dataset, region):
    """Whichever comes first in the file."""
    data = dataset(2, [region(1, 0, 0, 10, 10)])
    tied = [region(1, 0, 0, 10, 10, score=0.5), region(2, 0, 0, 10, 10, score=0.5)]
    for results in (tied, tied[::-1]):
        figures = froc_of(data, results).values()
        assert figures["sensitivity_at_0.25"] == 0
        assert figures["sensitivity_at_0.5"] == 100


def test_undefined(dataset, region, worked):
    figures = froc_of(dataset(2), [region(1, 0, 0, 10, 10, score=0.5)]).values()
    assert len(figures) == 8 and np.isnan(list(figures.values())).all()
    figures = froc_of(worked[0], []).values()
    assert list(figures.values()) == [0] * 8
    froc = froc_of(*worked)
    unscored = FROC(np.ones(6), froc.hit, froc.image, froc.lesions, scored=False)
    assert np.isnan(list(unscored.values().values())).all()
    assert not len(unscored.curve()["score"])
    assert np.isnan(list(FROC(*np.zeros((4, 0), int)).values().values())).all()


def brute_force(froc, rate):
    """The best sensitivity over all thresholds that keep the rate."""
    best = 0.0
    for threshold in {*froc.score.tolist(), 2.0}:
        through = froc.score >= threshold
        if (through & ~froc.hit).sum() / len(froc.lesions) <= rate:
            best = max(best, (through & froc.hit).sum() / froc.lesions.sum())
    return 100 * best


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scores=st.sampled_from(["tied", "distinct"]))
def test_against_brute_force_and_copies_of_images(random_case, seed, scores):
    froc = froc_of(*random_case(seed, scores))
    if froc.lesions.sum():
        figures = froc.values()
        for rate in RATES:
            assert figures[f"sensitivity_at_{rate:g}"] == pytest.approx(brute_force(froc, rate))
    # Weights are copies.
    weights = np.random.default_rng(seed).multinomial(6, [1 / 6] * 6, size=3)
    weighted = froc.values(weights)
    for b, row in enumerate(weights):
        times = row[froc.image]
        images = np.concatenate([[0], np.cumsum(row)[:-1]])[froc.image]  # any copy will do
        copies = FROC(
            np.repeat(froc.score, times),
            np.repeat(froc.hit, times),
            np.repeat(images, times),
            np.repeat(froc.lesions, row),
        )
        for name, value in copies.values().items():
            assert weighted[name][b] == pytest.approx(value, nan_ok=True)
