"""Predictions as COCO records: what every output is made from."""

import numpy as np
import pycocotools.mask as mask_util

__all__ = ["coco_head", "counted", "frame_record", "instance_records", "label_map", "records"]


def instance_records(predictor, output, height, width, view=None):
    """
    Args:
        predictor (Predictor): of a detector.
        output (Instances): what its ``forward`` gave for an image; used up.
        height, width (int): of the original image.
        view (View or None): what of it the network saw.

    Returns:
        list[dict]: COCO annotations without ids, by falling score: ``category_id`` (class index
        + 1), ``bbox`` (xywh in pixels), ``score``, ``segmentation`` (compressed RLE) and ``area``.
    """
    records = []
    # One at a time: a hundred masks of a large image would fill the memory.
    for i in range(len(output)):
        finished = predictor.finish(output[i : i + 1], height, width, view)
        if not len(finished):  # a box without any extent
            continue
        x0, y0, x1, y1 = finished.pred_boxes.tensor[0].tolist()
        record = {
            "category_id": int(finished.pred_classes[0]) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(finished.scores[0]),
        }
        if finished.has("pred_masks"):
            mask = np.asfortranarray(finished.pred_masks[0].numpy(), dtype=np.uint8)
            rle = mask_util.encode(mask)
            record["segmentation"] = {"size": [height, width], "counts": rle["counts"].decode()}
            record["area"] = float(mask_util.area(rle))
        else:
            record["area"] = (x1 - x0) * (y1 - y0)
        records.append(record)
    return records


def frame_record(name, frame, view=None):
    """
    Args:
        name (str): of the input, as outputs call it.
        frame (Frame):
        view (View or None): what of it the network saw.

    Returns:
        dict: COCO image record without an id. Of a frame of several, ``file_name`` ends in its
        number, behind "#", and ``frame`` and ``time`` (seconds, or None) say it once more.
        ``view`` is the box [x, y, width, height] that the network saw, where it saw not all.
    """
    height, width = frame.image.shape[:2]
    record = {"file_name": name, "width": width, "height": height}
    if frame.number is not None:
        record["file_name"] = f"{name}#{frame.number:06d}"
        record["frame"] = frame.number
        record["time"] = None if frame.time is None else float(frame.time)
    if view is not None:
        x0, y0, x1, y1 = view.box
        record["view"] = [x0, y0, x1 - x0, y1 - y0]
    return record


def records(predictor, output, height, width, view=None):
    """
    Args:
        predictor (Predictor):
        output (Instances or Tensor): what its ``forward`` gave for an image; used up.
        height, width (int): of the original image.
        view (View or None): what of it the network saw.

    Returns:
        list[dict]: see :func:`instance_records`. Of a recognition model one COCO annotation of the
        whole image: ``category_id`` of the likeliest class (index + 1), its ``score``, and the
        ``probabilities`` of all.
    """
    if not predictor.is_classifier:
        return instance_records(predictor, output, height, width, view)
    values = output.tolist()
    score = max(values)
    return [{"category_id": values.index(score) + 1, "score": score, "probabilities": values}]


def coco_head(about, classes):
    """
    Args:
        about (dict), classes (list[str]): of the :class:`Predictor`.

    Returns:
        dict: the ``info`` and ``categories`` of a COCO file of its predictions.
    """
    return {
        "info": {
            "description": "Predictions of research software, not for diagnosis. All "
            "detections are listed; those with a score of at least tau count.",
            **about,
        },
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
    }


def counted(annotations, tau):
    """
    Args:
        annotations (list[dict]): of an image.
        tau (float or None): None where there is nothing but classes of images.

    Returns:
        list[dict]: detections with a score of at least ``tau``, and the class of an image.
    """
    return [a for a in annotations if "probabilities" in a or a["score"] >= tau]


def label_map(annotations, height, width):
    """
    Args:
        annotations (list[dict]): of an image, with a ``segmentation``.
        height, width (int): of the image.

    Returns:
        np.ndarray: (H, W) uint8, ``category_id`` of the highest score at each pixel, 0 for none.
    """
    ret = np.zeros((height, width), np.uint8)
    for annotation in sorted(annotations, key=lambda annotation: annotation["score"]):
        ret[mask_util.decode(annotation["segmentation"]).astype(bool)] = annotation["category_id"]
    return ret
