"""What the numbers mean: matching, counts, curves and the evaluators."""

from .bootstrap import Bootstrap
from .lesion_evaluator import LesionEvaluator
from .lesions import LesionResults, evaluate_lesions

__all__ = ["Bootstrap", "LesionEvaluator", "LesionResults", "evaluate_lesions"]
