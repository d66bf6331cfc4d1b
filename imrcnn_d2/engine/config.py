"""From a config file and overrides to the config that a tool runs with.

A config may come from anybody, so nothing in a file leads out of it: a ``_BASE_`` is a file in the
config's own tree (the nearest folder named ``configs`` above it, else its own folder) or one of the
configs that this package and Detectron2 ship, and no value is an address, but for Detectron2's own
weights. What the user's command line says may be any.

Configs name no data set: ``DATASETS.ROOT`` is the folder of a prepared one, and names what
DATASETS.TRAIN, VAL and TEST leave open.
"""

import contextlib
import logging
import os
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from fvcore.common.config import BASE_KEY

from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.data.catalog import (
    SHORT_NAMES,
    balanced_weights,
    data_set_name,
    labels_of,
    load_datasets,
    read_classes,
    register_data_set,
)
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.modeling.classifier import ImageClassifier, timm_input

__all__ = [
    "choose_device",
    "find_config",
    "is_classifier",
    "load_config",
    "load_config_text",
    "load_training_config",
    "num_classes_key",
    "read_yaml",
    "register_root",
    "resolve_class_weights",
    "resolve_input",
]

logger = logging.getLogger(__name__)


_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device():
    """
    The device for MODEL.DEVICE where nobody named one.

    Returns:
        str: "cuda" where a usable NVIDIA card is, else "cpu". A card hidden with
            ``CUDA_VISIBLE_DEVICES=""`` counts as absent.

    Raises:
        RuntimeError: if a card is present but this torch cannot use it: training on the CPU unasked
            would cost days.
    """
    if torch.cuda.is_available():
        return "cuda"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if _NVIDIA_DRIVER.exists() and not hidden:
        driver = _NVIDIA_DRIVER.read_text().splitlines()[0]
        raise RuntimeError(
            f"An NVIDIA card is present ({driver}), but torch {torch.__version__} (built for CUDA "
            f"{torch.version.cuda}) cannot use it. Install a torch build for this driver "
            "(make install TORCH=...), update the driver, or ask for the CPU: MODEL.DEVICE cpu"
        )
    return "cpu"


def is_classifier(cfg):
    """
    Args:
        cfg (CfgNode):

    Returns:
        bool: whether MODEL.META_ARCHITECTURE is :class:`ImageClassifier`.
    """
    return cfg.MODEL.META_ARCHITECTURE == ImageClassifier.__name__


def num_classes_key(cfg: CfgNode) -> str | None:
    """The config key of the number of classes; None for models whose key is not known here."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if is_classifier(cfg):
        return "MODEL.CLASSIFIER.NUM_CLASSES"
    if architecture == "RetinaNet":
        return "MODEL.RETINANET.NUM_CLASSES"
    return "MODEL.ROI_HEADS.NUM_CLASSES" if architecture.endswith("RCNN") else None


def register_root(cfg: CfgNode) -> None:
    """Register the data set of DATASETS.ROOT, if any, for the config's task."""
    if cfg.DATASETS.ROOT:
        register_data_set(cfg.DATASETS.ROOT, classification=is_classifier(cfg))


def resolve_input(cfg):
    """
    Set INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD of a classifier, and INPUT.SIZE where it
    is 0, to what timm's data config says for MODEL.TIMM.NAME.

    Args:
        cfg (CfgNode): changed in place; that of another model is left as it is.

    Raises:
        ValueError: timm has no model of that name.
    """
    if not is_classifier(cfg):
        return
    about = timm_input(cfg.MODEL.TIMM.NAME)
    cfg.INPUT.SIZE = cfg.INPUT.SIZE or about["size"]
    cfg.INPUT.FORMAT = ImageClassifier.input_format
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = about["pixel_mean"], about["pixel_std"]


def resolve_class_weights(cfg):
    """
    Args:
        cfg (CfgNode): not changed.

    Returns:
        CfgNode: ``cfg`` itself, or a copy in which the numbers stand for a
        MODEL.CLASSIFIER.CLASS_WEIGHTS of "balanced".

    Raises:
        ValueError: see :func:`balanced_weights`.
    """
    if not is_classifier(cfg) or cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS != "balanced":
        return cfg
    labels = labels_of(load_datasets(cfg.DATASETS.TRAIN))
    weights = balanced_weights(labels, cfg.MODEL.CLASSIFIER.NUM_CLASSES).tolist()
    logger.info(
        "%s training images of the classes: they weigh %s in the loss",
        np.bincount(labels).tolist(),
        ", ".join(f"{weight:.3g}" for weight in weights),
    )
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS = weights
    if frozen:
        cfg.freeze()
    return cfg


LARGEST = 100_000  # bytes of a file, and of what its aliases stand for; a whole config has 7,000
MOST_FILES = 30  # that a config is made of
SHIPPED = tuple(
    Path(os.path.realpath(folder / "configs"))
    for folder in (Path(__file__).parents[1], Path(model_zoo.__file__).parent)
)
# Both name files of one server: a file's sender chooses neither the server nor, since the tools'
# downloads stay in their folder, where the file is put.
MODEL_ZOO = ("detectron2://", "catalog://")
# What PyYAML and yacs raise of values and keys that cannot be.
_WRONG = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def load_config(config_file: str | Path = "", opts: Sequence = ()) -> CfgNode:
    """
    Args:
        config_file: a YAML file, or the name of one that is shipped, such as "imrcnn_lite.yaml"; ""
            for the defaults. Names of earlier versions, such as "kvasir_seg/imrcnn_lite.yaml",
            give the config of then, with a warning.
        opts: ``[KEY, VALUE, ...]``, applied after the file.

    Returns:
        CfgNode: Detectron2's defaults and ours, the file and the overrides; MODEL.DEVICE is what
            these name, else the result of :func:`choose_device`; what images a classifier takes is
            resolved, see :func:`resolve_input`. Where DATASETS.ROOT is set, its splits are named in
            DATASETS.TRAIN, VAL and TEST, except in those that are given, and OUTPUT_DIR is
            output/DATA_SET/CONFIG unless given. No data set is read. Not frozen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key that there is not, or a value of another type. The file, or one that it is
            based on, is no plain YAML: Detectron2 would run what a tag such as
            ``!!python/object/apply`` names. So would it what a file of precomputed proposals holds,
            hence for MODEL.LOAD_PROPOSALS. A ``_BASE_`` is outside of the file's tree, or a value
            that is not in ``opts`` is an address: see this module.
    """
    content = {}
    if config_file:
        path = find_config(config_file) or Path(config_file)
        content = _read(path, [_tree(path), *SHIPPED], [])
    return _config(content, config_file, opts)


def load_training_config(
    config_file: str | Path = "", opts: Sequence = (), eval_only: bool = False
) -> CfgNode:
    """
    As :func:`load_config`, with a data set (see :func:`register_root`): the model has as many
    classes as its annotations, unless ``opts`` give the number.

    Args:
        config_file, opts: see :func:`load_config`.
        eval_only: whether DATASETS.TEST is what is needed, and not DATASETS.TRAIN.

    Raises:
        ValueError: no data set is named; or see :func:`load_config`.
    """
    cfg = load_config(config_file, opts)
    names = cfg.DATASETS.TEST if eval_only else cfg.DATASETS.TRAIN
    if not names:
        raise ValueError(
            f"{config_file or 'The config'} names no data set: add --data DIR (or the config key "
            "DATASETS.ROOT), where DIR is a folder that tools/prepare_dataset.py wrote, or "
            f"{', '.join(SHORT_NAMES)} for the folder of that name in $IMRCNN_DATASETS"
        )
    key = num_classes_key(cfg)
    of_root = {name for split in _split_names(cfg.DATASETS.ROOT).values() for name in split}
    if key and key not in opts[::2] and of_root.issuperset(names):
        classes = read_classes(cfg.DATASETS.ROOT)
        if classes:
            cfg.merge_from_list([key, len(classes)])
    return cfg


def load_config_text(text: str, source: str | Path, opts: Sequence = ()) -> CfgNode:
    """
    As :func:`load_config`, of a whole config that a file of another kind brings along.

    Args:
        text: YAML, without a ``_BASE_``.
        source: the file, for messages.
        opts: see :func:`load_config`.
    """
    content = _parse(text, source)
    if BASE_KEY in content:
        raise ValueError(
            f"{source}: the config that it brings along asks for another file ({BASE_KEY}: "
            f"{_short(content[BASE_KEY])}), but is written whole by tools/export.py"
        )
    return _config(content, source, opts)


def read_yaml(path: str | Path, source: str | Path | None = None) -> dict:
    """
    Args:
        path: a YAML file of values; its ``_BASE_`` is a value like others here.
        source: its name in messages; None for the path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no mapping, too much, or more than values.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such config file")
    with open(path, "rb") as file:
        return _parse(file.read(LARGEST + 1), source or path)


class _Loader(yaml.SafeLoader):
    """Without ``<<``, whose copies of mappings grow tenfold with each line of a file of aliases."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    "found <<, in place of which the keys are to be written",
                    key.start_mark,
                )


def _parse(text: str | bytes, source: str | Path) -> dict:
    try:
        if len(text) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        content = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} instead of keys")
        _check_nodes(content)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{source} is no plain YAML: {_short(error)}. A config holds values only: where a tag "
            "like !!python/object/apply:eval stands, write what it gives"
        ) from error
    except _WRONG as error:
        raise ValueError(f"{source} is no config of these models: {_short(error)}") from error
    return content


def _check_nodes(content: dict) -> None:
    """Aliases let a small file stand for a large one, or for one without end."""
    size, nodes = 0, [content]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            nodes += [*node, *node.values()]
        elif isinstance(node, list):
            nodes += node
        elif not isinstance(node, str | int | float | None):
            raise ValueError(f"it holds a {type(node).__name__}")
        size += len(node) if isinstance(node, str) else 1
        if size + len(nodes) > LARGEST:
            raise ValueError(f"with its aliases written out it has more than {LARGEST} bytes")


def _read(path: Path, admitted: Sequence[Path], files: list[Path]) -> dict:
    """A file's keys over those of the files that it is based on, which lie in ``admitted``."""
    files.append(path)
    if len(files) > MOST_FILES:
        raise ValueError(f"{files[0]} is made of more than {MOST_FILES} files: see {BASE_KEY}")
    named = path if path is files[0] else f"{files[0]}: its {BASE_KEY} {path}"
    content, merged = _earlier_config(path), {}
    if content is None:
        content = read_yaml(path, named)
    else:
        data = f" with --data {content['DATASETS']['ROOT']}" if "DATASETS" in content else ""
        logger.warning("%s is now %s%s; this name still works", named, content[BASE_KEY], data)
    bases = content.pop(BASE_KEY, [])
    for base in bases if isinstance(bases, list) else [bases]:
        merged = _merge(merged, _read(_base(path, base, admitted), admitted, files))
    return _merge(merged, content)


def _base(path: Path, base: str, admitted: Sequence[Path]) -> Path:
    with _told(f"{path}: {BASE_KEY} {_short(base)}"):
        found = Path(os.path.realpath(path.parent / base))
        inside = any(found.is_relative_to(folder) for folder in admitted)
        if not inside or not (os.path.isfile(found) or _earlier_config(found)):
            raise ValueError(
                f"no file in {admitted[0]}, nor a config that comes with imrcnn_d2 or Detectron2: "
                "copy it there, or put both files below a folder named configs"
            )
    return found


def find_config(path: str | Path) -> Path | None:
    """The file itself, else the shipped one of this name, of now or of earlier versions."""
    path = Path(path)
    shipped = SHIPPED[0].joinpath(*path.parts[path.parts[:1] == ("configs",) :])
    places = (path, shipped)  # the same for an absolute path
    return next((p for p in places if p.is_file() or _earlier_config(p)), None)


def _earlier_config(path: Path) -> dict | None:
    """What a config held that earlier versions shipped for each data set; else None."""
    path = Path(os.path.realpath(path))
    if path.is_file() or not path.is_relative_to(SHIPPED[0]):
        return None
    *folders, name = path.relative_to(SHIPPED[0]).parts
    folder, stem = "/".join(folders), Path(name).stem
    content: dict = {}
    if folder in ("kvasir_seg", "egc", "synthetic"):
        output = "demo" if stem == "imrcnn_lite_demo" else f"{folder}/{stem}"
        content = {"DATASETS": {"ROOT": folder}, "OUTPUT_DIR": f"output/{output}"}
    elif folder == "recognition":
        root = {"ROOT": "gastric_recognition"}
        content = {"DATASETS": root, "OUTPUT_DIR": f"output/recognition/{stem}"}
        name = {"lite.yaml": "efficientnet_lite0.yaml"}.get(name, name)
    elif name == "Base-Recognition.yaml":
        content = {"DATASETS": {"ROOT": "gastric_recognition"}, "OUTPUT_DIR": "./output"}
        name = "Base-Classifier.yaml"
    elif not folder and name.startswith("Base-"):
        model, _, size = name.removeprefix("Base-").partition("-")
        name = f"{model.lower()}_{size}"
    base = SHIPPED[0] / name
    if not base.is_file():
        return None
    return {BASE_KEY: str(base), **content}


def _tree(config_file: str | Path) -> Path:
    own, *above = Path(os.path.abspath(config_file)).parents
    named = (folder for folder in (own, *above) if folder.name == "configs")
    return Path(os.path.realpath(next(named, own)))


def _merge(base: dict, content: dict) -> dict:
    # Not in place: aliases make two keys share a mapping.
    merged = {**base, **content}
    for key in base.keys() & content.keys():
        if isinstance(base[key], dict) and isinstance(content[key], dict):
            merged[key] = _merge(base[key], content[key])
    return merged


def _config(content: dict, source: str | Path, opts: Sequence) -> CfgNode:
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    # A placeholder that no run ever sees, to tell "nobody named a device" from a named one.
    cfg.MODEL.DEVICE = "auto"
    with _told(f"{source} is no config of these models"):
        if content.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise ValueError(f"VERSION is {content['VERSION']}, and Detectron2's {cfg.VERSION}")
        cfg.merge_from_other_cfg(CfgNode(content))
    of_file = cfg.DATASETS.clone()
    with _told("KEY VALUE ..."):
        cfg.merge_from_list(list(opts))
    if cfg.DATASETS.ROOT:
        _name_splits(cfg, of_file, {*(content.get("DATASETS") or ())}, opts[::2])
    if cfg.DATASETS.ROOT and source and "OUTPUT_DIR" not in content | dict.fromkeys(opts[::2]):
        name = data_set_name(cfg.DATASETS.ROOT)
        cfg.OUTPUT_DIR = os.path.join("output", name, Path(source).stem)
    _check_addresses(cfg, source, opts[::2])
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True, but DATASETS.PROPOSAL_FILES_* are pickles, which run "
            "whatever they hold when Detectron2 loads them. Set it to False: the models here make "
            "their own proposals."
        )
    resolve_input(cfg)
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = choose_device()
    return cfg


def _split_names(root: str) -> dict[str, tuple[str, ...]]:
    name = data_set_name(root) if root else ""
    return {split.upper(): (f"{name}_{split}",) if root else () for split in SPLITS}


def _name_splits(
    cfg: CfgNode, of_file: CfgNode, in_file: Collection[str], given: Sequence[str]
) -> None:
    """Name the splits of DATASETS.ROOT where neither the file nor the command line names others."""
    of_root = _split_names(of_file.ROOT)
    for key, names in _split_names(cfg.DATASETS.ROOT).items():
        if f"DATASETS.{key}" in given:
            continue
        # A config.yaml of a run has all keys: those that came from its ROOT follow the new one.
        if key not in in_file or tuple(of_file[key]) == of_root[key]:
            cfg.DATASETS[key] = names
        elif "DATASETS.ROOT" in given and tuple(of_file[key]) != names:
            logger.warning(
                "DATASETS.%s is %s, as the config names it, and not taken from %s",
                key,
                tuple(of_file[key]),
                cfg.DATASETS.ROOT,
            )


def _check_addresses(cfg: CfgNode, source: str | Path, given: Sequence[str]) -> None:
    for key, text in _strings(cfg):
        # Blanks and what cannot be printed are left out of an address when it is read.
        address = re.match(r"[^/]*://", re.sub(r"[\0-\x20\x7f]", "", text))
        # timm has "hf-hub:" and "local-dir:".
        address = address or (key == "MODEL.TIMM.NAME" and ":" in text)
        if address and key not in given and not text.startswith(MODEL_ZOO):
            raise ValueError(
                f"{source}: {key} is the address {_short(text)}, which only the command line may "
                f"name: give {key} there, or a local file in the config"
            )


def _strings(node, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of a config with the keys that they belong to."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _strings(value, key)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except _WRONG as error:
        raise ValueError(f"{what}: {_short(error)}") from error


def _short(value) -> str:
    """In a line that can be printed; of an error what it says, a KeyError's without quotes."""
    if isinstance(value, Exception):
        value = value.args[0] if len(value.args) == 1 else str(value) or type(value).__name__
    text = "".join(c if c.isprintable() else " " for c in str(value)[:1000])
    return textwrap.shorten(text, 300, placeholder=" ...")
