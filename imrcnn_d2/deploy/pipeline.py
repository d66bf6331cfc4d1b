"""From inputs to what is found in them: reading and the network each have a thread of their own."""

import contextlib
import queue
import threading
from dataclasses import dataclass, replace

from torch import Tensor

from imrcnn_d2.data.endoscope_view import View
from imrcnn_d2.data.rejects import BadInputError

from .dicom import may_show_patient
from .identity import signature
from .inputs import Source, read_frames
from .records import records
from .video import Frame

__all__ = ["Item", "ahead", "predictions"]


@dataclass(frozen=True)
class Item:
    """
    A frame on its way, or the end of its input.

    Attributes:
        source (Source): what it is of.
        signature (list[int] or None): of the file when reading began, see :func:`signature`.
        pictures (bool): False if its pixels must not reach an output.
        frame (Frame or None): None at the end of an input.
        view (View or None): what of the frame the network sees; None for all.
        prepared (Tensor or None): what the network sees.
        error (str or None): at the end of an input, why it, or the rest of it, could not be read.
    """

    source: Source
    signature: list | None
    pictures: bool = True
    frame: Frame | None = None
    view: View | None = None
    prepared: Tensor | None = None
    error: str | None = None


def predictions(predictor, sources, batch_size):
    """
    Predict on inputs in turn. While the caller works on what it was given, the network is at the
    next frames and the decoder at those after them: the whole takes as long as the slowest of the
    three. What waits in between does not grow with the inputs.

    Args:
        predictor (Predictor):
        sources (iterable of Source):
        batch_size (int): images that the network sees at once, where they are of one size to it.

    Yields:
        tuple[Item, list[dict] or None]: each frame with what is found in it, see :func:`records`,
        and behind the last frame of an input its end, with None. An input that cannot be read has
        its end alone.
    """
    room = 2 * batch_size
    with (
        contextlib.closing(ahead(_read(sources, predictor), room)) as items,
        contextlib.closing(ahead(predictor.in_batches(items, batch_size), room)) as outputs,
    ):
        for item, output in outputs:
            if item.frame is None:
                yield item, None
            else:
                size = item.frame.image.shape[:2]
                yield item, records(predictor, output, *size, item.view)


def _read(sources, predictor):
    """Yields the items of all sources in turn."""
    for source in sources:
        item = Item(source, signature(source))
        try:
            if source.kind == "dicom":
                item = replace(item, pictures=not may_show_patient(source.path))
            views = predictor.views()
            for frame in read_frames(source):
                view = views(frame.image)
                prepared = predictor.prepare(frame.image, view)
                yield replace(item, frame=frame, view=view, prepared=prepared)
        except BadInputError as error:
            item = replace(item, error=error.reason)
        except ModuleNotFoundError as error:  # of the extra [deploy]
            item = replace(item, error=f"needs {error.name}: pip install {error.name}")
        except Exception as error:  # readers raise nearly anything on damaged files
            # What an unknown error quotes of a DICOM file may be the patient's.
            said = "" if source.kind == "dicom" else f": {error}"
            item = replace(item, error=f"cannot be predicted ({type(error).__name__}{said})")
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
