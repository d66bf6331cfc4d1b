"""Figures of image classification as functions of how often each unit counts, as Measures is."""

from functools import cached_property

import numpy as np

from .calibration import Calibration
from .counting import add_up, number_units
from .measures import Measures, mean_where
from .metrics import COUNTS, divide, ratios, table_proportions
from .ranking import weighted_auroc

__all__ = ["RecognitionMeasures"]

# Of the true class; keeps the cross-entropy of a probability of 0 finite, as scikit-learn does.
LEAST = np.finfo(np.float64).eps
OF_CLASS = ("precision", "recall", "specificity", "f1")


class RecognitionMeasures:
    """
    Confusions are counted per unit (patients where all images have one, else images), so that
    figures are formulas over sums of columns, the AUROCs aside.
    """

    def __init__(self, truth, probability):
        """
        Args:
            truth (LabelledImages): of N images and K classes.
            probability (np.ndarray): (N, K) float.
        """
        self.truth, self.probability = truth, probability
        self.called = probability.argmax(axis=1)
        self.unit, self.unit_of_image, self.num_units = number_units(truth.images)
        own = probability[np.arange(len(probability)), truth.label]
        self._cross_entropy = -np.log(np.clip(own, LEAST, 1))
        self.calibration = Calibration(
            np.clip(probability.max(axis=1), 0, 1),
            self.called == truth.label,
            np.arange(len(probability)),
            len(probability),
        )

    def __call__(self, weights, *, all_coco=False):
        """
        Args:
            weights (np.ndarray): (B, num_units) int, how often each of B resamples holds each unit.
            all_coco (bool): of lesions; here it changes nothing.

        Returns:
            dict[str, dict[str, np.ndarray]]: group -> figure -> (B,), as in RecognitionResults.
        """
        figures = {
            group: formulas(weights @ columns)
            for group, (columns, formulas, _) in self.columns.items()
        }
        of_class = {}
        for k, name in enumerate(self.truth.classes):
            area = self._auroc(self.truth.label == k, self.probability[:, k], weights)
            of_class[name] = figures["recognition"][f"auroc_{name}"] = area
        areas = list(of_class.values())
        figures["recognition"]["auroc"] = mean_where(areas, map(np.isfinite, areas), len(weights))
        if self.truth.cancer is not None:
            cancer = self.truth.cancer
            score = self.probability[:, cancer].sum(axis=1)
            area = self._auroc(cancer[self.truth.label], score, weights)
            figures["cancer"]["auroc"] = area
        figures["calibration"] = self.calibration.formulas(weights @ self._calibration)
        return figures

    once = Measures.once
    named = staticmethod(lambda sums: sums)  # what the formulas take

    def proportions(self):
        """As of Measures."""
        return {
            group: proportions(columns.sum(axis=0))
            for group, (columns, _, proportions) in self.columns.items()
        }

    @property
    def width(self):
        """int: numbers that a resample takes, to size chunks by."""
        return max(self.num_units, len(self.called) * (len(self.truth.classes) + 1))

    @cached_property
    def columns(self):
        """As of Measures: "recognition" and, with cancer classes, "cancer"."""
        k = len(self.truth.classes)
        columns = np.zeros((len(self.called), k * k + 1))
        columns[np.arange(len(self.called)), self.truth.label * k + self.called] = 1
        columns[:, -1] = self._cross_entropy
        columns = add_up(columns, self.unit_of_image, self.num_units)
        groups = {"recognition": (columns, self._recognition, self._proportions)}
        if self.truth.cancer is not None:
            groups["cancer"] = (columns, self._cancer, self._cancer_proportions)
        return groups

    def confusion(self, sums):
        """
        Args:
            sums (np.ndarray): (..., K * K + 1) sums of the columns.

        Returns:
            np.ndarray: (..., K, K) images, rows by truth, columns by what they are called.
        """
        k = len(self.truth.classes)
        return sums[..., :-1].reshape(*sums.shape[:-1], k, k)

    def _tables(self, sums):
        """{class: (TP, FP, FN, TN)}, each (...,)."""
        confusion = self.confusion(sums)
        total = confusion.sum(axis=(-2, -1))
        tables = {}
        for k, name in enumerate(self.truth.classes):
            tp = confusion[..., k, k][()]
            fp, fn = confusion[..., k].sum(axis=-1) - tp, confusion[..., k, :].sum(axis=-1) - tp
            tables[name] = (tp, fp, fn, total - tp - fp - fn)
        return tables

    def _recognition(self, sums):
        """Of (B, K * K + 1) sums."""
        tables = self._tables(sums)
        by_class = {name: ratios(*table) for name, table in tables.items()}
        present = [tp + fn > 0 for tp, _, fn, _ in tables.values()]
        total = sum(tables[self.truth.classes[0]])
        right = sum(tp for tp, *_ in tables.values())

        def mean(figure):
            values = [own[figure] for own in by_class.values()]
            return mean_where(values, present, len(total))

        figures = {
            "top1": 100 * divide(right, total),
            "balanced_accuracy": mean("recall"),
            "f1": mean("f1"),
            "cross_entropy": divide(sums[..., -1], total),
        }
        for name, own in by_class.items():
            figures[f"accuracy_{name}"] = own["recall"]
            figures.update({f"{figure}_{name}": own[figure] for figure in OF_CLASS})
        return figures

    def _proportions(self, sums):
        tables = self._tables(sums)
        total = sum(tables[self.truth.classes[0]])
        shares = {"top1": (sum(tp for tp, *_ in tables.values()), total)}
        for name, table in tables.items():
            own = table_proportions(*table)
            shares[f"accuracy_{name}"] = own["recall"]
            shares.update({f"{figure}_{name}": own[figure] for figure in OF_CLASS})
        return shares

    def _cancer_table(self, sums):
        """TP, FP, FN and TN of cancer against all else, each (...,)."""
        confusion, cancer = self.confusion(sums), self.truth.cancer
        return tuple(
            confusion[..., rows, :][..., columns].sum(axis=(-2, -1))
            for rows, columns in (
                (cancer, cancer),
                (~cancer, cancer),
                (cancer, ~cancer),
                (~cancer, ~cancer),
            )
        )

    def _cancer(self, sums):
        table = self._cancer_table(sums)
        return {**dict(zip(COUNTS, table, strict=True)), **ratios(*table)}

    def _cancer_proportions(self, sums):
        return table_proportions(*self._cancer_table(sums))

    def _auroc(self, positive, score, weights):
        return 100 * weighted_auroc(positive, score, self.unit_of_image, weights)

    @cached_property
    def _calibration(self):
        return add_up(self.calibration.columns(), self.unit_of_image, self.num_units)
