"""DICOM files made for the tests."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

__all__ = ["PATIENT", "write_dicom"]

PATIENT = {
    "PatientName": "Musterfrau^Erika",
    "PatientID": "KIS-4711",
    "PatientBirthDate": "19640812",
    "AccessionNumber": "ACC0815",
}


def write_dicom(path, pixels=None, *, encoded=None, syntax=ExplicitVRLittleEndian, **fields):
    """
    Args:
        path (Path):
        pixels (np.ndarray or None): (H, W), (H, W, 3) or (N, H, W, 3); None for no pixels.
        encoded (list[bytes] or None): the same, compressed as ``syntax`` says.
        syntax (str): UID of the transfer syntax.
        **fields: further elements.

    Returns:
        Path: the file.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = (
        "1.2.840.10008.5.1.4.1.1.77.1.1"
    )
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    for key, value in PATIENT.items():
        setattr(dataset, key, value)
    if pixels is not None:
        gray = pixels.ndim == 2
        dataset.Rows, dataset.Columns = pixels.shape[:2] if gray else pixels.shape[-3:-1]
        dataset.SamplesPerPixel = 1 if gray else 3
        dataset.PhotometricInterpretation = "MONOCHROME2" if gray else "RGB"
        if not gray:
            dataset.PlanarConfiguration = 0
        dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        if pixels.ndim == 4:
            dataset.NumberOfFrames = len(pixels)
        dataset.PixelData = (
            encapsulate(encoded) if encoded else np.ascontiguousarray(pixels).tobytes()
        )
        dataset["PixelData"].VR = "OB" if encoded or pixels.itemsize == 1 else "OW"
    for key, value in fields.items():
        setattr(dataset, key, value)
    dataset.save_as(path, enforce_file_format=True)
    return Path(path)
