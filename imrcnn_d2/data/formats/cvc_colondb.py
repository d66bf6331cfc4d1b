"""CVC-ColonDB: 300 frames of 15 sequences, or the copy of 380 images with folders."""

from imrcnn_d2.data.formats.public_masks import Folders, PublicMasks


class CvcColonDb(PublicMasks):
    name = "cvc-colondb"
    help = "CVC-ColonDB: N and pN in one folder, BMP or TIFF, or images/ and masks/"
    title = "CVC-ColonDB (Bernal et al. 2012, doi 10.1016/j.patcog.2012.03.002)"
    url = "http://mv.cvc.uab.es/projects/colon-qa/cvccolondb"
    terms = "for research, the paper to be cited; see the download page"
    layouts = (("images", "masks"), ("1.*", "p1.*"))
    published = {"p[0-9]*": 300, "images": 380}
    folders = (
        (Folders("images", "masks"),),
        # next to the masks of other regions, sN and cN
        (Folders(".", ".", image_files="[0-9]*", mask_files="p[0-9]*"),),
    )
    mask_names = ("p{}", "{}")
    note = (
        "frames of one sequence are alike, and which these are was not published: "
        "--split-by group keeps near-duplicates together"
    )
