"""Figures as text."""

import math

__all__ = ["figures_table"]

COUNTS = ("TP", "FP", "FN", "TN")


def figures_table(groups):
    """
    Args:
        groups (dict[str, dict[str, float]]): columns, each with its figures by name.

    Returns:
        str: a Markdown table with a row for every figure that some group has. Undefined figures
        are given as n/a; cells of figures that a group does not have are empty.
    """
    names = list(dict.fromkeys(name for figures in groups.values() for name in figures))
    rows = [["", *groups], None]
    rows += [[name, *(_cell(name, figures) for figures in groups.values())] for name in names]
    widths = [max(len(row[i]) for row in rows if row) for i in range(len(groups) + 1)]
    lines = []
    for row in rows:
        if row is None:
            cells = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        else:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name, figures):
    if name not in figures:
        return ""
    if math.isnan(figures[name]):
        return "n/a"
    return f"{figures[name]:.0f}" if name in COUNTS else f"{figures[name]:.2f}"
