"""EndoTect 2020: HyperKvasir's segmented images for development, 200 images for the test."""

from imrcnn_d2.data.formats.public_masks import Folders, PublicMasks

_TEST = "EndoTect_2020_Segmentation_Test_Dataset"
_DEVELOPMENT = "segmented-images"


class EndoTect(PublicMasks):
    name = "endotect"
    help = "EndoTect 2020's test images with masks, and its development images where they are there"
    title = "EndoTect 2020 (Hicks et al. 2021, doi 10.1007/978-3-030-68793-9_18)"
    url = "https://endotect.com/"
    terms = "for research and education, the paper to be cited; development images: CC BY 4.0"
    default_ratio = (4, 1, 0)
    layouts = ((f"{_TEST}/images", f"{_TEST}/masks"), ("images", "masks"))
    published = {f"{_TEST}/images": 200, "images": 200, f"{_DEVELOPMENT}/images": 1000}
    folders = (
        (
            Folders(f"{_DEVELOPMENT}/images", f"{_DEVELOPMENT}/masks", "development"),
            Folders(f"{_TEST}/images", f"{_TEST}/masks", "test", split="test"),
        ),
        (Folders("images", "masks", "test", split="test"),),
    )
