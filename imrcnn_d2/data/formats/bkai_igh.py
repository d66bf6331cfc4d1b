"""BKAI-IGH NeoPolyp: polyps of two classes, in masks of two colours."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from imrcnn_d2.data.formats.public_masks import Folders, PublicMasks
from imrcnn_d2.data.images import read_image


class BkaiIgh(PublicMasks):
    name = "bkai-igh"
    help = "BKAI-IGH NeoPolyp: train/ and train_gt/, neoplastic and non-neoplastic polyps"
    title = "BKAI-IGH NeoPolyp (Ngoc Lan et al. 2021, doi 10.1007/978-3-030-90436-4_2)"
    url = "https://www.kaggle.com/competitions/bkai-igh-neopolyp/data"
    terms = "for research and education, by the rules of the competition; the paper to be cited"
    categories = (
        {"id": 1, "name": "neoplastic", "supercategory": "lesion"},
        {"id": 2, "name": "non-neoplastic", "supercategory": "lesion"},
    )
    layouts = (("train", "train_gt"),)
    published = {"train": 1000, "train/train": 1000}

    def folders_in(self, root: Path) -> Iterator[Folders]:
        # Kaggle's archive has each folder in one of the same name; test/ has no masks.
        yield Folders(
            *(
                inner if (root / (inner := f"{name}/{name}")).is_dir() else name
                for name in ("train", "train_gt")
            )
        )

    def read_mask(self, path: Path) -> Iterator[tuple[int, np.ndarray]]:
        pixels = read_image(path).astype(int)
        red, green = pixels[..., 0], pixels[..., 1]
        yield 1, (red >= 128) & (red > green)
        yield 2, (green >= 128) & (green >= red)
