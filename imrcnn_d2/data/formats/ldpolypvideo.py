"""LDPolypVideo: 160 videos with boxes, for training and validation, and for the test."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from imrcnn_d2.data.formats.public_videos import (
    PublicVideos,
    Video,
    corner_annotation,
    numbered_files,
)
from imrcnn_d2.data.images import SourceImage
from imrcnn_d2.utils.files import BadInputError, Rejects

_EVERY = 5


class LdPolypVideo(PublicVideos):
    name = "ldpolypvideo"
    help = "LDPolypVideo: TrainValid/ and Test/, each with Images/ and Annotations/ by video"
    title = "LDPolypVideo (Ma et al. 2021, doi 10.1007/978-3-030-87240-3_37)"
    url = "https://github.com/dashishi/LDPolypVideo-Benchmark"
    terms = "no licence is stated: ask the authors; the paper to be cited"
    layouts = (
        ("Train*/Images", "Train*/Annotations", "Test/Images", "Test/Annotations"),
        ("Train*/Images", "Train*/Annotations"),
        ("Test/Images", "Test/Annotations"),
    )

    def videos(self, root: Path, rejects: Rejects, notes: list[str]) -> Iterator[Video]:
        """The videos by their numbers."""
        parts: dict[str, Path] = {}
        for part in sorted(path.parent for path in root.glob("*/Images")):
            folders = [path for path in (part / "Images").iterdir() if path.name.isdecimal()]
            for folder in sorted(folders, key=lambda path: int(path.name)):
                with rejects.catch():
                    number = str(int(folder.name))
                    if number in parts:
                        raise BadInputError(folder, f"is a video of {parts[number]} as well")
                    parts[number] = part
                    annotations = part / "Annotations" / folder.name
                    if not annotations.is_dir():
                        raise BadInputError(folder, f"has no {annotations}; {self.expected()}")
                    texts = numbered_files(root, annotations, rejects, (".txt",))
                    frames = numbered_files(root, folder, rejects)
                    split = "train" if int(number) % _EVERY else "val"
                    split = "test" if part.name == "Test" else split
                    yield Video(number, frames, partial(_annotations, texts), split=split)
        notes.append(
            f"which videos validate was not published: each {_EVERY}th by its number does of those "
            "that do not test"
        )


def _annotations(texts: Mapping[int, Path], number: int, image: SourceImage) -> list[dict]:
    """The first line of a text counts its boxes, the others are xmin ymin xmax ymax."""
    if number not in texts:
        raise ValueError("has no annotation: every frame has one, a 0 without a polyp")
    try:
        text = texts[number].read_text(encoding="ascii")
        (count,), *boxes = [line.split() for line in text.splitlines() if line.strip()] or [[]]
        if int(count) != len(boxes):
            raise ValueError(f"{len(boxes)} boxes, the first line says {count}")
        if any(len(box) != 4 for box in boxes):
            raise ValueError("a box is not xmin ymin xmax ymax")
        return [corner_annotation([*map(float, box)], image) for box in boxes]
    except (OSError, ValueError) as error:
        reason = f"is no annotation of LDPolypVideo ({error})"
        raise BadInputError(texts[number], reason) from error
