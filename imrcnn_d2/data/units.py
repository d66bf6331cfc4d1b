"""The unit of an image: its patient, else its sequence, else the image itself.

Images of one unit stay in one split, and intervals and tests resample units, not images.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

KINDS = ("patient", "sequence")  # with the id of an image in COCO's fields patient_id, sequence_id


def units_of(images: Sequence[Mapping]) -> list[tuple[str, str] | None]:
    """Kind and id of the unit that each image shares with others: ("patient", id), also where only
    other frames of its sequence name the one patient, else ("sequence", id); None where neither is
    known, so that the image is a unit of its own."""
    patients = defaultdict(set)  # of each sequence
    for image in images:
        if image.get("patient_id") is not None:
            patients[str(image.get("sequence_id"))].add(str(image["patient_id"]))

    def unit(image: Mapping) -> tuple[str, str] | None:
        patient, sequence = image.get("patient_id"), image.get("sequence_id")
        if patient is None and sequence is not None and len(patients[str(sequence)]) == 1:
            (patient,) = patients[str(sequence)]
        if patient is not None:
            return "patient", str(patient)
        return None if sequence is None else ("sequence", str(sequence))

    return [unit(image) for image in images]


@dataclass(frozen=True, eq=False)
class Units:
    """The U units of I images, in the order of their first images.

    Where patients are known for a part of the images only, the others are units by their sequence
    or on their own, so that one image of an unknown patient does not make all images independent.
    """

    of_image: np.ndarray  # (I,) int in [0, U)
    kinds: np.ndarray  # (U,) str: "patient", "sequence" or "image"

    @classmethod
    def of(cls, images: Sequence[Mapping]) -> "Units":
        """The units of the records of images, as in a COCO file."""
        keys = [unit or ("image", i) for i, unit in enumerate(units_of(images))]
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        kinds = np.array([kind for kind, _ in number], dtype=str)
        return cls(np.array([number[key] for key in keys], dtype=int), kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def kind(self) -> str:
        """The kind that intervals are reported to be over: the largest that any unit has."""
        return next((kind for kind in KINDS if kind in self.kinds), "image")

    @cached_property
    def patients(self) -> np.ndarray:
        """(P,) int, the numbers of the units that are patients."""
        return np.flatnonzero(self.kinds == "patient")

    def patient_ids(self, images: Sequence[Mapping]) -> dict[int, object]:
        """The patient_id, as in the records of the I images, of each unit that is a patient."""
        pairs = zip(self.of_image.tolist(), images, strict=True)
        return {u: i["patient_id"] for u, i in pairs if i.get("patient_id") is not None}

    @property
    def unknown(self) -> int:
        """The number of images whose patient is not known."""
        return int((self.kinds[self.of_image] != "patient").sum())

    def __str__(self) -> str:
        """For example "12 patients, 3 sequences, 40 images of unknown patients"."""
        counts = Counter(self.kinds.tolist())
        parts = [
            f"{counts[kind]:,} {kind}{'s' * (counts[kind] != 1)}"
            for kind in (*KINDS, "image")
            if counts[kind]
        ]
        text = ", ".join(parts) or "0 images"
        return f"{text} of unknown patients" if len(parts) > 1 and counts["patient"] else text
