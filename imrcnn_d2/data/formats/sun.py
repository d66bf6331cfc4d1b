"""SUN colonoscopy video database: 100 polyps and 13 cases without one; masks of SUN-SEG."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from imrcnn_d2.data.formats.public_videos import (
    PublicVideos,
    Video,
    corner_annotation,
    numbered_files,
)
from imrcnn_d2.data.images import SourceImage, fit_to_image, read_mask
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.utils.files import BadInputError, Rejects, check_inside

_CASE = re.compile(r"case(\d+)", re.ASCII)
_FPS = 30
# Facts of the polyps by case, as the documentation of SUN-SEG lists them by clip: | 1_2 | frames |
# duration | shape | size | location | diagnosis |
_FACTS = "INFO_POSITIVE_CASES.md"
_ROW = re.compile(
    r"\|\s*(\d+)(?:_\d+)?\s*\|[^|]*\|[^|]*\|\s*(\S+)\s*\|\s*(\d+)\s*mm-?\s*\|\s*([CATDSR])\s*\|"
    r"\s*([^|]+?)\s*\|\s*",
    re.ASCII,
)
_SITES = {
    **{"C": "cecum", "A": "ascending colon", "T": "transverse colon"},
    **{"D": "descending colon", "S": "sigmoid colon", "R": "rectum"},
}


class Sun(PublicVideos):
    name = "sun"
    help = "SUN: sundatabase_positive_part1/ with annotation_txt/ and so on; masks of SUN-SEG"
    title = "SUN colonoscopy video database (Misawa et al. 2021, doi 10.1016/j.gie.2020.07.060)"
    url = "http://amed8k.sundatabase.org"
    terms = "on request, for research and education, not for commercial use; not to be passed on"
    layouts = (("*[Pp]ositive*/annotation_txt", "*[Pp]ositive*/case*"),)

    def videos(self, root: Path, rejects: Rejects, notes: list[str]) -> Iterator[Video]:
        """The cases, each with its polyp or without one; negative ones are numbered anew."""
        texts = {path.stem: path for path in root.glob("*[Pp]ositive*/annotation_txt/case*.txt")}
        masks = {path.stem: path for path in root.glob("SUN-SEG*/**/GT/*/*.png")}
        facts = _facts(root, notes)
        known: dict[str, Path] = {}
        folders = [path for path in root.glob("*/case*") if _CASE.fullmatch(path.name)]
        for folder in sorted(folders, key=lambda path: (len(path.name), path)):
            with rejects.catch():
                is_negative = "negative" in folder.parent.name.casefold()
                case = f"negative_{folder.name}" if is_negative else folder.name
                if case in known:
                    raise BadInputError(folder, f"is the case of {known[case]}; keep one of them")
                known[case] = folder
                frames = numbered_files(root, folder, rejects)
                if is_negative:
                    yield Video(case, frames, lambda number, image: [], facts={"fps": _FPS})
                    continue
                if case not in texts:
                    reason = f"has no annotation_txt/{case}.txt; {self.expected()}"
                    raise BadInputError(folder, reason)
                boxes = _read_boxes(check_inside(root, texts[case], rejects.follow_links))
                fields = {"lesion_id": case, **facts.get(case, {})}
                annotate = partial(_annotations, boxes, masks, fields, notes)
                yield Video(case, frames, annotate, facts={"fps": _FPS})
        if not any(case.startswith("negative") for case in known):
            notes.append("there are no negative cases (sundatabase_negative_part1 and so on)")
        if not masks:
            notes.append("boxes only: masks are in SUN-SEG-Annotation (github.com/GewelsJI/VPS)")


def _read_boxes(path: Path) -> dict[str, list[list[float]]]:
    """xmin, ymin, xmax, ymax by file name; each line is NAME xmin,ymin,xmax,ymax,class ..."""
    boxes = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            name, *texts = line.split() or [""]
            if name:
                corners = [[float(value) for value in text.split(",")[:4]] for text in texts]
                if not corners or any(len(box) != 4 for box in corners):
                    raise ValueError(f"{line!r} is not NAME xmin,ymin,xmax,ymax,class")
                boxes[name] = corners
    except (OSError, ValueError) as error:
        raise BadInputError(path, f"is no annotation of SUN ({error})") from error
    return boxes


def _annotations(
    boxes: Mapping[str, list],
    masks: Mapping[str, Path],
    fields: Mapping,
    notes: list[str],
    number: int,
    image: SourceImage,
) -> list[dict]:
    """The polyp's mask where there is one, else its boxes."""
    if path := masks.get(image.path.stem):
        mask = fit_to_image(read_mask(path), image, path, notes)
        if mask.any():
            return [{**fields, **annotation_from_mask(mask)}]
    if image.path.name not in boxes:
        raise ValueError("has no box, as every frame of a case with a polyp has")
    return [corner_annotation(box, image, **fields) for box in boxes[image.path.name]]


def _facts(root: Path, notes: list[str]) -> dict[str, dict]:
    """Size, shape, site and histology of the polyp of each case, where the table is there."""
    path = next(root.glob(f"**/{_FACTS}"), None)
    if path is None:
        notes.append(f"without size, shape, site, histology: put SUN-SEG's docs/{_FACTS} there")
        return {}
    facts = {}
    for case, shape, size, site, diagnosis in _ROW.findall(path.read_text(encoding="utf-8")):
        fields = {"size_mm": int(size), "shape": shape, "site": _SITES[site]}
        facts[f"case{case}"] = {**fields, "histology": diagnosis}
    return facts
