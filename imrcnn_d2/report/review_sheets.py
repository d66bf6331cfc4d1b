"""Sheets of all images of a folder, for a person to look through."""

import math
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from imrcnn_d2.data.files import open_image
from imrcnn_d2.data.images import list_files

__all__ = ["draw_review_sheets"]

_COLUMNS, _ROWS = 5, 4
_TILE = 352  # pixels: writing can still be told from mucosa
_NAME = 16  # pixels for the line below


def draw_review_sheets(images: Path, folder: Path) -> list[Path]:
    """Draws 20 images a sheet, each with its name, in the order of their names.

    Args:
        images: the folder of images.
        folder: for sheet_001.jpg, sheet_002.jpg, ...; must not hold any before.

    Returns:
        the sheets.

    Raises:
        FileExistsError: the folder is not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; choose another folder for the sheets")
    paths, sheets = list_files(images), []
    number = math.ceil(len(paths) / (_COLUMNS * _ROWS))
    for i in tqdm(range(number), desc="Review sheets", unit="sheet"):
        part = paths[i * _COLUMNS * _ROWS : (i + 1) * _COLUMNS * _ROWS]
        sheets.append(folder / f"sheet_{i + 1:03d}.jpg")
        _drawn(part, images).save(sheets[-1], quality=92)
    return sheets


def _drawn(paths: list[Path], root: Path) -> Image.Image:
    rows = math.ceil(len(paths) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * (_TILE + _NAME)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, path in enumerate(paths):
        x, y = i % _COLUMNS * _TILE, i // _COLUMNS * (_TILE + _NAME)
        with open_image(path) as image:
            image.thumbnail((_TILE - 4, _TILE - 4))
            sheet.paste(image, (x + 2, y + 2))
        draw.text((x + 4, y + _TILE), path.relative_to(root).as_posix(), "black")
    return sheet
