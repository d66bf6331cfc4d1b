"""Synthetic procedures: what was a lesion in the image is one in the frames."""

import json
from collections import defaultdict

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.cli.prepare_dataset import main
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare.procedures import make_procedures
from imrcnn_d2.utils.files import BadInputError, Rejects

SIDE, FPS = 120, 5
BLUE = (20, 40, 230)  # of lesions: nothing else is
# Patient, whether it has a lesion.
IMAGES = [("a", True), ("a", True), ("b", True), ("c", False), ("d", True), ("e", False)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared data set: four patients for validation, one for the test."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    rng, contents = np.random.default_rng(0), defaultdict(lambda: {"images": [], "annotations": []})
    y, x = np.mgrid[:SIDE, :SIDE]
    for number, (patient, has_lesion) in enumerate(IMAGES):
        image = np.kron(rng.integers(90, 200, (12, 12, 1)), np.ones((10, 10, 3)))
        image = (image * (1, 0.4, 0.3)).astype(np.uint8)
        content = contents["test" if patient in "de" else "val"]
        name = f"{number}.png"
        if has_lesion:
            mask = np.hypot(x - rng.integers(25, 45), y - rng.integers(30, 90)) < 14
            image[mask] = BLUE
            annotation = annotation_from_mask(mask, lesion_id=f"of {patient}", size_mm=7)
            content["annotations"].append({**annotation, "id": number, "image_id": number})
        content["images"].append({"id": number, "file_name": name, "patient_id": patient})
        Image.fromarray(image).save(folder / "images" / name)
    for split, content in contents.items():
        content["categories"] = [{"id": 1, "name": "polyp"}]
        content["info"] = {"url": "https://example.org"}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "procedures"
    options = {"--data": data, "--out": out, "--procedures": 3, "--seconds": 6, "--fps": FPS}
    main(["procedures", *(str(v) for pair in options.items() for v in pair), "--size", "96"])
    return out


def read(folder, split):
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def test_masks_move_with_the_lesions(made):
    compared, hits = 0, 0
    for split in ("val", "test"):
        content = read(made, split)
        by_image = defaultdict(list)
        for annotation in content["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        for record in content["images"]:
            pixels = np.asarray(Image.open(made / "images" / record["file_name"])).astype(int)
            blue = pixels[..., 2] > pixels[..., 0] + 20
            annotations = by_image[record["id"]]
            masks = [mask_util.decode(a["segmentation"]).astype(bool) for a in annotations]
            if blue.sum() > 150 or masks:  # motion blur and highlights cost some pixels
                mask = np.any(masks, axis=0) if masks else np.zeros_like(blue)
                compared += 1
                hits += (mask & blue).sum() / max((mask | blue).sum(), 1) > 0.6
            if annotations:
                (annotation,) = annotations
                assert annotation["size_mm"] == 7
                patient, _, lesion = annotation["lesion_id"].partition("/")
                assert lesion == f"of {patient}"
    assert compared > 10 and hits / compared > 0.8


def test_a_procedure_has_all_its_frames_and_a_patient_is_in_one(made, data):
    owners, healthy = {}, 0
    patients = {f"{number}.png": patient for number, (patient, _) in enumerate(IMAGES)}
    seen = set()
    for split in ("val", "test"):
        content, frames = read(made, split), defaultdict(list)
        sources = {image["file_name"] for image in read(data, split)["images"]}
        for image in content["images"]:
            frames[image["sequence_id"]].append(image["frame"])
            assert image["patient_id"] == image["sequence_id"]
            assert image["source_image"] in sources
            owners.setdefault(patients[image["source_image"]], set()).add(image["sequence_id"])
        videos = {video["id"]: video for video in content["videos"]}
        for name, numbers in frames.items():
            assert sorted(numbers) == list(range(videos[name]["num_frames"]))
            assert videos[name]["fps"] == FPS and videos[name]["synthetic"] is True
            assert 6 * FPS * 0.6 < len(numbers) < 6 * FPS * 1.4
        seen |= set(frames)
        with_lesion = {annotation["image_id"] for annotation in content["annotations"]}
        healthy += sum(image["id"] not in with_lesion for image in content["images"])
        assert content["info"]["synthetic"] is True
        assert content["info"]["source"] == {"url": "https://example.org"}
    assert len(seen) == 3 and all(len(some) == 1 for some in owners.values())
    assert healthy > len(seen), "long stretches without a lesion"


def test_what_cannot_be_made_is_named(data, tmp_path):
    rejects = Rejects("raise")
    with pytest.raises(BadInputError) as caught:
        make_procedures(data, tmp_path, 40, rejects)
    assert caught.value.file == str(data)
    with pytest.raises(BadInputError) as caught:
        make_procedures(tmp_path, tmp_path, 1, rejects)
    assert caught.value.file == str(tmp_path)
    command = ["procedures", "--data", str(data), "--out", str(tmp_path / "out"), "--all-test"]
    pytest.raises(SystemExit, main, command).match("--all-test")
    for options in ({"size": 10}, {"fps": 0}, {"seconds": 0.1}):
        pytest.raises(ValueError, make_procedures, data, tmp_path, 1, rejects, **options)
