"""REAL-Colon: 60 whole colonoscopies of four centres, frame by frame, with boxes."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import defusedxml
from defusedxml.ElementTree import parse

from imrcnn_d2.data.formats.public_videos import (
    PublicVideos,
    Video,
    corner_annotation,
    numbered_files,
)
from imrcnn_d2.data.images import SourceImage, annotated_on_stored_pixels
from imrcnn_d2.data.prepare.metadata import read_facts
from imrcnn_d2.utils.files import BadInputError, Rejects

NUM_PROCEDURES = 60
_FRAMES = re.compile(r"(\d{3})-(\d{3})_frames", re.ASCII)  # centre and number of a procedure
_PROCEDURE = ("age", "sex", "endoscope_brand", "fps", "num_frames", "num_lesions", "bbps")
_LESION = {
    "size [mm]": "size_mm",
    "site": "site",
    "histology_class": "histology",
    "histology_extended": "histology_extended",
}
# Of each centre, in the benchmark of the paper: those up to here are trained on, or validate; the
# others test.
_LAST_TRAIN, _LAST_VAL = 10, 12
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class RealColon(PublicVideos):
    name = "real-colon"
    help = "REAL-Colon: video_info.csv, lesion_info.csv, SSS-VVV_frames/, SSS-VVV_annotations/"
    title = "REAL-Colon (Biffi et al. 2024, doi 10.1038/s41597-024-03359-0)"
    url = "https://doi.org/10.25452/figshare.plus.22202866"
    terms = "CC BY 4.0, the paper to be cited"
    layouts = (("video_info.csv", "lesion_info.csv", "*-*_frames", "*-*_annotations"),)

    def videos(self, root: Path, rejects: Rejects, notes: list[str]) -> Iterator[Video]:
        """The procedures whose folders are there; each has its patient, and its study is the
        centre."""
        columns = {name: name for name in _PROCEDURE}
        facts = read_facts(root / "video_info.csv", "unique_video_name", columns)
        lesions = read_facts(root / "lesion_info.csv", "unique_object_id", _LESION)
        count = 0
        for folder in sorted(root.glob("*-*_frames")):
            with rejects.catch():
                procedure = folder.name.removesuffix("_frames")
                match = _FRAMES.fullmatch(folder.name)
                if match is None or procedure not in facts:
                    raise BadInputError(folder, f"is of no procedure of {root / 'video_info.csv'}")
                annotations = root / f"{procedure}_annotations"
                if not annotations.is_dir():
                    raise BadInputError(folder, f"has no {annotations.name}; {self.expected()}")
                frames = numbered_files(root, folder, rejects)
                of_procedure = facts[procedure]
                if len(frames) != of_procedure.get("num_frames", len(frames)):
                    stated = f"{len(frames)} frames, video_info.csv says {{num_frames}}"
                    notes.append(f"Warning: {folder}: {stated.format(**of_procedure)}")
                centre, number = match[1], int(match[2])
                split = "train" if number <= _LAST_TRAIN else "test"
                split = "val" if _LAST_TRAIN < number <= _LAST_VAL else split
                annotate = partial(_annotations, annotations, lesions)
                fields = {"centre": centre, "patient_id": procedure}
                count += 1
                yield Video(
                    procedure, frames, annotate, fields, {"centre": centre, **of_procedure}, split
                )
        if count < NUM_PROCEDURES:
            notes.append(f"{count} of {NUM_PROCEDURES} procedures are there")


def _annotations(
    folder: Path, lesions: Mapping[str, dict], number: int, image: SourceImage
) -> list[dict]:
    path = folder / f"{image.path.stem}.xml"
    root = _parse(path)
    try:
        size = [int(root.findtext(f"size/{side}")) for side in ("width", "height")]
        annotated_on_stored_pixels(image, *size)
        annotations = []
        for lesion in root.iterfind("object"):
            box = [float(lesion.findtext(f"bndbox/{corner}")) for corner in _CORNERS]
            lesion_id = (lesion.findtext("unique_id") or "").strip()
            if not lesion_id:
                raise ValueError("an object has no unique_id")
            facts = lesions.get(lesion_id, {})
            annotations.append(corner_annotation(box, image, lesion_id=lesion_id, **facts))
        return annotations
    except BadInputError:
        raise
    except (TypeError, ValueError) as error:
        raise BadInputError(path, f"is no annotation of REAL-Colon ({error})") from error


def _parse(path: Path) -> Element:
    try:
        return parse(path).getroot()
    except FileNotFoundError as error:
        reason = "is not there: every frame has an annotation, one without objects if need be"
        raise BadInputError(path, reason) from error
    except (defusedxml.DefusedXmlException, ParseError, ValueError, OSError) as error:
        raise BadInputError(path, f"cannot be read as XML ({error})") from error
