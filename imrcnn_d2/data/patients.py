"""Whose images they are: patient ids from a table, from file names, or from DICOM files.

Images of one patient stay in one split, and figures are resampled over patients. So an image whose
patient should be known and is not is bad input; it never silently becomes a patient of its own.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from imrcnn_d2.data.dicom import own_words, read_header
from imrcnn_d2.data.images import list_files
from imrcnn_d2.data.metadata import read_metadata, with_metadata
from imrcnn_d2.data.prepare import Sample, Source
from imrcnn_d2.data.rejects import BadInputError, Rejects

__all__ = [
    "patients_from_dicom",
    "patients_from_pattern",
    "with_patients",
    "with_patients_from_csv",
]

PatientOf = Callable[[Sample], str | None]


def with_patients_from_csv(source: Source, csv_file: Path, rejects: Rejects) -> Source:
    """Takes ``patient_id`` from a table with the columns file and patient_id.

    An empty patient_id says that the patient is not known.

    Args:
        source: where the images come from.
        csv_file: see `read_metadata`; a file is named as COCO's ``file_name``.
        rejects: takes images that are not in the table, or have another patient_id already.

    Raises:
        BadInputError: the table cannot be read, or is of something else.
    """
    table = read_metadata(csv_file, rejects)
    if table.key != ("file",) or "patient_id" not in table.columns:
        raise BadInputError(csv_file, "is no table of patients: it needs file and patient_id")
    others = [column for column in table.columns if column != "patient_id"]
    if others:
        table.notes.append(f"{csv_file}: {', '.join(others)} not read; --metadata joins them")
    for _, values in table.rows.values():
        for column in others:
            values.pop(column, None)
    joined = with_metadata(source, [table], rejects, every_image=True)
    return with_patients(joined, lambda sample: sample.fields.get("patient_id"), rejects)


def with_patients(source: Source, patient_of: PatientOf, rejects: Rejects) -> Source:
    """Gives images the ``patient_id`` that `patient_of` says, and tells how many there are.

    Args:
        source: where the images come from.
        patient_of: of a sample; None where it is not known.
        rejects: takes images for which it raises, and those that have another patient_id already.
    """
    return replace(source, samples=_identified(source, patient_of, rejects))


def _identified(source: Source, patient_of: PatientOf, rejects: Rejects):
    patients, unknown = set(), 0
    for sample in source.samples:
        with rejects.catch():
            there, patient = sample.fields.get("patient_id"), patient_of(sample)
            if patient is None:
                patient = None if there is None else str(there)
            elif there is not None and str(there) != patient:
                raise BadInputError(
                    sample.image.path,
                    f"patient_id is {there!r} in the data set, but {patient!r} by what was asked "
                    "for",
                )
            if patient is None:
                unknown += 1
            else:
                sample.fields["patient_id"] = patient
                patients.add(patient)
            yield sample
    source.notes.append(f"{len(patients)} patients")
    if unknown:
        source.notes.append(
            f"{unknown} images of unknown patients: each is split as if it were a patient of its "
            "own, and figures are resampled over images instead of patients"
        )


def patients_from_pattern(pattern: str) -> PatientOf:
    """Finds the patient in the file name.

    Args:
        pattern: regular expression, looked for anywhere in ``file_name``, folders included. The id
            is its group named ``patient``, else its first group, else all that matches; a group
            that takes no part says that the patient is not known.

    Raises:
        ValueError: it is no regular expression. Of a name that does not match, the function
            returned raises BadInputError.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--patient-pattern {pattern!r} is no regular expression: {error}") from (
            error
        )
    group = "patient" if "patient" in compiled.groupindex else min(compiled.groups, 1)

    def patient_of(sample: Sample) -> str | None:
        found = compiled.search(sample.file_name)
        if found is None:
            raise BadInputError(
                sample.image.path, f"{sample.file_name} does not match the pattern {pattern!r}"
            )
        return found[group] or None

    return patient_of


def patients_from_dicom(folder: Path | None = None, rejects: Rejects | None = None) -> PatientOf:
    """Reads the patient out of DICOM files: tag (0010,0020), PatientID.

    Args:
        folder: of DICOM files named as the images but for the suffix, of which there may be none;
            None where the images are DICOM files themselves.
        rejects: takes links that lead out of the folder, see `list_files`.

    Raises:
        FileNotFoundError: there is no such folder. Of an image without a DICOM file, the function
            returned raises BadInputError.
    """
    files: dict[str, Path] = {}
    for path in [] if folder is None else list_files(folder, rejects):
        name = path.relative_to(folder).as_posix()
        files[re.sub(r"\.(dcm|dicom)$", "", name, flags=re.IGNORECASE)] = path

    def patient_of(sample: Sample) -> str | None:
        path = sample.image.path
        if folder is not None:
            stem = PurePosixPath(sample.file_name).with_suffix("").as_posix()
            if stem not in files:
                raise BadInputError(path, f"there is no DICOM file {stem}.dcm in {folder}")
            path = files[stem]
        header = read_header(path, specific_tags=["PatientID"])
        with own_words(path, "its PatientID cannot be read"):
            return str(header.get("PatientID") or "").strip() or None

    return patient_of
