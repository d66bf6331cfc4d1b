import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.cli import agreement, evaluate, report
from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results
from imrcnn_d2.evaluation.output import prediction_info, read_test_log

RESULTS = "coco_instances_results.json"
TABLES = ("per_image", "pr_curve", "froc", "calibration", "thresholds", "by_size")
PLOTS = ("pr_curve", "froc", "calibration", "thresholds", "confusion_matrix")


def region(image_id, x, width=10, **fields):
    return rectangle(image_id, x, 0, width, 10, **fields)


def table(metrics):
    return [metrics["lesion"][key] for key in ("TP", "FP", "FN", "TN")]


@pytest.fixture
def case(dataset, tmp_path):
    """Paths of a ground truth of three images and of results: IoU 0.8, and a false alarm of 0.6."""
    gt, dt = tmp_path / "gt.json", tmp_path / "dt.json"
    gt.write_text(json.dumps(dataset(3, [region(1, 0), region(2, 0)])))
    dt.write_text(json.dumps([region(1, 0, 8, score=0.9), region(3, 0, score=0.6)]))
    return gt, dt


def run(gt, dt, output, *options):
    """The metrics that the tool writes."""
    arguments = ["--gt", gt, "--dt", dt, "--output", output, "--resamples", 100, *options]
    evaluate.main([str(argument) for argument in arguments])
    return json.loads((output / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_calibration_before_and_after_a_map_is_printed(case, tmp_path, capsys):
    gt, dt = case
    records = [{**record, "raw_score": 0.99} for record in json.loads(dt.read_text())]
    dt.write_text(json.dumps(records))
    metrics = run(gt, dt, tmp_path / "out")
    printed = capsys.readouterr().out
    for group in ("calibration", "calibration_raw"):
        assert group in printed and f"{metrics[group]['mean_score']:.2f}" in printed
    assert metrics["calibration_raw"]["mean_score"] == pytest.approx(99)


def test_the_threshold_is_that_of_the_scores(case, tmp_path, capsys):
    """What the predictions state, else 0.5 of mapped scores and the paper's of others."""
    gt, dt = case
    records = json.loads(dt.read_text())
    mapped = [{**record, "raw_score": record["score"]} for record in records]
    info = {"weights_sha256": "ab", "tau": 0.65}
    images = json.loads(gt.read_text())["images"]
    predictions = {"info": info, "images": images, "annotations": mapped}
    predictions["categories"] = json.loads(gt.read_text())["categories"]
    for content, given, tau, texts in (
        (records, None, 0.7, ("0.7", "--tau")),
        (mapped, None, 0.5, ("0.5", "--tau")),
        (records, 0.5, 0.5, ()),
        (predictions, None, 0.65, ("0.65", "--tau")),
        (predictions, 0.65, 0.65, ()),
        (predictions, 0.5, 0.5, ("0.65", "0.5")),
    ):
        detections = read_results(content, read_ground_truth(gt))
        assert evaluate.threshold(given, detections, prediction_info(detections.info)) == tau
        printed = capsys.readouterr().out
        assert all(text in printed for text in texts) and bool(texts) == bool(printed)
    dt.write_text(json.dumps(predictions))
    metrics = run(gt, dt, tmp_path / "out")
    assert (metrics["meta"]["tau"], metrics["lesion"]["FP"]) == (0.65, 0)
    first = capsys.readouterr().out.split("\n\n")[0]
    assert all(text in first for text in ("--tau", "0.65"))
    assert metrics["meta"]["predictions"] == info
    # The results that it leaves, scored again, are the same; they state no threshold.
    again = run(gt, tmp_path / "out" / RESULTS, tmp_path / "again")
    assert again["meta"]["tau"] == 0.5 and again["paper"]["FP"] == metrics["paper"]["FP"] == 0


def test_scores_results(case, tmp_path, capsys, real_plots):
    (gt, dt), out = case, tmp_path / "out"
    metrics = run(gt, dt, out, "--ci-all", "--seed", 3)
    assert table(metrics) == [1, 0, 1, 1]
    assert metrics["lesion"]["iou"] == pytest.approx(80)
    assert metrics["segm"]["AP50"] == pytest.approx(100 * 51 / 101)
    assert metrics["bbox"]["AP50_voc"] == pytest.approx(50)
    assert metrics["segm"]["APl"] is None and len(metrics["segm"]["AP_ci"]) == 2
    sha256 = hashlib.sha256(gt.read_bytes()).hexdigest()
    bootstrap = {"resamples": 100, "seed": 3, "all_coco": True, "unit": "image"}
    meta = {"dt": str(dt), "gt": str(gt), "gt_sha256": sha256, "bootstrap": bootstrap}
    assert meta.items() <= metrics["meta"].items()
    low, high = metrics["lesion"]["recall_ci"]
    assert low < 50 < high
    printed = capsys.readouterr().out
    for name in (*(f"{name}.csv" for name in TABLES), "confusion_matrix.csv", "metrics.json"):
        assert (out / name).stat().st_size and name in printed
    for name in PLOTS:
        with Image.open(out / f"{name}.png") as image:
            image.load()
        assert f"{name}.png" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| recall"))
    assert row.split("|")[2].strip() == f"50.00 [{low:.2f}, {high:.2f}]"
    assert "| localised_recall" in printed and "| sensitivity_at_0.125" in printed
    assert json.loads((out / RESULTS).read_text()) == json.loads(dt.read_text())


def test_options(case, tmp_path):
    assert run(*case, tmp_path / "a", "--tau", "0.5")["lesion"]["FP"] == 1
    assert run(*case, tmp_path / "b", "--iou", "0.9")["lesion"]["TP"] == 0
    metrics = run(*case, tmp_path / "c", "--iou-type", "bbox", "--resamples", 0)
    assert metrics["meta"]["iou_type"] == "bbox"
    assert "recall_ci" not in metrics["lesion"] and metrics["meta"]["bootstrap"] is None


def test_a_threshold_from_a_validation_set(case, tmp_path, capsys):
    """There the hit has 0.6 and a false alarm 0.3; here 0.6 is a false alarm."""
    (gt, dt), val, val_dt = case, tmp_path / "val.json", tmp_path / "val_dt.json"
    val.write_text(json.dumps(json.loads(gt.read_text()) | {"annotations": [region(1, 0)]}))
    val_dt.write_text(json.dumps([region(1, 0, score=0.6), region(2, 0, score=0.3)]))
    chosen = ("--tau-from", val, val_dt)
    mapped = tmp_path / "mapped.json"
    mapped.write_text(json.dumps([region(1, 0, score=0.6) | {"raw_score": 0.8}]))
    metrics = run(gt, dt, tmp_path / "out", *chosen, "--tau-rule", "recall>=90")
    assert metrics["lesion"]["FP"] == 0 and metrics["tau_val"]["lesion"]["FP"] == 1
    point = {"tau": 0.6, "rule": "recall>=90", "dataset": str(val)}
    assert point.items() <= metrics["tau_val"].items()
    assert len(metrics["tau_val"]["image"]["recall_ci"]) == 2
    assert "score ≥ 0.6 (tau_val)" in capsys.readouterr().out
    for options, message in (
        ((*chosen, "--tau-rule", "best"), "'best'"),
        (("--tau-from", gt, dt), f"--tau-from {gt}"),
        (("--tau-from", val, mapped), "raw_score"),
        (("--tau-rule", "f1"), "--tau-from"),
        (("--recognition", "--iou", 0.3), "--iou"),
    ):
        with pytest.raises(SystemExit):
            run(gt, dt, tmp_path / "refused", *options)
        assert message in capsys.readouterr().err.splitlines()[-1]  # after argparse's usage
    assert not (tmp_path / "refused").exists()


def test_a_folder_of_masks(case, tmp_path, capsys):
    masks, out = tmp_path / "masks", tmp_path / "out"
    masks.mkdir()
    for name, width in (("1", 8), ("2", 0), ("3", 10)):
        mask = np.zeros((40, 50), np.uint8)
        mask[:10, :width] = 255
        Image.fromarray(mask).save(masks / f"{name}.png")
    metrics = run(case[0], masks, out)
    assert table(metrics) == [1, 1, 1, 0] and metrics["lesion"]["iou"] == pytest.approx(80)
    assert metrics["segm"]["AP50"] is None and metrics["meta"]["scored"] is False
    assert not (out / "pr_curve.png").exists() and (out / "confusion_matrix.png").exists()
    assert "Of all masks" in capsys.readouterr().out
    # The results written there are what the masks are.
    again = run(case[0], out / RESULTS, tmp_path / "again")
    assert all(again[key] == metrics[key] for key in ("segm", "lesion", "image", "froc"))
    (masks / "2.png").unlink()
    with pytest.raises(SystemExit):
        run(case[0], masks, out)
    assert "2.png" in capsys.readouterr().err


def test_images_the_log_of_test_sets_and_a_report(case, dataset, tmp_path):
    """In a prepared data set each look at the test set is noted."""
    root, dt = tmp_path / "polyps", case[1]
    for folder in ("annotations", "images"):
        (root / folder).mkdir(parents=True)
    (root / "splits.json").write_text("{}")
    gt = case[0].rename(root / "annotations" / "test.json")
    for part in ("train", "val"):
        (gt.parent / f"{part}.json").write_text(json.dumps(dataset(0)))
    for name in "123":
        Image.new("RGB", (50, 40)).save(root / "images" / f"{name}.png")
    metrics = run(gt, dt, tmp_path / "out", "--images", root / "images")
    assert metrics["meta"]["image_root"] == str(root / "images")
    with Image.open(tmp_path / "out" / "contact_sheet.png") as image:
        image.load()
    (row,) = read_test_log(gt)
    assert (row["what"], row["output"]) == (str(dt), str(tmp_path / "out"))
    assert row["sha256"] == hashlib.sha256(dt.read_bytes()).hexdigest()
    report.main([str(tmp_path / "out"), "--output", str(tmp_path / "report.html")])
    assert "80.0" in (tmp_path / "report.html").read_text()  # the IoU


def test_no_results_and_bad_ones(case, tmp_path, capsys):
    gt, dt = case
    dt.write_text("[]")
    metrics = run(gt, dt, tmp_path / "nothing")
    assert metrics["segm"]["AP"] == 0 and metrics["lesion"]["precision"] is None
    dt.write_text(json.dumps([region(9, 0, score=0.5)]))
    nowhere = tmp_path / "nowhere.json"
    for truth, message in ((gt, f"{dt}: results[0]"), (nowhere, str(nowhere))):
        with pytest.raises(SystemExit):
            run(truth, dt, tmp_path / "out")
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def predicted(tmp_path):
    """predictions.json as `imrcnn predict` writes it, with ids and the name of the class its own: a
    hit in 1.png, and a false alarm in a duplicate, which the ground truth lacks."""
    names, path = ["1.png", "2.png", "3.png", "copy.png"], tmp_path / "predictions.json"
    images = [{"id": 70 + i, "file_name": name} for i, name in enumerate(names)]
    detections = [region(70 + i, 0, score=0.9, category_id=5) for i in (0, 3)]
    categories = [{"id": 5, "name": "polyp"}]
    path.write_text(
        json.dumps({"images": images, "categories": categories, "annotations": detections})
    )
    return path


def test_an_image_that_the_ground_truth_lacks(case, predicted, tmp_path, capsys, caplog):
    with pytest.raises(SystemExit):
        run(case[0], predicted, tmp_path / "out")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert all(text in error for text in (str(predicted), "copy.png", "--ignore-extra-images"))
    metrics = run(case[0], predicted, tmp_path / "out", "--ignore-extra-images", "--resamples", 0)
    assert table(metrics) == [1, 0, 1, 1]
    notes = {"ignored_images": ["copy.png"], "matched_classes": {"polyp": "lesion"}}
    assert notes.items() <= metrics["meta"].items()
    assert "copy.png" in caplog.text and "'polyp'" in caplog.text


def test_folders_in_place_of_files(case, predicted, tmp_path, capsys):
    """The file that is meant is named."""
    root, output = tmp_path / "polyps", tmp_path / "found"
    for folder in (root / "annotations", output / "masks"):
        folder.mkdir(parents=True)
    gt = case[0].rename(root / "annotations" / "test.json")
    dt = predicted.rename(output / "predictions.json")
    for options, meant in (
        ((root, dt), gt),
        ((gt, output), dt),
        ((root, dt, "--tau-from", gt, dt), gt),
        ((gt, dt, "--tau-from", root, dt), gt),
        ((root, dt, "--recognition"), gt),
        ((gt, output, "--recognition"), None),
        ((output / "masks", dt), output / "masks"),
    ):
        truth, results, *others = options
        with pytest.raises(SystemExit) as exit_:
            run(truth, results, tmp_path / "out", *others)
        error = capsys.readouterr().err
        assert exit_.value.code == 1 and error.count("\n") == 1
        assert str(meant or "") in error and "Errno" not in error
    with pytest.raises(SystemExit):
        agreement.main(["--annotations", str(gt), str(root), "--output", str(tmp_path / "out")])
    assert str(gt) in capsys.readouterr().err


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
    for column, expected in (("centre", {"A": 50, "B": None}), ("size_mm", {"<5": 100, ">=10": 0})):
        groups = metrics["by_group"][column]["groups"]
        assert {name: group["lesion"]["recall"] for name, group in groups.items()} == expected
    assert "By centre:\n|" in printed and " all |" in printed
    for name in ("by_group.csv", "by_centre.png", "by_size_mm.png"):
        assert (tmp_path / "out" / name).stat().st_size and name in printed
    for wrong in ("size_mm", "x"):
        with pytest.raises(SystemExit):
            run(gt, dt, tmp_path / "wrong", "--by", wrong)
        assert f"'{wrong}'" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
