"""Weights with a map of scores: every output has probabilities, next to what the network gives."""

import json
import math
import zipfile
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from detectron2.structures import Boxes, Instances

from imrcnn_d2.deploy import Predictor, load_model, outputs, predict_files
from imrcnn_d2.deploy.live import predict_live
from imrcnn_d2.deploy.outputs import Differences, compare_records, records
from imrcnn_d2.deploy.runtimes import RUNTIMES, TorchRuntime
from imrcnn_d2.deploy.runtimes.base import METADATA_KEY
from imrcnn_d2.evaluation import ScoreMap, Temperature
from imrcnn_d2.utils.files import BadInputError

from .conftest import MAP, TAU, random_image, read_coco, read_table, write_video
from .test_runtimes import zipped

SIZES = ((60, 80), (90, 64))


def by_hand(raw):
    """The map of the fixture, of one score."""
    logit = math.log(raw / (1 - raw))
    return 1 / (1 + math.exp(-(MAP["slope"] * logit + MAP["offset"])))


def plain(predictor, image):
    """The same network's detections, without a map."""
    return predictor(image), records(predictor, *forwarded(predictor, image))


def forwarded(predictor, image):
    (output,) = predictor.forward([predictor.prepare(image)])
    return output, *image.shape[:2]


def check_records(annotations, expected):
    """Those of `expected`, without a map, but for their scores."""
    assert len(annotations) == len(expected) > 1
    for annotation, without in zip(annotations, expected, strict=True):
        assert annotation["raw_score"] == without["score"], "bit for bit"
        assert annotation["score"] == pytest.approx(by_hand(without["score"]), rel=1e-12)
        keys = without.keys() - {"score"}
        assert {key: annotation[key] for key in keys} == {key: without[key] for key in keys}
        assert annotation.keys() == {*keys, "score", "raw_score"} and "raw_score" not in without


def test_instances(predictor, mapped):
    assert mapped.tau == predictor.tau == TAU and predictor.score_map is None
    assert mapped.metadata["score_map"] == MAP and "score_map" not in predictor.metadata
    for size in SIZES:
        image = random_image(0, *size)
        expected, of_records = plain(predictor, image)
        assert not expected.has("raw_scores") and expected.scores.dtype == torch.float32
        instances = mapped(image)
        assert torch.equal(instances.raw_scores, expected.scores)
        values = [by_hand(score) for score in expected.scores.tolist()]
        np.testing.assert_allclose(instances.scores.numpy(), values, rtol=1e-12)
        assert (instances.scores.diff() <= 0).all(), "in the order of the raw scores"
        assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(instances.pred_masks, expected.pred_masks)
        check_records(records(mapped, *forwarded(mapped, image)), of_records)


def test_scores_that_saturate_keep_their_order():
    """In float32 all of these would be 1."""
    raw = np.float32(1) - np.float32(2**-24) * np.arange(1, 5, dtype=np.float32)
    mapped = ScoreMap(1.5, 0.0)(raw)
    assert (np.diff(mapped) < 0).all() and (mapped.astype(np.float32) == 1).all()


def test_files(predictor, mapped, image_folder, tmp_path):
    save = ("masks", "overlays", "labelme")
    for each, name in ((predictor, "plain"), (mapped, "mapped")):
        predict_files(each, [image_folder], tmp_path / name, save=save)
    expected, coco = (read_coco(tmp_path / name) for name in ("plain", "mapped"))
    check_records(coco["annotations"], expected["annotations"])
    assert coco["info"]["score_map"] == MAP and coco["info"]["tau"] == TAU
    results = json.loads((tmp_path / "mapped" / "results.json").read_text())
    for result, annotation in zip(results, coco["annotations"], strict=True):
        assert [result[key] for key in ("score", "raw_score")] == [
            annotation[key] for key in ("score", "raw_score")
        ]
    rows, before = (read_table(tmp_path / name / "predictions.csv") for name in ("mapped", "plain"))
    assert "raw_score" not in before[0]
    for row, was, image in zip(rows, before, coco["images"], strict=True):
        of_image = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert row["raw_score"] == was["score"]
        assert float(row["score"]) == max(a["score"] for a in of_image)
        above = [a for a in of_image if a["score"] >= TAU]
        assert int(row["lesions"]) == len(above)
        name = image["file_name"].rpartition(".")[0]
        document = json.loads((tmp_path / "mapped" / "labelme" / f"{name}.json").read_text())
        texts = {shape["description"] for shape in document["shapes"]}
        assert texts == {f"score {a['score']:.4f}" for a in above}
        assert not any("raw_score" in shape for shape in document["shapes"])
    assert [row["lesions"] for row in rows] != [row["lesions"] for row in before]
    again = predict_files(mapped, [image_folder], tmp_path / "mapped", save=save)
    assert again.images == 0 and read_coco(tmp_path / "mapped") == coco
    with pytest.raises(ValueError, match="score_map"):
        predict_files(predictor, [image_folder], tmp_path / "mapped", save=save)


def test_a_journal_without_raw_scores_is_damaged(mapped, image_folder, tmp_path):
    predict_files(mapped, [image_folder], tmp_path)
    journal = tmp_path / "progress.jsonl"
    journal.write_text(journal.read_text().replace('"raw_score"', '"old_score"'))
    with pytest.raises(ValueError, match="progress.jsonl, line 2"):
        predict_files(mapped, [image_folder], tmp_path)


def test_rows_of_a_table(mapped, image_folder):
    ray = pytest.importorskip("imrcnn_d2.deploy.ray", reason="the ray extra is not installed")
    from imrcnn_d2.deploy.batch import predictions
    from imrcnn_d2.deploy.inputs import find_inputs

    sources = find_inputs([image_folder])[1]
    for item, annotations in predictions(mapped, sources, 1):
        if annotations is not None:
            row = ray.image_row(item, annotations, mapped.classes)
            assert row["scores"] == [a["score"] for a in annotations]
            assert row["raw_scores"] == [a["raw_score"] for a in annotations]
            assert row["raw_scores"] != row["scores"]


def test_live(mapped, tmp_path):
    film, shown = write_video(tmp_path / "film.mp4", 4), []
    predict_live(mapped, str(film), tmp_path / "live", show=shown.append)
    annotations = read_coco(tmp_path / "live")["annotations"]
    assert annotations and shown
    for annotation in annotations:
        assert annotation["score"] == pytest.approx(by_hand(annotation["raw_score"]), rel=1e-12)


def with_map(path, target):
    """A copy of an exported graph, with the map."""
    if path.suffix == ".onnx":
        model = onnx.load(path)
        metadata = json.loads(model.metadata_props[0].value) | {"score_map": MAP}
        onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata)})
        onnx.save(model, target)
    else:
        with zipfile.ZipFile(path) as archive:
            *parts, metadata = (archive.read(name) for name in archive.namelist())
        zipped(target, *parts, json.dumps(json.loads(metadata) | {"score_map": MAP}))
    return target


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_exports_map_too(mapped, mapped_weights, exported, tmp_path, runtime):
    path, image = tmp_path / f"model{RUNTIMES[runtime].suffix}", random_image(0)
    if runtime == "torch":
        TorchRuntime.export(load_model(None, mapped_weights), path)
    else:
        with_map(exported(runtime), path)
    other = Predictor(None, path)
    assert other.tau == TAU and other.metadata["score_map"] == MAP
    ours, theirs = mapped(image), other(image)
    torch.testing.assert_close(theirs.raw_scores, ours.raw_scores, rtol=0, atol=1e-4)
    values = [by_hand(score) for score in theirs.raw_scores.tolist()]
    np.testing.assert_allclose(theirs.scores.numpy(), values, rtol=1e-12)
    if runtime == "torch":
        assert torch.equal(theirs.scores, ours.scores)


def detection(score, raw_score, x=0):
    box = {"bbox": [x, 0, 10, 10], "category_id": 1, "area": 100}
    return {**box, "score": score, "raw_score": raw_score}


def test_an_export_is_compared_in_raw_scores_and_at_the_mapped_threshold():
    """The bounds of an export are of what the network computes: a steep map would widen them."""
    first = [detection(0.9, 0.95), detection(0.5, 0.8, x=50), detection(0.2, 0.7, x=100)]
    second = [detection(0.8, 0.94)]
    compared: Differences = compare_records([first], [second], [(20, 200)], 0.4)
    assert compared.scores == pytest.approx([0.01])
    assert (compared.detections, compared.unmatched, compared.lost) == (3, 2, 1)
    unseen = compare_records([[detection(0.5, 0.29)]], [[]], [(20, 200)], 0.4)
    assert unseen.detections == 0, "too low a raw score to matter"


def test_a_card_says_what_a_score_is(mapped, predictor):
    assert "probability" in mapped._card("me/polyps", "other")
    assert "probability" not in predictor._card("me/polyps", "other")


def test_a_card_of_a_classifier_says_what_its_probabilities_are(classifier, tempered_weights):
    assert "temperature" in Predictor(None, tempered_weights)._card("me/classes", "other")
    assert "temperature" not in classifier._card("me/classes", "other")


@pytest.mark.slow
def test_the_raw_scores_of_the_package_s_weights_stay(kvasir_original, tmp_path):
    image = kvasir_original / "images" / "cju0roawvklrq0799vmjorwfv.jpg"
    loaded, predicted = load_model(None, "demo", device="cpu"), []
    for score_map in (None, ScoreMap(**MAP)):
        path = tmp_path / f"{score_map is None}.safetensors"
        weights = replace(loaded.weights, score_map=score_map)
        TorchRuntime.export(replace(loaded, weights=weights), path)
        predicted.append(Predictor(None, path, device="cpu")(image))
    without, with_map = predicted
    assert len(without) > 2 and torch.equal(with_map.raw_scores, without.scores)
    assert torch.equal(with_map.pred_boxes.tensor, without.pred_boxes.tensor)
    assert torch.equal(with_map.pred_masks, without.pred_masks)
    values = [by_hand(score) for score in without.scores.tolist()]
    np.testing.assert_allclose(with_map.scores.numpy(), values, rtol=1e-9)


def test_no_detection_at_all(mapped):
    nothing = Instances((60, 80), pred_boxes=Boxes(torch.empty(0, 4)), scores=torch.empty(0))
    nothing.pred_classes = torch.empty(0, dtype=torch.int64)
    nothing.pred_masks = torch.empty(0, 1, 28, 28)
    assert records(mapped, nothing, 60, 80) == []
    finished = mapped.finish(nothing, 60, 80)
    assert len(finished.scores) == len(finished.raw_scores) == 0
    assert outputs.above_threshold([], mapped.tau) == []


@pytest.fixture(scope="module")
def tempered_weights(classifier_weights):
    """The tiny classifier's, with a temperature."""
    content = torch.load(classifier_weights, weights_only=True)
    path = classifier_weights.parent / "tempered.pth"
    torch.save({**content, "score_map": {"temperature": 2.0, "dataset": "val"}}, path)
    return path


def softened(raw):
    """By hand: of a temperature of 2, the square roots, normalised."""
    return np.sqrt(raw) / np.sqrt(raw).sum()


def test_a_classifier_with_a_temperature(classifier, tempered_weights, image_folder, tmp_path):
    tempered, image = Predictor(None, tempered_weights), random_image(0)
    raw = classifier(image)
    np.testing.assert_allclose(tempered(image).numpy(), softened(raw.double().numpy()), rtol=1e-7)
    predict_files(tempered, [image_folder], tmp_path, save=["labelme", "overlays"])
    rows, coco = read_table(tmp_path / "predictions.csv"), read_coco(tmp_path)
    assert coco["info"]["score_map"] == {"temperature": 2.0, "dataset": "val"}
    paths = [image_folder / image["file_name"] for image in coco["images"]]
    for row, annotation, path in zip(rows, coco["annotations"], paths, strict=True):
        raw = classifier(path).tolist()
        assert annotation["raw_probabilities"] == raw and annotation["raw_score"] == max(raw)
        assert annotation["category_id"] == raw.index(max(raw)) + 1, "the class stays"
        expected = softened(np.array(raw))
        np.testing.assert_allclose(annotation["probabilities"], expected, rtol=1e-7, atol=1e-20)
        assert annotation["score"] == max(annotation["probabilities"])
        assert (float(row["score"]), float(row["raw_score"])) == (annotation["score"], max(raw))
        written = [float(row[f"probability {name}"]) for name in tempered.classes]
        assert written == annotation["probabilities"]


def test_an_exported_classifier_has_its_temperature(tempered_weights, tmp_path):
    original, path = Predictor(None, tempered_weights), tmp_path / "model.onnx"
    example = original.prepare(random_image(0))
    RUNTIMES["onnxruntime"].export(load_model(None, tempered_weights), path, example=example)
    other = Predictor(None, path)
    assert other.score_map == original.score_map == Temperature(2.0, "val")
    torch.testing.assert_close(other(random_image(1)), original(random_image(1)), atol=1e-5, rtol=0)


def test_probabilities_of_an_export_are_compared_raw():
    first, second = (
        [{"probabilities": mapped, "raw_probabilities": raw, "score": 0.5, "category_id": 1}]
        for mapped, raw in (([0.9, 0.1], [0.6, 0.4]), ([0.5, 0.5], [0.59, 0.41]))
    )
    assert compare_records([first], [second], [(8, 8)], None).scores == pytest.approx([0.01])


def test_a_map_of_the_other_task_is_refused(weights, tempered_weights, mapped_weights):
    for path, other, field in (
        (weights, tempered_weights, "slope"),
        (tempered_weights, mapped_weights, "temperature"),
    ):
        content = torch.load(path, weights_only=True)
        content["score_map"] = torch.load(other, weights_only=True)["score_map"]
        torch.save(content, swapped := path.parent / "swapped.pth")
        with pytest.raises(BadInputError, match=f"swapped.pth.*score_map.*{field}"):
            Predictor(None, swapped)
