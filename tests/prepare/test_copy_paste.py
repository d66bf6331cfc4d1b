"""Pasted lesions: pixels, masks and boxes agree; nothing that is there gets lost."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances

from imrcnn_d2.data.augmentation import CopyPaste, paste_lesions


def make_sample(size, boxes, value):
    """An image of one grey with lesions ``value + i``, as a mapper gives it."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    image = torch.full((3, *size), 10, dtype=torch.uint8)
    for i, (y0, x0, y1, x1) in enumerate(boxes):
        masks[i, y0:y1, x0:x1] = True
        image[:, y0:y1, x0:x1] = value + i
    instances = Instances(size)
    instances.gt_masks = BitMasks(masks)
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_classes = torch.arange(len(boxes))
    return {"image": image, "instances": instances, "image_id": value}


@pytest.mark.parametrize("seed", range(6))
def test_pixels_masks_and_boxes_agree(seed):
    np.random.seed(seed)
    donor = make_sample((40, 70), [(5, 5, 15, 17), (20, 40, 30, 52)], 100)
    sample = make_sample((60, 64), [], 50)
    pasted = paste_lesions(donor, sample, feather=0.01)
    instances = pasted["instances"]
    assert instances.image_size == (60, 64) and pasted["image_id"] == 50
    assert [int(m.sum()) for m in instances.gt_masks.tensor] == [120, 120]
    for mask, cls in zip(instances.gt_masks.tensor, instances.gt_classes, strict=True):
        assert (pasted["image"][:, mask] == 100 + cls).all()
    assert (pasted["image"][:, ~instances.gt_masks.tensor.any(0)] == 10).all()
    # both lesions moved by the same way
    (first, second) = instances.gt_boxes.tensor
    assert (second - first).tolist() == [35, 15, 35, 15]
    assert sample["image"].unique().tolist() == [10]  # the input is left as it was


def test_lesions_that_are_there_stay_visible():
    sample = make_sample((30, 30), [(0, 0, 30, 12)], 200)
    donor = make_sample((30, 30), [(0, 0, 28, 20)], 100)
    areas = set()
    for seed in range(20):
        np.random.seed(seed)
        pasted = paste_lesions(donor, sample)
        instances = pasted["instances"]
        assert not (instances.gt_masks.tensor.sum(0) > 1).any()
        areas.add(len(instances))
        if len(instances) == 2:
            left = instances.gt_masks.tensor[0].sum()
            assert 180 <= left < 360
            x1 = instances.gt_boxes.tensor[0, 2]
            assert x1 == instances.gt_masks.tensor[0].any(0).nonzero().max() + 1
        else:
            assert pasted is sample
    assert areas == {1, 2}


def test_a_lesion_larger_than_the_image_covers_it():
    np.random.seed(1)
    donor = make_sample((80, 80), [(2, 2, 78, 78)], 100)
    pasted = paste_lesions(donor, make_sample((20, 20), [], 50), feather=0.01)
    assert pasted["instances"].gt_masks.tensor.all()
    assert (pasted["image"] == 100).all()


def test_a_donor_without_lesions_changes_nothing():
    sample = make_sample((20, 20), [(1, 1, 9, 9)], 50)
    assert paste_lesions(make_sample((20, 20), [], 70), sample) is sample


class Mapper:
    instance_mask_format = "bitmask"

    def __call__(self, record):
        return make_sample((40, 40), record, 90)


def test_how_often_and_from_where():
    np.random.seed(0)
    records = [[], [(0, 0, 10, 10)], [(0, 0, 5, 20)]]
    counts = [len(CopyPaste(Mapper(), records, 0.6)(records[0])["instances"]) for _ in range(400)]
    assert 0.6 * 2 / 3 == pytest.approx(np.mean(counts), abs=0.08)
    assert len(CopyPaste(Mapper(), records, 0.0)(records[1])["instances"]) == 1


def test_polygons_are_refused():
    mapper = Mapper()
    mapper.instance_mask_format = "polygon"
    with pytest.raises(ValueError, match="COPY_PASTE_PROB is 0.5.*bitmask"):
        CopyPaste(mapper, [], 0.5)
