"""CVC-EndoSceneStill: CVC-300 and CVC-612 in its own split, or the 60 test images of CVC-300."""

from pathlib import PurePosixPath

from imrcnn_d2.data.formats.cvc_clinicdb import frame_fields
from imrcnn_d2.data.formats.public_masks import Folders, PublicMasks

# First and last frames of the published split by patient (Vázquez et al. 2017), 547, 183 and 182.
_SPLITS = {
    ("CVC-300", "train"): ((1, 76), (98, 148), (221, 273)),
    ("CVC-300", "val"): ((77, 97), (209, 220), (274, 300)),
    ("CVC-300", "test"): ((149, 208),),
    ("CVC-612", "train"): ((26, 50), (104, 126), (178, 227), (253, 317), (384, 503), (529, 612)),
    ("CVC-612", "val"): ((51, 103), (228, 252), (318, 342), (364, 383)),
    ("CVC-612", "test"): ((1, 25), (127, 177), (343, 363), (504, 528)),
}


class Cvc300(PublicMasks):
    name = "cvc-300"
    help = "CVC-EndoSceneStill: CVC-300 and CVC-612, split by patient; or CVC-300's test images"
    title = "CVC-EndoSceneStill (Vázquez et al. 2017, doi 10.1155/2017/4037190)"
    url = "https://pages.cvc.uab.es/CVC-Colon/index.php/databases/cvc-endoscenestill/"
    terms = "for research, the paper to be cited; see the download page"
    published = {"CVC-300/bbdd": 300, "CVC-612/bbdd": 612, "images": 60}
    folders = (
        tuple(Folders(f"{s}/bbdd", f"{s}/gtpolyp", s) for s in ("CVC-300", "CVC-612")),
        (Folders("images", "masks", split="test"),),
    )

    def fields(self, file_name: str) -> dict:
        path = PurePosixPath(file_name)
        folder, name = path.parent.name, path.stem
        if not folder:  # of the 60 test images
            return {}
        fields = {"split": _split(folder, name)}
        if folder == "CVC-612":
            fields |= frame_fields(file_name)
            fields["sequence_id"] = f"CVC-612/{fields['sequence_id']}"
        return fields


def _split(folder: str, name: str) -> str:
    if name.isdecimal():
        for (part, split), ranges in _SPLITS.items():
            if part == folder and any(first <= int(name) <= last for first, last in ranges):
                return split
    raise ValueError(f"is not numbered as in {folder}, so that its split is not known")
