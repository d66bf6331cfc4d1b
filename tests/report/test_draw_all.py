import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.evaluation import evaluate_classification, evaluate_lesions
from imrcnn_d2.evaluation.subgroups import By, with_groups
from imrcnn_d2.report.plots import draw_all

OF_DETECTOR = ["confusion_matrix", "pr_curve", "froc", "calibration", "thresholds"]


def boxes(*scores):
    """One lesion in each of two images, and a detection on the first for each score."""
    box = {"category_id": 1, "bbox": [0, 0, 10, 10]}
    data = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 40, "width": 50, "centre": "A"}
            for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": "polyp"}],
        "annotations": [{**box, "image_id": i} for i in (1, 2)],
    }
    return data, [{**box, "image_id": 1, "score": score} for score in scores]


def stems(paths):
    for path in paths:
        assert np.asarray(Image.open(path).convert("L")).std() > 5, path
    return [path.stem for path in paths]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((0.9, 0.4), OF_DETECTOR), ((), OF_DETECTOR), ((None, None), ["confusion_matrix"])],
)
def test_of_a_detector(scores, expected, tmp_path):
    results = evaluate_lesions(*boxes(*scores), iou_type="bbox")
    assert stems(draw_all(results, tmp_path)) == expected
    for i in (1, 2):
        Image.new("RGB", (50, 40)).save(tmp_path / f"{i}.png")
    results = with_groups(results, [By("centre")])
    paths = draw_all(results, tmp_path, tmp_path)
    assert stems(paths) == [*expected, "by_centre", "contact_sheet"]


def test_of_a_classifier(tmp_path):
    rng = np.random.default_rng(0)
    truth = {
        "images": [{"id": i} for i in range(12)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(3)],
        "annotations": [{"id": i, "image_id": i, "category_id": i % 3} for i in range(12)],
    }
    scores = rng.dirichlet(np.ones(3), 12).tolist()
    found = [{"image_id": i, "scores": row} for i, row in enumerate(scores)]
    paths = draw_all(evaluate_classification(truth, found), tmp_path)
    assert stems(paths) == ["confusion_matrix", "roc_curve", "calibration"]
