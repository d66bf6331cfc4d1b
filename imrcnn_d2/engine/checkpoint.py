"""Checkpoints that are whole or absent."""

import logging
import os
import re
import shutil
import time
import zipfile
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from imrcnn_d2.evaluation.files import atomic_file, write_atomically
from imrcnn_d2.modeling import ImageClassifier
from imrcnn_d2.modeling.transfer import classifier_backbone, is_classifier_state

from .safe_loading import load_checkpoint_file

__all__ = ["Checkpointer", "damage"]

logger = logging.getLogger(__name__)

_OF_AN_ITERATION = re.compile(r"model_\d+\.pth")


def damage(path):
    """
    Check a checkpoint against the CRC-32 that ``torch.save`` keeps of each of its parts.

    Args:
        path (str or Path): of a ``.pth`` file.

    Returns:
        str or None: what is wrong with it; None if it is whole.
    """
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return str(error)
    return f"checksum of {broken} does not fit" if broken else None


class Checkpointer(DetectionCheckpointer):
    """
    DetectionCheckpointer that a kill or a full disk cannot leave without a checkpoint, that loads
    nothing which runs code (:func:`load_checkpoint_file`), and goes back to the checkpoint before
    where the last one is damaged. A classifier's checkpoint starts a detector's backbone, see
    :func:`classifier_backbone`.
    """

    def __init__(self, model, save_dir="", *, keep=None, save_to_disk=None, **checkpointables):
        """
        Args:
            model, save_dir, save_to_disk, checkpointables: as in ``DetectionCheckpointer``.
            keep (int or None): checkpoints of single iterations to keep, the latest; None: all.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._keep = keep

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
        return sorted((p for p in paths if _OF_AN_ITERATION.fullmatch(p.name)), reverse=True)

    def _tagged(self):
        try:
            return (Path(self.save_dir) / "last_checkpoint").read_text().strip()
        except FileNotFoundError:
            return None

    def get_checkpoint_file(self):
        """
        Returns:
            str: the checkpoint to resume from: the last one, or the latest before it that is whole,
                with a warning; "" if there is none.

        Raises:
            RuntimeError: if there are checkpoints and all are damaged.
        """
        tagged = self._tagged()
        if tagged is None:
            return ""
        last = Path(self.save_dir) / tagged
        candidates = [last, *(path for path in self._of_iterations() if path != last)]
        found = {}
        for path in candidates:
            found[path] = damage(path)
            if found[path] is None:
                break
            logger.warning("%s is damaged (%s): going back to the one before", path, found[path])
        else:
            raise RuntimeError(
                f"No checkpoint in {self.save_dir} is whole: "
                + "; ".join(f"{path.name}: {what}" for path, what in found.items())
                + ". Train anew without --resume, or into another OUTPUT_DIR"
            )
        return str(path)

    def resume_or_load(self, path, *, resume=True):
        """
        As Detectron2's; all processes resume from the file that the main process found. A training
        that starts anew puts the checkpoints of an earlier one in the same folder aside, lest it be
        resumed from them later.
        """
        if resume:
            last = comm.all_gather(self.get_checkpoint_file())[0]
            if not all(comm.all_gather(not last or os.path.isfile(last))):
                raise OSError(
                    f"Not every process can read {last}: OUTPUT_DIR has to be on a file system "
                    "that all machines share"
                )
            if last:
                return self.load(last)
        elif self.save_dir and self.save_to_disk:
            self._set_aside()
        return self.load(path, checkpointables=[])

    def _set_aside(self):
        folder = Path(self.save_dir)
        earlier = [*self._of_iterations(), folder / "model_final.pth", folder / "last_checkpoint"]
        earlier = [path for path in earlier if path.exists()]
        if not earlier:
            return
        aside = folder / f"earlier_{time.strftime('%Y%m%d-%H%M%S')}"
        aside.mkdir()
        for path in earlier:
            os.replace(path, aside / path.name)
        logger.warning("%s had the checkpoints of an earlier training: now in %s", folder, aside)

    def _load_model(self, checkpoint):
        state = checkpoint["model"]
        if is_classifier_state(state) and not isinstance(self.model, ImageClassifier):
            source = self._parsed_url_during_load.geturl()
            checkpoint["model"] = classifier_backbone(state, self.model, source)
        return super()._load_model(checkpoint)

    def _load_file(self, filename):
        if filename.endswith((".pkl", ".pyth")):
            return load_checkpoint_file(filename)
        return super()._load_file(filename)  # through _torch_load; minds "?matching_heuristics"

    def _torch_load(self, f):
        return load_checkpoint_file(f)
