"""A prepared data set anew, with the images that must not be parted in one split each."""

import json
import math
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from imrcnn_d2.data.audit.checks import (
    DuplicateGroup,
    Examined,
    category_findings,
    duplicate_findings,
    exact_duplicate_groups,
    examine_all,
    file_findings,
    near_duplicate_groups,
    patient_findings,
    repeated_id_findings,
)
from imrcnn_d2.data.audit.findings import (
    KINDS,
    LOWEST_FIRST,
    SEVERITIES,
    AuditedData,
    Finding,
    finding,
)
from imrcnn_d2.data.images import link_or_copy
from imrcnn_d2.data.prepare.data_set import is_empty, staged, strata_of, write_json, write_splits
from imrcnn_d2.data.prepare.duplicates import group_labels
from imrcnn_d2.data.prepare.splits import SPLITS, Item, make_splits, read_splits, sha256
from imrcnn_d2.utils.files import BadInputError, check_inside

__all__ = ["Audit", "Move", "audit", "check_can_fix", "write_fixed_splits"]


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        data: the data set.
        examined: what is known of each image, in the order of ``data.entries``.
        twins: images that show the same.
        findings: by kind, then severity, then score, the strongest first.
        notes: what was not checked, and why.
        checked: areas that were checked, keys of `AREAS`.
        embeddings: of the images that can be read, in their order; None without them.
    """

    data: AuditedData
    examined: list[Examined]
    twins: list[DuplicateGroup]
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)
    checked: tuple[str, ...] = ("files", "annotations", "leakage")
    embeddings: np.ndarray | None = None

    @property
    def readable(self) -> list[int]:
        """Places of the images that can be read."""
        return [i for i, one in enumerate(self.examined) if one.measures is not None]

    @property
    def flagged(self) -> set[tuple[str, str]]:
        """(split, name) of the images that an error or a warning is about."""
        return {
            pair
            for found in self.findings
            if found.flags
            for pair in zip(found.splits, found.images, strict=True)
        }

    def counts(self) -> dict[str, Counter]:
        """Findings by kind and severity, in the order of the kinds; those without any left out."""
        of_kind = {kind: Counter() for kind in KINDS}
        for found in self.findings:
            of_kind[found.kind][found.severity] += 1
        return {kind: counts for kind, counts in of_kind.items() if counts}

    def images_of(self, kind: str) -> set[tuple[str, str]]:
        """(split, name) of the images that findings of a kind are about."""
        return {
            pair
            for found in self.findings
            if found.kind == kind
            for pair in zip(found.splits, found.images, strict=True)
        }

    def add(self, findings: Sequence[Finding], *areas: str) -> None:
        """Adds findings, and the further areas that were checked for them."""
        self.checked += areas
        self.findings = _sorted([*self.findings, *findings])


def audit(
    data: AuditedData,
    embed: Callable[[Sequence[Path]], np.ndarray] | None = None,
) -> Audit:
    """Checks files, annotations, duplicates and leakage.

    Args:
        data: the data set.
        embed: gives (N, D) rows of length 1 of the images at N paths, which near-duplicates are
            looked for by; None to do without.

    Raises:
        ModuleNotFoundError: what a check needs is not installed; the error says how.
    """
    ids = None if data.classified else {category["id"] for category in data.categories}
    examined = examine_all(data.entries, ids)
    findings = [found for one in examined for found in one.findings]
    for file, annotation in data.strays:
        told = f"{file}: there is no image with id {annotation['image_id']!r}."
        number = annotation.get("id")
        number = number if isinstance(number, int) else None
        findings.append(finding("malformed", (), (), told, annotation_id=number))
    findings += repeated_id_findings(data.entries)
    findings += file_findings(examined)
    annotations = [a for entry in data.entries for a in entry.annotations]
    findings += category_findings(data.categories, annotations)

    result = Audit(data, examined, [], [])
    vectors = None
    if embed is not None and result.readable:
        result.embeddings = embed([data.entries[i].path for i in result.readable])
        vectors = np.zeros((len(examined), result.embeddings.shape[1]), np.float32)
        vectors[result.readable] = result.embeddings
    result.twins = exact_duplicate_groups(examined) + near_duplicate_groups(examined, vectors)
    findings += duplicate_findings(data.entries, result.twins) + patient_findings(data.entries)
    result.add(findings)
    return result


def _sorted(findings: Sequence[Finding]) -> list[Finding]:
    """By kind, severity and falling strength; else as they came."""
    kinds = list(KINDS)

    def place(found: Finding) -> tuple[int, int, float]:
        weakness = -math.inf if found.score is None else -found.score
        if found.kind in LOWEST_FIRST and found.score is not None:
            weakness = found.score
        return kinds.index(found.kind), SEVERITIES.index(found.severity), weakness

    return sorted(findings, key=place)


@dataclass(frozen=True)
class Move:
    """An image that changes its split: its name, from where, and to where."""

    name: str
    source: str
    target: str


def check_can_fix(prepared: Path, out: Path) -> None:
    """Refuses what `write_fixed_splits` would refuse whatever the groups, before a long audit.

    Raises:
        FileExistsError: `out` is there and not empty.
        FileNotFoundError: the data set has no splits.json.
        ValueError: splits.json cannot be read.
    """
    if out.exists() and not is_empty(out):
        raise FileExistsError(f"{out}: exists already; choose another folder for --fix-splits")
    if not (prepared / "splits.json").is_file():
        raise FileNotFoundError(
            f"{prepared / 'splits.json'}: not there; --fix-splits needs a data set made with "
            "tools/prepare_dataset.py"
        )
    read_splits(prepared / "splits.json")


def write_fixed_splits(
    prepared: Path,
    out: Path,
    groups: Sequence[Sequence[str]],
    pairs: Sequence[Mapping] = (),
    follow_links: bool = False,
) -> list[Move]:
    """Writes a prepared data set in which no group is in two splits.

    Images of no group, and groups in one split, stay where they are; the others are assigned so
    that the splits keep their sizes as well as may be. The prepared data set stays as it is, for
    the runs that were trained on it. Images are hard links where possible. Folds are not taken
    over: they are made of the new splits.

    Args:
        prepared: folder of a prepared data set.
        out: folder to make.
        groups: file names that must not be parted. Images with one ``group_id`` are such a group
            as well; groups that share an image become one.
        pairs: to list in near_duplicates.json, JSON values.
        follow_links: whether links among the images may lead out of their folder.

    Returns:
        the moves, by name; without any nothing is written.

    Raises:
        BadInputError: an image is in two splits, an id is there twice, or an annotation's image is
            not there.
        FileExistsError, FileNotFoundError, ValueError: see :func:`check_can_fix`.
    """
    check_can_fix(prepared, out)
    contents = {
        split: json.loads((prepared / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
        for split in SPLITS
    }
    old = read_splits(prepared / "splits.json")
    settings = json.loads((prepared / "splits.json").read_text(encoding="utf-8"))
    split_of: dict[str, str] = {}
    for split, content in contents.items():
        for image in content["images"]:
            other = split_of.setdefault(image["file_name"], split)
            if other != split:
                raise BadInputError(
                    image["file_name"], f"is in {other} and {split} of {prepared}; take one out"
                )
    _check_ids(prepared, contents)
    images = [image for content in contents.values() for image in content["images"]]
    groups = _joined(images, groups)
    group_of = {name: i for i, group in enumerate(groups, start=1) for name in group}
    crossing = {name for group in groups if len({split_of[n] for n in group}) > 1 for name in group}
    if not crossing:
        return []

    strata = strata_of(a for content in contents.values() for a in content["annotations"])
    items = [
        Item(i["file_name"], strata.get(i["id"], False), group_of.get(i["file_name"]))
        for i in images
    ]
    kept = {split: [n for n in names if n not in crossing] for split, names in old.items()}
    sizes = [len(contents[split]["images"]) for split in SPLITS]
    new = make_splits(items, sizes, settings.get("seed", 0), earlier=kept)
    target_of = {name: split for split, names in new.items() for name in names}

    with staged(out) as stage:
        for path in sorted((prepared / "images").rglob("*")):
            if path.is_file():
                check_inside(prepared / "images", path, follow_links)
                target = stage / "images" / path.relative_to(prepared / "images")
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, target)
        for split, content in _moved(contents, target_of, group_of).items():
            write_json(stage / "annotations" / f"{split}.json", content)
        left_out = (*SPLITS, "sha256", "fold", "folds")
        about = {k: v for k, v in settings.items() if k not in left_out}
        about |= {"split_by": "group", "fixed_from": sha256(old)}
        write_splits(stage / "splits.json", new, about)
        listed = {"groups": groups, "pairs": list(pairs)}
        write_json(stage / "near_duplicates.json", listed, indent=1)
        if (prepared / "rejected.csv").is_file():
            shutil.copyfile(prepared / "rejected.csv", stage / "rejected.csv")
        os.replace(stage, out)
    return [
        Move(name, split_of[name], target_of[name])
        for name in sorted(crossing)
        if split_of[name] != target_of[name]
    ]


def _check_ids(prepared: Path, contents: Mapping[str, dict]) -> None:
    """Ids must tell images and annotations apart once they come together in one file."""
    seen = {"images": set(), "annotations": set()}
    for key, ids in seen.items():
        for split, content in contents.items():
            path = prepared / "annotations" / f"{split}.json"
            for record in content[key]:
                if record["id"] in ids:
                    told = f"{key} has the id {record['id']!r} twice in the splits"
                    raise BadInputError(path, f"{told}; number them anew over the three files")
                ids.add(record["id"])
                if key == "annotations" and record["image_id"] not in seen["images"]:
                    told = f"annotation {record['id']!r} is of image {record['image_id']!r}"
                    raise BadInputError(path, f"{told}, which no split has; take it out")


def _joined(images: Iterable[Mapping], groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Groups of two file names or more that share no image, old groups of the images included."""
    old = defaultdict(list)
    for image in images:
        if image.get("group_id") is not None:
            old[str(image["group_id"])].append(image["file_name"])
    names = sorted(image["file_name"] for image in images)
    places = {name: place for place, name in enumerate(names)}
    pairs = [pair for group in (*groups, *old.values()) for pair in pairwise(group)]
    labels = group_labels(len(names), [(places[a], places[b]) for a, b in pairs])
    joined = defaultdict(list)
    for name, label in zip(names, labels.tolist(), strict=True):
        joined[label].append(name)
    return [group for group in joined.values() if len(group) > 1]


def _moved(
    contents: Mapping[str, dict], target_of: Mapping[str, str], group_of: Mapping[str, int]
) -> dict[str, dict]:
    """COCO contents by split after the moves, by id; images carry their ``group_id``, if any."""
    images = [
        {key: value for key, value in image.items() if key != "group_id"}
        for content in contents.values()
        for image in content["images"]
    ]
    annotations = [a for content in contents.values() for a in content["annotations"]]
    split_of_id = {image["id"]: target_of[image["file_name"]] for image in images}
    moved = {}
    for split, content in contents.items():
        own = [
            {**image, "group_id": group_of[image["file_name"]]}
            if image["file_name"] in group_of
            else image
            for image in images
            if target_of[image["file_name"]] == split
        ]
        of_split = [a for a in annotations if split_of_id.get(a["image_id"]) == split]
        moved[split] = {
            **content,
            "images": sorted(own, key=lambda image: image["id"]),
            "annotations": sorted(of_split, key=lambda annotation: annotation["id"]),
        }
    return moved
