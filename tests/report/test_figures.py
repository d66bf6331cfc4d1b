from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.report.plots.draw_all import plot_curves


def boxes(*scores):
    """One lesion in each of two images, and a detection on the first for each score."""
    box = {"category_id": 1, "bbox": [0, 0, 10, 10]}
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2)],
        "categories": [{"id": 1, "name": "polyp"}],
        "annotations": [{**box, "image_id": i} for i in (1, 2)],
    }
    return data, [{**box, "image_id": 1, "score": score} for score in scores]


def names(paths):
    return {path.name for path in paths}


def test_pictures(tmp_path):
    results = evaluate_lesions(*boxes(0.9, 0.4), iou_type="bbox")
    paths = plot_curves(results, tmp_path)
    expected = {"pr_curve", "froc", "calibration", "thresholds", "confusion_matrix"}
    assert names(paths) == {f"{name}.png" for name in expected}
    assert all(path.stat().st_size for path in paths)


def test_without_scores_there_are_no_curves(tmp_path):
    results = evaluate_lesions(*boxes(None, None), iou_type="bbox")
    assert names(plot_curves(results, tmp_path)) == {"confusion_matrix.png"}


def test_without_detections(tmp_path):
    assert len(plot_curves(evaluate_lesions(*boxes(), iou_type="bbox"), tmp_path)) == 5
