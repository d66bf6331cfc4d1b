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

from imrcnn_d2.data import images
from imrcnn_d2.data.endoscope_view import View
from imrcnn_d2.utils.files import BadInputError, Rejects, atomic_file, file_sha256, regular_file
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)

DICOM_NAME = "dicom-{}.dcm"
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
# The start of the UIDs of MPEG-2, H.264 and HEVC, whose frames pydicom does not take apart.
_VIDEO_SYNTAX = "1.2.840.10008.1.2.4.10"
_LARGEST_VIDEO = 2**31  # bytes of a DICOM file, which are held in memory
_TIME_BASE = Fraction(1, 1_000_000)
_LONGEST_STEP = 86_400  # seconds between frames

DICOM = (".dcm", ".dicom")


def input_key(name: str) -> str:
    """A hash of an input's name, which any output may contain."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


class Frame(NamedTuple):
    image: np.ndarray  # (H, W, 3) RGB, uint8
    number: int | None = None  # from 0, in a file of several frames
    time: Fraction | None = None  # seconds, where frames follow each other in time
    time_base: Fraction | None = None  # seconds that all times of the file are multiples of
    pixel_aspect: Fraction | None = None  # a pixel's width to its height; None: square
    view: View | None = None  # the part that the network sees; None: all


def open_video(file: str | Path | BinaryIO, path: str | Path):
    """Opens a video as an av.container.InputContainer, and no other file; errors name ``path``."""
    import av  # of the extra [deploy]

    if not hasattr(file, "read"):
        file = str(Path(file).absolute())  # as no URL begins
    try:
        return av.open(file, options=_LOCAL)
    except av.error.ArgumentError as error:
        reason = f"is no video of a format that is read: {', '.join(_FORMATS)}"
        raise BadInputError(path, reason) from error


def decode_video(file: str | Path | BinaryIO, path: str | Path) -> Iterator[Frame]:
    """Yields the frames of a video, upright; raises a BadInputError that names ``path`` if it is
    none, or ends early, after the frames that could be read.
    """
    import av

    time, number = Fraction(0), 0
    try:
        with open_video(file, path) as container:
            if not container.streams.video:
                raise BadInputError(path, "holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            start = _start(container)
            end = _EndOfVideo(container, stream)
            for packet in container.demux():  # all streams: only the longest tells the file's end
                end.add_packet(packet)
                for frame in packet.decode() if packet.stream is stream else ():
                    if frame.pts is not None:
                        time = frame.pts * frame.time_base - start
                    elif number and stream.average_rate:
                        time += 1 / stream.average_rate
                    end.add_frame(frame)
                    images.check_pixels(path, frame.width, frame.height)
                    image, aspect = upright(stream, frame)
                    yield Frame(image, number, time, stream.time_base, aspect)
                    number += 1
            if not number:
                raise BadInputError(path, "holds no frame of video")
            if missing := end.missing():
                raise BadInputError(path, f"is cut off: it ends after {number} frames, {missing}")
    except (av.error.FFmpegError, IndexError) as error:  # PyAV's, for a packet of no known stream
        position = f"after {number} frames ({float(time):.2f} s)" if number else "from the start"
        reason = getattr(error, "strerror", "a packet is of no stream")
        raise BadInputError(path, f"cannot be decoded {position}: {reason}") from error


def _start(container):
    """Seconds at which a stream of packets begins, such as ten hours in a recorder's; other
    formats count from 0, and what comes before the first frame is shown as a pause."""
    if container.format.name not in ("mpegts", "mpeg"):
        return Fraction(0)
    starts = [s.start_time * s.time_base for s in container.streams if s.start_time is not None]
    return min(starts, default=Fraction(0))


def upright(stream, frame) -> tuple[np.ndarray, Fraction | None]:
    """An av.VideoFrame as (H, W, 3) RGB, uint8, rotated as the file says, and its pixel aspect."""
    stored = stream.sample_aspect_ratio
    aspect = 1 / stored if stored and frame.rotation % 180 else stored or None
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90), aspect


class _EndOfVideo:
    """Whether a file ends early."""

    def __init__(self, container, stream):
        self._container, self._stream = container, stream
        # By stream, seconds: start and end of its last packet, and its last damage.
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
        size, is_cut = container.size, False
        if container.format.name == "mpegts":
            # Packets are plain, with times, or with error correction.
            is_cut = size > 0 and all(size % packet for packet in (188, 192, 204))
        elif container.format.name == "avi" and container.file is None:
            with open(container.name, "rb") as file:  # the length of the file as it was written
                name, written = struct.unpack("<4sI", file.read(8))
            is_cut = name == b"RIFF" and written > size  # which has these 8 bytes more
        if is_cut:
            return "within a part of the file"
        if any(self._starts[key] - time <= _DAMAGED for key, time in self._damages.items()):
            return "damaged"


class VideoWriter(contextlib.ExitStack):
    """An H.264 video in an MP4 file, which appears when it is closed, whole. As a context manager,
    it deletes what was written when it is left by an error.
    """

    def __init__(self, path: str | Path, *, time_base: Fraction, comment: str = ""):
        """``time_base``: seconds that frame times are rounded to multiples of."""
        super().__init__()
        self._file = atomic_file(path)
        self._time_base, self._comment = time_base, comment
        self._container = self._stream = self._last = None

    def write(self, image: np.ndarray, time: Fraction, pixel_aspect: Fraction | None = None):
        """Adds an (H, W, 3) RGB uint8 image of the first one's size and pixel aspect. If the time,
        seconds, does not rise, the least possible step is added.
        """
        import av

        # H.264 halves the colours' resolution, so sides are even: the last row or column doubled.
        height, width = image.shape[:2]
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(*image.shape[:2], pixel_aspect)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = round(time / self._time_base), self._time_base
        if self._last is not None:  # containers refuse two frames at once
            frame.pts = max(frame.pts, self._last + 1)
        self._last = frame.pts
        try:
            self._container.mux(self._stream.encode(frame))
        except av.error.ExternalError as error:  # of x264
            raise OSError(f"H.264 takes no frame of {width}x{height}") from error

    def _open(self, height, width, pixel_aspect):
        import av

        file = self.enter_context(self._file)
        self._container = self.enter_context(av.open(file, "w", format="mp4"))
        self._container.metadata["comment"] = self._comment
        options = {"crf": "20", "preset": "veryfast"}
        stream = self._container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = self._time_base
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        self._stream = stream
        self.push(self._flush)

    def _flush(self, kind, error, traceback):
        if kind is None:
            self._container.mux(self._stream.encode())


def public_name(path: Path) -> str:
    """A name for a DICOM file from its SHA-256; a random one if the file cannot be opened. Its name
    and folders often contain the patient's name, of which even a hash could be guessed.
    """
    try:
        return DICOM_NAME.format(file_sha256(path)[:16])
    except OSError:
        return DICOM_NAME.format(secrets.token_hex(8))


def may_show_patient(path: Path) -> bool:
    """Whether a DICOM file says anything but that no patient data are burned into its pixels."""
    header = images.read_header(path)
    with images.hide_details(path, "says nothing clear of its pixels"):
        return str(header.get("BurnedInAnnotation") or "NO").strip().upper() != "NO"


def read_dicom(path: Path) -> Iterator[Frame]:
    """Yields the frames of a still, a multi-frame image or a video, with times if the file has any;
    raises a BadInputError if it has no pixels, or of a compression that needs a package.
    """
    from pydicom import dcmread
    from pydicom.encaps import generate_frames

    header = images.read_header(path)
    with images.hide_details(path, "is no readable DICOM file"):
        if "Rows" not in header or "Columns" not in header:
            raise BadInputError(path, "is a DICOM file without an image")
        syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
        if syntax.startswith(_VIDEO_SYNTAX):
            if (size := path.stat().st_size) > _LARGEST_VIDEO:
                reason = f"has {size} bytes, over {_LARGEST_VIDEO}: save the video as another file"
                raise BadInputError(path, reason)
            pixels = dcmread(path, specific_tags=["PixelData"]).get("PixelData")
            if not pixels:
                raise BadInputError(path, "is a DICOM file without pixels")
            (stream,) = generate_frames(pixels, number_of_frames=1)  # one frame to DICOM
            yield from decode_video(io.BytesIO(stream), path)
            return
        number = int(header.get("NumberOfFrames") or 1)
        times = _times(header, number) if number > 1 else itertools.repeat(None)
        for i, image in enumerate(images.iter_rgb(path, header)):
            time = next(times)
            base = None if time is None else _TIME_BASE
            yield Frame(image, i if number > 1 else None, time, base)


def _times(header, number: int) -> Iterator[Fraction | None]:
    """The frames' times in seconds; all None if the file has none that are possible."""
    vector = header.get("FrameTimeVector")
    if vector is not None and vector != "":
        steps = [_exact(step) / 1000 for step in np.atleast_1d(vector)]
        rising = len(steps) == number and steps[0] >= 0 and all(step > 0 for step in steps[1:])
        if rising and max(steps) <= _LONGEST_STEP:
            return itertools.accumulate(steps)
        logger.warning("A DICOM file's FrameTimeVector does not fit its frames: no times")
        return itertools.repeat(None)
    rate = header.get("CineRate") or header.get("RecommendedDisplayFrameRate")
    step = _exact(header.get("FrameTime") or 0) / 1000 or (1 / _exact(rate) if rate else 0)
    possible = 0 < step <= _LONGEST_STEP
    return itertools.count(Fraction(0), step) if possible else itertools.repeat(None)


def _exact(number):
    """As a float first: the digits of 1e999999999 would fill the memory."""
    return Fraction(str(float(number)))


@dataclass(frozen=True)
class Source:
    """A file, of kind "image", "video" or "dicom". Its name in all outputs is relative to the
    folder that all inputs share, with "/"; of a DICOM file, see `public_name`.
    """

    path: Path
    name: str
    kind: str


def find_inputs(
    inputs: Iterable[str | Path], *, leave_out: Iterable[Path] = (), follow_links: bool = False
) -> tuple[Path, list[Source]]:
    """Returns the folder that all inputs share, and each file once, by name; of DICOM files with
    the same content, the first. Files in the folders to ``leave_out`` are no inputs.

    Args:
        inputs: files, folders and glob patterns of these ("**" for any folders). A folder gives all
            images, videos and DICOM files under it, but hidden ones, and links that lead out of it
            unless ``follow_links``. A file that is named is taken whatever its suffix.

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
            if match.is_dir():
                files.update(_in_folder(match, follow_links))
                roots.append(match)
            elif match.exists() and not match.is_file():
                raise BadInputError(match, "is neither a file nor a folder: name one of these")
            else:
                # A link has its own name, and leads nowhere perhaps.
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
        kind = files[path]
        name = public_name(path) if kind == "dicom" else path.relative_to(root).as_posix()
        sources.setdefault(name, Source(path, name, kind))
    return root, [sources[name] for name in sorted(sources)]


def _in_folder(folder: Path, follow_links: bool) -> dict[Path, str]:
    """Files that can be predicted on -> their kind."""
    rejects = Rejects("reject", follow_links)
    files = images.list_files(folder, rejects)
    if rejects.errors:
        logger.warning(
            "%s: left out: %d links that lead out of it, pipes, devices or folders that cannot be "
            "opened: put copies there (imrcnn predict takes --follow-links)",
            folder,
            len(rejects.errors),
        )
    known = {_absolute(file): kind for file in files if (kind := _kind(file))}
    if len(known) < len(files):
        logger.info("%s: %d other files left out", folder, len(files) - len(known))
    return known


def read_frames(source: Source) -> Iterator[Frame]:
    """Yields the one frame of an image, or those of a video or DICOM file in turn; raises a
    BadInputError if the file cannot be read to its end, or is no regular file.
    """
    regular_file(source.path)
    if source.kind == "video":
        yield from decode_video(source.path, source.path)
    elif source.kind == "dicom":
        yield from read_dicom(source.path)
    else:
        yield Frame(images.read_image(source.path))


def _absolute(path):
    """Without "..", but with links as they are."""
    return Path(os.path.abspath(path))


def _kind(path: Path) -> str | None:
    """The kind of a `Source`; None for another file."""
    suffix = path.suffix.lower()
    # By its content first: DICOM files have any name, which must not be published.
    if suffix in DICOM or images.is_dicom(path):
        return "dicom"
    if suffix in images.VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in images.IMAGE_SUFFIXES else None
