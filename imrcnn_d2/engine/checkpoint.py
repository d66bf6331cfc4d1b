"""The weights that a final evaluation is of: their file and their operating point."""

import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from imrcnn_d2.evaluation.detection.results import OperatingPoint
from imrcnn_d2.evaluation.output import log_test_evaluation
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.modeling import ImageClassifier
from imrcnn_d2.modeling.timm_backbone import TimmBackbone
from imrcnn_d2.utils.files import atomic_file, file_sha256, write_atomically
from imrcnn_d2.utils.safe_loading import load_checkpoint_file, open_stored

__all__ = [
    "Checkpointer",
    "Weights",
    "classifier_backbone",
    "damage",
    "is_classifier_state",
    "last_weights",
    "load_weights",
    "log_test_evaluations",
]

logger = logging.getLogger(__name__)


_RESNET = (  # timm's names and Detectron2's
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def is_classifier_state(state):
    """
    Args:
        state (dict): a checkpoint's weights.

    Returns:
        bool: whether they are an :class:`ImageClassifier`'s.
    """
    return {"head.weight", "head.bias", "pixel_mean", "pixel_std"} <= state.keys()


def classifier_backbone(state, model, source="the checkpoint"):
    """
    The weights of a classifier's backbone under the names of a detector's ``bottom_up``.

    Args:
        state (dict[str, Tensor]): of an :class:`ImageClassifier`.
        model (nn.Module): a detector whose bottom-up backbone is a :class:`TimmBackbone` or
            Detectron2's ResNet.
        source (str): names the weights in messages.

    Returns:
        dict[str, Tensor]: for ``model.load_state_dict(strict=False)``.

    Raises:
        ValueError: nothing in the backbone is of these names and shapes; or the detector would show
            the backbone other images than it was trained on.
    """
    prefix = "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."
    bottom_up = model.get_submodule(prefix[:-1])
    weights = {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if name.startswith("backbone.")
    }
    if isinstance(bottom_up, TimmBackbone):
        # timm writes blocks.0 or blocks_0, depending on how it takes a model apart.
        def rename(name):
            return name.replace("_", ".")

        names = {rename(name.removeprefix("body.")): name for name in bottom_up.state_dict()}
        named = {names[rename(k)]: (k, v) for k, v in weights.items() if rename(k) in names}
    else:
        named = {_resnet_name(k): (k, v) for k, v in weights.items()}
    wanted = {k: v for k, v in bottom_up.state_dict().items() if "num_batches_tracked" not in k}
    found = {k: v for k, (_, v) in named.items() if k in wanted and v.shape == wanted[k].shape}
    if not found:
        raise ValueError(
            f"{source} is of a classifier, and none of the {len(weights)} tensors of its backbone "
            f"({', '.join(list(weights)[:3])}, ...) fits the detector's "
            f"{type(bottom_up).__name__}: build both on the same network"
        )
    _check_images(state, model, source)
    _check_strides(bottom_up)
    absent = [name for name in wanted if name not in found]
    used = {named[name][0] for name in found}
    unused = [k for k in weights if k not in used and "num_batches_tracked" not in k]
    logger.info(
        "%s is of a classifier: %d of the %d tensors of %s start from its backbone; it leaves out "
        "its head and %d tensors of its backbone: %s",
        source,
        len(found),
        len(wanted),
        prefix[:-1],
        len(unused),
        _some_names(unused),
    )
    if absent:
        logger.warning(
            "%s has nothing, or other shapes, for %d of the %d tensors of %s: %s",
            source,
            len(absent),
            len(wanted),
            prefix[:-1],
            _some_names(absent),
        )
    return {prefix + name: value for name, value in found.items()}


def _resnet_name(name):
    for pattern, replacement in _RESNET:
        name = re.sub(pattern, replacement, name)
    return name


def _some_names(names):
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"


def _check_images(state, model, source):
    own = {key: getattr(model, key).flatten().cpu() for key in ("pixel_mean", "pixel_std")}
    theirs = {key: torch.as_tensor(state[key]).flatten() for key in own}
    if model.input_format == "RGB" and all(
        torch.allclose(own[k], theirs[k], rtol=0, atol=0.1) for k in own
    ):
        return
    mean, std = ([round(value, 3) for value in theirs[key].tolist()] for key in own)
    raise ValueError(
        f"{source} is of a classifier of RGB images with other statistics than this detector's "
        f"{model.input_format} images: set INPUT.FORMAT RGB MODEL.PIXEL_MEAN '{mean}' "
        f"MODEL.PIXEL_STD '{std}'"
    )


def _check_strides(bottom_up):
    if not isinstance(bottom_up, ResNet):
        return
    for block in bottom_up.modules():
        if isinstance(block, BottleneckBlock) and max(block.conv1.stride) > 1:
            raise ValueError(
                "timm's ResNets halve a map in the 3x3 convolution of a block, this detector's in "
                "the 1x1 one before it: set MODEL.RESNETS.STRIDE_IN_1X1 False"
            )


FINAL = "model_final"
_OF_AN_ITERATION = re.compile(r"model_(\d+)\.pth")
# Not to be resumed from, but to be lost when another training begins in the folder.
_RESULTS = ("model_best.pth", "model_ema.pth")
_NAMED_AT_MOST = 3


def damage(path: str | Path) -> str | None:
    """
    Check a checkpoint against the CRC-32 that ``torch.save`` keeps of each of its parts.

    Args:
        path (str or Path): of a ``.pth`` file.

    Returns:
        str or None: what is wrong with it; None if it is whole.
    """
    try:
        with open(path, "rb") as file, open_stored(file) as archive:
            broken = archive.testzip()
            parts = archive.namelist()
    except Exception as error:  # whatever a reader of zips stumbles over in a damaged file
        return str(error) or type(error).__name__
    if broken:
        return f"checksum of {broken} does not fit"
    return None if any("/data/" in name for name in parts) else "it holds no tensors"


def _iteration(path):
    """Of a checkpoint, after which the training stood; -1 of a damaged one."""
    named = _OF_AN_ITERATION.fullmatch(path.name)
    if named:
        return int(named[1])
    return load_checkpoint_file(path).get("iteration", -1) if damage(path) is None else -1


def _check_whole(model, incompatible, source):
    """All weights, and no others: for a model that is evaluated or trained on."""
    reshaped = [key for key, *_ in incompatible.incorrect_shapes]
    wrong = {
        # Detectron2 lists those of another shape among the missing as well.
        "missing": [key for key in incompatible.missing_keys if key not in reshaped],
        "not this model's": incompatible.unexpected_keys,
        "of another shape": reshaped,
    }
    counts = "; ".join(
        f"{len(keys)} {what}, such as {_some(keys)}" for what, keys in wrong.items() if keys
    )
    if counts:
        raise ValueError(
            f"{source}: the weights are of another architecture than the config: {counts}. Give "
            "the config that they were trained with (--config-file)"
        )


def _check_numbers(model, source):
    for name, tensor in model.state_dict().items():
        if tensor.isnan().any():
            raise ValueError(
                f"{source}: {name} holds NaN, of which the model would find nothing anywhere: take "
                "an earlier checkpoint"
            )


def _check_backbone(model, incompatible, source):
    """
    Of weights to start from, heads and a neck may be missing, for they are trained anew; a backbone
    of which a part is left at random is one of another network.
    """
    prefix = ""
    if hasattr(model, "backbone"):
        prefix = "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."
    wanted = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    missing = set(incompatible.missing_keys)
    absent = [name for name in wanted if name in missing]
    if absent and (prefix or len(absent) == len(wanted)):
        raise ValueError(
            f"{source}: the weights are of another model. They have nothing, or other shapes, for "
            f"{len(absent)} of the {len(wanted)} weights of {prefix[:-1] or 'this one'}, such as "
            f"{_some(absent)}; the training would start from random ones. Name weights of the same "
            "backbone, or none (MODEL.WEIGHTS '')"
        )


def _some(names):
    """A few, whatever a file calls its weights."""
    return ", ".join(ascii(name)[1:-1][:200] for name in sorted(names)[:_NAMED_AT_MOST])


class Checkpointer(DetectionCheckpointer):
    """
    DetectionCheckpointer that a kill or a full disk cannot leave without a checkpoint, that loads
    nothing which runs code (:func:`load_checkpoint_file`), and goes back to the checkpoint before
    where the last one is damaged. A classifier's checkpoint starts a detector's backbone, see
    :func:`classifier_backbone`.

    Weights of another model are refused: what is resumed, or is ``whole``, is of exactly this
    model; weights to start from have at least its bottom-up backbone.
    """

    def __init__(
        self, model, save_dir="", *, keep=None, whole=False, save_to_disk=None, **checkpointables
    ):
        """
        Args:
            model, save_dir, save_to_disk, checkpointables: as in ``DetectionCheckpointer``.
            keep (int or None): checkpoints of single iterations to keep, the latest; None: all.
            whole (bool): all weights are loaded, and no others; False: the model is trained on.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._keep = keep
        self._whole = whole

    def load(self, path, checkpointables=None):
        """
        Raises:
            FileNotFoundError: there is no such file.
        """
        try:
            return super().load(path, checkpointables)
        except AssertionError as error:
            raise FileNotFoundError(f"{path}: no such file of weights ({error})") from error

    def save(self, name, **kwargs):
        """
        Write ``<name>.pth``, make it the one to resume from, and delete what is not to be kept.

        Args:
            name (str): without suffix.
            kwargs: further data to store.

        Raises:
            OSError: if it cannot be written; what was there before stays.
        """
        if self.save_dir and self.save_to_disk:
            self.write(name, **kwargs)
            self.tag_last_checkpoint(f"{name}.pth")
            self._delete_old()

    def save_iteration(self, iteration):
        """
        Args:
            iteration (int): after which the training stands; names the file as the periodic
                checkpoint's.
        """
        self.save(f"model_{iteration:07d}", iteration=iteration)

    def write(self, name, **kwargs):
        """As :meth:`save`, for a file that is not to be resumed from."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {
            "model": self.model.state_dict(),
            **{key: value.state_dict() for key, value in self.checkpointables.items()},
            **kwargs,
        }
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_file(path) as file:
                torch.save(data, file)
        except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
            free = shutil.disk_usage(self.save_dir).free / 2**20
            raise OSError(
                f"{path} could not be written ({error.__context__ or error}; {free:.0f} MiB are "
                "free there). The checkpoint before it is whole: make room, then go on with "
                "--resume"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename):
        write_atomically(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _delete_old(self):
        if self._keep is not None:
            tagged = self._tagged()
            for path in self._of_iterations()[self._keep :]:
                if path.name != tagged:
                    path.unlink()

    def _of_iterations(self):
        """Latest first."""
        paths = Path(self.save_dir).glob("model_*.pth")
        found = [path for path in paths if _OF_AN_ITERATION.fullmatch(path.name)]
        return sorted(found, key=_iteration, reverse=True)

    def _tagged(self):
        """Name of the file that ``last_checkpoint`` names; None where it does not."""
        try:
            text = (Path(self.save_dir) / "last_checkpoint").read_text(errors="replace")
        except FileNotFoundError:
            return None
        return Path(text.strip()).name or None

    def _resumable(self):
        """Paths of what can be resumed from, in no order."""
        final = Path(self.save_dir) / f"{FINAL}.pth"
        return [*self._of_iterations(), *([final] if final.exists() else [])]

    def has_checkpoint(self) -> bool:
        return self._tagged() is not None or bool(self._resumable())

    def _candidates(self):
        """Yields paths: of the checkpoint that is tagged as the last one, then of the others."""
        tagged = self._tagged()
        if tagged is not None:
            yield Path(self.save_dir) / tagged
        others = [path for path in self._resumable() if path.name != tagged]
        yield from sorted(others, key=_iteration, reverse=True)

    def get_checkpoint_file(self):
        """
        Returns:
            str: the checkpoint to resume from: the last one, or the latest before it that is whole,
                with a warning; "" if there is none.

        Raises:
            RuntimeError: if there are checkpoints and all are damaged.
        """
        found = {}
        for path in self._candidates():
            found[path] = damage(path)
            if found[path] is None:
                break
            logger.warning("%s is damaged (%s): going back to the one before", path, found[path])
        else:
            if not found:
                return ""
            raise RuntimeError(
                f"No checkpoint in {self.save_dir} is whole: "
                + "; ".join(f"{path.name}: {what}" for path, what in found.items())
                + ". Train anew without --resume, or into another OUTPUT_DIR"
            )
        if self._tagged() is None:
            logger.warning("%s has no last_checkpoint: going on from %s", self.save_dir, path.name)
        return str(path)

    def resume_or_load(self, path, *, resume=True):
        """
        As Detectron2's; all processes resume from the file that the main process found. A training
        that starts anew puts the checkpoints of an earlier one in the same folder aside, lest it be
        resumed from them later, or write over them.

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
                return self.load(last)
        loaded = self.load(path, checkpointables=[])
        comm.synchronize()  # all have read the file, which may be one of those
        if self.save_dir and self.save_to_disk:
            self._set_aside()
        return loaded

    def renew_final(self, iteration: int) -> None:
        """
        Write ``model_final.pth`` where it is missing or damaged, for a training that was resumed
        after its last iteration: no other is left that would write it.

        Args:
            iteration (int): the last one.
        """
        if self.save_to_disk and damage(Path(self.save_dir) / f"{FINAL}.pth"):
            self.save(FINAL, iteration=iteration)

    def _set_aside(self):
        folder = Path(self.save_dir)
        earlier = [*self._resumable(), *(folder / n for n in (*_RESULTS, "last_checkpoint"))]
        earlier = [path for path in earlier if path.exists()]
        if not earlier:
            return
        aside = folder / f"earlier_{time.strftime('%Y%m%d-%H%M%S')}"
        aside.mkdir()
        for path in earlier:
            os.replace(path, aside / path.name)
        logger.warning("%s had the checkpoints of an earlier training: now in %s", folder, aside)

    def _load_model(self, checkpoint):
        state, source = checkpoint["model"], self._parsed_url_during_load.geturl()
        absent = [name for name in self.checkpointables if name not in checkpoint]
        if self._whole and absent:
            raise ValueError(
                f"{source} holds weights, but not the state of a training ({', '.join(absent)}): "
                "nothing can be resumed from it. Train anew without --resume, from it if wanted: "
                "MODEL.WEIGHTS"
            )
        detector = not isinstance(self.model, ImageClassifier)
        if not self._whole and detector and is_classifier_state(state):
            checkpoint["model"] = classifier_backbone(state, self.model, source)
        incompatible = super()._load_model(checkpoint)
        if self._whole:
            _check_whole(self.model, incompatible, source)
        else:
            _check_backbone(self.model, incompatible, source)
        _check_numbers(self.model, source)
        return incompatible

    def _load_file(self, filename):
        if filename.endswith((".pkl", ".pyth")):
            return load_checkpoint_file(filename)
        return super()._load_file(filename)  # through _torch_load; minds "?matching_heuristics"

    def _torch_load(self, f):
        return load_checkpoint_file(f)


@dataclass(frozen=True)
class Weights:
    """
    Attributes:
        path (str or None): checkpoint; None for a model that was loaded from no file.
        sha256 (str or None): of that file.
        operating_point (OperatingPoint or None): chosen on the validation set when the checkpoint
            was written; None where it has none.
    """

    path: str | None = None
    sha256: str | None = None
    operating_point: OperatingPoint | None = None

    def evaluator_arguments(self):
        """dict: what ``LesionEvaluator`` takes for a final evaluation: figures with intervals."""
        return {"operating_point": self.operating_point, **self.classification_arguments()}

    def classification_arguments(self):
        """dict: what ``ClassificationEvaluator`` takes for a final evaluation."""
        return {
            "bootstrap": Bootstrap(),
            "meta": {"checkpoint": self.path, "checkpoint_sha256": self.sha256},
        }


def load_weights(checkpointer, path):
    """
    Load a checkpoint's weights into the model to be evaluated.

    Args:
        checkpointer (Checkpointer): of the model.
        path (str): a file, or a URL that Detectron2 knows; "" leaves the model as it is.

    Returns:
        Weights:
    """
    extra = checkpointer.load(path)
    if not path:
        return Weights()
    point = extra.get("operating_point")
    return _weights(path, None if point is None else OperatingPoint.of_file(point, path))


def last_weights(checkpointer, ema=None):
    """
    Args:
        checkpointer (Checkpointer): of a training that has just ended.
        ema (EMA or None): whose averaged weights are the training's result where there is one;
            they are written to ``model_ema.pth``.

    Returns:
        Weights: those of the last iteration, which the model has; without an operating point.
    """
    if ema is not None:
        Checkpointer(ema.model, checkpointer.save_dir).write("model_ema")
    comm.synchronize()  # the main process has written
    path = os.path.join(checkpointer.save_dir, "model_ema.pth" if ema else "model_final.pth")
    return _weights(path) if os.path.isfile(path) else Weights()


def _weights(path, operating_point=None):
    local = os.path.abspath(PathManager.get_local_path(path))
    return Weights(local, file_sha256(local), operating_point)


def log_test_evaluations(datasets, output_dir, weights):
    """
    Note a final evaluation beside each data set whose test part it looked at; on the main process.

    Args:
        datasets (iterable of str): names of the sets evaluated.
        output_dir (str): OUTPUT_DIR.
        weights (Weights): what was evaluated.
    """
    if not comm.is_main_process():
        return
    for name in datasets:
        log_test_evaluation(
            MetadataCatalog.get(name).get("json_file"),
            what=weights.path or "a model loaded from no checkpoint",
            sha256=weights.sha256,
            output=os.path.join(output_dir, "inference", name),
        )
