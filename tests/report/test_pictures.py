import json

from PIL import Image

from imrcnn_d2.report.plots.draw_all import plot_run


def test_all_pictures_from_the_files_of_an_evaluation(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "out").mkdir()
    Image.new("RGB", (50, 40)).save(tmp_path / "images" / "1.png")
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}
    gt = {
        "images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 50}],
        "categories": [{"id": 1, "name": "polyp"}],
        "annotations": [box],
    }
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    results = tmp_path / "out" / "coco_instances_results.json"
    results.write_text(json.dumps([box | {"score": 0.9}]))
    pictures = plot_run(tmp_path / "out", tmp_path / "gt.json", tmp_path / "images")
    expected = {"pr_curve", "froc", "calibration", "thresholds", "confusion_matrix"}
    assert {path.stem for path in pictures} == {*expected, "contact_sheet"}
    for path in pictures:
        assert path.parent == tmp_path / "out"
        with Image.open(path) as image:
            image.load()
