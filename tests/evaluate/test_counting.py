import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.counts import UnitCounts


def counts_at(dataset, results, tau, iou_type="segm"):
    return evaluate_lesions(dataset, results, tau=tau, iou_type=iou_type).counts


def test_by_hand(dataset, region):
    truth = dataset(
        3,
        [
            region(1, 0, 0, 10, 10),
            region(1, 20, 0, 10, 10),
            region(2, 0, 0, 20, 20, iscrowd=1),
        ],
    )
    results = [
        region(1, 0, 0, 10, 8, score=0.9),  # hit, IoU 0.8
        region(1, 20, 0, 10, 6, score=0.5),  # a hit below the threshold
        region(1, 0, 20, 5, 5, score=0.7),  # false alarm, at the threshold
        region(2, 0, 0, 10, 10, score=0.95),  # in the crowd: counts nowhere
        region(3, 0, 0, 10, 10, score=0.6),  # false alarm below the threshold
    ]
    counts = counts_at(truth, results, 0.7)
    assert counts.lesions.tolist() == [2, 0, 0]
    assert counts.tp.tolist() == [1, 0, 0]
    assert counts.fp.tolist() == [1, 0, 0]
    assert counts.fn.tolist() == [1, 0, 0]
    assert counts.positive.tolist() == [True, False, False]
    assert counts.predicted_positive.tolist() == [True, False, False]
    assert counts.score.tolist() == [0.9, 0, 0.6]
    assert counts.iou == pytest.approx([0.8, 0, 0])
    assert counts.iou_box == pytest.approx([0.8, 0, 0])
    assert counts.dice == pytest.approx([1.6 / 1.8, 0, 0])
    # Image 1: 80 pixels in common, of 200 outlined and 80 + 25 detected.
    assert counts.union_iou == pytest.approx([80 / 225, 0, 0])
    assert counts.union_dice == pytest.approx([160 / 305, 0, 0])


def test_masks_matched_by_boxes(dataset, region):
    """What is counted depends on the matching; overlaps stay those of masks and of boxes."""
    truth = dataset(1, [region(1, 0, 0, 10, 10)])
    result = region(1, 0, 0, 10, 4, score=0.9) | {"bbox": [0, 0, 10, 10]}
    counts = counts_at(truth, [result], 0.7, iou_type="bbox")
    assert (counts.tp[0], counts.iou[0], counts.iou_box[0]) == (1, pytest.approx(0.4), 1)
    counts = counts_at(truth, [result], 0.7, iou_type="segm")
    assert (counts.tp[0], counts.iou[0], counts.iou_box[0]) == (0, 0, 0)


def test_merged_into_patients():
    columns = [np.array(values) for values in ([1, 0, 2], [1, 0, 0], [0, 1, 2])]
    shares = [np.array(values) for values in ([0.5, 0.9, 0.2], [0.6, 0, 0], [0.7, 0, 0])]
    of_images = [np.array(values) for values in ([0.8, 0, 0], [0.3, 0, 0.1], [0.4, 0, 0.2])]
    counts = UnitCounts(*columns, *shares, *of_images)
    merged = counts.merged(np.array([1, 0, 1]))
    assert merged.lesions.tolist() == [0, 3]
    assert merged.tp.tolist() == [0, 1]
    assert merged.fp.tolist() == [1, 2]
    assert merged.fn.tolist() == [0, 2]
    assert merged.score.tolist() == [0.9, 0.5]
    assert merged.iou.tolist() == [0, 0.6]
    assert merged.union_iou == pytest.approx([0, 0.4])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.0, 0.5, 0.7]))
def test_agrees_with_pixels_and_plain_loops(random_case, seed, tau):
    dataset, results = random_case(seed)
    counts = counts_at(dataset, results, tau)

    def pixels(record):
        return mask_util.decode(record["segmentation"]).astype(bool)

    for position, image in enumerate(dataset["images"]):
        lesions = [
            a for a in dataset["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]
        ]
        crowds = [
            a for a in dataset["annotations"] if a["image_id"] == image["id"] and a["iscrowd"]
        ]
        free = list(lesions)
        tp, fp, overlap, found, best = 0, 0, [], np.zeros((40, 50), bool), 0
        for result in sorted(results, key=lambda r: -r["score"]):
            if result["image_id"] != image["id"]:
                continue
            mine = pixels(result)
            same = [a for a in free if a["category_id"] == result["category_id"]]
            iou = [(mine & pixels(a)).sum() / (mine | pixels(a)).sum() for a in same]
            if iou and max(iou) >= 0.5:
                target = max(range(len(same)), key=lambda i: (iou[i], i))
                free = [a for a in free if a is not same[target]]
                best = max(best, result["score"])
                if result["score"] >= tau:
                    tp, found = tp + 1, found | mine
                    overlap.append(iou[target])
            elif not any(
                (mine & pixels(a)).sum() / mine.sum() >= 0.5
                for a in crowds
                if a["category_id"] == result["category_id"]
            ):
                best = max(best, result["score"])
                if result["score"] >= tau:
                    fp, found = fp + 1, found | mine
        assert (counts.tp[position], counts.fp[position]) == (tp, fp)
        assert counts.fn[position] == len(lesions) - tp
        assert counts.score[position] == best
        assert counts.iou[position] == pytest.approx(sum(overlap))
        assert counts.dice[position] == pytest.approx(sum(2 * i / (1 + i) for i in overlap))
        if lesions:
            outlined = np.any([pixels(a) for a in lesions], axis=0)
            both = (found & outlined).sum()
            assert counts.union_iou[position] == pytest.approx(both / (found | outlined).sum())
            expected = 2 * both / (found.sum() + outlined.sum())
            assert counts.union_dice[position] == pytest.approx(expected)
        else:
            assert counts.union_iou[position] == 0
