"""Training batches do not depend on how they were loaded."""

import itertools
import os
import signal

import pytest
import torch
from detectron2.config import get_cfg

from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.data.catalog import register_lesion_dataset
from imrcnn_d2.data.loader import build_train_loader


def load(cfg, number, iteration=0, seed=5):
    loader = build_train_loader(cfg)
    loader.batch_sampler.start_at(seed, iteration)
    torch.rand(3)  # what was drawn before does not matter
    return list(itertools.islice(loader, number))


def contents(batches):
    return [
        [
            (
                sample["file_name"],
                sample["image"].numpy().tobytes(),
                sample["instances"].gt_boxes.tensor.tolist(),
                sample["instances"].gt_masks.tensor.numpy().tobytes(),
            )
            for sample in batch
        ]
        for batch in batches
    ]


@pytest.fixture
def cfg(prepared_synthetic):
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (prepared_synthetic,)),
            *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
            *("INPUT.MASK_FORMAT", "bitmask"),
            *("INPUT.MIN_SIZE_TRAIN", (48, 64)),
            *("INPUT.AUG.COLOR", 0.3),
            *("INPUT.AUG.ROT90", True),
            *("MODEL.MASK_ON", True),
            *("SOLVER.IMS_PER_BATCH", 3),
            *("DATALOADER.NUM_WORKERS", 0),
        ]
    )
    return cfg


@pytest.fixture(scope="module")
def prepared_synthetic(tmp_path_factory):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
    from imrcnn_d2.data.prepare.synthetic import generate
    from imrcnn_d2.utils.files import Rejects

    folder = tmp_path_factory.mktemp("loader")
    source = generate(folder, 10, 64)
    prepare_dataset(source, folder / "out", SplitOptions(ratio=(8, 1, 1)), Rejects("raise"))
    name = "loader_test_train"
    register_lesion_dataset(name, folder / "out/annotations/train.json", folder / "out/images")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_workers_and_resuming_change_nothing(cfg):
    alone = contents(load(cfg, 6))
    cfg.DATALOADER.NUM_WORKERS = 2
    assert contents(load(cfg, 6)) == alone
    assert contents(load(cfg, 2, iteration=4)) == alone[4:]
    assert contents(load(cfg, 1, seed=6)) != alone[:1]


def test_an_image_is_augmented_anew_each_time(cfg):
    seen = {}
    for batch in contents(load(cfg, 12)):
        for name, *rest in batch:
            seen.setdefault(name, []).append(rest[0])
    assert all(len(set(images)) == len(images) > 1 for images in seen.values())


def test_a_sampler_that_cannot_be_resumed_is_refused(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(ValueError, match="SAMPLER_TRAIN is 'RandomSubsetTrainingSampler'"):
        build_train_loader(cfg)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    assert len(load(cfg, 1)[0]) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_a_signal_to_the_process_group(cfg, number):
    cfg.DATALOADER.NUM_WORKERS = 2
    loader = build_train_loader(cfg)
    loader.batch_sampler.start_at(5, 0)
    batches = iter(loader)
    found = list(itertools.islice(batches, 2))  # from either worker: both have begun
    for worker in batches._workers:
        os.kill(worker.pid, number)
    found += itertools.islice(batches, 6)
    cfg.DATALOADER.NUM_WORKERS = 0
    assert contents(found) == contents(load(cfg, 8))
    workers = batches._workers
    del batches
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
