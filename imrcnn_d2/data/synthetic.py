"""The embedded data set: drawn endoscopic views with lesions, for demonstration and tests.

An image is a relief (folds, bumps, lesions) lit by a lamp beside the camera, seen through a round
aperture. Nothing in it comes from a patient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from imrcnn_d2.data.images import inspect_image
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare import Sample, Source
from imrcnn_d2.data.splits import largest_remainder

__all__ = ["draw_view", "generate"]

HEALTHY = (1, 7)  # one image in eight shows no lesion, as in the paper's data
MAX_VIEWS = 5


def generate(folder: Path, num_images: int, size: int, seed: int = 0) -> Source:
    """Draws images into `folder` while its samples are read.

    Args:
        folder: existing; JPEGs of quality 95 are written there.
        num_images: exactly this many, an eighth of them (by largest remainder) without a lesion.
        size: width and height in pixels, at least 64.
        seed: image i of a patient depends on seed, patient and i alone.

    Raises:
        ValueError: fewer than one image, or a size below 64.
    """
    if num_images < 1 or size < 64:
        raise ValueError(
            f"{num_images} images of {size} pixels: draw at least 1 image of at least 64 pixels"
        )
    return Source(
        samples=_samples(folder, num_images, size, seed),
        categories=[{"id": 1, "name": "lesion", "supercategory": "lesion"}],
        info={"description": f"drawn endoscopic views, {size}x{size}, seed {seed}"},
    )


def draw_view(
    size: int, seed: int, patient: int, view: int, healthy: bool = False
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draws one view of an invented patient; all views share the mucosa's and the lesion's look.

    Returns:
        (size, size, 3) uint8 RGB image; masks of its lesions, (size, size) bool each.
    """
    look = _Look.of_patient(np.random.default_rng([seed, patient]))
    rng = np.random.default_rng([seed, patient, view + 1])
    v, u = np.mgrid[0:size, 0:size].astype(np.float32) / (size / 2) - 1
    aperture = _aperture(u, v, rng)
    height, albedo = _mucosa(u, v, look, rng)
    masks = [] if healthy else _add_lesions(u, v, look, rng, height, albedo, aperture > 0.5)
    image = _light(u, v, height, albedo, rng) * aperture[..., None]
    image = cv2.GaussianBlur(image, (0, 0), size * rng.uniform(0.0008, 0.002))
    image += rng.normal(0, 0.008, image.shape) * (0.3 + 0.7 * aperture[..., None])
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), masks


@dataclass
class _Look:
    """What the views of a patient have in common. Colours are linear-looking RGB in 0..1."""

    mucosa: np.ndarray
    folds: float  # height
    fold_frequency: float
    concentric: bool  # folds around the lumen (colon), else parallel (stomach)
    vessels: float
    lesion: np.ndarray  # factor on the mucosa's colour
    radius: float
    outline: np.ndarray  # (K, 2) amplitude and phase of the outline's waves
    elevation: float
    grain: float
    border: float  # width of the transition, share of the radius

    @classmethod
    def of_patient(cls, rng: np.random.Generator) -> "_Look":
        reddish = np.array([1.10, 0.62, 0.58])
        whitish = np.array([1.12, 1.32, 1.22])
        brownish = np.array([0.74, 0.60, 0.62])
        tint = [reddish, whitish, brownish][rng.integers(3)]
        waves = np.arange(2, 9)
        return cls(
            mucosa=np.array(
                [rng.uniform(0.72, 0.86), rng.uniform(0.40, 0.52), rng.uniform(0.30, 0.42)]
            ),
            folds=rng.uniform(0.03, 0.08),
            fold_frequency=rng.uniform(4, 8),
            concentric=bool(rng.random() < 0.5),
            vessels=rng.uniform(0.05, 0.22),
            lesion=1 + (tint - 1) * rng.uniform(0.75, 1.1),
            radius=rng.uniform(0.17, 0.36),
            outline=np.stack(
                [rng.normal(0, 0.30, len(waves)) / waves, rng.uniform(0, 2 * np.pi, len(waves))],
                axis=1,
            ),
            elevation=rng.choice([0.20, 0.12, -0.05]) * rng.uniform(0.7, 1.2),
            grain=rng.uniform(0.06, 0.14),
            border=rng.uniform(0.06, 0.16),
        )


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
    warp = 0.35 * _noise(rng, size, 3, 2)
    if look.concentric:
        cu, cv = rng.uniform(-0.6, 0.6, 2)
        distance = np.hypot(u - cu, v - cv)
        along = distance + 0.5 * warp
        depth = 0.9 * np.exp(-((distance / 0.38) ** 2))
    else:
        angle = rng.uniform(0, np.pi)
        along = u * np.cos(angle) + v * np.sin(angle) + warp
        depth = 0.15 * _noise(rng, size, 2, 1)
    folds = np.abs(np.sin(along * look.fold_frequency)) ** 0.7
    height = look.folds * folds + 0.035 * _noise(rng, size, 4, 3) - depth

    albedo = np.ones((size, size, 3), np.float32) * look.mucosa
    albedo *= 1 + 0.05 * _noise(rng, size, 5, 3)[..., None]
    flush = np.clip(_noise(rng, size, 3, 2) - 0.6, 0, 1)  # diffuse redness, no lesion
    albedo *= 1 - flush[..., None] * np.array([0.02, 0.16, 0.14])
    network = _noise(rng, size, 5, 2)
    vessels = np.exp(-((network / 0.05) ** 2)) * np.clip(0.6 + 0.6 * _noise(rng, size, 3, 1), 0, 1)
    albedo *= 1 - look.vessels * vessels[..., None] * np.array([0.45, 1.0, 0.9])
    return height, albedo


def _add_lesions(
    u: np.ndarray,
    v: np.ndarray,
    look: _Look,
    rng: np.random.Generator,
    height: np.ndarray,
    albedo: np.ndarray,
    visible: np.ndarray,
) -> list[np.ndarray]:
    """Draws one lesion, at times two, into `height` and `albedo`; returns their masks."""
    size = len(u)
    bearing = rng.uniform(0, 2 * np.pi)
    distances = [rng.uniform(0.05, 0.55)] if rng.random() < 0.85 else [0.48, -0.48]
    masks: list[np.ndarray] = []
    for distance in distances:
        radius = look.radius * rng.uniform(0.85, 1.2) * (1 if len(distances) == 1 else 0.75)
        turn, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.0)
        du, dv = u - distance * np.cos(bearing), v - distance * np.sin(bearing)
        x = (du * np.cos(turn) + dv * np.sin(turn)) / radius
        y = (dv * np.cos(turn) - du * np.sin(turn)) / (radius * squeeze)
        angle = np.arctan2(y, x)
        edge = 1 + sum(a * np.cos(k * angle + p) for k, (a, p) in enumerate(look.outline, start=2))
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
        colour = look.lesion * (1 + grain[..., None])
        rim = np.exp(-(((r - 1.02) / 0.09) ** 2))  # reddened margin
        albedo *= 1 + cover[..., None] * (colour - 1)
        albedo *= 1 - 0.10 * rim[..., None] * np.array([0.3, 1.0, 1.0])
        height += 0.02 * cover * grain / look.grain * radius
    return masks


def _light(
    u: np.ndarray, v: np.ndarray, height: np.ndarray, albedo: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Shades the relief: a lamp off the axis, light falling off with distance, wet highlights."""
    size = len(u)
    dv, du = np.gradient(height, 2 / size)
    normal = np.stack([-du, -dv, np.ones_like(du)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    lamp_u, lamp_v = rng.uniform(-0.35, 0.35, 2)
    to_lamp = np.stack([lamp_u - u, lamp_v - v, 1.1 - height], axis=-1)
    distance = np.linalg.norm(to_lamp, axis=-1)
    to_lamp /= distance[..., None]
    diffuse = np.clip((normal * to_lamp).sum(-1), 0, 1)
    light = rng.uniform(1.15, 1.4) * (0.12 + diffuse) / (0.35 + 0.65 * distance**2)

    half = to_lamp + np.array([0, 0, 1])
    half /= np.linalg.norm(half, axis=-1, keepdims=True)
    wet = normal.copy()
    wet[..., :2] += 0.10 * np.stack([_noise(rng, size, 22, 2), _noise(rng, size, 22, 2)], axis=-1)
    wet /= np.linalg.norm(wet, axis=-1, keepdims=True)
    shine = np.clip((wet * half).sum(-1), 0, 1) ** 220
    shine = _step(0.55, 0.95, shine) * np.clip(0.5 + _noise(rng, size, 6, 1), 0, 1)
    tone = np.clip(albedo * light[..., None], 0, None)
    tone = 1 - np.exp(-1.6 * tone)  # the camera's shoulder
    return tone + shine[..., None] * (1 - tone)


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
    num_healthy = largest_remainder(num_images, HEALTHY)[0]
    views = np.random.default_rng(seed)
    patient = 0
    with tqdm(total=num_images, desc="Drawing", unit="image") as progress:
        for healthy, left in ((True, num_healthy), (False, num_images - num_healthy)):
            while left:
                num_views = min(left, int(views.integers(2, MAX_VIEWS + 1)))
                for view in range(num_views):
                    yield _sample(folder, size, seed, patient, view, healthy)
                    progress.update()
                left -= num_views
                patient += 1


def _sample(folder: Path, size: int, seed: int, patient: int, view: int, healthy: bool) -> Sample:
    image, masks = draw_view(size, seed, patient, view, healthy)
    path = folder / f"patient{patient:03d}_view{view}.jpg"
    cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    annotations = [
        annotation_from_mask(mask, lesion_id=f"patient{patient:03d}_{i}")
        for i, mask in enumerate(masks)
    ]
    return Sample(
        path.name, inspect_image(path), annotations, {"patient_id": f"patient{patient:03d}"}
    )
