"""The weights that a final evaluation is of: their file and their operating point."""

import os
from dataclasses import dataclass

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from imrcnn_d2.evaluation.bootstrap import Bootstrap
from imrcnn_d2.evaluation.files import file_sha256
from imrcnn_d2.evaluation.operating_point import OperatingPoint
from imrcnn_d2.evaluation.test_log import log_test_evaluation

from .checkpoint import Checkpointer

__all__ = ["Weights", "last_weights", "load_weights", "log_test_evaluations"]


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
        return {"operating_point": self.operating_point, **self.recognition_arguments()}

    def recognition_arguments(self):
        """dict: what ``RecognitionEvaluator`` takes for a final evaluation."""
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
