"""Reading, checking and normalising one image file.

Detectron2 reads images with Pillow: it applies the EXIF orientation and then ``convert("RGB")``,
which clips 16-bit values, drops an alpha channel and ignores a CMYK profile. Files in such modes
are converted here.
"""

import contextlib
import hashlib
import io
import itertools
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError
from threadpoolctl import threadpool_limits

from imrcnn_d2.utils.files import (
    LONGEST_NAME,
    BadInputError,
    Rejects,
    check_inside,
    file_sha256,
    install_extra,
    is_archive,
    leads_out,
    regular_file,
)
from imrcnn_d2.utils.progress import tqdm

# Pillow opens by content. Of the formats left out, some start other programs (EPS: Ghostscript).
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
VIDEO_SUFFIXES = (
    *(".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"),
    *(".ts", ".webm", ".wmv"),
)
_BYTES_PER_PIXEL = 8  # of the largest file: RGBA of 16 bits, not compressed
MAX_SCANS = 100  # of a JPEG; encoders make about ten, and each takes time, however few its bytes
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)  # those with a length


class _Tiff(TiffImagePlugin.TiffImageFile):
    """Reads three samples a pixel as RGB where they are tagged as gray, as CVC-ClinicDB's are:
    Pillow refuses these, and OpenCV reads the red channel alone.

    Pillow turns a TIFF by its orientation as it is decoded, and Detectron2 then turns it again.
    """

    misread = ""  # why other programs would misread it

    def _setup(self):
        tags = self.tag_v2
        if tags.get(ExifTags.Base.Orientation) in range(2, 9):
            self.misread = "TIFF with an orientation"
        gray = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 1
        if gray and tags.get(TiffImagePlugin.SAMPLESPERPIXEL) == 3:
            self.misread = "TIFF of colours tagged as gray"
            tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 2
            tags.pop(TiffImagePlugin.EXTRASAMPLES, None)
        super()._setup()


# In place of Pillow's class, so that Detectron2 reads such files as well.
Image.register_open("TIFF", _Tiff, Image.OPEN["TIFF"][1])


def max_pixels() -> float:
    """Return Pillow's ``Image.MAX_IMAGE_PIXELS``, 89 million unless changed: a few bytes can claim
    any number of pixels, for which memory is then taken."""
    return math.inf if Image.MAX_IMAGE_PIXELS is None else Image.MAX_IMAGE_PIXELS


def check_pixels(file: str | Path, width: int, height: int) -> None:
    """Raise BadInputError for more than `max_pixels`."""
    if width * height > max_pixels():
        size = f"has {width}x{height} = {width * height} pixels"
        raise BadInputError(file, f"{size}, more than the {max_pixels()} allowed; scale it down")


def image_file(path: Path) -> Path:
    """Return `path`; raise BadInputError if it is no regular file or larger than any image."""
    size, allowed = os.path.getsize(regular_file(path)), _BYTES_PER_PIXEL * max_pixels()
    if size > allowed:
        raise BadInputError(path, f"has {size} bytes, more than the {allowed} allowed of an image")
    return path


def _check_scans(name: str | Path, file: BinaryIO) -> None:
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    scans, end = 0, 2
    while (marker := _JPEG_MARKER.search(data, end)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        end = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    if scans > MAX_SCANS:
        raise BadInputError(
            name, f"is a JPEG of {scans} scans, more than the {MAX_SCANS} allowed; save it anew"
        )


def open_image(file: Path | BinaryIO, formats: Sequence[str] = IMAGE_FORMATS) -> Image.Image:
    """Open an image, of a path or of bytes that errors call "image", without decoding it.

    Raises:
        FileNotFoundError: there is none.
        BadInputError: it is no regular file, of none of the formats, damaged, or too large.
    """
    name: str | Path = "image"
    if isinstance(file, Path):
        file.stat()
        name = image_file(file)
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:  # which names an address in memory
        known = ", ".join(formats)
        raise BadInputError(name, f"is no readable image (of no known format: {known})") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadInputError(name, f"is no readable image ({error})") from error
    try:
        check_pixels(name, *image.size)
        if image.format in ("JPEG", "MPO"):
            _check_scans(name, image.fp)
    except BadInputError:
        image.close()
        raise
    return image


# What a file without the preamble starts with: an element of group 2 or 8, with its type or length.
_BARE = re.compile(
    rb"[\x02\x08]\0.\0([A-Z]{2}|\x04\0\0\0)|\x08\0[\x05\x08\x12-\x18]\0.\0\0\0", re.DOTALL
)
# Bytes before the pixels; a list of numbers takes 300 times as many in memory, and 8 s each MiB.
_LONGEST_HEADER = 2**22
_PIXELS = (b"\xe0\x7f", b"\x7f\xe0")  # the group of what follows, in either order of bytes
_SILENT = ("ignore", None, Warning, re.compile("pydicom"), 0)  # a filter of warnings


def is_dicom(path: Path) -> bool:
    """Whether it has DICOM's mark after the preamble, whatever its name, or lacks the preamble."""
    try:
        with open(regular_file(path), "rb") as file:
            head = file.read(132)
            return head[128:] == b"DICM" or bool(_BARE.match(head))
    except (OSError, BadInputError):
        return False


def _silence() -> None:
    if warnings.filters[:1] != [_SILENT]:
        warnings.filterwarnings("ignore", module=_SILENT[3].pattern)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


_silence()  # before another thread sets filters for a block, and these ones again at its end


@contextlib.contextmanager
def hide_details(path: Path, problem: str) -> Iterator[None]:
    """Hide pydicom's messages, which quote the file, so the patient; raise BadInputError with
    `problem` and the type of the error instead. Its warnings and its log stay silent afterwards:
    filters of warnings that are set for a block are those of all threads."""
    _silence()
    try:
        yield
    except (BadInputError, ModuleNotFoundError):
        raise
    except Exception as error:  # pydicom raises nearly anything on damaged files
        kind = getattr(error, "strerror", None) or type(error).__name__
        raise BadInputError(path, f"{problem} ({kind})") from None


def read_header(path: Path, **options) -> Any:
    """Return the elements before the pixels; `options` are those of `pydicom.dcmread`.

    Raises:
        BadInputError: it is no readable DICOM file, or its elements take too much memory.
        ModuleNotFoundError: pydicom, of the extra [deploy], is missing.
    """
    import pydicom

    regular_file(path)
    with hide_details(path, "is no readable DICOM file"):
        with open(path, "rb") as file:
            head = io.BytesIO(file.read(_LONGEST_HEADER))
        pydicom.filereader.read_preamble(head, force=False)
        meta = pydicom.filereader.read_dataset(
            head, False, True, stop_when=lambda tag, *_: tag >> 16 != 2
        )
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            raise BadInputError(path, "is a DICOM file deflated as a whole; save it otherwise")
        head.seek(0)
        header = pydicom.dcmread(head, stop_before_pixels=True, **options)
        is_cut = len(head.getbuffer()) == _LONGEST_HEADER
        if is_cut and head.read(2) not in _PIXELS:  # pydicom does not report a cut element
            reason = "is no readable DICOM file: its elements before the pixels take more than"
            raise BadInputError(path, f"{reason} {_LONGEST_HEADER} bytes; remove private ones")
        return header


def read_still(path: Path) -> np.ndarray:
    """Return the image of a DICOM file, (H, W, 3) uint8 RGB; raise BadInputError unless it holds
    one that can be read."""
    frames = list(itertools.islice(iter_rgb(path, read_header(path)), 2))
    if len(frames) != 1:
        count = len(frames) or "no"
        raise BadInputError(path, f"holds {count} or more frames; save each in a file")
    return frames[0]


def iter_rgb(path: Path, header: Any) -> Iterator[np.ndarray]:
    """Yield the frames of a still or a sequence of stills, (H, W, 3) uint8 RGB as to be shown.

    Raises:
        BadInputError: no pixels, or a compression that cannot be undone here, such as a video's.
    """
    from pydicom.pixels import get_decoder, iter_pixels
    from pydicom.uid import JPEGTransferSyntaxes

    with hide_details(path, "its pixels cannot be read"):
        if not header.get("Rows") or not header.get("Columns"):
            raise BadInputError(path, "is a DICOM file without an image: no rows or columns")
        check_pixels(path, int(header.Columns), int(header.Rows))
        decoder = get_decoder(header.file_meta.TransferSyntaxUID)
        if not decoder.is_available:
            missing = "; ".join(decoder.missing_dependencies)
            raise BadInputError(path, f"its compression needs a decoder that is missing: {missing}")
        frames = iter_pixels(path)
        if decoder.UID in JPEGTransferSyntaxes:
            frames = _few_scans(frames, path, header)
        for pixels in frames:
            yield _dicom_to_rgb(pixels, header, path)


def _few_scans(frames: Iterator[np.ndarray], path: Path, header: Any) -> Iterator[np.ndarray]:
    """Yield `frames`, which are decoded from JPEGs, up to one whose few bytes take hours."""
    from pydicom import dcmread
    from pydicom.encaps import generate_frames

    number = int(header.get("NumberOfFrames") or 1)
    tables = header.get("ExtendedOffsetTable"), header.get("ExtendedOffsetTableLengths")
    with open(path, "rb") as file:
        dcmread(file, specific_tags=["Rows"], stop_before_pixels=True)
        file.seek(12, io.SEEK_CUR)  # tag, type and length of what follows
        for data in generate_frames(
            file, number_of_frames=number, extended_offsets=tables if all(tables) else None
        ):
            if (scans := data.count(b"\xff\xda")) > MAX_SCANS:
                reason = f"has a JPEG of {scans} scans, more than the {MAX_SCANS} allowed"
                raise BadInputError(path, f"{reason}; save it anew")
            yield from itertools.islice(frames, 1)


def _dicom_to_rgb(pixels: np.ndarray, header: Any, path: Path) -> np.ndarray:
    """A frame as it is to be shown, with 8 bits."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    kind = str(header.get("PhotometricInterpretation", ""))
    bits = int(header.get("BitsStored") or 8)
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
        bits = 8 * pixels.dtype.itemsize
    if pixels.ndim == 3:
        if pixels.shape[2] != 3:
            raise BadInputError(path, f"has {pixels.shape[2]} channels, so no clear colours")
        return (pixels >> bits - 8 if bits > 8 else pixels).astype(np.uint8)
    if not kind.startswith("MONOCHROME"):
        raise BadInputError(path, "is of a photometric interpretation that is not known")
    values = apply_modality_lut(pixels, header)
    windowed = apply_voi_lut(values, header).astype(float)
    # The values that black and white have: windows are scaled to what the bits can hold.
    lowest = -(2 ** (bits - 1)) if header.get("PixelRepresentation") else 0
    black, white = apply_modality_lut(np.array([lowest, lowest + 2**bits - 1]), header).tolist()
    gray = np.clip((windowed - black) / ((white - black) or 1), 0, 1)
    if kind == "MONOCHROME1":
        gray = 1 - gray
    return np.repeat(np.rint(255 * gray).astype(np.uint8)[:, :, None], 3, axis=2)


_LONGEST_PATH = 3000  # bytes; systems take no more than 4096 with the folder
_READ_RIGHTLY = ("1", "L", "RGB")
_AT_ONCE = 256  # images that are inspected ahead of their use
# of EXIF orientations, to the left, after mirroring where they do
_QUARTER_TURNS = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class SourceImage:
    """An image file that was decoded whole without an error."""

    path: Path
    width: int  # pixels as Detectron2 reads it, EXIF orientation applied
    height: int
    orientation: int  # EXIF's, 1 (upright) to 8
    mode: str  # Pillow's, e.g. "RGB", "I;16", "CMYK"; or "DICOM", or what is wrong with a TIFF
    needs_conversion: bool  # Detectron2 could misread the file
    sha256: str  # of the file's bytes


def check_folder(folder: Path) -> None:
    """Raise FileNotFoundError unless there is such a folder."""
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "no such folder"
        if is_archive(folder):
            problem = "is an archive: extract it first, and give the folder"
        raise FileNotFoundError(f"{folder}: {problem}")


def list_files(folder: Path, rejects: Rejects | None = None) -> list[Path]:
    """Return all files under `folder`, which may be a link itself, in sorted order.

    Hidden files and folders are left out, and a link to a folder inside, since its files are listed
    where they are.

    Args:
        rejects: takes links that lead out of the folder, unless it says to follow them, pipes,
            sockets, devices and folders that cannot be opened. None follows links to files, and
            leaves out the others.

    Raises:
        FileNotFoundError: there is no such folder.
        BadInputError: one of these under ``on_error="raise"``.
    """
    check_folder(folder)
    checks = rejects or Rejects("reject", follow_links=True)
    files, folders, followed = [], [folder], set()
    while folders:
        place, paths = folders.pop(), []
        with checks.catch():
            try:
                paths = sorted(place.iterdir())
            except PermissionError as error:
                raise BadInputError(place, f"cannot be opened: {error.strerror}") from error
        for path in paths:
            if path.name.startswith("."):
                continue
            with checks.catch():
                is_link = path.is_symlink()
                if is_link:
                    check_inside(folder, path, checks.follow_links)
                if not path.is_dir():
                    files.append(regular_file(path))
                elif not is_link:
                    folders.append(path)
                elif rejects and leads_out(folder, path) and path.resolve() not in followed:
                    followed.add(path.resolve())  # links can go round in a circle
                    folders.append(path)
    return sorted(files)


def is_image_name(path: Path) -> bool:
    """Whether it has the name of an image, and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def without_suffix(path: PurePath) -> PurePath:
    """A path without its file type. A number is none: it ends the UID by which a DICOM file that
    has no type is named."""
    return path if path.suffix[1:].isdecimal() else path.with_suffix("")


def by_stem(
    folder: Path, rejects: Rejects, taken: Callable[[Path], bool] = lambda path: True
) -> dict[str, Path]:
    """Return files by their path in `folder` `without_suffix`, in which image and mask may differ;
    of all files those that are `taken`."""
    files: dict[str, Path] = {}
    for path in filter(taken, list_files(folder, rejects)):
        stem = without_suffix(path.relative_to(folder)).as_posix()
        with rejects.catch():
            if stem in files:
                reason = f"duplicate: same name as {files[stem]} but for the suffix"
                raise BadInputError(path, reason)
            files[stem] = path
    return files


def check_name(file_name: object, source: Path) -> None:
    """Raise BadInputError, blaming `source`, if it can be the name of no file."""
    if not isinstance(file_name, str) or not file_name.strip("./\\") or "\0" in file_name:
        raise BadInputError(source, f"file_name {file_name!r} is no file name")
    name = file_name.encode("utf-8", "surrogatepass")
    if len(name) > _LONGEST_PATH or max(map(len, name.split(b"/"))) > LONGEST_NAME:
        raise BadInputError(source, f"file_name {file_name[:50]!r}... is too long for a file name")


def check_utf8(file_name: str, source: Path) -> None:
    """Raise BadInputError, naming `source`, for a file name in another encoding, as old archives
    have them: JSON cannot hold it."""
    try:
        file_name.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(source, "has a name that is no UTF-8; rename it") from error


def path_inside(folder: Path, file_name: object, source: Path, follow_links: bool = False) -> Path:
    """Return `folder` / `file_name`; `follow_links` allows links that lead out of the folder.

    Raises:
        BadInputError: blames `source`: the name leads outside, or is no name at all.
    """
    check_name(file_name, source)
    relative = PurePosixPath(file_name)
    if relative.is_absolute() or ".." in relative.parts or Path(file_name).drive:
        raise BadInputError(source, f"file_name {file_name!r} leads outside {folder}")
    return check_inside(folder, folder / relative, follow_links)


def image_inside(folder: Path, file_name: object, source: Path) -> Path:
    """Return `path_inside` of a file that exists, else raise FileNotFoundError."""
    path = path_inside(folder, file_name, source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    return path


def inspect_image(path: Path) -> SourceImage:
    """Decode an image whole, so that a truncated file is found now and not while training; raise
    as `read_image`."""
    image, orientation, sha256 = _decode(path)
    mode = "DICOM" if image.format == "DICOM" else getattr(image, "misread", "") or image.mode
    needs_conversion = mode not in _READ_RIGHTLY or image.has_transparency_data
    if needs_conversion:
        _to_rgb(image, path)  # to fail now if at all
    width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
    return SourceImage(path, width, height, orientation, mode, needs_conversion, sha256)


def install_image(image: SourceImage, folder: Path, file_name: str) -> None:
    """Put `image` at `folder` / `file_name`: a hard link, else a copy; a PNG if converted."""
    target = folder / file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    if image.needs_conversion:
        rgb = _to_rgb(_decode(image.path)[0], image.path)
        _turn(rgb, image.orientation).save(target)
    else:
        link_or_copy(image.path, target)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to a file, or a copy where that cannot be."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def read_image(path: Path) -> np.ndarray:
    """Return an image as shown: (H, W, 3) uint8 RGB whatever the mode, EXIF orientation applied.

    Raises:
        BadInputError: missing, damaged, several images in one file, or no clear meaning as RGB.
    """
    image, orientation, _ = _decode(path)
    if image.mode not in _READ_RIGHTLY or image.has_transparency_data:
        image = _to_rgb(image, path)
    return np.asarray(_turn(image.convert("RGB"), orientation))


def pixel_sha256(path: Path) -> str:
    """Return the SHA-256 of an image's size and pixels as `read_image` gives them: the same for
    every file, name and lossless format of the same image, another for any scaled copy.

    Raises:
        BadInputError: as `read_image`.
    """
    return pixels_sha256(read_image(path))


def pixels_sha256(pixels: np.ndarray) -> str:
    """Return the SHA-256 of the shape and values of an (H, W, 3) uint8 image."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()


def read_mask(path: Path) -> np.ndarray:
    """Return a mask image as shown: (H, W) bool, true where the gray value is at least 128, since
    JPEG masks are not binary.

    Raises:
        BadInputError: missing, damaged or several images in one file.
    """
    image, orientation, _ = _decode(path)
    if image.mode not in _READ_RIGHTLY:
        image = _to_rgb(image, path)
    return np.asarray(_turn(image.convert("L"), orientation)) >= 128


def read_values(path: Path) -> tuple[np.ndarray, bool]:
    """Return a mask image whose pixels hold numbers, as shown: (H, W) integers or bool, of a
    palette image its indices; and whether the file's format changes numbers (JPEG).

    Where an alpha channel is below 128, it is 0.

    Raises:
        BadInputError: missing, damaged, several images in one file, in colour or with fractions; or
            the transparency leaves nothing of what is there.
    """
    image, orientation, _ = _decode(path)
    values = np.asarray(image)
    if values.ndim == 3:
        opaque = values[..., -1] >= 128 if image.mode in ("RGBA", "LA") else np.True_
        colours = values[..., : 3 if image.mode in ("RGB", "RGBA") else 1]
        values = colours[..., 0]
        if not (colours == values[..., None]).all():
            raise BadInputError(path, "is in colour: save it with one channel, or with a palette")
        if not opaque.all():
            beneath, values = values, np.where(opaque, values, 0)
            if not values.any() and (opaque.any() or len(np.unique(beneath)) > 1):
                reason = "is black where it is not transparent: save it with one channel, on black"
                raise BadInputError(path, reason)
    if values.dtype.kind not in "biu" or values.min() < 0:
        raise BadInputError(path, "its pixels are no whole numbers from 0 on")
    return orient(values, orientation), image.format == "JPEG"


def annotated_on_stored_pixels(image: SourceImage, width: int, height: int) -> bool:
    """Whether annotations of a `width` x `height` frame need `orient` to fit the image as read; not
    where both frames of an EXIF-rotated image have that size.

    Raises:
        BadInputError: the size fits neither frame.
    """
    if (width, height) == (image.width, image.height):
        return False
    if image.orientation in _SIDEWAYS and (height, width) == (image.width, image.height):
        return True
    raise BadInputError(
        image.path, f"is {image.width}x{image.height}, but its annotation says {width}x{height}"
    )


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W) stored pixels of any type, a mask's say, as EXIF orientation 1..8 shows them."""
    if orientation in (2, 4, 5, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels, _QUARTER_TURNS.get(orientation, 0)))


def orient_box(
    box: Sequence[float], width: int, height: int, orientation: int
) -> tuple[float, float, float, float]:
    """The XYWH box on stored pixels of this size where `orient` puts what is in it."""
    x, y, w, h = box
    if orientation in (2, 4, 5, 7):
        x = width - x - w
    for _ in range(_QUARTER_TURNS.get(orientation, 0) % 4):
        x, y, w, h = y, width - x - w, h, w
        width, height = height, width
    return x, y, w, h


def fit_to_image(
    pixels: np.ndarray, image: SourceImage, path: Path, notes: list[str]
) -> np.ndarray:
    """Return the (H, W) mask of `path` in the frame of the image as read, turned if it is of the
    stored one; raise as `annotated_on_stored_pixels`. Where only EXIF says how the image is to be
    shown, `notes` takes one."""
    if annotated_on_stored_pixels(image, pixels.shape[1], pixels.shape[0]):
        return orient(pixels, image.orientation)
    if image.orientation != 1:
        notes.append(f"{path}: EXIF-rotated image, mask taken as of the rotated image")
    return pixels


def _decode(path: Path) -> tuple[Image.Image, int, str]:
    """The image as stored, its EXIF orientation, and the sha256 of the file's bytes."""
    if is_dicom(image_file(path)):
        try:
            image = Image.fromarray(read_still(path))
        except ModuleNotFoundError as error:
            reason = f"is a DICOM file, which needs {error.name}: {install_extra('deploy')}"
            raise BadInputError(path, reason) from error
        image.format = "DICOM"
        return image, 1, file_sha256(path)
    with open_image(path) as image:
        try:
            if image.format != "MPO":  # a camera's photograph and previews of it
                with contextlib.suppress(EOFError):
                    image.seek(1)  # to count them all can take hours
                    reason = "holds several images; save each in a file, or all as a video"
                    raise BadInputError(path, reason)
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except BadInputError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise BadInputError(path, f"is no readable image ({error})") from error
    return image, orientation, file_sha256(path)


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """Apply an EXIF orientation; the result carries none."""
    upright = Image.fromarray(np.asarray(image))
    upright.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(upright)


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """8-bit RGB: 16 bit scaled by 1/257, transparency laid on black, CMYK by its profile."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            reason = f"pixels of mode {image.mode!r} have no fixed range"
            raise BadInputError(path, f"{reason}; save 8 bits a channel")
        if 0 < values.max() < 4096:
            reason = f"16-bit image with values up to {values.max()} only, so nearly black"
            raise BadInputError(path, f"{reason}; rescale it to 8 bits a channel")
        gray = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if image.mode == "CMYK" and "icc_profile" in image.info:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as error:
            raise BadInputError(path, f"its CMYK profile cannot be used ({error})") from error
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPool]:
    """One thread per core: Pillow, OpenCV and NumPy run in parallel, and processes would each have
    to import torch first."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    inner = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(1), ThreadPool(cores) as pool:
            yield pool
    finally:
        cv2.setNumThreads(inner)


def in_threads(function: Callable, items: Sequence, description: str) -> list:
    """Return [function(item) for item in items], in threads, with a bar."""
    with _threads() as pool:
        return list(tqdm(pool.imap(function, items), description, len(items), unit="image"))


def inspect_images(paths: Iterable[Path]) -> Iterator[SourceImage | BadInputError]:
    """Yield `inspect_image` of each, or what it raises, in threads and some images ahead."""
    paths = iter(paths)
    with _threads() as pool:
        while batch := [*itertools.islice(paths, _AT_ONCE)]:
            yield from pool.map(_inspected, batch)


def _inspected(path: Path) -> SourceImage | BadInputError:
    try:
        return inspect_image(path)
    except BadInputError as error:
        return error
