"""HyperKvasir's segmented images: 1,000 polyps with masks and boxes."""

from imrcnn_d2.data.formats.kvasir_seg import KvasirSeg
from imrcnn_d2.data.formats.public_masks import Folders


class HyperKvasir(KvasirSeg):
    name = "hyperkvasir"
    help = "HyperKvasir's segmented images: segmented-images/ with images/ and masks/"
    title = "HyperKvasir (Borgli et al. 2020, doi 10.1038/s41597-020-00622-y)"
    url = "https://datasets.simula.no/hyper-kvasir/"
    terms = "CC BY 4.0"
    published = {"segmented-images/images": 1000, "images": 1000}
    folders = (
        (Folders("segmented-images/images", "segmented-images/masks"),),
        (Folders("images", "masks"),),
    )
