"""What the numbers mean: matching, counts, curves and the evaluators."""

from .lesions import LesionResults, evaluate_lesions

__all__ = ["LesionResults", "evaluate_lesions"]
