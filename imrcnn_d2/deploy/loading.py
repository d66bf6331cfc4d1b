"""From a file of weights to the model it belongs to, whole or not at all."""

import functools
import logging
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from imrcnn_d2.deploy.runtimes import EXPORT_VERSION, EXPORTS, Runtime
from imrcnn_d2.engine.checkpoint import Checkpointer, Weights, load_weights
from imrcnn_d2.engine.config import choose_device, is_classifier, load_config, load_config_text
from imrcnn_d2.engine.run_record import describe_model
from imrcnn_d2.evaluation.detection.results import OperatingPoint
from imrcnn_d2.utils.files import BadInputError
from imrcnn_d2.utils.safe_loading import UnsafeFileError, load_checkpoint_file, load_safetensors

__all__ = ["LoadedModel", "load_model", "pretrained"]

logger = logging.getLogger(__name__)


LONGEST_NAME = 200
# The weights are those of the whole model, wherever its training started from. The device is
# replaced later; a missing one would be refused.
_OVERRIDES = ["MODEL.WEIGHTS", "", "MODEL.TIMM.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
# Limits of keys that cost memory and time which the size of the weights does not show.
_MOST = {
    "INPUT.MAX_SIZE_TEST": 10_000,
    "INPUT.MIN_SIZE_TEST": 3_000,
    "INPUT.SIZE": 3_000,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 100,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 100,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 16,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 112,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": 16,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 100,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 112,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 16,
    "MODEL.RETINANET.NUM_CONVS": 100,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 100_000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10_000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100_000,
    "TEST.DETECTIONS_PER_IMAGE": 1_000,
}
_MOST_ANCHORS = 100  # sizes, and shapes, on a level
_PACKAGED = resources.files("imrcnn_d2") / "weights"


@dataclass(frozen=True)
class LoadedModel:
    """
    Attributes:
        model: on its device, in evaluation mode; or the runtime of an exported file.
        cfg: frozen.
        weights: the file, its hash and its operating point.
        classes: names, by the model's class index.
    """

    model: nn.Module | Runtime
    cfg: CfgNode
    weights: Weights
    classes: list[str]

    @property
    def names(self) -> tuple[str, str]:
        """Of the model and of its backbone."""
        if isinstance(self.model, Runtime):
            return self.model.metadata["model"], self.model.metadata["backbone"]
        return describe_model(self.model)

    @property
    def tau(self) -> float | None:
        """
        The operating point chosen on validation data, else MODEL.IMRCNN.SCORE_THRESH; None of an
        image classifier, which takes the likeliest class.
        """
        if is_classifier(self.cfg):
            return None
        point = self.weights.operating_point
        return self.cfg.MODEL.IMRCNN.SCORE_THRESH if point is None else point.tau


def pretrained(name: str, folder: Path = _PACKAGED) -> Path:
    """
    Returns the file of weights that come with the package, such as "demo"; ``<name>.md`` next to it
    is its model card.

    Raises:
        FileNotFoundError: there are no such weights; the error names the existing ones.
    """
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    for path in paths:
        if path.stem == name:
            return path
    names = ", ".join(path.stem for path in paths) or "none"
    raise FileNotFoundError(f"The package has no weights named {name!r}; it has: {names}")


def load_model(
    config: CfgNode | str | Path | None, weights: str | Path, *, device: str | None = None
) -> LoadedModel:
    """
    Builds a model and loads its weights: none may be missing, too many or of another shape.

    Args:
        config: the config or its file; None for the one in the weights' file
            (``tools/export.py``), else ``config.yaml`` in its folder, where training leaves it.
        weights: any file, or URL, that MODEL.WEIGHTS takes; a file of tools/export.py for another
            runtime; or a bare word that is no file: a name of `pretrained`.
        device: None for a usable GPU, else the CPU, whatever the config says: it is of the machine
            that the model was trained on.

    Raises:
        FileNotFoundError: there are no such weights, or no config.
        ValueError: the weights are not this config's, damaged, or of a later version.
    """
    if str(weights).isidentifier() and not Path(weights).is_file():
        weights = pretrained(str(weights))
    path = Path(PathManager.get_local_path(str(weights)))
    if not path.is_file():
        raise FileNotFoundError(f"{weights}: no such file of weights")
    if path.suffix == ".torchscript":
        raise UnsafeFileError(
            f"{path} was refused: a program of TorchScript can read and write any file. Export the "
            "weights that it was made of to .onnx, .openvino or .safetensors (tools/export.py)"
        )
    if path.suffix[1:] in EXPORTS and (runtime := EXPORTS[path.suffix[1:]].load(path)):
        return _load_runtime(config, path, runtime)
    metadata = load_safetensors(path)[1] if path.suffix == ".safetensors" else {}
    _check_metadata(path, metadata, metadata.keys() & {"artifact", "classes", "config"})
    cfg = _config(config, path, metadata.get("config"))
    cfg.MODEL.DEVICE = device or choose_device()
    cfg.MODEL.CHANNELS_LAST = False  # the runtime's affair
    _check_demands(cfg, path)
    _check_size(cfg, path)
    cfg.freeze()
    model = build_model(cfg).eval()
    loaded = load_weights(Checkpointer(model, whole=True), str(path))
    return _checked(LoadedModel(model, cfg, loaded, metadata.get("classes") or _classes(cfg)))


def _load_runtime(config, path: Path, runtime: Runtime) -> LoadedModel:
    if config is not None:
        raise ValueError(f"{path} brings its config along: leave out the other (--config-file)")
    metadata = runtime.metadata
    _check_metadata(path, metadata, _METADATA)
    cfg = _carried_config(metadata["config"], path)
    _check_demands(cfg, path)
    cfg.freeze()
    point = metadata["operating_point"]
    point = None if point is None else OperatingPoint.of_file(point, path)
    weights = Weights(str(path), metadata["weights_sha256"], point)
    return _checked(LoadedModel(runtime, cfg, weights, metadata["classes"]))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_NAME


# Checks of the metadata that are read of an exported file.
_METADATA = {
    "artifact": lambda value: isinstance(value, int),
    "backbone": _is_name,
    "classes": lambda value: isinstance(value, list) and value and all(map(_is_name, value)),
    "config": lambda value: isinstance(value, str),
    "model": _is_name,
    "operating_point": lambda value: True,  # OperatingPoint.of_file checks it
    "precision": _is_name,
    "weights_sha256": lambda value: value is None or _is_name(value),
}


def _check_metadata(path: Path, metadata: dict, keys: Iterable[str]) -> None:
    """Checks the version and these keys of a file's metadata."""
    for key in sorted(keys):  # "artifact" is the first: a later version may have other ones
        if key not in metadata or not _METADATA[key](metadata[key]):
            value = str(metadata.get(key, "missing"))[:LONGEST_NAME]
            raise BadInputError(
                path, f"is damaged: its {key!r} is {value!r}. Export it again (tools/export.py)"
            )
        if key == "artifact" and metadata[key] > EXPORT_VERSION:
            raise ValueError(
                f"{path} was written by a later version, imrcnn-d2 {metadata.get('version')}: "
                "upgrade this one to load it"
            )


def _check_demands(cfg: CfgNode, path: Path) -> None:
    """Refuses a config that asks a prediction for far more memory and time than one needs."""
    demands = []
    for key, most in _MOST.items():
        demands.append((key, functools.reduce(operator.getitem, key.split("."), cfg), most))
    for key in ("SIZES", "ASPECT_RATIOS", "ANGLES"):
        levels = cfg.MODEL.ANCHOR_GENERATOR[key]
        longest = max(
            len(each) if isinstance(each, list | tuple) else 1 for each in [levels, *levels]
        )
        demands.append((f"the length of MODEL.ANCHOR_GENERATOR.{key}", longest, _MOST_ANCHORS))
    for key, value, most in demands:
        if value > most:
            raise ValueError(
                f"{path}: in its config {key} is {value}, more than the {most} that a prediction "
                "may take: name a config that asks for less (--config-file)"
            )


def _check_size(cfg: CfgNode, path: Path) -> None:
    """Refuses a config whose model is far larger than the weights, before it takes memory."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    if numbers > path.stat().st_size:
        load_checkpoint_file(path)  # a file that holds no weights at all is refused as such
        raise ValueError(
            f"{path} has not a byte for each of the {numbers:,} weights of its config's model: "
            "give the config that it was trained with (--config-file)"
        )


def _checked(loaded: LoadedModel) -> LoadedModel:
    path, cfg, classes = loaded.weights.path, loaded.cfg, loaded.classes
    if loaded.tau is not None and not 0 <= loaded.tau <= 1:
        raise BadInputError(
            path, f"its config's MODEL.IMRCNN.SCORE_THRESH is {loaded.tau}: it is from 0 to 1"
        )
    if len(classes) != _number_of_classes(cfg):
        raise BadInputError(
            path,
            f"names {len(classes)} classes, its model has {_number_of_classes(cfg)}: export it "
            "again (tools/export.py)",
        )
    return loaded


def _config(config, weights: Path, carried: str | None) -> CfgNode:
    if isinstance(config, CfgNode):
        cfg = config.clone()
        cfg.defrost()
        cfg.merge_from_list(_OVERRIDES)
        return cfg
    if config is None and carried is not None:
        return _carried_config(carried, weights)
    if config is None:
        config = weights.parent / "config.yaml"
        if not config.is_file():
            raise FileNotFoundError(
                f"{weights} brings no config along and {config} does not exist: name the config "
                "that the weights were trained with (--config-file)"
            )
    return load_config(config, _OVERRIDES)


def _carried_config(text: str, weights: Path) -> CfgNode:
    try:
        return load_config_text(text, weights, _OVERRIDES)
    except ValueError as error:
        raise ValueError(
            f"{weights}: the config that it brings along is of another version or damaged "
            f"({error}); name one that fits (--config-file)"
        ) from error


def _number_of_classes(cfg: CfgNode) -> int:
    nodes = {"ImageClassifier": cfg.MODEL.CLASSIFIER, "RetinaNet": cfg.MODEL.RETINANET}
    return nodes.get(cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS).NUM_CLASSES


def _classes(cfg: CfgNode) -> list[str]:
    """Class names of the config's data sets; made up where none of them is at hand."""
    number = _number_of_classes(cfg)
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.get("VAL", ()), *cfg.DATASETS.TRAIN]
    names = [name for name in names if name in DatasetCatalog]
    for load in (False, True):  # the files are read only if need be
        for name in names:
            try:
                if load:
                    DatasetCatalog.get(name)
            except (OSError, ValueError):
                continue
            classes = list(MetadataCatalog.get(name).get("thing_classes", ()))
            if len(classes) == number:
                return classes
    logger.warning("The names of the model's %d classes are not known here", number)
    return ["lesion"] if number == 1 else [f"class {i + 1}" for i in range(number)]
