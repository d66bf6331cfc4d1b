"""The report: one HTML page that needs nothing else, from one run or several."""

import logging
from dataclasses import replace

from .cohort import cohort
from .gallery import gallery_data
from .html import write_page
from .outlines import HALO_WIDTH, LIGHT_HALO, STYLES
from .page_comparison import differences
from .page_pictures import pictures
from .page_tables import (
    confusions,
    figure_tables,
    key_figures,
    patient_table,
    screening,
    size_tables,
)

__all__ = [
    "check_runs",
    "gallery_values",
    "missing_records",
    "named_runs",
    "outline_lines",
    "render_report",
    "uncertainty",
    "undefined_rows",
]

logger = logging.getLogger(__name__)

# Class in the page and label of each kind of outline.
OUTLINES = {
    "truth": ("ground truth", "ground truth"),
    "hit": ("hit", "hit: an outline that meets a lesion"),
    "missed": ("missed lesion", "missed lesion"),
    "alarm": ("false alarm", "false alarm"),
}


def render_report(runs, output, *, prevalences=(0.005, 0.05), max_images=300):
    """
    Args:
        runs (list[Run]): of one test set, evaluated with the same settings.
        output (str or Path): the page to write; replaced at once, or not at all.
        prevalences (sequence of float): in (0, 1), at which PPV and NPV are given.
        max_images (int): in the gallery; of a larger test set, the worst half and an even choice of
            the rest.

    Returns:
        Path: the page.

    Raises:
        FileNotFoundError: ground truth or detections are gone.
        ValueError: different test sets or settings, two runs of one name, a prevalence outside
            (0, 1).
    """
    check_runs(runs)
    runs = named_runs(runs)
    drawn, undrawn = pictures(runs)
    people = cohort(runs[0])
    results = runs[0].results
    outlined = f"the ground truth and what each model outlined at a score ≥ {results.meta['tau']:g}"
    return write_page(
        "report",
        runs,
        output,
        lead=_lead(runs, results.meta),
        lines=outline_lines(OUTLINES),
        key_figures=key_figures(runs),
        uncertainty=uncertainty(runs),
        notes=_notes(runs),
        comparison=differences(runs),
        cohort=people,
        figure_tables=figure_tables(runs),
        undefined=undefined_rows(runs),
        pictures=drawn,
        pictures_missing=undrawn,
        confusions=confusions(runs),
        size_tables=size_tables(runs),
        patients=patient_table(runs),
        screening=screening(runs, prevalences),
        lesion_free_images=results.meta["lesion_free_images"],
        **gallery_values(gallery_data, runs, max_images, outlined),
    )


def named_runs(runs):
    """list[Run]: under their models' names, as in a comparison, where these tell them apart."""
    models = [run.model for run in runs]
    if any(run.labelled for run in runs) or len(set(models)) < len(models):
        return runs
    return [replace(run, name=run.model) for run in runs]


def check_runs(runs):
    """
    Raises:
        ValueError: runs that cannot be on one page.
    """
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two runs are called {name!r}: tell them apart by NAME=RUN.")
    first = runs[0]
    for run in runs[1:]:
        if run.gt_path.read_bytes() != first.gt_path.read_bytes():
            raise ValueError(
                f"{first.folder} and {run.folder} were evaluated on different test sets "
                f"({first.gt_path}, {run.gt_path}): one report shows one test set."
            )
        for key in ("task", "tau", "iou_threshold", "iou_type"):
            ours, theirs = first.meta.get(key), run.meta.get(key)
            if ours != theirs:
                raise ValueError(
                    f"{first.folder} was evaluated with {key} {ours}, {run.folder} with {theirs}: "
                    "evaluate one of them again."
                )


def outline_lines(outlines):
    """
    Args:
        outlines (dict[str, tuple[str, str]]): class in the page -> kind of outline, label.

    Returns:
        dict[str, dict]: label, and how it is drawn in CSS, by class; ``lines`` of head.html.
    """
    lines = {}
    for name, (kind, label) in outlines.items():
        style = STYLES[kind]
        dash = "none"
        if style["linestyle"] != "-":  # matplotlib's dashes are in line widths
            dash = " ".join(f"{part * style['linewidth']:.1f}" for part in style["linestyle"][1])
        lines[name] = {
            "label": label,
            "color": style["color"],
            "width": f"{style['linewidth']}px",
            "dash": dash,
            "light": kind in LIGHT_HALO,
            "halo": f"{HALO_WIDTH}px",
        }
    return lines


def _lead(runs, meta):
    def number(count, noun):
        return f"{count:,} {noun}{'' if count == 1 else 's'}"

    lead = f"{number(len(runs), 'model')} on {number(meta['images'], 'image')} with "
    lead += number(meta["lesions"], "lesion")
    if meta["patients"]:
        lead += f" of {number(meta['patients'], 'patient')}"
    if meta["lesion_free_images"]:
        lead += f"; {number(meta['lesion_free_images'], 'image')} without a lesion"
    return f"{lead}."


def uncertainty(runs):
    """str: what the brackets are."""
    bootstraps = [run.metrics["meta"].get("bootstrap") for run in runs]
    known = [bootstrap for bootstrap in bootstraps if bootstrap]
    if not known:
        return "In percent. These evaluations recorded no intervals."
    return f"In percent. [95 % interval], by resampling {known[0]['unit']}s."


def _notes(runs):
    without = [run.name for run in runs if not run.metrics.get("tau_val")]
    no_threshold = "no threshold chosen on validation data (τ_val) was recorded."
    return missing_records(runs) + _said(without, no_threshold)


def missing_records(runs):
    """list[str]: what older runs lack, and which record other figures than they have."""
    notes = [remark for run in runs for remark in run.remarks]
    without = [run.name for run in runs if run.run is None]
    notes += _said(without, "no run.json was found, so its training is not documented.")
    without = [run.name for run in runs if not run.metrics["meta"].get("bootstrap")]
    return notes + _said(without, "evaluated without intervals.")


def undefined_rows(runs):
    """list[list[str]]: figure, and the share of each run's resamples in which it is undefined."""
    shares = [run.metrics.get("undefined_shares") or {} for run in runs]
    figures = dict.fromkeys(figure for own in shares for figure in own)
    return [[name, *(f"{100 * own.get(name, 0):.1f}" for own in shares)] for name in figures]


def _said(names, text):
    """list[str]: a note on some runs, none without one."""
    return [f"{', '.join(names)}: {text}"] if names else []


def gallery_values(make, runs, max_images, told):
    """
    Args:
        make (callable): of runs and max_images, gives the gallery's data.
        runs (list[Run]): of one test set.
        max_images (int): in the gallery.
        told (str): what it shows of each image.

    Returns:
        dict: gallery (None without the images), gallery_missing and gallery_lead of page.html.
    """
    try:
        gallery = make(runs, max_images)
    except FileNotFoundError as error:
        logger.warning(f"No gallery: {error}")
        return {"gallery": None, "gallery_missing": [f"No gallery: {error}"], "gallery_lead": ""}
    shown, total = len(gallery["images"]), gallery["total"]
    which = f"All {total:,} test images"
    if shown < total:
        which = f"{shown:,} of {total:,} test images, half the worst and half spread over the rest"
    return {"gallery": gallery, "gallery_missing": [], "gallery_lead": f"{which}, with {told}."}
