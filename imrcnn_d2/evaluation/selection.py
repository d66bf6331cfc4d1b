"""The score by which the best checkpoint is chosen."""

import math

__all__ = ["selection_score"]


def selection_score(lesion, image, *, has_lesions, has_lesion_free_images):
    """
    Mean of lesion-level precision, recall and F1 and image-level specificity, at the threshold.

    The paper chooses "the best weights by a joint look at precision, recall, specificity and F1".
    Which of the four take part is decided from the ground truth alone, so that all checkpoints of
    a run are compared by the same mean: the first three need a lesion in the data set, the last a
    lesion-free image. Precision and F1, where a checkpoint detects nothing, count 0.

    Args:
        lesion, image (dict[str, float]): figures in percent.
        has_lesions, has_lesion_free_images (bool): of the data set.

    Returns:
        float: in percent; NaN for a data set without images.
    """
    taking_part = []
    if has_lesions:
        taking_part += [lesion["precision"], lesion["recall"], lesion["f1"]]
    if has_lesion_free_images:
        taking_part.append(image["specificity"])
    if not taking_part:
        return float("nan")
    return sum(0.0 if math.isnan(figure) else figure for figure in taking_part) / len(taking_part)
