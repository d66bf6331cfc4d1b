"""Reading, checking and normalising one image file.

Detectron2 reads images with Pillow: it applies the EXIF orientation and then ``convert("RGB")``,
which clips 16-bit values, drops an alpha channel and ignores a CMYK profile. Files in such modes
are converted here.
"""

import hashlib
import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from imrcnn_d2.data.dicom import is_dicom, read_still
from imrcnn_d2.data.files import (
    check_inside,
    image_file,
    leads_out,
    open_image,
    regular_file,
)
from imrcnn_d2.data.rejects import BadInputError, Rejects

__all__ = [
    "SourceImage",
    "by_stem",
    "check_name",
    "drawn_on_stored_pixels",
    "image_inside",
    "inspect_image",
    "install_image",
    "link_or_copy",
    "list_files",
    "orient",
    "path_inside",
    "read_image",
    "read_mask",
]

_READ_RIGHTLY = ("1", "L", "RGB")
# of EXIF orientations, to the left, after mirroring where they do
_QUARTER_TURNS = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class SourceImage:
    """An image file that was decoded whole without an error.

    Attributes:
        path: the file.
        width, height: pixels as Detectron2 reads it, EXIF orientation applied.
        orientation: EXIF orientation, 1 (upright) to 8.
        mode: Pillow's mode, e.g. "RGB", "I;16", "CMYK"; or "DICOM".
        needs_conversion: whether Detectron2 could misread the file.
        sha256: of the file's bytes.
    """

    path: Path
    width: int
    height: int
    orientation: int
    mode: str
    needs_conversion: bool
    sha256: str


def list_files(folder: Path, rejects: Rejects | None = None) -> list[Path]:
    """All files under `folder`, hidden ones and those in hidden folders left out, in sorted order.

    A link to a folder inside is left out, since its files are listed where they are.

    Args:
        folder: may be a link itself.
        rejects: takes links that lead out of the folder, unless it says to follow them, and pipes,
            sockets and devices. None follows links to files, and leaves out the others.

    Raises:
        FileNotFoundError: there is no such folder.
        BadInputError: one of these under ``on_error="raise"``.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    checks = rejects or Rejects("reject", follow_links=True)
    files, folders, followed = [], [folder], set()
    while folders:
        try:
            paths = sorted(folders.pop().iterdir())
        except PermissionError:
            continue
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


def by_stem(folder: Path, rejects: Rejects) -> dict[str, Path]:
    """Files by their path in `folder` without suffix, since image and mask may differ in it."""
    files: dict[str, Path] = {}
    for path in list_files(folder, rejects):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        with rejects.catch():
            if stem in files:
                raise BadInputError(
                    path, f"duplicate: same name as {files[stem]} but for the suffix"
                )
            files[stem] = path
    return files


def check_name(file_name: object, source: Path) -> None:
    """Raises BadInputError, blaming `source`, if it can be the name of no file."""
    if not isinstance(file_name, str) or not file_name.strip("./\\") or "\0" in file_name:
        raise BadInputError(source, f"file_name {file_name!r} is no file name")


def path_inside(folder: Path, file_name: object, source: Path, follow_links: bool = False) -> Path:
    """`folder` / `file_name`, refused if that leads outside the folder.

    Args:
        folder: may be a link itself.
        file_name: relative to it.
        source: names the file, and is blamed for a name that leads outside or is none.
        follow_links: whether links may.

    Raises:
        BadInputError: it leads outside, or is no name at all.
    """
    check_name(file_name, source)
    relative = PurePosixPath(file_name)
    if relative.is_absolute() or ".." in relative.parts or Path(file_name).drive:
        raise BadInputError(source, f"file_name {file_name!r} leads outside {folder}")
    return check_inside(folder, folder / relative, follow_links)


def image_inside(folder: Path, file_name: object, source: Path) -> Path:
    """`path_inside` of a file that is there.

    Raises:
        BadInputError: see `path_inside`.
        FileNotFoundError: there is no such file.
    """
    path = path_inside(folder, file_name, source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    return path


def inspect_image(path: Path) -> SourceImage:
    """Decodes an image whole, so that a truncated file is found now and not while training.

    Raises:
        BadInputError: missing, unreadable, truncated, several images in one file, or without a
            clear meaning as RGB.
    """
    image, orientation, sha256 = _decode(path)
    mode = "DICOM" if image.format == "DICOM" else image.mode
    needs_conversion = mode not in _READ_RIGHTLY or image.has_transparency_data
    if needs_conversion:
        _to_rgb(image, path)  # to fail now if at all
    width, height = image.size
    if orientation in _SIDEWAYS:
        width, height = height, width
    return SourceImage(path, width, height, orientation, mode, needs_conversion, sha256)


def install_image(image: SourceImage, folder: Path, file_name: str) -> None:
    """Puts `image` at `folder` / `file_name`: a hard link, else a copy; a PNG if converted."""
    target = folder / file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    if image.needs_conversion:
        rgb = _to_rgb(_decode(image.path)[0], image.path)
        _turn(rgb, image.orientation).save(target)
        return
    link_or_copy(image.path, target)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to a file, or a copy where that cannot be."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def read_image(path: Path) -> np.ndarray:
    """Reads an image as shown: EXIF orientation applied, 8-bit RGB whatever the file's mode.

    Returns:
        (H, W, 3) uint8.

    Raises:
        BadInputError: missing, unreadable, truncated, several images in one file (an animation, a
            stack of pages), or without a clear meaning as RGB.
    """
    image, orientation, _ = _decode(path)
    if image.mode not in _READ_RIGHTLY or image.has_transparency_data:
        image = _to_rgb(image, path)
    return np.asarray(_turn(image.convert("RGB"), orientation))


def read_mask(path: Path) -> np.ndarray:
    """Reads a mask image as shown, its EXIF orientation applied.

    Returns:
        (H, W) bool, true where the gray value is at least 128: JPEG masks are not binary.

    Raises:
        BadInputError: missing, unreadable, truncated or several images in one file.
    """
    image, orientation, _ = _decode(path)
    if image.mode not in _READ_RIGHTLY:
        image = _to_rgb(image, path)
    return np.asarray(_turn(image.convert("L"), orientation)) >= 128


def read_values(path: Path) -> tuple[np.ndarray, bool]:
    """Reads a mask image whose pixels hold numbers, as shown: its EXIF orientation applied.

    Returns:
        (H, W) integers or bool, of a palette image its indices; and whether the file's format
        changes numbers (JPEG).

    Raises:
        BadInputError: missing, unreadable, truncated, several images in one file, in colour or with
            fractions.
    """
    image, orientation, _ = _decode(path)
    values = np.asarray(image)
    if values.ndim == 3:
        colours = values[..., : 3 if image.mode in ("RGB", "RGBA") else 1]
        if not (colours == colours[..., :1]).all():
            raise BadInputError(
                path, "is in colour: save it with one channel that holds numbers, or with a palette"
            )
        values = colours[..., 0]
    if values.dtype.kind not in "biu" or values.min() < 0:
        raise BadInputError(path, "its pixels are no whole numbers from 0 on")
    return orient(values, orientation), image.format == "JPEG"


def drawn_on_stored_pixels(image: SourceImage, width: int, height: int) -> bool:
    """Whether annotations of a `width` x `height` frame need `orient` to fit the image as read.

    Where both frames of an EXIF-rotated image have that size, they are taken to be drawn on what is
    shown.

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
    """Turns (H, W) stored pixels of any type, a mask's say, as EXIF orientation 1..8 shows them."""
    if orientation in (2, 4, 5, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(np.rot90(pixels, _QUARTER_TURNS.get(orientation, 0)))


def _decode(path: Path) -> tuple[Image.Image, int, str]:
    """The image as stored, its EXIF orientation, and the sha256 of the file's bytes."""
    if is_dicom(image_file(path)):
        return _read_dicom(path), 1, _sha256(path)
    with open_image(path) as image:
        try:
            if image.format != "MPO":  # a camera's photograph and previews of it
                _check_single(image, path)
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except BadInputError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise BadInputError(path, f"is no readable image ({error})") from error
    return image, orientation, _sha256(path)


def _check_single(image: Image.Image, path: Path) -> None:
    try:
        image.seek(1)  # to count them all can take hours
    except EOFError:
        return
    raise BadInputError(path, "holds several images; save each in a file, or all as a video")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise BadInputError(path, f"cannot be opened: {error.strerror}") from error
    return digest.hexdigest()


def _read_dicom(path: Path) -> Image.Image:
    try:
        image = Image.fromarray(read_still(path))
    except ModuleNotFoundError as error:
        reason = f"is a DICOM file, which needs {error.name}: pip install -e '.[deploy]'"
        raise BadInputError(path, reason) from error
    image.format = "DICOM"
    return image


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """Applies an EXIF orientation; the result carries none."""
    upright = Image.fromarray(np.asarray(image))
    upright.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(upright)


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """8-bit RGB: 16 bit scaled by 1/257, transparency laid on black, CMYK by its profile."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise BadInputError(
                path,
                f"pixels of mode {image.mode!r} have no fixed range; save it with 8 bits a channel",
            )
        if 0 < values.max() < 4096:
            raise BadInputError(
                path,
                f"16-bit image with values up to {values.max()} only, so nearly black: probably "
                "fewer bits in a 16-bit file; rescale it to 8 bits a channel",
            )
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
