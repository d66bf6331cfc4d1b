"""The order of training images: complete epochs, resumable anywhere, shared by processes."""

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st

from imrcnn_d2.data.loader import (
    ResumableBatchSampler,
    balanced_epochs,
    class_balanced_epochs,
    seed_generators,
    shuffled_epochs,
)


def batches(number, size=7, total=4, seed=0, iteration=0, epoch_indices=None):
    sampler = ResumableBatchSampler(epoch_indices or shuffled_epochs(size), total)
    sampler.start_at(seed, iteration)
    return list(itertools.islice(sampler, number))


@given(
    size=st.integers(1, 20),
    total=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    iteration=st.integers(0, 30),
)
def test_it_goes_on_from_any_iteration(size, total, seed, iteration):
    whole = batches(iteration + 3, size, total, seed)
    assert batches(3, size, total, seed, iteration) == whole[iteration:]


@given(size=st.integers(1, 20), total=st.integers(1, 9), seed=st.integers(0, 100))
def test_every_epoch_has_every_image_once(size, total, seed):
    samples = list(itertools.chain(*batches(-(-3 * size // total), size, total, seed)))
    assert [position for _, position, _ in samples] == list(range(len(samples)))
    assert {s for s, _, _ in samples} == {seed}
    for epoch in range(3):
        indices = [index for _, _, index in samples[epoch * size : (epoch + 1) * size]]
        assert sorted(indices) == list(range(size))


def test_epochs_and_seeds_differ():
    orders = [
        tuple(index for _, _, index in batch)
        for seed in (0, 1)
        for batch in batches(3, size=50, total=50, seed=seed)
    ]
    assert len(set(orders)) == 6


def test_processes_share_the_batch(monkeypatch):
    alone = batches(4, total=6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(batches(4, total=6))
    assert [a + b + c for a, b, c in zip(*shares, strict=True)] == alone
    with pytest.raises(ValueError, match="IMS_PER_BATCH a multiple of 3"):
        batches(1, total=4)


def test_rare_images_come_more_often():
    factors = torch.tensor([1.0, 2.5, 1.0, 4.0])
    epoch_indices = balanced_epochs(factors)
    samples = itertools.chain(*batches(500, total=4, epoch_indices=epoch_indices))
    counts = np.bincount([index for _, _, index in samples])
    np.testing.assert_allclose(counts / counts.sum(), factors / factors.sum(), atol=0.02)
    whole = batches(40, total=4, epoch_indices=epoch_indices)
    assert batches(3, total=4, iteration=37, epoch_indices=epoch_indices) == whole[37:]
    # The factors are Detectron2's: an image as rare as its rarest category.
    records = [{"annotations": [{"category_id": int(i == 0)}]} for i in range(8)]
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.5)
    assert expected.tolist() == [2.0] + [1.0] * 7


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.integers(0, 100))
def test_classes_come_equally_often(numbers, seed):
    labels = np.repeat(np.arange(len(numbers)), numbers)
    order = class_balanced_epochs(labels)(torch.Generator().manual_seed(seed)).numpy()
    assert len(order) == len(labels)
    assert np.ptp(np.bincount(labels[order], minlength=len(numbers))) <= 1
    times = np.bincount(order, minlength=len(labels))
    for k in range(len(numbers)):  # within a class no image twice before all came once
        assert np.ptp(times[labels == k]) <= 1


def test_class_balanced_epochs_differ_and_go_on_anywhere():
    labels = np.array([0] * 30 + [1] * 7)
    epoch_indices = class_balanced_epochs(labels)
    whole = batches(40, total=4, epoch_indices=epoch_indices)
    assert batches(3, total=4, iteration=37, epoch_indices=epoch_indices) == whole[37:]
    samples = [index for batch in whole for _, _, index in batch]
    # 18 or 19 of the frequent class an epoch, others in the next one.
    assert len({i for i in samples[:37] if i < 30}) < len({i for i in samples[:74] if i < 30})
    assert set(samples) == set(range(37))


def test_all_generators_are_seeded():
    def draw(*entropy):
        seed_generators(*entropy)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = draw(1, 2)
    assert draw(1, 2) == first
    for other in (draw(2, 1), draw(1, 3), draw(1), draw(2**40, 2)):
        assert all(a != b for a, b in zip(first, other, strict=True))
