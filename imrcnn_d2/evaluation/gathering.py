"""Predictions of all processes, for the DatasetEvaluators."""

import itertools

from detectron2.utils import comm

__all__ = ["gather_predictions"]


def gather_predictions(predictions, distributed):
    """
    Args:
        predictions (list[dict]): of this process, each with "image_id".
        distributed (bool): collect from all processes, else these are all.

    Returns:
        list[dict] or None: one prediction an image, on the main process; on others None.
    """
    if distributed:
        comm.synchronize()
        predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
        if not comm.is_main_process():
            return None
    # A sampler that pads the last batch hands out some images twice.
    once = {}
    for prediction in predictions:
        once.setdefault(prediction["image_id"], prediction)
    return list(once.values())
