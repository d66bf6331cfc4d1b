"""Images, videos and DICOM files to predict on, from paths, folders and patterns."""

import contextlib
import glob
import hashlib
import io
import itertools
import logging
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from imrcnn_d2.data.endoscope_view import View
from imrcnn_d2.data.images import (
    hide_details,
    is_dicom,
    iter_rgb,
    list_files,
    read_header,
    read_image,
)
from imrcnn_d2.utils.files import BadInputError, Rejects, atomic_file, file_sha256, regular_file

__all__ = [
    "DICOM_NAME",
    "Frame",
    "Source",
    "VideoWriter",
    "decode_video",
    "find_inputs",
    "input_key",
    "may_show_patient",
    "open_video",
    "pixel_aspect",
    "public_name",
    "read_dicom",
    "read_frames",
    "upright",
]

logger = logging.getLogger(__name__)


DICOM_NAME = "dicom-{}.dcm"


def input_key(name: str) -> str:
    """A hash of an input's name, which any output may contain."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


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
        image: (H, W, 3) RGB, uint8.
        number: from 0, in a file of several frames; None in a still.
        time: seconds, where frames follow each other in time.
        time_base: seconds that all times of the file are multiples of.
        pixel_aspect: a pixel's width to its height; None if unknown: square.
        view: the part that the network sees; None for all.
    """

    image: np.ndarray
    number: int | None = None
    time: Fraction | None = None
    time_base: Fraction | None = None
    pixel_aspect: Fraction | None = None
    view: View | None = None


def open_video(file: str | Path | BinaryIO, path: str | Path):
    """
    Opens a video as an av.container.InputContainer, and no other file; errors name ``path``.

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


def decode_video(file: str | Path | BinaryIO, path: str | Path) -> Iterator[Frame]:
    """
    Yields the frames of a video, upright; errors name ``path``.

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
            end = _EndOfVideo(container, stream)
            for packet in container.demux():  # all streams: only the longest tells the file's end
                end.add_packet(packet)
                for frame in packet.decode() if packet.stream is stream else ():
                    if frame.pts is not None:
                        time = frame.pts * frame.time_base
                    elif number and stream.average_rate:
                        time += 1 / stream.average_rate
                    end.add_frame(frame)
                    aspect = pixel_aspect(stream, frame)
                    yield Frame(upright(frame), number, time, stream.time_base, aspect)
                    number += 1
            if not number:
                raise BadInputError(path, "holds no frame of video")
            if missing := end.missing():
                raise BadInputError(path, f"is cut off: it ends after {number} frames, {missing}")
    except av.error.FFmpegError as error:
        position = f"after {number} frames ({float(time):.2f} s)" if number else "from the start"
        raise BadInputError(path, f"cannot be decoded {position}: {error.strerror}") from error


def upright(frame) -> np.ndarray:
    """An av.VideoFrame as (H, W, 3) RGB, uint8, rotated as the file says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def pixel_aspect(stream, frame) -> Fraction | None:
    """A pixel's width to its height in the image of `upright`; None if the file does not say it."""
    stored = stream.sample_aspect_ratio
    return 1 / stored if stored and frame.rotation % 180 else stored or None


class _EndOfVideo:
    """Where a file ends, and whether that is early."""

    def __init__(self, container, stream):
        self._container, self._stream = container, stream
        # Of each stream, seconds: when what it holds last begins and ends, and its last damage.
        self._starts, self._ends, self._damages = {}, {}, {}

    def add_packet(self, packet):
        time = packet.dts if packet.pts is None else packet.pts
        if not packet.size or time is None:
            return
        stream, start = packet.stream_index, time * packet.time_base
        end = start + (packet.duration or 0) * packet.time_base
        self._starts[stream] = max(start, self._starts.get(stream, start))
        self._ends[stream] = max(end, self._ends.get(stream, end))
        if packet.is_corrupt:
            self._damages[stream] = start

    def add_frame(self, frame):
        if frame.is_corrupt and frame.pts is not None and self._stream.index in self._starts:
            self._damages[self._stream.index] = frame.pts * frame.time_base

    def missing(self) -> str | None:
        """How the file ends too early, in words; None if it does not."""
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

    def __init__(self, path: str | Path, *, time_base: Fraction, comment: str = ""):
        """
        Args:
            path: ends with .mp4; its folder is made if it does not exist.
            time_base: seconds; frame times are kept as multiples of it.
            comment: for the file's metadata.
        """
        self._file, self._written = atomic_file(path), contextlib.ExitStack()
        self._time_base, self._comment = time_base, comment
        self._container = self._stream = None
        self._last = None

    def write(self, image: np.ndarray, time: Fraction, pixel_aspect: Fraction | None = None):
        """
        Args:
            image: (H, W, 3) RGB, uint8, of the first one's size.
            time: seconds; if it does not rise, the least possible step is added.
            pixel_aspect: a pixel's width to its height; the first image's is taken for all.
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


# Of the UIDs of MPEG-2, H.264 and HEVC, whose frames pydicom does not take apart.
_VIDEO_SYNTAX = "1.2.840.10008.1.2.4.10"
_TIME_BASE = Fraction(1, 1_000_000)
_LONGEST_STEP = 86_400  # seconds between frames
_LARGEST_VIDEO = 2**31  # bytes, which are held in memory


def public_name(path: Path) -> str:
    """
    A name for a DICOM file from its SHA-256, by which its owner finds it again; a random one if the
    file cannot be opened. Its name and folders often contain the patient's name, in ways that
    cannot all be recognised, and a hash of them can be guessed.
    """
    try:
        return DICOM_NAME.format(file_sha256(path)[:16])
    except OSError:
        return DICOM_NAME.format(secrets.token_hex(8))


def may_show_patient(path: Path) -> bool:
    """Whether a DICOM file says anything but that no patient data are burned into its pixels."""
    header = read_header(path)
    with hide_details(path, "says nothing clear of its pixels"):
        return str(header.get("BurnedInAnnotation") or "NO").strip().upper() != "NO"


def read_dicom(path: Path) -> Iterator[Frame]:
    """
    Yields the frames of a still, a multi-frame image or a video; without times if the file has
    none.

    Raises:
        BadInputError: no DICOM file, one without pixels, or of a compression that cannot be undone
            here; the error says what to install.
    """
    from pydicom import dcmread
    from pydicom.encaps import generate_frames

    header = read_header(path)
    with hide_details(path, "is no readable DICOM file"):
        if "Rows" not in header or "Columns" not in header:
            raise BadInputError(path, "is a DICOM file without an image")
        syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
        if syntax.startswith(_VIDEO_SYNTAX):
            if (size := path.stat().st_size) > _LARGEST_VIDEO:
                raise BadInputError(
                    path,
                    f"has {size} bytes, more than the {_LARGEST_VIDEO} allowed of a DICOM video; "
                    "save the video as a file of its own",
                )
            pixels = dcmread(path, specific_tags=["PixelData"]).get("PixelData")
            if not pixels:
                raise BadInputError(path, "is a DICOM file without pixels")
            (stream,) = generate_frames(pixels, number_of_frames=1)  # one frame to DICOM
            yield from decode_video(io.BytesIO(stream), path)
            return
        number = int(header.get("NumberOfFrames") or 1)
        times = _times(header, number) if number > 1 else itertools.repeat(None)
        for i, image in enumerate(iter_rgb(path, header)):
            time = next(times)
            base = None if time is None else _TIME_BASE
            yield Frame(image, i if number > 1 else None, time, base)


def _times(header, number: int) -> Iterator[Fraction | None]:
    """Of the frames in turn, in seconds; all None if the file has none that are possible."""
    vector = header.get("FrameTimeVector")
    if vector is not None and vector != "":
        steps = [_seconds(step) for step in np.atleast_1d(vector)]
        rising = len(steps) == number and steps[0] >= 0 and all(step > 0 for step in steps[1:])
        if rising and max(steps) <= _LONGEST_STEP:
            return itertools.accumulate(steps)
        logger.warning("A DICOM file's FrameTimeVector does not fit its frames: no times")
        return itertools.repeat(None)
    rate = header.get("CineRate") or header.get("RecommendedDisplayFrameRate")
    step = _seconds(header.get("FrameTime") or 0) or (1 / _exact(rate) if rate else 0)
    if not 0 < step <= _LONGEST_STEP:
        return itertools.repeat(None)
    return itertools.count(Fraction(0), step)


def _seconds(milliseconds):
    return _exact(milliseconds) / 1000


def _exact(number):
    """As a float first: the digits of 1e999999999 would fill the memory."""
    return Fraction(str(float(number)))


IMAGES = (
    *(".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
VIDEOS = (
    *(".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"),
    *(".ts", ".webm", ".wmv"),
)
DICOM = (".dcm", ".dicom")


@dataclass(frozen=True)
class Source:
    """
    Attributes:
        path: the file.
        name: in all outputs: relative to the folder that all inputs share, with "/"; of a DICOM
            file, see `public_name`.
        kind: "image", "video" or "dicom".
    """

    path: Path
    name: str
    kind: str


def find_inputs(
    inputs: Iterable[str | Path], *, leave_out: Iterable[Path] = (), follow_links: bool = False
) -> tuple[Path, list[Source]]:
    """
    Args:
        inputs: files, folders and glob patterns of these ("**" for any folders). A folder gives all
            images, videos and DICOM files under it; other files there, and hidden ones, are left
            out. A file that is named is taken whatever its suffix, as an image if no other.
        leave_out: folders whose files are no inputs, such as those of outputs.
        follow_links: whether links in a folder may lead out of it; else they are left out.

    Returns:
        The folder that all inputs share, and each file once, by name; of DICOM files with the same
        content, the first.

    Raises:
        FileNotFoundError: an input does not exist, or there is no file at all.
        BadInputError: an input is a pipe or device.
    """
    files, roots = {}, []
    for text in map(os.fspath, inputs):
        path = Path(text)
        matches = [path] if path.exists() else list(map(Path, glob.glob(text, recursive=True)))
        if not matches:
            raise FileNotFoundError(f"{text}: no such file, folder or pattern with a match")
        for match in matches:
            # A link counts as a file with its own name.
            if match.is_dir():
                files.update(
                    (_absolute(file), kind) for file, kind in _in_folder(match, follow_links)
                )
                roots.append(match)
            elif match.exists() and not match.is_file():
                raise BadInputError(match, "is neither a file nor a folder: name one of these")
            else:
                # A link that leads nowhere is listed, by no name if it is one of a DICOM file.
                files[_absolute(match)] = _kind(match) or "image"
                roots.append(_absolute(match).parent)
    left_out = set(map(_absolute, leave_out))
    files = {file: kind for file, kind in files.items() if left_out.isdisjoint(file.parents)}
    if not files:
        raise FileNotFoundError(
            f"No image, video or DICOM file under {', '.join(map(str, inputs))}"
        )
    root = Path(os.path.commonpath(map(_absolute, roots)))
    sources = {}
    for path in tqdm(sorted(files), desc="Listing", unit="file", delay=2, leave=False):
        is_dicom_file = files[path] == "dicom"
        name = public_name(path) if is_dicom_file else path.relative_to(root).as_posix()
        sources.setdefault(name, Source(path, name, files[path]))
    return root, [sources[name] for name in sorted(sources)]


def _in_folder(folder: Path, follow_links: bool) -> list[tuple[Path, str]]:
    """Files that can be predicted on, each with its kind."""
    checks = Rejects("reject", follow_links)
    files = list_files(folder, checks)
    if checks.errors:
        logger.warning(
            "%s: %d links that lead out of it, pipes or devices left out; put copies there, or "
            "allow such links with --follow-links",
            folder,
            len(checks.errors),
        )
    known = [(file, _kind(file)) for file in files]
    known = [(file, kind) for file, kind in known if kind]
    if len(known) < len(files):
        logger.info("%s: %d other files left out", folder, len(files) - len(known))
    return known


def read_frames(source: Source) -> Iterator[Frame]:
    """
    Yields the one frame of an image, or those of a video or DICOM file in turn.

    Raises:
        BadInputError: it cannot be read, or not to its end; or it is no regular file.
    """
    regular_file(source.path)
    if source.kind == "video":
        yield from decode_video(source.path, source.path)
    elif source.kind == "dicom":
        yield from read_dicom(source.path)
    else:
        yield Frame(read_image(source.path))


def _absolute(path):
    """Without "..", but with links as they are."""
    return Path(os.path.abspath(path))


def _kind(path: Path) -> str | None:
    """ "image", "video" or "dicom"; None for another file."""
    suffix = path.suffix.lower()
    # By its content first: DICOM files have any name, which must not be published.
    if suffix in DICOM or is_dicom(path):
        return "dicom"
    if suffix in VIDEOS:
        return "video"
    return "image" if suffix in IMAGES else None
