#!/usr/bin/env python
"""Make docs/results.md, its table of runs and its plot from the records in runs/.

    python examples/kvasir_seg_study/results.py

The text is in results.md.j2; every value of the study comes from a record.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from analysis import ARMS, MARGINS, MINIMUM, PAIRS, Study
from matplotlib.figure import Figure
from records import ENDPOINTS, RECORDS

from imrcnn_d2.evaluation.comparison import corrected_resampled_t_test
from imrcnn_d2.report.html.page import template_environment
from imrcnn_d2.report.names import PUBLISHED_TRAININGS, published_values
from imrcnn_d2.report.plots.style import DOT, LEGEND, line_style, save_figure, tidy
from imrcnn_d2.report.tables import format_value, markdown_table, p_text
from imrcnn_d2.utils.files import csv_text, write_atomically

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PLOT, PLOT_DATA = "study.png", "study.csv"
# Of the paper's Table 4: 1,120 images, of which a fifth each is for testing and for validation.
TRAINED, TESTED = 672, 224


def number(value, decimals=1):
    return format_value("", value, None, decimals)


def interval(difference, decimals=1):
    limits = difference.low, difference.high
    return format_value("", difference.estimate, limits, decimals)


def claims(study: Study) -> str:
    """Each test with its verdict on the published advantage."""
    rows = []
    for test in study.tests:
        claimed = test.published is not None
        row = {
            "difference": f"{ARMS[test.first]} − {ARMS[test.second]}",
            "metric": test.endpoint + (" (primary)" if test.primary else ""),
            "published": number(test.published) if claimed else "",
            "here": interval(test.difference),
            "p": p_text(test.p),
            "claim": test.verdict,
            "power for it": number(100 * test.power(test.published), 0) if claimed else "",
            "by folds": interval(test.by_folds),
            "SE": number(test.difference.se, 2),
            "SE of images": number(test.se_images, 2),
        }
        rows.append(row)
    return markdown_table(pd.DataFrame(rows), 2)


def margins(study: Study) -> str:
    """Equivalence in AP50_voc."""
    rows = [
        {
            "difference": f"{ARMS[test.first]} − {ARMS[test.second]}",
            "margin": f"±{margin}",
            "90 % interval": " to ".join(map(number, test.difference.interval(0.9))),
            "p": p_text(test.equivalence(margin)),
            "power if equal": number(100 * test.power_of_equivalence(margin), 0),
        }
        for test in study.tests
        if test.endpoint == "AP50_voc"
        for margin in MARGINS
    ]
    return markdown_table(pd.DataFrame(rows), 1)


def components(study: Study) -> str:
    """Standard deviations of the mixed model."""
    rows = []
    for endpoint in ENDPOINTS:
        mixed = study.mixed(endpoint)
        deviations = np.sqrt([mixed.seed_variance, mixed.cell_variance])
        names = ("between seeds", "fold:neck")
        rows.append({"metric": endpoint, **dict(zip(names, map(number, deviations), strict=True))})
    return markdown_table(pd.DataFrame(rows))


def arms(study: Study) -> str:
    """Mean of each arm over folds and seeds, and the sd of fold means."""
    rows = []
    for place, arm in enumerate(study.arms):
        cells = {name: study.mixed(name).cells[place] for name in ENDPOINTS}
        texts = {
            k: format_value("", values.mean(), sd=values.std(ddof=1)) for k, values in cells.items()
        }
        rows.append({"arm": ARMS[arm], **texts})
    return markdown_table(pd.DataFrame(rows))


def over_seeds(records, endpoint: str) -> str:
    values = [record.values[endpoint] for record in records]
    return format_value("", np.mean(values), sd=np.std(values, ddof=1))


def hospitals(study: Study) -> str:
    """Arms trained on fold 0 in the hospitals of PolypGen, those with two seeds or more."""
    rows = []
    for endpoint in ("AP50_voc", "F1"):
        for centre, runs in study.hospitals.items():
            arms = [arm for arm in ARMS if len(runs.get(arm, ())) > 1]
            row = {"metric": endpoint, "centre": centre}
            row |= {ARMS[arm]: over_seeds(runs[arm], endpoint) for arm in arms}
            for pair in PAIRS:
                if {*pair} <= {*arms}:
                    name = " − ".join(ARMS[arm] for arm in pair)
                    row[name] = interval(study.in_hospital(centre, *pair, endpoint))
            rows.append(row)
    return markdown_table(pd.DataFrame(rows).fillna(""), 2)


def placements(study: Study) -> str:
    """IMR-CNN of fold 0 by where its attention is, those with two seeds or more; of the paper's
    place as many as of the others."""
    number_of_seeds = max(map(len, study.placements.values()))
    ours = [study.records.get(("imrcnn_lite", 0, seed)) for seed in range(number_of_seeds)]
    places = {"bottom_up (the paper's)": [*filter(None, ours)], **study.placements}
    rows = [
        {"attention before": place, "trainings": len(runs)}
        | {endpoint: over_seeds(runs, endpoint) for endpoint in ENDPOINTS}
        for place, runs in places.items()
        if len(runs) > 1
    ]
    return markdown_table(pd.DataFrame(rows))


def as_table_5(study: Study) -> str:
    """The paper's Table 5 and, of a complete study, the mean of each arm's runs read likewise."""
    published = {
        row.figure.partition("/")[2]: number(row.value) for row in published_values("egc", "5")
    }
    rows = [{"": "IMR-CNN, published: gastric images", **published}]
    for arm in study.arms if study.complete else ():
        of_arm = [
            record.metrics.once()["paper"]
            for (name, _, seed), record in study.records.items()
            if name == arm and seed < study.seeds
        ]
        texts = {name: number(np.mean([values[name] for values in of_arm])) for name in published}
        rows.append({"": f"{ARMS[arm]}, here: polyps", **texts})
    return markdown_table(pd.DataFrame(rows))


def as_table_4() -> str:
    """The paper's five trainings through the corrected resampled t-test."""
    rows = []
    for metric, endpoint in (("AP", "segm/AP50_voc"), ("IoU", "lesion/iou")):
        for first, second in ([ARMS[arm] for arm in pair] for pair in PAIRS):
            values = (PUBLISHED_TRAININGS[model, endpoint] for model in (first, second))
            test = corrected_resampled_t_test(np.subtract(*values), TRAINED, TESTED)
            pair = {"difference": f"{first} − {second}", "metric": metric}
            rows.append({**pair, "of five trainings": interval(test), "p": p_text(test.p)})
    return markdown_table(pd.DataFrame(rows), 2)


def runs(study: Study) -> list[dict]:
    """One row per finished run."""
    return [
        {
            "arm": ARMS[arm],
            "fold": fold,
            "seed": seed,
            **{name: number(value) for name, value in record.values.items()},
            "tau_val": f"{record.content['operating_point']['tau']:.2f}",
            "config": record.content["config_sha256"][:12],
            "hours": f"{record.content['hours']:.2f}",
        }
        for (arm, fold, seed), record in study.records.items()
    ]


def plot(rows: list[dict], path: Path) -> None:
    """AP50_voc of the runs of each fold, side by side by arm."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(ARMS.values()):
        points = [(r["fold"], float(r["AP50_voc"])) for r in rows if r["arm"] == arm]
        if points:
            x, y = np.transpose(points)
            colour = line_style(place)["color"]
            x = x + 0.16 * (place - 1.5)
            style = {**DOT, "markersize": 7, "marker": "os^D"[place], "linestyle": "none"}
            axes.plot(x, y, color=colour, label=arm, **style)
    axes.set(xlabel="fold", ylabel="AP50_voc (%)", xticks=range(5))
    axes.legend(**LEGEND, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    tidy(axes)
    save_figure(figure, path)


def render(study: Study) -> str:
    """The page."""
    environment = template_environment(HERE, keep_trailing_newline=True)
    rows = runs(study)
    return environment.get_template("results.md.j2").render(
        study=study,
        minimum=MINIMUM,
        number=number,
        interval=interval,
        p_text=p_text,
        plot_name=PLOT,
        verdicts=[test.verdict for test in study.tests if test.verdict] if study.complete else [],
        runs=markdown_table(pd.DataFrame(rows), 1) if rows else "",
        table_4=as_table_4(),
        table_5=as_table_5(study),
        hospitals=hospitals(study) if study.hospitals and study.complete else "",
        placements=placements(study) if study.placements and study.complete else "",
        **{f.__name__: f(study) for f in (claims, margins, components, arms) if study.complete},
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--output", type=Path, default=DOCS / "results.md", help="the page")
    args = parser.parse_args(argv)
    study = Study(args.records)
    plots = args.output.parent / "images" / "results"
    plots.mkdir(parents=True, exist_ok=True)
    if study.complete:
        rows = runs(study)
        plot(rows, plots / PLOT)
        write_atomically(plots / PLOT_DATA, csv_text(rows, list(rows[0])))
    write_atomically(args.output, render(study))
    print(f"Written: {args.output}, {study.runs_of_minimum} of {MINIMUM} runs")


if __name__ == "__main__":
    main()
