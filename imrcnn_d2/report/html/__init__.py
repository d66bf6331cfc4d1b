"""The report as one HTML page: its sections, tables and the gallery of test images."""

from imrcnn_d2.report.html.page import render_report

__all__ = ["render_report"]
