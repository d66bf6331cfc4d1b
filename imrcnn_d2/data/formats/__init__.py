"""Annotation formats and public data sets: a new one is a new file and an entry in `FORMATS`.

Each is a `Format`: its arguments of prepare_dataset, its reader, and its writer where it has one.
"""

from imrcnn_d2.data.formats.base import (
    Format,
    LesionFree,
    PublicDataSet,
    Sample,
    Source,
    export,
    with_lesion_free,
)
from imrcnn_d2.data.formats.bkai_igh import BkaiIgh
from imrcnn_d2.data.formats.classification import Classification, read_class_folders, read_label_csv
from imrcnn_d2.data.formats.coco import Coco, read_coco
from imrcnn_d2.data.formats.cvat import Cvat, read_cvat
from imrcnn_d2.data.formats.cvc_300 import Cvc300
from imrcnn_d2.data.formats.cvc_clinicdb import CvcClinicDb
from imrcnn_d2.data.formats.cvc_colondb import CvcColonDb
from imrcnn_d2.data.formats.endotect import EndoTect
from imrcnn_d2.data.formats.etis_larib import EtisLarib
from imrcnn_d2.data.formats.hyperkvasir import HyperKvasir
from imrcnn_d2.data.formats.hyperkvasir_labels import HyperKvasirLabels
from imrcnn_d2.data.formats.kvasir_seg import KvasirSeg
from imrcnn_d2.data.formats.kvasir_v2 import KvasirV2
from imrcnn_d2.data.formats.labelme import LabelMe, labelme_document, read_labelme
from imrcnn_d2.data.formats.ldpolypvideo import LdPolypVideo
from imrcnn_d2.data.formats.mask_folder import MaskFolder, read_mask_folder
from imrcnn_d2.data.formats.merge import Merge, read_merged
from imrcnn_d2.data.formats.piccolo import Piccolo
from imrcnn_d2.data.formats.polypgen import PolypGen
from imrcnn_d2.data.formats.real_colon import RealColon
from imrcnn_d2.data.formats.sun import Sun
from imrcnn_d2.data.prepare.procedures import Procedures
from imrcnn_d2.data.prepare.synthetic import Synthetic

__all__ = [
    "FORMATS",
    "Format",
    "PublicDataSet",
    "Sample",
    "Source",
    "export",
    "labelme_document",
    "read_class_folders",
    "read_coco",
    "read_cvat",
    "read_label_csv",
    "read_labelme",
    "read_mask_folder",
    "read_merged",
    "with_lesion_free",
]

_PUBLIC = (
    *(KvasirSeg, HyperKvasir, EndoTect, CvcClinicDb, CvcColonDb, Cvc300, EtisLarib, PolypGen),
    *(BkaiIgh, Piccolo, Sun, LdPolypVideo, RealColon, KvasirV2, HyperKvasirLabels),
)
_OWN = (Coco, MaskFolder, LabelMe, Cvat, Classification, LesionFree, Merge)
_CLASSES = (*_PUBLIC, *_OWN, Synthetic, Procedures)
FORMATS: dict[str, Format] = {form.name: form() for form in _CLASSES}
