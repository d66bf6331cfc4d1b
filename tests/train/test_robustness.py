"""Metrics on distorted copies, of a detector so simple that they can be foreseen."""

import csv
import json

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from imrcnn_d2.data.distortions import DISTORTIONS
from imrcnn_d2.data.masks import annotation_from_mask, components
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.robustness import choose_subset, evaluate_robustness, load_coco
from imrcnn_d2.utils.files import BadInputError

SIZE = 120
SPOTS = [(60, 45, 14), (40, 70, 10), (75, 60, 18), (6, 6, 6), None]  # x, y and radius
TAU = 0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(ground truth, folder): gray images with a white spot each; the last has none."""
    folder = tmp_path_factory.mktemp("spots")
    coco = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "spot"}]}
    for i, spot in enumerate(SPOTS, 1):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        if spot:
            cv2.circle(mask, spot[:2], spot[2], 1, -1)
            annotation = annotation_from_mask(mask.astype(bool), 3)
            coco["annotations"].append({**annotation, "id": i, "image_id": i})
        image = np.where(mask[..., None] > 0, 250, 90).astype(np.uint8).repeat(3, axis=2)
        Image.fromarray(image).save(folder / f"{i}.png")
        coco["images"].append({"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE})
    (folder / "gt.json").write_text(json.dumps(coco))
    return load_coco(folder / "gt.json"), folder


def bright_spots(images):
    """A detector of what is brighter than 170."""
    parts = [components(image.min(axis=2) > 170, 5)[0] for image in images]
    return [[{**annotation_from_mask(p, 3), "score": 0.9} for p in spots] for spots in parts]


def evaluate(data, output, predict=bright_spots, **options):
    options = {"tau": TAU, "meta": {"model": "spots"}, "distortions": [], **options}
    return evaluate_robustness(predict, *data, output, **options)


def plain(document):
    return json.loads(json.dumps(document).replace("NaN", "null"))


def test_clean_images(data, tmp_path):
    document = evaluate(data, tmp_path)
    (row,) = document["rows"]
    assert (row["distortion"], row["severity"], row["level"]) == ("clean", 0, None)
    ground_truth, folder = data
    images = {i: np.asarray(Image.open(folder / f"{i}.png")) for i in ground_truth.imgs}
    results = [{**r, "image_id": i} for i in images for r in bright_spots([images[i]])[0]]
    groups = evaluate_lesions(ground_truth.dataset, results, tau=TAU).groups()
    assert row["lesion/f1"] == row["image/mdice"] == 100
    for group, values in groups.items():
        for key, value in values.items():
            assert row[f"{group}/{key}"] == pytest.approx(value, nan_ok=True)
    assert document["meta"] == {"model": "spots", "tau": TAU, "images": 5, "seed": 0}


def test_distorted_images(data, tmp_path):
    distortions = ["rotation", "under_exposure", "over_exposure"]
    document = evaluate(data, tmp_path, distortions=distortions)

    def rows(distortion, *keys):
        chosen = [row for row in document["rows"] if row["distortion"] == distortion]
        return zip(*([row[key] for key in keys] for row in chosen), strict=True)

    # The ground truth turns with the images. The spot in the corner leaves the image, or nearly so,
    # but for right angles: it is not missed.
    levels, f1, iou, hits = rows("rotation", "level", "lesion/f1", "lesion/iou", "lesion/TP")
    assert (levels, hits) == ((15, 45, 90, 135, 180), (3, 3, 4, 3, 4))
    assert set(f1) == {100} and min(iou) > 90
    (recall,) = rows("under_exposure", "lesion/recall")
    assert recall[-3:] == (0, 0, 0)
    # A stop more leaves the gray under 170, two do not.
    precision, recall = rows("over_exposure", "lesion/precision", "lesion/recall")
    assert precision[:2] == (100, 100) and recall[-1] == 0


def test_continues_where_it_was_interrupted(data, tmp_path):
    distortions = {"distortions": ["jpeg", "highlights"]}
    whole = evaluate(data, tmp_path / "whole", **distortions, batch_size=2)
    counts = []

    def counting(images):
        counts.append(len(images))
        if sum(counts) > limit:
            raise InterruptedError
        return bright_spots(images)

    limit = 17
    with pytest.raises(InterruptedError):
        evaluate(data, tmp_path / "part", counting, distortions=["jpeg"])
    file = tmp_path / "part" / "robustness.json"
    assert len(json.loads(file.read_text())["rows"]) == 3
    counts.clear()
    limit = 1000
    part = evaluate(data, tmp_path / "part", counting, **distortions)
    assert sum(counts) == 5 * (len(whole["rows"]) - 3)
    assert plain(part) == plain(whole) == json.loads(file.read_text())
    with file.with_suffix(".csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    expected = ["clean"] + [n for n in DISTORTIONS if n in ("jpeg", "highlights") for _ in range(5)]
    assert [row["distortion"] for row in rows] == expected
    f1 = [row["lesion/f1"] for row in whole["rows"]]
    assert [float(row["lesion/f1"]) for row in rows] == f1


def test_other_results_in_the_folder(data, tmp_path):
    with pytest.raises(ValueError, match="'fog'"):
        evaluate(data, tmp_path, distortions=["fog"])
    assert not list(tmp_path.iterdir())
    evaluate(data, tmp_path, num_images=2)
    with pytest.raises(ValueError, match="images 2, not 5"):
        evaluate(data, tmp_path)
    with pytest.raises(ValueError, match="model spots, not other"):
        evaluate(data, tmp_path, num_images=2, meta={"model": "other"})


def test_subsets_and_ground_truth(data, capsys):
    assert isinstance(load_coco(data[1] / "gt.json"), COCO) and not capsys.readouterr().out
    assert choose_subset(5, None, 0) == choose_subset(5, 9, 0) == [0, 1, 2, 3, 4]
    small, large = choose_subset(100, 10, 4), choose_subset(100, 30, 4)
    assert len(small) == 10 and set(small) < set(large) and large == sorted(large)
    assert small != choose_subset(100, 10, 5)


ROW = '{"meta": {"model": "x"}, "rows": [%s]}'


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"meta": {}, "rows": []}', '{"meta": [], "rows": []}'),
        *('{"meta": {"model": ["x"]}, "rows": []}', ROW % '{"distortion": "clean"}'),
        *(ROW % f'{{"distortion": {v}}}' for v in ('[], "severity": 0', '"jpeg", "severity": 9')),
        ROW % '{"distortion": "x", "severity": 1, "a/b": "1"}',
        '{"meta": {"model": "x", "images": {}}, "rows": []}',
    ],
)
def test_a_damaged_file_of_another_run(data, tmp_path, content):
    (tmp_path / "robustness.json").write_text(content)
    with pytest.raises(BadInputError, match=r"robustness\.json"):
        evaluate(data, tmp_path)
