"""Examines every image of a data set with its annotations."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import cv2
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from imrcnn_d2.data.audit.annotation_checks import Outline, draw_outlines, outline_findings
from imrcnn_d2.data.audit.findings import Finding, finding
from imrcnn_d2.data.audit.image_checks import ImageMeasures, measure_image
from imrcnn_d2.data.audit.records import Entry
from imrcnn_d2.data.endoscope_view import find_view
from imrcnn_d2.data.images import drawn_on_stored_pixels, inspect_image, read_image
from imrcnn_d2.data.rejects import BadInputError

__all__ = ["Examined", "examine_all", "in_threads"]


@dataclass(frozen=True)
class Examined:
    """What is known of one image.

    Attributes:
        entry: the image.
        measures: None where it cannot be read.
        outlines: the annotations that could be drawn.
        findings: what is wrong with it, as far as it can be told without the other images.
    """

    entry: Entry
    measures: ImageMeasures | None
    outlines: tuple[Outline, ...]
    findings: tuple[Finding, ...]


def examine_all(entries: Sequence[Entry], category_ids: set | None) -> list[Examined]:
    """Examines all images, in their order.

    Args:
        entries: the images.
        category_ids: the categories there are; None where there are no outlines to check.
    """
    examine = functools.partial(_examine, category_ids=category_ids)
    return in_threads(examine, entries, "Examining")


def in_threads(function: Callable, items: Sequence, what: str) -> list:
    """[function(image) for image in items], one thread a core, with a bar.

    What takes the time, in Pillow, OpenCV and NumPy, runs side by side in threads; processes would
    each have to import torch first.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    inner = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(1), ThreadPool(cores) as pool:
            return list(tqdm(pool.imap(function, items), what, len(items), unit="image"))
    finally:
        cv2.setNumThreads(inner)


def _examine(entry: Entry, category_ids: set | None) -> Examined:
    def say(kind: str, detail: str) -> Finding:
        return finding(kind, [entry.name], [entry.split], detail)

    findings = []
    width, height = entry.record.get("width"), entry.record.get("height")
    try:
        file = inspect_image(entry.path)
        image = read_image(entry.path)
    except BadInputError as error:
        kind = "unreadable" if entry.path.exists() else "missing_file"
        findings.append(say(kind, f"It {error.reason}."))
        outlines = ()
        if category_ids is not None and _is_size(width) and _is_size(height):
            outlines, wrong = draw_outlines(entry, width, height, category_ids)
            findings += wrong
        return Examined(entry, None, tuple(outlines), tuple(findings))

    view = find_view(image)
    measures = measure_image(image, view, file.sha256)
    width, height = (width or file.width), (height or file.height)
    fits = False
    try:
        fits = not drawn_on_stored_pixels(file, width, height)
    except BadInputError as error:
        findings.append(say("wrong_size", f"It {error.reason}."))
    if category_ids is None or not _is_size(width) or not _is_size(height):
        return Examined(entry, measures, (), tuple(findings))
    outlines, wrong = draw_outlines(entry, width, height, category_ids)
    findings += wrong
    if fits:
        covered = view.mask.copy()
        for box in view.insets:
            covered[box.slices] = True
        findings += outline_findings(entry, outlines, covered)
    return Examined(entry, measures, tuple(outlines), tuple(findings))


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0
