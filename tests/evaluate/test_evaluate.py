import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.cli import evaluate
from imrcnn_d2.evaluation.output import read_test_log

RESULTS = "coco_instances_results.json"
TABLES = [
    f"{name}.csv"
    for name in (
        "per_image",
        "pr_curve",
        "froc",
        "calibration",
        "thresholds",
        "by_size",
        "confusion_matrix",
    )
]
PICTURES = [
    f"{name}.png" for name in ("pr_curve", "froc", "calibration", "thresholds", "confusion_matrix")
]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def region(image_id, x, width=10, **fields):
    return rectangle(image_id, x, 0, width, 10, **fields)


@pytest.fixture
def case(tmp_path):
    """Paths of a ground truth of three images and of results: IoU 0.8, and a false alarm of 0.6."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2, 3)]
    categories = [{"id": 1, "name": "polyp"}]
    gt = {"images": images, "categories": categories, "annotations": [region(1, 0), region(2, 0)]}
    dt = [region(1, 0, 8, score=0.9), region(3, 0, score=0.6)]
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    (tmp_path / "dt.json").write_text(json.dumps(dt))
    return tmp_path / "gt.json", tmp_path / "dt.json"


def run(gt, dt, output, *options):
    """The metrics that the tool writes."""
    arguments = ["--gt", gt, "--dt", dt, "--output", output, "--resamples", 100, *options]
    evaluate.main([str(argument) for argument in arguments])
    return json.loads((output / "metrics.json").read_text(), parse_constant=refuse)


def test_scores_results(case, tmp_path, capsys):
    metrics = run(*case, tmp_path / "out")
    counts = [metrics["lesion"][key] for key in ("TP", "FP", "FN", "TN")]
    assert counts == [1, 0, 1, 1]
    assert metrics["lesion"]["iou"] == pytest.approx(80)
    assert metrics["segm"]["AP50"] == pytest.approx(100 * 51 / 101)
    assert metrics["bbox"]["AP50_voc"] == pytest.approx(50)
    assert metrics["segm"]["APl"] is None
    assert metrics["meta"]["dt"] == str(case[1])
    assert metrics["meta"]["gt"] == str(case[0])
    digest = hashlib.sha256(case[0].read_bytes()).hexdigest()
    assert metrics["meta"]["gt_sha256"] == digest
    assert metrics["meta"]["bootstrap"]["resamples"] == 100
    low, high = metrics["lesion"]["recall_ci"]
    assert low < 50 < high
    assert "AP_ci" not in metrics["segm"]
    printed = capsys.readouterr().out
    for name in TABLES:
        assert (tmp_path / "out" / name).stat().st_size
        assert name in printed
    for name in PICTURES:
        with Image.open(tmp_path / "out" / name) as image:
            image.load()
        assert name in printed
    row = next(line for line in printed.splitlines() if line.startswith("| recall"))
    assert row.split("|")[2].strip() == f"50.00 [{low:.2f}, {high:.2f}]"
    assert "| localised_recall" in printed and "| sensitivity_at_0.125" in printed
    assert json.loads((tmp_path / "out" / RESULTS).read_text()) == json.loads(case[1].read_text())


def test_options(case, tmp_path):
    assert run(*case, tmp_path / "a", "--tau", "0.5")["lesion"]["FP"] == 1
    assert run(*case, tmp_path / "b", "--iou", "0.9")["lesion"]["TP"] == 0
    metrics = run(*case, tmp_path / "c", "--iou-type", "bbox")
    assert metrics["meta"]["iou_type"] == "bbox"


def test_a_coco_file_with_scores(case, tmp_path):
    """What tools/predict.py writes, its images numbered otherwise."""
    gt, dt = case
    plain = run(gt, dt, tmp_path / "plain")
    new_id = {1: 30, 2: 20, 3: 10}
    annotations = [a | {"image_id": new_id[a["image_id"]]} for a in json.loads(dt.read_text())]
    images = [{"id": i, "file_name": f"/in/{n}.png"} for n, i in new_id.items()]
    categories = [{"id": 1, "name": "polyp"}]
    dt.write_text(
        json.dumps({"images": images, "categories": categories, "annotations": annotations})
    )
    renumbered = run(gt, dt, tmp_path / "renumbered")
    for group in ("bbox", "segm", "lesion", "image"):
        assert renumbered[group] == plain[group]


def test_intervals(case, tmp_path):
    every = run(*case, tmp_path / "all", "--ci-all", "--seed", 3)
    assert len(every["segm"]["AP_ci"]) == 2
    assert every["meta"]["bootstrap"] == {
        "resamples": 100,
        "seed": 3,
        "all_coco": True,
        "unit": "image",
    }


def test_a_threshold_from_a_validation_set(case, tmp_path, capsys):
    """There the hit has 0.6 and a false alarm 0.3; here 0.6 is a false alarm."""
    gt, dt = case
    validation = json.loads(gt.read_text()) | {"annotations": [region(1, 0)]}
    (tmp_path / "val.json").write_text(json.dumps(validation))
    found = [region(1, 0, score=0.6), region(2, 0, score=0.3)]
    (tmp_path / "val_dt.json").write_text(json.dumps(found))
    chosen = ("--tau-from", tmp_path / "val.json", tmp_path / "val_dt.json")
    metrics = run(gt, dt, tmp_path / "out", *chosen, "--tau-rule", "recall>=90")
    assert metrics["lesion"]["FP"] == 0
    assert (metrics["tau_val"]["tau"], metrics["tau_val"]["rule"]) == (0.6, "recall>=90")
    assert metrics["tau_val"]["dataset"] == str(tmp_path / "val.json")
    assert metrics["tau_val"]["lesion"]["FP"] == 1
    assert len(metrics["tau_val"]["image"]["recall_ci"]) == 2
    assert "Score ≥ 0.6 (tau_val)" in capsys.readouterr().out
    for options, message in (
        ((*chosen, "--tau-rule", "best"), "'best'; it must be 'f1'"),
        (("--tau-from", gt, dt), "never chosen on a test set"),
    ):
        with pytest.raises(SystemExit):
            run(gt, dt, tmp_path / "refused", *options)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_folder_of_masks(case, tmp_path, capsys):
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, width in (("1", 8), ("2", 0), ("3", 10)):
        mask = np.zeros((40, 50), np.uint8)
        mask[:10, :width] = 255
        Image.fromarray(mask).save(masks / f"{name}.png")
    metrics = run(case[0], masks, tmp_path / "out")
    assert [metrics["lesion"][key] for key in ("TP", "FP", "FN", "TN")] == [1, 1, 1, 0]
    assert metrics["lesion"]["iou"] == pytest.approx(80)
    assert metrics["segm"]["AP50"] is None and metrics["froc"]["mean"] is None
    assert metrics["meta"]["scored"] is False
    assert not (tmp_path / "out" / "pr_curve.png").exists()
    assert (tmp_path / "out" / "confusion_matrix.png").exists()
    assert "Of all masks" in capsys.readouterr().out
    # The results written there are what the masks are.
    again = run(case[0], tmp_path / "out" / RESULTS, tmp_path / "again")
    for key in ("segm", "lesion", "image", "froc"):
        assert again[key] == metrics[key]
    (masks / "2.png").unlink()
    with pytest.raises(SystemExit):
        run(case[0], masks, tmp_path / "out")
    assert "lacks the masks of 1 of 3 images: 2.png" in capsys.readouterr().err


def test_boxes_alone(case, tmp_path):
    gt, dt = case
    bare = [{k: v for k, v in r.items() if k != "segmentation"} for r in json.loads(dt.read_text())]
    dt.write_text(json.dumps(bare))
    metrics = run(gt, dt, tmp_path / "out", "--resamples", 0)
    assert "recall_ci" not in metrics["lesion"] and metrics["meta"]["bootstrap"] is None
    assert metrics["lesion"]["iou"] is None and metrics["image"]["miou"] is None
    assert metrics["lesion"]["iou_box"] == pytest.approx(80)
    assert "segmentation" not in json.loads((tmp_path / "out" / RESULTS).read_text())[0]


def test_images_and_the_log_of_test_sets(case, tmp_path):
    """In a prepared data set each look at the test set is noted."""
    root = tmp_path / "polyps"
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    (root / "splits.json").write_text("{}")
    gt = case[0].rename(root / "annotations" / "test.json")
    for name in "123":
        Image.new("RGB", (50, 40)).save(root / "images" / f"{name}.png")
    metrics = run(gt, case[1], tmp_path / "out", "--images", root / "images")
    assert metrics["meta"]["image_root"] == str(root / "images")
    with Image.open(tmp_path / "out" / "contact_sheet.png") as image:
        image.load()
    (row,) = read_test_log(gt)
    assert row["what"] == str(case[1]) and row["output"] == str(tmp_path / "out")
    assert row["sha256"] == hashlib.sha256(case[1].read_bytes()).hexdigest()


def test_no_results(case, tmp_path):
    gt, dt = case
    dt.write_text("[]")
    metrics = run(gt, dt, tmp_path / "out")
    assert metrics["segm"]["AP"] == 0
    assert metrics["lesion"]["precision"] is None


def test_bad_input_is_named_and_writes_nothing(case, tmp_path, capsys):
    gt, dt = case
    dt.write_text(json.dumps([region(9, 0, score=0.5)]))
    with pytest.raises(SystemExit):
        run(gt, dt, tmp_path / "out")
    assert "dt.json: results[0] has the image_id 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path / "nowhere.json", dt, tmp_path / "out")
    assert "nowhere.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_by_columns(case, tmp_path, capsys):
    gt, dt = case
    content = json.loads(gt.read_text())
    for image, centre in zip(content["images"], "AAB", strict=True):
        image["centre"] = centre
    for annotation, size in zip(content["annotations"], (4, 12), strict=True):
        annotation["size_mm"] = size
    gt.write_text(json.dumps(content))
    metrics = run(gt, dt, tmp_path / "out", "--by", "centre", "--by", "size_mm:5,10")
    printed = capsys.readouterr().out
    assert metrics["by_group"]["centre"]["groups"]["A"]["lesion"]["recall"] == 50
    assert metrics["by_group"]["centre"]["groups"]["B"]["lesion"]["recall"] is None
    sizes = metrics["by_group"]["size_mm"]["groups"]
    assert {name: own["lesion"]["recall"] for name, own in sizes.items()} == {"<5": 100, ">=10": 0}
    assert "By centre:\n|" in printed and " all |" in printed
    for name in ("by_group.csv", "by_centre.png", "by_size_mm.png"):
        assert (tmp_path / "out" / name).stat().st_size and name in printed
    for wrong, message in (("size_mm", "give the limits of bins"), ("x", "No image and no")):
        with pytest.raises(SystemExit):
            run(gt, dt, tmp_path / "wrong", "--by", wrong)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
