"""The report: one HTML page that needs nothing else, from one run or several."""

import base64
import hashlib
import logging
import math
import tempfile
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup
from matplotlib import rc_context

from imrcnn_d2.report.cohort import cohort
from imrcnn_d2.report.comparison.models import flat_config
from imrcnn_d2.report.html.gallery import gallery_data
from imrcnn_d2.report.html.tables import (
    confusions,
    differences,
    key_metrics,
    metric_tables,
    patient_table,
    screening,
    size_tables,
)
from imrcnn_d2.report.plots.curves import (
    plot_calibration,
    plot_froc,
    plot_pr_curves,
    plot_roc_curves,
    plot_thresholds,
)
from imrcnn_d2.report.plots.images import CONTOUR_STYLES, HALO_WIDTH, LIGHT_HALO
from imrcnn_d2.utils.files import write_atomically

__all__ = [
    "UNKNOWN",
    "as_data",
    "check_runs",
    "config_differences",
    "configs",
    "facts",
    "gallery_metrics",
    "missing_records",
    "named_runs",
    "contour_lines",
    "picture",
    "pictures",
    "render_report",
    "uncertainty",
    "undefined_rows",
    "write_html",
    "write_page",
]

logger = logging.getLogger(__name__)


UNKNOWN = "not recorded"
# These differ between any two runs.
PLACES = ("OUTPUT_DIR", "MODEL.WEIGHTS")


def facts(runs, settings):
    """
    Args:
        runs (list[Run]):
        settings (dict): of the split, from :func:`imrcnn_d2.report.cohort.cohort`.

    Returns:
        list[list[str]]: label, and a text for each run. What is not known is "not recorded".
    """
    columns = [_facts_of(run, settings) for run in runs]
    return [[label, *(column[label] for column in columns)] for label in columns[0]]


def _facts_of(run, settings):
    record, meta = run.run or {}, run.metrics["meta"]
    git = record.get("git") or {}
    revision = git.get("revision")
    if revision and git.get("dirty"):
        revision += ", with uncommitted changes"
    fold, chosen, bootstrap = run.fold, run.metrics.get("tau_val"), meta.get("bootstrap")
    versions = meta.get("versions") or record.get("versions") or {}
    texts = {
        "Model": record.get("model") or _of_config(run),
        "Backbone": run.backbone or _backbone(run),
        "Seed": run.seed if run.seed is not None else (run.config or {}).get("SEED"),
        "Fold": f"{fold['index']} of {fold['of']}" if fold else "none",
        "Iterations": record.get("iterations") or _max_iter(run),
        "Training": _training(record),
        "Device": record.get("device"),
        "Command": record.get("command"),
        "Code revision": revision,
        "Config, sha256": _short(record.get("config_sha256")),
        "Weights, sha256": _short(meta.get("checkpoint_sha256")),
        "Data set": meta.get("dataset"),
        "Ground truth, sha256": _short(meta.get("gt_sha256")),
        "Split, sha256": _short(record.get("splits_sha256") or settings.get("sha256")),
        **(_steps(record) if run.task == "recognition" else _thresholds(meta, chosen)),
        "Intervals": (
            f"{bootstrap['resamples']:,} resamples of {bootstrap['unit']}s, seed "
            f"{bootstrap['seed']}"
            if bootstrap
            else "none"
        ),
        "Versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
    }
    return {label: UNKNOWN if text in (None, "") else str(text) for label, text in texts.items()}


def _steps(record):
    """How a classifier was trained."""
    size = (record.get("input") or {}).get("size")
    steps = [
        f"{phase['name']}: {phase['trainable']} for {phase['iterations']} iterations at a rate of "
        f"{phase['lr']:g}"
        for phase in record.get("phases") or ()
    ]
    return {"Images as": size and f"{size} × {size} pixels", "Steps": "; ".join(steps)}


def _thresholds(meta, chosen):
    """What decides about detections."""
    point = None
    if chosen:
        point = f"{chosen['tau']:.3g} ({chosen.get('rule')}, on {chosen.get('dataset')})"
    return {
        "Score threshold τ": f"{meta['tau']:g}",
        "τ chosen on validation": point,
        "Hit": f"IoU ≥ {meta['iou_threshold']:g} of {_regions(meta)}",
    }


def _of_config(run):
    model = (run.config or {}).get("MODEL") or {}
    return model.get("META_ARCHITECTURE")


def _backbone(run):
    model = (run.config or {}).get("MODEL") or {}
    return (model.get("BACKBONE") or {}).get("NAME")


def _max_iter(run):
    return ((run.config or {}).get("SOLVER") or {}).get("MAX_ITER")


def _training(record):
    if not record.get("finished"):
        return f"started {record['started']}, not finished" if record.get("started") else None
    hours = record.get("hours")
    return ("" if hours is None else f"{hours:.2f} h, ") + f"finished {record['finished']}"


def _short(sha256):
    return sha256 and f"{sha256[:16]}…"


def _regions(meta):
    return "masks" if meta["iou_type"] == "segm" else "boxes"


def config_differences(runs):
    """list[list[str]]: key and its values, where not all configurations agree."""
    if any(run.config is None for run in runs):
        return []
    flat = [flat_config(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config if key not in PLACES)
    rows = [[key, *(str(config.get(key, "not set")) for config in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def configs(runs):
    """list[tuple[str, str]]: each run's name and its whole configuration, "" where unknown."""
    return [(run.name, yaml.safe_dump(run.config) if run.config else "") for run in runs]


def write_page(name, runs, output, *, cohort, **values):
    """
    Write a page of runs: templates/<name>.html, a page.html, with gallery.js and <name>.js.

    Args:
        name (str): of the template.
        runs (list[Run]):
        output (str or Path): the page to write; replaced at once, or not at all.
        cohort (dict): of :func:`imrcnn_d2.report.cohort.cohort`.
        **values: what this template needs besides what all pages say of runs.

    Returns:
        Path: the page.
    """
    return write_html(
        name,
        output,
        scripts=("gallery.js", f"{name}.js"),
        title=runs[0].dataset or runs[0].name,
        task=runs[0].task,
        run_names=[run.name for run in runs],
        facts=facts(runs, cohort["settings"]),
        config_differences=config_differences(runs),
        configs=configs(runs),
        cohort=cohort,
        sources=", ".join(str(run.folder) for run in runs),
        **values,
    )


def write_html(name, output, *, scripts=(), **values):
    """
    Write templates/<name>.html, with report.css.

    Args:
        name (str): of the template.
        output (str or Path): the page to write; replaced at once, or not at all.
        scripts (sequence of str): files in templates/ that the page runs, and no others.
        **values: what the template needs: for head.html ``title``, ``lead`` and ``lines``, for
            footer.html ``sources``.

    Returns:
        Path: the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imrcnn_d2.report.html"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    css, *texts = (
        environment.loader.get_source(environment, file)[0] for file in ("report.css", *scripts)
    )
    script = Markup("\n".join(texts))
    page = environment.get_template(f"{name}.html").render(
        css=Markup(css),
        script=script,
        script_hash=_hash(script),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=metadata.version("imrcnn-d2"),
        **values,
    )
    write_atomically(output, page)
    return Path(output)


def _hash(script):
    """The page runs this script and no other, whatever its data say."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


PIXELS = 96  # CSS's in an inch


def pictures(runs):
    """
    Args:
        runs (list[Run]): of one test set, evaluated at one threshold.

    Returns:
        tuple[list[dict], list[str]]: pictures, with title, caption, alt, source (a data URL), width
        and height in pixels; and why some are missing.
    """
    missing = [
        f"{run.name} gives no scores, so it has no curves."
        for run in runs
        if not run.results.detections.scored
    ]
    results = {run.name: run.results for run in runs if run.results.detections.scored}
    if not results:
        return [], missing
    tau = {"tau": runs[0].metrics["meta"]["tau"]}
    measures = {name: own.measures for name, own in results.items()}
    drawn = [
        picture(
            "Precision and recall",
            "Thick: the envelope, whose area is AP50_voc. Diamond: break-even point.",
            {name: 100 * curve.area for name, curve in _pr_curves(results).items()},
            "area under the precision-recall curve in percent",
            as_data(plot_pr_curves, _pr_curves(results), **tau),
        ),
        picture(
            "Free-response ROC",
            "Lesions found against false alarms an image. Mean: of the seven marked rates.",
            {name: own.froc["mean"] for name, own in results.items()},
            "mean sensitivity in percent",
            as_data(plot_froc, {name: own.froc for name, own in measures.items()}, **tau),
        ),
    ]
    counts = {name: own.counts for name, own in results.items()}
    positive = runs[0].results.counts.positive
    if positive.any() and not positive.all():
        drawn.append(
            picture(
                "ROC of images",
                "An image’s score is that of its highest detection, 0 without one.",
                {name: own.image["auroc"] for name, own in results.items()},
                "area under the ROC curve in percent",
                as_data(plot_roc_curves, counts, **tau),
            )
        )
    else:
        kind = "without" if positive.any() else "with"
        missing.append(f"No ROC curve: the test set has no image {kind} a lesion.")
    drawn += [
        picture(
            "Calibration",
            "Do 80 % of the detections scored 0.8 hit a lesion? Below: how many there are.",
            {name: own.calibration["ece"] for name, own in results.items()},
            "expected calibration error in percent",
            as_data(plot_calibration, {name: own.calibration for name, own in measures.items()}),
        ),
        picture(
            "Figures over the threshold",
            "To look at. A threshold that is chosen here is no longer tested by these data.",
            {},
            "precision, recall, F1 and specificity at score thresholds from 0.05 to 0.95",
            as_data(
                plot_thresholds,
                {name: own.thresholds for name, own in results.items()},
                **tau,
            ),
        ),
    ]
    return drawn, missing


def picture(title, caption, values, what, data):
    """
    Args:
        title (str), caption (str):
        values (dict[str, float]), what (str): for who cannot see it: figures by model, and of what.
        data (dict): of :func:`as_data`.

    Returns:
        dict: as of :func:`pictures`.
    """
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    said = "; ".join(f"{name}: {value:.1f}" for name, value in known.items())
    alt = f"{title}: {what}{f'. {said}' if said else ''}."
    return {"title": title, "caption": caption, "alt": alt, **data}


def _pr_curves(results):
    """{name: PRCurve}: one a run, or one for each of its classes."""
    curves = {}
    for run, own in results.items():
        kind = "segm" if any(kind == "segm" for kind, _, _ in own.curves) else "bbox"
        of_run = [(name, curve) for of, name, curve in own.curves if of == kind]
        for name, curve in of_run:
            if curve.num_gt and len(curve.score):
                curves[run if len(of_run) == 1 else f"{run}, {name}"] = curve
    return curves


def as_data(draw, *args, **kwargs):
    """dict: what a function that writes a picture to a path would write, as a data URL."""
    # Text as text, not as outlines: smaller, and sharp at any size.
    with tempfile.TemporaryDirectory() as folder, rc_context({"svg.fonttype": "none"}):
        path = Path(folder) / "picture.svg"
        figure = draw(*args, path, **kwargs)
        content = base64.b64encode(path.read_bytes()).decode()
    width, height = (round(PIXELS * inches) for inches in figure.get_size_inches())
    return {"source": f"data:image/svg+xml;base64,{content}", "width": width, "height": height}


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
        lines=contour_lines(OUTLINES),
        key_metrics=key_metrics(runs),
        uncertainty=uncertainty(runs),
        notes=_notes(runs),
        comparison=differences(runs),
        cohort=people,
        metric_tables=metric_tables(runs),
        undefined=undefined_rows(runs),
        pictures=drawn,
        pictures_missing=undrawn,
        confusions=confusions(runs),
        size_tables=size_tables(runs),
        patients=patient_table(runs),
        screening=screening(runs, prevalences),
        lesion_free_images=results.meta["lesion_free_images"],
        **gallery_metrics(gallery_data, runs, max_images, outlined),
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


def contour_lines(outlines):
    """
    Args:
        outlines (dict[str, tuple[str, str]]): class in the page -> kind of outline, label.

    Returns:
        dict[str, dict]: label, and how it is drawn in CSS, by class; ``lines`` of head.html.
    """
    lines = {}
    for name, (kind, label) in outlines.items():
        style = CONTOUR_STYLES[kind]
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


def gallery_metrics(make, runs, max_images, told):
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
