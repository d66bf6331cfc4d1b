"""PolypGen: single frames of six hospitals, and sequences with and without polyps."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from imrcnn_d2.data.formats.public_masks import Folders, PublicMasks

# Names of hospital C4's single frames begin with the number of their sequence.
_C4 = re.compile(r"(\d+)_endocv2021_", re.ASCII)
_FRAME = re.compile(r"(\d+)(?: \d+)?$", re.ASCII)  # "..._329 2.jpg" is a second copy's name
_CENTRE = re.compile(r"_(C[1-6])_")


class PolypGen(PublicMasks):
    name = "polypgen"
    help = "PolypGen (EndoCV2021): data_C1 to data_C6, sequenceData"
    title = "PolypGen (Ali et al. 2023, doi 10.1038/s41597-023-01981-y)"
    url = "https://doi.org/10.7303/syn26376615"
    terms = "for research and education, the paper to be cited; see the download page"
    layouts = (
        ("data_C*/images_C*", "data_C*/masks_C*"),
        ("sequenceData/positive/*/images_*", "sequenceData/positive/*/masks_*"),
        ("sequenceData/negativeOnly/*",),
    )
    published = {
        "data_C*/images_C*": 1537,
        "data_C1/images_C1": 256,
        "data_C2/images_C2": 301,
        "data_C3/images_C3": 457,
        "data_C4/images_C4": 227,
        "data_C5/images_C5": 208,
        "data_C6/images_C6": 88,
        "sequenceData/positive/*/images_*": 2225,
        "sequenceData/negativeOnly/*": 4275,
    }
    has_lesion_free = True
    # The mask of C3_EndoCV2021_00489_.jpg is C3_EndoCV2021_00489_mask.jpg.
    mask_names = ("{}_mask", "{}mask")

    def folders_in(self, root: Path) -> Iterator[Folders]:
        for centre in ("C1", "C2", "C3", "C4", "C5", "C6"):
            folder = f"data_{centre}"
            if (root / folder).is_dir():
                yield Folders(f"{folder}/images_{centre}", f"{folder}/masks_{centre}", centre)
        for path in sorted(root.glob("sequenceData/positive/*/")):
            folder, name = path.relative_to(root), path.name
            yield Folders(f"{folder}/images_{name}", f"{folder}/masks_{name}", name)
        for path in sorted(root.glob("sequenceData/negativeOnly/*/")):
            folder = str(path.relative_to(root))
            yield Folders(folder, None, f"{path.name.removesuffix('_neg')}_neg")

    def fields(self, file_name: str) -> dict:
        folder, name = PurePosixPath(file_name).parts[0], PurePosixPath(file_name).stem
        sequence, centre = None, None
        if folder in ("C1", "C2", "C3", "C4", "C5", "C6"):
            centre = folder
            if centre == "C4" and (start := _C4.match(name)):
                sequence = f"C4_{start[1]}"
        else:
            sequence = folder
            centre = match[1] if (match := _CENTRE.search(name)) else None
        fields = {"centre": centre, "sequence_id": sequence}
        if sequence and (frame := _FRAME.search(name)):
            fields["frame"] = int(frame[1])
        return {key: value for key, value in fields.items() if value is not None}
