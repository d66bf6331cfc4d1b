"""Checkpoints that survive kills and full disks, and the weights that an evaluation is of."""

import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from imrcnn_d2.data import training_images
from imrcnn_d2.engine.config import load_config_text
from imrcnn_d2.evaluation.calibration import ScoreMap, Temperature
from imrcnn_d2.evaluation.detection.operating_point import OperatingPoint
from imrcnn_d2.evaluation.output import log_test_evaluation
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.modeling import ImageClassifier
from imrcnn_d2.modeling.timm_backbone import TimmBackbone, timm_key
from imrcnn_d2.utils import hub  # noqa: F401  hf:// among the addresses of weights
from imrcnn_d2.utils.files import atomic_file, few, file_sha256, write_atomically
from imrcnn_d2.utils.safe_loading import load_checkpoint_file, open_stored

logger = logging.getLogger(__name__)

_RESNET = (  # timm's names and Detectron2's
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
_OF_AN_ITERATION = re.compile(r"model_(\d+)\.pth")
FINAL = "model_final"
EARLIER = "earlier_"  # begins the folder of what a training that began anew has moved aside
# Of what files of weights say of themselves; a larger one is of a later version of this package.
# 2: thresholds are of scores that `score_map` has mapped; files of 1 have no map.
METADATA_VERSION = 2
_PACKAGED = resources.files("imrcnn_d2") / "weights"


def pretrained(name: str, folder: Path = _PACKAGED) -> Path:
    """The file of weights that come with the package, such as "demo"; ``<name>.md`` next to it is
    its model card. Raises a FileNotFoundError that names the existing ones if there are none.
    """
    paths = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    if name not in paths:
        names = ", ".join(paths) or "none"
        raise FileNotFoundError(
            f"{name!r} is no file of weights, nor one that the package has; it has: {names}"
        )
    return paths[name]


def find_weights(weights: str | Path) -> str:
    """The file or address of what MODEL.WEIGHTS and --weights name: a file, an address that
    Detectron2's PathManager knows (hf://USER/REPO is one, see `HubHandler`), or a name of
    `pretrained`. Raises a FileNotFoundError for any other name.
    """
    weights = str(weights)
    is_name = weights.isidentifier() and not os.path.isfile(weights)
    return str(pretrained(weights)) if is_name else weights


def classifier_backbone(
    state: dict[str, torch.Tensor], model: nn.Module, source: str = "the checkpoint"
) -> dict[str, torch.Tensor]:
    """Return an :class:`ImageClassifier`'s weights ``state`` under the names that a detector's
    bottom-up backbone, a :class:`TimmBackbone` or Detectron2's ResNet, has for them.

    Raises:
        ValueError: no name and shape fits; or the detector gives its backbone other images.
    """
    prefix = _backbone_prefix(model)
    bottom_up = model.get_submodule(prefix[:-1])
    shapes = {k: v.shape for k, v in bottom_up.state_dict().items() if "num_batches" not in k}
    timm_names = {timm_key(name): name for name in shapes}
    weights, unused = {}, []
    for key, value in state.items():
        if not key.startswith("backbone.") or "num_batches" in key:
            continue
        name = key.removeprefix("backbone.")
        if isinstance(bottom_up, TimmBackbone):
            name = timm_names.get(timm_key(name))
        else:
            for pattern, replacement in _RESNET:
                name = re.sub(pattern, replacement, name)
        if shapes.get(name) == value.shape:
            weights[name] = value
        else:
            unused.append(key)
    if not weights:
        raise ValueError(
            f"{source} is of a classifier, and none of the {len(unused)} tensors of its backbone "
            f"({_some(unused)}) fits the detector's {type(bottom_up).__name__}: build both on the "
            "same network"
        )
    _check_images(state, model, source)
    if isinstance(bottom_up, ResNet) and any(
        isinstance(block, BottleneckBlock) and max(block.conv1.stride) > 1
        for block in bottom_up.modules()
    ):
        raise ValueError(
            f"{source}: timm's ResNets halve a map in a block's 3x3 convolution, this detector's "
            "in the 1x1 one before it: set MODEL.RESNETS.STRIDE_IN_1X1 False"
        )
    counts = len(shapes), prefix[:-1]
    logger.info(
        "%s is of a classifier: %d of the %d tensors of %s start from it; not used: its head, %s",
        *(source, len(weights), *counts, _some(unused)),
    )
    if absent := shapes.keys() - weights.keys():
        logger.warning(
            "%s has nothing, or other shapes, for %d of the %d tensors of %s: %s",
            *(source, len(absent), *counts, _some(absent)),
        )
    return {prefix + name: value for name, value in weights.items()}


def _backbone_prefix(model: nn.Module) -> str:
    """The name and dot of a model's bottom-up backbone; "" without a backbone."""
    if not hasattr(model, "backbone"):
        return ""
    return "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."


def _some(names: Iterable[str]) -> str:
    """A few, whatever a file calls its weights."""
    return few([ascii(name)[1:-1][:200] for name in sorted(names)])


def _check_images(state: dict, model: nn.Module, source: str) -> None:
    stored = {key: torch.as_tensor(state[key]).flatten() for key in ("pixel_mean", "pixel_std")}
    if model.input_format == "RGB" and all(
        torch.allclose(getattr(model, key).flatten().cpu(), value, rtol=0, atol=0.1)
        for key, value in stored.items()
    ):
        return
    mean, std = ([round(number, 3) for number in value.tolist()] for value in stored.values())
    raise ValueError(
        f"{source} is of a classifier of RGB images with other statistics than this detector's "
        f"{model.input_format} images: set INPUT.FORMAT RGB MODEL.PIXEL_MEAN '{mean}' "
        f"MODEL.PIXEL_STD '{std}'"
    )


def damage(path: str | Path) -> str | None:
    """What is wrong with a ``.pth`` file by the CRC-32 of its parts; None if it is whole."""
    try:
        with open(path, "rb") as file, open_stored(file) as archive:
            broken = archive.testzip()
            parts = archive.namelist()
    except Exception as error:  # a damaged file makes a reader of zips raise anything
        return str(error) or type(error).__name__
    if broken:
        return f"checksum of {broken} does not fit"
    return None if any("/data/" in name for name in parts) else "it holds no tensors"


def _iteration(path: Path) -> int:
    """The last iteration of a checkpoint's training; -1 for a damaged one."""
    if named := _OF_AN_ITERATION.fullmatch(path.name):
        return int(named[1])
    return load_checkpoint_file(path).get("iteration", -1) if damage(path) is None else -1


def _check_whole(incompatible, source: str) -> None:
    """A model that is evaluated or resumed needs all its weights, and no others."""
    reshaped = [key for key, *_ in incompatible.incorrect_shapes]
    wrong = {
        # Detectron2 lists those of another shape among the missing as well.
        "missing": [key for key in incompatible.missing_keys if key not in reshaped],
        "not this model's": incompatible.unexpected_keys,
        "of another shape": reshaped,
    }
    if counts := [
        f"{len(keys)} {why}, such as {_some(keys)}" for why, keys in wrong.items() if keys
    ]:
        raise ValueError(
            f"{source}: the weights are of another architecture than the config: "
            f"{'; '.join(counts)}. Give the config that they were trained with (--config-file)"
        )


def _check_backbone(model: nn.Module, incompatible, source: str) -> None:
    """Weights to start from may lack heads and neck, and a plain ViT's pyramid, but no other part
    of the bottom-up backbone.
    """
    prefix, missing = _backbone_prefix(model), set(incompatible.missing_keys)
    names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    names = [name for name in names if ".simfp_" not in name]
    absent = [name for name in names if name in missing]
    if absent and (prefix or len(absent) == len(names)):
        raise ValueError(
            f"{source}: the weights are of another model. They have nothing, or other shapes, for "
            f"{len(absent)} of the {len(names)} weights of {prefix[:-1] or 'this one'}, such as "
            f"{_some(absent)}. Name weights of the same backbone, or none (MODEL.WEIGHTS '')"
        )


def _form(model: nn.Module) -> str | None:
    """MODEL.PAFPN.FORM of a model with our neck."""
    return getattr(getattr(model, "backbone", None), "form", None)


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer that a kill or a full disk cannot leave without a checkpoint.

    It loads nothing that runs code (:func:`load_checkpoint_file`), falls back to an earlier
    checkpoint where the last one is damaged, and refuses weights of another model: what is resumed,
    or is ``whole``, fits exactly; weights to start from have at least the bottom-up backbone. A
    classifier's checkpoint starts a detector's backbone, see :func:`classifier_backbone`.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        keep: int | None = None,
        whole: bool = False,
        metadata: dict | None = None,
        content: dict | None = None,
        save_to_disk: bool | None = None,
        **checkpointables,
    ):
        """As ``DetectionCheckpointer``.

        Args:
            keep: number of the latest checkpoints of single iterations that are kept; None: all.
            whole: exactly the model's weights are loaded; False: the model is trained on.
            metadata: what every file says of its model, see `checkpoint_metadata`.
            content: of the one file that is loaded, if it has been read.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._keep, self._whole, self.metadata = keep, whole, metadata or {}
        self._content = content

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """Load what MODEL.WEIGHTS takes, see `find_weights`; "" leaves the model as it is."""
        try:
            return super().load(find_weights(path), checkpointables)
        except AssertionError as error:
            raise FileNotFoundError(f"{path}: no such file of weights ({error})") from error
        except OSError as error:
            if "://" not in path or path.startswith("hf://"):  # whose errors say what to do
                raise
            raise OSError(
                f"{path} cannot be downloaded ({error}): set MODEL.WEIGHTS to a file, or to '' for "
                "random weights. Weights for machines without a network: docs/guide/offline.md"
            ) from error

    def save(self, name: str, **kwargs) -> None:
        """Write ``<name>.pth`` with ``kwargs``, tag it as the last, delete what is not kept.

        Raises:
            OSError: it cannot be written; earlier files stay.
        """
        if self.save_dir and self.save_to_disk:
            self.write(name, **kwargs)
            self.tag_last_checkpoint(f"{name}.pth")
            tagged = self._tagged()
            for path in self._of_iterations()[self._keep :] if self._keep is not None else ():
                if path.name != tagged:
                    path.unlink()

    def save_iteration(self, iteration: int) -> None:
        """Save after an iteration, under the name of Detectron2's periodic checkpoints."""
        self.save(f"model_{iteration:07d}", iteration=iteration)

    def write(self, name: str, **kwargs) -> None:
        """As :meth:`save`, for a file that is not to be resumed from."""
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {"model": self.model, **self.checkpointables}
        states = {key: part.state_dict() for key, part in parts.items()}
        data = {**self.metadata, **states, **kwargs}
        if form := _form(self.model):
            data["neck_form"] = form
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_file(path) as file:
                torch.save(data, file)
        except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
            free = shutil.disk_usage(self.save_dir).free / 2**20
            raise OSError(
                f"{path} could not be written ({error.__context__ or error}; {free:.0f} MiB free). "
                "The checkpoint before it is whole: make room, then go on with --resume"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_atomically(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _of_iterations(self) -> list[Path]:
        """Latest first."""
        paths = Path(self.save_dir).glob("model_*.pth")
        named = [path for path in paths if _OF_AN_ITERATION.fullmatch(path.name)]
        return sorted(named, key=_iteration, reverse=True)

    def _tagged(self) -> str | None:
        """The name in ``last_checkpoint``, if any."""
        try:
            text = (Path(self.save_dir) / "last_checkpoint").read_text(errors="replace")
        except FileNotFoundError:
            return None
        return Path(text.strip()).name or None

    def _resumable(self) -> list[Path]:
        final = Path(self.save_dir) / f"{FINAL}.pth"
        return [*self._of_iterations(), *([final] if final.exists() else [])]

    def has_checkpoint(self) -> bool:
        return self._tagged() is not None or bool(self._resumable())

    def _candidates(self) -> Iterator[Path]:
        """The tagged checkpoint, then the others, latest first."""
        tagged = self._tagged()
        if tagged is not None:
            yield Path(self.save_dir) / tagged
        others = [path for path in self._resumable() if path.name != tagged]
        yield from sorted(others, key=_iteration, reverse=True)

    def get_checkpoint_file(self) -> str:
        """The last checkpoint, or with a warning the latest before it that is whole; "" for none.

        Raises:
            RuntimeError: there are checkpoints, and all are damaged.
        """
        damages = {}
        for path in self._candidates():
            problem = damage(path)
            if problem is None:
                break
            damages[path.name] = problem
            logger.warning("%s is damaged (%s): going back to the one before", path, problem)
        else:
            if not damages:
                return ""
            raise RuntimeError(
                f"No checkpoint in {self.save_dir} is whole: "
                f"{'; '.join(f'{name}: {problem}' for name, problem in damages.items())}. Train "
                "anew without --resume, or into another OUTPUT_DIR"
            )
        if self._tagged() is None:
            logger.warning("%s has no last_checkpoint: going on from %s", self.save_dir, path.name)
        return str(path)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As Detectron2's; all processes resume from the main process's file. A fresh start moves
        an earlier training's files away, lest they be resumed from, or overwritten.

        Raises:
            ValueError: the weights are of another model.
        """
        if resume:
            last = comm.all_gather(self.get_checkpoint_file())[0]
            if not all(comm.all_gather(not last or os.path.isfile(last))):
                raise OSError(
                    f"Not every process can read {last}: OUTPUT_DIR has to be on a file system "
                    "that all machines share"
                )
            if last:
                self._whole = True
                return self._noting_images(self.load(last))
        loaded = self._noting_images(self.load(path, checkpointables=[]))
        comm.synchronize()  # all have read the file, which may be moved now
        if self.save_dir and self.save_to_disk:
            self._set_aside()
        return loaded

    def _noting_images(self, loaded: dict) -> dict:
        """What weights have seen before is what they have seen when they are trained on."""
        earlier = loaded.get(training_images.KEY)
        if training_images.are_hashes(earlier):
            self.metadata[training_images.KEY] = earlier
        elif loaded.get("artifact"):
            text = "The weights to go on from do not carry which images they were trained on: the "
            logger.warning(text + "new ones will carry those of this training only")
        return loaded

    def note_images(self, paths: Iterable[str | Path]) -> None:
        """Write into all checkpoints from now on which image files the model was trained on."""
        earlier = self.metadata.get(training_images.KEY, ())
        hashes = training_images.training_hashes(paths)
        self.metadata[training_images.KEY] = sorted({*earlier, *hashes})

    def renew_final(self, iteration: int) -> None:
        """Write a missing or damaged ``model_final.pth``, on resuming after the last iteration."""
        if self.save_to_disk and damage(Path(self.save_dir) / f"{FINAL}.pth"):
            self.save(FINAL, iteration=iteration)

    def _set_aside(self) -> None:
        folder = Path(self.save_dir)
        names = ("model_best.pth", "model_ema.pth", "last_checkpoint")
        earlier = [*self._resumable(), *(folder / name for name in names)]
        earlier = [path for path in earlier if path.exists()]
        if earlier:
            aside = folder / f"{EARLIER}{time.strftime('%Y%m%d-%H%M%S')}"
            aside.mkdir()
            others = [folder / name for name in ("run.json", "inference")]
            for path in (*earlier, *(path for path in others if path.exists())):
                os.replace(path, aside / path.name)
            # What may be of this training stays: Detectron2's default_setup, in scripts that call
            # it, has written the former, and the log of losses is open.
            for path in (folder / "config.yaml", folder / "metrics.json"):
                if path.is_file():
                    shutil.copy2(path, aside / path.name)
            if (log := folder / "metrics.json").is_file():
                os.truncate(log, 0)
            logger.warning(
                "%s had an earlier training: its weights and results are in %s", folder, aside
            )

    def _load_model(self, checkpoint: dict):
        state, source = checkpoint["model"], self._parsed_url_during_load.geturl()
        absent = [name for name in self.checkpointables if name not in checkpoint]
        if self._whole and absent:
            raise ValueError(
                f"{source} holds weights, but not the state of a training ({', '.join(absent)}), "
                "to resume: train anew without --resume, or from it with MODEL.WEIGHTS"
            )
        self._check_form(checkpoint, source)
        detector = not isinstance(self.model, ImageClassifier)
        of_classifier = {"head.weight", "head.bias", "pixel_mean", "pixel_std"} <= state.keys()
        if not self._whole and detector and of_classifier:
            checkpoint["model"] = classifier_backbone(state, self.model, source)
        incompatible = super()._load_model(checkpoint)
        if self._whole:
            _check_whole(incompatible, source)
        else:
            _check_backbone(self.model, incompatible, source)
        for name, tensor in self.model.state_dict().items():
            if tensor.isnan().any():  # the model would detect nothing in any image
                raise ValueError(f"{source}: {name} holds NaN: take an earlier checkpoint")
        return incompatible

    def _check_form(self, checkpoint: dict, source: str) -> None:
        """Names and shapes of a neck's weights do not show its form: checkpoints state it, exports
        have their config, and weights of version 0.1.0 say nothing.
        """
        form, stored = _form(self.model), checkpoint.get("neck_form")
        if not form or not any(name.startswith("backbone.pan_") for name in checkpoint["model"]):
            return
        if stored is None and "config" in checkpoint:
            config = load_config_text(checkpoint["config"], source, ["MODEL.DEVICE", "cpu"])
            stored = config.MODEL.PAFPN.FORM
        if self._whole and stored not in (None, form):
            raise ValueError(
                f"{source}: its neck has MODEL.PAFPN.FORM {stored!r}, and the config's {form!r}. "
                "Give the config that it was trained with (--config-file); `imrcnn predict` takes "
                "the one in the file, where there is one"
            )
        if self._whole and self.checkpointables and stored is None:
            raise ValueError(
                f"{source} is of a training of version 0.1.0, which cannot be resumed: train anew "
                "without --resume, or from it with MODEL.WEIGHTS"
            )
        if form != (stored or "affine"):
            trained = repr(stored) if stored else "'affine' (as of version 0.1.0, unless with ReLU)"
            text = "%s: its neck was trained with MODEL.PAFPN.FORM %s, and is now %r"
            logger.warning(text, source, trained, form)

    def _load_file(self, filename: str):
        if self._content is not None:
            return self._content
        if filename.endswith((".pkl", ".pyth")):
            return load_checkpoint_file(filename)
        return super()._load_file(filename)  # through _torch_load; minds "?matching_heuristics"

    def _torch_load(self, f):
        return load_checkpoint_file(f)


def checkpoint_metadata(dataset: str, config: str | None) -> dict:
    """What the checkpoints of a training say of their model, so that they need nothing else to
    predict with: the class names of its first data set, which is loaded, and its YAML config.
    """
    content = {"artifact": METADATA_VERSION}
    if config is not None:
        content["config"] = config
    classes = list(MetadataCatalog.get(dataset).get("thing_classes", ()))
    if classes and all(map(str.isprintable, classes)):  # others would be refused
        content["classes"] = classes
    return content


@dataclass(frozen=True)
class Weights:
    """A model's checkpoint and its hash, if loaded from a file, and what validation chose, if it
    did: the operating point, of scores that ``score_map`` has mapped where there is one.
    """

    path: str | None = None
    sha256: str | None = None
    operating_point: OperatingPoint | None = None
    score_map: ScoreMap | Temperature | None = None  # of a detector; of a classifier
    model: tuple[str, str] | None = None  # its name and its backbone's
    iterations: int | None = None  # of its training, where its file has the config in iterations
    crop_to_view: bool | None = None  # INPUT.CROP_TO_VIEW of its training, where its file has that
    classes: tuple[str, ...] = ()  # by index, where its file has them

    @classmethod
    def of_file(cls, path: str, metadata: dict, classifies: bool = False) -> "Weights":
        """Of a local file that says these of itself: ``operating_point`` and ``score_map`` are
        absent or None, or dicts of their attributes; BadInputError if they are something else.
        ``classifies``: the model is an image classifier.
        """
        point, score_map = metadata.get("operating_point"), metadata.get("score_map")
        kind = Temperature if classifies else ScoreMap
        return cls(
            path,
            file_sha256(path),
            None if point is None else OperatingPoint.of_file(point, path),
            None if score_map is None else kind.of_file(score_map, path),
        )

    def evaluator_arguments(self) -> dict:
        """What an evaluator's ``for_final_test`` takes; a final evaluation has intervals."""
        meta = {"checkpoint": self.path, "checkpoint_sha256": self.sha256}
        if self.model:
            meta["model"], meta["backbone"] = self.model
        if self.iterations:
            meta["iterations"] = self.iterations
        chosen = {"operating_point": self.operating_point, "score_map": self.score_map}
        return {**chosen, "bootstrap": Bootstrap(), "meta": meta}


def _training(config, source):
    """What `Weights` has of a training, by the YAML config in its weights, if they have one that
    can be read; no iterations where it is of epochs or phases."""
    if not isinstance(config, str):
        return {}
    try:
        cfg = load_config_text(config, source, ["MODEL.DEVICE", "cpu"])
    except ValueError:
        return {}
    in_iterations = not cfg.SOLVER.MAX_EPOCHS and not cfg.SOLVER.PHASES
    iterations = cfg.SOLVER.MAX_ITER if in_iterations else None
    return {"iterations": iterations, "crop_to_view": cfg.INPUT.CROP_TO_VIEW}


def load_weights(checkpointer: Checkpointer, path: str) -> Weights:
    """Load what MODEL.WEIGHTS takes to evaluate it; "" leaves the model as it is."""
    extra = checkpointer.load(path)
    is_classifier = isinstance(checkpointer.model, ImageClassifier)
    return _weights(path, extra, is_classifier) if path else Weights()


def last_weights(checkpointer: Checkpointer, ema=None) -> Weights:
    """Those of a training that has just ended; of its EMA, if any, written to ``model_ema.pth``."""
    if ema is not None:
        metadata = checkpointer.metadata
        Checkpointer(ema.model, checkpointer.save_dir, metadata=metadata).write("model_ema")
    comm.synchronize()  # the main process has written
    path = os.path.join(checkpointer.save_dir, "model_ema.pth" if ema else "model_final.pth")
    return _weights(path, {}) if os.path.isfile(path) else Weights()


def _weights(path: str, metadata: dict, classifies: bool = False) -> Weights:
    local = os.path.abspath(PathManager.get_local_path(find_weights(path)))
    weights, classes = Weights.of_file(local, metadata, classifies), metadata.get("classes")
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        weights = replace(weights, classes=tuple(classes))
    return replace(weights, **_training(metadata.get("config"), local))


def log_test_evaluations(datasets: Iterable[str], output_dir: str, weights: Weights) -> None:
    """Note a final evaluation next to each data set of which it used the test part."""
    if not comm.is_main_process():
        return
    for name in datasets:
        log_test_evaluation(
            MetadataCatalog.get(name).get("json_file"),
            source=weights.path or "a model loaded from no checkpoint",
            sha256=weights.sha256,
            output=os.path.join(output_dir, "inference", name),
        )
