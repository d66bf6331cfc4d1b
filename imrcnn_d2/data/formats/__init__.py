"""Annotation formats and public data sets: a new one is a new file and an entry in `FORMATS`.

Each is a `Format`: its arguments of prepare_dataset, its reader, and its writer where it has one.
"""

from imrcnn_d2.data.formats.base import Format, LesionFree, Sample, Source, export, with_lesion_free
from imrcnn_d2.data.formats.classification import Classification, read_class_folders, read_label_csv
from imrcnn_d2.data.formats.coco import Coco, read_coco
from imrcnn_d2.data.formats.cvat import Cvat, read_cvat
from imrcnn_d2.data.formats.kvasir_seg import KvasirSeg, read_kvasir_seg
from imrcnn_d2.data.formats.labelme import LabelMe, labelme_document, read_labelme
from imrcnn_d2.data.formats.mask_folder import MaskFolder, read_mask_folder
from imrcnn_d2.data.prepare.synthetic import Synthetic

__all__ = [
    "FORMATS",
    "Format",
    "Sample",
    "Source",
    "export",
    "labelme_document",
    "read_class_folders",
    "read_coco",
    "read_cvat",
    "read_kvasir_seg",
    "read_label_csv",
    "read_labelme",
    "read_mask_folder",
    "with_lesion_free",
]

_CLASSES = (KvasirSeg, LesionFree, Coco, MaskFolder, LabelMe, Cvat, Classification, Synthetic)
FORMATS: dict[str, Format] = {form.name: form() for form in _CLASSES}
