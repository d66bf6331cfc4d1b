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
from tqdm import tqdm

from imrcnn_d2.deploy.batch import Journal
from imrcnn_d2.deploy.inputs import Frame, VideoWriter, open_video, pixel_aspect, upright
from imrcnn_d2.deploy.outputs import (
    above_threshold,
    comment,
    draw_overlay,
    footer,
    frame_record,
    records,
)
from imrcnn_d2.deploy.predictor import Predictor
from imrcnn_d2.utils.files import BadInputError, write_atomically

__all__ = ["LIVE_REPORT", "LIVE_VIDEO", "LiveFrames", "predict_live"]


LIVE_VIDEO, LIVE_REPORT = "live.mp4", "live.json"
PERCENTILES = (50, 95, 99)
_TIME_BASE = Fraction(1, 1000)
_NO_DELAY = {"fflags": "nobuffer", "flags": "low_delay"}
_REMOTE = {"protocol_blacklist": "file"}  # a playlist from elsewhere names no file of this machine
_PATIENCE = 10.0  # seconds without a frame after which a stream has ended


class LiveFrames:
    """
    Frames of a device or stream as they come, decoded in another thread.

    Iterating gives the newest frame that has not been given yet and waits if there is none, up to
    the stream's end. A file is played at the speed of its frame times, as a camera would.

    Attributes:
        received: frames decoded so far.
        dropped: frames that a newer one replaced before they were given.
        error: why the stream ended, if not by itself.
        pixel_aspect: of the last frame that was given, see `Frame`.
    """

    def __init__(self, source: str):
        """
        Args:
            source: a device such as "/dev/video0", a URL that FFmpeg knows, or a video file.

        Raises:
            BadInputError: it cannot be opened, is something else, or has no video.
        """
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
        """
        Yields (H, W, 3) RGB, uint8; the frame's number from 0; and ``time.perf_counter()`` when it
        came in.
        """
        while True:
            with self._changed:
                # A signal handler must not take the lock to say that it is over.
                while self._newest is None and not self._ended and not self._stopped.is_set():
                    self._changed.wait(0.1)
                if self._newest is None or self._stopped.is_set():
                    return
                (frame, number, arrived), self._newest = self._newest, None
            self.pixel_aspect = pixel_aspect(self._container.streams.video[0], frame)
            yield upright(frame), number, arrived


def _open_stream(source):
    """The container of a camera or URL. A pipe, which would block, is neither."""
    import av

    device = source.startswith("/dev/video")
    if not device and os.path.exists(source):
        raise BadInputError(source, "is no video file, camera or URL")
    return av.open(
        source,
        format="v4l2" if device else None,
        options=_NO_DELAY | (_REMOTE if ":" in source else {}),
        timeout=_PATIENCE,
    )


def predict_live(
    predictor: Predictor,
    source: str,
    output: str | Path,
    *,
    show: Callable[[np.ndarray], None] | None = None,
) -> dict:
    """
    Predicts on the newest frame of a device or stream until it ends or Ctrl-C is pressed: that lets
    the current frame be finished, a second one does not.

    Writes the overlays (``live.mp4``), the tables of `Journal.write_tables`, and ``live.json``.

    Args:
        source: see `LiveFrames`.
        output: folder, without the results of another run.
        show: is called with each overlay, (H, W, 3) RGB, at once.

    Returns:
        The content of ``live.json``: ``received``, ``predicted`` and ``dropped`` frames,
        ``dropped_percent``; ``latency_ms``, the percentiles "p50", "p95" and "p99" of the time from
        a frame's arrival, decoded, to its overlay; ``error``; and ``about``, the predictor's
        metadata.

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
            _predict(predictor, frames, output, journal, latencies, show)
        finally:
            if not latencies:  # no results that another run could harm
                (output / Journal.FILE).unlink()
        if not latencies:
            raise BadInputError(source, frames.error or "gave no frame")
        journal.finish(LIVE_VIDEO, None, len(latencies), frames.error)
        journal.write_tables(metadata, predictor.classes)
        report = _report(frames, latencies, metadata)
        write_atomically(output / LIVE_REPORT, json.dumps(report, indent=2) + "\n")
    return report


@contextlib.contextmanager
def _first_interrupt_calls(stop):
    """The first Ctrl-C within calls ``stop``; the next raises KeyboardInterrupt."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # Ctrl-C does not come here
        return

    def handle(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _predict(predictor, frames, output, journal, latencies, show):
    metadata, first, views = predictor.metadata, None, predictor.views()
    path = output / LIVE_VIDEO
    with (
        VideoWriter(path, time_base=_TIME_BASE, comment=comment(metadata)) as video,
        tqdm(desc="Live", unit="image") as bar,
        contextlib.suppress(KeyboardInterrupt),  # the second one: finished frames are kept
    ):
        for image, number, arrived in frames:
            first = arrived if first is None else first
            view = views(image)
            (prediction,) = predictor.forward([predictor.prepare(image, view)])
            annotations = records(predictor, prediction, *image.shape[:2], view)
            shown = above_threshold(annotations, predictor.tau)
            overlay = draw_overlay(image, shown, predictor.classes, footer(metadata))
            if show is not None:
                show(overlay)
            latency = time.perf_counter() - arrived
            seconds = Fraction(round(1000 * (arrived - first)), 1000)
            video.write(overlay, seconds, frames.pixel_aspect)
            frame = Frame(image, number, seconds, view=view)
            journal.add(frame_record(LIVE_VIDEO, frame), annotations)
            latencies.append(latency)  # once the frame is written
            bar.set_postfix(ms=round(1000 * latency), dropped=frames.dropped)
            bar.update()


def _report(frames, latencies, metadata):
    values = np.percentile(latencies, PERCENTILES) * 1000
    received = frames.received  # which may still grow
    dropped = received - len(latencies)
    return {
        "received": received,
        "predicted": len(latencies),
        "dropped": dropped,
        "dropped_percent": round(100 * dropped / received, 2),
        "latency_ms": {
            f"p{p}": round(float(v), 1) for p, v in zip(PERCENTILES, values, strict=True)
        },
        "error": frames.error,
        "about": metadata,
    }
