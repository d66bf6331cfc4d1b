import json

import evaluate
import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def region(image_id, x, width=10, **fields):
    mask = np.zeros((40, 50), np.uint8)
    mask[:10, x : x + width] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    return {
        "image_id": image_id,
        "category_id": 1,
        "bbox": [x, 0, width, 10],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        **fields,
    }


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
    evaluate.main(["--gt", str(gt), "--dt", str(dt), "--output", str(output), *options])
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
    for name in ("per_image.csv", "pr_curve.csv"):
        assert (tmp_path / "out" / name).stat().st_size
    with Image.open(tmp_path / "out" / "pr_curve.png") as image:
        image.load()
    printed = capsys.readouterr().out
    assert "| AP50_voc | 50.00 | 50.00 |" in printed
    assert "| localised_recall" in printed
    assert str(tmp_path / "out" / "pr_curve.png") in printed


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
    assert "Result 0 has the image_id 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path / "nowhere.json", dt, tmp_path / "out")
    assert "nowhere.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
