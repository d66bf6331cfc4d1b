"""A camera or a stream: always the newest frame; older ones are dropped rather than queued."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from imrcnn_d2.deploy import outputs
from imrcnn_d2.deploy.batch import Journal
from imrcnn_d2.deploy.inputs import Frame, VideoWriter, open_video, upright
from imrcnn_d2.deploy.predictor import Predictor
from imrcnn_d2.evaluation.alarms import Alarms
from imrcnn_d2.utils.files import BadInputError, write_atomically
from imrcnn_d2.utils.progress import tqdm

LIVE_VIDEO, LIVE_REPORT = "live.mp4", "live.json"
PERCENTILES = (50, 95, 99)
_TIME_BASE = Fraction(1, 1000)
_NO_DELAY = {"fflags": "nobuffer", "flags": "low_delay"}
_REMOTE = {"protocol_blacklist": "file"}  # a playlist from elsewhere names no file of this machine
_PATIENCE = 10.0  # seconds without a frame after which a stream has ended


class LiveFrames:
    """Frames of a device such as "/dev/video0", a URL that FFmpeg knows, or a video file, played at
    its speed, decoded in another thread. Iterating gives the newest frame that has not been given
    yet and waits if there is none. ``received`` and ``dropped`` count frames; ``error`` says why
    the stream ended, if not by itself; ``pixel_aspect`` is of the last frame that was given.

    Raises:
        BadInputError: the source cannot be opened, is something else, or has no video.
    """

    def __init__(self, source: str):
        import av  # of the extra [deploy]

        source = str(source)
        self._paced = os.path.isfile(source)
        try:
            self._container = open_video(source, source) if self._paced else _open_stream(source)
        except (av.error.FFmpegError, OSError) as error:
            raise BadInputError(source, f"cannot be opened ({error.strerror})") from error
        if not self._container.streams.video:
            raise BadInputError(source, "holds no video")
        self.received = self.dropped = 0
        self.error = self.pixel_aspect = None
        self._newest, self._ended, self._stopped = None, False, threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._receive, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.stop()
        self._thread.join()
        self._container.close()

    def stop(self):
        """Give no more frames. A signal handler may call it."""
        self._stopped.set()

    def _receive(self):
        import av

        started = None
        try:
            for frame in self._container.decode(video=0):
                if self._paced and frame.time is not None:
                    started = started or time.perf_counter() - frame.time
                    self._stopped.wait(max(0, started + frame.time - time.perf_counter()))
                if self._stopped.is_set():
                    return
                with self._changed:
                    self.dropped += self._newest is not None
                    self._newest = frame, self.received, time.perf_counter()
                    self.received += 1
                    self._changed.notify()
        except (av.error.FFmpegError, OSError) as error:
            self.error = f"the stream broke off ({error.strerror})"
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()

    def __iter__(self) -> Iterator[tuple[np.ndarray, int, float]]:
        """Yields (H, W, 3) RGB, uint8; the frame's number from 0; and its ``perf_counter()``."""
        while True:
            with self._changed:
                # A signal handler must not take the lock to say that it is over.
                while self._newest is None and not self._ended and not self._stopped.is_set():
                    self._changed.wait(0.1)
                if self._newest is None or self._stopped.is_set():
                    return
                (frame, number, arrived), self._newest = self._newest, None
            image, self.pixel_aspect = upright(self._container.streams.video[0], frame)
            yield image, number, arrived


def _open_stream(source):
    """The container of a camera or URL. A pipe, which would block, is neither."""
    import av

    device = source.startswith("/dev/video")
    if not device and os.path.exists(source):
        raise BadInputError(source, "is no video file, camera or URL")
    options = _NO_DELAY | (_REMOTE if ":" in source else {})
    return av.open(source, format="v4l2" if device else None, options=options, timeout=_PATIENCE)


def predict_live(
    predictor: Predictor,
    source: str,
    output: str | Path,
    *,
    show: Callable[[np.ndarray], None] | None = None,
) -> dict:
    """Predicts on the newest frame of a source of `LiveFrames` until it ends or Ctrl-C is pressed:
    that, or SIGTERM, lets the current frame be finished, a second one does not. ``show`` is called
    with each overlay. Writes ``live.mp4``, the tables of `Journal.write_tables`, and ``live.json``,
    whose content is returned, with percentiles of the time from a frame, decoded, to its overlay.
    An error of the network or of ``show`` is raised once the frames before it are in these files.

    Raises:
        BadInputError: the source cannot be opened, or gave no frame.
        ValueError: the folder has the results of another run.
    """
    output = Path(output)
    if (output / Journal.FILE).exists():
        raise ValueError(f"{output} holds the results of another run. Choose another --output")
    metadata = predictor.metadata
    run = {**metadata, "classes": predictor.classes, "live": True}
    latencies = []
    # The first call sets up kernels: not while a frame waits.
    predictor.forward([predictor.prepare(np.zeros((256, 256, 3), np.uint8))])
    with (
        LiveFrames(source) as frames,
        _first_interrupt_calls(frames.stop),
        contextlib.closing(Journal(output, run, (LIVE_VIDEO, LIVE_REPORT))) as journal,
    ):
        try:
            failure = _predict(predictor, frames, output / LIVE_VIDEO, journal, latencies, show)
        finally:
            if not latencies:  # no results that another run could harm
                (output / Journal.FILE).unlink()
        if not latencies:
            raise failure or BadInputError(source, frames.error or "gave no frame")
        ended = frames.error if failure is None else f"{type(failure).__name__}: {failure}"
        journal.finish(LIVE_VIDEO, None, len(latencies), ended, None)
        journal.write_tables(metadata, predictor.classes)
        received, predicted = frames.received, len(latencies)  # the first may still grow
        milliseconds = (1000 * np.percentile(latencies, PERCENTILES)).tolist()
        latency = zip(PERCENTILES, milliseconds, strict=True)
        report = {
            "received": received,
            "predicted": predicted,
            "dropped": received - predicted,
            "dropped_percent": round(100 * (received - predicted) / received, 2),
            "latency_ms": {f"p{p}": round(ms, 1) for p, ms in latency},
            "error": ended,
            "about": metadata,
        }
        write_atomically(output / LIVE_REPORT, json.dumps(report, indent=2) + "\n")
    if failure is not None:
        raise failure
    return report


@contextlib.contextmanager
def _first_interrupt_calls(stop):
    """The first Ctrl-C or SIGTERM within calls ``stop``; the next has its default effect."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        defaults = {}  # signals do not come here
    # Those that someone else handles, or ignores, are theirs.
    ours = {number: to for number, to in defaults.items() if signal.getsignal(number) is to}

    def restore():
        for number, default in ours.items():
            signal.signal(number, default)

    def handle(*_):
        restore()
        stop()

    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def _predict(predictor, frames, path, journal, latencies, show):
    """Predict until the frames end; returns the error of the network or of ``show`` that did so."""
    metadata, first, views = predictor.metadata, None, predictor.views()
    alarms = Alarms(predictor.alarm_rule) if predictor.alarm_rule else None
    with (
        VideoWriter(path, time_base=_TIME_BASE, comment=outputs.comment(metadata)) as video,
        tqdm(desc="Live", unit="image") as bar,
        contextlib.suppress(KeyboardInterrupt),  # the second one: finished frames are kept
    ):
        for image, _, arrived in frames:
            first = arrived if first is None else first
            try:
                view = views(image)
                (prediction,) = predictor.forward([predictor.prepare(image, view)])
                annotations = outputs.records(predictor, prediction, *image.shape[:2], view)
                if alarms is not None:
                    alarms.annotate(annotations, arrived)
                shown = outputs.above_threshold(annotations, predictor.tau)
                overlay = outputs.draw_overlay(
                    image, shown, predictor.classes, outputs.footer(metadata)
                )
                if show is not None:
                    show(overlay)
            except Exception as error:  # such as of the GPU, or of `show`
                return error
            latency = time.perf_counter() - arrived
            seconds = Fraction(round(1000 * (arrived - first)), 1000)
            video.write(overlay, seconds, frames.pixel_aspect)
            frame = Frame(image, len(latencies), seconds, view=view)  # numbered as in the video
            journal.add(outputs.frame_record(path.name, frame), annotations)
            latencies.append(latency)  # once the frame is written
            bar.set_postfix(ms=round(1000 * latency), dropped=frames.dropped)
            bar.update()
    return None
