"""Many inputs, one after the other: what fails is listed, what is done is not done again."""

import contextlib
import hashlib
import logging
import queue
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from imrcnn_d2.data.endoscope_view import View
from imrcnn_d2.data.rejects import BadInputError

from .dicom import may_show_patient, public_name
from .inputs import Source, find_inputs, read_frames
from .journal import Journal, signature
from .outputs import InputOutputs, OutputFolder
from .records import frame_record, records
from .video import Frame

__all__ = ["Summary", "ahead", "predict_files"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """
    Attributes:
        images (int): images and frames predicted now.
        skipped (int): inputs that an earlier call had done.
        failed (list[tuple[str, str]]): name and reason of each input that could not be read, or not
            to its end.
    """

    images: int
    skipped: int
    failed: list


def predict_files(predictor, inputs, output, *, save=(), batch_size=1):
    """
    Predict on images, videos and DICOM files, and write the tables of :meth:`Journal.write_tables`
    and what else is wished. An input that cannot be read is listed and the others go on. Called
    again with the same output, it goes on where it was interrupted.

    Args:
        predictor (Predictor):
        inputs (list[str or Path]): see :func:`find_inputs`.
        output (str or Path): folder; made if it does not exist.
        save (iterable of str): of ``OUTPUTS``.
        batch_size (int): images that the network sees at once, where they are of one size to it.

    Returns:
        Summary:

    Raises:
        FileNotFoundError: there is no such input.
        ValueError: the folder has the results of another run; or masks are asked for of a model
            that gives none.
        OSError: something cannot be written. What is done stays done.
    """
    if "masks" in save and not predictor.outlines:
        raise ValueError(f"{predictor.about['model']} outlines nothing: it gives no masks")
    output = Path(output)
    root, sources = find_inputs(inputs)
    run = {
        **predictor.about,
        "runtime": predictor.asked_runtime,  # "auto" may find another the next time
        "classes": predictor.classes,
        "outputs": sorted(save),
        # Names are relative to it; in itself it may hold a patient's.
        "inputs": hashlib.sha256(str(root).encode()).hexdigest()[:16],
    }
    with contextlib.closing(Journal(output, run)) as journal:
        todo = [source for source in sources if not journal.is_done(source)]
        names = [source.name for source in sources]
        to = OutputFolder(output, save, predictor.about, predictor.classes, names)
        images = _predict(predictor, todo, to, journal, batch_size)
        journal.write_tables(predictor.about, predictor.classes)
        return Summary(images, len(sources) - len(todo), journal.failed())


def _predict(predictor, sources, to, journal, batch_size):
    """Number of images predicted."""
    stills = all(source.kind == "image" for source in sources)
    items = ahead(_read(sources, predictor), 2 * batch_size)
    number = images = 0
    with (
        contextlib.closing(items),
        contextlib.ExitStack() as files,
        tqdm(desc="Predicting", unit="image", total=len(sources) if stills else None) as bar,
    ):
        for item, prediction in predictor.in_batches(items, batch_size):
            if item.frame is not None:
                if not number:
                    opened = files.enter_context(
                        InputOutputs(to, item.source, item.name, pictures=item.pictures)
                    )
                size = item.frame.image.shape[:2]
                found = records(predictor, prediction, *size, item.view)
                opened.add(item.frame, found)
                journal.add(frame_record(item.name, item.frame, item.view), found)
                number += 1
                bar.update()
                continue
            files.close()  # its files are whole before it is noted as done
            journal.finish(item.source, item.name, item.signature, number, item.error)
            if item.error:
                tqdm.write(f"{item.name}: {item.error}")
            images, number = images + number, 0
    return images


@dataclass(frozen=True)
class _Item:
    """A frame on its way, or the end of its input."""

    source: Source
    name: str
    signature: list | None
    pictures: bool = True
    frame: Frame | None = None
    view: View | None = None
    prepared: Tensor | None = None
    error: str | None = None


def _read(sources, predictor):
    """Yields the items of all sources in turn."""
    for source in sources:
        item = _Item(source, source.name, signature(source))
        try:
            if source.kind == "dicom":
                item = replace(
                    item,
                    name=public_name(source.path, source.name),
                    pictures=not may_show_patient(source.path),
                )
            views = predictor.views()
            for frame in read_frames(source):
                view = views(frame.image)
                prepared = predictor.prepare(frame.image, view)
                yield replace(item, frame=frame, view=view, prepared=prepared)
        except BadInputError as error:
            item = replace(item, error=error.reason)
        except ModuleNotFoundError as error:  # of the extra [deploy]
            item = replace(item, error=f"needs {error.name}: pip install {error.name}")
        except (OSError, RuntimeError, ValueError) as error:
            item = replace(item, error=f"cannot be predicted ({error})")
        yield item


def ahead(items, number):
    """
    Make items in a thread of their own, while those before are worked on.

    Args:
        items (iterable):
        number (int): of them that may wait.

    Yields:
        what ``items`` yields; what it raises is raised here.
    """
    waiting, end, stop = queue.Queue(number), object(), threading.Event()

    def put(item):
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return waiting.put(item, timeout=0.1)

    def work():
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()
