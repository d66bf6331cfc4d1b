"""CVC-ClinicDB: 612 frames of 29 sequences, TIFF or PNG."""

from bisect import bisect
from pathlib import PurePosixPath

from imrcnn_d2.data.formats.public_masks import Folders, PublicMasks

NUM_FRAMES = 612
# The first frame of each sequence, as github.com/dataset-ninja/cvc-612 lists them: 29, where the
# paper counts 31.
FIRST_FRAMES = (
    *(1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298, 318, 343, 364, 384, 409),
    *(429, 448, 467, 479, 504, 529, 547, 572, 592),
)


def frame_fields(file_name: str) -> dict:
    """The sequence of a frame that is named by its number, and its place there from 0.

    Raises:
        ValueError: it is named otherwise, so that its sequence is not known.
    """
    name = PurePosixPath(file_name).stem
    if not name.isdecimal() or not 1 <= int(name) <= NUM_FRAMES:
        reason = f"is not named 1 to {NUM_FRAMES} as in CVC-ClinicDB, which gives its sequence"
        remedy = "name it so, or read the images and masks with prepare-dataset masks"
        raise ValueError(f"{reason}; {remedy}")
    sequence = bisect(FIRST_FRAMES, int(name))
    return {"sequence_id": str(sequence), "frame": int(name) - FIRST_FRAMES[sequence - 1]}


class CvcClinicDb(PublicMasks):
    name = "cvc-clinicdb"
    help = "CVC-ClinicDB: Original/ and Ground Truth/, TIFF as distributed, or PNG"
    title = "CVC-ClinicDB (Bernal et al. 2015, doi 10.1016/j.compmedimag.2015.02.007)"
    url = "https://polyp.grand-challenge.org/CVCClinicDB/"
    terms = "for research and education, the paper to be cited; see the download page"
    published = {"Original": NUM_FRAMES}
    folders = ((Folders("Original", "Ground Truth"),),)

    def fields(self, file_name: str) -> dict:
        return frame_fields(file_name)
