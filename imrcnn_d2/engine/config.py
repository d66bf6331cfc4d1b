"""From a config file and overrides to the config that a command runs with.

A config may come from anybody, so nothing in it leads out of it: a ``_BASE_`` is a file in the
config's tree (the nearest folder named ``configs`` above it, else its folder) or a config that this
package or Detectron2 ships, and no value is an address except of Detectron2's weights. Overrides
are the user's and may be anything.
"""

import contextlib
import logging
import os
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.utils.logger import log_first_n
from fvcore.common.config import BASE_KEY

from imrcnn_d2.config import add_imrcnn_config
from imrcnn_d2.data.catalog import (
    SHORT_NAMES,
    balanced_weights,
    data_set_name,
    labels_of,
    load_datasets,
    read_classes,
)
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.evaluation.detection.operating_point import PAPER_TAU
from imrcnn_d2.modeling import ImageClassifier, timm_input
from imrcnn_d2.task import CLASSIFICATION, DETECTION, Task

logger = logging.getLogger(__name__)

# Ours and Detectron2's, whose model_zoo is not imported: some of them need pkg_resources for that.
SHIPPED = tuple(
    Path(os.path.realpath(Path(find_spec(package).origin).with_name("configs")))
    for package in ("imrcnn_d2", "detectron2.model_zoo")
)
_LARGEST = 100_000  # bytes of a file, its aliases written out; a whole config has 7,000
_MOST_FILES = 30  # that a config is made of
# Addresses on Detectron2's server: a file's sender chooses neither the server nor, since downloads
# stay in their folder, where the download is put.
_MODEL_ZOO = ("detectron2://", "catalog://")
# Keys before version 0.3.0.
_EARLIER_KEYS = {f"MODEL.IMRCNN.{key}": f"TEST.{key}" for key in ("SCORE_THRESH", "TAU_RULE")}
# What PyYAML and yacs raise of impossible values and keys.
_WRONG = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError)
_WRONG += (TypeError, ValueError)
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device() -> str:
    """The MODEL.DEVICE of a config that names none: "cuda" with a usable NVIDIA card, else "cpu".

    Raises:
        OSError: this torch cannot use the card, and training on the CPU unasked takes days. A
            card hidden with ``CUDA_VISIBLE_DEVICES=""`` counts as absent.
    """
    if torch.cuda.is_available():
        return "cuda"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if _NVIDIA_DRIVER.exists() and not hidden:
        driver = _NVIDIA_DRIVER.read_text().splitlines()[0]
        raise OSError(
            f"An NVIDIA card is present ({driver}), but torch {torch.__version__} (built for CUDA "
            f"{torch.version.cuda}) cannot use it. Install a torch build for this driver "
            "(make install TORCH=...), update the driver, or ask for the CPU by the variable "
            "CUDA_VISIBLE_DEVICES=''"
        )
    return "cpu"


def register_root(cfg: CfgNode) -> None:
    """Register the data set of DATASETS.ROOT, if any, for the config's task."""
    if cfg.DATASETS.ROOT:
        Task.of(cfg).register(cfg.DATASETS.ROOT)


def check_named_splits(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "VAL", "TEST")) -> None:
    """Of registered data sets: that the files of those exist that DATASETS.TRAIN, VAL or TEST name
    in place of the splits of DATASETS.ROOT.

    Raises:
        FileNotFoundError: some do not; it says how to take the splits of DATASETS.ROOT.
    """
    of_root = _split_names(cfg.DATASETS.ROOT)
    for split in splits if cfg.DATASETS.ROOT else ():
        for name in set(cfg.DATASETS[split]).difference(of_root[split]):
            try:
                DatasetCatalog.get(name)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"DATASETS.{split} names {name}, which wins over {cfg.DATASETS.ROOT} (--data, "
                    f"DATASETS.ROOT): {error} To take the split of {cfg.DATASETS.ROOT}, remove "
                    f"DATASETS.{split} from the config, or add to the command: DATASETS.{split} "
                    f"\"('{of_root[split][0]}',)\""
                ) from error


def resolve_class_weights(cfg: CfgNode) -> CfgNode:
    """Return ``cfg``, or a copy with numbers in place of CLASS_WEIGHTS "balanced".

    Raises:
        ValueError: a class has no training image.
    """
    if Task.of(cfg) is DETECTION or cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS != "balanced":
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


def load_config(config_file: str | Path = "", opts: Sequence = ()) -> CfgNode:
    """Return Detectron2's defaults and ours, changed by a config file and by overrides; not frozen.

    MODEL.DEVICE is :func:`choose_device` unless named. A classifier's INPUT and MODEL.PIXEL_* are
    those of its timm model. DATASETS.ROOT names those of DATASETS.TRAIN, VAL and TEST that are not
    given, and OUTPUT_DIR as output/DATA_SET/CONFIG; no data set is read.

    Args:
        config_file: a YAML file, or the name of a shipped one (`find_config`) such as
            "imrcnn_lite.yaml"; "" for the defaults. Names of earlier versions still work, with a
            warning.
        opts: ``[KEY, VALUE, ...]``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown key or a value of another type; a file that is no plain YAML, leads
            out of its tree or holds an address; MODEL.LOAD_PROPOSALS, whose files are pickles.
    """
    content = {}
    if config_file:
        path = find_config(config_file)
        folder, *above = Path(os.path.abspath(path)).parents
        tree = next((parent for parent in (folder, *above) if parent.name == "configs"), folder)
        content = _read(path, [Path(os.path.realpath(tree)), *SHIPPED], [])
    return _config(content, config_file, opts)


def load_training_config(
    config_file: str | Path = "", opts: Sequence = (), eval_only: bool = False
) -> CfgNode:
    """As :func:`load_config`, with as many classes as the data set has unless ``opts`` say so, and
    without MODEL.TIMM.WEIGHTS where other weights replace them.

    Args:
        eval_only: DATASETS.TEST is needed, not DATASETS.TRAIN, and whole weights will be loaded.

    Raises:
        ValueError: no data set is named; ``opts`` give iterations to a config of epochs; or see
            :func:`load_config`.
    """
    cfg = load_config(config_file, opts)
    given, epochs = opts[::2], 0 if eval_only else cfg.SOLVER.MAX_EPOCHS
    if epochs > 0 and "SOLVER.MAX_ITER" in given and "SOLVER.MAX_EPOCHS" not in given:
        raise ValueError(
            f"SOLVER.MAX_ITER has no effect: {config_file} has SOLVER.MAX_EPOCHS {epochs}, and "
            "warm-up and periods in epochs. Give SOLVER.MAX_EPOCHS, or 0 for it and "
            "SOLVER.WARMUP_ITERS, SOLVER.CHECKPOINT_PERIOD and TEST.EVAL_PERIOD in iterations"
        )
    of_steps = ("SOLVER.MAX_ITER", "SOLVER.MAX_EPOCHS", "SOLVER.BASE_LR")
    if cfg.SOLVER.PHASES and not eval_only and (lost := [key for key in of_steps if key in given]):
        raise ValueError(
            f"{lost[0]} has no effect: {config_file} has SOLVER.PHASES, each with its own length "
            'and rate. Give SOLVER.PHASES, or "[]" for none'
        )
    in_epochs = ("SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")
    lacking = [key for key in in_epochs if key not in given]
    if epochs > 0 and "SOLVER.MAX_EPOCHS" in given and lacking:
        of_file = load_config(config_file, ["MODEL.DEVICE", "cpu"]).SOLVER
        if not of_file.MAX_EPOCHS and not of_file.PHASES:
            raise ValueError(
                "SOLVER.MAX_EPOCHS makes epochs of the iterations in "
                f"{config_file or 'the default config'}: give "
                f"{', '.join(lacking)} in epochs too, or the length as SOLVER.MAX_ITER"
            )
    names = cfg.DATASETS.TEST if eval_only else cfg.DATASETS.TRAIN
    if not names:
        raise ValueError(
            f"{config_file or 'The config'} names no data set: add --data DIR (or the config key "
            "DATASETS.ROOT), where DIR is a folder that imrcnn prepare-dataset wrote, or "
            f"{', '.join(SHORT_NAMES)} for the folder of that name in $IMRCNN_DATASETS or "
            "$DETECTRON2_DATASETS"
        )
    key = Task.of(cfg).num_classes_key(cfg)
    splits_of_root = {name for split in _split_names(cfg.DATASETS.ROOT).values() for name in split}
    if key and key not in given and splits_of_root.issuperset(names):
        if classes := read_classes(cfg.DATASETS.ROOT):
            cfg.merge_from_list([key, len(classes)])
    if eval_only or cfg.MODEL.WEIGHTS:  # which have the whole backbone
        cfg.MODEL.TIMM.WEIGHTS = ""
    return cfg


def check_resumable(cfg: CfgNode) -> None:
    """Weights of version 0.1.0 do not state the form of their neck, as `Checkpointer` needs it to
    resume; the config.yaml next to them does.

    Raises:
        ValueError: OUTPUT_DIR holds a training of another form than the config's.
    """
    folder = Path(cfg.OUTPUT_DIR)
    earlier = folder / "config.yaml"
    if "pafpn" not in cfg.MODEL.BACKBONE.NAME or not any(folder.glob("model_*.pth")):
        return
    try:
        form = load_config(earlier).MODEL.PAFPN.FORM
    except (OSError, ValueError):  # an interruption may have cut it off
        return
    if form != cfg.MODEL.PAFPN.FORM:
        raise ValueError(
            f"{earlier} has MODEL.PAFPN.FORM {form!r}, and this config {cfg.MODEL.PAFPN.FORM!r}: "
            "name that one (--config-file), or train anew without --resume"
        )


def load_config_text(text: str, source: str | Path, opts: Sequence = ()) -> CfgNode:
    """As :func:`load_config`, from the YAML ``text`` inside a file ``source``, without _BASE_."""
    content = _with_current_keys(_parse(text, source), source)
    if BASE_KEY in content:
        raise ValueError(
            f"{source}: its config asks for another file ({BASE_KEY}: {_short(content[BASE_KEY])}),"
            " but imrcnn export writes whole ones"
        )
    return _config(content, source, opts)


def read_yaml(path: str | Path, source: str | Path | None = None) -> dict:
    """The values of a YAML file, which is called ``source`` in messages; ``_BASE_`` is not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no mapping, too much, or more than values.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such config file")
    with open(path, "rb") as file:
        return _parse(file.read(_LARGEST + 1), source or path)


class _Loader(yaml.SafeLoader):
    """Without ``<<``, whose copies of mappings grow tenfold with each line of a file of aliases."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                problem = "'<<' is not read: write out its keys"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)


def _parse(text: str | bytes, source: str | Path) -> dict:
    try:
        if len(text) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
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
        if size + len(nodes) > _LARGEST:
            raise ValueError(f"with its aliases written out it has more than {_LARGEST} bytes")


def _read(path: Path, admitted: Sequence[Path], files: list[Path]) -> dict:
    """A file's keys over those of the files that it is based on, which lie in ``admitted``."""
    files.append(path)
    if len(files) > _MOST_FILES:
        raise ValueError(f"{files[0]} is made of more than {_MOST_FILES} files: see {BASE_KEY}")
    named = path if path is files[0] else f"{files[0]}: its {BASE_KEY} {path}"
    content, merged = _earlier_config(path), {}
    if content is None:
        content = _with_current_keys(read_yaml(path, named), named)
    else:
        data = f" with --data {content['DATASETS']['ROOT']}" if "DATASETS" in content else ""
        logger.warning("%s is now %s%s; this name still works", named, content[BASE_KEY], data)
    bases = content.pop(BASE_KEY, [])
    for base in bases if isinstance(bases, list) else [bases]:
        with _naming(f"{path}: {BASE_KEY} {_short(base)}"):
            file = Path(os.path.realpath(path.parent / base))
            if not os.path.isfile(file):  # a shipped config goes by its name, as in --config-file
                named = Path(os.path.realpath(SHIPPED[0] / base.removeprefix("configs/")))
                file = named if os.path.isfile(named) else file
            inside = any(file.is_relative_to(folder) for folder in admitted)
            if not inside or not (os.path.isfile(file) or _earlier_config(file)):
                raise ValueError(
                    f"no file in {admitted[0]}, nor a config of imrcnn_d2 or Detectron2: copy it "
                    "there, or put both files below a folder named configs"
                )
        merged = _merge(merged, _read(file, admitted, files))
    return _merge(merged, content)


def shipped_configs() -> list[str]:
    """Names of the configs to run: YAML files, then LazyConfigs, as "lazy/imrcnn_lite.py"."""
    names = [path.name for path in sorted(SHIPPED[0].glob("*.yaml"))]
    lazy = [f"lazy/{path.name}" for path in sorted((SHIPPED[0] / "lazy").glob("*.py"))]
    return [name for name in names + lazy if not name.startswith(("Base-", "lazy/base"))]


def shipped_config(name: str | Path) -> Path:
    """The shipped config NAME, also given as NAME.yaml or configs/NAME.yaml.

    Names of earlier versions work as well: of these the path is returned, where no file is.

    Raises:
        FileNotFoundError: there is none; names the shipped configs, those of like names first.
    """
    parts, known = Path(name).parts, shipped_configs()
    short = "/".join(parts[parts[:1] == ("configs",) :])
    path = SHIPPED[0] / (f"{short}.yaml" if f"{short}.yaml" in known else short)
    if SHIPPED[0] in Path(os.path.realpath(path)).parents:
        if path.is_file() or _earlier_config(path):
            return path
    like = get_close_matches(Path(name).name, known)
    raise FileNotFoundError(
        f"{name}: no such config file. Shipped ones, which need no path: "
        f"{', '.join(dict.fromkeys([*like, *known]))}"
    )


def find_config(path: str | Path) -> Path:
    """The file itself, else the :func:`shipped_config` of this name; raises as that does."""
    path = Path(path)
    return path if path.is_file() or _earlier_config(path) else shipped_config(path)


def _earlier_config(path: Path) -> dict | None:
    """The content of a config that earlier versions shipped for each data set; else None."""
    path = Path(os.path.realpath(path))
    if path.is_file() or SHIPPED[0] not in path.parents:
        return None
    *folders, name = path.relative_to(SHIPPED[0]).parts
    folder, stem = "/".join(folders), Path(name).stem
    root, output = "", ""
    if folder in ("kvasir_seg", "egc", "synthetic"):
        root, output = folder, f"output/{folder}/{stem}"
        output = "output/demo" if stem == "imrcnn_lite_demo" else output
    elif folder == "recognition":
        root, output = "gastric_recognition", f"output/recognition/{stem}"
        name = "efficientnet_lite0.yaml" if name == "lite.yaml" else name
    elif folder:
        return None
    elif name == "Base-Recognition.yaml":
        root, output, name = "gastric_recognition", "./output", "Base-Classifier.yaml"
    elif name.startswith("Base-"):
        model, _, size = name.removeprefix("Base-").partition("-")
        name = f"{model.lower()}_{size}"
    base = SHIPPED[0] / name
    if not base.is_file():
        return None
    data = {"DATASETS": {"ROOT": root}, "OUTPUT_DIR": output} if root else {}
    return {BASE_KEY: str(base), **data}


def _merge(base: dict, content: dict) -> dict:
    # Not in place: aliases make two keys share a mapping.
    merged = {**base, **content}
    for key in base.keys() & content.keys():
        if isinstance(base[key], dict) and isinstance(content[key], dict):
            merged[key] = _merge(base[key], content[key])
    return merged


def _current(opts: Sequence, source: str | Path) -> list:
    """``[KEY, VALUE, ...]`` with today's names of the keys before version 0.3.0. Its default
    threshold is left out: it was of scores as the network gives them, for which it still holds.
    """
    current, named = [], []
    for key, value in zip(opts[::2], opts[1::2], strict=False):
        if key in _EARLIER_KEYS:
            named.append(f"{key} {_short(value)}")
            if key.endswith("SCORE_THRESH") and str(value) == str(PAPER_TAU):
                continue
            key = _EARLIER_KEYS[key]
        current += [key, value]
    current += opts[len(opts) // 2 * 2 :]  # a key without a value is refused later
    if named:
        text = (
            f"{source}: {', '.join(named)}: renamed in version 0.3.0. Use TEST.TAU_RULE, and "
            "TEST.SCORE_THRESH, which is of scores that are probabilities where the weights have a "
            f"map of scores. The former default, {PAPER_TAU:g}, is left out"
        )
        # A command may read a config twice.
        log_first_n(logging.WARNING, text, name=__name__, key="message")
    return current


def _with_current_keys(content: dict, source: str | Path) -> dict:
    """``content`` with today's names of the keys before version 0.3.0, see :func:`_current`."""
    model = content.get("MODEL")
    node = model.get("IMRCNN") if isinstance(model, dict) else None
    if not isinstance(node, dict):
        return content
    opts, earlier = [x for k, v in node.items() for x in (f"MODEL.IMRCNN.{k}", v)], {}
    opts = _current(opts, source)
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        for name in reversed(key.split(".")):
            value = {name: value}
        earlier = _merge(earlier, value)
    model = {key: value for key, value in model.items() if key != "IMRCNN"}
    return _merge(earlier, {**content, "MODEL": model})


def _with_form(content: dict) -> dict:
    """``content`` with FORM in place of keys of version 0.1.0, whose default gate was double."""
    pafpn = content.get("MODEL", {}).get("PAFPN", {})
    gate = content.get("MODEL", {}).get("CBAM", {}).get("GATE")
    earlier = pafpn.keys() & {"INIT", "ACTIVATION"} or gate == "residual"
    form = {"": "affine", "relu": "panet"}.get(pafpn.get("ACTIVATION", ""))
    if "FORM" in pafpn or not earlier or form is None:
        return content  # INIT and ACTIVATION are refused
    pafpn = {key: value for key, value in pafpn.items() if key not in ("INIT", "ACTIVATION")}
    model = {"PAFPN": {**pafpn, "FORM": form}, "CBAM": {"GATE": gate or "double_sigmoid"}}
    content = {**content, "MODEL": {k: v for k, v in content["MODEL"].items() if k != "PAFPN"}}
    return _merge(content, {"MODEL": model})


def _config(content: dict, source: str | Path, opts: Sequence) -> CfgNode:
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.MODEL.DEVICE = "auto"  # stays where nobody names a device
    may_be_none = {key for key, value in _items(cfg) if value is None}
    with _naming(f"{source} is no config of these models", cfg):
        content = _with_form(content)
        if content.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise ValueError(f"VERSION is {content['VERSION']}, and Detectron2's {cfg.VERSION}")
        cfg.merge_from_other_cfg(CfgNode(content))
        _check_none(cfg, may_be_none)
    file_datasets, given = cfg.DATASETS.clone(), opts[::2]
    with _naming("KEY VALUE ...", cfg):
        cfg.merge_from_list(_current(opts, "KEY VALUE ..."))
        _check_none(cfg, may_be_none)
    if cfg.DATASETS.ROOT:
        _name_splits(cfg, file_datasets, {*(content.get("DATASETS") or ())}, given)
        if source and "OUTPUT_DIR" not in content and "OUTPUT_DIR" not in given:
            name = data_set_name(cfg.DATASETS.ROOT)
            cfg.OUTPUT_DIR = os.path.join("output", name, Path(source).stem)
    _check_addresses(cfg, source, given)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True, but DATASETS.PROPOSAL_FILES_* are pickles, which run "
            "any code: set it to False, the models make proposals themselves"
        )
    if Task.of(cfg) is CLASSIFICATION:
        known = timm_input(cfg.MODEL.TIMM.NAME)
        cfg.INPUT.SIZE = cfg.INPUT.SIZE or known["size"]
        cfg.INPUT.FORMAT = ImageClassifier.input_format
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = known["pixel_mean"], known["pixel_std"]
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = choose_device()
    return cfg


def _split_names(root: str) -> dict[str, tuple[str, ...]]:
    name = data_set_name(root) if root else ""
    return {split.upper(): (f"{name}_{split}",) if root else () for split in SPLITS}


def _name_splits(
    cfg: CfgNode, file_datasets: CfgNode, in_file: Collection[str], given: Sequence[str]
) -> None:
    """Name the splits of DATASETS.ROOT where neither the file nor the command line names others."""
    file_root = _split_names(file_datasets.ROOT)
    for key, names in _split_names(cfg.DATASETS.ROOT).items():
        if f"DATASETS.{key}" in given:
            continue
        in_config = tuple(file_datasets[key])
        # A config.yaml of a run has all keys: those that came from its ROOT follow the new one.
        if key not in in_file or in_config == file_root[key]:
            cfg.DATASETS[key] = names
        elif "DATASETS.ROOT" in given and in_config != names:
            text = "DATASETS.%s is %s, as the config names it, and not taken from %s"
            logger.warning(text, key, in_config, cfg.DATASETS.ROOT)


def _check_addresses(cfg: CfgNode, source: str | Path, given: Sequence[str]) -> None:
    for key, text in _strings(cfg):
        # Blanks and what cannot be printed are left out of an address when it is read.
        address = re.match(r"[^/]*://", re.sub(r"[\0-\x20\x7f]", "", text))
        # timm has "hf-hub:" and "local-dir:".
        address = address or (key == "MODEL.TIMM.NAME" and ":" in text)
        if address and key not in given and not text.startswith(_MODEL_ZOO):
            raise ValueError(
                f"{source}: {key} is the address {_short(text)}, which only the command line may "
                f"name: give {key} there, or a local file in the config"
            )


def _strings(node, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of a config with their keys."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _strings(value, key)


@contextlib.contextmanager
def _naming(source: str, cfg: CfgNode | None = None) -> Iterator[None]:
    try:
        yield
    except _WRONG as error:
        text = _short(error)
        if cfg is not None and (unknown := re.search(r"on-existent .*key: (\S+)", text)):
            keys = {key.lower(): key for key, _ in _items(cfg)}
            like = get_close_matches(unknown[1].lower(), keys)
            if like:
                text += f". Similar keys: {', '.join(keys[key] for key in like)}"
        raise ValueError(f"{source}: {text}") from error


def _items(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        yield f"{prefix}{name}", value
        if isinstance(value, CfgNode):
            yield from _items(value, f"{prefix}{name}.")


def _check_none(cfg: CfgNode, may_be_none: Collection[str]) -> None:
    """The merge takes None in place of a value of any type."""
    for key, value in _items(cfg):
        if value is None and key not in may_be_none:
            raise ValueError(f"{key} has no value: name one, or leave the key out")


def _short(value) -> str:
    """A text as one line that can be printed; an error's message, a KeyError's without quotes."""
    if isinstance(value, Exception):
        value = value.args[0] if len(value.args) == 1 else str(value) or type(value).__name__
    text = "".join(c if c.isprintable() else " " for c in str(value)[:1000])
    return textwrap.shorten(text, 300, placeholder=" ...")
