"""A camera or a stream: always the newest frame; older ones are dropped rather than queued."""

import contextlib
import json
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.evaluation.files import write_atomically

from .inputs import Source
from .journal import Journal
from .outputs import footer
from .overlay import draw_overlay
from .records import counted, frame_record, records
from .video import Frame, VideoWriter, upright

__all__ = ["LIVE_REPORT", "LIVE_VIDEO", "LiveFrames", "predict_live"]

LIVE_VIDEO, LIVE_REPORT = "live.mp4", "live.json"
PERCENTILES = (50, 95, 99)
_TIME_BASE = Fraction(1, 1000)
_NO_DELAY = {"fflags": "nobuffer", "flags": "low_delay"}
_PATIENCE = 10.0  # seconds without a frame after which a stream has ended


class LiveFrames:
    """
    Frames of a device or stream as they come, decoded in a thread of their own.

    Iterating gives the newest frame that has not been given yet and waits where there is none, up
    to the stream's end. A file is played at the speed of its frame times, as a camera would.

    Attributes:
        received (int): frames decoded so far.
        dropped (int): of these, the ones that a newer frame came before.
        error (str or None): why the stream ended, if not by itself.
    """

    def __init__(self, source):
        """
        Args:
            source (str): a device such as "/dev/video0", a URL that FFmpeg knows, or a video file.

        Raises:
            BadInputError: it cannot be opened, or has no video.
        """
        import av  # of the extra [deploy]

        device = str(source).startswith("/dev/video")
        self._paced = Path(source).is_file()
        try:
            self._container = av.open(
                str(source),
                format="v4l2" if device else None,
                options={} if self._paced else _NO_DELAY,
                timeout=_PATIENCE,
            )
        except (av.error.FFmpegError, OSError) as error:
            raise BadInputError(source, f"cannot be opened ({error.strerror})") from error
        if not self._container.streams.video:
            raise BadInputError(source, "holds no video")
        self.received = self.dropped = 0
        self.error = None
        self._newest, self._ended, self._stop = None, False, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._receive, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop = True
        self._thread.join()
        self._container.close()

    def _receive(self):
        import av

        started = None
        try:
            for frame in self._container.decode(video=0):
                if self._paced and frame.time is not None:
                    started = started or time.perf_counter() - frame.time
                    time.sleep(max(0, started + frame.time - time.perf_counter()))
                with self._changed:
                    if self._stop:
                        return
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

    def __iter__(self):
        """
        Yields:
            tuple[np.ndarray, int, float]: (H, W, 3) RGB, uint8; the frame's number from 0; and
            ``time.perf_counter()`` when it came in.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._ended)
                if self._newest is None:
                    return
                (frame, number, arrived), self._newest = self._newest, None
            yield upright(frame), number, arrived


def predict_live(predictor, source, output, *, show=None):
    """
    Predict on the newest frame of a device or stream until it ends or Ctrl-C is pressed.

    Writes the frames with outlines (``live.mp4``), the tables of :meth:`Journal.write_tables`, and
    ``live.json``.

    Args:
        predictor (Predictor):
        source (str): see :class:`LiveFrames`.
        output (Path): folder, without the results of another run.
        show (callable or None): is called with each overlay, (H, W, 3) RGB, as soon as it is there.

    Returns:
        dict: what ``live.json`` holds: ``received``, ``predicted`` and ``dropped`` frames,
        ``dropped_percent``; ``latency_ms``, the percentiles "p50", "p95" and "p99" of the time from
        a frame's arrival, decoded, to its overlay; ``error``; and ``about`` of the predictor.

    Raises:
        BadInputError: the source cannot be opened, or gave no frame.
        ValueError: the folder has the results of another run.
    """
    output = Path(output)
    if (output / Journal.FILE).exists():
        raise ValueError(f"{output} holds the results of another run. Choose another --output")
    run = {**predictor.about, "classes": predictor.classes, "live": True}
    latencies = []
    # The first call sets up kernels: not while a frame waits.
    predictor.forward([predictor.prepare(np.zeros((256, 256, 3), np.uint8))])
    with LiveFrames(source) as frames, contextlib.closing(Journal(output, run)) as journal:
        _predict(predictor, frames, output, journal, latencies, show)
        if not latencies:
            raise BadInputError(source, frames.error or "gave no frame")
        name = Source(Path(LIVE_VIDEO), LIVE_VIDEO, "video")
        journal.finish(name, LIVE_VIDEO, None, len(latencies), frames.error)
        journal.write_tables(predictor.about, predictor.classes)
        report = _report(frames, latencies, predictor.about)
    write_atomically(output / LIVE_REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _predict(predictor, frames, output, journal, latencies, show):
    comment = json.dumps({"software": "imrcnn-d2, research use only", **predictor.about})
    text, first, views = footer(predictor.about), None, predictor.views()
    with (
        VideoWriter(output / LIVE_VIDEO, time_base=_TIME_BASE, comment=comment) as video,
        tqdm(desc="Live", unit="image") as bar,
        contextlib.suppress(KeyboardInterrupt),  # the way to end it
    ):
        for image, number, arrived in frames:
            first = arrived if first is None else first
            view = views(image)
            output = predictor.forward([predictor.prepare(image, view)])[0]
            found = records(predictor, output, *image.shape[:2], view)
            shown = counted(found, predictor.tau)
            overlay = draw_overlay(image, shown, predictor.classes, text)
            if show is not None:
                show(overlay)
            latencies.append(time.perf_counter() - arrived)
            when = Fraction(round(1000 * (arrived - first)), 1000)
            video.write(overlay, when)
            journal.add(frame_record(LIVE_VIDEO, Frame(image, number, when), view), found)
            bar.set_postfix(ms=round(1000 * latencies[-1]), dropped=frames.dropped)
            bar.update()


def _report(frames, latencies, about):
    values = np.percentile(latencies, PERCENTILES) * 1000
    return {
        "received": frames.received,
        "predicted": len(latencies),
        "dropped": frames.dropped,
        "dropped_percent": round(100 * frames.dropped / frames.received, 2),
        "latency_ms": {
            f"p{p}": round(float(v), 1) for p, v in zip(PERCENTILES, values, strict=True)
        },
        "error": frames.error,
        "about": about,
    }
