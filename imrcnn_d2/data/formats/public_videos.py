"""Public data sets of videos whose lesions are marked by boxes, as they are downloaded."""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imrcnn_d2.data.formats import base
from imrcnn_d2.data.images import SourceImage, inspect_images, is_image_name
from imrcnn_d2.data.masks import annotation_from_box
from imrcnn_d2.utils.files import BadInputError, Rejects, check_inside
from imrcnn_d2.utils.progress import tqdm

_NUMBERED = re.compile(r"(.*?)(\d+)\D*", re.ASCII)  # the last number in a name


@dataclass
class Video:
    """The frames of a video or procedure, and what is known of it.

    Attributes:
        id: its ``sequence_id``, unique in the data set.
        frames: by position in the video, ascending; at least one.
        annotate: (position, image) -> COCO annotations of a frame; raises ValueError.
        fields: further COCO fields of its images.
        facts: its COCO record in ``videos``, but for the id.
        split: the official one, if any.
    """

    id: str
    frames: dict[int, Path]
    annotate: Callable[[int, SourceImage], list[dict]]
    fields: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    split: str | None = None


class PublicVideos(base.PublicDataSet):
    """A public data set of videos in which boxes mark the lesions; frames without one show none."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--every",
            type=int,
            metavar="N",
            default=1,
            help="take every Nth frame of each video (1: all); frames keep their numbers, and so "
            "their times",
        )

    def options(self, args: argparse.Namespace) -> dict:
        return {"every": args.every}

    def videos(self, root: Path, rejects: Rejects, notes: list[str]) -> Iterable[Video]:
        """The videos; `notes` takes what the user should know of them."""
        raise NotImplementedError

    def read_layout(self, root: Path, rejects: Rejects, every: int = 1) -> base.Source:
        """Read every Nth frame of each video, from its first one on."""
        if every < 1:
            raise ValueError(f"--every is {every}: give a whole number from 1")
        notes: list[str] = []
        splits: dict[str, list[str]] = defaultdict(list)
        videos = list(self.videos(root, rejects, notes))
        for video in videos:
            first = next(iter(video.frames))
            video.facts.setdefault("num_frames", max(video.frames) + 1)
            numbers = [number for number in video.frames if (number - first) % every == 0]
            video.frames = {number: video.frames[number] for number in numbers}
            if video.split:
                names = (path.relative_to(root).as_posix() for path in video.frames.values())
                splits[video.split] += names

        def samples() -> Iterator[base.Sample]:
            frames = [(video, *frame) for video in videos for frame in video.frames.items()]
            images = inspect_images(path for _, _, path in frames)
            for frame in tqdm(frames, "Reading images", unit="image"):
                with rejects.catch():
                    yield _sample(root, *frame, next(images))

        records = [{"id": video.id, **video.facts} for video in videos]
        categories = list(self.categories)
        return base.Source(samples(), categories, {}, notes, {"videos": records}, dict(splits))


def _sample(
    root: Path, video: Video, number: int, path: Path, image: SourceImage | BadInputError
) -> base.Sample:
    if isinstance(image, BadInputError):
        raise image
    try:
        annotations = video.annotate(number, image)
    except BadInputError:
        raise
    except ValueError as error:
        raise BadInputError(path, str(error)) from error
    fields = {**video.fields, "sequence_id": video.id, "frame": number}
    return base.Sample(path.relative_to(root).as_posix(), image, annotations, fields)


def numbered_files(
    root: Path, folder: Path, rejects: Rejects, suffixes: Sequence[str] = ()
) -> dict[int, Path]:
    """The images in a folder, or its files of these types, by the last number in their names,
    ascending. Those of another name before the number come after those of the names before it, as
    clips of one video do. None, a file without a number and two with the same one are bad input."""
    check_inside(root, folder, rejects.follow_links)
    clips: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in folder.iterdir():
        if path.suffix.lower() not in suffixes if suffixes else not is_image_name(path):
            continue
        with rejects.catch():
            check_inside(root, path, rejects.follow_links)
            match = _NUMBERED.fullmatch(path.stem)
            if match is None:
                raise BadInputError(path, "has no number in its name, which gives its place")
            other = clips[match[1]].setdefault(int(match[2]), path)
            if other is not path:
                raise BadInputError(path, f"has the number of {other.name}; keep one of them")
    files: dict[int, Path] = {}
    for clip in sorted(clips):
        start = max(files) + 1 if files else 0
        files |= {start + number: clips[clip][number] for number in sorted(clips[clip])}
    if not files:
        raise BadInputError(folder, f"holds no {' or '.join(suffixes) or 'image'}")
    return files


def corner_annotation(corners: Sequence[float], image: SourceImage, **fields) -> dict:
    """The COCO annotation of a box xmin, ymin, xmax, ymax in pixels; raise as
    `annotation_from_box`."""
    left, top, right, bottom = corners
    box = [left, top, right - left, bottom - top]
    return {**fields, **annotation_from_box(box, image.height, image.width)}
