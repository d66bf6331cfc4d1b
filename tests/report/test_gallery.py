import base64
import io
import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.report.html.gallery import CLOSENESS, gallery_data
from imrcnn_d2.report.plots.images import region_contours
from imrcnn_d2.report.runs import load_run


@pytest.fixture(scope="module")
def runs(study_runs):
    return [study_runs["MR-CNN"], study_runs["IMR-CNN"]]


@pytest.fixture(scope="module")
def data(runs):
    return gallery_data(runs)


def picture(entry):
    return Image.open(io.BytesIO(base64.b64decode(entry["jpeg"])))


def polygons(path):
    """[(K, 2)] corners of an SVG path of straight lines."""
    return [
        np.array([[float(v) for v in point.split(",")] for point in part.split("L")])
        for part in re.findall("M([^Z]+)Z", path)
    ]


def test_all_images_with_what_happened_in_them(runs, data):
    assert data["runs"] == ["MR-CNN", "IMR-CNN"]
    assert data["total"] == len(data["images"]) == len(runs[0].results.per_image)
    for position, entry in enumerate(data["images"]):
        for run, own in zip(runs, entry["runs"], strict=True):
            row = run.results.per_image[position]
            assert entry["name"] == row["file_name"]
            assert entry["patient"] == row["patient_id"]
            assert (own["tp"], own["fp"], own["fn"]) == (row["TP"], row["FP"], row["FN"])
            assert own["score"] == pytest.approx(row["score"], abs=1e-4)
            assert len(entry["truth"]) == row["n_gt"]
            assert len(own["missed"]) == row["FN"]
            assert own["hits"].count("M") >= row["TP"]
            assert bool(own["alarms"]) == (row["FP"] > 0)
            if row["n_gt"]:
                assert own["iou"] == pytest.approx(row["union_iou"], abs=0.01)
            else:
                assert own["iou"] is None
    json.dumps(data, allow_nan=False)


def test_outlines_are_off_by_half_a_pixel_at_most(runs, data):
    truth = runs[0].results.ground_truth
    corners = 0
    for region, position in enumerate(truth.regions.image):
        of_image = np.flatnonzero(truth.regions.image == position).tolist()
        drawn = polygons(data["images"][position]["truth"][of_image.index(region)])
        exact = region_contours(truth.regions, region)
        assert len(drawn) == len(exact)
        for ours, theirs in zip(drawn, exact, strict=True):
            contour = ours.astype(np.float32)[:, None]
            distance = [
                abs(cv2.pointPolygonTest(contour, tuple(map(float, p)), True)) for p in theirs
            ]
            assert max(distance) <= CLOSENESS + 1e-6
            corners += len(ours) / len(theirs)
    assert corners < 0.6 * len(truth.regions.image)  # and they are simpler for it


def test_pictures_are_turned_and_without_metadata(study, data):
    (turned,) = [
        entry
        for entry in data["images"]
        if Image.open(study / "datasets/study/images" / entry["name"]).getexif()
    ]
    with Image.open(study / "datasets/study/images" / turned["name"]) as stored:
        upright = np.asarray(stored.transpose(Image.Transpose.ROTATE_270).convert("RGB"), int)
        on_its_side = np.asarray(stored.convert("RGB"), int)
    embedded = picture(turned)
    assert not embedded.getexif()
    assert np.abs(np.asarray(embedded, int) - upright).mean() < 6
    assert np.abs(np.asarray(embedded, int) - on_its_side).mean() > 12


def write_large(study, folder):
    """The study's first run with images twelve times as wide and six times as high."""
    run = load_run(study / "runs" / "MR-CNN")
    root = folder / "images"
    for image in run.results.ground_truth.images:
        path = root / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(run.image_root / image["file_name"]) as small:
            small.resize((1152, 576)).save(path)
    run.__dict__["image_root"] = root  # where cached_property keeps it
    return run


def test_large_images_are_made_smaller(study, tmp_path):
    entry = gallery_data([write_large(study, tmp_path)], max_images=1)["images"][0]
    assert (entry["width"], entry["height"]) == (1152, 576)
    assert picture(entry).size == (512, 256)


def test_the_worst_and_a_spread_of_the_rest(runs):
    data = gallery_data(runs, max_images=8)
    assert data["total"] > len(data["images"]) == 8
    rows = zip(*(run.results.per_image for run in runs), strict=True)
    errors = {own[0]["file_name"]: sum(r["FP"] + r["FN"] for r in own) for own in rows}
    found = sorted((errors[entry["name"]] for entry in data["images"]), reverse=True)
    assert found[:4] == sorted(errors.values(), reverse=True)[:4]
    assert found[-1] == min(errors.values())


def test_boxes_alone(write_gt, make_detections, write_run, tmp_path):
    gt = write_gt(tmp_path / "data" / "gt.json", images=6)
    found = [{k: v for k, v in d.items() if k != "segmentation"} for d in make_detections(gt, 1, 0)]
    run = load_run(write_run("boxes", gt, dt=found))
    root = tmp_path / "images"
    root.mkdir()
    for image in run.results.ground_truth.images:
        Image.new("RGB", (60, 60)).save(root / image["file_name"])
    run.__dict__["image_root"] = root
    data = gallery_data([run])
    assert data["overlap"] == "box IoU"
    x, y, width, height = found[0]["bbox"]
    entry = data["images"][run.results.detections.regions.image[0]]
    path = entry["runs"][0]["hits"] or entry["runs"][0]["alarms"]
    if path:
        low, high = polygons(path)[0].min(axis=0), polygons(path)[0].max(axis=0)
        assert low.tolist() == [x - 0.5, y - 0.5]
        assert high.tolist() == [x + width - 0.5, y + height - 0.5]
    ious = [own["iou"] for entry in data["images"] for own in entry["runs"] if own["tp"]]
    assert ious and None not in ious


def test_an_image_that_is_not_there(study, tmp_path):
    run = load_run(study / "runs" / "MR-CNN")
    run.__dict__["image_root"] = tmp_path
    with pytest.raises(FileNotFoundError, match="hacked"):
        gallery_data([run])
