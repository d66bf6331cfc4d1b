"""Figures as tables: Markdown, CSV and LaTeX."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from imrcnn_d2.evaluation.detection.metrics import is_count
from imrcnn_d2.utils.files import csv_text, for_terminal, write_atomically

__all__ = [
    "Table",
    "metrics_table",
    "format_value",
    "latex_text",
    "markdown_table",
    "markdown_text",
    "write_table",
]


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
    "\\": r"\textbackslash{}",
    **{character: rf"\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "τ": r"$\tau$",
    "†": r"\dag{}",
    "−": "$-$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}


@dataclass(frozen=True, eq=False)
class Table:
    """
    Attributes:
        stem (str): file name without suffix.
        title (str): one line.
        cells (pd.DataFrame): what readers see, all strings.
        data (pd.DataFrame): the same and more at full precision, for the CSV; NaN is undefined.
        notes (tuple[str, ...]): sentences below the table.
        text_columns (int): how many columns, from the left, hold words and not figures.
    """

    stem: str
    title: str
    cells: pd.DataFrame
    data: pd.DataFrame
    notes: tuple = ()
    text_columns: int = 1

    def markdown(self):
        """
        Returns:
            str: title, table and notes.
        """
        notes = [f"- {markdown_text(note)}" for note in self.notes]
        table = markdown_table(self.cells, self.text_columns)
        title = f"**{markdown_text(self.title)}**"
        return "\n".join([title, "", table, *([""] if notes else []), *notes, ""])

    def latex(self):
        """
        Returns:
            str: a table environment for the packages booktabs and adjustbox.
        """
        columns = self.cells.shape[1]
        layout = "l" * self.text_columns + "r" * (columns - self.text_columns)
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


def write_table(table, folder):
    """
    Write a table as Markdown, CSV and LaTeX.

    Args:
        table (Table):
        folder (str or Path):

    Returns:
        list[Path]: the files.
    """
    texts = {
        ".md": table.markdown(),
        ".csv": csv_text(table.data.to_dict("records"), list(table.data)),
        ".tex": table.latex(),
    }
    paths = [Path(folder) / f"{table.stem}{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomically(path, text)
    return paths


def markdown_table(cells, text_columns=1):
    """
    Args:
        cells (pd.DataFrame): strings.
        text_columns (int): how many columns, from the left, are not flush right.

    Returns:
        str: a Markdown table.
    """
    align = ["left"] * text_columns + ["right"] * (cells.shape[1] - text_columns)
    escaped = cells.map(markdown_text).rename(columns=markdown_text)
    return escaped.to_markdown(index=False, colalign=align, disable_numparse=True)


def metrics_table(groups, intervals=None):
    """
    Args:
        groups (dict[str, dict[str, float]]): columns, each with its figures by name.
        intervals (dict[str, dict[str, tuple[float, float]]] or None): beside the figures.

    Returns:
        str: a Markdown table with a row for every figure that some group has. Undefined figures
        are given as n/a; cells of figures that a group does not have are empty.
    """
    names = list(dict.fromkeys(name for figures in groups.values() for name in figures))
    columns = {"": names}
    for group, figures in groups.items():
        of_group = (intervals or {}).get(group, {})
        columns[group] = [
            format_value(name, figures[name], of_group.get(name), decimals=2)
            if name in figures
            else ""
            for name in names
        ]
    return markdown_table(pd.DataFrame(columns))


def format_value(name, value, interval=None, *, sd=None, decimals=1):
    """
    Args:
        name (str): of the figure; counts are given without decimals where they are whole.
        value (float): NaN is undefined.
        interval (tuple[float, float] or None): left out where it is undefined.
        sd (float or None): left out where it is undefined.
        decimals (int):

    Returns:
        str: such as "87.7 ± 0.4 [83.0, 91.5]".
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


def markdown_text(text):
    """
    Args:
        text (str): of data, such as the name of a class or a path.

    Returns:
        str: Markdown that shows it: one line without a link, an image, HTML or any other markup of
        its own, in a cell or anywhere else.
    """
    line = for_terminal(" ".join(str(text).split()))
    line = MARKUP.sub(lambda found: "&lt;" if found[0] == "<" else "&amp;", line)
    line = MARKDOWN.sub(lambda found: f"\\{found[0]}", line)
    if begins := BLOCK.match(line):
        number = begins[0].rstrip("#>+=[-")
        line = f"{number}\\{line[len(number) :]}"
    return line


def latex_text(text):
    """
    Args:
        text (str): of data.

    Returns:
        str: LaTeX that shows it: one line without a command of its own.
    """
    return " ".join(str(text).split()).translate(str.maketrans(LATEX))
