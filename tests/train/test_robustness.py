"""Figures on distorted copies, of a detector so simple that they can be foreseen."""

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
    found = []
    for image in images:
        parts, _ = components(image.min(axis=2) > 170, 5)
        found.append([{**annotation_from_mask(part, 3), "score": 0.9} for part in parts])
    return found


def evaluate(data, output, predict=bright_spots, **options):
    options = {"tau": TAU, "about": {"model": "spots"}, "distortions": [], **options}
    return evaluate_robustness(predict, *data, output, **options)


def of(document, name):
    return [row for row in document["rows"] if row["distortion"] == name]


def test_clean_images(data, tmp_path):
    document = evaluate(data, tmp_path)
    (row,) = document["rows"]
    assert (row["distortion"], row["severity"], row["level"]) == ("clean", 0, None)
    ground_truth, folder = data
    results = [
        {**record, "image_id": i}
        for i in ground_truth.imgs
        for record in bright_spots([np.asarray(Image.open(folder / f"{i}.png"))])[0]
    ]
    groups = evaluate_lesions(ground_truth.dataset, results, tau=TAU).groups()
    assert row["lesion/f1"] == row["image/mdice"] == 100
    for group, figures in groups.items():
        for key, value in figures.items():
            assert row[f"{group}/{key}"] == pytest.approx(value, nan_ok=True)
    assert document["meta"] == {"model": "spots", "tau": TAU, "images": 5, "seed": 0}


def test_ground_truth_turns_with_the_images(data, tmp_path):
    rows = of(evaluate(data, tmp_path, distortions=["rotation"]), "rotation")
    assert [row["level"] for row in rows] == [15, 45, 90, 135, 180]
    assert all(row["lesion/f1"] == 100 and row["lesion/iou"] > 90 for row in rows)
    # the spot in the corner leaves the image, or nearly so, but for right angles: it is not missed
    assert [row["lesion/TP"] for row in rows] == [3, 3, 4, 3, 4]


def test_what_is_dark_is_not_found(data, tmp_path):
    rows = of(evaluate(data, tmp_path, distortions=["under_exposure"]), "under_exposure")
    assert [row["lesion/recall"] for row in rows][-3:] == [0, 0, 0]
    # a stop more leaves the gray under 170, two do not
    rows = of(evaluate(data, tmp_path, distortions=["over_exposure"]), "over_exposure")
    assert [row["lesion/precision"] for row in rows][:2] == [100, 100]
    assert rows[-1]["lesion/recall"] == 0


def test_files(data, tmp_path):
    document = evaluate(data, tmp_path, distortions=["jpeg", "motion"])
    assert json.loads((tmp_path / "robustness.json").read_text()) == json.loads(
        json.dumps(document).replace("NaN", "null")
    )
    with open(tmp_path / "robustness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = ["clean"] + [n for n in DISTORTIONS if n in ("jpeg", "motion") for _ in range(5)]
    assert [row["distortion"] for row in rows] == expected
    assert [float(row["lesion/f1"]) for row in rows] == [
        row["lesion/f1"] for row in document["rows"]
    ]


def test_goes_on_where_it_was_interrupted(data, tmp_path):
    whole = evaluate(data, tmp_path / "whole", distortions=["jpeg", "highlights"], batch_size=2)

    class Interrupted(Exception):
        pass

    seen = []

    def fails_later(images):
        seen.append(len(images))
        if sum(seen) > 17:
            raise Interrupted
        return bright_spots(images)

    with pytest.raises(Interrupted):
        evaluate(data, tmp_path / "part", fails_later, distortions=["jpeg"])
    assert len(json.loads((tmp_path / "part" / "robustness.json").read_text())["rows"]) == 3
    seen.clear()

    def counting(images):
        seen.append(len(images))
        return bright_spots(images)

    part = evaluate(data, tmp_path / "part", counting, distortions=["jpeg", "highlights"])
    assert sum(seen) == 5 * (len(whole["rows"]) - 3)
    assert json.dumps(part).replace("NaN", "null") == json.dumps(whole).replace("NaN", "null")


def test_other_results_in_the_folder(data, tmp_path):
    evaluate(data, tmp_path, num_images=2)
    with pytest.raises(ValueError, match=r"robustness\.json: holds results with images 2, not 5"):
        evaluate(data, tmp_path)
    with pytest.raises(ValueError, match="model spots, not other"):
        evaluate(data, tmp_path, num_images=2, about={"model": "other"})


def test_unknown_distortion(data, tmp_path):
    with pytest.raises(ValueError, match="no distortion 'fog': there are defocus, "):
        evaluate(data, tmp_path, distortions=["fog"])
    assert not list(tmp_path.iterdir())


def test_subsets():
    assert choose_subset(5, None, 0) == choose_subset(5, 9, 0) == [0, 1, 2, 3, 4]
    small, large = choose_subset(100, 10, 4), choose_subset(100, 30, 4)
    assert len(small) == 10 and set(small) < set(large) and large == sorted(large)
    assert small != choose_subset(100, 10, 5)


def test_ground_truth_is_read_silently(data, capsys):
    ground_truth = load_coco(data[1] / "gt.json")
    assert isinstance(ground_truth, COCO)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"meta": {}, "rows": []}', '{"meta": [], "rows": []}'),
        '{"meta": {"model": ["x"]}, "rows": []}',
        '{"meta": {"model": "x"}, "rows": [{"distortion": "clean"}]}',
        '{"meta": {"model": "x"}, "rows": [{"distortion": [], "severity": 0}]}',
        '{"meta": {"model": "x"}, "rows": [{"distortion": "jpeg", "severity": 9}]}',
        '{"meta": {"model": "x"}, "rows": [{"distortion": "x", "severity": 1, "a/b": "1"}]}',
        '{"meta": {"model": "x", "images": {}}, "rows": []}',
    ],
)
def test_a_damaged_file_of_another_run(data, tmp_path, content):
    (tmp_path / "robustness.json").write_text(content)
    with pytest.raises(BadInputError, match=r"robustness\.json"):
        evaluate(data, tmp_path)
