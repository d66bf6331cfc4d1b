"""Comparison of models: which runs belong together, how they differ, and the files about it."""

from imrcnn_d2.report.comparison.findings import family_text
from imrcnn_d2.report.comparison.models import Comparison, compare, gather
from imrcnn_d2.report.comparison.pages import write_comparison

__all__ = ["Comparison", "compare", "family_text", "gather", "write_comparison"]
