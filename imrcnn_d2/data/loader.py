"""Training batches that depend on the seed and the iteration alone."""

import signal

from detectron2.config import configurable
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch.utils.data import DataLoader, Dataset

from imrcnn_d2.config import get_node

from .classification_catalogue import labels_of
from .classification_mapper import ClassificationMapper
from .copy_paste import CopyPaste
from .mappers import LesionMapper
from .register import load_datasets
from .sampler import (
    ResumableBatchSampler,
    balanced_epochs,
    class_balanced_epochs,
    seed_generators,
    shuffled_epochs,
)

__all__ = ["SeededDataset", "build_train_loader"]


class SeededDataset(Dataset):
    """Training samples whose augmentation is a function of the seed and the sample's position."""

    def __init__(self, records, mapper):
        """
        Args:
            records (sequence of dict): Detectron2's dataset dicts.
            mapper (callable): dataset dict -> what the model takes; it draws from the generators of
                ``random``, NumPy and torch, and keeps no state.
        """
        self._records, self._mapper = records, mapper

    def __len__(self):
        return len(self._records)

    def __getitem__(self, sample):
        """
        Args:
            sample (tuple[int, int, int]): seed, position and index, as of
                :class:`ResumableBatchSampler`.
        """
        seed, position, index = sample
        seed_generators(seed, 0, position)
        return self._mapper(self._records[index])


def _from_config(cfg):
    records = load_datasets(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    return {
        "dataset": records,
        "mapper": _mapper(cfg, records),
        "epoch_indices": _epoch_indices(cfg, records),
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


def _mapper(cfg, records):
    if "label" in records[0]:
        return ClassificationMapper(cfg, is_train=True)
    mapper = LesionMapper(cfg, is_train=True)
    probability = get_node(cfg, "INPUT.AUG").COPY_PASTE_PROB
    return CopyPaste(mapper, records, probability) if probability > 0 else mapper


def _epoch_indices(cfg, records):
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return shuffled_epochs(len(records))
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return balanced_epochs(factors)
    if name == "ClassBalancedSampler":
        return class_balanced_epochs(labels_of(records))
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; a training that can be resumed exactly takes "
        "'TrainingSampler', 'RepeatFactorTrainingSampler' or, for images with a class each, "
        "'ClassBalancedSampler'"
    )


@configurable(from_config=_from_config)
def build_train_loader(dataset, *, mapper, total_batch_size, epoch_indices=None, num_workers=0):
    """
    Detectron2's ``build_detection_train_loader`` for trainings that can be resumed exactly. There
    is no grouping by aspect ratio: its buckets would be state.

    Args:
        dataset (sequence of dict): dataset dicts.
        mapper (callable): see :class:`SeededDataset`.
        total_batch_size (int): images a batch, of all processes together.
        epoch_indices (callable or None): order of an epoch, see :class:`ResumableBatchSampler`;
            None shuffles.
        num_workers (int): processes that load images; any number gives the same batches.

    Returns:
        DataLoader: of lists of mapped samples; its ``batch_sampler`` is a
            :class:`ResumableBatchSampler`, to be set to a seed and an iteration before use.
    """
    epoch_indices = epoch_indices or shuffled_epochs(len(dataset))
    return DataLoader(
        SeededDataset(dataset, mapper),
        batch_sampler=ResumableBatchSampler(epoch_indices, total_batch_size),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        worker_init_fn=_leave_signals_to_the_training,
    )


def _leave_signals_to_the_training(worker_id):
    # Ctrl-C and many a scheduler signal the whole process group. The training finishes its
    # iteration and saves then, for which it needs its workers; they end when it does.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
