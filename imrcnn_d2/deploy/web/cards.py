"""Findings as HTML."""

import base64
from functools import lru_cache

import jinja2

from ..overlay import outline

__all__ = ["about_html", "captions", "cards_html", "empty_html", "summary_html"]

BADGE_ROOM = 4  # percent of the image, so that no number is cut off at its edge


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
                "marks": _marks(finding),
            }
            for finding, caption in zip(findings, said, strict=True)
        ]
    )


def _marks(finding):
    """Outline, and place of its number in percent, of each detection."""
    marks = []
    for annotation in finding.annotations:
        if "bbox" not in annotation:
            continue
        lines = (line.reshape(-1, 2).tolist() for line in outline(annotation))
        path = "".join("M" + "L".join(f"{x} {y}" for x, y in line) + "Z" for line in lines)
        x, y, width, _ = annotation["bbox"]
        left, top = 100 * (x + width / 2) / finding.size[1], 100 * y / finding.size[0]
        marks.append(
            {
                "path": path,
                "left": min(max(left, BADGE_ROOM), 100 - BADGE_ROOM),
                "top": min(max(top, BADGE_ROOM), 100 - BADGE_ROOM),
            }
        )
    return marks


def captions(findings, predictor, tau):
    """
    Args:
        findings (list[Finding]), predictor (Predictor), tau (float or None): as above.

    Returns:
        list[dict]: of each finding the caption, ``html``, and how many of its detections, which
        come by falling score, are ``shown``.
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
        ret.append({"html": html, "shown": len(shown)})
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
