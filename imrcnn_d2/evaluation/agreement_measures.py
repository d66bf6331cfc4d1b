"""What two annotators made of each image, and the figures of agreement made of it."""

from functools import cached_property

import numpy as np
from scipy.optimize import linear_sum_assignment

from .counting import add_up, number_units, union_overlaps
from .matching import overlaps
from .measures import Measures
from .metrics import divide
from .records import Detections

__all__ = [
    "COLUMNS",
    "FIGURES",
    "AgreementMeasures",
    "cohen_kappa",
    "compare_outlines",
    "fleiss_kappa",
    "pair_figures",
    "pair_name",
]

# Of a pair; in percent but for kappa, which lies in [-1, 1].
FIGURES = ("f1", "iou", "dice", "union_iou", "union_dice", "kappa", "same_call")
# What happened in an image between two, of which the figures are made.
COLUMNS = (
    "images",
    "matched",
    "only_a",
    "only_b",
    "iou",
    "dice",
    "either",
    "union_iou",
    "union_dice",
    "both",
    "image_only_a",
    "image_only_b",
    "neither",
)
BETWEEN, WITH_MODEL, DIFFERENCE, TOGETHER = "annotators", "model", "difference", "with_model"


def compare_outlines(a, b, iou_threshold):
    """
    Args:
        a, b (GroundTruth): of the same I images and classes, without crowds, with masks.
        iou_threshold (float): least overlap of two outlines of one lesion, in (0, 1].

    Returns:
        np.ndarray: (I, K) what happened in each image, by COLUMNS; overlaps in [0, 1].
    """
    number = len(a.images)
    other = Detections(b.regions, np.ones(len(b.regions)))
    pairs = overlaps(a, other, "segm")
    matched, iou, dice = np.zeros(number), np.zeros(number), np.zeros(number)
    image = a.regions.image[pairs.gt]
    enough = np.flatnonzero(pairs.iou >= min(iou_threshold, 1 - 1e-10))
    for position in np.unique(image[enough]):
        own = enough[image[enough] == position]
        rows, row = np.unique(pairs.gt[own], return_inverse=True)
        columns, column = np.unique(pairs.dt[own], return_inverse=True)
        gain = np.zeros((len(rows), len(columns)))
        most = min(gain.shape)  # a pair more is worth more than all overlaps together
        gain[row, column] = most + pairs.iou[own]
        values = gain[linear_sum_assignment(gain, maximize=True)]
        values = values[values > 0] - most
        matched[position] = len(values)
        iou[position] = values.sum()
        dice[position] = (2 * values / (1 + values)).sum()
    union = union_overlaps(a, other, np.ones(len(b.regions), dtype=bool))
    in_a, in_b = a.lesions > 0, b.lesions > 0
    columns = (
        np.ones(number),
        matched,
        a.lesions - matched,
        b.lesions - matched,
        iou,
        dice,
        in_a | in_b,
        union,
        2 * union / (1 + union),
        in_a & in_b,
        in_a & ~in_b,
        in_b & ~in_a,
        ~in_a & ~in_b,
    )
    return np.stack(columns, axis=1).astype(float)


class AgreementMeasures:
    """The figures as functions of how often each unit counts, as Measures is."""

    def __init__(self, pairs, called, model, images):
        """
        Args:
            pairs (dict[tuple[str, str], np.ndarray]): (I, K) of every two, see :class:`Agreement`.
            called (np.ndarray): (I, A) bool, whether each annotator saw a lesion in each image.
            model (str or None): the last of them is a model.
            images (list[dict]): the I records, whose patients are resampled where known.
        """
        self.unit, self.unit_of_image, self.num_units = number_units(images)
        self.width = self.num_units
        self._pairs, self._model = pairs, model
        self._raters = {BETWEEN: called[:, :-1] if model else called}
        if model:
            self._raters[TOGETHER] = called

    def __call__(self, weights, *, all_coco=False):
        """dict[str, dict[str, np.ndarray]]: group -> figure -> (B,), of (B, num_units) weights."""
        figures, among, with_model = {}, [], []
        for pair, columns in self.columns.items():
            own = pair_figures(dict(zip(COLUMNS, (weights @ columns).T, strict=True)))
            figures[pair_name(*pair)] = own
            (with_model if self._model in pair else among).append(own)
        for name, of in ((BETWEEN, among), (WITH_MODEL, with_model)):
            if of:
                figures[name] = {f: np.mean([own[f] for own in of], axis=0) for f in FIGURES}
        if among and with_model:
            figures[DIFFERENCE] = {f: figures[WITH_MODEL][f] - figures[BETWEEN][f] for f in FIGURES}
        for name, columns in self._fleiss.items():
            kappa = fleiss_kappa(*(weights @ columns).T, self._raters[name].shape[1])
            figures.setdefault(name, {})["fleiss_kappa"] = kappa
        return figures

    once = Measures.once

    def proportions(self):
        """As of Measures, of the pairs."""
        shares = {}
        for pair, columns in self.columns.items():
            sums = dict(zip(COLUMNS, columns.sum(axis=0), strict=True))
            lesions = sums["matched"] + sums["only_a"] + sums["only_b"]
            same = sums["both"] + sums["neither"]
            shares[pair_name(*pair)] = {
                "f1": (sums["matched"], lesions),
                "same_call": (same, sums["images"]),
            }
        return shares

    @cached_property
    def columns(self):
        """dict[tuple[str, str], np.ndarray]: (num_units, K) sums over the images of each unit."""
        return {
            pair: add_up(own, self.unit_of_image, self.num_units)
            for pair, own in self._pairs.items()
        }

    @cached_property
    def _fleiss(self):
        """{group: (num_units, 3)}: images, raters that saw a lesion, agreeing pairs of raters."""
        columns = {}
        for name, called in self._raters.items():
            raters, saw = called.shape[1], called.sum(axis=1)
            if raters > 2:
                agreeing = (saw * (saw - 1) + (raters - saw) * (raters - saw - 1)) / 2
                own = np.stack([np.ones(len(saw)), saw, agreeing], axis=1)
                columns[name] = add_up(own, self.unit_of_image, self.num_units)
        return columns


def pair_name(a, b):
    """str: what the figures of two annotators go by."""
    return f"{a} vs {b}"


def pair_figures(sums):
    """
    Args:
        sums (dict[str, np.ndarray]): (...,) sums over images, by COLUMNS.

    Returns:
        dict[str, np.ndarray]: (...,) by FIGURES; NaN where undefined.
    """
    lesions = 2 * sums["matched"] + sums["only_a"] + sums["only_b"]
    table = [sums[name] for name in ("both", "image_only_a", "image_only_b", "neither")]
    return {
        "f1": 100 * divide(2 * sums["matched"], lesions),
        "iou": 100 * divide(sums["iou"], sums["matched"]),
        "dice": 100 * divide(sums["dice"], sums["matched"]),
        "union_iou": 100 * divide(sums["union_iou"], sums["either"]),
        "union_dice": 100 * divide(sums["union_dice"], sums["either"]),
        "kappa": cohen_kappa(*table),
        "same_call": 100 * divide(table[0] + table[3], sums["images"]),
    }


def cohen_kappa(both, only_a, only_b, neither):
    """
    Cohen's kappa of two raters who said yes or no (Cohen 1960), also in many resamples at once.

    Args:
        both, only_a, only_b, neither (np.ndarray): (...,) cases that both, one or none affirmed.

    Returns:
        np.ndarray: (...,) in [-1, 1]; NaN where both gave all cases the same one answer.
    """
    cases = both + only_a + only_b + neither
    yes_a, yes_b = divide(both + only_a, cases), divide(both + only_b, cases)
    by_chance = yes_a * yes_b + (1 - yes_a) * (1 - yes_b)
    return divide(divide(both + neither, cases) - by_chance, 1 - by_chance)


def fleiss_kappa(cases, yes, agreeing, raters):
    """
    Fleiss' kappa of three or more raters who said yes or no (Fleiss 1971).

    Args:
        cases (np.ndarray): (...,) how many.
        yes (np.ndarray): (...,) answers that were yes, over all cases and raters.
        agreeing (np.ndarray): (...,) pairs of raters that gave the same answer, over all cases.
        raters (int): of every case.

    Returns:
        np.ndarray: (...,) at most 1; NaN where all answers are the same.
    """
    observed = divide(agreeing, cases * raters * (raters - 1) / 2)
    share = divide(yes, cases * raters)
    by_chance = share**2 + (1 - share) ** 2
    return divide(observed - by_chance, 1 - by_chance)
