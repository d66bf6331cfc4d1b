"""A model card in Markdown: what a run itself can say about its model."""

from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import jinja2

from imrcnn_d2.evaluation.output import read_test_log
from imrcnn_d2.report.cohort import cohort
from imrcnn_d2.report.html.page import UNKNOWN, facts
from imrcnn_d2.report.html.tables import (
    CURVE_METRICS,
    IMAGE_METRICS,
    LESION_METRICS,
    UNIT_TITLES,
    cell,
)
from imrcnn_d2.report.runs import Run
from imrcnn_d2.report.tables import markdown_text
from imrcnn_d2.utils.files import write_atomically

__all__ = ["CLAIM", "TRIPOD_AI", "write_model_card"]


CLAIM = {
    "1": "Identification as a study of AI methodology, specifying the category of technology used",
    "2": "Summary of study design, methods, results, and conclusions",
    "3": "Scientific and/or clinical background, including the intended use and role of the AI "
    "approach",
    "4": "Study aims, objectives, and hypotheses",
    "5": "Prospective or retrospective study",
    "6": "Study goal",
    "7": "Data sources",
    "8": "Inclusion and exclusion criteria",
    "9": "Data preprocessing",
    "10": "Selection of data subsets",
    "11": "De-identification methods",
    "12": "How missing data were handled",
    "13": "Image acquisition protocol",
    "14": "Definition of method(s) used to obtain reference standard",
    "15": "Rationale for choosing the reference standard",
    "16": "Source of reference standard annotations",
    "17": "Annotation of test set",
    "18": "Measures of inter- and intrarater variability of features described by the annotators",
    "19": "How data were assigned to partitions",
    "20": "Level at which partitions are disjoint",
    "21": "Intended sample size",
    "22": "Detailed description of model",
    "23": "Software libraries, frameworks, and packages",
    "24": "Initialization of model parameters",
    "25": "Details of training approach",
    "26": "Method of selecting the final model",
    "27": "Ensembling techniques",
    "28": "Metrics of model performance",
    "29": "Statistical measures of significance and uncertainty",
    "30": "Robustness or sensitivity analysis",
    "31": "Methods for explainability or interpretability",
    "32": "Evaluation on internal data",
    "33": "Testing on external data",
    "34": "Clinical trial registration",
    "35": "Numbers of patients or examinations included and excluded",
    "36": "Demographic and clinical characteristics of cases in each partition",
    "37": "Performance metrics and measures of statistical uncertainty",
    "38": "Estimates of diagnostic performance and their precision",
    "39": "Failure analysis of incorrectly classified cases",
    "40": "Study limitations",
    "41": "Implications for practice, including intended use and/or clinical role",
    "42": "Reference to the full study protocol or to additional technical details",
    "43": "Statement about the availability of software, trained model, and/or data",
    "44": "Sources of funding and other support; role of funders",
}

TRIPOD_AI = {
    "1": "Title: development or evaluation, target population, outcome",
    "2": "Abstract (see TRIPOD+AI for Abstracts)",
    "3a": "Healthcare context and rationale, existing models",
    "3b": "Target population, intended purpose in the care pathway, intended users",
    "3c": "Known health inequalities between sociodemographic groups",
    "4": "Study objectives: development, validation or both",
    "5a": "Sources of data for development and evaluation, rationale, representativeness",
    "5b": "Dates of the collected participant data",
    "6a": "Study setting, number and location of centres",
    "6b": "Eligibility criteria for participants",
    "6c": "Treatments received and how they were handled",
    "7": "Data pre-processing and quality checking",
    "8a": "Definition of the outcome, how and when assessed, rationale",
    "8b": "Qualifications and characteristics of the outcome assessors",
    "8c": "Actions to blind assessment of the outcome",
    "9a": "Choice of initial predictors",
    "9b": "Definition of all predictors, how and when measured",
    "9c": "Qualifications and characteristics of the predictor assessors",
    "10": "How the study size was arrived at, for development and evaluation",
    "11": "How missing data were handled, reasons for omitting data",
    "12a": "How the data were used in the analysis, partitioning",
    "12b": "How predictors were handled in the analyses",
    "12c": "Type of model, rationale, model-building steps, tuning, internal validation",
    "12d": "Heterogeneity of performance across clusters",
    "12e": "Measures and plots used to evaluate performance and to compare models",
    "12f": "Model updating arising from the evaluation",
    "12g": "How the model predictions were calculated",
    "13": "Class imbalance methods",
    "14": "Approaches to address model fairness",
    "15": "Output of the model, how thresholds were identified",
    "16": "Differences between development and evaluation data",
    "17": "Ethical approval and informed consent",
    "18a": "Funding and role of the funders",
    "18b": "Conflicts of interest",
    "18c": "Where the study protocol can be accessed",
    "18d": "Registration of the study",
    "18e": "Availability of the study data",
    "18f": "Availability of the analytical code",
    "19": "Patient and public involvement",
    "20a": "Flow of participants, numbers with and without the outcome",
    "20b": "Characteristics overall and for each data source or setting",
    "20c": "Comparison of evaluation with development data",
    "21": "Number of participants and outcome events in each analysis",
    "22": "Details of the full model that allow predictions in new individuals",
    "23a": "Performance with confidence intervals, including key subgroups",
    "23b": "Heterogeneity of performance across clusters, if examined",
    "24": "Results of model updating",
    "25": "Overall interpretation, including fairness",
    "26": "Limitations",
    "27a": "How poor quality or unavailable input should be assessed and handled",
    "27b": "Whether users must interact, and their expertise",
    "27c": "Next steps for research, applicability and generalisability",
}


CLAIM_SOURCE = (
    "Checklist for Artificial Intelligence in Medical Imaging, 2024 update "
    "([doi 10.1148/ryai.240300](https://doi.org/10.1148/ryai.240300))."
)
TRIPOD_SOURCE = (
    "Collins et al., BMJ 2024 ([doi 10.1136/bmj-2023-078378]"
    "(https://doi.org/10.1136/bmj-2023-078378)), items shortened."
)


def write_model_card(run: Run, path: str | Path) -> Path:
    """
    Write the model card, a Markdown file; replaced at once, or not at all.

    Raises:
        FileNotFoundError: ground truth or detections are gone.
        ValueError: they are not the files that were scored, or a file of the data set is damaged.
    """
    people, log = cohort(run), read_test_log(run.gt_path)
    known = {row[0]: row[1] for row in facts([run], people["settings"])}
    answers = _answers(run, people, known)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imrcnn_d2.report.html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # it is no HTML; all of data goes through "plain"
    )
    environment.filters["plain"] = markdown_text
    card = environment.get_template("model_card.md").render(
        name=run.name,
        dataset=run.dataset or run.gt_path.name,
        folder=run.folder,
        facts=known.items(),
        cohort=people,
        groups=_groups(run),
        intervals=_intervals(run),
        limits=_limits(run, people),
        log=log,
        looks=_looks(log),
        checklists=[
            (
                title,
                source,
                [(item, text, answers[title].get(item)) for item, text in items.items()],
            )
            for title, source, items in (
                ("CLAIM", CLAIM_SOURCE, CLAIM),
                ("TRIPOD+AI", TRIPOD_SOURCE, TRIPOD_AI),
            )
        ],
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        version=metadata.version("imrcnn-d2"),
    )
    write_atomically(path, card)
    return Path(path)


def _groups(run):
    curve = run.metrics.get("segm") or {}
    if curve.get("AP50_voc") is None:
        curve = run.metrics.get("bbox") or {}
    tau, chosen = run.metrics["meta"]["tau"], run.metrics.get("tau_val")
    columns = [f"score ≥ {tau:g}"]
    columns += [f"score ≥ {chosen['tau']:.3g} (τ_val)"] if chosen else []
    groups = [{"title": "Over all scores", "columns": [""], "rows": _rows(CURVE_METRICS, [curve])}]
    for unit, title in UNIT_TITLES.items():
        if run.metrics.get(unit):
            names = LESION_METRICS if unit == "lesion" else IMAGE_METRICS
            metrics = [run.metrics[unit], *([chosen.get(unit) or {}] if chosen else [])]
            groups.append({"title": title, "columns": columns, "rows": _rows(names, metrics)})
    return groups


def _rows(names, groups):
    rows = []
    for name, label, hint in names:
        if name in groups[0]:
            cells = [cell(group, name) if name in group else None for group in groups]
            texts = [f"{c['text']} {c['interval']}".strip() if c else "" for c in cells]
            rows.append((f"{label}: {hint}" if hint else label, texts))
    return rows


def _intervals(run):
    bootstrap = run.metrics["meta"].get("bootstrap")
    if not bootstrap:
        return "This evaluation recorded no intervals."
    return f"Bootstrap: {bootstrap['resamples']:,} resamples of {bootstrap['unit']}s."


def _limits(run, people):
    meta = run.metrics["meta"]
    limits = ["One test set, from the same source as the training data, not an external one."]
    if not meta["lesion_free_images"]:
        limits.append(
            "The test set has no image without a lesion: specificity, and with it PPV and NPV, are "
            "undefined, and precision says nothing about healthy mucosa."
        )
    if meta.get("patients") is None:
        limits.append(
            "Patients are not known: one patient’s images may be in training and test data, and "
            "intervals take images as independent, so both may be too good."
        )
    limits += [*people["notes"], *run.remarks]
    limits.append(
        "Intervals are for another sample of such images, not for another training of the model."
    )
    if not run.metrics.get("tau_val"):
        limits.append("No threshold was chosen on validation data; only the fixed one is given.")
    if run.run is None:
        limits.append("There is no record of the training (run.json).")
    return limits


def _looks(log):
    if not log:
        return "No evaluation of this test set is on record next to the data set."
    times = "Once" if len(log) == 1 else f"{len(log)} times"
    return (
        f"{times} on record: each look is a chance to choose what does well on just these images."
    )


def _answers(run, people, known):
    """{"CLAIM": {item: answer}, "TRIPOD+AI": {...}}: from the run and its files."""

    def filled(text):
        """The text with facts filled in; None, so open, if one of them was not recorded."""
        return (
            None
            if any(known[k] == UNKNOWN and f"{{{k}}}" in text for k in known)
            else (text.format(**known))
        )

    meta, prepared = run.metrics["meta"], people["excluded"] is not None
    flow = "; ".join(
        f"{split['name'].lower()} {split['images']} images with {split['lesions']} lesions"
        + (f" of {split['patients']} patients" if split["patients"] else "")
        for split in people["splits"]
    )
    if prepared:
        flow = f"{people['offered']} images offered, {people['excluded']} excluded; {flow}"
    thresholds = filled("fixed at {Score threshold τ}")
    if run.metrics.get("tau_val"):
        thresholds += filled("; chosen on validation data: {τ chosen on validation}")
    metrics = (
        "AP (COCO’s, and all-point at IoU 0.5), sensitivity, precision, F1, IoU and Dice of "
        "lesions; sensitivity, specificity, AUROC, mIoU and mDice of images; FROC, calibration."
    )
    claim = {
        "22": filled("{Model}, backbone {Backbone}; everything else: config.yaml."),
        "23": filled("{Versions}"),
        "28": metrics,
        "29": _intervals(run) if meta.get("bootstrap") else None,
        "35": f"{flow}.",
        "37": "See Results.",
        "38": "See Results.",
        "39": "The report’s gallery: images by outcome and by model, worst first.",
        "40": "See Limits; the authors may know more.",
        "42": filled("Code revision {Code revision}; config sha256 {Config, sha256}."),
    }
    tripod = {
        "12e": metrics,
        "12g": filled("By the code at revision {Code revision}, weights {Weights, sha256}."),
        "15": f"Masks with scores in [0, 1]. Score thresholds: {thresholds}.",
        "20a": f"{flow}.",
        "21": f"{flow}.",
        "22": filled("Weights, sha256 {Weights, sha256}; config.yaml."),
        "23a": "See Results; by lesion size: the report.",
        "26": "See Limits; the authors may know more.",
    }
    if prepared:
        same = {
            "patient": "Patient.",
            "group": "Patient where known, and near-duplicate images.",
        }.get(people["settings"].get("split_by"), "Image: one patient’s images may be in several.")
        checked = "Files are decoded and checked, turned as EXIF says and made 8-bit RGB."
        rejected = "Unusable images and annotations are left out and listed; nothing is filled in."
        claim |= {"9": checked, "12": rejected, "19": people["caption"], "20": same}
        claim["32"] = f"{run.dataset or run.gt_path.name} is a split of the same data."
        tripod |= {"7": checked, "11": rejected, "12a": people["caption"]}
    if run.run is not None:
        training = filled(
            "{Iterations} iterations, seed {Seed}, on {Device}; optimizer, augmentation and all "
            "other settings: config.yaml."
        )
        selected = (
            "Largest mean of lesion-level precision, recall, F1 and image-level specificity on "
            "validation data, of those that they define."
        )
        claim |= {"1": "Deep learning: instance segmentation.", "25": training, "26": selected}
        claim |= {"24": _initial(run), "27": "None."}
        tripod["12c"] = claim["22"] and training and f"{claim['22']} {training} {selected}"
        tripod |= {"12f": "None.", "24": "None."}
    return {"CLAIM": claim, "TRIPOD+AI": tripod}


def _initial(run):
    """Where training started from."""
    model = (run.config or {}).get("MODEL") or {}
    weights = model.get("WEIGHTS") or (model.get("TIMM") or {}).get("WEIGHTS")
    return (
        f"From {weights}; layers it lacks: as config.yaml says, else at random."
        if weights
        else None
    )
