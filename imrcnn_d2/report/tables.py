"""Metrics as tables: Markdown, CSV and LaTeX."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from imrcnn_d2.evaluation import ClassificationResults, LesionResults
from imrcnn_d2.evaluation.detection.metrics import FEW_CASES, is_count, without_masks
from imrcnn_d2.evaluation.subgroups import Group
from imrcnn_d2.report.names import metric_name, threshold_name
from imrcnn_d2.utils.files import csv_text, for_terminal, write_texts

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
        f"{table.stem}.md": table.markdown(),
        f"{table.stem}.csv": csv_text(table.data.to_dict("records"), list(table.data)),
        f"{table.stem}.tex": table.latex(),
    }
    return write_texts(folder, texts)


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


FEW_MARK = "†"
FEW_NOTE = f"{FEW_MARK} Fewer than {FEW_CASES} cases: too few to say anything."


def cases_text(cases: tuple[int, str] | None) -> str:
    """The number of cases that `Group.cases` gives, such as "n 320", marked where they are few; ""
    where they are not known."""
    if cases is None:
        return ""
    return f"n {cases[0]:,}{FEW_MARK if cases[0] < FEW_CASES else ''}"


def group_text(group: Group, endpoint: str, decimals: int | None = None) -> str:
    """A metric of a group, such as "87.7 [83.0, 91.5] (n 320)"; with as many decimals as
    `decimals_of` says, if none are given."""
    value, interval = value_of(group.values, endpoint), value_of(group.intervals, endpoint)
    metric = endpoint.partition("/")[2]
    text = format_value(metric, value, interval, decimals or decimals_of(metric))
    cases = cases_text(group.cases(endpoint))
    return f"{text} ({cases})" if cases else text


def decimals_of(metric: str) -> int:
    """Decimals of a metric for readers: numbers per image are small."""
    return 2 if metric.startswith("fp_per_") else 1


def few_notes(groups: Mapping[str, Group], endpoints: Iterable[str]) -> list[str]:
    """What a table of these metrics of groups says below it where one is of few cases."""
    pairs = product(groups.values(), endpoints)
    return [FEW_NOTE] if any(group.is_few(endpoint) for group, endpoint in pairs) else []


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
    line = " ".join(str(text).split()).translate(str.maketrans(LATEX))
    # At the start of a row they would be an argument of the end of the one before.
    return f"{{}}{line}" if line[:1] in ("[", "*") else line


# "group/metric" in the order of a table.
HEADLINE = {
    "image": (
        *("{kind}/AP", "{kind}/AP50", "lesion/precision", "lesion/recall", "lesion/f1"),
        *("lesion/iou", "lesion/dice", "lesion/fp_per_image", "image/recall"),
        *("image/specificity", "image/auroc", "image/mdice"),
    ),
    "procedure": (
        *("video/lesion_sensitivity", "video/persistence", "video/seconds_to_detection"),
        *("video/frame_sensitivity", "video/fpr", "video/false_alarms_per_minute"),
    ),
    "unique_lesion": (
        *("video/lesion_sensitivity", "video/persistence", "video/persistent_50"),
        *("video/frames_to_detection", "video/seconds_to_detection"),
    ),
    "lesion": ("lesion/recall", "lesion/iou", "lesion/iou_box", "lesion/iou_all", "lesion/dice"),
    "recognition": (
        *("recognition/top1", "recognition/balanced_accuracy", "recognition/f1"),
        *("recognition/auroc", "recognition/cross_entropy"),
        *("cancer/recall", "cancer/specificity", "cancer/auroc"),
    ),
}


# "group/metric" of a table by centre -> heading.
CENTRE_METRICS = {
    "lesion/recall": "sensitivity, %",
    "lesion/precision": "precision, %",
    "lesion/f1": "F1, %",
    "lesion/fp_per_image": "false alarms per image",
    "image/specificity": "specificity, %",
    "{kind}/AP50": "AP50, %",
    "image/miou": "mIoU, %",
    "lesion/dice": "Dice, %",
    "lesion/hd95": "HD95, pixels",
    "calibration/ece": "ECE, %",
}


def centre_metrics(groups: Mapping[str, Group]) -> dict[str, str]:
    """Those of CENTRE_METRICS that some of the groups defines, with their headings, at the
    threshold that is stored in the weights where there is one."""
    first, metrics = next(iter(groups.values())), {}
    kind = first.results.meta["iou_type"] if first.results else ""
    for endpoint, heading in CENTRE_METRICS.items():
        endpoint = at_stored_threshold(first.values, endpoint.format(kind=kind))
        values = [value_of(group.values, endpoint) for group in groups.values()]
        if None not in values and not all(map(math.isnan, values)):
            metrics[endpoint] = heading
    return metrics


def summary(results: LesionResults | ClassificationResults) -> str:
    """The size of a test set, the threshold, and a table of the headline metrics with their
    intervals: where the weights have a threshold, at that one.
    """
    lesions, kind = isinstance(results, LesionResults), results.meta.get("iou_type")
    groups, rows = results.compared(), []
    endpoints = [e.format(kind=kind) for e in HEADLINE["image" if lesions else "recognition"]]
    if lesions and not results.has_masks:
        endpoints = without_masks(endpoints)
    for endpoint in endpoints:
        stored = at_stored_threshold(groups, endpoint)
        if (value := value_of(groups, stored)) is not None:
            interval = value_of(results.intervals, stored)
            text = format_value(endpoint, value, interval).partition(" ")
            rows.append([endpoint.replace("/", " "), text[0], text[2]])
    title = f"{results.meta['images']} images"
    if lesions:
        point, detections = results.tau_val or results.meta, results.detections
        title += f", {threshold_name(point['tau'], detections.mapped, detections.scored)}"
        if results.tau_val:
            title += " (tau_val: stored in the weights; chosen on {dataset} by {rule})".format(
                **point
            )
            fixed = threshold_name(results.meta["tau"], detections.mapped)
            title += f"; the values on top of a report are at {fixed} (TEST.SCORE_THRESH)"
    columns, align = ("metric", "value", "95 % interval"), ("left", "right", "right")
    return f"{title}\n\n{tabulate(rows, columns, disable_numparse=True, colalign=align)}\n"


def groups_table(results: LesionResults | ClassificationResults, column: str) -> str:
    """A Markdown table of results that are grouped by ``column``: one column for all and one for
    each group, with its size and its headline metrics with their intervals.
    """
    endpoints = group_endpoints(results, column, HEADLINE)
    groups = groups_and_all(results, column)
    # Patients may be known of some groups only.
    sizes = list(dict.fromkeys(size for group in groups.values() for size in group.n))
    table = {"": [*sizes, *(endpoint.replace("/", " ") for endpoint in endpoints)]}
    for name, group in groups.items():
        table[name] = [str(group.n.get(size, "")) for size in sizes]
        table[name] += [group_text(group, endpoint, 2) for endpoint in endpoints]
    return "\n\n".join([markdown_table(pd.DataFrame(table)), *few_notes(groups, endpoints)])


def groups_and_all(results: LesionResults | ClassificationResults, column: str) -> dict[str, Group]:
    """The groups of a column by name, "all" before them."""
    names = ("procedures", "images", "lesions", "patients")
    sizes = {name: results.meta[name] for name in names if results.meta.get(name) is not None}
    values = {**results.compared(), "calibration": results.calibration}
    every = Group(sizes, values, results.intervals, results.undefined_shares, results=results)
    return {"all": every, **results.by_group[column].groups}


def group_endpoints(
    results: LesionResults | ClassificationResults, column: str, endpoints: Mapping[str, tuple]
) -> list[str]:
    """Those of ``endpoints``, as HEADLINE, that the groups of a column have, at the threshold that
    is stored in the weights where there is one."""
    if isinstance(results, ClassificationResults):
        groups = results.groups()
        return [e for e in endpoints["recognition"] if e.partition("/")[0] in groups]
    level, kind = results.by_group[column].level, results.meta["iou_type"]
    endpoints = [endpoint.format(kind=kind) for endpoint in endpoints[level]]
    if not results.has_masks:
        endpoints = without_masks(endpoints)
    return [at_stored_threshold(results.compared(), endpoint) for endpoint in endpoints]


def at_stored_threshold(groups: Mapping[str, Mapping], endpoint: str) -> str:
    """The endpoint at the threshold that is stored in the weights, where the groups have one."""
    stored = f"tau_val.{endpoint}"
    return endpoint if value_of(groups, stored) is None else stored


def value_of(groups: Mapping[str, Mapping], endpoint: str):
    """The value of "group/metric"; None where there is none."""
    group, _, name = endpoint.partition("/")
    return groups.get(group, {}).get(name)


def video_differences_table(rows: list[tuple]) -> Table:
    """Two models on the same procedures, see
    :func:`~imrcnn_d2.evaluation.video.compare_videos`."""
    cells, data = [], []
    for group, name, first, second, difference, p_holm in rows:
        interval = difference.low, difference.high
        cells.append(
            {
                "metric": metric_name(f"{group}/{name}"),
                "first": format_value(name, first, None, 2),
                "second": format_value(name, second, None, 2),
                "difference": format_value(name, difference.estimate, interval, 2),
                "p": p_text(difference.p),
                "p (Holm)": p_text(p_holm),
            }
        )
        estimate = {"difference": difference.estimate, "low": difference.low}
        estimate |= {"high": difference.high, "p": difference.p, "p_holm": p_holm}
        data.append({"metric": f"{group}/{name}", "first": first, "second": second, **estimate})
    note = (
        "First minus second, with 95 % intervals, paired over procedures (or patients). It is of "
        "these two checkpoints, not of these two methods."
    )
    frames = (pd.DataFrame(table) for table in (cells, data))
    return Table("comparison", "Difference of the two models", *frames, (note,))
