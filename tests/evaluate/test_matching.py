"""Which detection hits which lesion; against pycocotools, pixels, scikit-learn and by hand."""

import contextlib
import io
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rectangles import rectangles
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.counts import boundary_agreement


@contextlib.contextmanager
def pycocotools(data, results, iou_type):
    """COCOeval of the results, whose output is not shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data
        truth.createIndex()
        yield COCOeval(truth, truth.loadRes([dict(r) for r in results]), iou_type)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), iou_type=st.sampled_from(["segm", "bbox"]))
def test_matching_is_pycocotools(random_case, seed, iou_type):
    """At IoU 0.5 over all sizes."""
    data, results = random_case(seed)
    matching = evaluate_lesions(data, results, iou_type=iou_type).matching
    if not results:
        return
    with pycocotools(data, results, iou_type) as evaluation:
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    # loadRes numbers the results from 1 in file order; ours are stably sorted by image.
    order = np.argsort([result["image_id"] for result in results], kind="stable")
    gt_ids = np.argsort([a["image_id"] for a in data["annotations"]], kind="stable") + 1
    crowds = {a["id"] for a in data["annotations"] if a["iscrowd"]}
    theirs = {}
    for image in filter(None, evaluation.evalImgs):
        theirs.update(zip(image["dtIds"], image["dtMatches"][0].astype(int), strict=True))
    for row, number in enumerate(order):
        match_id = theirs[number + 1]
        assert matching.evaluated[row] == (match_id not in crowds)
        if matching.hit[row]:
            assert gt_ids[matching.gt[row]] == match_id
        else:
            assert match_id == 0 or match_id in crowds


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), iou_type=st.sampled_from(["segm", "bbox"]))
def test_ap_is_pycocotools(random_case, seed, iou_type):
    data, results = random_case(seed)
    if not results:
        return
    # Of masks the area, which decides the size class, is the mask's: loadRes takes it from there
    # only where there is no box.
    unused = "bbox" if iou_type == "segm" else "segmentation"
    bare = [{key: value for key, value in r.items() if key != unused} for r in results]
    values = evaluate_lesions(data, results).groups()[iou_type]
    with pycocotools(data, bare, iou_type) as evaluation:
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = [100 * s if s >= 0 else math.nan for s in evaluation.stats[:6]]
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [values[name] for name in names] == pytest.approx(expected, nan_ok=True)


def test_ap_where_cocoeval_fails(dataset, region):
    """It takes a match with the annotation of id 0 for none, and overflows on 256 masks."""
    data = dataset(3, [region(i, 0, 0, 10, 10) for i in (1, 2, 3)])
    data["annotations"][0]["id"] = 0
    results = [region(1 + i % 3, 0, 0, 10, 10, score=0.5 + i / 1000) for i in range(300)]
    assert evaluate_lesions(data, results).segm["AP"] == pytest.approx(100)
    crowd = dataset(1, [region(1, 0, 0, 10, 10, iscrowd=1)])
    for detected in (results[:1], []):
        assert np.isnan(list(evaluate_lesions(crowd, detected).segm.values())).all()


def test_size_of_a_detection_is_that_of_its_mask(dataset, region):
    """A false alarm that is medium by its box but small by its mask does not touch APm."""
    truth = dataset(1, [region(1, 0, 0, 40, 30)])
    hit = region(1, 0, 0, 40, 30, score=0.5)
    alarm = region(1, 45, 0, 5, 10, score=0.9) | {"bbox": [0, 0, 40, 30]}
    segm = evaluate_lesions(truth, [alarm, hit]).segm
    assert (segm["APm"], segm["AP"]) == (pytest.approx(100), pytest.approx(50))


def test_a_hundred_detections_per_image_and_class(dataset, region):
    truth = dataset(2, [region(1, 0, 0, 10, 10)], classes=("a", "b"))
    many = [region(1, 20, 20, 10, 10, score=0.5) for _ in range(100)]
    late = region(1, 0, 0, 10, 10, score=0.4)  # would hit, but is the 101st
    others = [region(1, 0, 0, 9, 9, category_id=2, score=0.1), region(2, 0, 0, 9, 9, score=0.1)]
    scored = evaluate_lesions(truth, [late, *many, *others])
    assert scored.matching.evaluated.tolist() == (scored.detections.score != 0.4).tolist()
    assert not scored.matching.hit.any()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.0, 0.5, 0.7]))
def test_overlaps_are_those_of_pixels(random_case, seed, tau):
    scored = evaluate_lesions(*random_case(seed), tau=tau)
    counts, gt, detections = scored.counts, scored.ground_truth, scored.detections
    matching, above = scored.matching, detections.score >= tau

    def pixels(regions, rows):
        return mask_util.decode([regions.masks[row] for row in rows]).astype(bool).any(axis=2)

    def overlap(rows, lesions):
        one, two = pixels(detections.regions, rows), pixels(gt.regions, lesions)
        return (one & two).sum() / (one | two).sum()

    for position in range(len(gt.images)):
        lesions = np.flatnonzero((gt.regions.image == position) & ~gt.crowd)
        in_image = matching.evaluated & (detections.regions.image == position)
        selected = np.flatnonzero(in_image & above)
        hits = selected[matching.hit[selected]]
        iou = np.array([overlap([row], [matching.gt[row]]) for row in hits])
        tp, score = len(hits), detections.score[in_image].max(initial=0)
        expected = [tp, len(selected) - tp, len(lesions) - tp, score]
        columns = [counts.tp, counts.fp, counts.fn, counts.score]
        assert [column[position] for column in columns] == expected
        assert counts.iou[position] == pytest.approx(iou.sum())
        assert counts.dice[position] == pytest.approx((2 * iou / (1 + iou)).sum())
        union = overlap(selected, lesions) if len(lesions) and len(selected) else 0
        assert counts.union_iou[position] == pytest.approx(union)
        assert counts.union_dice[position] == pytest.approx(2 * union / (1 + union))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_distances_of_boundaries_are_scipys(seed):
    """Of random blobs, some at the edge of the image or of one pixel, with holes, or equal."""
    rng = np.random.default_rng(seed)
    size = rng.integers(5, 60, 2)
    smooth = gaussian_filter(rng.normal(size=(2, *size)), (0, 2, 2))
    masks = smooth >= np.sort(smooth, axis=None)[-rng.integers(1, min(200, smooth.size))]
    masks &= rng.random(masks.shape) >= rng.choice([0, 0.1])
    masks[1] = masks[rng.integers(2)]
    rles = [mask_util.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    ((hd95, nsd),) = boundary_agreement(rles[:1], rles[1:])
    if not masks.any(axis=(1, 2)).all():
        assert (hd95, nsd) == (pytest.approx(np.hypot(*size)), 0)
        return
    one, two = (np.argwhere(mask & ~binary_erosion(mask)) for mask in masks)
    distance = cdist(one, two)
    nearest = distance.min(axis=1), distance.min(axis=0)
    assert hd95 == pytest.approx(max(np.percentile(values, 95) for values in nearest))
    tolerance = 0.01 * np.hypot(*size)
    assert nsd == pytest.approx(np.mean(np.concatenate(nearest) <= tolerance))


def test_means_over_hits_of_boundary_agreement(dataset, region):
    """A hit above the threshold, one below it, a miss; boxes alone have none."""
    data = dataset(2, rectangles("1 0 0 10 10; 1 20 0 10 10; 2 0 0 10 10"))
    results = rectangles("1 2 0 10 10 @0.9; 1 20 0 10 8 @0.5")
    high, low = (evaluate_lesions(data, results, tau=tau) for tau in (0.7, 0.5))
    assert (high.lesion["hd95"], low.lesion["hd95"]) == (2, 2)
    each = [evaluate_lesions(data, [result], tau=0).lesion["nsd"] for result in results]
    assert high.lesion["nsd"] == each[0] and low.lesion["nsd"] == pytest.approx(np.mean(each))
    row, none = high.per_image
    assert (row["hd95"], row["nsd"]) == (2, each[0]) and np.isnan([none["hd95"], none["nsd"]]).all()
    boxes = [{k: v for k, v in result.items() if k != "segmentation"} for result in results]
    by_boxes = evaluate_lesions(data, boxes).lesion
    assert np.isnan([by_boxes["hd95"], by_boxes["nsd"]]).all()
    # Boxes decide what hits; the mask may be empty. The worst value there is, not none.
    results[0]["segmentation"] = region(1, 0, 0, 0, 0)["segmentation"]
    empty = evaluate_lesions(data, results, iou_type="bbox").lesion
    assert (empty["hd95"], empty["nsd"]) == (pytest.approx(np.hypot(40, 50)), 0)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), num_images=st.integers(1, 8))
def test_metrics_of_images_are_scikit_learns(random_case, seed, num_images):
    """And those that have exact intervals are the shares of cases which these are made of."""
    scored = evaluate_lesions(*random_case(seed, num_images=num_images), tau=0.5)
    rows = scored.per_image
    truth, predicted = (np.array([row[key] > 0 for row in rows]) for key in ("n_gt", "n_det"))
    tn, fp, fn, tp = confusion_matrix(truth, predicted, labels=[False, True]).ravel()
    functions = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    values = {k: f(truth, predicted, zero_division=np.nan) for k, f in functions.items()}
    values["specificity"] = recall_score(~truth, ~predicted, zero_division=np.nan)
    values["accuracy"] = np.mean(truth == predicted)
    if truth.all():  # what needs lesion-free images
        values.update(dict.fromkeys(("precision", "f1", "accuracy"), np.nan))
    expected = {"TP": tp, "FP": fp, "FN": fn, "TN": tn} | {k: 100 * v for k, v in values.items()}
    assert {k: scored.image[k] for k in expected} == pytest.approx(expected, nan_ok=True)
    groups = scored.metrics.once()
    for group, shares in scored.metrics.proportions().items():
        for name, (part, whole) in shares.items():
            part, whole = np.sum(part), np.sum(whole)
            if whole and not np.isnan(groups[group].get(name, np.nan)):
                share = part / whole
                share = 2 * share / (1 + share) if name == "f1" else share
                exact = "AP50_voc" if name == "AP50" else name  # AP50 samples the same curve
                share *= 1 if name.startswith("fp_per") else 100
                assert groups[group][exact] == pytest.approx(share), (group, name)


def test_confusion_by_hand(dataset, region):
    lesions = rectangles(
        "1 0 0 10 10; 1 20 0 10 10 class 2; 1 0 20 10 10 class 2; 2 0 0 10 10; 2 20 0 10 10; "
        "2 20 20 20 20 class 2 crowd"
    )
    data = dataset(3, lesions, classes=("cancer", "ulcer"))
    # (1) right; (2) too late: it is taken; (3) an ulcer taken for cancer; (4) below the threshold;
    # (5) a cancer taken for an ulcer; (6) on the other class's crowd; (7) a false alarm
    results = rectangles(
        "1 0 0 10 9 @0.9; 1 0 0 10 10 class 2 @0.8; 1 20 0 10 10 @0.9; 1 0 20 10 10 class 2 @0.4; "
        "2 0 0 10 10 class 2 @0.5; 2 20 20 10 10 @0.9; 3 0 0 10 10 @0.9"
    )
    for detected, tau, rows in (
        (results, 0.5, [[1, 1, 1], [1, 0, 1], [1, 1, None]]),
        (results, 0.4, [[1, 1, 1], [1, 1, 0], [1, 1, None]]),
        ([], 0.5, [[0, 0, 3], [0, 0, 2], [0, 0, None]]),
    ):
        matrix = evaluate_lesions(data, detected, tau=tau).confusion
        assert (matrix.classes, matrix.rows()) == (["cancer", "ulcer", "background"], rows)
    # Of equal scores the first in the file takes the lesion.
    data = dataset(1, [region(1, 0, 0, 10, 10)], classes=("a", "background"))
    both = [region(1, 0, 0, 10, 10, category_id=c, score=0.6) for c in (2, 1)]
    matrix = evaluate_lesions(data, both, tau=0.5).confusion
    assert matrix.classes == ["a", "background", "no lesion"]
    assert matrix.rows() == [[0, 1, 0], [0, 0, 0], [1, 0, None]]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 3))
def test_sums_of_a_confusion_matrix(random_case, seed, classes):
    data, results = random_case(seed, num_classes=classes)
    scored = evaluate_lesions(data, results, tau=0.5)
    gt, counts = scored.ground_truth, scored.confusion.counts
    lesions = np.bincount(gt.regions.category[~gt.crowd], minlength=classes)
    assert counts[:-1].sum(axis=1).tolist() == lesions.tolist()
    above = scored.detections.score >= 0.5
    at_tau = np.bincount(scored.detections.regions.category[above], minlength=classes)
    if not gt.crowd.any():
        assert counts[:, :-1].sum(axis=0).tolist() == at_tau.tolist()
    if classes == 1:
        tp, fp, fn = (scored.lesion[name] for name in ("TP", "FP", "FN"))
        assert scored.confusion.rows() == [[tp, fn], [fp, None]]
