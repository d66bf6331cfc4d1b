"""Copies of real frames are found however they were changed, and other frames are not."""

import pytest
from PIL import Image, ImageEnhance, ImageOps

from imrcnn_d2.data.prepare.duplicates import MIN_CORRELATION, find_near_duplicates, joined_groups

# Found in Kvasir-SEG by looking: a frame stored twice, one with and without the endoscope's screen,
# and one moments later.
KNOWN = [("test_0016", "train_0222"), ("test_0033", "test_0051"), ("train_0515", "valid_0075")]


def reframed(image):
    """The frame smaller and off the middle, as on a screen with other writing."""
    screen = Image.new("RGB", image.size, "black")
    width, height = image.size
    screen.paste(image.resize((int(0.8 * width), int(0.85 * height))), (width // 8, height // 12))
    return screen


CHANGES = {
    "recompressed": lambda image: image.resize((500, 420)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    "turned": lambda image: image.rotate(90, expand=True),
    "mirrored": ImageOps.mirror,
    "mirrored and turned": lambda image: ImageOps.flip(image).rotate(90, expand=True),
    "reframed": reframed,
}


@pytest.fixture(scope="module")
def frames(kvasir_352):
    """Every sixtieth frame; no two of them show the same."""
    return sorted((kvasir_352 / "images").iterdir())[5::60]


@pytest.fixture(scope="module")
def pairs(frames, kvasir_352, tmp_path_factory):
    """Pairs of names among frames, their changed copies and the duplicates."""
    folder = tmp_path_factory.mktemp("copies")
    paths = [
        *frames,
        *(kvasir_352 / "images" / f"{name}.jpg" for duplicates in KNOWN for name in duplicates),
    ]
    for frame, (name, change) in zip(frames, CHANGES.items(), strict=False):
        with Image.open(frame) as image:
            change(image).save(folder / f"{name}.jpg", quality=60)
        paths.append(folder / f"{name}.jpg")
    found = find_near_duplicates(paths)
    assert found == sorted(found, key=lambda pair: (pair.a, pair.b))
    assert all(MIN_CORRELATION <= pair.correlation <= 1 and pair.a < pair.b for pair in found)
    return {(paths[pair.a].stem, paths[pair.b].stem): pair.correlation for pair in found}


def test_copies_and_duplicates_stand_out(pairs, frames):
    copies = {(frame.stem, name) for frame, name in zip(frames, CHANGES, strict=False)}
    assert {pair for pair, correlation in pairs.items() if correlation > 0.5} == copies | set(KNOWN)
    assert len(pairs) <= len(copies | set(KNOWN)) + 1


def test_copies_correlate(pairs):
    correlations = {name: value for (_, name), value in pairs.items() if name in CHANGES}
    assert min(correlations.values()) > 0.9, correlations
    assert pairs[KNOWN[0]] > 0.95 > pairs[KNOWN[2]]


def test_mirrored_copies(kvasir_352, tmp_path):
    """Of frames that have hardly a feature that looks the same in a mirror."""
    frames = sorted((kvasir_352 / "images").iterdir())[5::40]
    paths = list(frames)
    for frame in [frames[11], frames[12], frames[15]]:
        with Image.open(frame) as image:
            ImageOps.mirror(image).save(tmp_path / frame.name, quality=60)
        paths.append(tmp_path / frame.name)
    pairs = find_near_duplicates(paths)
    assert [(pair.a, pair.b) for pair in pairs] == [(11, 25), (12, 26), (15, 27)]
    # aligned to the pixel; by the few features that look the same in a mirror it is 0.97 at most
    assert min(pair.correlation for pair in pairs) > 0.98


def test_images_without_detail(tmp_path):
    flat = [tmp_path / f"{value}.png" for value in (0, 90, 255)]
    for path in flat:
        Image.new("RGB", (60, 40), (int(path.stem),) * 3).save(path)
    assert find_near_duplicates(flat) == []
    assert find_near_duplicates([]) == []


def test_joined_groups():
    assert joined_groups(6, [(0, 3), (5, 3)]) == [[0, 3, 5]]
    assert joined_groups(4, [(0, 1, 2), [3]]) == [[0, 1, 2]]
    assert joined_groups(3, []) == []
