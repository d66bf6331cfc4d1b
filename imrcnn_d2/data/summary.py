"""What a prepared data set holds, as text."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from imrcnn_d2.data.rejects import BadInputError

__all__ = ["summarise", "summarise_classes"]

_EDGES = (0, 1, 2, 5, 10, 20, 50, 100)  # share of the image in percent
_BAR = 40


def summarise(
    coco: Mapping[str, dict],
    ratio: Sequence[int] | None,
    notes: Sequence[str],
    rejects: Sequence[BadInputError],
) -> str:
    """Counts by split, difference to the ratio, size histograms, notes and rejects.

    Args:
        coco: COCO contents by split.
        ratio: what was asked for, in the order of `coco`; None where file names state the splits.
        notes: lines to repeat.
        rejects: what was left out, and why.
    """
    return "\n".join(
        [
            *_counts(coco, ratio),
            "",
            *_image_sizes(coco),
            "",
            *_lesion_sizes(coco),
            *_listed("Notes", notes),
            *_listed("Rejected", [str(error) for error in rejects]),
        ]
    )


def summarise_classes(
    coco: Mapping[str, dict], notes: Sequence[str], rejects: Sequence[BadInputError]
) -> str:
    """As `summarise`, for images with a class each: images of each class by split."""
    categories = next(iter(coco.values()))["categories"]
    widths = [max(len(category["name"]), 7) for category in categories]
    names = [category["name"].rjust(w) for category, w in zip(categories, widths, strict=True)]
    lines = [f"split   images  patients  {'  '.join(names)}"]
    for split, content in coco.items():
        labels = Counter(annotation["category_id"] for annotation in content["annotations"])
        counts = [
            f"{labels[category['id']]:{width}}"
            for category, width in zip(categories, widths, strict=True)
        ]
        images = content["images"]
        lines.append(
            f"{split:6} {len(images):7} {_patients(images) or '-':>9}  {'  '.join(counts)}"
        )
    return "\n".join(
        [
            *lines,
            "",
            *_image_sizes(coco),
            *_listed("Notes", notes),
            *_listed("Rejected", [str(error) for error in rejects]),
        ]
    )


def _patients(images: Sequence[dict]) -> int:
    return len({i["patient_id"] for i in images if i.get("patient_id") is not None})


def _counts(coco: Mapping[str, dict], ratio: Sequence[int] | None) -> list[str]:
    total = sum(len(content["images"]) for content in coco.values())
    wanted_title = "" if ratio is None else "  images wanted by ratio"
    lines = [f"split   images  instances  lesion-free  patients{wanted_title}"]
    for i, (split, content) in enumerate(coco.items()):
        images, annotations = content["images"], content["annotations"]
        with_lesion = {a["image_id"] for a in annotations if not a["iscrowd"]}
        lines.append(
            f"{split:6} {len(images):7} {len(annotations):10} {len(images) - len(with_lesion):12} "
            f"{_patients(images) or '-':>9}"
        )
        if ratio is not None:
            wanted = total * ratio[i] / sum(ratio)
            lines[-1] += f"  {wanted:.1f} ({len(images) - wanted:+.1f})"
    return lines


def _image_sizes(coco: Mapping[str, dict]) -> list[str]:
    sizes = Counter(
        f"{image['width']}x{image['height']}"
        for content in coco.values()
        for image in content["images"]
    )
    ranked = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    lines = ["Image sizes in pixels:"] + _bars(ranked[:8])
    if len(ranked) > 8:
        lines.append(f"  and {len(ranked) - 8} more sizes, {sum(n for _, n in ranked[8:])} images")
    return lines


def _lesion_sizes(coco: Mapping[str, dict]) -> list[str]:
    shares = []
    for content in coco.values():
        areas = {image["id"]: image["width"] * image["height"] for image in content["images"]}
        shares += [100 * a["area"] / areas[a["image_id"]] for a in content["annotations"]]
    counts = np.histogram(shares, bins=_EDGES)[0]
    rows = [
        (f"{low}-{high} %", int(n))
        for low, high, n in zip(_EDGES[:-1], _EDGES[1:], counts, strict=True)
    ]
    return ["Instances by share of the image's area:"] + _bars(rows)


def _bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    most = max(n for _, n in rows)
    width = max(len(label) for label, _ in rows)
    return [f"  {label:>{width}} {n:6} {'#' * round(_BAR * n / max(most, 1))}" for label, n in rows]


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return ["", f"{title} ({len(lines)}):", *(f"  {line}" for line in lines)]
