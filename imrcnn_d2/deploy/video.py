"""Video files, frame by frame: what is held in memory does not grow with their length."""

import contextlib
import os
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imrcnn_d2.data.rejects import BadInputError

__all__ = ["Frame", "VideoWriter", "decode_video", "upright"]

# An end that comes earlier than announced by more than this is a cut file: seconds, and share of
# the length. Containers round.
_EARLY = 1.0, 0.02
# A playlist in a file of another name could otherwise make the decoder fetch what it lists.
_LOCAL = {"protocol_whitelist": "file"}


class Frame(NamedTuple):
    """
    Attributes:
        image (np.ndarray): (H, W, 3) RGB, uint8.
        number (int or None): from 0, in a file of several frames; None in a still.
        time (Fraction or None): seconds, where frames follow each other in time.
        time_base (Fraction or None): seconds that all times of the file are multiples of.
    """

    image: np.ndarray
    number: int | None = None
    time: Fraction | None = None
    time_base: Fraction | None = None


def decode_video(file, path):
    """
    Args:
        file (str, Path or BinaryIO): what to read.
        path (Path): to be named in errors.

    Yields:
        Frame: upright.

    Raises:
        BadInputError: no video, or one that ends early: after the frames that could be read.
    """
    import av  # of the extra [deploy]

    time, number = Fraction(0), 0
    try:
        if not hasattr(file, "read"):
            file = str(file)
        with av.open(file, options=_LOCAL) as container:
            if not container.streams.video:
                raise BadInputError(path, "holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.pts is not None:
                    time = frame.pts * frame.time_base
                elif number and stream.average_rate:
                    time += 1 / stream.average_rate
                yield Frame(upright(frame), number, time, stream.time_base)
                number += 1
            _check_end(container, stream, time, number, path)
    except av.error.FFmpegError as error:
        where = f"after {number} frames ({float(time):.2f} s)" if number else "from the start"
        raise BadInputError(path, f"cannot be decoded {where}: {error.strerror}") from error


def upright(frame):
    """
    Args:
        frame (av.VideoFrame): as stored.

    Returns:
        np.ndarray: (H, W, 3) RGB, uint8, turned as the file says that it is to be shown.
    """
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _check_end(container, stream, time, number, path):
    if not number:
        raise BadInputError(path, "holds no frame of video")
    if stream.duration is not None:
        start, duration = stream.start_time or 0, stream.duration
        end, length = (start + duration) * stream.time_base, duration * stream.time_base
    elif container.duration is not None and len(container.streams) == 1:  # no sound that is longer
        length = Fraction(container.duration, 1_000_000)
        end = Fraction(container.start_time or 0, 1_000_000) + length
    else:
        return
    seconds, share = _EARLY
    missing = float(end - time)
    if missing > max(seconds, share * length):
        raise BadInputError(
            path, f"is cut off: it ends after {number} frames, {missing:.1f} s early"
        )


class VideoWriter:
    """
    An H.264 video in an MP4 file, which appears when it is closed, whole.

    Use as a context manager: leaving it by an error deletes what was written.
    """

    def __init__(self, path, *, time_base, comment=""):
        """
        Args:
            path (str or Path): ends with .mp4; its folder is made if it does not exist.
            time_base (Fraction): seconds; frame times are kept as multiples of it.
            comment (str): for the file's metadata.
        """
        self._path = Path(path)
        self._beside = self._path.with_name(self._path.name + ".tmp")
        self._time_base, self._comment = time_base, comment
        self._container = self._stream = None
        self._last = None

    def write(self, image, time):
        """
        Args:
            image (np.ndarray): (H, W, 3) RGB, uint8, of the first one's size.
            time (Fraction): seconds; where it does not rise, as little as can be is added.
        """
        import av

        if self._container is None:
            self._open(image)
        frame = av.VideoFrame.from_ndarray(_even(image), format="rgb24")
        frame.pts, frame.time_base = round(time / self._time_base), self._time_base
        if self._last is not None:  # containers refuse two frames at once
            frame.pts = max(frame.pts, self._last + 1)
        self._last = frame.pts
        self._container.mux(self._stream.encode(frame))

    def _open(self, image):
        import av

        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._beside), "w", format="mp4")
        self._container.metadata["comment"] = self._comment
        height, width = _even(image).shape[:2]
        stream = self._container.add_stream(
            "libx264", rate=30, options={"crf": "20", "preset": "veryfast"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = self._time_base
        self._stream = stream

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self._container is None:
            return
        try:
            if kind is None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if kind is None:
                os.replace(self._beside, self._path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._beside.unlink()


def _even(image):
    """H.264 halves the colours' resolution, so sides are even: the last row or column doubled."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
