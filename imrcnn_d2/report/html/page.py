"""The report: one HTML page that needs nothing else, from one run or several."""

import base64
import hashlib
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from imrcnn_d2.data.images import image_inside
from imrcnn_d2.report.cohort import cohort
from imrcnn_d2.report.comparison.models import flat_config
from imrcnn_d2.report.html import tables
from imrcnn_d2.report.html.gallery import classification_gallery, embed, gallery_data
from imrcnn_d2.report.names import CLASSIFICATION_CITATION, REMARKS, published_accuracy
from imrcnn_d2.report.plots import (
    plot_calibration,
    plot_class_roc,
    plot_froc,
    plot_pr_curves,
    plot_roc_curves,
    plot_thresholds,
)
from imrcnn_d2.report.plots.images import CONTOUR_STYLES, HALO_WIDTH, LIGHT_HALO
from imrcnn_d2.report.runs import Run
from imrcnn_d2.utils.files import write_atomically

__all__ = [
    "UNKNOWN",
    "as_data",
    "config_differences",
    "configs",
    "contour_lines",
    "curve_plots",
    "facts",
    "render_report",
    "write_html",
]

logger = logging.getLogger(__name__)


def render_report(
    runs: list[Run],
    output: str | Path,
    *,
    prevalences: Sequence[float] = (0.005, 0.05),
    max_images: int = 300,
) -> Path:
    """
    Write the report of detectors, or of classifiers.

    Args:
        runs: of one test set, evaluated with the same settings.
        output: the page to write; replaced at once, or not at all.
        prevalences: in (0, 1), at which PPV and NPV are given.
        max_images: in the gallery; of a larger test set, the worst half and an even choice of the
            rest.

    Raises:
        FileNotFoundError: ground truth or predictions are gone.
        ValueError: different test sets or settings, two runs of one name, a prevalence outside
            (0, 1).
    """
    check_runs(runs)
    runs = named_runs(runs)
    people = cohort(runs[0])
    if runs[0].task == "recognition":
        name, sections = "classification", _classification(runs, max_images)
    else:
        name, sections = "detection", _detection(runs, prevalences, max_images)
    return write_html(
        name,
        output,
        scripts=("gallery.js", f"{name}.js"),
        title=runs[0].dataset or runs[0].name,
        task=runs[0].task,
        run_names=[run.name for run in runs],
        facts=facts(runs, people["settings"]),
        config_differences=config_differences(runs),
        configs=configs(runs),
        cohort=people,
        sources=", ".join(str(run.folder) for run in runs),
        uncertainty=_uncertainty(runs),
        comparison=tables.differences(runs),
        undefined=_undefined_rows(runs),
        **sections,
    )


# Class in the page of each kind of contour, with its label.
CONTOURS = {
    "truth": ("ground truth", "ground truth"),
    "hit": ("hit", "hit: a detection that meets a lesion"),
    "missed": ("missed lesion", "missed lesion"),
    "alarm": ("false alarm", "false alarm"),
}


def _detection(runs, prevalences, max_images):
    """dict: the values of detection.html that not every page has."""
    plots, missing = curve_plots(runs)
    meta = runs[0].results.meta
    shown = f"the ground truth and each model’s detections at a score ≥ {meta['tau']:g}"
    without = [run.name for run in runs if not run.metrics.get("tau_val")]
    no_threshold = "no threshold chosen on validation data (τ_val) was recorded."
    return {
        "lead": _lead(runs, meta),
        "lines": contour_lines(CONTOURS),
        "key_metrics": tables.key_metrics(runs),
        "notes": _missing_records(runs) + _note(without, no_threshold),
        "metric_tables": tables.metric_tables(runs),
        "plots": plots,
        "plots_missing": missing,
        "confusions": tables.confusions(runs),
        "size_tables": tables.size_tables(runs),
        "patients": tables.patient_table(runs),
        "screening": tables.screening(runs, prevalences),
        "lesion_free_images": meta["lesion_free_images"],
        **_gallery(gallery_data, runs, max_images, shown),
    }


def _classification(runs, max_images):
    """dict: the values of classification.html that not every page has."""
    meta = runs[0].results.meta
    classes, cancers = meta["classes"], meta["cancer_classes"]
    published = published_accuracy(runs[0].dataset, classes)
    shown = "their class and the probabilities that each model gives"
    return {
        "lead": _classification_lead(runs, meta),
        "lines": {},
        "classes": classes,
        "key_metrics": tables.class_key_metrics(runs, cancers),
        "notes": _missing_records(runs),
        "accuracy": tables.class_accuracy(runs, classes, published),
        "published_notes": [*REMARKS, f"Published: {CLASSIFICATION_CITATION}."]
        if published
        else [],
        "metric_tables": tables.class_metric_tables(runs, classes, cancers),
        "plots": _class_plots(runs),
        "confusions": tables.class_confusions(runs),
        "grad_cams": _grad_cams(runs),
        **_gallery(classification_gallery, runs, max_images, shown),
    }


def _plural(count, noun):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _lead(runs, meta):
    lead = f"{_plural(len(runs), 'model')} on {_plural(meta['images'], 'image')} with "
    lead += _plural(meta["lesions"], "lesion")
    if meta["patients"]:
        lead += f" of {_plural(meta['patients'], 'patient')}"
    if meta["lesion_free_images"]:
        lead += f"; {_plural(meta['lesion_free_images'], 'image')} without a lesion"
    return f"{lead}."


def _classification_lead(runs, meta):
    sizes = zip(meta["images_of_class"], meta["classes"], strict=True)
    lead = f"{_plural(len(runs), 'model')} on {meta['images']:,} images"
    if meta["patients"]:
        lead += f" of {meta['patients']:,} patients"
    return f"{lead}: {', '.join(f'{number:,} {name}' for number, name in sizes)}."


def _uncertainty(runs):
    """str: what the brackets are."""
    bootstraps = [run.metrics["meta"].get("bootstrap") for run in runs]
    known = [bootstrap for bootstrap in bootstraps if bootstrap]
    if not known:
        return "In percent. These evaluations recorded no intervals."
    return f"In percent. [95 % interval], by resampling {known[0]['unit']}s."


def _missing_records(runs):
    """list[str]: what older runs lack, and which record other values than they have."""
    notes = [remark for run in runs for remark in run.remarks]
    without = [run.name for run in runs if run.run is None]
    notes += _note(without, "no run.json was found, so its training is not documented.")
    without = [run.name for run in runs if not run.metrics["meta"].get("bootstrap")]
    return notes + _note(without, "evaluated without intervals.")


def _note(names, text):
    """list[str]: a note on some runs, none without one."""
    return [f"{', '.join(names)}: {text}"] if names else []


def _undefined_rows(runs):
    """list[list[str]]: metric, and the share of each run's resamples in which it is undefined."""
    shares = [run.metrics.get("undefined_shares") or {} for run in runs]
    names = dict.fromkeys(name for share in shares for name in share)
    return [[name, *(f"{100 * share.get(name, 0):.1f}" for share in shares)] for name in names]


def _gallery(make, runs, max_images, shown):
    """dict: gallery (None without the images), gallery_missing and gallery_lead of page.html."""
    try:
        gallery = make(runs, max_images)
    except FileNotFoundError as error:
        logger.warning(f"No gallery: {error}")
        return {"gallery": None, "gallery_missing": [f"No gallery: {error}"], "gallery_lead": ""}
    number, total = len(gallery["images"]), gallery["total"]
    which = f"All {total:,} test images"
    if number < total:
        which = f"{number:,} of {total:,} test images, half the worst and half spread over the rest"
    return {"gallery": gallery, "gallery_missing": [], "gallery_lead": f"{which}, with {shown}."}


def named_runs(runs: list[Run]) -> list[Run]:
    """The runs under their models' names, as in a comparison, where these are all different."""
    models = [run.model for run in runs]
    if any(run.labelled for run in runs) or len(set(models)) < len(models):
        return runs
    return [replace(run, name=run.model) for run in runs]


def check_runs(runs: list[Run]):
    """Raise ValueError for runs that cannot be on one page."""
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two runs have the name {name!r}: name them apart by NAME=RUN.")
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


UNKNOWN = "not recorded"
# These differ between any two runs.
PLACES = ("OUTPUT_DIR", "MODEL.WEIGHTS")


def facts(runs: list[Run], settings: dict) -> list[list[str]]:
    """
    Labels, each with a text per run; what is not known is "not recorded". ``settings`` are those
    of the split, from :func:`imrcnn_d2.report.cohort.cohort`.
    """
    columns = [_facts_of(run, settings) for run in runs]
    return [[label, *(column[label] for column in columns)] for label in columns[0]]


def _facts_of(run, settings):
    record, meta, config = run.run or {}, run.metrics["meta"], run.config or {}
    model = config.get("MODEL") or {}
    git = record.get("git") or {}
    revision = git.get("revision")
    if revision and git.get("dirty"):
        revision += ", with uncommitted changes"
    fold, chosen, bootstrap = run.fold, run.metrics.get("tau_val"), meta.get("bootstrap")
    versions = meta.get("versions") or record.get("versions") or {}
    texts = {
        "Model": record.get("model") or model.get("META_ARCHITECTURE"),
        "Backbone": run.backbone or (model.get("BACKBONE") or {}).get("NAME"),
        "Seed": run.seed if run.seed is not None else config.get("SEED"),
        "Fold": f"{fold['index']} of {fold['of']}" if fold else "none",
        "Iterations": record.get("iterations") or (config.get("SOLVER") or {}).get("MAX_ITER"),
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
    """The operating points, and what a hit is."""
    point, regions = None, "masks" if meta["iou_type"] == "segm" else "boxes"
    if chosen:
        point = f"{chosen['tau']:.3g} ({chosen.get('rule')}, on {chosen.get('dataset')})"
    return {
        "Score threshold τ": f"{meta['tau']:g}",
        "τ chosen on validation": point,
        "Hit": f"IoU ≥ {meta['iou_threshold']:g} of {regions}",
    }


def _training(record):
    if not record.get("finished"):
        return f"started {record['started']}, not finished" if record.get("started") else None
    hours = record.get("hours")
    return ("" if hours is None else f"{hours:.2f} h, ") + f"finished {record['finished']}"


def _short(sha256):
    return sha256 and f"{sha256[:16]}…"


def config_differences(runs: list[Run]) -> list[list[str]]:
    """Keys with their values in each run, where not all configurations agree."""
    if any(run.config is None for run in runs):
        return []
    flat = [flat_config(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config if key not in PLACES)
    rows = [[key, *(str(config.get(key, "not set")) for config in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def configs(runs: list[Run]) -> list[tuple[str, str]]:
    """Each run's name and its whole configuration, "" where unknown."""
    return [(run.name, yaml.safe_dump(run.config) if run.config else "") for run in runs]


def contour_lines(contours: dict[str, tuple[str, str]]) -> dict[str, dict]:
    """
    ``lines`` of head.html: class in the page -> label and style in CSS, of kind of contour and
    label by class.
    """
    lines = {}
    for name, (kind, label) in contours.items():
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


def curve_plots(runs: list[Run]) -> tuple[list[dict], list[str]]:
    """
    The curves of detectors: plots, with title, caption, alt, source (a data URL), width and height
    in pixels; and why some are missing.
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
    measures = {name: scored.metrics for name, scored in results.items()}
    curves = _pr_curves(results)
    plots = [
        _plot(
            "Precision and recall",
            "Thick: the envelope, whose area is AP50_voc. Diamond: break-even point.",
            {name: 100 * curve.area for name, curve in curves.items()},
            "area under the precision-recall curve in percent",
            as_data(plot_pr_curves, curves, **tau),
        ),
        _plot(
            "Free-response ROC",
            "Lesions found against false alarms per image. Mean: of the seven marked rates.",
            {name: scored.froc["mean"] for name, scored in results.items()},
            "mean sensitivity in percent",
            as_data(plot_froc, {name: scored.froc for name, scored in measures.items()}, **tau),
        ),
    ]
    positive = runs[0].results.counts.positive
    if positive.any() and not positive.all():
        counts = {name: scored.counts for name, scored in results.items()}
        plots.append(
            _plot(
                "ROC of images",
                "An image’s score is that of its highest detection, 0 without one.",
                {name: scored.image["auroc"] for name, scored in results.items()},
                "area under the ROC curve in percent",
                as_data(plot_roc_curves, counts, **tau),
            )
        )
    else:
        kind = "without" if positive.any() else "with"
        missing.append(f"No ROC curve: the test set has no image {kind} a lesion.")
    calibrations = {name: scored.calibration for name, scored in measures.items()}
    thresholds = {name: scored.thresholds for name, scored in results.items()}
    plots += [
        _plot(
            "Calibration",
            "Do 80 % of the detections scored 0.8 hit a lesion? Below: how many there are.",
            {name: scored.calibration["ece"] for name, scored in results.items()},
            "expected calibration error in percent",
            as_data(plot_calibration, calibrations),
        ),
        _plot(
            "Metrics over the threshold",
            "To look at. A threshold that is chosen here is no longer tested by these data.",
            {},
            "precision, recall, F1 and specificity at score thresholds from 0.05 to 0.95",
            as_data(plot_thresholds, thresholds, **tau),
        ),
    ]
    return plots, missing


def _pr_curves(results):
    """{name: PRCurve}: one per run, or one for each of its classes."""
    curves = {}
    for run, scored in results.items():
        kind = "segm" if any(kind == "segm" for kind, _, _ in scored.curves) else "bbox"
        of_kind = [(name, curve) for k, name, curve in scored.curves if k == kind]
        for name, curve in of_kind:
            if curve.num_gt and len(curve.score):
                curves[run if len(of_kind) == 1 else f"{run}, {name}"] = curve
    return curves


def _class_plots(runs):
    results = {run.name: run.results for run in runs}
    calibrations = {name: scored.metrics.calibration for name, scored in results.items()}
    return [
        _plot(
            "ROC of each class",
            "Each class against all others. Dot: where the highest probability decides.",
            {name: scored.recognition["auroc"] for name, scored in results.items()},
            "area under the ROC curve in percent, mean of the classes",
            as_data(plot_class_roc, results),
        ),
        _plot(
            "Calibration",
            "Are 80 % of the images predicted with a probability of 0.8 predicted rightly?",
            {name: scored.calibration["ece"] for name, scored in results.items()},
            "expected calibration error in percent",
            as_data(plot_calibration, calibrations, of=("Right", "Images")),
        ),
    ]


def _plot(title, caption, values, meaning, data):
    """A plot as of :func:`curve_plots`; ``values`` by model, and their meaning, go into its alt."""
    known = "; ".join(f"{name}: {v:.1f}" for name, v in values.items() if not math.isnan(v))
    alt = f"{title}: {meaning}{f'. {known}' if known else ''}."
    return {"title": title, "caption": caption, "alt": alt, **data}


def as_data(draw: Callable[..., Figure], *args, **kwargs) -> dict:
    """What a function that plots to a path would write, as a data URL with width and height."""
    # Text as text, not as paths: smaller, and sharp at any size.
    with tempfile.TemporaryDirectory() as folder, rc_context({"svg.fonttype": "none"}):
        path = Path(folder) / "plot.svg"
        figure = draw(*args, path, **kwargs)
        content = base64.b64encode(path.read_bytes()).decode()
    width, height = (round(96 * inches) for inches in figure.get_size_inches())  # CSS pixels
    return {"source": f"data:image/svg+xml;base64,{content}", "width": width, "height": height}


GRAD_CAM = "grad_cam.png"  # next to metrics.json


def _grad_cams(runs):
    """list[dict]: run's name and its Grad-CAM plot, of runs that have one."""
    plots = []
    for run in runs:
        if (run.folder / GRAD_CAM).is_file():
            path = image_inside(run.folder, GRAD_CAM, run.folder)
            jpeg, (width, height), _ = embed(path, long_side=1600)
            plots.append({"name": run.name, "jpeg": jpeg, "width": width, "height": height})
    return plots


def write_html(name: str, output: str | Path, *, scripts: Sequence[str] = (), **values) -> Path:
    """
    Write templates/<name>.html, with report.css.

    Args:
        output: the page to write; replaced at once, or not at all.
        scripts: files in templates/ that the page runs, and no others.
        values: the template's variables: for head.html ``title``, ``lead`` and ``lines``, for
            footer.html ``sources``.
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
    # The page runs this script and no other, whatever its data say.
    digest = hashlib.sha256(script.encode()).digest()
    page = environment.get_template(f"{name}.html").render(
        css=Markup(css),
        script=script,
        script_hash=f"sha256-{base64.b64encode(digest).decode()}",
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=metadata.version("imrcnn-d2"),
        **values,
    )
    write_atomically(output, page)
    return Path(output)
