"""Augmentations of training images, and distortions of test images."""

import colorsys
import io
import itertools
import os
import random
import signal
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, BoxMode, Instances, PolygonMasks
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.data import augmentation as aug
from imrcnn_d2.data import loader
from imrcnn_d2.data.catalog import register_data_set
from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES, distort, distort_mask
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.mapper import ClassificationMapper, LesionMapper
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.synthetic import generate
from imrcnn_d2.utils.files import Rejects

HEIGHT, WIDTH = 60, 90


@pytest.fixture
def record(tmp_path):
    """A dark image with one bright, lopsided lesion, and its dataset dict."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, 20:60] = mask[30:40, 20:30] = 1
    Image.fromarray(mask * 200 + 20).save(tmp_path / "image.png")
    lesion = {**annotation_from_mask(mask, 0, iscrowd=0), "bbox_mode": BoxMode.XYWH_ABS}
    image = {"file_name": str(tmp_path / "image.png"), "height": HEIGHT, "width": WIDTH}
    return {**image, "image_id": 7, "annotations": [lesion]}


def config(**keys):
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    defaults = {"MODEL.MASK_ON": True, "INPUT.MASK_FORMAT": "bitmask"}
    defaults |= {"INPUT.MIN_SIZE_TRAIN": (HEIGHT,), "INPUT.AUG.COLOR": 0.0, "INPUT.SIZE": 32}
    defaults |= {"INPUT.AUG.VFLIP_PROB": 0.5, "INPUT.AUG.ROT90": True, "INPUT.FORMAT": "RGB"}
    cfg.merge_from_list([item for pair in (defaults | keys).items() for item in pair])
    return cfg


@pytest.mark.parametrize("seed", range(8))
def test_the_mask_follows_the_image(record, seed):
    np.random.seed(seed)
    mapped = LesionMapper(config(), is_train=True)(record)
    assert len(record["annotations"]) == 1 and "image" not in record
    bright = mapped["image"][0] > 120
    # The image is interpolated at most in a shift of half a pixel: edges may differ, no more.
    mask = mapped["instances"].gt_masks.tensor[0]
    assert (bright & mask).sum() / (bright | mask).sum() > 0.9
    box = BitMasks(bright[None]).get_bounding_boxes().tensor
    torch.testing.assert_close(mapped["instances"].gt_boxes.tensor, box, atol=1.5, rtol=0)


def apply(step, image, seed):
    np.random.seed(seed)
    return step.get_transform(image).apply_image(image)


def test_each_step_has_its_switch_and_quarter_turns_lose_no_pixel():
    def steps(is_train=True, **keys):
        return aug.build_augmentation(config(**keys), is_train)[1:]

    off = {"INPUT.AUG.VFLIP_PROB": 0.0, "INPUT.AUG.ROT90": False, "INPUT.RANDOM_FLIP": "none"}
    assert steps(**off) == steps(is_train=False) == []
    on = {"ROT90": "Rotation", "VFLIP_PROB": "Flip", "COLOR": "Brightness Contrast Saturation"}
    on |= {"HUE": "Hue", "BLUR_PROB": "Blur", "JPEG_PROB": "JPEG", "DISTORTION_PROB": "Distortion"}
    for key, names in on.items():
        switched_on = steps(**off | {f"INPUT.AUG.{key}": key == "ROT90" or 0.2})
        types = [type(getattr(step, "aug", step)).__name__ for step in switched_on]
        assert types == [f"Random{name}" for name in names.split()]
    (turn,) = steps(**off | {"INPUT.AUG.ROT90": True})
    image = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    turned = {apply(turn, image, seed).tobytes() for seed in range(20)}
    assert turned == {np.rot90(image, k).tobytes() for k in range(4)}


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize(("form", "kind"), [("bitmask", BitMasks), ("polygon", PolygonMasks)])
def test_an_image_without_a_lesion_has_empty_masks(record, crop, form, kind):
    cfg = config(**{"INPUT.CROP.ENABLED": crop, "INPUT.MASK_FORMAT": form})
    record["annotations"][0]["iscrowd"] = 1
    for annotations in ([], record["annotations"]):
        sample = LesionMapper(cfg, is_train=True)({**record, "annotations": annotations})
        masks, boxes = sample["instances"].gt_masks, sample["instances"].gt_boxes
        assert isinstance(masks, kind) and len(masks) == 0 and boxes.tensor.shape == (0, 4)


def test_classified_images(tmp_path):
    """Nothing is cut off; training augments by the seed alone."""
    pixels = np.zeros((40, 60, 3), np.uint8)  # left third red, the rest green, a blue line below
    pixels[:, :20, 0] = pixels[:, 20:, 1] = pixels[36:, :, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "label": 2, "image_id": 7, "centre": "A"}
    sample = ClassificationMapper(config(), is_train=False)(record)
    image = sample.pop("image")
    assert (sample, image.dtype, image.shape) == (record, torch.uint8, (3, 32, 32))
    shares = (image.float() / 255).mean(dim=(1, 2))
    np.testing.assert_allclose(shares, (1 / 3, 2 / 3, 1 / 10), atol=0.03)
    bgr = ClassificationMapper(config(**{"INPUT.FORMAT": "BGR"}), is_train=False)(record)
    assert torch.equal(bgr["image"], image.flip(0))
    with pytest.raises(ValueError, match="INPUT.SIZE is 0"):
        ClassificationMapper(config(**{"INPUT.SIZE": 0}))

    keys = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "relative_range"}
    keys |= {"INPUT.CROP.SIZE": [0.7, 0.7], "INPUT.AUG.COLOR": 0.2}
    mapper, images, sides = ClassificationMapper(config(**keys), is_train=True), [], set()
    for seed in (*range(12), 3):
        loader.seed_generators(seed)
        images.append(mapper(record)["image"])
        assert images[-1].shape == (3, 32, 32)
        red = images[-1][0].float()  # up, down, left or right of the rest
        halves = red[:16].mean(), red[16:].mean(), red[:, :16].mean(), red[:, 16:].mean()
        sides.add(int(np.argmax(halves)))
    assert torch.equal(images.pop(), images[3]) and sides == {0, 1, 2, 3}
    assert len({image.numpy().tobytes() for image in images}) == 12


def test_hue_blur_and_jpeg():
    for order in ([0, 1, 2], [2, 1, 0]):
        image = np.tile(np.array((200, 90, 60), np.uint8)[order], (4, 4, 1))
        hue, *rest = colorsys.rgb_to_hsv(200 / 255, 90 / 255, 60 / 255)
        shifts = []
        for seed in range(40):
            pixel = apply(aug.RandomHue(0.05), image, seed)[0, 0][order] / 255
            shifted, *kept = colorsys.rgb_to_hsv(*pixel)
            shifts.append((shifted - hue + 0.5) % 1 - 0.5)
            assert kept == pytest.approx(rest, abs=0.01)
        assert max(map(abs, shifts)) < 0.06 and min(shifts) < -0.03 and max(shifts) > 0.03
    image = np.zeros((41, 41, 3), np.uint8)  # blur spreads a point by its sigma
    image[16:25, 16:25] = 255
    squares = (np.arange(41) - 20) ** 2
    before = np.average(squares, weights=image[20, :, 0])
    for seed in range(10):
        blurred = apply(aug.RandomBlur(1.0, 2.0), image, seed).astype(float)
        assert 0.8 < np.average(squares, weights=blurred[:, :, 0].sum(0)) - before < 4.3
        assert blurred.sum() == pytest.approx(image.sum(), rel=0.03)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 1)
    encoded = [apply(aug.RandomJPEG(quality, quality), image, 0) for quality in (95, 60, 30)]
    losses = [np.abs(loss.astype(int) - image).mean() for loss in encoded]
    assert 0 < losses[0] < losses[1] < losses[2]


def make_sample(size, boxes, value):
    """An image of one grey with lesions ``value + i``, as a mapper gives it."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    image = torch.full((3, *size), 10, dtype=torch.uint8)
    for i, (y0, x0, y1, x1) in enumerate(boxes):
        masks[i, y0:y1, x0:x1] = True
        image[:, y0:y1, x0:x1] = value + i
    instances = Instances(size, gt_masks=BitMasks(masks), gt_classes=torch.arange(len(boxes)))
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    return {"image": image, "instances": instances, "image_id": value}


@pytest.mark.parametrize("seed", range(6))
def test_pasted_pixels_masks_and_boxes_agree(seed):
    np.random.seed(seed)
    donor = make_sample((40, 70), [(5, 5, 15, 17), (20, 40, 30, 52)], 100)
    sample = make_sample((60, 64), [], 50)
    pasted = aug.paste_lesions(donor, sample, feather=0.01)
    instances = pasted["instances"]
    assert instances.image_size == (60, 64) and pasted["image_id"] == 50
    assert [int(m.sum()) for m in instances.gt_masks.tensor] == [120, 120]
    for mask, cls in zip(instances.gt_masks.tensor, instances.gt_classes, strict=True):
        assert (pasted["image"][:, mask] == 100 + cls).all()
    assert (pasted["image"][:, ~instances.gt_masks.tensor.any(0)] == 10).all()
    # both lesions moved by the same way
    assert (instances.gt_boxes.tensor.diff(dim=0)).tolist() == [[35, 15, 35, 15]]
    assert sample["image"].unique().tolist() == [10]  # the input is left as it was


def test_lesions_that_are_there_stay_visible():
    sample = make_sample((30, 30), [(0, 0, 30, 12)], 200)
    donor = make_sample((30, 30), [(0, 0, 28, 20)], 100)
    counts = set()
    for seed in range(20):
        np.random.seed(seed)
        pasted = aug.paste_lesions(donor, sample)
        masks = pasted["instances"].gt_masks.tensor
        counts.add(len(masks))
        assert not (masks.sum(0) > 1).any()
        if len(masks) == 2:
            assert 180 <= masks[0].sum() < 360
            x1 = pasted["instances"].gt_boxes.tensor[0, 2]
            assert x1 == masks[0].any(0).nonzero().max() + 1
        else:
            assert pasted is sample
    assert counts == {1, 2}
    donor = make_sample((80, 80), [(2, 2, 78, 78)], 100)  # larger than the image
    pasted = aug.paste_lesions(donor, make_sample((20, 20), [], 50), feather=0.01)
    assert pasted["instances"].gt_masks.tensor.all() and (pasted["image"] == 100).all()


def test_how_often_and_from_which_image():
    np.random.seed(0)
    mapper = Mock(side_effect=lambda record: make_sample((40, 40), record, 90))
    mapper.instance_mask_format = "bitmask"
    records = [[], [(0, 0, 10, 10)], [(0, 0, 5, 20)]]
    paste = aug.CopyPaste(mapper, records, 0.6)
    mean = np.mean([len(paste(records[0])["instances"]) for _ in range(400)])
    assert 0.6 * 2 / 3 == pytest.approx(mean, abs=0.08)
    assert len(aug.CopyPaste(mapper, records, 0.0)(records[1])["instances"]) == 1
    mapper.instance_mask_format = "polygon"
    with pytest.raises(ValueError, match="COPY_PASTE_PROB is 0.5"):
        aug.CopyPaste(mapper, [], 0.5)


def batches(number, size=7, total=4, seed=0, iteration=0, epoch_indices=None):
    sampler = loader.ResumableBatchSampler(epoch_indices or loader.shuffled_epochs(size), total)
    sampler.start_at(seed, iteration)
    return list(itertools.islice(sampler, number))


SIZES = {"size": st.integers(1, 20), "total": st.integers(1, 9)}


@given(**SIZES, seed=st.integers(0, 2**40), iteration=st.integers(0, 30))
def test_every_epoch_has_every_image_once_from_any_iteration_on(size, total, seed, iteration):
    whole = batches(iteration + 3, size, total, seed)
    assert batches(3, size, total, seed, iteration) == whole[iteration:]
    samples = list(itertools.chain(*batches(-(-3 * size // total), size, total, seed)))
    assert [position for _, position, _ in samples] == list(range(len(samples)))
    assert {s for s, _, _ in samples} == {seed}
    for epoch in range(3):
        indices = [index for _, _, index in samples[epoch * size : (epoch + 1) * size]]
        assert sorted(indices) == list(range(size))
    both = [batch for s in (seed, seed + 1) for batch in batches(3, size=50, total=50, seed=s)]
    assert len({tuple(index for _, _, index in batch) for batch in both}) == 6  # they differ


def test_processes_share_the_batch(monkeypatch):
    alone = batches(4, total=6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(batches(4, total=6))
    assert [a + b + c for a, b, c in zip(*shares, strict=True)] == alone
    with pytest.raises(ValueError, match="IMS_PER_BATCH a multiple of 3"):
        batches(1, total=4)


def test_rare_images_come_more_often_from_any_iteration_on():
    factors = torch.tensor([1.0, 2.5, 1.0, 4.0])
    epoch_indices = loader.balanced_epochs(factors)
    whole = batches(500, epoch_indices=epoch_indices)
    counts = np.bincount([index for _, _, index in itertools.chain(*whole)])
    np.testing.assert_allclose(counts / counts.sum(), factors / factors.sum(), atol=0.02)
    assert batches(3, iteration=37, epoch_indices=epoch_indices) == whole[37:40]
    epoch_indices = loader.class_balanced_epochs(np.array([0] * 30 + [1] * 7))
    samples = itertools.chain(*batches(40, epoch_indices=epoch_indices))
    # 18 or 19 of the frequent class an epoch, others in the next one
    assert {index for _, _, index in samples} == {*range(37)}


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.integers(0, 100))
def test_classes_come_equally_often(numbers, seed):
    labels = np.repeat(np.arange(len(numbers)), numbers)
    order = loader.class_balanced_epochs(labels)(torch.Generator().manual_seed(seed)).numpy()
    assert len(order) == len(labels)
    assert np.ptp(np.bincount(labels[order], minlength=len(numbers))) <= 1
    times = np.bincount(order, minlength=len(labels))
    for k in range(len(numbers)):  # within a class no image twice before all came once
        assert np.ptp(times[labels == k]) <= 1


def test_all_generators_are_seeded():
    samples = []
    for entropy in ((1, 2), (1, 2), (2, 1), (1, 3), (1,), (2**40, 2)):
        loader.seed_generators(*entropy)
        samples.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert samples[0] == samples[1]
    assert [len({*values}) for values in zip(*samples, strict=True)] == [5, 5, 5]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    out = folder / folder.name  # a name of a data set that no other test has
    prepare_dataset(generate(folder, 10, 64), out, SplitOptions(), Rejects())
    register_data_set(out)
    return out.name


@pytest.fixture
def cfg(data_set):
    keys = {"DATASETS.TRAIN": (f"{data_set}_train",), "SOLVER.IMS_PER_BATCH": 3}
    keys |= {"DATALOADER.NUM_WORKERS": 0, "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}
    return config(**keys, **{"INPUT.MIN_SIZE_TRAIN": (48, 64), "INPUT.AUG.COLOR": 0.3})


def load(cfg, iteration=0, seed=5):
    batches = loader.build_train_loader(cfg)
    batches.batch_sampler.start_at(seed, iteration)
    torch.rand(3)  # what was sampled before does not matter
    return iter(batches)


def take(batches, number):
    """The content of so many batches: file names, images, boxes and masks."""

    def content(sample):
        lesions = sample["instances"]
        tensors = sample["image"], lesions.gt_boxes.tensor, lesions.gt_masks.tensor
        return sample["file_name"], *(tensor.numpy().tobytes() for tensor in tensors)

    return [list(map(content, batch)) for batch in itertools.islice(batches, number)]


def test_masks_as_rle_need_bitmasks(cfg):
    """Detectron2's default is polygons, which hold for data sets that have these."""
    cfg.INPUT.MASK_FORMAT = "polygon"
    with pytest.raises(ValueError, match=r"\.jpg: .*INPUT.MASK_FORMAT .*bitmask"):
        loader.build_train_loader(cfg)
    cfg.MODEL.MASK_ON = False
    loader.build_train_loader(cfg)
    cfg.MODEL.MASK_ON, cfg.DATASETS.TRAIN = True, ("polygons_with_a_crowd",)
    lesion = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    polygon = {**lesion, "iscrowd": 0, "segmentation": [[0, 0, 9, 0, 9, 9]]}
    crowd = {**lesion, "iscrowd": 1, "segmentation": {"size": [9, 9], "counts": "0a2"}}
    record = {"file_name": "a.png", "annotations": [crowd, polygon]}
    DatasetCatalog.register(cfg.DATASETS.TRAIN[0], lambda: [record])
    try:
        loader.build_train_loader(cfg)
    finally:
        DatasetCatalog.remove(cfg.DATASETS.TRAIN[0])


def test_workers_and_resuming_change_nothing(cfg):
    alone = take(load(cfg), 12)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert take(load(cfg), 6) == alone[:6]
    assert take(load(cfg, iteration=4), 2) == alone[4:6]
    assert take(load(cfg, seed=6), 1) != alone[:1]
    seen = {}
    for name, pixels, *_ in itertools.chain(*alone):
        seen.setdefault(name, []).append(pixels)
    assert all(len(set(images)) == len(images) > 1 for images in seen.values())  # augmented anew
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(ValueError, match="RandomSubsetTrainingSampler"):
        loader.build_train_loader(cfg)
    for name in ("RepeatFactorTrainingSampler", "TrainingSampler"):
        cfg.DATALOADER.SAMPLER_TRAIN = name
        assert len(next(load(cfg))) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_a_signal_to_the_process_group(cfg, number):
    expected = take(load(cfg), 8)
    cfg.DATALOADER.NUM_WORKERS = 2
    batches = load(cfg)
    loaded = take(batches, 2)  # from either worker: both have begun
    workers = batches._workers
    for worker in workers:
        os.kill(worker.pid, number)
    assert [*loaded, *take(batches, 6)] == expected
    del batches
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


SIDE = 200
every_severity = pytest.mark.parametrize("severity", SEVERITIES)


def level(name, severity):
    return DISTORTIONS[name].levels[severity - 1]


def linear(image):
    values = image / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_seeded_not_in_place_and_stronger_by_severity(name, kvasir_352):
    frame = read_image(kvasir_352 / "images" / "train_0002.jpg")
    before, errors = frame.copy(), []
    for severity in SEVERITIES:
        image = distort(frame, name, severity, (7, 1))
        assert np.array_equal(image, distort(frame, name, severity, (7, 1)))
        assert np.array_equal(frame, before)
        assert (image.shape, image.dtype) == (frame.shape, np.uint8)
        errors.append(np.abs(image.astype(int) - frame).mean())
        if name in ("motion", "highlights"):
            assert not np.array_equal(image, distort(frame, name, severity, (7, 2)))
        if name == "jpeg":  # as another encoder makes it
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "jpeg", quality=level(name, severity))
            assert np.abs(image - np.asarray(Image.open(file)).astype(int)).mean() < 1
    assert errors[0] > 0
    if name not in ("over_exposure", "rotation"):
        assert errors == sorted(errors) and errors[0] < 0.75 * errors[-1]


@every_severity
def test_blur_makes_a_disc_or_a_line_of_a_point_and_leaves_flat_areas(severity):
    point = np.zeros((SIDE, SIDE, 3), np.uint8)
    point[SIDE // 2, SIDE // 2] = 255
    blurred = distort(point, "defocus", severity)[..., 0]
    rows, columns = np.nonzero(blurred)
    reach = np.hypot(rows - SIDE // 2, columns - SIDE // 2).max()
    assert reach == pytest.approx(level("defocus", severity) / 100 * SIDE, abs=1)
    # light is kept: a disc is not brighter than the point spread over its area
    assert linear(blurred).sum() == pytest.approx(1, rel=0.05)
    for seed in range(3):
        lit = np.argwhere(distort(point, "motion", severity, seed)[..., 0]).astype(float)
        lit -= lit.mean(axis=0)
        along, across = (lit @ np.linalg.svd(lit)[2].T).T
        assert np.ptp(along) == pytest.approx(level("motion", severity) / 100 * SIDE, abs=2.5)
        assert np.ptp(across) <= 2.5
        flat = np.full((60, 90, 3), 70 + 40 * seed, np.uint8)
        for name in ("defocus", "motion"):
            assert np.array_equal(distort(flat, name, severity, seed), flat)


@pytest.mark.parametrize("name", ["over_exposure", "under_exposure"])
@every_severity
def test_exposure_multiplies_light(name, severity):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = np.minimum(linear(values) * 2.0 ** level(name, severity), 1)
    light = linear(distort(values, name, severity))
    assert np.abs(light - expected).max() < 0.5 / 255 * 2.3  # half a step, where it is steepest
    # 128 is 21.6 % of the light; a stop more is 43.2 %, which sRGB writes as 176
    gray = np.full((1, 1, 3), 128, np.uint8)
    assert distort(gray, "over_exposure", 2).tolist() == [[[176] * 3]]


@every_severity
def test_highlights_cover_their_share_of_the_tissue(severity):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    assert not distort(image, "highlights", severity).any()
    image[:, 40:] = 101
    lit, share = distort(image, "highlights", severity, 5), level("highlights", severity)
    assert (lit >= image).all()
    half_lit = (lit >= image + (255.0 - image) / 2).all(axis=2)
    assert 100 * half_lit[:, 40:].mean() == pytest.approx(share, rel=0.25, abs=0.7)
    assert half_lit[:, :30].mean() < 0.01  # none is centred on the black
    if severity > 1:  # more of them, where the others were as well
        assert (lit >= distort(image, "highlights", severity - 1, 5)).all()


def test_rotation_by_right_angles_is_exact_and_unknown_severities_are_refused():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    turned = {distort(image, "rotation", 3, seed).tobytes() for seed in range(9)}
    assert turned == {np.rot90(image, k).tobytes() for k in (1, 3)}
    assert np.array_equal(distort(image, "rotation", 5, 1), image[::-1, ::-1])
    with pytest.raises(ValueError, match="not in tuple"):
        distort(image, "jpeg", 6)


@every_severity
@pytest.mark.parametrize("shape", [(60, 60), (50, 80), (80, 50)])
def test_masks_turn_with_their_images(severity, shape):
    mask = np.zeros(shape, bool)
    mask[18:33, 20:41] = True
    turned = distort_mask(mask, "rotation", severity, 4)
    shown = distort(np.dstack([mask * np.uint8(255)] * 3), "rotation", severity, 4)[..., 0] >= 128
    assert turned.shape == shown.shape == (max(shape),) * 2
    assert (turned & shown).sum() / (turned | shown).sum() > 0.9
    assert turned.sum() == pytest.approx(mask.sum(), rel=0.05)
    for name in DISTORTIONS.keys() - {"rotation"}:
        assert distort_mask(mask, name, severity) is mask
