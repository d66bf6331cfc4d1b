"""Audit of a data set: files, annotations, duplicates and leakage between the splits."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imrcnn_d2.data.audit.checks import (
    DuplicatePair,
    Examined,
    category_findings,
    duplicate_findings,
    exact_duplicates,
    examine_all,
    file_findings,
    near_duplicates,
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

__all__ = ["Audit", "audit"]


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        data: the data set.
        examined: the images, in the order of ``data.entries``.
        duplicates: images that show the same.
        findings: by kind, then severity, then score, the strongest first.
        notes: what was not checked, and why.
        checked: areas that were checked, keys of `AREAS`.
        embeddings: of the images that can be read, in their order; None without them.
    """

    data: AuditedData
    examined: list[Examined]
    duplicates: list[DuplicatePair]
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
        ModuleNotFoundError: a package that a check needs is missing.
    """
    ids = None if data.classified else {category["id"] for category in data.categories}
    examined = examine_all(data.entries, ids)
    findings = [found for one in examined for found in one.findings]
    for file, annotation in data.strays:
        detail = f"{file}: there is no image with id {annotation['image_id']!r}."
        number = annotation.get("id")
        number = number if isinstance(number, int) else None
        findings.append(finding("malformed", (), (), detail, annotation_id=number))
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
    result.duplicates = exact_duplicates(examined) + near_duplicates(examined, vectors)
    findings += duplicate_findings(data.entries, result.duplicates) + patient_findings(data.entries)
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
