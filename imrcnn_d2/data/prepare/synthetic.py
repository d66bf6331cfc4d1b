"""A synthetic data set: endoscopic views with lesions, for demonstration and tests.

An image is a relief (folds, bumps, lesions) lit by a lamp next to the camera, seen through a round
aperture. Nothing in it comes from a patient.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from imrcnn_d2.data.formats.base import Format, Sample, Source
from imrcnn_d2.data.images import inspect_image
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare.splits import largest_remainder
from imrcnn_d2.utils.files import Rejects
from imrcnn_d2.utils.progress import tqdm

_HEALTHY = (1, 7)  # one image in eight shows no lesion, as in the paper's data
_MAX_VIEWS = 5
_BLOOD = np.array([0.25, 1.0, 0.9], np.float32)  # what it absorbs of red, green and blue


class Synthetic(Format):
    name = "synthetic"
    help = "make a synthetic data set"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--num-images", type=int, required=True)
        parser.add_argument("--size", type=int, required=True, help="width and height in pixels")

    def read(self, args: argparse.Namespace, rejects: Rejects, scratch: Path) -> Source:
        return generate(scratch, args.num_images, args.size, args.seed)


def generate(folder: Path, num_images: int, size: int, seed: int = 0) -> Source:
    """Write synthetic JPEGs of quality 95 into an existing folder while its samples are read.

    An eighth of the images (by largest remainder) have no lesion. Image i of a patient depends on
    seed, patient and i alone.

    Raises:
        ValueError: fewer than one image, or a size below 64 pixels.
    """
    if num_images < 1 or size < 64:
        raise ValueError(
            f"{num_images} images of {size} pixels: make at least 1 image of at least 64 pixels"
        )
    categories = [{"id": 1, "name": "lesion", "supercategory": "lesion"}]
    info = {"description": f"synthetic endoscopic views, {size}x{size}, seed {seed}"}
    return Source(_samples(folder, num_images, size, seed), categories, info)


def render_view(
    size: int, seed: int, patient: int, view: int, healthy: bool = False
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Render one view of an invented patient; all views share the mucosa's and the lesion's look.

    Return the (size, size, 3) uint8 RGB image and a (size, size) bool mask of each lesion.
    """
    look = _Look(np.random.default_rng([seed, patient]))
    rng = np.random.default_rng([seed, patient, view + 1])
    v, u = np.mgrid[0:size, 0:size].astype(np.float32) / (size / 2) - 1
    aperture = _aperture(u, v, rng)
    height, albedo = _mucosa(u, v, look, rng)
    masks = [] if healthy else _add_lesions(u, v, look, rng, height, albedo, aperture > 0.5)
    image = _light(u, v, height, albedo, rng) * aperture[..., None]
    image = cv2.GaussianBlur(image, (0, 0), size * rng.uniform(0.0008, 0.002))
    image += 0.008 * rng.standard_normal(image.shape, dtype=np.float32) * aperture[..., None]
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), masks


class _Look:
    """What the views of a patient have in common. Colours are linear-looking RGB in 0..1."""

    def __init__(self, rng: np.random.Generator):
        reddish, whitish, brownish = (1.03, 0.64, 0.67), (1.10, 1.38, 1.45), (0.74, 0.60, 0.62)
        tint = np.array((reddish, whitish, brownish)[rng.integers(3)], np.float32)
        mucosa = rng.uniform((0.82, 0.34, 0.22), (0.98, 0.46, 0.34))
        self.mucosa = mucosa.astype(np.float32)
        self.folds = rng.uniform(0.02, 0.075)  # height
        self.fold_frequency = rng.uniform(4, 9)
        # folds around the lumen (colon), else parallel (stomach)
        self.concentric = bool(rng.random() < 0.5)
        self.vessels = rng.uniform(0.1, 0.5)
        self.lesion = 1 + (tint - 1) * rng.uniform(0.85, 1.15)  # factor on the mucosa's colour
        self.radius = rng.uniform(0.17, 0.36)
        amplitudes = rng.normal(0, 0.24, 7) / np.arange(2, 9)
        phases = rng.uniform(0, 2 * np.pi, 7)
        self.contour = np.stack([amplitudes, phases], axis=1).astype(np.float32)  # of its waves
        self.elevation = (0.20, 0.12, -0.05)[rng.integers(3)] * rng.uniform(0.7, 1.2)
        self.grain = rng.uniform(0.06, 0.14)
        self.border = rng.uniform(0.06, 0.16)  # width of the transition, share of the radius


def _aperture(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """1 inside the round view, 0 in the dark corners, a soft edge between."""
    radius = rng.uniform(0.94, 1.04)
    distance = np.hypot(u - rng.uniform(-0.02, 0.02), v - rng.uniform(-0.02, 0.02))
    inside = _step(radius + 0.02, radius - 0.02, distance)
    return inside * _step(1.0, 0.97, np.maximum(np.abs(u), np.abs(v)))


def _mucosa(
    u: np.ndarray, v: np.ndarray, look: _Look, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Relief (H, W) and colour (H, W, 3) of healthy mucosa."""
    size = len(u)
    warp = _noise(rng, size, 2, 2)
    cavity = np.zeros_like(u)
    if look.concentric:
        distance = np.hypot(u - rng.uniform(-0.5, 0.5), v - rng.uniform(-0.5, 0.5))
        along = distance + 0.12 * warp
        cavity = np.exp(-((distance / rng.uniform(0.18, 0.3)) ** 2))
    else:
        along = math.cos(angle := rng.uniform(0, np.pi)) * u + math.sin(angle) * v + 0.22 * warp
    # rounded ridges, narrow valleys between them
    folds = np.sqrt(np.sin(along * look.fold_frequency + rng.uniform(0, np.pi)) ** 2 + 0.02)
    folds *= np.clip(0.75 + 0.5 * _noise(rng, size, 2, 1), 0.1, 1.3)
    fine = _noise(rng, size, 28, 2)
    height = look.folds * folds + 0.03 * _noise(rng, size, 3, 2) + 0.0012 * fine - 0.3 * cavity

    flush = np.clip(_noise(rng, size, 3, 2) - 0.5, 0, 1)  # diffuse redness, no lesion
    branches = [np.exp(-((_noise(rng, size, n, 2) / w) ** 2)) for n, w in ((3, 0.035), (6, 0.05))]
    vessels = (branches[0] + 0.7 * branches[1]) * np.clip(0.4 + _noise(rng, size, 3, 1), 0, 1)
    pallor = 1 + 0.06 * _noise(rng, size, 4, 3) + 0.03 * fine
    tint = flush * 0.25 + look.vessels * vessels  # blood takes green and blue away
    albedo = look.mucosa * pallor[..., None] * np.exp(-tint[..., None] * _BLOOD)
    return height, albedo * (1 - 0.9 * cavity[..., None])


def _add_lesions(
    u: np.ndarray,
    v: np.ndarray,
    look: _Look,
    rng: np.random.Generator,
    height: np.ndarray,
    albedo: np.ndarray,
    visible: np.ndarray,
) -> list[np.ndarray]:
    """Render one lesion, at times two, into `height` and `albedo`; return their masks."""
    size = len(u)
    bearing = rng.uniform(0, 2 * np.pi)
    distances = [rng.uniform(0.05, 0.55)] if rng.random() < 0.85 else [0.48, -0.48]
    masks: list[np.ndarray] = []
    for distance in distances:
        radius = look.radius * rng.uniform(0.85, 1.2) * (1 if len(distances) == 1 else 0.75)
        turn, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.0)
        du, dv = u - distance * math.cos(bearing), v - distance * math.sin(bearing)
        x = (du * math.cos(turn) + dv * math.sin(turn)) / radius
        y = (dv * math.cos(turn) - du * math.sin(turn)) / (radius * squeeze)
        angle = np.arctan2(y, x)
        edge = 1 + sum(a * np.cos(k * angle + p) for k, (a, p) in enumerate(look.contour, start=2))
        r = np.hypot(x, y) / np.maximum(edge, 0.35) + 0.05 * _noise(rng, size, 10, 2)
        mask = (r < 1) & visible
        for other in masks:
            mask &= ~other
        if mask.sum() < 16:
            continue
        masks.append(mask)

        # the border is sharp on one side and lost on the other
        width = look.border * (1.2 + np.cos(angle - turn))
        cover = _step(1 + width, 1 - width, r)
        relief = np.clip(1.15 - r, 0, 1) ** 0.6
        height += look.elevation * radius / 0.25 * relief * cover
        grain = look.grain * _noise(rng, size, 24, 2) + 0.06 * _noise(rng, size, 7, 1)
        colour = look.mucosa * look.lesion * (1 + grain[..., None])
        rim = np.exp(-(((r - 1.02) / 0.09) ** 2))  # reddened margin
        albedo += cover[..., None] * (colour - albedo)  # vessels are lost under it
        albedo *= 1 - 0.10 * rim[..., None] * _BLOOD
        height += 0.02 * cover * grain / look.grain * radius
    return masks


def _light(
    u: np.ndarray, v: np.ndarray, height: np.ndarray, albedo: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Shade the relief: a lamp off the axis, light falling off with distance, wet highlights."""
    size = len(u)
    slope_v, slope_u = np.gradient(height, np.float32(2 / size))
    lamp_u, lamp_v = rng.uniform(-0.4, 0.4, 2).astype(np.float32)
    lamp = _unit(lamp_u - u, lamp_v - v, 1.0 - height)
    normal = _unit(-slope_u, -slope_v, np.ones_like(u))
    diffuse = np.clip((normal * lamp).sum(0), 0, 1)
    fall_off = 1 / (0.4 + (lamp_u - u) ** 2 + (lamp_v - v) ** 2 + (0.75 - height) ** 2)
    light = np.float32(rng.uniform(1.5, 2.0)) * (0.25 + 0.75 * diffuse) * fall_off
    tone = 1 - np.exp(-albedo * light[..., None])  # the camera's shoulder

    ripple_u, ripple_v = (0.1 * _noise(rng, size, 20, 2) for _ in range(2))
    wet = _unit(ripple_u - slope_u, ripple_v - slope_v, np.ones_like(u))
    halfway = _unit(lamp[0], lamp[1], lamp[2] + 1)
    shine = np.clip((wet * halfway).sum(0), 0, 1) ** 200
    shine = _step(0.65, 0.95, shine) * np.clip(0.3 + _noise(rng, size, 6, 1), 0, 1)
    shine *= np.clip(2 * tone[..., 0], 0, 1)  # none from the depth
    return tone + shine[..., None] * (1 - tone)


def _unit(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Vectors of length 1, (3, H, W)."""
    return np.stack([x, y, z]) / np.sqrt(x * x + y * y + z * z)


def _step(low: float | np.ndarray, high: float | np.ndarray, x: np.ndarray) -> np.ndarray:
    """Smooth step from 0 at `low` to 1 at `high`, which may be the smaller one."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _noise(rng: np.random.Generator, size: int, cells: int, octaves: int) -> np.ndarray:
    """Smooth noise of about unit deviation, (size, size): `cells` bumps across, finer octaves."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        grid = rng.standard_normal((cells * 2**octave + 3,) * 2, dtype=np.float32)
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) / 2**octave
    return total


def _samples(folder: Path, num_images: int, size: int, seed: int) -> Iterator[Sample]:
    num_healthy = largest_remainder(num_images, _HEALTHY)[0]
    views = np.random.default_rng(seed)
    patient = 0
    with tqdm(total=num_images, desc="Rendering", unit="image") as progress:
        for healthy, left in ((True, num_healthy), (False, num_images - num_healthy)):
            while left:
                num_views = min(left, int(views.integers(2, _MAX_VIEWS + 1)))
                name = f"patient{patient:03d}"
                for view in range(num_views):
                    image, masks = render_view(size, seed, patient, view, healthy)
                    path = folder / f"{name}_view{view}.jpg"
                    cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
                    annotations = [
                        annotation_from_mask(mask, lesion_id=f"{name}_{i}")
                        for i, mask in enumerate(masks)
                    ]
                    yield Sample(path.name, inspect_image(path), annotations, {"patient_id": name})
                    progress.update()
                left -= num_views
                patient += 1
