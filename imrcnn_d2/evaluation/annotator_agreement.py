"""Agreement of annotators, and of a model with them, on the same images."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from imrcnn_d2.evaluation.detection.counts import add_up, divide, number_units, union_overlaps
from imrcnn_d2.evaluation.detection.inputs import (
    Detections,
    GroundTruth,
    read_ground_truth,
    read_results,
)
from imrcnn_d2.evaluation.detection.matching import overlaps
from imrcnn_d2.evaluation.detection.metrics import ResampledMetrics
from imrcnn_d2.evaluation.output import interleave_intervals
from imrcnn_d2.evaluation.statistics import add_intervals
from imrcnn_d2.utils.files import csv_text, read_json, strict_json, write_atomically
from imrcnn_d2.versions import package_versions

__all__ = [
    "PAIR_COLUMNS",
    "PAIR_METRICS",
    "AnnotatorAgreement",
    "AgreementMetrics",
    "Annotator",
    "agreement",
    "agreement_document",
    "agreement_rows",
    "cohen_kappa",
    "compare_annotations",
    "fleiss_kappa",
    "pair_metrics",
    "pair_name",
    "read_annotator",
    "read_model",
    "write_agreement",
]


# Of a pair; in percent but for kappa, which lies in [-1, 1].
PAIR_METRICS = ("f1", "iou", "dice", "union_iou", "union_dice", "kappa", "same_call")
# What happened in an image between two annotators, which the metrics are made of.
PAIR_COLUMNS = (
    "images",
    "matched",
    "only_a",
    "only_b",
    "iou",
    "dice",
    "either",
    "union_iou",
    "union_dice",
    "both",
    "image_only_a",
    "image_only_b",
    "neither",
)
BETWEEN, WITH_MODEL, DIFFERENCE, TOGETHER = "annotators", "model", "difference", "with_model"


def compare_annotations(a: GroundTruth, b: GroundTruth, iou_threshold: float) -> np.ndarray:
    """
    Args:
        a, b: of the same I images and classes, without crowds, with masks.
        iou_threshold: least overlap of two masks of one lesion, in (0, 1].

    Returns:
        (I, K) what happened in each image, by PAIR_COLUMNS; overlaps in [0, 1].
    """
    number = len(a.images)
    other = Detections(b.regions, np.ones(len(b.regions)))
    pairs = overlaps(a, other, "segm")
    matched, iou, dice = np.zeros(number), np.zeros(number), np.zeros(number)
    image = a.regions.image[pairs.gt]
    enough = np.flatnonzero(pairs.iou >= min(iou_threshold, 1 - 1e-10))
    for position in np.unique(image[enough]):
        of_image = enough[image[enough] == position]
        rows, row = np.unique(pairs.gt[of_image], return_inverse=True)
        columns, column = np.unique(pairs.dt[of_image], return_inverse=True)
        gain = np.zeros((len(rows), len(columns)))
        most = min(gain.shape)  # one more pair is worth more than all overlaps together
        gain[row, column] = most + pairs.iou[of_image]
        values = gain[linear_sum_assignment(gain, maximize=True)]
        values = values[values > 0] - most
        matched[position] = len(values)
        iou[position] = values.sum()
        dice[position] = (2 * values / (1 + values)).sum()
    union = union_overlaps(a, other, np.ones(len(b.regions), dtype=bool))
    in_a, in_b = a.lesions > 0, b.lesions > 0
    columns = (
        np.ones(number),
        matched,
        a.lesions - matched,
        b.lesions - matched,
        iou,
        dice,
        in_a | in_b,
        union,
        2 * union / (1 + union),
        in_a & in_b,
        in_a & ~in_b,
        in_b & ~in_a,
        ~in_a & ~in_b,
    )
    return np.stack(columns, axis=1).astype(float)


class AgreementMetrics(ResampledMetrics):
    """The metrics of every two annotators, and means over the pairs."""

    def __init__(self, pairs, positive, model, images):
        """
        Args:
            pairs (dict[tuple[str, str], np.ndarray]): (I, K) of every two, see
                :class:`AnnotatorAgreement`.
            positive (np.ndarray): (I, A) bool, whether each annotator has a lesion in each image.
            model (str or None): name of the model, the last of them.
            images (list[dict]): the I records, whose patients are resampled where known.
        """
        super().__init__(*number_units(images))
        self._pairs, self._model = pairs, model
        self._raters = {BETWEEN: positive[:, :-1] if model else positive}
        if model:
            self._raters[TOGETHER] = positive

    def __call__(self, weights, *, all_coco=False):
        values, among, with_model = {}, [], []
        for pair, columns in self._pair_columns.items():
            of_pair = pair_metrics(dict(zip(PAIR_COLUMNS, (weights @ columns).T, strict=True)))
            values[pair_name(*pair)] = of_pair
            (with_model if self._model in pair else among).append(of_pair)
        for name, pairs in ((BETWEEN, among), (WITH_MODEL, with_model)):
            if pairs:
                values[name] = {m: np.mean([p[m] for p in pairs], axis=0) for m in PAIR_METRICS}
        if among and with_model:
            values[DIFFERENCE] = {
                m: values[WITH_MODEL][m] - values[BETWEEN][m] for m in PAIR_METRICS
            }
        for name, columns in self._fleiss.items():
            kappa = fleiss_kappa(*(weights @ columns).T, self._raters[name].shape[1])
            values.setdefault(name, {})["fleiss_kappa"] = kappa
        return values

    def proportions(self):
        """As of the base class, of the pairs."""
        shares = {}
        for pair, columns in self._pair_columns.items():
            sums = dict(zip(PAIR_COLUMNS, columns.sum(axis=0), strict=True))
            lesions = sums["matched"] + sums["only_a"] + sums["only_b"]
            same = sums["both"] + sums["neither"]
            shares[pair_name(*pair)] = {
                "f1": (sums["matched"], lesions),
                "same_call": (same, sums["images"]),
            }
        return shares

    @cached_property
    def _pair_columns(self):
        """{pair: (num_units, K) sums over the images of each unit}."""
        return {
            pair: add_up(columns, self.unit_of_image, self.num_units)
            for pair, columns in self._pairs.items()
        }

    @cached_property
    def _fleiss(self):
        """{group: (num_units, 3)}: images, positive answers, agreeing pairs of raters."""
        columns = {}
        for name, positive in self._raters.items():
            raters, yes = positive.shape[1], positive.sum(axis=1)
            if raters > 2:
                agreeing = (yes * (yes - 1) + (raters - yes) * (raters - yes - 1)) / 2
                of_images = np.stack([np.ones(len(yes)), yes, agreeing], axis=1)
                columns[name] = add_up(of_images, self.unit_of_image, self.num_units)
        return columns


def pair_name(a: str, b: str) -> str:
    """The group of metrics of two annotators."""
    return f"{a} vs {b}"


def pair_metrics(sums):
    """
    Args:
        sums (dict[str, np.ndarray]): (...,) sums over images, by PAIR_COLUMNS.

    Returns:
        dict[str, np.ndarray]: (...,) by PAIR_METRICS; NaN where undefined.
    """
    lesions = 2 * sums["matched"] + sums["only_a"] + sums["only_b"]
    table = [sums[name] for name in ("both", "image_only_a", "image_only_b", "neither")]
    return {
        "f1": 100 * divide(2 * sums["matched"], lesions),
        "iou": 100 * divide(sums["iou"], sums["matched"]),
        "dice": 100 * divide(sums["dice"], sums["matched"]),
        "union_iou": 100 * divide(sums["union_iou"], sums["either"]),
        "union_dice": 100 * divide(sums["union_dice"], sums["either"]),
        "kappa": cohen_kappa(*table),
        "same_call": 100 * divide(table[0] + table[3], sums["images"]),
    }


def cohen_kappa(both, only_a, only_b, neither):
    """
    Cohen's kappa of two raters who answer yes or no (Cohen 1960), also in many resamples at once.

    Args:
        both, only_a, only_b, neither (np.ndarray): (...,) cases that both, one or none affirmed.

    Returns:
        np.ndarray: (...,) in [-1, 1]; NaN where both gave all cases the same one answer.
    """
    cases = both + only_a + only_b + neither
    yes_a, yes_b = divide(both + only_a, cases), divide(both + only_b, cases)
    by_chance = yes_a * yes_b + (1 - yes_a) * (1 - yes_b)
    return divide(divide(both + neither, cases) - by_chance, 1 - by_chance)


def fleiss_kappa(cases, yes, agreeing, raters):
    """
    Fleiss' kappa of three or more raters who answer yes or no (Fleiss 1971).

    Args:
        cases (np.ndarray): (...,) number of cases.
        yes (np.ndarray): (...,) answers that were yes, over all cases and raters.
        agreeing (np.ndarray): (...,) pairs of raters that gave the same answer, over all cases.
        raters (int): of every case.

    Returns:
        np.ndarray: (...,) at most 1; NaN where all answers are the same.
    """
    observed = divide(agreeing, cases * raters * (raters - 1) / 2)
    share = divide(yes, cases * raters)
    by_chance = share**2 + (1 - share) ** 2
    return divide(observed - by_chance, 1 - by_chance)


@dataclass(frozen=True, eq=False)
class Annotator:
    """
    Attributes:
        truth: the annotations; every region has a mask.
    """

    name: str
    truth: GroundTruth


@dataclass(frozen=True, eq=False)
class AnnotatorAgreement:
    """
    Attributes:
        annotators (list[Annotator]): of the I shared images, in one order and with the same
            classes, crowds left out; the model last.
        model (str or None): name of the one that is a model.
        missing (dict[str, list[str]]): file name -> who does not have it, of the images that are
            left out because not all have them.
        notes (list[str]): what else was left out.
        pairs (dict[tuple[str, str], np.ndarray]): (I, K) one row per image, one column per name in
            PAIR_COLUMNS, of every two.
        values (dict[str, dict[str, float]]): those of PAIR_METRICS for "A vs B" of every pair;
            means over the pairs of "annotators" and of the "model" with each of them, and the
            "difference" model minus annotators; fleiss_kappa of the annotators, and of all
            ("with_model"), where they are three or more.
        intervals, undefined_shares (dict): as in :class:`LesionResults`.
        meta (dict): the settings.
        metrics (AgreementMetrics): as functions of how often each unit counts.
    """

    annotators: list
    model: str | None
    missing: dict
    notes: list
    pairs: dict
    values: dict
    meta: dict
    metrics: AgreementMetrics
    intervals: dict = field(default_factory=dict)
    undefined_shares: dict = field(default_factory=dict)

    @property
    def images(self):
        """list[dict]: the I records of the shared images."""
        return self.annotators[0].truth.images

    def dice(self):
        """(P, I) float: union Dice in [0, 1] of every pair in every image; NaN where neither has
        a lesion."""
        either, dice = (PAIR_COLUMNS.index(name) for name in ("either", "union_dice"))
        return np.stack([divide(pair[:, dice], pair[:, either]) for pair in self.pairs.values()])


def read_annotator(name, gt):
    """
    Args:
        name (str):
        gt (dict, str or Path): COCO annotations, see :func:`read_ground_truth`.

    Returns:
        Annotator:

    Raises:
        ValueError: see :func:`read_ground_truth`; or two images have one file name, or an
            annotation has no mask.
    """
    return _checked(name, read_ground_truth(gt))


def read_model(name, results, tau, images_of):
    """
    Args:
        name (str):
        results: see :func:`read_results`. A COCO file with ``images`` is of these; a list is of
            the images and ids of ``images_of``.
        tau (float): score threshold.
        images_of (Annotator):

    Returns:
        Annotator:

    Raises:
        ValueError: on bad input, and a tau that is negative or not finite.
    """
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau is {tau}; it must be a number that is not negative.")
    truth, content, source = images_of.truth, results, None
    if isinstance(content, str | Path) and Path(content).is_file():
        content, source = read_json(Path(content)), content
    if isinstance(content, dict) and content.get("images"):
        truth = read_ground_truth({**content, "annotations": []}, source)
        content = content.get("annotations")
    detections = read_results(content, truth, source)
    regions = detections.regions.take(np.flatnonzero(detections.score >= tau))
    return _checked(name, _ground_truth(truth.images, truth.categories, regions))


def agreement(annotators, model=None, *, iou_threshold=0.5, bootstrap=None):
    """
    Compare every two annotators, image by image, on the images that all of them have.

    Args:
        annotators (list[Annotator]): two or more; images are the same if their ``file_name`` is,
            classes if their ``name`` is, or if every annotator has a single one.
        model (Annotator or None): one more, reported separately. With it one annotator is enough.
        iou_threshold (float): least overlap of two masks of one lesion, in (0, 1].
        bootstrap (Bootstrap or None): how to resample patients (where the first annotator's images
            all have a ``patient_id``) or images for ``intervals``.

    Returns:
        f1 of lesions: 2 pairs / (lesions of one + lesions of the other); iou and dice, means over
        the pairs; union_iou and union_dice, of the union of each one's masks in an image, means
        over the images in which either has a lesion; kappa (Cohen 1960) and same_call, of images
        annotated with or without a lesion.

    Raises:
        ValueError: fewer than two, two of one name, no image in common, or images of two sizes.
    """
    everyone = [*annotators, *([model] if model else [])]
    names = [annotator.name for annotator in everyone]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"Agreement is between two or more of different names, not {names}.")
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must lie in (0, 1].")
    shared, missing = _shared(everyone)
    everyone, notes = _aligned(everyone, shared)
    pairs = {
        (a.name, b.name): compare_annotations(a.truth, b.truth, iou_threshold)
        for a, b in combinations(everyone, 2)
    }
    positive = np.stack([annotator.truth.lesions > 0 for annotator in everyone], axis=1)
    metrics = AgreementMetrics(pairs, positive, model and model.name, everyone[0].truth.images)
    meta = {
        "annotators": names,
        "model": model and model.name,
        "iou_threshold": iou_threshold,
        "images": len(shared),
        "patients": metrics.num_units if metrics.unit == "patient" else None,
        "lesions": {one.name: int(one.truth.lesions.sum()) for one in everyone},
        "bootstrap": bootstrap and {**asdict(bootstrap), "unit": metrics.unit},
    }
    result = AnnotatorAgreement(
        everyone, meta["model"], missing, notes, pairs, metrics.once(), meta, metrics
    )
    return add_intervals(result, bootstrap)


def _checked(name, truth):
    files = Counter(image.get("file_name") for image in truth.images)
    for file, number in files.items():
        if file is None or number > 1:
            raise ValueError(
                f"{name}: {number} images have the file_name {file!r}; it must tell images apart."
            )
    if truth.regions.masks is None:
        raise ValueError(f"{name}: an annotation has no mask, of which agreement is computed.")
    return Annotator(name, truth)


def _ground_truth(images, categories, regions):
    """GroundTruth of regions that are no crowds."""
    nothing = np.zeros(len(regions))
    fields = [{}] * len(regions)
    return GroundTruth(images, categories, regions, fields, nothing.astype(bool), nothing)


def _shared(everyone):
    """File names that all have, in the first one's order; {file name: who lacks it}."""
    names = {one.name: {image["file_name"] for image in one.truth.images} for one in everyone}
    first = everyone[0].truth.images
    shared = [
        i["file_name"] for i in first if all(i["file_name"] in files for files in names.values())
    ]
    if not shared:
        examples = ", ".join(
            f"{name}: {min(files, default='none')}" for name, files in names.items()
        )
        raise ValueError(f"No image is in all files; the first of each is {examples}.")
    missing = {
        file: [name for name, files in names.items() if file not in files]
        for file in sorted(set.union(*names.values()) - set(shared))
    }
    return shared, missing


def _aligned(everyone, shared):
    """The annotators on the shared images, with the same classes; and notes."""
    place = {file: position for position, file in enumerate(shared)}
    single = all(len(one.truth.categories) == 1 for one in everyone)
    classes = {}  # name: its record
    for one in everyone:
        for category in one.truth.categories:
            key = "" if single else category["name"]
            classes.setdefault(key, {**category, "id": len(classes) + 1})
    numbers = {name: number for number, name in enumerate(classes)}
    aligned, notes = [], []
    for one in everyone:
        truth, regions = one.truth, one.truth.regions
        class_names = [category["name"] for category in truth.categories]
        if not single and (lacking := [name for name in classes if name not in class_names]):
            notes.append(f"{one.name} has no class {', '.join(lacking)}")
        if truth.crowd.any():
            notes.append(f"{one.name}: {int(truth.crowd.sum())} crowd regions left out")
        records = {image["file_name"]: image for image in truth.images}
        images = [records[file] for file in shared]
        for mine, other in zip(images, aligned[0].truth.images if aligned else images, strict=True):
            sizes = [(i.get("width"), i.get("height")) for i in (mine, other)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"{mine['file_name']} is {sizes[0]} (width, height) in {one.name}, but "
                    f"{sizes[1]} in {aligned[0].name}."
                )
        image = np.array([place.get(i["file_name"], -1) for i in truth.images])[regions.image]
        rows = np.flatnonzero((image >= 0) & ~truth.crowd)
        rows = rows[np.argsort(image[rows], kind="stable")]
        category = np.array([0 if single else numbers[name] for name in class_names], dtype=int)
        taken = regions.take(rows)
        taken = replace(taken, image=image[rows], category=category[taken.category])
        aligned.append(Annotator(one.name, _ground_truth(images, list(classes.values()), taken)))
    return aligned, notes


def write_agreement(result, folder, **meta):
    """
    Write ``agreement.json`` (every metric with its interval), ``agreement.csv`` (one row per pair),
    ``per_image.csv`` (one row per image and pair) and ``missing.csv`` (images that not all have).

    Args:
        result (AnnotatorAgreement):
        folder (str or Path): made if it does not exist.
        **meta: what else to record under ``meta``; JSON values.

    Returns:
        list[Path]: the files.
    """
    document = agreement_document(result)
    document["meta"] = {**meta, **result.meta, "versions": package_versions()}
    pairs = []
    for name, values in document["agreement"].items():
        row = {"pair": name, **{k: v for k, v in values.items() if not isinstance(v, list)}}
        for metric in (key.removesuffix("_ci") for key in values if key.endswith("_ci")):
            row[f"{metric}_low"], row[f"{metric}_high"] = values[f"{metric}_ci"]
        pairs.append(row)
    missing = [
        {"file_name": file, "missing_in": ", ".join(names)}
        for file, names in result.missing.items()
    ]
    texts = {
        "agreement.json": strict_json(document),
        "agreement.csv": csv_text(pairs, ["pair", *PAIR_METRICS]),
        "per_image.csv": csv_text(agreement_rows(result), ["file_name"]),
        "missing.csv": csv_text(missing, ["file_name", "missing_in"]),
    }
    for name, text in texts.items():
        write_atomically(Path(folder) / name, text)
    return [Path(folder) / name for name in texts]


def agreement_document(result):
    """
    Args:
        result (AnnotatorAgreement):

    Returns:
        dict: for agreement.json: the metrics of every group with their intervals, those of pairs
        with counts; what was left out; ``meta``.
    """
    groups = {
        name: interleave_intervals(values, result.intervals.get(name, {}))
        for name, values in result.values.items()
    }
    for (a, b), columns in result.pairs.items():
        counts = dict(zip(PAIR_COLUMNS, columns.sum(axis=0).astype(int).tolist(), strict=True))
        for overlap in ("iou", "dice", "union_iou", "union_dice"):
            del counts[overlap]
        name = pair_name(a, b)
        groups[name] = {"a": a, "b": b, **counts, **groups[name]}
    return {
        "agreement": groups,
        "missing": result.missing,
        "notes": result.notes,
        "undefined_shares": result.undefined_shares,
        "meta": result.meta,
    }


def agreement_rows(result):
    """
    Args:
        result (AnnotatorAgreement):

    Returns:
        list[dict]: one row per image and pair: image, a, b, lesions of each and pairs of them, mean
        overlaps of the pairs and overlaps of the unions in percent.
    """
    rows = []
    for (a, b), columns in result.pairs.items():
        for record, values in zip(result.images, columns, strict=True):
            counts = dict(zip(PAIR_COLUMNS, values.tolist(), strict=True))
            row = {"file_name": record["file_name"], "a": a, "b": b}
            row["lesions_a"] = int(counts["matched"] + counts["only_a"])
            row["lesions_b"] = int(counts["matched"] + counts["only_b"])
            row["matched"] = int(counts["matched"])
            for name, total in (
                ("iou", "matched"),
                ("dice", "matched"),
                ("union_iou", "either"),
                ("union_dice", "either"),
            ):
                row[name] = float(100 * divide(counts[name], counts[total]))
            rows.append(row)
    return rows
