"""Every image is on a sheet, where a person can read what is written in it."""

import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.report.plots.images import plot_review_sheets


def test_every_image_is_shown(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(23):
        Image.new("RGB", (500, 400), (0, 10 * i, 255 - 10 * i)).save(images / f"{i:02d}.png")
    sheets = plot_review_sheets(images, tmp_path / "sheets")
    assert [sheet.name for sheet in sheets] == ["sheet_001.jpg", "sheet_002.jpg"]
    first, second = (np.asarray(Image.open(sheet)).astype(int) for sheet in sheets)
    assert first.shape == (4 * 368, 5 * 352, 3) and second.shape == (368, 5 * 352, 3)
    for i in (0, 7, 19, 22):
        sheet, place = (first, i) if i < 20 else (second, i - 20)
        y, x = 368 * (place // 5) + 140, 352 * (place % 5) + 176
        assert abs(sheet[y, x] - (0, 10 * i, 255 - 10 * i)).max() < 6
        assert (sheet[y + 212 : y + 226, x - 172 : x] < 100).any(), "its name"
    with pytest.raises(FileExistsError, match="is not empty"):
        plot_review_sheets(images, tmp_path / "sheets")
