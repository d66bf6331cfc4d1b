"""The confusion matrix of a detector, with background as a class."""

from dataclasses import dataclass, replace

import numpy as np

from .matching import match, overlaps

__all__ = ["ConfusionMatrix", "confusion_matrix"]


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """
    Attributes:
        classes (list[str]): the k classes by ascending id, then "background" ("no lesion" if one of
            the classes is called that).
        counts (np.ndarray): (k+1, k+1) float, rows by truth, columns by prediction. In the last
            column are the lesions that no detection hits, in the last row the false alarms; NaN in
            the corner, since background that is rightly left alone can't be counted.
    """

    classes: list
    counts: np.ndarray

    def rows(self):
        """list[list[int or None]]: the counts, None in the corner."""
        return [[None if np.isnan(n) else int(n) for n in row] for row in self.counts]


def confusion_matrix(gt, detections, matching, *, tau, iou_threshold, iou_type):
    """
    Detections are matched with the lesions of all classes alike: by falling score (at most 100 an
    image), each takes the free lesion that it overlaps most, if they overlap enough. With one class
    that is the matching of the lesion-level figures.

    Args:
        gt (GroundTruth):
        detections (Detections): N of them.
        matching (Matching): of these two, class by class.
        tau (float): score from which on a detection counts.
        iou_threshold (float): least overlap of a match, in (0, 1].
        iou_type (str): "segm" or "bbox".

    Returns:
        ConfusionMatrix: each row of a class adds up to its lesions. Detections that match only a
        crowd region, of whatever class, are in no column.
    """
    k = len(gt.categories)
    if k > 1:
        blind_gt = replace(gt, categories=gt.categories[:1], regions=_of_one_class(gt.regions))
        blind = replace(detections, regions=_of_one_class(detections.regions))
        matching = match(blind_gt, blind, overlaps(blind_gt, blind, iou_type), iou_threshold)
    counted = matching.counts & (detections.score >= tau)
    hit = matching.gt[counted]
    missed = ~gt.crowd
    missed[hit[hit >= 0]] = False
    counts = np.zeros((k + 1, k + 1))
    # A false alarm, of which matching.gt is -1, finds the background at the end.
    truth = np.append(gt.regions.category, k)[hit]
    np.add.at(counts, (truth, detections.regions.category[counted]), 1)
    np.add.at(counts, (gt.regions.category[missed], k), 1)
    counts[k, k] = np.nan
    names = [category["name"] for category in gt.categories]
    names.append("no lesion" if "background" in names else "background")
    return ConfusionMatrix(names, counts)


def _of_one_class(regions):
    return replace(regions, category=np.zeros_like(regions.category))
