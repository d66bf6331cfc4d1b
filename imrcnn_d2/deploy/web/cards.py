"""Findings as HTML."""

import base64
from functools import lru_cache

import jinja2
import numpy as np

from ..overlay import outline

__all__ = ["about_html", "captions", "cards_html", "empty_html", "summary_html"]

ROOM = 7  # of a number, in percent of the image


@lru_cache
def _template(name):
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imrcnn_d2.deploy.web"),
        autoescape=True,  # names of files and classes are anybody's
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment.get_template(name)


def cards_html(findings, predictor, tau):
    """
    Args:
        findings (list[Finding]):
        predictor (Predictor):
        tau (float or None): score from which on a detection is shown.

    Returns:
        str: a figure for each, with the outlines of all detections, of which those that do not
        count are hidden; so that another τ needs :func:`captions` alone.
    """
    said = captions(findings, predictor, tau)
    return _template("cards.html").render(
        cards=[
            {
                "finding": finding,
                "caption": caption["html"],
                "shown": caption["shown"],
                "picture": finding.picture and base64.b64encode(finding.picture).decode(),
                "marks": [] if finding.error else _marks(finding),
            }
            for finding, caption in zip(findings, said, strict=True)
        ]
    )


def _marks(finding):
    """Outline, and place of its number in percent, of each detection."""
    height, width = finding.size
    marks, taken = [], np.empty((0, 2))
    for annotation in finding.annotations:
        if "bbox" not in annotation:
            continue
        lines = [line.reshape(-1, 2) for line in outline(annotation)]
        path = "".join("M" + "L".join(f"{x} {y}" for x, y in line.tolist()) + "Z" for line in lines)
        # At the top of its largest part; further down where other numbers are.
        places = max(lines, key=len, default=np.array([[width / 2, height / 2]]))
        places = 100 * places[np.argsort(places[:, 1], kind="stable")] / (width, height)
        places = places.clip(ROOM / 2, 100 - ROOM / 2)
        free = (abs(places[:, None] - taken) >= ROOM).any(axis=2).all(axis=1)
        left, top = places[free.argmax()].tolist()
        taken = np.append(taken, [[left, top]], axis=0)
        marks.append({"path": path, "left": left, "top": top})
    return marks


def captions(findings, predictor, tau):
    """
    Args:
        findings (list[Finding]), predictor (Predictor), tau (float or None): as above.

    Returns:
        list[dict]: of each finding its ``key``, the caption, ``html``, and how many of its
        detections, which come by falling score, are ``shown``.
    """
    ret = []
    for finding in findings:
        shown = finding.counted(tau)
        html = _template("caption.html").render(
            finding=finding,
            shown=shown,
            tau=tau,
            classes=predictor.classes,
            best=max((a["score"] for a in finding.annotations), default=None),
        )
        ret.append({"key": finding.key, "html": html, "shown": len(shown)})
    return ret


def summary_html(findings, tau):
    """
    Args:
        findings (list[Finding]), tau (float or None): as above.

    Returns:
        str: counts over all images.
    """
    read = [finding for finding in findings if finding.error is None]
    counts = [len(finding.counted(tau)) for finding in read]
    return _template("summary.html").render(
        images=len(read),
        failed=len(findings) - len(read),
        positive=sum(map(bool, counts)),
        marked=sum(counts),
        tau=tau,
    )


def about_html(predictor):
    """
    Args:
        predictor (Predictor):

    Returns:
        str: what predicts.
    """
    return _template("about.html").render(about=predictor.about, classes=predictor.classes)


def empty_html(predictor):
    """
    Args:
        predictor (Predictor):

    Returns:
        str: what is there before the first image.
    """
    return _template("empty.html").render(detector=not predictor.is_classifier)
