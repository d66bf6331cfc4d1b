"""From a file of weights to the model it belongs to, whole or not at all."""

import contextlib
import functools
import logging
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from imrcnn_d2 import __version__
from imrcnn_d2.data import training_images
from imrcnn_d2.deploy.runtimes import EXPORTS
from imrcnn_d2.deploy.runtimes.base import Runtime
from imrcnn_d2.engine.checkpoint import (
    METADATA_VERSION,
    Checkpointer,
    Weights,
    find_weights,
    load_weights,
)
from imrcnn_d2.engine.config import choose_device, load_config, load_config_text, register_root
from imrcnn_d2.engine.run_record import config_sha256, describe_model
from imrcnn_d2.evaluation.detection.operating_point import score_threshold
from imrcnn_d2.task import Task
from imrcnn_d2.utils.files import BadInputError, for_terminal
from imrcnn_d2.utils.safe_loading import UnsafeFileError, load_checkpoint_file

logger = logging.getLogger(__name__)

LONGEST_NAME = 200
# The weights are those of the whole model, wherever its training started from. The device is
# replaced later; a missing one would be refused.
_OVERRIDES = ["MODEL.WEIGHTS", "", "MODEL.TIMM.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
# Limits of keys that cost memory and time which the size of the weights does not show.
_LIMITS = {
    100_000: ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "MODEL.RPN.PRE_NMS_TOPK_TEST"),
    10_000: ("INPUT.MAX_SIZE_TEST", "MODEL.RPN.POST_NMS_TOPK_TEST"),
    3_000: ("INPUT.MIN_SIZE_TEST", "INPUT.SIZE"),
    1_000: ("TEST.DETECTIONS_PER_IMAGE",),
    112: ("MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION"),
    100: (
        *("MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", "MODEL.RETINANET.NUM_CONVS"),
    ),
    16: [f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO" for head in ("BOX", "KEYPOINT", "MASK")],
}
_MOST_ANCHORS = 100  # sizes, and shapes, on a level


@dataclass(frozen=True)
class LoadedModel:
    model: nn.Module | Runtime  # on its device, in evaluation mode; a Runtime of an exported file
    cfg: CfgNode  # frozen
    weights: Weights
    classes: list[str]  # names, by the model's class index
    metadata: dict  # what the file says of itself, checked; empty of other programs' files

    @property
    def facts(self) -> dict:
        """What predictions and exported files note of a model: ``weights_sha256`` is of its file,
        and of an exported one ``source_sha256`` is of the weights that it was made of.
        """
        if isinstance(self.model, Runtime):
            model, backbone = self.model.metadata["model"], self.model.metadata["backbone"]
        else:
            model, backbone = describe_model(self.model)
        return {
            **{"model": model, "backbone": backbone, "version": __version__},
            "weights_sha256": self.weights.sha256,
            "source_sha256": self.metadata.get("weights_sha256"),
            "precision": self.metadata.get("precision", "fp32"),
            "config_sha256": config_sha256(self.cfg),
            "tau": self.tau,
        }

    @property
    def tau(self) -> float | None:
        """The operating point chosen on validation data, else TEST.SCORE_THRESH, see
        `score_threshold`: of scores that `Weights.score_map` has mapped, where there is a map. None
        of an image classifier.
        """
        if not Task.of(self.cfg).localises:
            return None
        if (point := self.weights.operating_point) is not None:
            return point.tau
        return score_threshold(self.cfg.TEST.SCORE_THRESH, self.weights.score_map is not None)


def load_model(
    config: CfgNode | str | Path | None,
    weights: str | Path,
    *,
    device: str | None = None,
    crop_view: bool | None = None,
) -> LoadedModel:
    """Builds a model and loads its weights: none may be missing, too many or of another shape.

    Args:
        config: None for the one in the weights' file, which training and `imrcnn export` write,
            else ``config.yaml`` in its folder.
        weights: what MODEL.WEIGHTS takes, see `find_weights`, or a file of `imrcnn export`.
        device: None for a usable GPU, else the CPU; the config's is of another machine perhaps.
        crop_view: in place of the config's INPUT.CROP_TO_VIEW, unless None.

    Raises:
        FileNotFoundError: there are no such weights, or no config.
        ValueError: the weights are not this config's, damaged, or of a later version.
    """
    path = Path(PathManager.get_local_path(find_weights(weights)))
    if not path.is_file():
        raise FileNotFoundError(f"{weights}: no such file of weights")
    if path.suffix == ".torchscript":
        raise UnsafeFileError(
            f"{path} was refused: a program of TorchScript can read and write any file. Give the "
            "weights that it was made of, or a file of imrcnn export"
        )
    if path.suffix[1:] in EXPORTS and (runtime := EXPORTS[path.suffix[1:]].load(path)):
        return _load_runtime(config, path, runtime, crop_view)
    content = load_checkpoint_file(path)
    metadata = _metadata(path, content)
    cfg = _config(config, path, metadata.get("config"), crop_view)
    cfg.MODEL.DEVICE = device or choose_device()
    cfg.MODEL.CHANNELS_LAST = False  # the runtime's affair
    _check_demands(cfg, path)
    _check_size(cfg, path)
    cfg.freeze()
    model = build_model(cfg).eval()
    loaded = load_weights(Checkpointer(model, whole=True, content=content), str(path))
    classes = metadata.get("classes") or _classes(cfg)
    return _checked(LoadedModel(model, cfg, loaded, classes, metadata))


def _metadata(path: Path, content: dict) -> dict:
    """What a file of weights says of itself; nothing if it is another program's, which may have
    keys of the same names.
    """
    if "artifact" not in content:
        return {}
    names = {"artifact", "classes", "config", "precision", "weights_sha256", training_images.KEY}
    keys = content.keys() & names
    _check_metadata(path, content, keys)
    return {key: content[key] for key in keys}


def _load_runtime(config, path: Path, runtime: Runtime, crop_view) -> LoadedModel:
    if config is not None:
        raise ValueError(f"{path} brings its config along: leave out --config-file")
    metadata = runtime.metadata
    absent = {"score_map", training_images.KEY} - metadata.keys()  # of earlier versions
    _check_metadata(path, metadata, _METADATA.keys() - absent)
    cfg = _config(None, path, metadata["config"], crop_view)
    _check_demands(cfg, path)
    cfg.freeze()
    weights = Weights.of_file(str(path), metadata, not Task.of(cfg).localises)
    return _checked(LoadedModel(runtime, cfg, weights, metadata["classes"], metadata))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_NAME


# Checks of the metadata that are read of a file of imrcnn train or imrcnn export.
_METADATA = {
    **dict.fromkeys(("backbone", "model", "precision"), _is_name),
    "artifact": lambda value: isinstance(value, int),
    "classes": lambda value: isinstance(value, list) and value and all(map(_is_name, value)),
    "config": lambda value: isinstance(value, str),
    # `Weights.of_file` checks these; files of version 1 have no map.
    **dict.fromkeys(("operating_point", "score_map"), lambda value: True),
    training_images.KEY: lambda value: value is None or training_images.are_hashes(value),
    "weights_sha256": lambda value: value is None or _is_name(value),
}


def _check_metadata(path: Path, metadata: dict, keys: Iterable[str]) -> None:
    """Checks the version and these keys of a file's metadata."""
    for key in sorted(keys):  # "artifact" is the first: a later version may have other ones
        if key not in metadata or not _METADATA[key](metadata[key]):
            value = str(metadata.get(key, "missing"))[:LONGEST_NAME]
            raise BadInputError(path, f"is damaged: its {key!r} is {value!r}. Export it again")
        if key == "artifact" and metadata[key] > METADATA_VERSION:
            later = metadata.get("version")
            raise ValueError(f"{path} was written by imrcnn-d2 {later}: upgrade to load it")


def _value(cfg: CfgNode, key: str):
    return functools.reduce(operator.getitem, key.split("."), cfg)


def _check_demands(cfg: CfgNode, path: Path) -> None:
    """Refuses a config that asks a prediction for far more memory and time than one needs."""
    demands = [(key, _value(cfg, key), most) for most, keys in _LIMITS.items() for key in keys]
    for key in ("SIZES", "ASPECT_RATIOS", "ANGLES"):
        levels = cfg.MODEL.ANCHOR_GENERATOR[key]
        lengths = (len(v) if isinstance(v, list | tuple) else 1 for v in [levels, *levels])
        name = f"the length of MODEL.ANCHOR_GENERATOR.{key}"
        demands.append((name, max(lengths), _MOST_ANCHORS))
    for key, value, most in demands:
        if value > most:
            raise ValueError(
                f"{path}: in its config {key} is {value}, more than the {most} that a prediction "
                "may take: name another (--config-file)"
            )


def _check_size(cfg: CfgNode, path: Path) -> None:
    """Refuses a config of no model, or of one that is far larger than the weights, before it takes
    memory.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            model = build_model(cfg)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # impossible values make Detectron2's and timm's raise anything
        reason = for_terminal(error.args[0] if error.args else error, one_line=True)[:200]
        raise ValueError(
            f"{path}: no model can be built of its config ({type(error).__name__}: {reason}): give "
            "the config that it was trained with (--config-file)"
        ) from error
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    if numbers > path.stat().st_size:
        raise ValueError(
            f"{path} has not a byte for each of the {numbers:,} weights of its config's model: "
            "give the config that it was trained with (--config-file)"
        )


def _checked(loaded: LoadedModel) -> LoadedModel:
    tau, number, expected = loaded.tau, len(loaded.classes), _number_of_classes(loaded.cfg)
    problem = None
    if tau is not None and not 0 <= tau <= 1:
        problem = f"its config's TEST.SCORE_THRESH is {tau}: it is from 0 to 1"
    elif number != expected:
        problem = f"names {number} classes, its model has {expected}: export it again"
    if problem:
        raise BadInputError(loaded.weights.path, problem)
    return loaded


def _config(config, weights: Path, carried: str | None, crop_view: bool | None) -> CfgNode:
    overrides = [*_OVERRIDES]
    if crop_view is not None:
        overrides += ["INPUT.CROP_TO_VIEW", crop_view]
    if isinstance(config, CfgNode):
        cfg = config.clone()
        cfg.defrost()
        cfg.merge_from_list(overrides)
        return cfg
    if config is None and carried is not None:
        try:
            return load_config_text(carried, weights, overrides)
        except ValueError as error:
            raise ValueError(
                f"{weights}: the config that it brings along is of another version or damaged "
                f"({error}); name one that fits (--config-file)"
            ) from error
    path = weights.parent / "config.yaml" if config is None else config
    if config is None and not path.is_file():
        raise FileNotFoundError(
            f"{weights} brings no config along and {path} does not exist: name the config that the "
            "weights were trained with (--config-file)"
        )
    return load_config(path, overrides)


def _number_of_classes(cfg: CfgNode) -> int:
    return _value(cfg, Task.of(cfg).num_classes_key(cfg) or "MODEL.ROI_HEADS.NUM_CLASSES")


def _classes(cfg: CfgNode) -> list[str]:
    """Class names of the config's data sets; made up where none of them is at hand."""
    with contextlib.suppress(ValueError):  # another data set has the name
        register_root(cfg)
    number = _number_of_classes(cfg)
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.get("VAL", ()), *cfg.DATASETS.TRAIN]
    names = [name for name in names if name in DatasetCatalog]
    for load in (False, True):  # the files are read only if need be
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                if load:
                    DatasetCatalog.get(name)
                classes = list(MetadataCatalog.get(name).get("thing_classes", ()))
                if len(classes) == number:
                    return classes
    logger.warning("The names of the model's %d classes are not known here", number)
    return ["lesion"] if number == 1 else [f"class {i + 1}" for i in range(number)]
