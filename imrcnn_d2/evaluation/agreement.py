"""How far annotators agree with each other, and a model with them.

None of them is the truth, so every figure of a pair is the same whichever comes first. Lesions are
matched one to one so that as many as possible, and of these the best overlapping, are pairs.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from ..data.json_files import read_json
from .agreement_measures import COLUMNS, AgreementMeasures, compare_outlines
from .intervals import with_intervals
from .metrics import divide
from .records import GroundTruth, read_ground_truth, read_results

__all__ = ["Agreement", "Annotator", "agreement", "read_annotator", "read_model"]


@dataclass(frozen=True, eq=False)
class Annotator:
    """
    Attributes:
        name (str):
        truth (GroundTruth): what they outlined; every region has a mask.
    """

    name: str
    truth: GroundTruth


@dataclass(frozen=True, eq=False)
class Agreement:
    """
    Attributes:
        annotators (list[Annotator]): of the I shared images, in one order and with the same
            classes, crowds left out; the model last.
        model (str or None): name of the one that is a model.
        missing (dict[str, list[str]]): file name -> who does not have it, of the images that are
            left out because not all have them.
        notes (list[str]): what else was left out.
        pairs (dict[tuple[str, str], np.ndarray]): (I, K) a row an image, a column for each of
            COLUMNS, of every two.
        figures (dict[str, dict[str, float]]): those of FIGURES for "A vs B" of every pair; means
            over the pairs of "annotators" and of the "model" with each of them, and the
            "difference" model minus annotators; fleiss_kappa of the annotators, and of all
            ("with_model"), where they are three or more.
        intervals, undefined_shares (dict): as in :class:`LesionResults`.
        meta (dict): the settings.
        measures (AgreementMeasures): the figures as functions of how often each unit counts.
    """

    annotators: list
    model: str | None
    missing: dict
    notes: list
    pairs: dict
    figures: dict
    meta: dict
    measures: object
    intervals: dict = field(default_factory=dict)
    undefined_shares: dict = field(default_factory=dict)

    @property
    def images(self):
        """list[dict]: the I records of the shared images."""
        return self.annotators[0].truth.images

    def dice(self):
        """(P, I) float: union Dice in [0, 1] of every pair in every image; NaN where neither has
        a lesion."""
        either, dice = (COLUMNS.index(name) for name in ("either", "union_dice"))
        return np.stack([divide(own[:, dice], own[:, either]) for own in self.pairs.values()])


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
        tau (float): score from which on a detection counts.
        images_of (Annotator):

    Returns:
        Annotator:

    Raises:
        ValueError: on bad input, and a tau that is none.
    """
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau is {tau}; it must be a number that is not negative.")
    truth, content, source = images_of.truth, results, None
    if isinstance(content, str | Path) and Path(content).is_file():
        content, source = read_json(Path(content)), content
    if isinstance(content, dict) and content.get("images"):
        truth = read_ground_truth({**content, "annotations": []}, source)
        content = content.get("annotations")
    found = read_results(content, truth, source)
    regions = found.regions.take(np.flatnonzero(found.score >= tau))
    return _checked(name, _outlined(truth.images, truth.categories, regions))


def agreement(annotators, model=None, *, iou_threshold=0.5, bootstrap=None):
    """
    Compare every two annotators, image by image, on the images that all of them have.

    Args:
        annotators (list[Annotator]): two or more; images are the same if their ``file_name`` is,
            classes if their ``name`` is, or if every annotator has a single one.
        model (Annotator or None): one more, that is told apart. With it one annotator is enough.
        iou_threshold (float): least overlap of two outlines of one lesion, in (0, 1].
        bootstrap (Bootstrap or None): how to resample patients (where the first annotator's images
            all have a ``patient_id``) or images for ``intervals``.

    Returns:
        Agreement: f1 of lesions: 2 pairs / (lesions of one + lesions of the other); iou and dice,
        means over the pairs; union_iou and union_dice, of all that each outlined in an image,
        means over the images in which either outlined something; kappa (Cohen 1960) and same_call,
        of images called with or without a lesion.

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
        (a.name, b.name): compare_outlines(a.truth, b.truth, iou_threshold)
        for a, b in combinations(everyone, 2)
    }
    called = np.stack([annotator.truth.lesions > 0 for annotator in everyone], axis=1)
    measures = AgreementMeasures(pairs, called, model and model.name, everyone[0].truth.images)
    meta = {
        "annotators": names,
        "model": model and model.name,
        "iou_threshold": iou_threshold,
        "images": len(shared),
        "patients": measures.num_units if measures.unit == "patient" else None,
        "lesions": {one.name: int(one.truth.lesions.sum()) for one in everyone},
        "bootstrap": bootstrap and {**asdict(bootstrap), "unit": measures.unit},
    }
    found = Agreement(
        everyone, meta["model"], missing, notes, pairs, measures.once(), meta, measures
    )
    return with_intervals(found, bootstrap)


def _checked(name, truth):
    files = Counter(image.get("file_name") for image in truth.images)
    for file, number in files.items():
        if file is None or number > 1:
            raise ValueError(
                f"{name}: {number} images have the file_name {file!r}; it must tell images apart."
            )
    if truth.regions.masks is None:
        raise ValueError(f"{name}: an annotation has no mask. Agreement is of outlines.")
    return Annotator(name, truth)


def _outlined(images, categories, regions):
    """GroundTruth of regions that are no crowds."""
    nothing = np.zeros(len(regions))
    fields = [{}] * len(regions)
    return GroundTruth(images, categories, regions, fields, nothing.astype(bool), nothing)


def _shared(everyone):
    """File names that all have, in the first one's order; {file name: who lacks it}."""
    names = {one.name: {image["file_name"] for image in one.truth.images} for one in everyone}
    first = everyone[0].truth.images
    shared = [i["file_name"] for i in first if all(i["file_name"] in own for own in names.values())]
    if not shared:
        examples = ", ".join(f"{name}: {min(own, default='none')}" for name, own in names.items())
        raise ValueError(f"No image is in all files; the first of each is called {examples}.")
    missing = {
        file: [name for name, own in names.items() if file not in own]
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
        own = [category["name"] for category in truth.categories]
        if not single and (lacking := [name for name in classes if name not in own]):
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
        category = np.array([0 if single else numbers[name] for name in own], dtype=int)
        taken = regions.take(rows)
        taken = replace(taken, image=image[rows], category=category[taken.category])
        aligned.append(Annotator(one.name, _outlined(images, list(classes.values()), taken)))
    return aligned, notes
