"""ETIS-LaribPolypDB: 196 frames of 34 sequences, as TIFF, PNG or BMP."""

from imrcnn_d2.data.formats.public_masks import Folders, PublicMasks


class EtisLarib(PublicMasks):
    name = "etis-larib"
    help = "ETIS-LaribPolypDB: ETIS-LaribPolypDB/ and Ground Truth/, or images/ and masks/"
    title = "ETIS-LaribPolypDB (Silva et al. 2014, doi 10.1007/s11548-013-0926-3)"
    url = "https://polyp.grand-challenge.org/ETISLarib/"
    terms = "for research, the paper to be cited; see the download page"
    published = {"ETIS-LaribPolypDB": 196, "images": 196}
    folders = ((Folders("ETIS-LaribPolypDB", "Ground Truth"),), (Folders("images", "masks"),))
    mask_names = ("p{}", "{}")
