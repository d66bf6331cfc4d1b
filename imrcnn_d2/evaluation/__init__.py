"""What the numbers mean: matching, counts, curves and the evaluators."""

from .lesion_evaluator import LesionEvaluator
from .lesions import LesionResults, evaluate_lesions

__all__ = ["LesionEvaluator", "LesionResults", "evaluate_lesions"]
