"""What to predict on: images, videos and DICOM files, out of paths, folders and patterns."""

import glob
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from imrcnn_d2.data.dicom import is_dicom
from imrcnn_d2.data.files import regular_file
from imrcnn_d2.data.images import list_files, read_image
from imrcnn_d2.data.rejects import BadInputError, Rejects

from .dicom import public_name, read_dicom
from .video import Frame, decode_video

__all__ = ["Source", "find_inputs", "read_frames"]

logger = logging.getLogger(__name__)

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
        path (Path): the file.
        name (str): what outputs call it: relative to the folder that all inputs share, with "/"; of
            a DICOM file, by its content.
        kind (str): "image", "video" or "dicom".
    """

    path: Path
    name: str
    kind: str


def find_inputs(inputs, *, leave_out=(), follow_links=False):
    """
    Args:
        inputs (list[str or Path]): files, folders and glob patterns of these ("**" for any
            folders). A folder gives all images, videos and DICOM files under it; other files
            there, and hidden ones, are left out. A file that is named is taken whatever its suffix,
            as an image if no other.
        leave_out (list[Path]): folders whose files are no inputs, such as those of outputs.
        follow_links (bool): whether links in a folder may lead out of it; else they are left out.

    Returns:
        tuple[Path, list[Source]]: the folder that all inputs share, and each file once, by name;
        of DICOM files with the same content, the first.

    Raises:
        FileNotFoundError: an input does not exist, or nothing at all is found.
        BadInputError: one is a pipe or device.
    """
    found, roots = {}, []
    for given in map(os.fspath, inputs):
        path = Path(given)
        matches = [path] if path.exists() else list(map(Path, glob.glob(given, recursive=True)))
        if not matches:
            raise FileNotFoundError(f"{given}: no such file, folder or pattern with a match")
        for match in matches:
            # A link is a file of its own, with its own name.
            if match.is_dir():
                found.update(
                    (_absolute(file), kind) for file, kind in _in_folder(match, follow_links)
                )
                roots.append(match)
            elif match.exists() and not match.is_file():
                raise BadInputError(match, "is neither a file nor a folder: name one of these")
            else:
                # A link that leads nowhere is listed, by no name if it is one of a DICOM file.
                found[_absolute(match)] = _kind(match) or "image"
                roots.append(_absolute(match).parent)
    left_out = set(map(_absolute, leave_out))
    found = {file: kind for file, kind in found.items() if left_out.isdisjoint(file.parents)}
    if not found:
        raise FileNotFoundError(
            f"No image, video or DICOM file under {', '.join(map(str, inputs))}"
        )
    root = Path(os.path.commonpath(map(_absolute, roots)))
    sources = {}
    for path in tqdm(sorted(found), desc="Listing", unit="file", delay=2, leave=False):
        dicom = found[path] == "dicom"
        name = public_name(path) if dicom else path.relative_to(root).as_posix()
        sources.setdefault(name, Source(path, name, found[path]))
    return root, [sources[name] for name in sorted(sources)]


def _in_folder(folder, follow_links):
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


def read_frames(source):
    """
    Args:
        source (Source):

    Yields:
        Frame: one of an image, those of a video or DICOM file in turn.

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


def _kind(path):
    """ "image", "video" or "dicom"; None for another file."""
    suffix = path.suffix.lower()
    # By its content first: DICOM files have any name, and what they are called must not get out.
    if suffix in DICOM or is_dicom(path):
        return "dicom"
    if suffix in VIDEOS:
        return "video"
    return "image" if suffix in IMAGES else None
