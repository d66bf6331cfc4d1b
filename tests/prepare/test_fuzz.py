"""Whatever a file holds, its reader ends in BadInputError or in what can be written again.

Some hundred damaged files each; for about a minute each:
``pytest -m fuzz --hypothesis-profile minute``.
"""

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

from imrcnn_d2.data.formats import read_coco, read_cvat, read_labelme
from imrcnn_d2.data.images import (
    IMAGE_FORMATS,
    inspect_image,
    install_image,
    read_image,
    read_mask,
    read_values,
)
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare.metadata import read_metadata, with_metadata, with_patients_from_csv
from imrcnn_d2.evaluation.detection.results import evaluate_lesions
from imrcnn_d2.utils.files import BadInputError, Rejects

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]

FORMATS = Path(__file__).parent / "formats"
NAMES = ("a.png", "b/c.png", "d.png")
ON_ERROR = st.sampled_from(["raise", "reject"])
some_hundred = settings(
    max_examples=max(200, settings().max_examples),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images/ of 60x40, frames/ of a video, and an empty folder for images inside files."""
    root = tmp_path_factory.mktemp("fuzz")
    names = [*(f"images/{name}" for name in NAMES), "labelme/frame_a.jpg"]
    names += [f"frames/frame_{i:06d}.png" for i in range(5)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (i, 0, 0)).save(root / name)
    (root / "scratch").mkdir()
    return root


def check(read, path, data, on_error):
    """``read(path, rejects)`` gives a Source or BadInputError; what it gives is strict JSON."""
    path.write_bytes(data)
    rejects = Rejects(on_error)
    try:
        source = read(path, rejects)
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


def coco_document():
    mask = np.zeros((40, 60), bool)
    mask[5:20, 5:30] = True
    hollow = mask.copy()
    hollow[8:10, 8:12] = False
    polygon = [[10, 10, 30, 10, 30, 20.5, 10, 20], [40, 5, 50, 5, 45, 9]]
    counts = {"size": [40, 60], "counts": [200, 100, 2100]}
    return {
        "info": {"year": 2024},
        "images": [
            {"id": i, "file_name": name, "width": 60, "height": 40, "patient_id": f"p{i}"}
            for i, name in enumerate(NAMES)
        ],
        "annotations": [
            {**annotation_from_mask(mask), "id": 1, "image_id": 0, "lesion_id": 4},
            {**annotation_from_mask(hollow, 2), "id": 2, "image_id": 0},
            {"id": 3, "image_id": 1, "category_id": 2, "segmentation": polygon, "iscrowd": 0,
             "bbox": [10, 5, 40, 15.5], "area": 220},
            {"id": 4, "image_id": 1, "category_id": 1, "segmentation": counts, "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "polyp", "supercategory": "x"}, {"id": 2, "name": "b"}],
    }  # fmt: skip


@given(damaged_json(coco_document()), ON_ERROR)
@some_hundred
def test_coco(folder, data, on_error):
    def read(path, rejects):
        return read_coco(path, folder / "images", rejects)

    check(read, folder / "coco.json", data, on_error)


def results_document():
    """Of :func:`coco_document`'s annotations."""
    keys = ("image_id", "category_id", "segmentation", "bbox")
    return [
        {**{key: annotation[key] for key in keys if key in annotation}, "score": number / 5}
        for number, annotation in enumerate(coco_document()["annotations"], 1)
    ]


def evaluated(folder, gt, dt):
    """Evaluation ends in BadInputError or with all its figures."""
    paths = folder / "gt.json", folder / "dt.json"
    for path, data in zip(paths, (gt, dt), strict=True):
        path.write_bytes(data)
    try:
        evaluate_lesions(*paths)
    except BadInputError as error:
        assert error.file in map(str, paths)


@given(damaged_json(coco_document()))
@some_hundred
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ground_truth_of_an_evaluation(folder, data):
    evaluated(folder, data, json.dumps(results_document()).encode())


@given(damaged_json(results_document()))
@some_hundred
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_results_of_an_evaluation(folder, data):
    evaluated(folder, json.dumps(coco_document()).encode(), data)


@given(damaged_json(json.loads((FORMATS / "labelme" / "frame_a.json").read_text())), ON_ERROR)
@some_hundred
def test_labelme(folder, data, on_error):
    def read(path, rejects):
        return read_labelme(path.parent, rejects, folder / "scratch")

    check(read, folder / "labelme" / "frame_a.json", data, on_error)


@given(damaged_json(json.loads((FORMATS / "labelme" / "embedded.json").read_text())), ON_ERROR)
@some_hundred
def test_labelme_with_its_image(folder, data, on_error):
    def read(path, rejects):
        return read_labelme(path.parent, rejects, folder / "scratch")

    (folder / "embedded").mkdir(exist_ok=True)
    check(read, folder / "embedded" / "x.json", data, on_error)


@given(damaged_xml((FORMATS / "cvat" / "images.xml").read_text()), ON_ERROR)
@some_hundred
def test_cvat(folder, data, on_error):
    def read(path, rejects):
        return read_cvat([path], folder / "images", rejects)

    check(read, folder / "images.xml", data, on_error)


@given(damaged_xml((FORMATS / "cvat" / "video.xml").read_text()), ON_ERROR)
@some_hundred
def test_cvat_video(folder, data, on_error):
    def read(path, rejects):
        return read_cvat([path], folder / "frames", rejects)

    check(read, folder / "video.xml", data, on_error)


def prepared(folder, rejects):
    path = folder / "whole.json"
    if not path.exists():
        path.write_text(json.dumps(coco_document()))
    return read_coco(path, folder / "images", rejects)


TABLE = """file,centre,size_mm,seen
a.png,X,12,2024-05-06
b/c.png,Y,7.5,
d.png,X,,2024-05-07
"""


@given(damaged_csv(TABLE), ON_ERROR)
@some_hundred
def test_metadata(folder, data, on_error):
    def read(path, rejects):
        return with_metadata(prepared(folder, rejects), [read_metadata(path, rejects)], rejects)

    check(read, folder / "metadata.csv", data, on_error)


@given(damaged_csv("file,patient_id\na.png,p1\nb/c.png,p2\nd.png,p1\n"), ON_ERROR)
@some_hundred
def test_patients(folder, data, on_error):
    def read(path, rejects):
        return with_patients_from_csv(prepared(folder, rejects), path, rejects)

    check(read, folder / "patients.csv", data, on_error)


def whole_images():
    """Small images of all formats, in several modes and with what else their files may hold."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    names = "RGB", "RGBA", "L", "P", "1", "CMYK"
    modes = [Image.fromarray(pixels).convert(name) for name in names]
    modes.append(Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0]))
    exif = Image.Exif()
    exif[274] = 6
    found = []
    for kind in (*IMAGE_FORMATS, "MPO"):
        for image in modes:
            for how in ({}, {"progressive": True, "compression": "tiff_lzw", "lossless": True}):
                stream = io.BytesIO()
                try:
                    image.save(stream, kind, exif=exif.tobytes(), **how)
                except (OSError, ValueError):
                    continue  # of no such mode
                found.append(stream.getvalue())
    return found


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
    for read in (read_image, read_mask, read_values, inspect_image):
        began = time.monotonic()
        try:
            found = read(path)
        except BadInputError as error:
            str(error).encode()
        else:
            if read is inspect_image:
                install_image(found, folder, "installed.png")
        assert time.monotonic() - began < 30
