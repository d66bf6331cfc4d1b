#!/usr/bin/env python
"""Make docs/results.md, its tables and its plots from the runs of the Makefile in this folder.

    python examples/kvasir_seg_study/results.py output/study datasets

The text is in results.md.j2; every value in a table or a plot comes from a run's files. A
section whose runs are not all there, or not finished, stays on the page as it is, and is named.
Tests of runs that are gone are made of what recorded.json still has of them.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

import jinja2
import pandas as pd
from leakage import kvasir, recorded_value, synthetic

from imrcnn_d2.evaluation.comparison import difference_from_parts, holm
from imrcnn_d2.evaluation.detection.metrics import is_count, is_percent
from imrcnn_d2.evaluation.robustness import ROBUSTNESS
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.report.comparison import compare, gather
from imrcnn_d2.report.comparison.models import Test
from imrcnn_d2.report.comparison.pages import (
    median_runs,
    table_3,
    table_4,
    table_5,
    table_of_tests,
)
from imrcnn_d2.report.plots import plot_pr_panels, plot_robustness
from imrcnn_d2.report.runs import load_run
from imrcnn_d2.report.tables import format_value, markdown_table
from imrcnn_d2.utils.files import write_atomically

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
# Tests that the page always shows, next to those with an adjusted p below 0.05.
JUDGED = ("segm/AP50_voc", "lesion/iou", "tau_val.lesion/f1", "image/miou")


class Study:
    """What the page's template uses. Runs are named by patterns of paths within their folder."""

    def __init__(self, folder, data, plots):
        self._folder, self._data, self._plots = folder, data, plots
        self._recorded = json.loads((HERE / "recorded.json").read_text(encoding="utf-8"))
        self._compared = {}

    def paths(self, *patterns):
        """The folders of runs, in order.

        Raises:
            FileNotFoundError: a pattern has none, or one that has not finished.
        """
        paths = []
        for pattern in patterns:
            matches = sorted(self._folder.glob(pattern))
            unfinished = [str(path) for path in matches if not _is_finished(path)]
            if unfinished or not matches:
                raise FileNotFoundError(", ".join(unfinished) or str(self._folder / pattern))
            paths += matches
        return paths

    def comparison(self, *patterns):
        """The Comparison of the models of these runs."""
        paths = tuple(self.paths(*patterns))
        if paths not in self._compared:
            self._compared[paths] = compare(gather(list(map(load_run, paths))), Bootstrap())
        return self._compared[paths]

    def table(self, compared, number):
        """The paper's table 3, 4 or 5."""
        return {3: table_3, 4: table_4, 5: table_5}[number](compared).markdown()

    def tests(self, title, *patterns):
        """A table of tests between the models of these runs; without them, of recorded.json."""
        try:
            compared = self.comparison(*patterns)
        except FileNotFoundError:
            if title not in self._recorded:
                raise
            tests, notes = recorded_tests(**self._recorded[title]), [RECORDED]
        else:
            tests, notes = compared.fold_tests or compared.tests, []
            tests = [test for test in tests if test.endpoint in JUDGED or test.p_holm < 0.05]
        return table_of_tests(tests, "tests", title, *notes).markdown()

    def pr_curves(self, compared, stem):
        """Plot the curves of each model's masks, for its median seed."""
        shown = median_runs(compared, lambda run: run.results.segm["AP50_voc"])
        curves = {
            label: next(curve for kind, _, curve in run.results.curves if kind == "segm")
            for label, run in shown.items()
        }
        panels = {"Masks, precision and recall at IoU 0.5": curves}
        path = self._plots / f"{stem}.png"
        plot_pr_panels(panels, path, tau=compared.settings["tau"])
        return _link(path, "Precision-recall curves")

    def metrics(self, rows, columns):
        """A table of single runs: label -> path of the run, heading -> group/key of metrics.json.

        "tau_val." before the group is the operating point that was chosen on validation images.
        """
        cells = []
        for label, path in rows.items():
            metrics = load_run(*self.paths(path)).recorded
            texts = {heading: _text(metrics, name) for heading, name in columns.items()}
            cells.append({"": label, **texts})
        return markdown_table(pd.DataFrame(cells))

    def means(self, rows, columns, dataset=None):
        """Likewise, the mean over the runs of a pattern, and their smallest and largest.

        `dataset` is the data set they were evaluated on, if not their test images.
        """
        cells = []
        for label, pattern in rows.items():
            every = [load_run(path, dataset=dataset).recorded for path in self.paths(pattern)]
            texts = {}
            for heading, name in columns.items():
                values = [recorded_value(metrics, name)[0] for metrics in every]
                key = name.rpartition("/")[2]
                mean, low, high = (
                    format_value(key, value, decimals=1 if is_percent(key) or is_count(key) else 2)
                    for value in (statistics.mean(values), min(values), max(values))
                )
                texts[heading] = f"{mean} ({low}–{high})"
            cells.append({"": label, "runs": str(len(every)), **texts})
        return markdown_table(pd.DataFrame(cells))

    def leakage(self):
        """Two tables, of synthetic patients and of near-identical images."""
        self.paths("leakage/*", "groups/imrcnn", "main/imrcnn_seed0")
        tables = synthetic(self._folder), kvasir(self._folder, self._data)
        return "\n\n".join(markdown_table(pd.DataFrame(rows)) for rows in tables)

    def robustness(self, rows, stem):
        """Curves of the evaluations that robustness.py wrote: label -> folder."""
        documents = {
            label: json.loads((folder / ROBUSTNESS).read_text(encoding="utf-8"))
            for label, path in rows.items()
            for folder in self.paths(path)
        }
        path = self._plots / f"{stem}.png"
        plot_robustness(documents, path)
        return _link(path, "Metrics under distortions")

    def runs(self, *patterns):
        """A table of runs: the config's hash, the revision and the hours."""
        cells = []
        for path in self.paths(*patterns):
            record = _record(path)
            cells.append(
                {
                    "run": path.relative_to(self._folder).as_posix(),
                    "config": record["config_sha256"][:12],
                    "revision": record["git"]["revision"][:7],
                    "iterations": f"{record['iterations']:,}",
                    "hours": f"{record['hours']:.2f}",
                }
            )
        return markdown_table(pd.DataFrame(cells), 3)


RECORDED = (
    "The runs are gone: these tests are made of the rounded values of recorded.json. The standard "
    "error over images is the width of the bootstrap interval of the difference / (2 · 1.96); that "
    "over trainings comes from the three values of each model, or their population standard "
    "deviation. Tests that are not shown count in Holm's method as if their p were 1."
)


def recorded_tests(
    images: int, runs: int, tests: int, values: dict, population_sd: dict, differences: list
) -> list[Test]:
    """Tests of models of which each was trained ``runs`` times.

    Args:
        images: in the test set.
        tests: how many there were; those that are not recorded are taken to have a p of 1.
        values: model -> "group/metric" -> the value of each run.
        population_sd: the same, the standard deviation over the runs, where the values are gone.
        differences: first and second model, "group/metric", the difference and its 95 % interval
            of resampled images.
    """

    def seed_sd(model, endpoint):
        if endpoint in values[model]:
            return statistics.stdev(values[model][endpoint])
        return population_sd[model][endpoint] * math.sqrt(runs / (runs - 1))

    made = []
    for first, second, endpoint, estimate, low, high in differences:
        sds = seed_sd(first, endpoint), seed_sd(second, endpoint)
        se_images = (high - low) / (2 * 1.96)
        made.append(difference_from_parts(estimate, se_images, images, sds, (runs, runs)))
    adjusted = holm([difference.p for difference in made] + [1.0] * (tests - len(made)))
    return [
        Test(
            **vars(difference),
            first=first,
            second=second,
            endpoint=endpoint,
            test="paired t (images, seeds)",
            p_holm=float(p_holm),
        )
        for (first, second, endpoint, *_), difference, p_holm in zip(
            differences, made, adjusted, strict=False
        )
    ]


def _is_finished(path):
    if (path / "run.json").is_file():
        return bool(_record(path)["finished"])
    return (path / "done").is_file()  # of the Makefile, for an evaluation alone


def _record(path):
    return json.loads((path / "run.json").read_text(encoding="utf-8"))


def _text(metrics, name):
    return format_value(name.rpartition("/")[2], *recorded_value(metrics, name))


def _link(path, text):
    return f"![{text}](images/{path.parent.name}/{path.name})"


def sections(text):
    """A page's sections by heading; "" is the text before the first."""
    parts = re.split(r"^(?=##+ )", text, flags=re.MULTILINE)
    return {part.split("\n", 1)[0] if part.startswith("##") else "": part for part in parts}


def render(template, study, page):
    """Return the new page, and the reason for each heading whose runs are missing.

    Sections are rendered one by one; those without runs are taken from `page`, the page as it is.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    present = sections(page)
    made, missing = [], {}
    for heading, section in sections(template).items():
        try:
            made.append(environment.from_string(section).render(study=study))
        except FileNotFoundError as error:
            missing[heading] = str(error)
            made.append(present.get(heading, ""))
    return "".join(made), missing


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("data", type=Path, help="folder of the splits")
    parser.add_argument("--output", type=Path, default=DOCS / "results.md", help="the page")
    args = parser.parse_args(argv)
    plots = args.output.parent / "images" / "results"
    plots.mkdir(parents=True, exist_ok=True)
    study = Study(args.runs, args.data, plots)
    before = args.output.read_text(encoding="utf-8") if args.output.is_file() else ""
    template = (HERE / "results.md.j2").read_text(encoding="utf-8")
    page, missing = render(template, study, before)
    write_atomically(args.output, page)
    for heading, runs in missing.items():
        state = "as it was" if heading in sections(before) else "left out"
        print(f'"{heading}" is {state}: no finished run {runs}', file=sys.stderr)
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
