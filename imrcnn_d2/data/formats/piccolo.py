"""PICCOLO: frames of 76 lesions in white light and narrow-band imaging, with masks."""

import re
from pathlib import PurePosixPath

from imrcnn_d2.data.formats.public_masks import Folders, PublicMasks

_SPLITS = {"train": "train", "validation": "val", "test": "test"}  # by folder
_NAME = re.compile(r"(\d+)_([^_]+)_frame(\d+)", re.ASCII)  # lesion, clip, position


class Piccolo(PublicMasks):
    name = "piccolo"
    help = "PICCOLO: train/, validation/ and test/, each with polyps/, masks/ and void/"
    title = "PICCOLO (Sánchez-Peralta et al. 2020, doi 10.3390/app10238501)"
    url = "https://www.biobancovasco.bioef.eus/en/Sample-and-data-e-catalog/Databases/PD178-PICCOLO-EN1.html"
    terms = "on request to the Basque Biobank, for research; the paper to be cited"
    published = {"train/polyps": 2203, "validation/polyps": 897, "test/polyps": 333}
    folders = (tuple(Folders(f"{d}/polyps", f"{d}/masks", d, split=s) for d, s in _SPLITS.items()),)
    mask_names = ("{}_Corrected", "{}")
    note = (
        "patients are not named, and the official splits keep them apart: other splits, and folds, "
        "may part the clips of a lesion; clinical facts by "
        "lesion: save their table as CSV with a column lesion_id, and give it by --metadata"
    )

    def fields(self, file_name: str) -> dict:
        """Also the number of the lesion, which all parts of a mask show."""
        match = _NAME.fullmatch(PurePosixPath(file_name).stem)
        if match is None:
            reason = "is not named LESION_CLIP_frameNUMBER as in PICCOLO, which gives its sequence"
            raise ValueError(f"{reason}; name it so, or read it with prepare-dataset masks")
        lesion, clip, number = match.groups()
        return {"sequence_id": f"{lesion}_{clip}", "frame": int(number), "lesion_id": lesion}
