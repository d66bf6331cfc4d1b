"""The report: one HTML page that needs nothing else, from one run or several."""

import base64
import hashlib
import io
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path, PurePath

import cv2
import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from imrcnn_d2 import __version__
from imrcnn_d2.data.images import image_inside, read_image
from imrcnn_d2.evaluation.subgroups import By, group_values, with_groups
from imrcnn_d2.report.cohort import cohort, is_external, patients_text
from imrcnn_d2.report.comparison.models import check_settings, check_test_sets
from imrcnn_d2.report.html import tables
from imrcnn_d2.report.names import CLASSIFICATION_CITATION, REMARKS, published_accuracy
from imrcnn_d2.report.plots import curves, images
from imrcnn_d2.report.runs import Run
from imrcnn_d2.report.tables import plural
from imrcnn_d2.task import CLASSIFICATION
from imrcnn_d2.utils.files import write_atomically
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)


def render_report(
    runs: list[Run],
    output: str | Path,
    *,
    prevalences: Sequence[float] = (0.005, 0.05),
    max_images: int = 300,
) -> Path:
    """Write the page of detectors or classifiers, runs on one test set with the same settings; with
    PPV and NPV at the prevalences. The gallery of a larger test set than ``max_images`` has the
    worst images and an even choice of the rest.

    Raises:
        FileNotFoundError: ground truth or predictions are gone.
        ValueError: different test sets or settings, a name twice, a prevalence outside (0, 1).
    """
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two runs have the name {name!r}: name them apart by NAME=RUN.")
    check_test_sets(runs)
    check_settings(runs)
    runs = _named_runs(runs)
    data = cohort(runs[0])
    data["notes"] += filter(None, (of_training(run, data) for run in runs))
    known, unknown = known_facts(facts(runs, data["settings"]))
    classifiers = runs[0].task is CLASSIFICATION
    bootstraps = [run.metrics["meta"].get("bootstrap") for run in runs]
    if classifiers:
        name, sections = "classification", _classification(runs, max_images)
    else:
        name, sections = "detection", _detection(runs, prevalences, max_images)
    return write_html(
        name,
        output,
        scripts=("gallery.js", f"{name}.js"),
        title=runs[0].test_set,
        with_lesions=not classifiers,
        run_names=[run.name for run in runs],
        facts=known,
        unknown=unknown,
        config_differences=config_differences(runs),
        configs=[(run.name, yaml.safe_dump(run.config) if run.config else "") for run in runs],
        cohort=data,
        sources=", ".join(str(run.folder) for run in runs),
        units=runs[0].results.metrics.units if any(bootstraps) else None,
        remarks=[remark for run in runs for remark in run.remarks],
        undocumented=_names(runs, lambda run: not run.record),
        without_config=_names(runs, lambda run: not run.config),
        without_intervals=_names(runs, lambda run: not run.metrics["meta"].get("bootstrap")),
        comparison=tables.differences(runs),
        undefined=_undefined_rows(runs),
        **sections,
    )


def of_training(run: Run, data: dict) -> str | None:
    """A note on a run and its `cohort`, where the training part of the data set need not be what
    the model was trained on."""
    training = next((split for split in data["splits"] if split["name"] == "Training"), None)
    if not training or not training["images"]:
        return None
    external = is_external(run, data["settings"])
    if external:
        return f"{run.name} was not trained on this training part, but on another data set."
    if external is None and not run.record:
        return f"Whether {run.name} was trained on this training part is not recorded."
    return None


# Class in the page of each kind of contour, with its label.
CONTOURS = {
    "truth": ("ground truth", "ground truth"),
    "hit": ("hit", "hit: a detection that meets a lesion"),
    "missed": ("missed lesion", "missed lesion"),
    "alarm": ("false alarm", "false alarm"),
}


def _detection(runs, prevalences, max_images):
    """The values of detection.html that not every page has."""
    meta = runs[0].results.meta
    lead = f"{_sizes(runs)}, with {plural(meta['lesions'], 'lesion')}"
    if meta["lesion_free_images"]:
        lead += f"; {plural(meta['lesion_free_images'], 'image')} without a lesion"
    shown = f"the ground truth and each model’s detections ({tables.at_threshold(runs)})"
    gallery = _gallery_section(lesion_gallery, runs, max_images, shown)  # its errors first
    return {
        "lead": f"{lead}.",
        "lines": contour_lines(CONTOURS),
        "key_metrics": tables.key_metrics(runs),
        "key_threshold": tables.key_threshold(runs),
        "mapped": any(run.maps_scores for run in runs),
        "without_map": _names(runs, lambda r: r.results.detections.scored and not r.maps_scores),
        "without_threshold": _names(runs, lambda run: not run.metrics.get("tau_val")),
        "metric_tables": tables.metric_tables(runs),
        "paired": any(run.metrics.get("tau_val") for run in runs),
        "plots": curve_plots(runs),
        "unscored": _names(runs, lambda run: not run.results.detections.scored),
        "has_lesions": bool(runs[0].results.counts.positive.any()),
        "confusions": tables.confusions(runs, with_threshold=True),
        "size_tables": tables.size_tables(runs),
        "patients": tables.patient_table(runs),
        "patients_text": patients_text(runs[0].results.ground_truth.images),
        "screening": tables.screening(runs, prevalences),
        "centre_tables": _centre_tables(runs),
        "lesion_free_images": meta["lesion_free_images"],
        **gallery,
    }


def _centre_tables(runs):
    """The metrics of each centre, one table per run, where images are of several."""
    truth, by = runs[0].results.ground_truth, By("centre", each=True)
    if len(_centres(truth.images)) < 2:
        return []
    try:
        group_values(truth, by)
    except ValueError as error:  # too many, or a column of that name that is none to group by
        logger.warning(f"Nothing by centre: {error}")
        return []
    return [
        tables.centre_table(run, with_groups(run.results, [by], **run.resampled)) for run in runs
    ]


def _centres(records):
    """Names of the centres of images, or of the gallery's."""
    return sorted({str(record["centre"]) for record in records if record.get("centre") is not None})


def _classification(runs, max_images):
    """The values of classification.html that not every page has."""
    meta = runs[0].results.meta
    classes, cancers = meta["classes"], meta["cancer_classes"]
    published = published_accuracy(runs[0].dataset, classes)
    sizes = zip(meta["images_of_class"], classes, strict=True)
    notes = [*REMARKS, f"Published: {CLASSIFICATION_CITATION}."] if published else []
    shown = "their class and the probabilities that each model gives"
    gallery = _gallery_section(classification_gallery, runs, max_images, shown)
    return {
        "lead": f"{_sizes(runs)}: {', '.join(f'{number:,} {name}' for number, name in sizes)}.",
        "lines": {},
        "classes": classes,
        "key_metrics": tables.class_key_metrics(runs, cancers),
        "without_threshold": "",
        "accuracy": tables.class_accuracy(runs, classes, published),
        "published_notes": notes,
        "metric_tables": tables.class_metric_tables(runs, classes, cancers),
        "paired": False,
        "plots": _class_plots(runs),
        "confusions": tables.confusions(runs),
        "grad_cams": grad_cams(runs),
        **gallery,
    }


def _sizes(runs):
    results = runs[0].results
    text = f"{plural(len(runs), 'model')} on {plural(results.meta['images'], 'image')}"
    return f"{text} of {results.metrics.units}" if results.meta["patients"] else text


def _names(runs, condition):
    return ", ".join(run.name for run in runs if condition(run))


def _undefined_rows(runs):
    """Metric, and the share of each run's resamples in which it is undefined."""
    shares = [run.metrics.get("undefined_shares") or {} for run in runs]
    names = dict.fromkeys(name for share in shares for name in share)
    return [[name, *(f"{100 * share.get(name, 0):.1f}" for share in shares)] for name in names]


def _named_runs(runs):
    """The runs under their models' names, as in a comparison, where these are all different."""
    models = [run.model for run in runs]
    if any(run.labelled for run in runs) or len(set(models)) < len(models):
        return runs
    return [replace(run, name=run.model) for run in runs]


UNKNOWN = "not recorded"
# These differ between any two runs.
PLACES = ("OUTPUT_DIR", "MODEL.WEIGHTS")


def facts(runs: list[Run], settings: dict) -> list[list[str]]:
    """Labels, each with a text per run; what is not known is "not recorded". ``settings`` are those
    of the split, see `cohort`.
    """
    columns = [_facts_of(run, settings) for run in runs]
    labels = dict.fromkeys(label for column in columns for label in column)
    return [[label, *(column.get(label, "–") for column in columns)] for label in labels]


def known_facts(rows: list[list[str]]) -> tuple[list[list[str]], str]:
    """The `facts` that are known of some run, and the labels of all others as text."""
    known = [row for row in rows if set(row[1:]) != {UNKNOWN}]
    return known, "; ".join(row[0].lower() for row in rows if row not in known)


def _facts_of(run, split):
    record, meta, predictions = run.record, run.metrics["meta"], run.predictions
    git, bootstrap, fold = record.get("git") or {}, meta.get("bootstrap"), None
    if run.fold:
        fold = f"{run.fold['index']} of {run.fold['of']}"
    elif "fold" in split:
        fold = f"{split['fold']} of {split.get('folds', '?')}"
    elif record:
        fold = "none"
    revision = git.get("revision")
    if revision and git.get("dirty"):
        revision += ", with uncommitted changes"
    intervals = "none"
    if bootstrap:
        intervals = "over {unit}s; {resamples:,} resamples, seed {seed}".format(**bootstrap)
    versions = meta.get("versions") or record.get("versions") or {}
    checkpoint = meta.get("checkpoint")
    # Without a run.json a config may be that of an evaluation: its seed and iterations say nothing.
    texts = {
        "Model": run.architecture,
        "Backbone": run.backbone,
        "Seed": run.seed,
        "Fold": fold,
        "Iterations": record.get("iterations") or meta.get("iterations"),
        "Training": _training(record),
        "Device": record.get("device"),
        "Precision": record.get("precision"),
        "Command": record.get("command"),
        "Code revision": revision,
        "Config, sha256": _short(record.get("config_sha256") or predictions.get("config_sha256")),
        "Weights": checkpoint and PurePath(checkpoint).name,
        "Weights, sha256": _short(run.weights_sha256),
        **(_prediction(predictions) if predictions else {}),
        "Data set": run.test_set,
        "Ground truth, sha256": _short(meta.get("gt_sha256")),
        "Split, sha256": _short(record.get("splits_sha256") or split.get("sha256")),
        **(_steps(run) if run.task is CLASSIFICATION else _thresholds(run)),
        "Intervals": intervals,
        "Versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
    }
    return {label: UNKNOWN if text in (None, "") else str(text) for label, text in texts.items()}


def _steps(run):
    """How a classifier was trained."""
    record = run.record
    size = (record.get("input") or {}).get("size")
    steps = [
        f"{phase['name']}: {phase['trainable']} for {phase['iterations']} iterations at a rate of "
        f"{phase['lr']:g}"
        for phase in record.get("phases") or ()
    ]
    texts = {"Images as": size and f"{size} × {size} pixels", "Steps": "; ".join(steps)}
    if score_map := run.meta.get("score_map"):
        texts["Temperature"] = "{temperature:.3g}".format(**score_map)
        if dataset := score_map.get("dataset"):
            texts["Temperature"] += f", fitted on {dataset}"
    return texts


def _thresholds(run):
    """The operating points, and what a hit is."""
    meta, chosen, point = run.metrics["meta"], run.metrics.get("tau_val"), None
    if chosen:
        point = f"{chosen['tau']:.3g} ({chosen.get('rule')}, on {chosen.get('dataset')})"
        if chosen.get("suppress_parts"):
            point += "; detections mostly inside a higher-scored one are left out"
    regions = "masks" if meta["iou_type"] == "segm" else "boxes"
    text = None if run.maps_scores else "none: scores are as the network gives them"
    if score_map := meta.get("score_map") or run.predictions.get("score_map"):
        text = "σ({slope:.3g} · logit(score) {sign} {size:.3g})".format(
            sign="−" if score_map["offset"] < 0 else "+",
            size=abs(score_map["offset"]),
            **score_map,
        )
        if dataset := score_map.get("dataset"):
            text += f", fitted on {dataset}"
    return {
        "Map of scores": text,
        "Score threshold τ": f"{meta['tau']:.3g}" + " of the mapped score" * run.maps_scores,
        "τ chosen on validation": point,
        "Hit": f"IoU ≥ {meta['iou_threshold']:g} of {regions}",
    }


def _prediction(info):
    """How the model predicted, as a predictions.json says."""
    version, tau = info.get("version"), info.get("tau")
    return {
        "Runtime": ", ".join(info[key] for key in ("runtime", "precision") if info.get(key)),
        "Predicted with": version and f"imrcnn-d2 {version}",
        "τ of the predictions": None if tau is None else f"{tau:.3g}",
    }


def _training(record):
    if not record.get("finished"):
        return f"started {record['started']}, not finished" if record.get("started") else None
    hours = record.get("hours")
    return ("" if hours is None else f"{hours:.2f} h, ") + f"finished {record['finished']}"


def _short(sha256):
    return sha256 and f"{sha256[:16]}…"


def config_differences(runs):
    """Keys with their values in each run, where not all configurations agree."""
    if not all(run.config for run in runs):
        return []
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in PLACES)
    rows = [[key, *(str(run.settings.get(key, "not set")) for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def contour_lines(contours: dict[str, tuple[str, str]]) -> dict[str, dict]:
    """``lines`` of head.html: class in the page -> label and style in CSS, of kind of contour and
    label by class.
    """
    lines = {}
    for name, (kind, label) in contours.items():
        style, dash = images.CONTOUR_STYLES[kind], "none"
        if style["linestyle"] != "-":  # matplotlib's dashes are in line widths
            dash = " ".join(f"{part * style['linewidth']:.1f}" for part in style["linestyle"][1])
        lines[name] = {"label": label, "dash": dash, "halo": images.HALO_WIDTH}
        lines[name] |= {"color": style["color"], "width": style["linewidth"]}
    return lines


def curve_plots(runs: list[Run]) -> dict[str, dict]:
    """The curves of detectors with scores, by name, as of `_plot`; "roc" where some images have a
    lesion and some have none.
    """
    results = {run.name: run.results for run in runs if run.results.detections.scored}
    if not results:
        return {}
    at = {"tau": runs[0].meta["tau"], "mapped": all(run.maps_scores for run in runs)}
    pr_curves = _pr_curves(results)

    def of_each(value):
        return {name: value(scored) for name, scored in results.items()}

    froc = of_each(lambda scored: scored.metrics.froc)
    areas = {name: 100 * curve.area for name, curve in pr_curves.items()}
    plots = {
        "pr": _plot(areas, curves.plot_pr_panels, {curves.PR_TITLE: pr_curves}, **at),
        "froc": _plot(of_each(lambda scored: scored.froc["mean"]), curves.plot_froc, froc, **at),
        "calibration": _calibration_plot(results),
        "thresholds": _plot({}, curves.plot_thresholds, of_each(lambda s: s.thresholds), **at),
    }
    positive = runs[0].results.counts.positive
    if positive.any() and not positive.all():
        areas, counts = of_each(lambda s: s.image["auroc"]), of_each(lambda s: s.counts)
        plots["roc"] = _plot(areas, curves.plot_roc_curves, counts, **at)
    return plots


def _pr_curves(results):
    """The PRCurve of each run, or of each of its classes."""
    pr_curves = {}
    for run, scored in results.items():
        kind = "segm" if any(kind == "segm" for kind, _, _ in scored.curves) else "bbox"
        of_kind = [(name, curve) for k, name, curve in scored.curves if k == kind]
        for name, curve in of_kind:
            if curve.num_gt and len(curve.score):
                pr_curves[run if len(of_kind) == 1 else f"{run}, {name}"] = curve
    return pr_curves


def _class_plots(runs):
    results = {run.name: run.results for run in runs}
    areas = {name: scored.recognition["auroc"] for name, scored in results.items()}
    return {
        "roc": _plot(areas, curves.plot_class_roc, results),
        "calibration": _calibration_plot(results, labels=("Right", "Images")),
    }


def _calibration_plot(results, **options):
    calibration = curves.reliability(results)
    errors = {name: scores.values()["ece"] for name, scores in calibration.items()}
    return _plot(errors, curves.plot_calibration, calibration, **options)


def _plot(values, plot, *args, **kwargs):
    """A plot as data, and the values of the models as text."""
    known = [f"{name}: {value:.1f}" for name, value in values.items() if not math.isnan(value)]
    return {"known": "; ".join(known), **as_data(plot, *args, **kwargs)}


def as_data(plot: Callable[..., Figure], *args, **kwargs) -> dict:
    """What a function that plots to a path would write, as a data URL with width and height."""
    # Text as text, not as paths: smaller, and sharp at any size.
    with tempfile.TemporaryDirectory() as folder, rc_context({"svg.fonttype": "none"}):
        path = Path(folder) / "plot.svg"
        figure = plot(*args, path, **kwargs)
        content = base64.b64encode(path.read_bytes()).decode()
    width, height = (round(96 * inches) for inches in figure.get_size_inches())  # CSS pixels
    return {"source": f"data:image/svg+xml;base64,{content}", "width": width, "height": height}


GRAD_CAM = "grad_cam.png"  # next to metrics.json


def grad_cams(runs: list[Run]) -> list[dict]:
    """The Grad-CAM plots, of runs that have one."""
    plots = []
    for run in runs:
        if (run.folder / GRAD_CAM).is_file():
            path = image_inside(run.folder, GRAD_CAM, run.folder)
            jpeg, (width, height), _ = embed(path, long_side=1600)
            plots.append({"name": run.name, "jpeg": jpeg, "width": width, "height": height})
    return plots


LONG_SIDE = 512  # pixels of an embedded image
QUALITY = 82  # of its JPEG
CLOSENESS = 0.5  # pixels of the embedded image that a contour may be off


def _gallery_section(make, runs, max_images, shown):
    """gallery (None without the images) and its centres, gallery_missing and gallery_lead of
    page.html."""
    try:
        gallery = make(runs, max_images)
    except FileNotFoundError as error:
        logger.warning(f"No gallery: {error}")
        missing = [f"No gallery: {error}"]
        return {"gallery": None, "centres": [], "gallery_missing": missing, "gallery_lead": ""}
    number, total = len(gallery["images"]), gallery["total"]
    which = f"All {total:,} test images"
    if number < total:
        which = f"{number:,} of {total:,} test images, half the worst and half spread over the rest"
    lead, centres = f"{which}, with {shown}.", _centres(gallery["images"])
    return {"gallery": gallery, "centres": centres, "gallery_missing": [], "gallery_lead": lead}


def lesion_gallery(runs: list[Run], max_images: int = 300) -> dict:
    """The gallery of detectors on one test set, as JSON values; see `_gallery` and `_outcome`.

    ``overlap`` is "IoU", or "box IoU" where a model gives no masks. Each image also has ``truth``,
    an SVG path for each lesion, and ``runs``, the outcome of each model. In the paths, whole
    numbers are the centres of the original's pixels.

    Raises:
        FileNotFoundError: one of the images does not exist.
        BadInputError: one of them cannot be read, or lies outside the images' folder.
    """
    results = [run.results for run in runs]
    truth = results[0].ground_truth
    rows = list(zip(*(scored.per_image for scored in results), strict=True))
    masks = all(scored.meta["iou_type"] == "segm" for scored in results)

    def describe(position, scale):
        lesions = np.flatnonzero((truth.regions.image == position) & ~truth.crowd).tolist()
        outcomes = [
            _outcome(scored, row, position, lesions, scale, "union_iou" if masks else "iou_box")
            for scored, row in zip(results, rows[position], strict=True)
        ]
        return {"truth": [_path(truth.regions, [k], scale) for k in lesions], "runs": outcomes}

    positions = sorted(images.choose_images(rows, max_images))
    return {"overlap": "IoU" if masks else "box IoU", **_gallery(runs, positions, describe)}


def _outcome(results, row, position, lesions, scale, overlap):
    """Lesions and detections of one model in an image; ``iou`` is of all detections with all
    lesions, ``missed`` holds positions in ``lesions``, ``hits`` and ``alarms`` are SVG paths.
    """
    kinds = {kind: pair for kind, *pair in images.regions_by_kind(results, position)}
    iou = row[overlap]
    return {
        **{"tp": row["TP"], "fp": row["FP"], "fn": row["FN"]},
        "score": None if math.isnan(row["score"]) else round(row["score"], 4),
        "iou": None if math.isnan(iou) else round(iou, 2),
        "missed": [lesions.index(lesion) for lesion in kinds["missed lesion"][1].tolist()],
        "hits": _path(*kinds["hit"], scale),
        "alarms": _path(*kinds["false alarm"], scale),
    }


def classification_gallery(runs: list[Run], max_images: int = 300) -> dict:
    """The gallery of classifiers on one test set, as `lesion_gallery` but with ``classes`` and, for
    each image, ``label`` (position in ``classes``) and ``scores``, for each model the probabilities
    of the classes. Of a larger test set half of the images are those whose class got the lowest
    probability, the others are spread evenly over the rest.
    """
    truth = runs[0].results.ground_truth
    scores = np.stack([run.results.probability for run in runs], axis=1)
    of_truth = scores[np.arange(len(scores)), :, truth.label].mean(axis=1)
    order = np.argsort(of_truth, kind="stable")
    if len(order) > max_images:
        worst = (max_images + 1) // 2
        rest = np.linspace(worst, len(order) - 1, max_images - worst).round().astype(int)
        order = order[[*range(worst), *rest]]

    def describe(position, scale):
        label, probabilities = truth.label[position], scores[position]
        return {"label": int(label), "scores": probabilities.round(4).tolist()}

    return {"classes": truth.classes, **_gallery(runs, sorted(order.tolist()), describe)}


def _gallery(runs, positions, describe):
    """What both galleries hold; ``describe(position, scale)`` gives the rest of an image."""
    records, root, shown = runs[0].results.ground_truth.images, runs[0].image_root, []
    for position in tqdm(positions, desc="Gallery", delay=2):
        record = records[position]
        path = image_inside(root, record.get("file_name"), runs[0].gt_path)
        jpeg, (width, height), scale = embed(path)
        patient = record.get("patient_id")
        image = {"name": record["file_name"], "patient": None if patient is None else str(patient)}
        image["centre"] = None if record.get("centre") is None else str(record["centre"])
        image |= {"width": width, "height": height, "jpeg": jpeg}
        shown.append(image | describe(position, scale))
    return {"runs": [run.name for run in runs], "total": len(records), "images": shown}


def embed(path: Path, long_side: int = LONG_SIDE) -> tuple[str, tuple[int, int], float]:
    """Base64 of an image as a JPEG of at most ``long_side`` pixels, upright; width and height of
    the original, and original pixels per pixel of the JPEG.
    """
    image = Image.fromarray(read_image(path))
    size = image.size
    image.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode(), size, max(size) / max(image.size)


def _path(regions, rows, scale):
    return svg_path([line for row in rows for line in images.region_contours(regions, row)], scale)


def svg_path(lines: list[np.ndarray], scale: float) -> str:
    """One SVG path of closed lines, see `region_contours`; ``scale``: original pixels per pixel of
    the image that they are shown on.
    """
    parts = []
    for line in lines:
        corners = line[:-1].astype(np.float32)
        kept = cv2.approxPolyDP(corners[:, None], CLOSENESS * scale, closed=True)[:, 0]
        points = "L".join(f"{x:.4g},{y:.4g}" for x, y in kept.tolist())
        parts.append(f"M{points}Z")
    return "".join(parts)


def template_environment(folder: Path | None = None, **options) -> jinja2.Environment:
    """Jinja with the templates of this package, or of a folder."""
    package = jinja2.PackageLoader("imrcnn_d2.report.html")
    loader = jinja2.FileSystemLoader(folder) if folder else package
    options |= {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(loader=loader, **options)


def write_html(name: str, output: str | Path, *, scripts: Sequence[str] = (), **values) -> Path:
    """Write templates/<name>.html with report.css and those ``scripts`` in templates/ that the page
    runs. ``values`` are the template's variables: for head.html ``title``, ``lead`` and ``lines``,
    for footer.html ``sources``.
    """
    environment = template_environment(autoescape=True)
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
        version=__version__,
        **values,
    )
    write_atomically(output, page)
    return Path(output)
