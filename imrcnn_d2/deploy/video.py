"""Video files, frame by frame: what is held in memory does not grow with their length."""

import contextlib
import struct
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imrcnn_d2.data.rejects import BadInputError
from imrcnn_d2.evaluation.files import atomic_file

__all__ = ["Frame", "VideoWriter", "decode_video", "open_video", "pixel_aspect", "upright"]

# An end that comes earlier than announced by more than this is a cut file: seconds, and share of
# the length. Containers round.
_EARLY = 1.0, 0.02
_DAMAGED = 0.5  # seconds before the end, in which damage is a sign of a cut
# Containers, and the bare streams that DICOM files hold. FFmpeg goes by the content, and would open
# what a playlist lists: ffconcat, HLS, DASH, SDP, a pattern of images.
_FORMATS = (
    *("asf", "avi", "flv", "matroska", "mov", "mpeg", "mpegts", "ogg"),
    *("h264", "hevc", "m4v", "mpegvideo"),
)
_LOCAL = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "file"}
# Bytes that a transport stream's packets have: plain, with times, with error correction.
_TRANSPORT_PACKETS = 188, 192, 204


class Frame(NamedTuple):
    """
    Attributes:
        image (np.ndarray): (H, W, 3) RGB, uint8.
        number (int or None): from 0, in a file of several frames; None in a still.
        time (Fraction or None): seconds, where frames follow each other in time.
        time_base (Fraction or None): seconds that all times of the file are multiples of.
        pixel_aspect (Fraction or None): a pixel's width to its height; None if not said: square.
    """

    image: np.ndarray
    number: int | None = None
    time: Fraction | None = None
    time_base: Fraction | None = None
    pixel_aspect: Fraction | None = None


def open_video(file, path):
    """
    Args:
        file (str, Path or BinaryIO): what to read; no other file is opened.
        path (Path): to be named in errors.

    Returns:
        av.container.InputContainer:

    Raises:
        BadInputError: it is of a format that is not read, such as a playlist.
        av.error.FFmpegError: it cannot be opened.
    """
    import av  # of the extra [deploy]

    if not hasattr(file, "read"):
        file = str(Path(file).absolute())  # as no URL begins
    try:
        return av.open(file, options=_LOCAL)
    except av.error.ArgumentError as error:
        reason = f"is no video of a format that is read: {', '.join(_FORMATS)}"
        raise BadInputError(path, reason) from error


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
        with open_video(file, path) as container:
            if not container.streams.video:
                raise BadInputError(path, "holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            end = _End(container, stream)
            for packet in container.demux():  # all streams: only the longest tells the file's end
                end.see_packet(packet)
                for frame in packet.decode() if packet.stream is stream else ():
                    if frame.pts is not None:
                        time = frame.pts * frame.time_base
                    elif number and stream.average_rate:
                        time += 1 / stream.average_rate
                    end.see_frame(frame)
                    shape = pixel_aspect(stream, frame)
                    yield Frame(upright(frame), number, time, stream.time_base, shape)
                    number += 1
            if not number:
                raise BadInputError(path, "holds no frame of video")
            if why := end.missing():
                raise BadInputError(path, f"is cut off: it ends after {number} frames, {why}")
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


def pixel_aspect(stream, frame):
    """
    Args:
        stream (av.VideoStream):
        frame (av.VideoFrame): of it.

    Returns:
        Fraction or None: a pixel's width to its height in what :func:`upright` gives; None if the
        file does not say it.
    """
    stored = stream.sample_aspect_ratio
    return 1 / stored if stored and frame.rotation % 180 else stored or None


class _End:
    """Where a file ends, and whether that is early."""

    def __init__(self, container, stream):
        self._container, self._stream = container, stream
        # Of each stream, seconds: when what it holds last begins and ends, and its last damage.
        self._starts, self._ends, self._damages = {}, {}, {}

    def see_packet(self, packet):
        time = packet.dts if packet.pts is None else packet.pts
        if not packet.size or time is None:
            return
        stream, start = packet.stream_index, time * packet.time_base
        end = start + (packet.duration or 0) * packet.time_base
        self._starts[stream] = max(start, self._starts.get(stream, start))
        self._ends[stream] = max(end, self._ends.get(stream, end))
        if packet.is_corrupt:
            self._damages[stream] = start

    def see_frame(self, frame):
        if frame.is_corrupt and frame.pts is not None and self._stream.index in self._starts:
            self._damages[self._stream.index] = frame.pts * frame.time_base

    def missing(self):
        """What is missing, in words; None if nothing is."""
        container, stream = self._container, self._stream
        ends, end, length = self._ends, None, None
        if stream.duration is not None:
            length = stream.duration * stream.time_base
            end = (stream.start_time or 0) * stream.time_base + length
            ends = {key: value for key, value in ends.items() if key == stream.index}
        elif container.duration is not None:
            # Matroska counts it from 0, wherever the first frame is.
            end = length = Fraction(container.duration, 1_000_000)
        if end is not None and ends:
            seconds, share = _EARLY
            early = float(end - max(ends.values()))
            if early > max(seconds, share * length):
                return f"{early:.1f} s early"
        # What follows is for formats that do not say how long they are.
        if self._ends_within_packet() or self._ends_within_riff():
            return "within a part of the file"
        if any(self._starts[key] - time <= _DAMAGED for key, time in self._damages.items()):
            return "damaged"

    def _ends_within_packet(self):
        size = self._container.size
        return (
            self._container.format.name == "mpegts"
            and size > 0
            and all(size % packet for packet in _TRANSPORT_PACKETS)
        )

    def _ends_within_riff(self):
        """AVI: the length is that of the file as it was written, in its first bytes."""
        if self._container.format.name != "avi" or self._container.file is not None:
            return False
        with open(self._container.name, "rb") as file:
            name, size = struct.unpack("<4sI", file.read(8))
        return name == b"RIFF" and size > self._container.size  # which has these 8 bytes more


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
        self._file, self._written = atomic_file(path), contextlib.ExitStack()
        self._time_base, self._comment = time_base, comment
        self._container = self._stream = None
        self._last = None

    def write(self, image, time, pixel_aspect=None):
        """
        Args:
            image (np.ndarray): (H, W, 3) RGB, uint8, of the first one's size.
            time (Fraction): seconds; where it does not rise, as little as can be is added.
            pixel_aspect (Fraction or None): a pixel's width to its height; of the first image, for
                all.
        """
        import av

        if self._container is None:
            self._open(image, pixel_aspect)
        frame = av.VideoFrame.from_ndarray(_even(image), format="rgb24")
        frame.pts, frame.time_base = round(time / self._time_base), self._time_base
        if self._last is not None:  # containers refuse two frames at once
            frame.pts = max(frame.pts, self._last + 1)
        self._last = frame.pts
        self._container.mux(self._stream.encode(frame))

    def _open(self, image, pixel_aspect):
        import av

        file = self._written.enter_context(self._file)
        self._container = self._written.enter_context(av.open(file, "w", format="mp4"))
        self._container.metadata["comment"] = self._comment
        height, width = _even(image).shape[:2]
        stream = self._container.add_stream(
            "libx264", rate=30, options={"crf": "20", "preset": "veryfast"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = self._time_base
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        self._stream = stream
        self._written.push(self._flush)

    def _flush(self, kind, error, traceback):
        if kind is None:
            self._container.mux(self._stream.encode())

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        return self._written.__exit__(kind, error, traceback)


def _even(image):
    """H.264 halves the colours' resolution, so sides are even: the last row or column doubled."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
