"""Training batches that depend on the seed and the iteration alone."""

import itertools
import random
import signal
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from imrcnn_d2.config import get_node
from imrcnn_d2.data.augmentation import CopyPaste
from imrcnn_d2.data.catalog import labels_of, load_datasets
from imrcnn_d2.data.mapper import ClassificationMapper, LesionMapper

EpochIndices = Callable[[torch.Generator], torch.Tensor]  # the order of one epoch, int64


def seed_generators(*entropy: int) -> None:
    """Seed the generators of ``random``, NumPy and torch (on every device) with one or more numbers
    >= 0. Other numbers, or the same in another order, give unrelated streams."""
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


def shuffled_epochs(size: int) -> EpochIndices:
    """Each of `size` images once per epoch."""
    return lambda generator: torch.randperm(size, generator=generator)


def balanced_epochs(repeat_factors: torch.Tensor) -> EpochIndices:
    """Images of rare classes repeated, as in Detectron2's ``RepeatFactorTrainingSampler``, by the
    (N,) mean occurrences of each image in an epoch; the length of epochs varies."""
    sampler = RepeatFactorTrainingSampler(repeat_factors, seed=0)

    def epoch_indices(generator: torch.Generator) -> torch.Tensor:
        indices = sampler._get_epoch_indices(generator)
        return indices[torch.randperm(len(indices), generator=generator)]

    return epoch_indices


def class_balanced_epochs(labels: np.ndarray) -> EpochIndices:
    """As many images of each class, but for one, in an epoch as long as the data set, by the (N,)
    classes of the images. Those of a class with too few are repeated alike; of a class with too
    many, each epoch has another sample."""
    images_of = [torch.from_numpy(np.flatnonzero(labels == k)) for k in np.unique(labels)]
    share, left_over = divmod(len(labels), len(images_of))

    def epoch_indices(generator: torch.Generator) -> torch.Tensor:
        # Those that get one more are others in each epoch.
        larger = torch.randperm(len(images_of), generator=generator)[:left_over].tolist()
        chosen = []
        for k, images in enumerate(images_of):
            size = share + (k in larger)
            rounds = -(-size // len(images))
            orders = [torch.randperm(len(images), generator=generator) for _ in range(rounds)]
            chosen.append(images[torch.cat(orders)[:size]])
        indices = torch.cat(chosen)
        return indices[torch.randperm(len(indices), generator=generator)]

    return epoch_indices


class ResumableBatchSampler(Sampler):
    """Endless batches of ``(seed, position, index)`` from any iteration on.

    ``position`` counts the samples of the whole training over all processes: place k of the batch
    of iteration i is ``i * total_batch_size + k``, and of W processes the one with rank r takes the
    places from ``r * total_batch_size / W`` on. Which image a position has depends on the seed and
    the position alone, so that a training that is stopped and resumed sees the same images as one
    that is not, and two processes the same as one with their batches together.
    """

    def __init__(self, epoch_indices: EpochIndices, total_batch_size: int):
        self._rank, world_size = comm.get_rank(), comm.get_world_size()
        if total_batch_size <= 0 or total_batch_size % world_size:
            raise ValueError(
                f"A batch of {total_batch_size} images cannot be shared by {world_size} processes: "
                f"make SOLVER.IMS_PER_BATCH a multiple of {world_size}"
            )
        self._epoch_indices = epoch_indices
        self._total = total_batch_size
        self._share = total_batch_size // world_size
        self._seed = self._iteration = 0

    def start_at(self, seed: int, iteration: int) -> None:
        """Set the seed (>= 0) of the training, and the iteration whose batch comes first."""
        self._seed, self._iteration = seed, iteration

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        samples = self._samples(self._iteration * self._total)
        while True:
            batch = list(itertools.islice(samples, self._total))
            yield batch[self._rank * self._share : (self._rank + 1) * self._share]

    def _samples(self, first: int) -> Iterator[tuple[int, int, int]]:
        generator = torch.Generator()
        position = 0
        for epoch in itertools.count():
            words = np.random.SeedSequence((self._seed, epoch)).generate_state(1)
            indices = self._epoch_indices(generator.manual_seed(int(words[0])))
            for place in range(max(first - position, 0), len(indices)):
                yield self._seed, position + place, int(indices[place])
            position += len(indices)


class SeededDataset(Dataset):
    """Training samples whose augmentation is a function of the seed and the sample's position. The
    mapper samples from the generators of ``random``, NumPy and torch, and keeps no state that
    changes what it returns."""

    def __init__(self, records: Sequence[dict], mapper: Callable[[dict], dict]):
        self._records, self._mapper = records, mapper

    def __len__(self):
        return len(self._records)

    def __getitem__(self, sample: tuple[int, int, int]) -> dict:
        """The mapped record of (seed, position, index), see :class:`ResumableBatchSampler`."""
        seed, position, index = sample
        seed_generators(seed, 0, position)
        return self._mapper(self._records[index])


def _from_config(cfg):
    records = load_datasets(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    if "label" in records[0]:
        mapper = ClassificationMapper(cfg, is_train=True)
    else:
        _check_masks(cfg, records)
        mapper = LesionMapper(cfg, is_train=True)
        probability = get_node(cfg, "INPUT.AUG").COPY_PASTE_PROB
        if probability > 0:
            mapper = CopyPaste(mapper, records, probability)
    return {
        "dataset": records,
        "mapper": mapper,
        "epoch_indices": _epoch_indices(cfg, records),
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


def _check_masks(cfg, records):
    """Raise ValueError, before a worker fails at it, for lesions without a mask where masks are to
    be learned, and for RLE with INPUT.MASK_FORMAT "polygon"."""
    if not cfg.MODEL.MASK_ON:
        return
    for record in records:
        for annotation in record["annotations"]:
            segmentation = annotation.get("segmentation")
            if annotation.get("iscrowd"):
                continue
            if segmentation is None:
                raise ValueError(
                    f"{record['file_name']}: a lesion has a box and no mask, so that masks cannot "
                    "be learned from this data set: set MODEL.MASK_ON to False to train a detector "
                    "of boxes, or annotate masks"
                )
            if isinstance(segmentation, dict) and cfg.INPUT.MASK_FORMAT == "polygon":
                raise ValueError(
                    f"{record['file_name']}: its masks are RLE, but INPUT.MASK_FORMAT is "
                    "'polygon', Detectron2's default: set INPUT.MASK_FORMAT to bitmask"
                )


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
def build_train_loader(
    dataset: Sequence[dict],
    *,
    mapper: Callable[[dict], dict],
    total_batch_size: int,
    epoch_indices: EpochIndices | None = None,
    num_workers: int = 0,
) -> DataLoader:
    """Return Detectron2's ``build_detection_train_loader`` for trainings that can be resumed
    exactly; without grouping by aspect ratio, whose buckets would be state.

    Its ``batch_sampler`` is a :class:`ResumableBatchSampler`, to be set to a seed and an iteration
    before use. Any number of workers gives the same batches. Without `epoch_indices` it shuffles.
    """
    epoch_indices = epoch_indices or shuffled_epochs(len(dataset))
    return DataLoader(
        SeededDataset(dataset, mapper),
        batch_sampler=ResumableBatchSampler(epoch_indices, total_batch_size),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        worker_init_fn=_leave_signals_to_the_training,
    )


def _leave_signals_to_the_training(worker_id: int) -> None:
    # Ctrl-C and many a scheduler signal the whole process group. The training finishes its
    # iteration and saves then, for which it needs its workers; they end when it does.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
