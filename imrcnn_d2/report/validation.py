"""The report of external validation: what weights, frozen as stored, do in each centre."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from imrcnn_d2.evaluation import Bootstrap, LesionResults
from imrcnn_d2.evaluation.calibration import FEW_CASES as FEW_FOR_A_MAP
from imrcnn_d2.evaluation.calibration import ScoreMap
from imrcnn_d2.evaluation.detection.metrics import FEW_CASES
from imrcnn_d2.evaluation.pooling import LEAST_CENTRES, Pooled, pool
from imrcnn_d2.evaluation.subgroups import Group
from imrcnn_d2.report.html import tables as html
from imrcnn_d2.report.html.page import as_data, embed, write_html
from imrcnn_d2.report.plots.curves import (
    ForestRow,
    plot_calibration_panels,
    plot_forest,
    row_label,
)
from imrcnn_d2.report.plots.images import plot_contact_sheet
from imrcnn_d2.report.plots.style import save_figure
from imrcnn_d2.report.tables import (
    FEW_NOTE,
    Table,
    centre_metrics,
    decimals_of,
    few_notes,
    format_value,
    group_text,
    markdown_text,
    p_text,
    plural,
    value_of,
    write_table,
)
from imrcnn_d2.utils.files import write_atomically

# The metrics that the findings are about, by the last part of "group/metric".
KEY_METRICS = {
    "lesion/recall": ("Sensitivity", "lesions found"),
    "lesion/precision": ("Precision", "detections that are a lesion"),
    "image/specificity": ("Specificity", "lesion-free images without a detection"),
}
# Points: an interval that is wider leaves much open, or tells nothing.
WIDE, ANYTHING = 20, 60
# Below this p-value of Cochran's Q, which has little power, centres are taken to differ.
DIFFERS = 0.1
WORST_IMAGES = 8  # of each centre

READING = {
    "n": "The number of cases that a value is a share or a mean of: lesions for sensitivity, AP50, "
    "detections for precision and ECE, lesion-free images for specificity, images for false "
    f"alarms, images with a lesion for mIoU, lesions found for Dice and HD95. {FEW_NOTE}",
    "[low, high]": "95 % interval, over patients where they are known, else sequences, else "
    "images: for the choice of images; with others of the same centre the value would differ.",
    "Pooled": "Random-effects mean: the centre in the middle of centres like these, with its 95 % "
    "interval. Shares and numbers per image are pooled as counts, other metrics as they are.",
    "A further centre": "95 % prediction interval: where the value of another centre of this kind "
    "is expected. It is wide with few centres, and rightly so.",
    "I², p": "I²: the share of the variation between centres that is more than chance. p: how "
    "often chance alone would make centres that are all alike differ as much (Cochran’s Q). With "
    "few centres a large p does not show that they are alike.",
    "Slope, offset": "Of the map of scores that these images would give (Platt): 1 and 0 mean that "
    "scores need none. It is described only: scores and threshold stay as stored.",
    "ECE": "Expected calibration error: by how many points a score differs from the share of hits "
    "among such detections, on average.",
}


@dataclass(frozen=True, eq=False)
class Validation:
    """What the report is of.

    Attributes:
        title: such as "imrcnn demo on PolypGen".
        centres, subgroups: the evaluation of each centre, and of the groups of each other column.
        facts: what is known of weights, threshold and data, as label and text.
        marks: sentences that stand on every table, such as that training images are included.
        notes: sentences that stand on the page.
        metrics, pooled: heading, and summary over the centres, by "group/metric".
    """

    title: str
    centres: Mapping[str, Group]
    subgroups: Mapping[str, Mapping[str, Group]]
    facts: Mapping[str, str]
    marks: Sequence[str]
    notes: Sequence[str]
    metrics: Mapping[str, str]
    pooled: Mapping[str, Pooled]

    @classmethod
    def of(
        cls,
        results: LesionResults | Mapping[str, LesionResults],
        title: str = "",
        facts: Mapping[str, str] = MappingProxyType({}),
        marks: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> "Validation":
        """Pool the results over the centres.

        Args:
            results: of :func:`with_groups` with the column "centre", and others as subgroups, made
                with a bootstrap; or, where each centre was predicted by weights of its own, the
                evaluation of each centre by its name.

        Raises:
            KeyError: the results are not grouped by "centre".
        """
        subgroups = {}
        if isinstance(results, LesionResults):
            grouped = {column: of_column.groups for column, of_column in results.by_group.items()}
            centres, subgroups = grouped.pop("centre"), grouped
        else:
            centres = {name: _group(scored) for name, scored in results.items()}
        metrics = centre_metrics(centres)
        pooled = pool(centres, metrics)
        return cls(title, centres, subgroups, facts, marks, notes, metrics, pooled)

    @property
    def sizes(self) -> str:
        """The images, centres and lesions in words."""
        meta = [group.results.meta for group in self.centres.values()]
        images, lesions, free = (
            sum(each[key] for each in meta) for key in ("images", "lesions", "lesion_free_images")
        )
        text = f"{plural(images, 'image')} of {plural(len(meta), 'centre')}, {free:,} of them "
        return f"{text}without a lesion, the others with {plural(lesions, 'lesion')}"

    @property
    def key_metrics(self) -> dict[str, tuple[str, str]]:
        """Name and meaning by "group/metric" of those that the findings are about."""
        keys = {endpoint: endpoint.removeprefix("tau_val.") for endpoint in self.metrics}
        return {endpoint: KEY_METRICS[key] for endpoint, key in keys.items() if key in KEY_METRICS}

    def cases(self, endpoint: str) -> int:
        """The number of cases of a metric in all centres."""
        return sum(group.cases(endpoint)[0] for group in self.centres.values())


def write_validation(
    validation: Validation, output: str | Path, image_root: str | Path | None = None
) -> list[Path]:
    """Write validation.html, validation.md, each table as .md, .csv and .tex, and the plots as .png
    to a folder; returns the files, validation.html first.

    Args:
        image_root: the folder that ``file_name`` is relative to, for the worst images of each
            centre; None for none.

    Raises:
        FileNotFoundError: one of the worst images does not exist.
    """
    output = Path(output)
    centres, subgroups = validation.centres, validation.subgroups
    tables = {
        "centres": centre_table(validation, "centre", centres),
        "pooled": pooled_table(validation),
        "calibration": calibration_table(validation),
        **{f"by {name}": centre_table(validation, name, by) for name, by in subgroups.items()},
    }
    files = [path for table in tables.values() for path in write_table(table, output)]
    labels, panels = _forest(validation)
    plots = {"forest": output / "forest.png", "calibration": output / "calibration_by_centre.png"}
    options = {"title": "By centre, with 95 % intervals", "summary": len(centres)}
    plotted = {"forest": plot_forest(labels, panels, plots["forest"], **options)}
    calibrations = {name: group.results.metrics.calibration for name, group in centres.items()}
    plotted["calibration"] = plot_calibration_panels(calibrations, plots["calibration"])
    sheets = {}
    for number, (name, group) in enumerate(centres.items(), 1):
        if image_root is not None:
            sheets[name] = output / f"worst_{number}_{_safe(name)}.png"
            options = {"worst": True, "max_images": WORST_IMAGES}
            plot_contact_sheet(group.results, image_root, sheets[name], **options)
    write_atomically(output / "validation.md", _markdown(validation, tables, plots, sheets))
    svg = {name: as_data(save_figure, figure) for name, figure in plotted.items()}
    page = _write_page(validation, output / "validation.html", tables, svg, sheets)
    return [page, output / "validation.md", *files, *plots.values(), *sheets.values()]


def _group(results):
    """An evaluation, with the bootstrap that it was made with."""
    settings, bootstrap = results.meta["bootstrap"], None
    if settings:
        bootstrap = Bootstrap(*(settings[key] for key in ("resamples", "seed", "all_coco")))
    return Group.of_images(results, bootstrap)


def _safe(name):
    return re.sub("[^A-Za-z0-9.-]", "_", name)


def centre_table(validation: Validation, column: str, groups: Mapping[str, Group]) -> Table:
    """One row per group of a column, of each metric the value, interval and number of cases."""
    metrics = centre_metrics(groups)
    cells, data, nouns = [], [], {}
    for name, group in groups.items():
        row = {column: name, **{size: f"{number:,}" for size, number in group.n.items()}}
        for endpoint, heading in metrics.items():
            row[heading] = group_text(group, endpoint)
            value = {"figure": endpoint, "value": value_of(group.values, endpoint)}
            data.append({column: name, **value, **group.row(endpoint)})
            nouns[heading] = data[-1]["cases_are"]
        cells.append(row)
    shares = "; ".join(f"{heading.partition(',')[0]}: {noun}" for heading, noun in nouns.items())
    notes = [*validation.marks, f"In brackets: 95 % interval; n: the number of cases ({shares})."]
    notes += few_notes(groups, metrics)
    stem = "centres" if column == "centre" else f"by_{_safe(column)}"
    cells = pd.DataFrame(cells).fillna("")
    return Table(stem, f"By {column}", cells, pd.DataFrame(data), tuple(notes))


def pooled_table(validation: Validation) -> Table:
    """One row per metric: its range over the centres, and the random-effects summary."""
    cells, data = [], []
    for endpoint, heading in validation.metrics.items():
        summary, metric = validation.pooled[endpoint], endpoint.partition("/")[2]
        values = _of_enough_cases(validation, endpoint).values()
        ends = min(values), max(values)
        row = {"metric": heading, "centres": f"{len(summary.centres)}"}
        row["n"] = f"{validation.cases(endpoint):,}"
        row["lowest to highest"] = _ends(metric, ends)
        decimals = decimals_of(metric)
        row["pooled"] = format_value(metric, summary.value, summary.interval, decimals)
        row["a further centre"] = _ends(metric, summary.predicted)
        row["I²"] = "n/a" if math.isnan(summary.i2) else f"{summary.i2:.0f} %"
        row["p"] = p_text(summary.p)
        cells.append(row)
        fields = {"figure": endpoint, "centres": len(summary.centres)}
        fields["cases"] = validation.cases(endpoint)
        fields |= {"lowest": ends[0], "highest": ends[1], "pooled": summary.value}
        fields |= {"low": summary.interval[0], "high": summary.interval[1]}
        fields |= {"further_low": summary.predicted[0], "further_high": summary.predicted[1]}
        fields |= {"i2": summary.i2, "tau": summary.tau, "scale": summary.scale, "q": summary.q}
        fields |= {"p": summary.p, "left_out": "; ".join(summary.left_out)}
        data.append(fields)
    notes = [*validation.marks]
    if few := _too_few_centres(validation):
        notes.append(few)
    for endpoint, summary in validation.pooled.items():
        if summary.left_out:
            heading = validation.metrics[endpoint].partition(",")[0]
            names = ", ".join(summary.left_out)
            notes.append(f"{heading}: without {names}, where it is undefined or of few cases.")
    groups = validation.centres.values()
    if any(group.is_few(endpoint) for group in groups for endpoint in validation.metrics):
        notes.append(f"Lowest to highest: of centres with {FEW_CASES} cases or more, if any.")
    title = "Over all centres: random-effects summary"
    return Table("pooled", title, pd.DataFrame(cells), pd.DataFrame(data), tuple(notes))


def _of_enough_cases(validation, endpoint):
    """{centre: value} where it is defined, without those of few cases unless all are."""
    values = {name: value_of(g.values, endpoint) for name, g in validation.centres.items()}
    values = {name: value for name, value in values.items() if not math.isnan(value)}
    few = [name for name in values if validation.centres[name].is_few(endpoint)]
    return {name: value for name, value in values.items() if name not in few} or values


def _ends(metric, ends):
    if math.isnan(ends[0]):
        return "n/a"
    texts = [format_value(metric, end, decimals=decimals_of(metric)) for end in ends]
    return " to ".join(dict.fromkeys(texts))


def _too_few_centres(validation):
    """What is not known with fewer than LEAST_CENTRES; None with more."""
    number = len(validation.centres)
    if number >= LEAST_CENTRES:
        return None
    return (
        f"From {plural(number, 'centre')} nothing follows on how centres differ, nor on what to "
        f"expect in a further one: there is no summary of fewer than {LEAST_CENTRES}."
    )


def calibration_table(validation: Validation) -> Table:
    """One row per centre: what scores say and what is so, and the map that would mend them."""
    cells, data = [], []
    for name, group in validation.centres.items():
        scores, values = group.results.metrics.calibration, group.values["calibration"]
        hits, fitted = int(scores.hit.sum()), None
        if min(hits, len(scores.hit) - hits) >= FEW_FOR_A_MAP:
            fitted = ScoreMap.fit(scores.score, scores.hit)
        slope, offset = (fitted.slope, fitted.offset) if fitted else (math.nan, math.nan)
        row = {"centre": name, "detections": f"{values['n']:,.0f}"}
        row["mean score, %"] = format_value("", values["mean_score"])
        row["hits, %"] = group_text(group, "calibration/hit_rate")
        row["ECE, %"] = group_text(group, "calibration/ece")
        row["Brier"] = format_value("", values["brier"])
        row["slope"] = format_value("", slope, decimals=2)
        row["offset"] = format_value("", offset, decimals=2)
        cells.append(row)
        data.append({"centre": name, **values, "slope": slope, "offset": offset})
    notes = [
        *validation.marks,
        "Of all detections, at any score. Slope and offset are those of a map of scores that was "
        "fitted here: 1 and 0 mean that none is needed. It is described only, never applied; there "
        f"is none with fewer than {FEW_FOR_A_MAP} hits or false alarms.",
    ]
    title = "Do scores mean what they say?"
    cells, data = pd.DataFrame(cells), pd.DataFrame(data)
    return Table("calibration_by_centre", title, cells, data, tuple(notes))


def _forest(validation):
    """Labels and panels of `plot_forest`: the centres, the pooled value, a further centre."""
    labels = [row_label(name, group.n) for name, group in validation.centres.items()]
    panels = {}
    for endpoint, heading in validation.metrics.items():
        name, _, unit = heading.partition(", ")
        rows = [ForestRow.of(group, endpoint) for group in validation.centres.values()]
        summary = validation.pooled[endpoint]
        rows += [ForestRow(summary.value, summary.interval)]
        rows += [ForestRow(math.nan, summary.predicted)]
        panels[name] = unit, rows
    return [*labels, "pooled", "a further\ncentre"], panels


def findings(validation: Validation) -> list[str]:
    """What is alike in all centres, what differs, and where the data are too few to tell."""
    sentences = [f"Weights and threshold were used as stored, on {validation.sizes}."]
    if few := _too_few_centres(validation):
        sentences.append(few)
    for endpoint, (name, meaning) in validation.key_metrics.items():
        sentences.append(_of_metric(validation, endpoint, name, meaning))
    if KEY_METRICS["image/specificity"] not in validation.key_metrics.values():
        sentences.append(
            "Specificity cannot be measured: no image is free of lesions. Nothing is known of how "
            "often the model raises an alarm in healthy mucosa."
        )
    sentences += filter(None, (_small(validation), _scores(validation), _units(validation)))
    return sentences


def _of_metric(validation, endpoint, name, meaning):
    values = _of_enough_cases(validation, endpoint)
    low, high = min(values, key=values.get), max(values, key=values.get)
    metric, summary = endpoint.partition("/")[2], validation.pooled[endpoint]
    spans = f"{_with_interval(validation, low, endpoint)} in {low}"
    if values[low] < values[high]:
        spans = f"from {spans} to {_with_interval(validation, high, endpoint)} in {high}"
    elif len(values) > 1:
        spans = f"{format_value(metric, values[low])} in {', '.join(values)}"
    name = f"{name} ({meaning}, n {validation.cases(endpoint):,})"
    if math.isnan(summary.value):
        return f"{name}: {spans}."
    pooled = format_value(metric, summary.value, summary.interval)
    further = f"in a further centre it may be {_ends(metric, summary.predicted)}"
    width = summary.predicted[1] - summary.predicted[0]
    if width > ANYTHING:
        further = f"{len(summary.centres)} centres are too few to tell what a further one will show"
    chance = f"I² {summary.i2:.0f} %, p {p_text(summary.p).replace('<', '< ')}"
    if summary.p < DIFFERS:
        return (
            f"{name} differs between centres: it is {spans}, more than chance explains ({chance}). "
            f"Pooled it is {pooled} %; {further}."
        )
    if width <= WIDE:
        centres = "all centres"
        if summary.left_out:
            centres = f"the {len(summary.centres)} centres that have such cases"
        return (
            f"{name} is alike in {centres}: pooled {pooled} %, {spans}, no more than chance "
            f"explains ({chance}); {further}."
        )
    return (
        f"{name}: pooled {pooled} %, {spans}. Centres do not demonstrably differ ({chance}), but "
        f"the intervals are too wide to say that they are alike: {further}."
    )


def _with_interval(validation, centre, endpoint):
    group = validation.centres[centre]
    value, interval = value_of(group.values, endpoint), value_of(group.intervals, endpoint)
    return format_value(endpoint.partition("/")[2], value, interval)


def _small(validation):
    """The centres where a key metric is of few cases, or its interval wide."""
    few, wide = [], []
    for endpoint, (title, _) in validation.key_metrics.items():
        of_few, of_wide = [], []
        for centre, group in validation.centres.items():
            low, high = value_of(group.intervals, endpoint) or (math.nan, math.nan)
            if group.is_few(endpoint):
                of_few.append(f"{centre} ({group.cases(endpoint)[0]})")
            elif high - low > WIDE:
                of_wide.append(centre)
        name = title.lower()
        few += [f"{name} in {', '.join(of_few)}"] if of_few else []
        wide += [f"{name} in {', '.join(of_wide)}"] if of_wide else []
    texts = {"Of too few cases to say anything": few}
    texts[f"The interval is wider than {WIDE} points, which leaves much open"] = wide
    return " ".join(f"{text}: {'; '.join(names)}." for text, names in texts.items() if names)


def _scores(validation):
    """The centres whose scores promise more, or less, than is so."""
    too, centres = {"high": [], "low": []}, validation.centres
    for centre, group in centres.items():
        values = group.values["calibration"]
        interval = value_of(group.intervals, "calibration/hit_rate")
        text = (
            f"{centre} (mean score {values['mean_score']:.0f} %, hits {values['hit_rate']:.0f} %)"
        )
        if interval and values["mean_score"] > interval[1]:
            too["high"].append(text)
        elif interval and values["mean_score"] < interval[0]:
            too["low"].append(text)
    parts = [f"too {way} in {', '.join(names)}" for way, names in too.items() if names]
    if parts:
        return f"Scores are {'; '.join(parts)}."
    intervals = [value_of(group.intervals, "calibration/hit_rate") for group in centres.values()]
    if all(interval and not math.isnan(interval[0]) for interval in intervals):
        return "In no centre do scores, on average, demonstrably promise more or less than is so."
    return ""


def _units(validation):
    """What stands in for patients, and in how many images."""
    units = {name: group.results.metrics.units for name, group in validation.centres.items()}
    texts = []
    for kind in ("sequence", "image"):
        if names := [name for name, of_centre in units.items() if of_centre.kind == kind]:
            texts.append(
                f"Patients are not known in {', '.join(names)}: intervals take {kind}s for "
                "independent, and are too narrow where one patient has several."
            )
    for name, of_centre in units.items():
        if of_centre.kind == "patient" and of_centre.unknown:
            number = plural(of_centre.unknown, "image")
            texts.append(
                f"In {name} the units are {of_centre}: the patients of {number} are not known."
            )
    return " ".join(texts)


def _markdown(validation, tables, plots, sheets):
    lines = [f"# {markdown_text(validation.title)}", ""]
    lines += [f"**{markdown_text(mark)}**\n" for mark in validation.marks]
    lines += [f"{markdown_text(text)}\n" for text in findings(validation)]
    lines += [f"- {markdown_text(note)}" for note in validation.notes]
    shown = {"centres": plots["forest"], "calibration": plots["calibration"]}
    for name, table in tables.items():
        lines += ["", table.markdown()]
        if name in shown:
            lines += [f"![{shown[name].stem}]({shown[name].name})", ""]
    if sheets:
        lines += ["## Worst images", ""]
    for name, path in sheets.items():
        lines += [f"{markdown_text(name)}:", "", f"![{markdown_text(name)}]({path.name})", ""]
    lines += ["## How to read it", ""]
    lines += [f"- **{markdown_text(name)}**: {markdown_text(t)}" for name, t in READING.items()]
    lines += ["", "## What was run", ""]
    facts = validation.facts.items()
    lines += [f"- {markdown_text(label)}: {markdown_text(text)}" for label, text in facts]
    return "\n".join([*lines, ""])


def _write_page(validation, path, tables, plots, sheets):
    """validation.html."""
    worst = []
    for name, sheet in sheets.items():
        jpeg, (width, height), _ = embed(sheet, long_side=1600)
        worst.append({"name": name, "jpeg": jpeg, "width": width, "height": height})
    subgroups = [
        {
            **html.group_table(name, groups, centre_metrics(groups)),
            "notes": tables[f"by {name}"].notes,
        }
        for name, groups in validation.subgroups.items()
    ]
    cards = [
        {
            "title": title,
            "hint": f"{hint}, %",
            "cell": html.pooled_cell(validation.pooled[endpoint], validation.cases(endpoint)),
        }
        for endpoint, (title, hint) in validation.key_metrics.items()
        if not math.isnan(validation.pooled[endpoint].value)
    ]
    return write_html(
        "validation",
        path,
        title=validation.title,
        kicker="External validation",
        lead=f"{validation.sizes}.",
        shown="data",
        lines={},
        marks=validation.marks,
        notes=validation.notes,
        findings=findings(validation),
        cards=cards,
        centres=html.group_table("centre", validation.centres, validation.metrics),
        tables=tables,
        plots=plots,
        subgroups=subgroups,
        worst=worst,
        worst_number=WORST_IMAGES,
        reading=READING,
        facts=list(validation.facts.items()),
        sources=", ".join(validation.centres),
    )
