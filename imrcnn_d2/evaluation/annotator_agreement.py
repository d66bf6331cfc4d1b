"""Agreement of annotators, and of a model with them, on the same images."""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from imrcnn_d2.data.units import Units
from imrcnn_d2.evaluation.detection.counts import divide, union_overlaps
from imrcnn_d2.evaluation.detection.inputs import (
    Detections,
    GroundTruth,
    check_iou_threshold,
    check_tau,
    read_ground_truth,
    read_results,
)
from imrcnn_d2.evaluation.detection.matching import overlaps
from imrcnn_d2.evaluation.detection.metrics import ResampledMetrics
from imrcnn_d2.evaluation.detection.operating_point import DEFAULT_TAU, score_threshold
from imrcnn_d2.evaluation.output import interleave_intervals, package_versions
from imrcnn_d2.evaluation.statistics import Bootstrap, add_intervals
from imrcnn_d2.utils.files import csv_text, read_json, strict_json, write_texts

# Of a pair; in percent but for kappa, which lies in [-1, 1].
PAIR_METRICS = ("f1", "iou", "dice", "union_iou", "union_dice", "kappa", "same_call")
# What happened in an image between two annotators, which the metrics are made of.
PAIR_COLUMNS = (
    "images matched only_a only_b iou dice either union_iou union_dice "
    "both image_only_a image_only_b neither"
).split()
# Mean overlaps, and what they are means over.
_MEANS = {"iou": "matched", "dice": "matched", "union_iou": "either", "union_dice": "either"}
BETWEEN, WITH_MODEL, DIFFERENCE, TOGETHER = "annotators", "model", "difference", "with_model"


@dataclass(frozen=True, eq=False)
class Annotator:
    """A name, and the annotations, of which every region has a mask."""

    name: str
    truth: GroundTruth
    tau: float | None = None  # of a model: these are its detections with at least this score


@dataclass(frozen=True, eq=False)
class AnnotatorAgreement:
    """The agreement on the I images that all have. ``values`` are PAIR_METRICS for "A vs B" of
    every pair; means over the pairs of "annotators" and of the "model" with each of them, and the
    "difference" model minus annotators; fleiss_kappa of the annotators, and of all ("with_model"),
    where they are three or more."""

    annotators: list[Annotator]  # in one order, the same classes, crowds left out; the model last
    model: str | None
    missing: dict[str, list[str]]  # file name of an image that is left out -> who does not have it
    notes: list[str]  # what else was left out
    pairs: dict[tuple[str, str], np.ndarray]  # (I, K), columns as in PAIR_COLUMNS, of every two
    values: dict[str, dict[str, float]]
    meta: dict
    metrics: "AgreementMetrics"
    intervals: dict = field(default_factory=dict)  # and shares as in LesionResults
    undefined_shares: dict = field(default_factory=dict)

    @property
    def images(self) -> list[dict]:
        """The I records of the shared images."""
        return self.annotators[0].truth.images

    def dice(self) -> np.ndarray:
        """(P, I) float: union Dice in [0, 1] of every pair in every image; NaN where neither has a
        lesion."""
        either, dice = (PAIR_COLUMNS.index(name) for name in ("either", "union_dice"))
        return np.stack([divide(pair[:, dice], pair[:, either]) for pair in self.pairs.values()])


def read_annotator(name: str, gt: dict | str | Path) -> Annotator:
    """Read COCO annotations, see :func:`read_ground_truth`.

    Raises:
        ValueError: see there; or two images have one file name, or an annotation has no mask.
    """
    return _checked(name, read_ground_truth(gt))


def read_model(name: str, results, tau: float | None, images_of: Annotator) -> Annotator:
    """Read the detections with a score of at least ``tau``, see :func:`read_results`; None stands
    for the default, see :func:`score_threshold`. A COCO file with ``images`` is of these; a list is
    of the images and ids of ``images_of``.

    Raises:
        ValueError: on bad input, and a tau that is negative or not finite.
    """
    if tau is not None:
        check_tau(tau)
    truth, content, source = images_of.truth, results, None
    if isinstance(content, str | Path) and Path(content).is_file():
        content, source = read_json(Path(content)), content
    if isinstance(content, dict) and content.get("images"):
        truth = read_ground_truth({**content, "annotations": []}, source)
        content = content.get("annotations")
    detections = read_results(content, truth, source)
    if tau is None:
        tau = score_threshold(DEFAULT_TAU, detections.mapped)
    regions = detections.regions.take(np.flatnonzero(detections.score >= tau))
    model = _checked(name, _ground_truth(truth.images, truth.categories, regions))
    return replace(model, tau=tau)


def _checked(name, truth):
    files = Counter(image.get("file_name") for image in truth.images)
    for file, number in files.items():
        if file is None or number > 1:
            raise ValueError(f"{name}: {number} images have the file_name {file!r}, not one.")
    if truth.regions.masks is None:
        raise ValueError(f"{name}: an annotation has no mask, of which agreement is computed.")
    return Annotator(name, truth)


def _ground_truth(images, categories, regions):
    """GroundTruth of regions that are no crowds."""
    nothing = np.zeros(len(regions))
    fields = [{}] * len(regions)
    return GroundTruth(images, categories, regions, fields, nothing.astype(bool), nothing)


def agreement(
    annotators: list[Annotator],
    model: Annotator | None = None,
    *,
    iou_threshold: float = 0.5,
    bootstrap: Bootstrap | None = None,
) -> AnnotatorAgreement:
    """Compare every two annotators, image by image, on the images that all of them have: f1 of
    lesions: 2 pairs / (lesions of one + lesions of the other); iou and dice, means over the pairs;
    union_iou and union_dice, of the union of each one's masks in an image, means over the images in
    which either has a lesion; kappa and same_call, of images annotated with or without a lesion.

    Args:
        annotators: two or more; images are the same if their ``file_name`` is, classes if their
            ``name`` is, or if every annotator has a single one.
        model: one more, reported separately. With it one annotator is enough.
        iou_threshold: least overlap of two masks of one lesion, in (0, 1].
        bootstrap: how to resample the units of the first annotator's images for ``intervals``.

    Raises:
        ValueError: fewer than two, two of one name, no image in common, or images of two sizes.
    """
    everyone = [*annotators, *([model] if model else [])]
    names = [annotator.name for annotator in everyone]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"Agreement is between two or more of different names, not {names}.")
    check_iou_threshold(iou_threshold)
    shared, missing = _shared(everyone)
    everyone, notes = _aligned(everyone, shared)
    pairs = {
        (a.name, b.name): _compare(a.truth, b.truth, iou_threshold)
        for a, b in combinations(everyone, 2)
    }
    metrics = AgreementMetrics(everyone, pairs, model and model.name)
    meta = {
        "annotators": names,
        "model": model and model.name,
        "iou_threshold": iou_threshold,
        "images": len(shared),
        "lesions": {a.name: int(a.truth.lesions.sum()) for a in everyone},
        **metrics.settings(bootstrap),
    }
    result = AnnotatorAgreement(
        everyone, meta["model"], missing, notes, pairs, metrics.once(), meta, metrics
    )
    return add_intervals(result, bootstrap)


def _shared(everyone):
    """File names that all have, in the first one's order; {file name: who lacks it}."""
    names = {
        annotator.name: {image["file_name"]: None for image in annotator.truth.images}
        for annotator in everyone
    }
    every = set().union(*names.values())
    lacking = {file: [name for name, files in names.items() if file not in files] for file in every}
    shared = [file for file in names[everyone[0].name] if not lacking[file]]
    if not shared:
        examples = ", ".join(f"{name}: {min(files, default=None)}" for name, files in names.items())
        raise ValueError(f"No image is in all files; the first of each is {examples}.")
    return shared, {file: lacking[file] for file in sorted(every - set(shared))}


def _aligned(everyone, shared):
    """The annotators on the shared images, with the same classes; and notes."""
    place = {file: position for position, file in enumerate(shared)}
    single = all(len(annotator.truth.categories) == 1 for annotator in everyone)
    classes = {}  # name: its record
    for annotator in everyone:
        for category in annotator.truth.categories:
            key = "" if single else category["name"]
            classes.setdefault(key, {**category, "id": len(classes) + 1})
    numbers = {name: number for number, name in enumerate(classes)}
    aligned, notes = [], []
    for annotator in everyone:
        name, truth, regions = annotator.name, annotator.truth, annotator.truth.regions
        class_names = [category["name"] for category in truth.categories]
        if not single and (lacking := [key for key in classes if key not in class_names]):
            notes.append(f"{name} has no class {', '.join(lacking)}")
        if truth.crowd.any():
            notes.append(f"{name}: {int(truth.crowd.sum())} crowd regions left out")
        records = {image["file_name"]: image for image in truth.images}
        images = [records[file] for file in shared]
        others = aligned[0].truth.images if aligned else images
        for image, other in zip(images, others, strict=True):
            sizes = [(i.get("width"), i.get("height")) for i in (image, other)]
            if sizes[0] != sizes[1]:
                both = f"{sizes[0]} (width, height) in {name}, but {sizes[1]} in {aligned[0].name}"
                raise ValueError(f"{image['file_name']} is {both}.")
        image = np.array([place.get(i["file_name"], -1) for i in truth.images])[regions.image]
        rows = np.flatnonzero((image >= 0) & ~truth.crowd)
        rows = rows[np.argsort(image[rows], kind="stable")]
        category = np.array([0 if single else numbers[key] for key in class_names], dtype=int)
        taken = regions.take(rows)
        taken = replace(taken, image=image[rows], category=category[taken.category])
        aligned.append(Annotator(name, _ground_truth(images, list(classes.values()), taken)))
    return aligned, notes


def _compare(a, b, iou_threshold):
    """(I, K) what happened in each image, by PAIR_COLUMNS, overlaps in [0, 1], between two
    GroundTruths of the same images and classes, without crowds, with masks."""
    number = len(a.images)
    other = Detections(b.regions, np.ones(len(b.regions)))
    pairs = overlaps(a, other, "segm")
    matched, iou, dice = np.zeros(number), np.zeros(number), np.zeros(number)
    image = a.regions.image[pairs.gt]
    enough = np.flatnonzero(pairs.iou >= min(iou_threshold, 1 - 1e-10))
    for position in np.unique(image[enough]):
        selected = enough[image[enough] == position]
        rows, row = np.unique(pairs.gt[selected], return_inverse=True)
        columns, column = np.unique(pairs.dt[selected], return_inverse=True)
        gain = np.zeros((len(rows), len(columns)))
        most = min(gain.shape)  # one more pair is worth more than all overlaps together
        gain[row, column] = most + pairs.iou[selected]
        values = gain[linear_sum_assignment(gain, maximize=True)]
        values = values[values > 0] - most
        matched[position] = len(values)
        iou[position] = values.sum()
        dice[position] = (2 * values / (1 + values)).sum()
    union = union_overlaps(a, other, np.ones(len(b.regions), dtype=bool))
    in_a, in_b = a.lesions > 0, b.lesions > 0
    lesions = (np.ones(number), matched, a.lesions - matched, b.lesions - matched, iou, dice)
    unions = (in_a | in_b, union, 2 * union / (1 + union))
    calls = (in_a & in_b, in_a & ~in_b, in_b & ~in_a, ~in_a & ~in_b)
    return np.stack([*lesions, *unions, *calls], axis=1).astype(float)


class AgreementMetrics(ResampledMetrics):
    """The metrics of every two annotators (``pairs`` as in :class:`AnnotatorAgreement`), the last
    of whom may be the ``model``, and means over the pairs."""

    def __init__(self, everyone: list[Annotator], pairs: dict, model: str | None):
        super().__init__(Units.of(everyone[0].truth.images))
        self._model = model
        # (I, A) bool, whether each annotator has a lesion in each image.
        positive = np.stack([annotator.truth.lesions > 0 for annotator in everyone], axis=1)
        self._raters = {BETWEEN: positive[:, :-1] if model else positive}
        if model:
            self._raters[TOGETHER] = positive
        # (num_units, K) sums over the images of each unit
        self._pairs = {pair: self.per_unit(columns) for pair, columns in pairs.items()}

    def __call__(self, weights, *, all_coco=False):
        values, groups = {}, {BETWEEN: [], WITH_MODEL: []}
        for pair, columns in self._pairs.items():
            sums = dict(zip(PAIR_COLUMNS, (weights @ columns).T, strict=True))
            values[pair_name(*pair)] = metrics = pair_metrics(sums)
            groups[WITH_MODEL if self._model in pair else BETWEEN].append(metrics)
        for name, pairs in groups.items():
            if pairs:
                values[name] = {m: np.mean([p[m] for p in pairs], axis=0) for m in PAIR_METRICS}
        if all(groups.values()):
            values[DIFFERENCE] = {
                m: values[WITH_MODEL][m] - values[BETWEEN][m] for m in PAIR_METRICS
            }
        for name, columns in self._fleiss.items():
            kappa = fleiss_kappa(*(weights @ columns).T, self._raters[name].shape[1])
            values.setdefault(name, {})["fleiss_kappa"] = kappa
        return values

    def proportions(self):
        shares = {}
        for pair, columns in self._pairs.items():
            sums = dict(zip(PAIR_COLUMNS, columns.T, strict=True))
            lesions = sums["matched"] + sums["only_a"] + sums["only_b"]
            same_call = (sums["both"] + sums["neither"], sums["images"])
            shares[pair_name(*pair)] = {"f1": (sums["matched"], lesions), "same_call": same_call}
        return shares

    def limits(self, group, name):
        low, high = (-1, 1) if "kappa" in name else (0, 100)
        return (low - high, high - low) if group == DIFFERENCE else (low, high)

    @cached_property
    def _fleiss(self):
        """{group: (num_units, 3)}: images, positive answers, agreeing pairs of raters."""
        columns = {}
        for name, positive in self._raters.items():
            raters, yes = positive.shape[1], positive.sum(axis=1)
            if raters > 2:
                agreeing = (yes * (yes - 1) + (raters - yes) * (raters - yes - 1)) / 2
                columns[name] = self.per_unit(np.stack([np.ones(len(yes)), yes, agreeing], axis=1))
        return columns


def pair_name(a: str, b: str) -> str:
    """The group of metrics of two annotators."""
    return f"{a} vs {b}"


def pair_metrics(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(...,) by PAIR_METRICS, NaN where undefined, of (...,) sums over images by PAIR_COLUMNS."""
    lesions = 2 * sums["matched"] + sums["only_a"] + sums["only_b"]
    table = [sums[name] for name in ("both", "image_only_a", "image_only_b", "neither")]
    return {
        "f1": 100 * divide(2 * sums["matched"], lesions),
        **{name: 100 * divide(sums[name], sums[total]) for name, total in _MEANS.items()},
        "kappa": cohen_kappa(*table),
        "same_call": 100 * divide(table[0] + table[3], sums["images"]),
    }


def cohen_kappa(both, only_a, only_b, neither) -> np.ndarray:
    """Cohen's kappa, (...,) in [-1, 1], of two raters who answer yes or no (Cohen 1960), of the
    (...,) cases that both, one or none affirmed; NaN where both gave all the same one answer."""
    cases = both + only_a + only_b + neither
    yes_a, yes_b = divide(both + only_a, cases), divide(both + only_b, cases)
    by_chance = yes_a * yes_b + (1 - yes_a) * (1 - yes_b)
    return divide(divide(both + neither, cases) - by_chance, 1 - by_chance)


def fleiss_kappa(cases, yes, agreeing, raters: int) -> np.ndarray:
    """Fleiss' kappa, (...,) at most 1, of three or more raters who answer yes or no (Fleiss 1971);
    NaN where all answers are the same.

    Args:
        cases: (...,) number of cases, each rated by all ``raters``.
        yes: (...,) answers that were yes, over all cases and raters.
        agreeing: (...,) pairs of raters that gave the same answer, over all cases.
    """
    observed = divide(agreeing, cases * raters * (raters - 1) / 2)
    share = divide(yes, cases * raters)
    by_chance = share**2 + (1 - share) ** 2
    return divide(observed - by_chance, 1 - by_chance)


def write_agreement(result: AnnotatorAgreement, folder: str | Path, **meta) -> list[Path]:
    """Write ``agreement.json`` (every metric with its interval), ``agreement.csv`` (one row per
    pair), ``per_image.csv`` (one row per image and pair) and ``missing.csv`` (images that not all
    have), and return their paths. ``meta`` are JSON values to record."""
    groups = interleave_intervals(result.values, result.intervals)
    for (a, b), columns in result.pairs.items():
        sums = dict(zip(PAIR_COLUMNS, columns.sum(axis=0), strict=True))
        counts = {name: int(total) for name, total in sums.items() if name not in _MEANS}
        groups[pair_name(a, b)] = {"a": a, "b": b, **counts, **groups[pair_name(a, b)]}
    document = {
        "agreement": groups,
        "missing": result.missing,
        "notes": result.notes,
        "undefined_shares": result.undefined_shares,
        "meta": {**meta, **result.meta, "versions": package_versions()},
    }
    pairs = []
    for name, values in groups.items():
        row = {"pair": name, **{k: v for k, v in values.items() if not isinstance(v, list)}}
        for metric, interval in result.intervals.get(name, {}).items():
            row[f"{metric}_low"], row[f"{metric}_high"] = interval
        pairs.append(row)
    missing = [{"file_name": k, "missing_in": ", ".join(v)} for k, v in result.missing.items()]
    texts = {
        "agreement.json": strict_json(document),
        "agreement.csv": csv_text(pairs, ["pair", *PAIR_METRICS]),
        "per_image.csv": csv_text(_image_rows(result), ["file_name"]),
        "missing.csv": csv_text(missing, ["file_name", "missing_in"]),
    }
    return write_texts(folder, texts)


def _image_rows(result):
    """One row per image and pair: lesions of each and pairs of them, mean overlaps of the pairs and
    overlaps of the unions in percent."""
    rows = []
    for (a, b), columns in result.pairs.items():
        for record, values in zip(result.images, columns, strict=True):
            sums = dict(zip(PAIR_COLUMNS, values, strict=True))
            row = {"file_name": record["file_name"], "a": a, "b": b}
            for annotator in ("a", "b"):
                row[f"lesions_{annotator}"] = int(sums["matched"] + sums[f"only_{annotator}"])
            means = {k: float(100 * divide(sums[k], sums[total])) for k, total in _MEANS.items()}
            rows.append({**row, "matched": int(sums["matched"]), **means})
    return rows
