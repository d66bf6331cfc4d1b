"""The facts that a plan is made of: a data set, a machine and the weights to start from, and a few
iterations of the plan itself on that machine."""

import logging
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager

from imrcnn_d2.data.catalog import data_set_name, prepared_folder, register_data_set
from imrcnn_d2.data.images import in_threads
from imrcnn_d2.data.loader import build_train_loader
from imrcnn_d2.data.mapper import ImageReader
from imrcnn_d2.engine.checkpoint import find_weights
from imrcnn_d2.engine.config import (
    choose_device,
    load_config,
    load_config_text,
    load_training_config,
    shipped_configs,
)
from imrcnn_d2.engine.plan import MEMORY_SHARE, Facts, as_yaml, make_plan, plain, significant
from imrcnn_d2.engine.precision import MIN_ITERATIONS
from imrcnn_d2.engine.schedule import build_optimizer
from imrcnn_d2.engine.train_step import TrainStep, keep_freed_memory
from imrcnn_d2.engine.trainer import Trainer
from imrcnn_d2.task import DETECTION, Task
from imrcnn_d2.utils.files import write_atomically
from imrcnn_d2.utils.safe_loading import load_checkpoint_file

logger = logging.getLogger(__name__)

MEASURED = 2000  # images with lesions, at equal distances, at most
ITERATIONS = 5  # that are timed, after one that is not
_GIB = 2**30
# Keys of a model that its weights do not depend on, or that a training sets.
_FREE = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.TIMM.WEIGHTS", "MODEL.CHANNELS_LAST")
_FREE += ("MODEL.PROPOSAL_GENERATOR.NAME", "MODEL.RPN.HEAD_NAME", "MODEL.ROI_HEADS.NUM_CLASSES")


def describe_data(data: str) -> dict:
    """The facts of a prepared data set with lesions: `Facts` up to ``large_lesion``.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: it has image classes instead of lesions, or no lesion, or a split no image.
    """
    name = data_set_name(data)
    register_data_set(data)
    records = DatasetCatalog.get(f"{name}_train")
    validation = DatasetCatalog.get(f"{name}_val")
    file = prepared_folder(data) / "annotations" / "train.json"
    for split, images in (("train", records), ("val", validation)):
        if not len(images):
            raise ValueError(
                f"{data} has no images in its split {split}: prepare it with a share for each, "
                "such as --ratio 12:3:5"
            )
    number, masks, with_lesions = 0, True, []
    named = {"centre": set(), "patient_id": set()}
    for row, record in enumerate(records):
        if lesions := _lesions(record):
            with_lesions.append(row)
        if any("bbox" not in lesion for lesion in lesions):
            raise ValueError(
                f"{file} is of image classes: a plan is for detectors of lesions. The configs "
                "of classifiers are in docs/guide/classification.md"
            )
        number += len(lesions)
        masks &= all(lesion.get("segmentation") for lesion in lesions)
        for key, values in named.items():
            values.add(record.get(key))
    if not with_lesions:
        raise ValueError(f"{file} has no lesion in any of its {len(records)} images: annotate some")
    places = np.linspace(0, len(with_lesions), min(len(with_lesions), MEASURED), endpoint=False)
    some = [records[with_lesions[int(place)]] for place in places]
    sides = np.sort(in_threads(_seen_size, some, "Measuring images"), axis=1)
    sizes = [
        100 * math.sqrt(lesion["bbox"][2] * lesion["bbox"][3]) / short
        for record, short in zip(some, sides[:, 0], strict=True)
        for lesion in _lesions(record)
    ]
    small, median, large = (round(float(q), 1) for q in np.percentile(sizes, (5, 50, 95)))
    return {
        "images": len(records),
        "validation_images": len(validation),
        "lesions": number,
        "lesion_free": round(100 - 100 * len(with_lesions) / len(records), 1),
        "classes": list(records.categories.values()),
        "masks": masks,
        "centres": len(named["centre"] - {None}),
        "patients": len(named["patient_id"] - {None}),
        "short_side": int(np.median(sides[:, 0])),
        "aspect": round(float(np.percentile(sides[:, 1] / sides[:, 0], 95)), 2),
        "small_lesion": max(small, 0.1),
        "median_lesion": median,
        "large_lesion": large,
    }


def _lesions(record: dict) -> list[dict]:
    return [a for a in record["annotations"] if not a.get("iscrowd", 0)]


def _seen_size(record: dict) -> tuple[int, int]:
    """Height and width of what a network is shown of an image."""
    image, _ = ImageReader("RGB", crop_to_view=True)(record)
    return image.shape[:2]


def describe_machine(memory: float | None = None) -> dict:
    """The facts of this machine: device, cores and memory in GiB, of the GPU what is free; `memory`
    replaces the latter."""
    device = choose_device()
    if memory is None and device == "cuda":
        memory = torch.cuda.mem_get_info()[0] / _GIB
    elif memory is None:
        memory = _main_memory() / _GIB
    return {"device": device, "cores": len(_cores()), "memory": round(memory, 1)}


def _cores():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())


def _main_memory() -> float:
    """Bytes, of the machine or of the container that this process is in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def describe_weights(weights: str) -> dict:
    """The facts of weights that have their config in them, those of `imrcnn train` and `export`:
    the shipped config whose model is nearest, and how theirs differs from it. Of other weights,
    such as Detectron2's, only their name.

    Raises:
        OSError: there are no such weights.
        ValueError: they cannot be read, or are of another kind of model.
    """
    if not weights:
        return {}
    path = PathManager.get_local_path(find_weights(weights))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{weights}: no such file of weights")
    content = load_checkpoint_file(path)
    if weights.startswith("hf://"):  # a config names no address but Detectron2's
        weights = path
    if not isinstance(text := content.get("config"), str):
        return {"weights": weights}
    cfg = load_config_text(text, path, ["MODEL.DEVICE", "cpu"])
    if Task.of(cfg) is not DETECTION:
        raise ValueError(f"{weights} is of an image classifier: a plan is for detectors of lesions")
    theirs = _model_keys(cfg)
    if theirs.get("MODEL.PAFPN.FORM") == "affine":  # of version 0.1.0, which is not trained
        theirs["MODEL.PAFPN.FORM"] = "residual"
    nearest = None
    for name in shipped_configs():
        if name.endswith(".yaml") and "_paper" not in name and "_demo" not in name:
            shipped = load_config(name, ["MODEL.DEVICE", "cpu"])
            if Task.of(shipped) is DETECTION:
                base = _model_keys(shipped)
                differs = {key: value for key, value in theirs.items() if base.get(key) != value}
                # Of equally near ones that of the same model, which the neck tells.
                rank = len(differs), "MODEL.PAFPN.ATTENTION" in differs
                if nearest is None or rank < nearest[0]:
                    nearest = rank, name, differs, shipped
    _, base, differs, shipped = nearest
    for key in ("MIN_SIZE_TEST", "FORMAT"):
        if cfg.INPUT[key] != shipped.INPUT[key]:
            differs[f"INPUT.{key}"] = cfg.INPUT[key]
    return {"weights": weights, "weights_base": base, "weights_keys": differs}


def _model_keys(cfg: CfgNode) -> dict:
    """Key -> value of what belongs to a model's weights, tuples as lists."""

    def leaves(node, prefix):
        for name, value in node.items():
            if isinstance(value, CfgNode):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", plain(value)

    keys = dict(leaves(cfg.MODEL, "MODEL."))
    return {key: value for key, value in keys.items() if key not in _FREE}


def plan_training(
    data: str, output: Path, weights: str = "", memory: float | None = None, hours: float = 24
) -> Facts:
    """Write a plan for this data set and machine, timed on this machine; returns its facts.

    Args:
        output: the YAML file.

    Raises:
        OSError: there is no such data set, or no such weights.
        ValueError: nothing can be planned with these, or the memory does not suffice.
    """
    facts = Facts(
        **describe_data(data), **describe_machine(memory), hours=hours, **describe_weights(weights)
    )
    # What is timed is the file itself: whatever cannot be trained stops here.
    trial = output.with_suffix(".trial.yaml")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        facts = _with_measured_step(facts, data, trial)
    finally:
        trial.unlink(missing_ok=True)
    write_atomically(output, as_yaml(facts, make_plan(facts), data))
    return facts


def _with_measured_step(facts: Facts, data: str, trial: Path) -> Facts:
    """The facts with the time and the memory of a step, of the largest batch that fits."""
    while True:
        choices = make_plan(facts)
        batch = next(c.value for c in choices if c.key == "SOLVER.IMS_PER_BATCH")
        write_atomically(trial, as_yaml(facts, choices, data))
        logger.info("Timing %d iterations of %d images", ITERATIONS, batch)
        if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > facts.cores / 2:
            text = "In the last minute %.1f processes ran on the %d cores: times may be too long"
            logger.warning(text, load, facts.cores)
        try:
            measured = _in_process(measure_step, str(trial))
        except (MemoryError, BrokenProcessPool):
            measured = {"step_memory": math.inf}
        if measured["step_memory"] <= MEMORY_SHARE * facts.memory:
            return replace(facts, **measured)
        if batch == 1:
            fault = f"takes {measured['step_memory']:.3g} GiB, more than {MEMORY_SHARE:.0%} of"
            if measured["step_memory"] == math.inf:  # or of an error, which it has printed
                fault = "ended the process that tried it, mostly a sign of more than the"
            raise ValueError(
                f"One image {fault} {facts.memory:g} GiB: free memory, or give more (--memory)"
            )
        facts = replace(facts, largest_batch=batch // 2)


def _in_process(function, *args):
    """Call a function in a new process: its memory is its own, and so is its death."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def measure_step(config_file: str) -> dict:
    """Train a few iterations of a config with random heads, in the precision that a training would
    choose; the facts of it: median seconds, the loading of images included, and the most memory, of
    the GPU or else of the process, so that it is to be called in a new one.

    Raises:
        MemoryError: the GPU's does not suffice.
    """
    keep_freed_memory()
    logging.getLogger("timm").setLevel(logging.ERROR)  # it lists what a backbone leaves out
    cfg = load_training_config(config_file)
    register_data_set(cfg.DATASETS.ROOT)
    model = Trainer.build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    step = TrainStep(model, build_train_loader(cfg), optimizer, seed=0, precision="auto")
    seconds = []
    try:
        with EventStorage():
            step.choose_precision(0, MIN_ITERATIONS)
            for step.iter in range(ITERATIONS + 1):
                start = time.perf_counter()
                step.run_step()
                seconds.append(time.perf_counter() - start)
    except RuntimeError as error:
        if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
            raise
        raise MemoryError(str(error)) from error
    timed = step.precision_seconds or {}
    short = next((s for name, s in timed.items() if name != "fp32"), None)
    return {
        "step_seconds": significant(statistics.median(seconds[1:]), 3),
        "step_memory": round(_most_memory(cfg.MODEL.DEVICE) / _GIB, 1),
        "fp32_seconds": significant(timed.get("fp32") or 0, 3),
        "short_seconds": significant(short or 0, 3),
    }


def _most_memory(device: str) -> int:
    """Bytes that this process has had at most."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
