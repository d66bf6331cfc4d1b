"""Whatever a file holds, its reader ends in BadInputError or in what can be written again.

Some hundred damaged files each; for about a minute each:
``pytest -m fuzz --hypothesis-profile minute``."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_csv, damaged_header, damaged_json, damaged_xml
from PIL import Image

from imrcnn_d2.data import images
from imrcnn_d2.data.formats import read_coco, read_cvat, read_labelme
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare.metadata import read_metadata, with_metadata, with_patients_from_csv
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.utils.files import BadInputError, Rejects

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]

FORMATS = Path(__file__).parent / "formats"
NAMES = ("a.png", "b/c.png", "d.png")
some_hundred = settings(
    max_examples=max(200, settings().max_examples),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images/ of 60x40, frames/ of a video, and an empty folder for images inside files."""
    root = tmp_path_factory.mktemp("fuzz")
    names = [*(f"images/{name}" for name in NAMES), "labelme/frame_a.jpg"]
    for folder in ("images/b", "labelme", "frames", "scratch", "embedded"):
        (root / folder).mkdir(parents=True)
    for i, name in enumerate([*names, *(f"frames/frame_{i:06d}.png" for i in range(5))]):
        Image.new("RGB", (60, 40), (i, 0, 0)).save(root / name)
    (root / "whole.json").write_text(json.dumps(COCO))
    return root


MASK = np.zeros((40, 60), bool)
MASK[5:20, 5:30] = True
HOLLOW = MASK.copy()
HOLLOW[8:10, 8:12] = False
POLYGON = [[10, 10, 30, 10, 30, 20.5, 10, 20], [40, 5, 50, 5, 45, 9]]
POLYGONS = {"segmentation": POLYGON, "iscrowd": 0, "bbox": [10, 5, 40, 15.5], "area": 220}
COUNTS = {"size": [40, 60], "counts": [200, 100, 2100]}
SIZE = {"width": 60, "height": 40}
COCO = {
    "info": {"year": 2024},
    "images": [
        {"id": i, "file_name": NAMES[i], **SIZE, "patient_id": f"p{i}"} for i in range(len(NAMES))
    ],
    "annotations": [
        {**annotation_from_mask(MASK), "id": 1, "image_id": 0, "lesion_id": 4},
        {**annotation_from_mask(HOLLOW, 2), "id": 2, "image_id": 0},
        {"id": 3, "image_id": 1, "category_id": 2, **POLYGONS},
        {"id": 4, "image_id": 1, "category_id": 1, "segmentation": COUNTS, "iscrowd": 1},
    ],
    "categories": [{"id": 1, "name": "polyp", "supercategory": "x"}, {"id": 2, "name": "b"}],
}
_KEYS = ("image_id", "category_id", "segmentation", "bbox")
RESULTS = [
    {**{key: annotation[key] for key in _KEYS if key in annotation}, "score": number / 5}
    for number, annotation in enumerate(COCO["annotations"], 1)
]
DEVICES = "file,centre,size_mm,seen\na.png,X,12,2024-05-06\nb/c.png,Y,7.5,\nd.png,X,,2024-05-07\n"
PATIENTS = "file,patient_id\na.png,p1\nb/c.png,p2\nd.png,p1\n"


DAMAGED = {"coco.json": damaged_json(COCO)}
DAMAGED |= {"metadata.csv": damaged_csv(DEVICES), "patients.csv": damaged_csv(PATIENTS)}
for name in ("labelme/frame_a.json", "embedded/embedded.json"):
    text = (FORMATS / "labelme" / Path(name).name).read_text()
    DAMAGED[name] = damaged_json(json.loads(text))
for name in ("images.xml", "video.xml"):
    DAMAGED[name] = damaged_xml((FORMATS / "cvat" / name).read_text())


def read(path, folder, rejects):
    if path.name == "coco.json":
        return read_coco(path, folder / "images", rejects)
    if path.suffix == ".json":
        return read_labelme(path.parent, rejects, folder / "scratch")
    if path.suffix == ".xml":
        root = folder / ("images" if path.name == "images.xml" else "frames")
        return read_cvat([path], root, rejects)
    source = read_coco(folder / "whole.json", folder / "images", rejects)
    if path.name == "metadata.csv":
        return with_metadata(source, [read_metadata(path, rejects)], rejects)
    return with_patients_from_csv(source, path, rejects)


@pytest.mark.parametrize("name", DAMAGED)
@given(data=st.data(), on_error=st.sampled_from(["raise", "reject"]))
@some_hundred
def test_readers(folder, name, data, on_error):
    path, rejects = folder / name, Rejects(on_error)
    path.write_bytes(data.draw(DAMAGED[name]))
    try:
        source = read(path, folder, rejects)
        samples = list(source.samples)
    except BadInputError as error:
        str(error).encode()  # it can be shown
        return
    records = [[sample.file_name, sample.annotations, sample.fields] for sample in samples]
    content = [records, source.categories, source.info, source.extra, source.notes]
    json.dumps(content, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()
    for sample in samples:
        for annotation in sample.annotations:
            assert annotation["area"] > 0 and annotation["iscrowd"] in (0, 1)
    assert on_error == "reject" or not rejects.errors


@pytest.mark.parametrize("damaged", ["gt.json", "dt.json"])
@given(data=st.data())
@some_hundred
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_evaluation(folder, damaged, data):
    """It ends in BadInputError or with all its metrics."""
    for name, content in {"gt.json": COCO, "dt.json": RESULTS}.items():
        is_damaged = name == damaged
        text = data.draw(damaged_json(content)) if is_damaged else json.dumps(content).encode()
        (folder / name).write_bytes(text)
    try:
        evaluate_lesions(folder / "gt.json", folder / "dt.json")
    except BadInputError as error:
        assert error.file in (str(folder / "gt.json"), str(folder / "dt.json"))


def whole_images():
    """Small images of all formats, in several modes and with what else their files may hold."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    modes = [Image.fromarray(pixels).convert(m) for m in ("RGB", "RGBA", "L", "P", "1", "CMYK")]
    modes.append(Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0]))
    exif, files = Image.Exif(), []
    exif[274] = 6
    for kind in (*images.IMAGE_FORMATS, "MPO"):
        for image in modes:
            for options in ({}, {"progressive": True, "compression": "tiff_lzw", "lossless": True}):
                stream = io.BytesIO()
                try:
                    image.save(stream, kind, exif=exif.tobytes(), **options)
                except (OSError, ValueError):
                    continue  # of no such mode
                files.append(stream.getvalue())
    return files


@pytest.fixture(scope="module")
def four_gigabytes():
    """More than the process has now; to take more is a MemoryError."""
    resource = pytest.importorskip("resource")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**32, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@given(st.sampled_from(whole_images()).flatmap(lambda d: damaged_bytes(d) | damaged_header(d)))
@some_hundred
def test_images(folder, four_gigabytes, data):
    path = folder / "fuzzed.png"
    path.write_bytes(data)
    (folder / "installed.png").unlink(missing_ok=True)
    for read in (images.read_image, images.read_mask, images.read_values, images.inspect_image):
        began = time.monotonic()
        try:
            image = read(path)
        except BadInputError as error:
            str(error).encode()
        else:
            if read is images.inspect_image:
                images.install_image(image, folder, "installed.png")
        assert time.monotonic() - began < 30
