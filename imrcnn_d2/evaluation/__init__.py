"""What the numbers mean: matching, counts, curves and the evaluators."""

from imrcnn_d2.evaluation.classification import ClassificationResults, evaluate_classification
from imrcnn_d2.evaluation.detection.results import LesionResults, evaluate_lesions
from imrcnn_d2.evaluation.evaluators import ClassificationEvaluator, LesionEvaluator
from imrcnn_d2.evaluation.statistics import Bootstrap

__all__ = [
    "Bootstrap",
    "LesionEvaluator",
    "LesionResults",
    "ClassificationEvaluator",
    "ClassificationResults",
    "evaluate_lesions",
    "evaluate_classification",
]
