"""Annotation formats and public data sets: a new one is a new file and an entry in `FORMATS`.

Each is a `Format`: its arguments of prepare_dataset, its reader, and its writer where it has one.
"""

from imrcnn_d2.data.formats.base import Format, Sample, Source, export
from imrcnn_d2.data.formats.classification import Classification, read_class_folders, read_label_csv
from imrcnn_d2.data.formats.coco import Coco, read_coco
from imrcnn_d2.data.formats.cvat import Cvat, read_cvat
from imrcnn_d2.data.formats.kvasir_seg import KvasirSeg, read_kvasir_seg
from imrcnn_d2.data.formats.labelme import LabelMe, read_labelme
from imrcnn_d2.data.formats.lesion_free import LesionFree, read_lesion_free, with_lesion_free
from imrcnn_d2.data.formats.mask_folder import MaskFolder, read_mask_folder
from imrcnn_d2.data.prepare.synthetic import Synthetic

__all__ = [
    "FORMATS",
    "Format",
    "Sample",
    "Source",
    "export",
    "read_class_folders",
    "read_coco",
    "read_cvat",
    "read_kvasir_seg",
    "read_label_csv",
    "read_labelme",
    "read_lesion_free",
    "read_mask_folder",
    "with_lesion_free",
]

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        KvasirSeg(),
        LesionFree(),
        Coco(),
        MaskFolder(),
        LabelMe(),
        Cvat(),
        Classification(),
        Synthetic(),
    )
}
