"""Metrics as tables: Markdown, CSV and LaTeX."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from imrcnn_d2.evaluation import ClassificationResults, LesionResults
from imrcnn_d2.evaluation.detection.metrics import is_count
from imrcnn_d2.report.names import threshold_name
from imrcnn_d2.utils.files import csv_text, for_terminal, write_atomically

# What would be a link, an image, HTML, code or emphasis, or end a cell. Brackets around numbers,
# signs between them and underscores within names are none of these, and stay readable.
MARKDOWN = re.compile(
    r"""[\\`*|$@]                     # escapes, code, emphasis, cells, formulas, mail
    | \[(?=\^) | \](?=[(\[:]) | !(?=\[)  # links, images, notes
    | (?<![^\W_])_ | _(?![^\W_]) | ~(?=~)
    | (?<=\bhttp):(?=//) | (?<=\bhttps):(?=//) | (?<=\bftp):(?=//)  # links without a mark
    | (?<=\bwww)\.""",
    re.VERBOSE | re.IGNORECASE,
)
MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
# What begins a heading, a list, a quotation, a line, or a definition of a link.
BLOCK = re.compile(r"[#>+=\[-]|\d+(?=[.)](\s|$))")
# What LaTeX would take for a command, and what pdflatex does not know as a character.
LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    **{character: f"${character}$" for character in "<>|"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "≥": r"$\geq$", "≤": r"$\leq$", "τ": r"$\tau$", "†": r"\dag{}"},
    **{"−": "$-$", "–": "--"},
}


@dataclass(frozen=True, eq=False)
class Table:
    """A table for readers, and its numbers."""

    stem: str  # file name without suffix
    title: str
    cells: pd.DataFrame  # what readers see, all strings
    data: pd.DataFrame  # the same and more at full precision, for the CSV; NaN is undefined
    notes: tuple[str, ...] = ()  # sentences below the table
    text_columns: int = 1  # columns, from the left, that hold words and not numbers

    def markdown(self) -> str:
        """Title, table and notes."""
        notes = [f"- {markdown_text(note)}" for note in self.notes]
        table = markdown_table(self.cells, self.text_columns)
        title = f"**{markdown_text(self.title)}**"
        return "\n".join([title, "", table, *([""] if notes else []), *notes, ""])

    def latex(self) -> str:
        """A table environment for the packages booktabs and adjustbox."""
        layout = "l" * self.text_columns + "r" * (self.cells.shape[1] - self.text_columns)
        cells = self.cells.map(latex_text).rename(columns=latex_text)
        tabular = cells.to_latex(index=False, escape=False, column_format=layout)
        lines = [
            r"% \usepackage{booktabs,adjustbox}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_text(self.title)}}}",
            rf"\label{{tab:{self.stem}}}",
            r"\begin{adjustbox}{max width=\textwidth}",
            tabular.strip(),
            r"\end{adjustbox}",
        ]
        if self.notes:
            lines.append(r"\footnotesize\raggedright")
        lines += [rf"\par {latex_text(note)}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}", ""])


def write_table(table: Table, folder: str | Path) -> list[Path]:
    """Write a table as Markdown, CSV and LaTeX; returns the files."""
    texts = {
        ".md": table.markdown(),
        ".csv": csv_text(table.data.to_dict("records"), list(table.data)),
        ".tex": table.latex(),
    }
    paths = [Path(folder) / f"{table.stem}{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomically(path, text)
    return paths


def markdown_table(cells: pd.DataFrame, text_columns: int = 1) -> str:
    """A Markdown table of strings; ``text_columns``, from the left, are not flush right."""
    align = ["left"] * text_columns + ["right"] * (cells.shape[1] - text_columns)
    escaped = cells.map(markdown_text).rename(columns=markdown_text)
    return escaped.to_markdown(index=False, colalign=align, disable_numparse=True)


def metrics_table(
    groups: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> str:
    """A Markdown table with one column per group and one row for every metric that some group has,
    with its interval. Undefined metrics are given as n/a; cells of metrics that a group does not
    have are empty.
    """
    columns = {"": list(dict.fromkeys(name for metrics in groups.values() for name in metrics))}
    for group, metrics in groups.items():
        limits = (intervals or {}).get(group) or {}
        cells = {name: format_value(name, v, limits.get(name), 2) for name, v in metrics.items()}
        columns[group] = [cells.get(name, "") for name in columns[""]]
    return markdown_table(pd.DataFrame(columns))


def format_value(
    name: str,
    value: float,
    interval: tuple[float, float] | None = None,
    decimals: int = 1,
    *,
    sd: float | None = None,
) -> str:
    """A value as text, such as "87.7 ± 0.4 [83.0, 91.5]"; NaN is "n/a". Undefined intervals and
    deviations are left out, and the decimals of counts, known by ``name``, that are whole.
    """

    def text(number):
        # No minus before zero; elsewhere a real one, not a hyphen.
        return f"{round(number, decimals) + 0.0:.{decimals}f}".replace("-", "−")

    if math.isnan(value):
        return "n/a"
    varies = sd is not None and not math.isnan(sd)
    if is_count(name) and value == round(value) and not varies:
        return f"{value:.0f}"
    cell = text(value)
    if varies:
        cell += f" ± {text(sd)}"
    if interval is not None and not any(map(math.isnan, interval)):
        cell += f" [{', '.join(map(text, interval))}]"
    return cell


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def p_text(p: float) -> str:
    """A p-value as text."""
    if math.isnan(p):
        return "n/a"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def markdown_text(text: object) -> str:
    """Markdown that shows the text of data, such as the name of a class or a path: one line without
    a link, an image, HTML or any other markup, in a cell or anywhere else.
    """
    line = for_terminal(" ".join(str(text).split()))
    line = MARKUP.sub(lambda match: "&lt;" if match[0] == "<" else "&amp;", line)
    line = MARKDOWN.sub(lambda match: f"\\{match[0]}", line)
    if begins := BLOCK.match(line):
        number = begins[0].rstrip("#>+=[-")
        line = f"{number}\\{line[len(number) :]}"
    return line


def latex_text(text: object) -> str:
    """LaTeX that shows the text of data: one line without a command."""
    return " ".join(str(text).split()).translate(str.maketrans(LATEX))


# "group/metric" in the order of a table.
HEADLINE = {
    "image": (
        *("{kind}/AP", "{kind}/AP50", "lesion/precision", "lesion/recall", "lesion/f1"),
        *("lesion/iou", "lesion/dice", "lesion/fp_per_image", "image/recall"),
        *("image/specificity", "image/auroc", "image/mdice"),
    ),
    "lesion": ("lesion/recall", "lesion/iou", "lesion/iou_box", "lesion/iou_all", "lesion/dice"),
    "recognition": (
        *("recognition/top1", "recognition/balanced_accuracy", "recognition/f1"),
        *("recognition/auroc", "recognition/cross_entropy"),
        *("cancer/recall", "cancer/specificity", "cancer/auroc"),
    ),
}


def summary(results: LesionResults | ClassificationResults) -> str:
    """The size of a test set, the threshold, and a table of the headline metrics with their
    intervals: where the weights have a threshold, at that one.
    """
    lesions, kind = isinstance(results, LesionResults), results.meta.get("iou_type")
    groups, rows = results.compared(), []
    for endpoint in HEADLINE["image" if lesions else "recognition"]:
        endpoint = endpoint.format(kind=kind)
        at_point = f"tau_val.{endpoint}"
        stored = endpoint if value_of(groups, at_point) is None else at_point
        if (value := value_of(groups, stored)) is not None:
            interval = value_of(results.intervals, stored)
            text = format_value(endpoint, value, interval).partition(" ")
            rows.append([endpoint.replace("/", " "), text[0], text[2]])
    title = f"{results.meta['images']} images"
    if lesions:
        point = results.tau_val or {"tau": results.meta["tau"]}
        title += f", {threshold_name(point['tau'], results.detections.mapped)}"
        if results.tau_val:
            title += " (stored in the weights; chosen on {dataset} by {rule})".format(**point)
    columns, align = ("metric", "value", "95 % interval"), ("left", "right", "right")
    return f"{title}\n\n{tabulate(rows, columns, disable_numparse=True, colalign=align)}\n"


def groups_table(results: LesionResults | ClassificationResults, column: str) -> str:
    """A Markdown table of results that are grouped by ``column``: one column for all and one for
    each group, with its size and its headline metrics with their intervals.
    """
    endpoints = group_endpoints(results, column, HEADLINE)
    rows = list(group_rows(results, column))
    # Patients may be known of some groups only.
    sizes = list(dict.fromkeys(size for _, n, *_ in rows for size in n))
    table = {"": [*sizes, *(endpoint.replace("/", " ") for endpoint in endpoints)]}
    for name, n, metrics, intervals in rows:
        table[name] = [str(n.get(size, "")) for size in sizes]
        for endpoint in endpoints:
            value, interval = value_of(metrics, endpoint), value_of(intervals, endpoint)
            table[name].append(format_value(endpoint, value, interval, 2))
    return markdown_table(pd.DataFrame(table))


def group_rows(
    results: LesionResults | ClassificationResults, column: str
) -> Iterator[tuple[str, dict, dict, dict]]:
    """Yield name, {images, lesions, patients: how many}, metrics and intervals: "all" first."""
    names = ("images", "lesions", "patients")
    sizes = {name: results.meta[name] for name in names if results.meta.get(name) is not None}
    yield "all", sizes, results.compared(), results.intervals
    for name, group in results.by_group[column].groups.items():
        yield name, group.n, group.values, group.intervals


def group_endpoints(
    results: LesionResults | ClassificationResults, column: str, endpoints: Mapping[str, tuple]
) -> list[str]:
    """Those of ``endpoints``, as HEADLINE, that the groups of a column have."""
    if isinstance(results, ClassificationResults):
        groups = results.groups()
        return [e for e in endpoints["recognition"] if e.partition("/")[0] in groups]
    level, kind = results.by_group[column].level, results.meta["iou_type"]
    return [endpoint.format(kind=kind) for endpoint in endpoints[level]]


def value_of(groups: Mapping[str, Mapping], endpoint: str):
    """The value of "group/metric"; None where there is none."""
    group, _, name = endpoint.partition("/")
    return groups.get(group, {}).get(name)
