"""Agreement of annotators against scikit-learn, statsmodels and counting by hand."""

import json
import warnings

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import aggregate_raters
from statsmodels.stats.inter_rater import fleiss_kappa as reference_fleiss

from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.annotator_agreement import (
    PAIR_METRICS,
    agreement,
    agreement_rows,
    cohen_kappa,
    fleiss_kappa,
    read_annotator,
    read_model,
    write_agreement,
)


def compare(*data, model=None, **how):
    """Agreement of annotators a, b, c ..."""
    annotators = [read_annotator(name, own) for name, own in zip("abcdef", data, strict=False)]
    return agreement(annotators, model, **how)


@pytest.fixture
def two(dataset, region):
    """Four images: a shared lesion of IoU 0.8 and one of a alone; one of b alone; two of IoU 0.6
    and 1; none."""
    a = [region(1, 0, 0, 10, 10), region(1, 20, 0, 10, 10), region(3, 0, 0, 10, 10)]
    b = [region(1, 0, 0, 10, 8), region(2, 0, 0, 10, 10), region(3, 20, 0, 10, 10)]
    a.append(region(3, 20, 0, 10, 10))
    b.append(region(3, 0, 0, 6, 10))
    return dataset(4, a), dataset(4, b)


def test_worked_example(two):
    figures = compare(*two).values["a vs b"]
    assert figures["f1"] == pytest.approx(100 * 6 / 8)  # 3 pairs of 4 and 4 lesions
    assert figures["iou"] == pytest.approx(100 * (0.8 + 0.6 + 1) / 3)
    assert figures["dice"] == pytest.approx(100 * (1.6 / 1.8 + 1.2 / 1.6 + 1) / 3)
    unions = [80 / 200, 0, 160 / 200]  # the fourth image has no lesion of either
    assert figures["union_iou"] == pytest.approx(100 * np.mean(unions))
    assert figures["union_dice"] == pytest.approx(100 * np.mean([2 * u / (1 + u) for u in unions]))
    assert figures["same_call"] == 75
    assert figures["kappa"] == pytest.approx(cohen_kappa_score([1, 0, 1, 0], [1, 1, 1, 0]))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_nobody_comes_first(random_case, dataset, seed):
    """Figures are the same the other way round, whatever overlaps what, and 100 with oneself."""
    data, results = random_case(seed)
    other = {**data, "annotations": [{**r, "id": i} for i, r in enumerate(results)]}
    there, back = compare(data, other), compare(other, data)
    for name in PAIR_METRICS:
        assert there.values["a vs b"][name] == pytest.approx(
            back.values["a vs b"][name], nan_ok=True
        )
    same = compare(data, data).values["a vs b"]
    lesions = [a for a in data["annotations"] if not a["iscrowd"]]
    if lesions:
        assert [same[f] for f in ("f1", "iou", "dice", "union_dice")] == pytest.approx([100] * 4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_union_is_that_of_an_evaluation(random_case, seed):
    """Where a has lesions, the overlap of unions is the evaluation's mIoU of b."""
    data, results = random_case(seed)
    data["annotations"] = [a for a in data["annotations"] if not a["iscrowd"]]
    marked = {a["image_id"] for a in data["annotations"]}
    results = [r for r in results if r["image_id"] in marked]
    if not marked:
        return
    other = {**data, "annotations": results}
    scored = evaluate_lesions(data, [{**r, "score": 1.0} for r in results])
    figures = compare(data, other).values["a vs b"]
    assert figures["union_iou"] == pytest.approx(scored.image["miou"])
    assert figures["union_dice"] == pytest.approx(scored.image["mdice"])


def test_as_many_pairs_as_there_can_be(dataset, region):
    """The best overlap first would leave b's second lesion without a partner."""
    a = dataset(1, [region(1, 10, 0, 20, 10), region(1, 22, 0, 20, 10)])
    b = dataset(1, [region(1, 14, 0, 20, 10), region(1, 6, 0, 20, 10)])
    boxes = [mask_util.iou([x["segmentation"]], [y["segmentation"]], [False])[0, 0]
             for x in a["annotations"] for y in b["annotations"]]  # fmt: skip
    assert boxes == pytest.approx([16 / 24, 16 / 24, 12 / 28, 4 / 36])
    found = compare(a, b, iou_threshold=0.4).values["a vs b"]
    assert found["f1"] == 100
    assert found["iou"] == pytest.approx(100 * (16 / 24 + 12 / 28) / 2)
    assert compare(a, b).values["a vs b"]["f1"] == 50


def test_a_pair_more_is_worth_more_than_all_overlaps(dataset, region):
    """Three pairs of IoU 3/17, or two that are the same."""
    a = dataset(1, [region(1, x, 0, 10, 10) for x in (0, 7, 14)])
    b = dataset(1, [region(1, x, 0, 10, 10) for x in (7, 14, 21)])
    found = compare(a, b, iou_threshold=0.1).values["a vs b"]
    assert (found["f1"], found["iou"]) == (100, pytest.approx(100 * 3 / 17))


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_cohen_kappa_is_scikit_learns(answers):
    a, b = np.array(answers).T
    got = cohen_kappa(sum(a & b), sum(a & ~b), sum(b & ~a), sum(~a & ~b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = cohen_kappa_score(a, b, labels=[False, True])
    assert got == pytest.approx(expected, nan_ok=True)


@settings(deadline=None)
@given(st.integers(3, 6), st.data())
def test_fleiss_kappa_is_statsmodels(raters, data):
    row = st.lists(st.booleans(), min_size=raters, max_size=raters)
    answers = np.array(data.draw(st.lists(row, min_size=1, max_size=20)))
    yes = answers.sum(axis=1)
    pairs = (yes * (yes - 1) + (raters - yes) * (raters - yes - 1)) / 2
    got = fleiss_kappa(len(answers), yes.sum(), pairs.sum(), raters)
    if 0 < yes.sum() < answers.size:
        assert got == pytest.approx(reference_fleiss(aggregate_raters(answers.astype(int))[0]))
    else:
        assert np.isnan(got)


def calls(dataset, region, answers):
    """An annotator that sees a lesion in image i where answers[i]."""
    return dataset(len(answers), [region(i, 0, 0, 9, 9) for i, yes in enumerate(answers, 1) if yes])


def test_three_annotators_and_a_model(dataset, region):
    rng = np.random.default_rng(0)
    truth = rng.random(40) < 0.6
    answers = [truth ^ (rng.random(40) < 0.2) for _ in range(4)]
    a, b, c, m = (calls(dataset, region, own) for own in answers)
    results = [{**r, "score": 0.9} for r in m["annotations"]] + [region(1, 0, 0, 9, 9, score=0.1)]
    model = read_model("net", results, 0.5, read_annotator("a", a))
    found = compare(a, b, c, model=model, bootstrap=Bootstrap(200))
    figures = found.values
    assert found.model == "net" and found.meta["lesions"]["net"] == answers[3].sum()
    assert list(figures)[:6] == ["a vs b", "a vs c", "a vs net", "b vs c", "b vs net", "c vs net"]
    for name in PAIR_METRICS:
        among = np.mean([figures[p][name] for p in ("a vs b", "a vs c", "b vs c")])
        with_net = np.mean([figures[f"{p} vs net"][name] for p in "abc"])
        assert figures["annotators"][name] == pytest.approx(among)
        assert figures["model"][name] == pytest.approx(with_net)
        assert figures["difference"][name] == pytest.approx(with_net - among)
    for group, of in (("annotators", answers[:3]), ("with_model", answers)):
        table = aggregate_raters(np.array(of).astype(int).T)[0]
        assert figures[group]["fleiss_kappa"] == pytest.approx(reference_fleiss(table))
    low, high = found.intervals["difference"]["kappa"]
    assert low < figures["difference"]["kappa"] < high


def test_intervals_resample_patients(dataset, region):
    rng = np.random.default_rng(1)
    answers = rng.random((2, 30)) < 0.5
    a, b = (calls(dataset, region, own) for own in answers)
    for image in a["images"]:
        image["patient_id"] = image["id"] // 3
    bootstrap = Bootstrap(300, 2)
    found = compare(a, b, bootstrap=bootstrap)
    assert found.meta["patients"] == 11
    patient = np.arange(1, 31) // 3
    (weights,) = bootstrap.weights(11)
    kappas = []
    for drawn in weights:
        own = np.repeat(np.arange(30), drawn[patient])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kappas.append(cohen_kappa_score(*answers[:, own], labels=[False, True]))
    assert found.intervals["a vs b"]["kappa"] == pytest.approx(
        tuple(np.nanpercentile(kappas, (2.5, 97.5)))
    )


def test_perfect_agreement_has_exact_intervals_of_shares(dataset, region):
    data = calls(dataset, region, [True] * 6 + [False] * 4)
    found = compare(data, data, bootstrap=Bootstrap(50))
    low = 0.025 ** (1 / 6)
    assert found.intervals["a vs b"]["f1"] == pytest.approx((100 * 2 * low / (1 + low), 100))
    assert found.intervals["a vs b"]["same_call"] == pytest.approx((100 * 0.025**0.1, 100))
    assert np.isnan(found.intervals["a vs b"]["kappa"]).all()


def test_images_are_matched_by_name(dataset, region, two, tmp_path):
    """Other ids and another order change nothing; images that not all have are told."""
    a, b = two
    moved = json.loads(json.dumps(b))
    for record in moved["images"]:
        record["id"] = 50 - record["id"]
    for record in moved["annotations"]:
        record["image_id"] = 50 - record["image_id"]
    moved["images"].append({"id": 1, "file_name": "new.png", "height": 40, "width": 50})
    moved["annotations"].append(region(1, 0, 0, 5, 5))
    a["images"].insert(0, {"id": 99, "file_name": "old.png", "height": 40, "width": 50})
    found = compare(a, moved)
    assert found.missing == {"new.png": ["a"], "old.png": ["b"]}
    plain = compare(*two)
    assert found.values["a vs b"] == pytest.approx(plain.values["a vs b"])
    assert [image["file_name"] for image in found.images] == ["1.png", "2.png", "3.png", "4.png"]
    assert found.annotators[1].truth.regions.image.tolist() == [0, 1, 2, 2]  # as Regions has it
    names = {path.name for path in write_agreement(found, tmp_path)}
    assert names == {"agreement.json", "agreement.csv", "per_image.csv", "missing.csv"}
    text = (tmp_path / "missing.csv").read_text()
    assert text == "file_name,missing_in\nnew.png,a\nold.png,b\n"
    document = json.loads((tmp_path / "agreement.json").read_text())
    pair = document["agreement"]["a vs b"]
    assert (pair["matched"], pair["only_a"], pair["only_b"], pair["both"]) == (3, 1, 1, 2)
    assert len(agreement_rows(found)) == 4


def test_classes(dataset, region):
    """Of several, lesions of one class are compared; single ones need no common name."""
    a = dataset(1, [region(1, 0, 0, 9, 9), region(1, 20, 0, 9, 9, 2)], classes=("x", "y"))
    b = dataset(1, [region(1, 0, 0, 9, 9), region(1, 20, 0, 9, 9, 1)], classes=("y", "x"))
    assert compare(a, b).values["a vs b"]["f1"] == 50  # the second is x to a, y to b
    lone = dataset(1, [region(1, 0, 0, 9, 9)], classes=("z",))
    assert compare(a, lone).notes == ["a has no class z", "b has no class x, y"]
    other = dataset(1, [region(1, 0, 0, 9, 9)], classes=("polyp",))
    assert compare(lone, other).values["a vs b"]["f1"] == 100


def test_crowds_are_left_out(dataset, region):
    a = dataset(1, [region(1, 0, 0, 9, 9), region(1, 20, 0, 9, 9, iscrowd=1)])
    b = dataset(1, [region(1, 0, 0, 9, 9)])
    found = compare(a, b)
    assert found.values["a vs b"]["union_iou"] == 100
    assert found.notes == ["a: 1 crowd regions left out"]


def test_a_prediction_file_has_its_own_images(dataset, region, two):
    """What tools/predict.py writes: images that it did not see are not called lesion-free."""
    results = dataset(4, [region(3, 0, 0, 10, 10, score=0.9)])
    results["images"] = results["images"][2:]
    model = read_model("net", results, 0.5, read_annotator("a", two[0]))
    found = compare(two[0], model=model)
    assert list(found.missing) == ["1.png", "2.png"]
    assert found.values["a vs net"]["f1"] == pytest.approx(100 * 2 / 3)


def test_undefined_is_nan(dataset):
    found = compare(dataset(3), dataset(3), bootstrap=Bootstrap(10))
    figures = found.values["a vs b"]
    assert figures.pop("same_call") == 100
    assert np.isnan(list(figures.values())).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["images"].clear() or b["annotations"].clear(), "No image is in all files"),
        (
            lambda b: b["images"][1].update(file_name="1.png"),
            "b: 2 images have the file_name '1.png'",
        ),
        (lambda b: b["images"][0].update(height=41), r"1\.png is \(50, 41\).* but \(50, 40\) in a"),
        (lambda b: b["annotations"][0].pop("segmentation"), "b: an annotation has no mask"),
    ],
)
def test_what_cannot_be_compared(dataset, region, change, message):
    a, b = dataset(2, [region(2, 0, 0, 9, 9)]), dataset(2, [region(2, 0, 0, 9, 9)])
    change(b)
    with pytest.raises(ValueError, match=message):
        compare(a, b)


def test_who_is_compared(dataset):
    one = read_annotator("a", dataset(1))
    for wrong in ([one], [one, one]):
        with pytest.raises(ValueError, match="between two or more of different names"):
            agreement(wrong)
    with pytest.raises(ValueError, match="iou_threshold is 0; it must lie in"):
        compare(dataset(1), dataset(1), iou_threshold=0)
