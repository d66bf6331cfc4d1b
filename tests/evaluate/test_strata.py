import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.counts import SHARES
from imrcnn_d2.evaluation.statistics import Bootstrap


@pytest.fixture
def worked(dataset, region):
    """Lesions of 0.5, 1, 10 (two), 30 and 100 % of images of 40 x 50, and a crowd of 10 %."""
    data = dataset(
        4,
        [
            region(1, 0, 0, 5, 2),
            region(1, 20, 0, 5, 4),
            region(2, 0, 0, 10, 20),
            region(2, 20, 0, 10, 20),
            region(2, 40, 0, 10, 20, iscrowd=1),
            region(3, 0, 0, 20, 30),
            region(4, 0, 0, 50, 40),
        ],
    )
    results = [
        region(1, 20, 0, 5, 4, score=0.9),
        region(2, 0, 0, 10, 16, score=0.9),  # IoU 0.8
        region(2, 20, 0, 10, 20, score=0.6),  # below the threshold
        region(2, 40, 0, 10, 20, score=0.9),  # on the crowd
        region(3, 0, 0, 20, 30, score=0.9),
        region(4, 0, 0, 25, 40, score=0.9),  # IoU 0.5
        region(3, 30, 30, 5, 5, score=0.9),  # a false alarm
    ]
    return data, results


def test_by_share_of_the_image(worked):
    strata = evaluate_lesions(*worked).by_size["share_of_image"]
    assert list(strata) == ["<1 %", "1-5 %", "5-15 %", "15-30 %", ">=30 %"]
    assert [figures["n"] for figures in strata.values()] == [1, 1, 2, 0, 2]
    recall = [figures["recall"] for figures in strata.values()]
    assert recall == pytest.approx([0, 100, 50, np.nan, 100], nan_ok=True)
    assert strata["5-15 %"]["iou"] == pytest.approx(80)
    assert strata["5-15 %"]["iou_all"] == pytest.approx(40)
    assert strata["5-15 %"]["dice"] == pytest.approx(100 * 1.6 / 1.8)
    assert strata["5-15 %"]["iou_box"] == pytest.approx(80)
    assert strata[">=30 %"]["iou"] == pytest.approx(75)
    assert np.isnan(strata["<1 %"]["iou"]) and strata["<1 %"]["iou_all"] == 0
    assert set(strata["<1 %"]) == {"n", "recall", "iou", "iou_box", "iou_all", "dice"}


def test_by_pixels_as_the_annotation_gives_them(worked):
    data, results = worked
    for annotation, area in zip(
        data["annotations"], (1023, 1024, 9215, 9216, 1, 1e6, 0), strict=True
    ):
        annotation["area"] = area
    strata = evaluate_lesions(data, results).by_size["coco"]
    assert [(name, figures["n"]) for name, figures in strata.items()] == [
        ("small", 2),
        ("medium", 2),
        ("large", 2),
    ]


def test_images_of_unknown_size_have_no_shares(worked):
    data, results = worked
    del data["images"][2]["height"], data["images"][2]["width"]
    assert list(evaluate_lesions(data, results).by_size) == ["coco"]


def test_boxes_alone(worked):
    data, results = worked
    bare = [{k: v for k, v in result.items() if k != "segmentation"} for result in results]
    figures = evaluate_lesions(data, bare).by_size["share_of_image"]["5-15 %"]
    assert figures["recall"] == 50 and figures["iou_box"] == pytest.approx(80)
    assert np.isnan([figures[name] for name in ("iou", "iou_all", "dice")]).all()


def test_by_class(dataset, region):
    data = dataset(
        2,
        [
            region(1, 0, 0, 10, 10),
            region(1, 20, 0, 10, 10, category_id=2),
            region(2, 0, 0, 10, 10, category_id=2),
            region(2, 20, 0, 10, 10, iscrowd=1),
        ],
        classes=("a", "b"),
    )
    results = [
        region(1, 0, 0, 10, 8, score=0.9),
        region(1, 20, 0, 10, 10, score=0.9),  # b in truth
        region(2, 0, 0, 10, 10, category_id=2, score=0.8),
        region(2, 20, 0, 10, 10, score=0.8),  # on the crowd
    ]
    scored = evaluate_lesions(data, results)
    a, b = (scored.by_class[name] for name in "ab")
    assert [a[name] for name in ("TP", "FP", "FN", "TN")] == [1, 1, 0, 1]
    assert [b[name] for name in ("TP", "FP", "FN", "TN")] == [1, 0, 1, 0]
    assert a["iou"] == pytest.approx(80) and b["iou"] == pytest.approx(100)
    assert (a["precision"], b["precision"]) == (50, 100)
    assert (a["fp_per_image"], b["recall"]) == (0.5, 50)
    assert (a["AP50_voc"], a["BEP"], b["AP50_voc"]) == (100, 100, 50)
    assert b["AP50"] == pytest.approx(100 * 51 / 101)  # COCO's recalls 0, 0.01, ... 0.5
    assert np.isnan(b["BEP"])  # one detection, two lesions
    assert not evaluate_lesions(dataset(1), []).by_class


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_against_counting_lesion_by_lesion(random_case, seed):
    """Strata partition the lesions; every figure by a plain loop over them."""
    data, results = random_case(seed)
    scored = evaluate_lesions(data, results, tau=0.5)
    gt, found = scored.ground_truth, scored.detections
    hits = {}
    for d in np.flatnonzero(scored.above_threshold & scored.matching.hit):
        lesion = scored.matching.gt[d]
        pair = [found.regions.masks[d]], [gt.regions.masks[lesion]]
        hits[lesion] = mask_util.iou(*pair, [False])[0, 0]
    limits = [*SHARES.values(), 101]
    for name, low, high in zip(SHARES, limits, limits[1:], strict=False):
        own = [r for r in np.flatnonzero(~gt.crowd) if low <= gt.area[r] / 20 < high]
        figures = scored.by_size["share_of_image"][name]
        assert figures["n"] == len(own)
        ious = [hits[r] for r in own if r in hits]
        if own:
            assert figures["recall"] == pytest.approx(100 * len(ious) / len(own))
            assert figures["iou_all"] == pytest.approx(100 * sum(ious) / len(own))
        if ious:
            assert figures["iou"] == pytest.approx(100 * np.mean(ious))
    for figure in ("TP", "FP", "FN"):
        total = sum(figures[figure] for figures in scored.by_class.values())
        assert total == scored.lesion[figure]
    areas = {name: 100 * curve.area for kind, name, curve in scored.curves if kind == "segm"}
    for name, figures in scored.by_class.items():
        assert figures["AP50_voc"] == pytest.approx(areas[name], nan_ok=True)


def test_intervals(worked):
    scored = evaluate_lesions(*worked, bootstrap=Bootstrap(200))
    low, high = scored.intervals["by_size.share_of_image.5-15 %"]["iou_all"]
    assert np.isnan([low, high]).all()  # one image: it is the same in every resample that has it
    assert scored.undefined_shares["by_size.share_of_image.5-15 %.iou_all"] == pytest.approx(
        0.75**4, abs=0.12
    )
    assert scored.intervals["by_size.share_of_image.>=30 %"]["recall"] == pytest.approx(
        (100 * 0.025**0.5, 100)  # Clopper and Pearson's, of two of two
    )
