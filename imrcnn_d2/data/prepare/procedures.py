"""Synthetic procedures: the camera moves over the images of a prepared data set.

Lesions, their masks and long stretches without a lesion are known, so that evaluation on video and
alarm rules can be tried without a video. They are no substitute for one: the tissue does not move,
stretches follow each other by a cut, and a stretch shows one image.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util

from imrcnn_d2.data.distortions import DISTORTIONS
from imrcnn_d2.data.endoscope_view import Box, find_view
from imrcnn_d2.data.formats.base import Format, Sample, Source
from imrcnn_d2.data.formats.coco import read_coco, to_rle
from imrcnn_d2.data.images import inspect_image, read_image
from imrcnn_d2.data.masks import MIN_AREA, annotation_from_mask
from imrcnn_d2.data.prepare.splits import SPLITS, largest_remainder
from imrcnn_d2.utils.files import BadInputError, Rejects
from imrcnn_d2.utils.progress import tqdm

_HEALTHY = 0.25  # share of the procedures without a lesion
_SECONDS_PER_LESION = 15.0
_LESION_SECONDS, _CLEAN_SECONDS = (2.0, 5.0), (3.0, 6.0)  # of a stretch
_LEAST_PART = 0.4  # of the view's shorter side: a part without a lesion that is shown
_ZOOM = 0.55, 0.95  # what the camera sees, of the part's shorter side
_TILT = 12.0  # degrees to either side
_SHUTTER, _STEPS = 0.5, 8  # share of a frame's time that the shutter is open; views averaged in it
_STOPS, _DEFOCUS, _HIGHLIGHTS = 0.7, 2.0, 0.5  # most; see `distortions` for the units


class Procedures(Format):
    name = "procedures"
    help = "make synthetic procedures (video frames) of a prepared data set's images"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--data", required=True, metavar="DIR", help="prepared data set; its splits are kept")
        add("--procedures", type=int, default=12, help="in all splits together (%(default)s)")
        add("--seconds", type=float, default=30, help="of a procedure, on average (%(default)g)")
        add("--fps", type=float, default=10, help="frames per second (%(default)g)")
        add("--size", type=int, default=256, help="width and height in pixels (%(default)s)")

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        from imrcnn_d2.data.catalog import prepared_folder  # it imports the formats

        if args.splits or args.ratio:
            raise ValueError(
                "Procedures keep the splits of --data: leave out --ratio, --all-test and --splits"
            )
        length = {"seconds": args.seconds, "fps": args.fps, "size": args.size}
        data = prepared_folder(args.data)
        return make_procedures(data, scratch, args.procedures, rejects, seed=args.seed, **length)


@dataclass
class _Stretch:
    """Frames of one image."""

    sample: Sample
    part: Box  # of the image, that the camera moves over
    frames: int


def make_procedures(
    data: Path,
    folder: Path,
    number: int,
    rejects: Rejects,
    *,
    seconds: float = 30,
    fps: float = 10,
    size: int = 256,
    seed: int = 0,
) -> Source:
    """Procedures of the images of a prepared data set: JPEGs are written into an existing folder
    while the samples are read.

    Each split has procedures in proportion to its images, which no other procedure shows: images of
    one patient or sequence, where known, are all of one procedure. A quarter has no lesion. Frames
    have `sequence_id`, `frame` and `source_image`; annotations have the `lesion_id` and further
    fields of the source.

    Args:
        seconds: of a procedure, a third more or less.
        size: width and height of a frame in pixels.

    Raises:
        BadInputError: there is no such data set, or a procedure would have no lesion-free view.
        ValueError: an argument is out of its range.
    """
    if number < 1 or size < 64 or not 0 < fps <= 1000 or not seconds * fps >= 10:
        raise ValueError(
            f"{number} procedures of {seconds:g} s, {fps:g} frames per second, {size} pixels: make "
            "at least 1, of at least 10 frames and 64 pixels"
        )
    files = {split: data / "annotations" / f"{split}.json" for split in SPLITS}
    sources = {
        split: read_coco(path, data / "images", rejects)
        for split, path in files.items()
        if path.is_file()
    }
    if not sources:
        raise BadInputError(data, "is no prepared data set: it has no annotations/test.json")
    samples = {split: list(source.samples) for split, source in sources.items()}
    shares = largest_remainder(number, [len(some) for some in samples.values()])
    plans, splits = {}, {split: [] for split in SPLITS}
    for (split, some), share in zip(samples.items(), shares, strict=True):
        for pool in _dealt(some, share, np.random.default_rng([seed, SPLITS.index(split)])):
            name = f"procedure{len(plans) + 1:03d}"
            rng = np.random.default_rng([seed, len(SPLITS), len(plans)])
            plans[name] = _plan(data, pool, seconds, fps, rng)
            total = sum(stretch.frames for stretch in plans[name])
            splits[split] += [_file_name(name, frame) for frame in range(total)]
    source = next(iter(sources.values()))
    totals = {name: sum(stretch.frames for stretch in plan) for name, plan in plans.items()}
    videos = [
        {"id": name, "fps": fps, "num_frames": total, "synthetic": True}
        for name, total in totals.items()
    ]
    info = {
        "description": f"synthetic procedures: the camera moves over images of {data.name}, {fps:g}"
        f" frames per second, {size}x{size}, seed {seed}",
        "synthetic": True,
        "source": source.info,
    }
    frames = _render(folder, plans, fps, size, seed)
    return Source(frames, source.categories, info, extra={"videos": videos}, splits=splits)


def _file_name(procedure, frame):
    return f"{procedure}/{frame:06d}.jpg"


def _dealt(samples: list[Sample], number: int, rng: np.random.Generator) -> list[list[Sample]]:
    """The images of each procedure: those of one patient or sequence are of one."""
    groups = defaultdict(list)
    for sample in samples:
        keys = (sample.fields.get(key) for key in ("patient_id", "sequence_id"))
        groups[next((key for key in keys if key is not None), sample.file_name)].append(sample)
    # Those with a lesion, and those without, are dealt in turn, so that each has some of both.
    order = rng.permutation(len(groups))
    groups = [list(groups.values())[i] for i in order]
    groups.sort(key=lambda group: any(sample.annotations for sample in group))
    return [[sample for group in groups[i::number] for sample in group] for i in range(number)]


def _plan(data, pool, seconds, fps, rng) -> list[_Stretch]:
    """Which images a procedure shows, and for how long."""
    frames = max(10, round(fps * seconds * rng.uniform(2 / 3, 4 / 3)))
    with_lesions = [sample for sample in pool if sample.annotations]
    with_lesions = [with_lesions[i] for i in rng.permutation(len(with_lesions))]
    number = 0 if rng.random() < _HEALTHY else max(1, round(seconds / _SECONDS_PER_LESION))
    # Lesion-free parts of images with a lesion, where those without any are not enough.
    others = [sample for sample in pool if not sample.annotations] + with_lesions[number:]
    clean = ((sample, part) for sample in others if (part := _lesion_free_part(sample)))
    clean = itertools.cycle(clean)
    lesions = [
        _Stretch(sample, _view(sample)[0], round(fps * rng.uniform(*_LESION_SECONDS)))
        for sample in with_lesions[:number]
    ]
    left = max(len(lesions) + 1, frames - sum(stretch.frames for stretch in lesions))
    gaps = np.diff([0, *sorted(rng.integers(1, left, len(lesions))), left])
    plan = []
    for i, gap in enumerate(gaps.tolist()):
        while gap > 0:
            length = min(gap, round(fps * rng.uniform(*_CLEAN_SECONDS)))
            sample, part = next(clean, (None, None))
            if sample is None:
                raise BadInputError(
                    data,
                    f"has too few images: none of the {len(pool)} for a procedure has a part "
                    "without a lesion; make fewer --procedures, or add images without a lesion",
                )
            plan.append(_Stretch(sample, part, length))
            gap -= length
        plan += lesions[i : i + 1]
    return plan


def _view(sample) -> tuple[Box, np.ndarray]:
    """The box of the endoscope's view, and the (H, W, 3) image, black outside the view."""
    image = read_image(sample.image.path)
    view = find_view(image)
    if view.is_empty:
        return Box(0, 0, image.shape[1], image.shape[0]), image
    return view.box, image * view.mask[..., None]


def _lesion_free_part(sample) -> Box | None:
    """The largest part of the view left or right of all lesions, above or below them; None if it is
    small."""
    box, _ = _view(sample)
    if not sample.annotations:
        return box
    boxes = np.array([annotation["bbox"] for annotation in sample.annotations])
    left, top = np.floor(boxes[:, :2].min(axis=0)).astype(int).tolist()
    right, bottom = np.ceil((boxes[:, :2] + boxes[:, 2:]).max(axis=0)).astype(int).tolist()
    sideways = box._replace(x1=left), box._replace(x0=right)
    parts = *sideways, box._replace(y1=top), box._replace(y0=bottom)
    part = max(parts, key=_side)
    return part if _side(part) >= _LEAST_PART * _side(box) else None


def _side(box: Box) -> int:
    return min(box.x1 - box.x0, box.y1 - box.y0)


def _render(folder, plans, fps, size, seed) -> Iterator[Sample]:
    total = sum(stretch.frames for plan in plans.values() for stretch in plan)
    with tqdm(total=total, desc="Rendering", unit="frame") as progress:
        for number, (name, plan) in enumerate(plans.items()):
            (folder / name).mkdir()
            frame = 0
            for place, stretch in enumerate(plan):
                rng = np.random.default_rng([seed, len(SPLITS) + 1, number, place])
                for image, annotations in _render_stretch(stretch, fps, size, rng):
                    path = folder / _file_name(name, frame)
                    cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
                    fields = {
                        **{"patient_id": name, "sequence_id": name, "frame": frame},
                        "source_image": stretch.sample.file_name,
                    }
                    if (centre := stretch.sample.fields.get("centre")) is not None:
                        fields["centre"] = centre
                    file_name = path.relative_to(folder).as_posix()
                    yield Sample(file_name, inspect_image(path), annotations, fields)
                    frame += 1
                    progress.update()


def _render_stretch(
    stretch: _Stretch, fps: float, size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, list[dict]]]:
    """Yields the (size, size, 3) uint8 RGB frames of a camera that moves over an image, each with
    the annotations of the lesions in it. Over a lesion, it comes near in the middle of the stretch.
    """
    sample, number = stretch.sample, stretch.frames
    seen = stretch.part.slices
    image = np.ascontiguousarray(_view(sample)[1][seen])
    masks = [_mask(annotation, sample)[seen] for annotation in sample.annotations]
    height, width = image.shape[:2]
    waves = [_wave(rng) for _ in range(6)]
    lesion = None
    if visible := [mask for mask in masks if mask.any()]:
        rows, columns = np.nonzero(visible[rng.integers(len(visible))])
        lesion = np.array([columns.mean(), rows.mean()])

    def view(time):
        """The affine map from the image to the frame at a time in seconds."""
        x, y, zoom, angle = (wave(time) for wave in waves[:4])
        near = 0.0 if lesion is None else np.sin(np.pi * np.clip(time * fps / number, 0, 1)) ** 2
        side = min(height, width) * np.interp(zoom, (-1, 1), _ZOOM)
        centre = np.array([width * (1 + x) / 2, height * (1 + y) / 2])
        if lesion is not None:
            centre += near * (lesion + 0.2 * side * np.array([x, y]) - centre)
        centre = np.clip(
            centre, side / 2, np.maximum(side / 2, [width - side / 2, height - side / 2])
        )
        matrix = cv2.getRotationMatrix2D(centre.tolist(), _TILT * angle, size / side)
        matrix[:, 2] += size / 2 - centre
        return matrix

    def warp(pixels, time, interpolation):
        return cv2.warpAffine(pixels, view(time), (size, size), flags=interpolation)

    for frame in range(number):
        times = (frame + _SHUTTER * np.linspace(-0.5, 0.5, _STEPS)) / fps
        moved = np.mean([warp(image, time, cv2.INTER_LINEAR) for time in times], axis=0)
        moved = np.rint(moved).astype(np.uint8)
        light, focus = waves[4](frame / fps), waves[5](frame / fps)
        moved = DISTORTIONS["over_exposure"].apply(moved, _STOPS * light, rng)
        if focus > 0.3:
            moved = DISTORTIONS["defocus"].apply(moved, _DEFOCUS * focus, rng)
        if moved.max() > 40:  # which highlights need
            moved = DISTORTIONS["highlights"].apply(moved, _HIGHLIGHTS * rng.random(), rng)
        annotations = []
        for place, mask in enumerate(masks):
            seen = warp(mask.astype(np.uint8), frame / fps, cv2.INTER_NEAREST) > 0
            if seen.sum() >= MIN_AREA:
                annotations.append(_annotation(seen, sample, place))
        yield moved, annotations


def _mask(annotation, sample):
    height, width = sample.image.height, sample.image.width
    if not annotation.get("segmentation"):
        raise BadInputError(sample.image.path, "has a lesion without a mask, which procedures need")
    return mask_util.decode(to_rle(annotation["segmentation"], height, width)).astype(bool)


def _annotation(mask, sample, place):
    record = sample.annotations[place]
    crowd = record.get("iscrowd", 0)
    made = annotation_from_mask(mask, record["category_id"], iscrowd=crowd)
    # A procedure shows several patients, of whom each may have a lesion 1.
    unit = sample.fields.get("patient_id", sample.fields.get("sequence_id"))
    lesion = record.get("lesion_id")
    if lesion is None:
        lesion = f"{sample.stem}_{place}"
    elif unit is not None:
        lesion = f"{unit}/{lesion}"
    return {**record, "lesion_id": lesion, **made}


def _wave(rng: np.random.Generator) -> Callable[[float], float]:
    """A smooth function of the time in seconds, in [-1, 1]: of some seconds' period."""
    frequency, phase = rng.uniform(0.03, 0.25, 3), rng.uniform(0, 2 * np.pi, 3)
    return lambda time: float(np.tanh(np.sin(2 * np.pi * frequency * time + phase).sum()))
