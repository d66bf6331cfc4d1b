"""Splits are exact, stratified, complete, seeded, and never part a patient's images."""

import hashlib
import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.data.prepare.splits import (
    FixedTest,
    Item,
    largest_remainder,
    make_folds,
    make_splits,
    parse_ratio,
    read_splits,
    sha256,
)

ratios = st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20))
items = st.lists(st.booleans(), max_size=80).map(
    lambda lesions: [Item(f"{i:03d}.jpg", lesion) for i, lesion in enumerate(lesions)]
)
# a list of patients, each a list of images, each with a lesion or not
patients = st.lists(st.lists(st.booleans(), min_size=1, max_size=7), max_size=25).map(
    lambda groups: [
        Item(f"{p}_{i}.jpg", lesion, f"p{p}")
        for p, group in enumerate(groups)
        for i, lesion in enumerate(group)
    ]
)


def sizes(splits):
    return [len(splits[split]) for split in ("train", "val", "test")]


def names(splits):
    return sorted(sum(splits.values(), []))


@given(st.integers(0, 2000), st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any))
def test_largest_remainder_adds_up_and_is_within_one(total, ratio):
    counts = largest_remainder(total, ratio)
    assert sum(counts) == total
    assert all(
        abs(n - Fraction(total * part, sum(ratio))) < 1
        for n, part in zip(counts, ratio, strict=True)
    )


def test_sizes_of_the_paper():
    kvasir = [Item(f"{i}", True) for i in range(1000)]
    egc = [Item(f"{i}", i < 980) for i in range(1120)]
    assert sizes(make_splits(kvasir)) == [600, 150, 250]
    splits = make_splits(egc)
    assert sizes(splits) == [672, 168, 280]
    healthy = {item.name for item in egc if not item.stratum}
    assert [len(healthy & set(splits[s])) for s in splits] == [84, 21, 35]


@given(items, ratios, st.integers(0, 3))
def test_by_image_exact_and_stratified(images, ratio, seed):
    splits = make_splits(images, ratio, seed)
    assert names(splits) == sorted(item.name for item in images)
    assert sizes(splits) == largest_remainder(len(images), ratio)
    for kind in (True, False):
        of_kind = {item.name for item in images if item.stratum is kind}
        for split, part in zip(splits, ratio, strict=True):
            share = Fraction(len(of_kind) * part, sum(ratio))
            assert abs(len(of_kind & set(splits[split])) - share) < 2


@given(st.lists(st.integers(4, 60), min_size=2, max_size=6), st.integers(0, 3))
def test_strata_of_any_number_are_shared_alike(numbers, seed):
    images = [Item(f"{k}_{i}", k) for k, number in enumerate(numbers) for i in range(number)]
    splits = make_splits(images, (2, 1, 1), seed)
    assert names(splits) == sorted(item.name for item in images)
    assert sizes(splits) == largest_remainder(len(images), (2, 1, 1))
    for k, number in enumerate(numbers):
        for split, part in zip(splits, (2, 1, 1), strict=True):
            own = sum(name.startswith(f"{k}_") for name in splits[split])
            assert abs(own - number * part / 4) < 2


@given(st.lists(st.integers(12, 60), min_size=2, max_size=5), st.integers(1, 10))
def test_a_test_set_of_fixed_size(numbers, per_stratum):
    images = [Item(f"{k}_{i}", k) for k, number in enumerate(numbers) for i in range(number)]
    splits = make_splits(images, FixedTest(per_stratum, 20))
    rest = len(images) - per_stratum * len(numbers)
    assert sizes(splits)[:2] == largest_remainder(rest, (80, 20))
    for k in range(len(numbers)):
        assert sum(name.startswith(f"{k}_") for name in splits["test"]) == per_stratum


@given(st.lists(st.integers(1, 4), min_size=6, max_size=12), st.integers(0, 3))
def test_no_part_is_without_a_stratum_where_patients_suffice(patients, seed):
    # Of each of three classes as many patients, of different numbers of images.
    images = [
        Item(f"{k}_{p}_{i}", k, f"{k}_{p}")
        for k in range(3)
        for p, number in enumerate(patients)
        for i in range(number)
    ]
    for part in make_splits(images, (2, 1, 1), seed).values():
        assert {name[0] for name in part} == {"0", "1", "2"}


@pytest.mark.parametrize("seed", range(6))
def test_a_small_stratum_is_not_left_out_for_the_sake_of_sizes(seed):
    # A patient of the small class in val is one image more than its share, none two fewer.
    images = [
        Item(f"{k}_{p}_{i}", k, f"{k}_{p}")
        for k, number in (("a", 4), ("b", 7), ("c", 5))
        for p in range(number)
        for i in range(3)
    ]
    for part in make_splits(images, (12, 3, 5), seed).values():
        assert {name[0] for name in part} == {"a", "b", "c"}


@given(patients, ratios, st.integers(0, 3))
@settings(max_examples=60)
def test_patients_stay_together(images, ratio, seed):
    splits = make_splits(images, ratio, seed)
    assert names(splits) == sorted(item.name for item in images)
    split_of = {name: split for split in splits for name in splits[split]}
    homes = {}
    for item in images:
        homes.setdefault(item.patient, set()).add(split_of[item.name])
    assert all(len(home) == 1 for home in homes.values())


def test_patients_as_near_as_they_allow():
    # five patients of two images and ratio 3:1:1 fit exactly, one of four and two of three cannot
    pairs = [Item(f"{p}{i}", True, p) for p in range(5) for i in range(2)]
    assert sizes(make_splits(pairs, (3, 1, 1))) == [6, 2, 2]
    uneven = [Item(f"{p}{i}", True, p) for p, n in enumerate((4, 3, 3)) for i in range(n)]
    assert sizes(make_splits(uneven, (3, 1, 1))) in (
        [4, 3, 3],
        [6, 4, 0],
        [6, 0, 4],
        [7, 3, 0],
        [7, 0, 3],
    )
    # found by swapping only: greedy leaves 5+3 and 4+2+2 apart
    many = [Item(f"{p}-{i}", True, p) for p, n in enumerate((5, 4, 3, 2, 2)) for i in range(n)]
    assert sizes(make_splits(many, (1, 0, 1))) == [8, 0, 8]


def test_patients_with_unknown_ones_free():
    known = [Item(f"k{p}{i}", True, p) for p in range(10) for i in range(7)]
    unknown = [Item(f"u{i}", i % 3 == 0) for i in range(50)]
    assert sizes(make_splits(known + unknown)) == largest_remainder(120, (12, 3, 5))


def test_by_image_ignores_patients():
    one_patient = [Item(f"{i}", True, "same") for i in range(20)]
    assert sizes(make_splits(one_patient, by_patient=False)) == [12, 3, 5]


@given(st.integers(30, 60), st.randoms())
@settings(max_examples=20)
def test_seeded_and_independent_of_order(count, random):
    images = [Item(f"{i}.jpg", i % 8 > 0) for i in range(count)]
    shuffled = random.sample(images, len(images))
    assert make_splits(images, seed=1) == make_splits(shuffled, seed=1)
    assert make_splits(images, seed=1) != make_splits(images, seed=2)


@given(items, st.integers(1, 60), ratios)
@settings(max_examples=50)
def test_earlier_assignments_are_kept(images, num_new, ratio):
    earlier = make_splits(images, ratio, seed=5)
    grown = images + [Item(f"new{i}.jpg", i % 8 > 0) for i in range(num_new)]
    splits = make_splits(grown, ratio, seed=0, earlier=earlier)
    assert all(set(earlier[split]) <= set(splits[split]) for split in splits)
    assert names(splits) == sorted(item.name for item in grown)


def test_a_new_image_joins_its_patient():
    earlier = {"train": ["a1"], "val": ["b1"], "test": ["c1"]}
    images = [Item(f"{p}{i}", True, p) for p in "abc" for i in range(1, 4)]
    splits = make_splits(images, earlier=earlier)
    assert splits == {
        "train": ["a1", "a2", "a3"],
        "val": ["b1", "b2", "b3"],
        "test": ["c1", "c2", "c3"],
    }


def test_earlier_assignments_that_part_a_patient():
    images = [Item("a1", True, "a"), Item("a2", True, "a")]
    earlier = {"train": ["a1"], "test": ["a2"]}
    with pytest.raises(ValueError, match="patient a .*--split-by image"):
        make_splits(images, earlier=earlier)
    assert make_splits(images, by_patient=False, earlier=earlier)["test"] == ["a2"]


@given(patients, st.integers(2, 6))
@settings(max_examples=40)
def test_folds_test_every_image_once(images, count):
    folds = make_folds(images, count)
    everything = sorted(item.name for item in images)
    assert sorted(name for fold in folds for name in fold["test"]) == everything
    assert all(names(fold) == everything for fold in folds)
    patient_of = {item.name: item.patient for item in images}
    for fold in folds:
        homes = [{patient_of[name] for name in fold[split]} for split in fold]
        assert not (homes[0] & homes[1] or homes[0] & homes[2] or homes[1] & homes[2])


def test_fold_sizes():
    folds = make_folds([Item(f"{i}", i % 8 > 0) for i in range(1000)], 5)
    assert [sizes(fold) for fold in folds] == [[640, 160, 200]] * 5
    with pytest.raises(ValueError, match="1 folds"):
        make_folds([], 1)


def test_parse_ratio():
    assert parse_ratio("12:3:5") == (12, 3, 5)
    for bad in ("1:2", "a:b:c", "0:1:1", "-1:2:3", "1:2:3:4", "1.5:1:1", ""):
        with pytest.raises(ValueError, match="whole numbers"):
            parse_ratio(bad)


def test_read_splits(tmp_path):
    path = tmp_path / "splits.json"
    lists = {"train": ["b", "a"], "val": [], "test": ["c"]}
    path.write_text(json.dumps(lists))
    assert read_splits(path) == lists

    by_hand = hashlib.sha256(b'[["a", "b"], [], ["c"]]').hexdigest()
    assert sha256(lists) == by_hand
    path.write_text(json.dumps({**lists, "sha256": by_hand}))
    assert read_splits(path) == lists
    for bad, message in (
        ({**lists, "val": ["d"], "sha256": by_hand}, "edited after their hash"),
        ({**lists, "val": ["a"]}, "a is listed more than once"),
        ({"train": []}, "lists train, val and test"),
        ([], "lists train, val and test"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message) as error:
            read_splits(path)
        assert str(path) in str(error.value)
