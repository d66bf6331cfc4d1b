"""DICOM files made for the tests."""

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

PATIENT = {
    "PatientName": "Musterfrau^Erika",
    "PatientID": "KIS-4711",
    "PatientBirthDate": "19640812",
    "AccessionNumber": "ACC0815",
}


def write_dicom(path, pixels=None, *, encoded=None, syntax=ExplicitVRLittleEndian, **fields):
    """Write pixels (H, W), (H, W, 3) or (N, H, W, 3) and further elements; return the path.

    ``encoded`` are the frames as bytes, compressed by the transfer syntax ``syntax``."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if pixels is not None:
        colours = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
        dataset.set_pixel_data(pixels, colours, 8 * pixels.itemsize)
    if encoded:
        dataset.PixelData = encapsulate(encoded)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.1"
    dataset.SOPInstanceUID = generate_uid()
    for key, value in {**PATIENT, **fields}.items():
        setattr(dataset, key, value)
    dataset.save_as(path, enforce_file_format=True)
    return path
