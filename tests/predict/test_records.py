"""COCO records of a prediction, against the instances they are of."""

import numpy as np
import pycocotools.mask as mask_util
import torch
from rectangles import rectangle

from imrcnn_d2.deploy.inputs import Frame
from imrcnn_d2.deploy.outputs import above_threshold, frame_record, label_map, records

from .conftest import random_image


def test_records_are_the_instances(predictor):
    image = random_image(0)
    instances = predictor(image)
    found = records(predictor, predictor.forward([predictor.prepare(image)])[0], 60, 80)
    assert len(found) == len(instances) > 1
    for i, record in enumerate(found):
        x, y, width, height = record["bbox"]
        box = torch.tensor([x, y, x + width, y + height])
        torch.testing.assert_close(box, instances.pred_boxes.tensor[i])
        assert record["score"] == instances.scores[i].item()
        assert record["category_id"] == instances.pred_classes[i].item() + 1
        mask = mask_util.decode(record["segmentation"])
        assert (mask == instances.pred_masks[i].numpy()).all()
        assert record["area"] == mask.sum()
    assert np.all(np.diff([record["score"] for record in found]) <= 0)


def test_what_counts():
    annotations = [{"score": 0.9}, {"score": 0.5}, {"score": 0.49}]
    assert above_threshold(annotations, 0.5) == annotations[:2]
    of_image = [{"score": 0.4, "probabilities": [0.4, 0.3, 0.3]}]
    assert above_threshold(of_image, 0.5) == of_image


def test_where_two_overlap_the_surer_one_is_on_top():
    sure = rectangle(1, 0, 0, 10, 10, 1, score=0.9)
    other = rectangle(1, 5, 0, 10, 10, 2, score=0.8)
    labels = label_map([sure, other], 40, 50)
    assert (labels[:10, :10] == 1).all() and (labels[:10, 10:15] == 2).all()
    assert labels.sum() == 100 + 2 * 50


def test_a_frame_has_a_name_of_its_own():
    image = np.zeros((4, 6, 3), np.uint8)
    assert frame_record("a/b.png", Frame(image)) == {
        "file_name": "a/b.png",
        "width": 6,
        "height": 4,
    }
    frame = frame_record("v.mp4", Frame(image, 7, 0.25))
    assert (frame["file_name"], frame["frame"], frame["time"]) == ("v.mp4#000007", 7, 0.25)
    assert frame_record("d.dcm", Frame(image, 0))["time"] is None
