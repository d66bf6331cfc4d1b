"""Evaluations as tables, plots and pages. ``runs`` reads an evaluation, ``comparison`` compares
several, ``html`` writes the report as one page, ``plots`` draws, and ``model_card``, ``audit``,
``agreement`` and ``label_errors`` write the files of their commands.
"""

from imrcnn_d2.report.runs import Run, load_run

__all__ = ["Run", "load_run"]
