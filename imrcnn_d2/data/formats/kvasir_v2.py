"""Kvasir v2: 8,000 images of eight classes."""

from pathlib import Path

from imrcnn_d2.data.formats.base import PublicDataSet, Source
from imrcnn_d2.data.formats.classification import read_class_folders
from imrcnn_d2.utils.files import Rejects

_CLASSES = (
    *("dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum"),
    *("normal-pylorus", "normal-z-line", "polyps", "ulcerative-colitis"),
)


class KvasirV2(PublicDataSet):
    name = "kvasir-v2"
    help = "Kvasir v2: a folder per class, eight classes (classification)"
    title = "Kvasir v2 (Pogorelov et al. 2017, doi 10.1145/3083187.3083212)"
    url = "https://datasets.simula.no/kvasir/"
    terms = "for research and education, the paper to be cited; other use by permission"
    layouts = (_CLASSES,)
    published = dict.fromkeys(_CLASSES, 1000)

    def read_layout(self, root: Path, rejects: Rejects) -> Source:
        return read_class_folders(root, rejects, _CLASSES)
