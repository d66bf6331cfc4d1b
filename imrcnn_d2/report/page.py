"""The report: one HTML page that needs nothing else, from one run or several."""

import base64
import hashlib
import logging
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..evaluation.files import write_atomically
from .cohort import cohort
from .gallery import gallery_data
from .outlines import HALO_WIDTH, LIGHT_HALO, STYLES
from .page_comparison import differences
from .page_facts import config_differences, configs, facts
from .page_pictures import pictures
from .page_tables import (
    confusions,
    figure_tables,
    key_figures,
    patient_table,
    screening,
    size_tables,
)

__all__ = ["render_report"]

logger = logging.getLogger(__name__)

# Class in the page and label of each kind of outline.
OUTLINES = {
    "truth": ("ground truth", "ground truth"),
    "hit": ("hit", "hit: an outline that meets a lesion"),
    "missed": ("missed lesion", "missed lesion"),
    "alarm": ("false alarm", "false alarm"),
}
INLINED = ("report.css", "report.js")


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
    _check(runs)
    runs = _named(runs)
    drawn, undrawn = pictures(runs)
    people = cohort(runs[0])
    gallery, gallery_missing = _gallery(runs, max_images)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imrcnn_d2.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sources = {name: environment.loader.get_source(environment, name)[0] for name in INLINED}
    script = Markup(sources["report.js"])
    results = runs[0].results
    page = environment.get_template("report.html").render(
        title=runs[0].dataset or runs[0].name,
        lead=_lead(runs, results.meta),
        css=Markup(sources["report.css"]),
        script=script,
        script_hash=_hash(script),
        lines=_lines(),
        run_names=[run.name for run in runs],
        key_figures=key_figures(runs),
        uncertainty=_uncertainty(runs),
        notes=_notes(runs),
        comparison=differences(runs),
        facts=facts(runs, people["settings"]),
        config_differences=config_differences(runs),
        configs=configs(runs),
        cohort=people,
        figure_tables=figure_tables(runs),
        undefined=_undefined(runs),
        pictures=drawn,
        pictures_missing=undrawn,
        confusions=confusions(runs),
        size_tables=size_tables(runs),
        patients=patient_table(runs),
        screening=screening(runs, prevalences),
        gallery=gallery,
        gallery_missing=gallery_missing,
        gallery_lead=_gallery_lead(runs, gallery),
        lesion_free_images=results.meta["lesion_free_images"],
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=metadata.version("imrcnn-d2"),
        sources=", ".join(str(run.folder) for run in runs),
    )
    write_atomically(output, page)
    return Path(output)


def _named(runs):
    """The runs under their models' names, as in a comparison, where these tell them apart."""
    models = [run.model for run in runs]
    if any(run.labelled for run in runs) or len(set(models)) < len(models):
        return runs
    return [replace(run, name=run.model) for run in runs]


def _check(runs):
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
        for key in ("tau", "iou_threshold", "iou_type"):
            ours, theirs = first.metrics["meta"][key], run.metrics["meta"][key]
            if ours != theirs:
                raise ValueError(
                    f"{first.folder} was evaluated with {key} {ours}, {run.folder} with {theirs}: "
                    "evaluate one of them again."
                )


def _hash(script):
    """The page runs this script and no other, whatever its data say."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _lines():
    """{class: label, and how it is drawn, in CSS} of the outlines."""
    lines = {}
    for name, (kind, label) in OUTLINES.items():
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


def _uncertainty(runs):
    bootstraps = [run.metrics["meta"].get("bootstrap") for run in runs]
    known = [bootstrap for bootstrap in bootstraps if bootstrap]
    if not known:
        return "In percent. These evaluations recorded no intervals."
    return f"In percent. [95 % interval], by resampling {known[0]['unit']}s."


def _notes(runs):
    """What older runs lack."""
    without = [run.name for run in runs if run.run is None]
    notes = _said(without, "no run.json was found, so its training is not documented.")
    without = [run.name for run in runs if not run.metrics["meta"].get("bootstrap")]
    notes += _said(without, "evaluated without intervals.")
    without = [run.name for run in runs if not run.metrics.get("tau_val")]
    notes += _said(without, "no threshold chosen on validation data (τ_val) was recorded.")
    return notes


def _undefined(runs):
    """Rows: figure, and for each run the share of the resamples in which it is undefined."""
    shares = [run.metrics.get("undefined_shares") or {} for run in runs]
    figures = dict.fromkeys(figure for own in shares for figure in own)
    return [[name, *(f"{100 * own.get(name, 0):.1f}" for own in shares)] for name in figures]


def _said(names, text):
    return [f"{', '.join(names)}: {text}"] if names else []


def _gallery(runs, max_images):
    """(data or None, [why there are none])."""
    try:
        return gallery_data(runs, max_images), []
    except FileNotFoundError as error:
        logger.warning(f"No gallery: {error}")
        return None, [f"No gallery: {error}"]


def _gallery_lead(runs, gallery):
    if gallery is None:
        return ""
    tau, shown, total = runs[0].metrics["meta"]["tau"], len(gallery["images"]), gallery["total"]
    which = f"All {total:,} test images"
    if shown < total:
        which = f"{shown:,} of {total:,} test images, half the worst and half spread over the rest"
    return f"{which}, with the ground truth and what each model outlined at a score ≥ {tau:g}."
