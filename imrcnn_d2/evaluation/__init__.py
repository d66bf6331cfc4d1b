"""What the numbers mean: matching, counts, curves and the evaluators."""

from .bootstrap import Bootstrap
from .lesion_evaluator import LesionEvaluator
from .lesions import LesionResults, evaluate_lesions
from .recognition import RecognitionResults, evaluate_recognition
from .recognition_evaluator import RecognitionEvaluator

__all__ = [
    "Bootstrap",
    "LesionEvaluator",
    "LesionResults",
    "RecognitionEvaluator",
    "RecognitionResults",
    "evaluate_lesions",
    "evaluate_recognition",
]
