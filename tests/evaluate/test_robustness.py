"""Metrics on distorted copies of the test images, by the function and by the command."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO
from rectangles import rectangles

from imrcnn_d2.cli import robustness
from imrcnn_d2.data.distortions import DISTORTIONS
from imrcnn_d2.data.formats import FORMATS
from imrcnn_d2.data.masks import annotation_from_mask, components
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.engine import load_config
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.output import read_test_log
from imrcnn_d2.evaluation.robustness import choose_subset, evaluate_robustness, load_coco
from imrcnn_d2.utils.files import BadInputError, Rejects

read_kvasir_seg = FORMATS["kvasir-seg"].read_folder

OPTS = [
    *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96, "MODEL.DEVICE", "cpu"),
    *("MODEL.TIMM.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.RPN.POST_NMS_TOPK_TEST", 3),
]


@pytest.fixture
def weights(kvasir_original, tmp_path, monkeypatch):
    """Of a tiny random model; five real images are the test set."""
    cfg = load_config("configs/imrcnn_lite.yaml", ["DATASETS.ROOT", "kvasir_seg", *OPTS])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    state = {"model": build_model(cfg).state_dict(), "neck_form": "panet"}
    torch.save(state, tmp_path / "model.pth")
    rejects, options = Rejects(), SplitOptions(ratio=(0, 0, 1))
    source = read_kvasir_seg(kvasir_original, rejects)
    prepare_dataset(source, tmp_path / "sets" / "kvasir_seg", options, rejects)
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path / "sets"))
    return tmp_path / "model.pth"


def run(*arguments):
    robustness.main([str(argument) for argument in arguments])


def test_evaluate_and_plot(weights, tmp_path, capsys):
    out = tmp_path / "one"
    common = ["--weights", weights, "--dataset", "kvasir_seg_test", "--num-images", 2]
    run(*common, "--distortions", "rotation", "--output", out, "--batch-size", 2, "--tau", 0.3)
    printed = capsys.readouterr().out
    assert "IMR-CNN: lesion/f1" in printed and "rotation" in printed
    document = json.loads((out / "robustness.json").read_text())
    assert len(document["rows"]) == 6
    meta = {"tau": 0.3, "dataset": "kvasir_seg_test", "images": 2}
    assert meta.items() <= document["meta"].items()
    # the model sees what predict.py would: a detection of category 1, of a size that fits
    assert all(row["segm/AP50"] is not None for row in document["rows"])
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert names == {"robustness.json", "robustness.csv", "robustness.png", "distortions.jpg"}
    gt = tmp_path / "sets" / "kvasir_seg" / "annotations" / "test.json"
    assert [entry["output"] for entry in read_test_log(gt)] == [str(out)]

    folder = ["--weights", weights, "--dataset", tmp_path / "sets" / "kvasir_seg"]
    run(*folder, "--num-images", 1, "--distortions", "jpeg", "--output", tmp_path / "by_folder")
    document = json.loads((tmp_path / "by_folder" / "robustness.json").read_text())
    assert document["meta"]["dataset"] == "kvasir_seg_test"

    run("--plot", f"A={out}", f"B={out}", "--output", tmp_path / "both", "--figure", "image/miou")
    assert (tmp_path / "both" / "robustness.png").stat().st_size
    assert "B: image/miou" in capsys.readouterr().out

    for arguments, message in (
        (["--plot", out, out, "--output", tmp_path / "x"], "two models are called IMR-CNN"),
        (["--plot", tmp_path, "--output", tmp_path / "x"], "robustness.json"),
        ([*common, "--output", out], "holds results with tau 0.3"),
        (["--weights", weights, "--output", out], "--weights needs --dataset"),
        ([*common, "--output", out, "--batch-size", 0], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err


def test_an_unknown_data_set_and_absent_weights_are_one_line(weights, tmp_path, capsys):
    for named, data in ((weights, "kvasr_seg_test"), (tmp_path / "none.pth", "kvasir_seg_test")):
        with pytest.raises(SystemExit, match="^1$"):
            run("--weights", named, "--dataset", data, "--output", tmp_path / "out")
        (line,) = capsys.readouterr().err.splitlines()
        assert (data if named == weights else str(named)) in line
        assert "kvasir_seg_test" in line or named != weights, "the similar name"


@pytest.mark.parametrize("without", [{}, {"segmentation": []}], ids=["masks", "boxes"])
def test_lesions_that_are_cut(without, dataset, tmp_path, monkeypatch):
    """What half of stays is a lesion, of what less stays a crowd; a crowd stays one."""
    text = "1 0 0 10 10; 1 15 10 10 10; 1 16 20 9 10; 1 30 0 10 10; 1 0 30 10 10 crowd"
    lesions = [{**lesion, **without} for lesion in rectangles(text)]
    (tmp_path / "gt.json").write_text(json.dumps(dataset(1, lesions)))
    Image.new("RGB", (50, 40)).save(tmp_path / "1.png")
    module, left = "imrcnn_d2.evaluation.robustness", np.arange(50) < 20
    monkeypatch.setattr(f"{module}.distort", lambda image, *_: image)
    monkeypatch.setattr(f"{module}.distort_mask", lambda mask, *_: mask & left)

    def evaluate(**meta):
        arguments = (lambda images: [[]], load_coco(tmp_path / "gt.json"), tmp_path, tmp_path)
        return evaluate_robustness(*arguments, tau=0.5, meta=meta, distortions=["rotation"])

    document = evaluate(model="none", more=1)
    assert [row["lesion/FN"] for row in document["rows"]] == [4, *[2] * 5]
    with pytest.raises(ValueError, match="more 1, not None"):
        evaluate(model="none")


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
    file, counts = tmp_path / "part" / "robustness.json", []

    def counting(images):
        counts.append(len(images))
        if sum(counts) == 17:
            raise InterruptedError
        return bright_spots(images)

    with pytest.raises(InterruptedError):
        evaluate(data, tmp_path / "part", counting, distortions=["jpeg"])
    assert len(json.loads(file.read_text())["rows"]) == 3
    part = evaluate(data, tmp_path / "part", counting, **distortions)
    assert sum(counts) - 17 == 5 * (len(whole["rows"]) - 3)
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


def test_a_damaged_file_of_another_run(data, tmp_path):
    metas = [{}, [], {"model": ["x"]}, {"model": "x", "images": {}}]
    rows = [{"distortion": d, "severity": s} for d, s in (([], 0), ("jpeg", 9))]
    rows += [{"distortion": "clean"}, {"distortion": "x", "severity": 1, "a/b": "1"}]
    damaged = [{"meta": meta, "rows": []} for meta in metas]
    damaged += [{"meta": {"model": "x"}, "rows": [row]} for row in rows]
    for content in ("", "[]", "{}", *map(json.dumps, damaged)):
        (tmp_path / "robustness.json").write_text(content)
        with pytest.raises(BadInputError, match=r"robustness\.json"):
            evaluate(data, tmp_path)
