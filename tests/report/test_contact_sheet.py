import numpy as np
import pycocotools.mask as mask_util
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.report.plots import plot_contact_sheet
from imrcnn_d2.report.plots.images import CONTOURS

SIZE = 60


def square(image_id, x, y, size=20, **fields):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[y : y + size, x : x + size] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    return {
        "image_id": image_id,
        "category_id": 1,
        "bbox": [x, y, size, size],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        **fields,
    }


@pytest.fixture
def make(tmp_path):
    """A function that writes n grey images and returns their COCO dict."""

    def do(number, annotations=()):
        images = []
        for i in range(1, number + 1):
            images.append({"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE})
            Image.new("RGB", (SIZE, SIZE), (120, 120, 120)).save(tmp_path / f"{i}.png")
        annotations = [a | {"id": i} for i, a in enumerate(annotations, 1)]
        return {
            "images": images,
            "categories": [{"id": 1, "name": "lesion"}],
            "annotations": annotations,
        }

    return do


def sheet(gt, results, folder, **options):
    """The contact sheet at a threshold of 0.7."""
    path = folder / "sheet.png"
    return plot_contact_sheet(evaluate_lesions(gt, results), folder, path, **options)


def contours(axes):
    """{kind: [(left, top, right, bottom)]} of the lines in a tile."""
    kinds = {to_rgb(style["color"]): kind for kind, style in CONTOURS.items()}
    found = {}
    for line in axes.lines:
        xy = line.get_xydata()
        box = (*xy.min(axis=0).tolist(), *xy.max(axis=0).tolist())
        found.setdefault(kinds[to_rgb(line.get_color())], []).append(box)
    return found


def tiles(figure):
    return [axes for axes in figure.axes if axes.images]


def test_four_kinds_of_contours_where_they_belong(make, tmp_path):
    gt = make(1, [square(1, 0, 0), square(1, 30, 0), square(1, 0, 40, 15, iscrowd=1)])
    results = [
        square(1, 2, 0, score=0.9),
        square(1, 30, 30, score=0.8),
        square(1, 2, 42, 10, score=0.95),  # in the crowd: counts nowhere
        square(1, 30, 0, score=0.6),  # below the threshold: the lesion stays missed
    ]
    figure = sheet(gt, results, tmp_path)
    (tile,) = tiles(figure)
    assert contours(tile) == {
        "ground truth": [(0, 0, 19, 19)],
        "missed lesion": [(30, 0, 49, 19)],
        "hit": [(2, 0, 21, 19)],
        "false alarm": [(30, 30, 49, 49)],
    }
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(CONTOURS)
    for key in ("color", "linestyle"):
        assert len({style[key] for style in CONTOURS.values()}) == 4
    # 360 of 400 pixels are in common, 40 more the detection's alone; all else adds to the union.
    expected = 100 * 360 / (20 * 20 * 2 + 40 + 400)
    assert tile.get_title() == f"1.png\nscore 0.90 · IoU {expected:.0f} %"
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for style in CONTOURS.values():
        distance = np.abs(pixels - 255 * np.array(to_rgb(style["color"]))).max(axis=2)
        assert (distance < 12).sum() > 50


def test_a_hole_has_a_contour_too(make, tmp_path):
    ring = np.zeros((SIZE, SIZE), np.uint8)
    ring[10:40, 10:40] = 1
    ring[20:30, 20:30] = 0
    rle = mask_util.encode(np.asfortranarray(ring))
    gt = make(1, [square(1, 0, 0) | {"segmentation": rle, "bbox": [10, 10, 30, 30]}])
    figure = sheet(gt, [], tmp_path)
    assert len(contours(tiles(figure)[0])["missed lesion"]) == 2


def test_boxes_alone(make, tmp_path):
    annotations = [square(1, 0, 0), square(2, 0, 0)]
    results = [square(1, 0, 0, score=0.9)]
    for record in (*annotations, *results):
        del record["segmentation"]
    figure = sheet(make(2, annotations), results, tmp_path)
    missed, hit = tiles(figure)
    assert missed.get_title() == "2.png\nscore 0.00 · missed"
    assert hit.get_title() == "1.png\nscore 0.90 · box IoU 100 %"
    assert contours(hit)["hit"] == [(-0.5, -0.5, 19.5, 19.5)]


def names(figure):
    return [int(axes.get_title().split(".png")[0]) for axes in tiles(figure)]


def test_worst_first_then_a_spread_of_the_rest(make, tmp_path):
    # Images 1 to 5 are overlapped the worse the later they come; 6 is missed; 7 and 8 are healthy.
    gt = make(8, [square(i, 0, 0) for i in range(1, 7)])
    results = [square(i, i - 1, 0, score=0.9) for i in range(1, 6)] + [square(7, 0, 0, score=0.8)]
    everything = names(sheet(gt, results, tmp_path))
    assert everything == [6, 7, 5, 4, 3, 2, 1, 8]
    chosen = names(sheet(gt, results, tmp_path, max_images=4))
    assert chosen == [6, 7, 5, 8]


def test_titles(make, tmp_path):
    gt = make(1)
    name = "a_very_long_name_of_a_file_that_is_no_use_in_a_title.png"
    (tmp_path / "1.png").rename(tmp_path / name)
    gt["images"][0]["file_name"] = name
    figure = sheet(gt, [], tmp_path)
    first, second = tiles(figure)[0].get_title().split("\n")
    assert len(first) == 30
    assert first.startswith("a_very_long_nam")
    assert first.endswith("title.png")
    assert second == "no lesion · score 0.00"
    assert figure.get_suptitle() == "1 of 1 images, worst first; detections with score ≥ 0.7"


def test_an_image_that_is_not_there(make, tmp_path):
    gt = make(1)
    (tmp_path / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1.png"):
        sheet(gt, [], tmp_path)


def test_no_images(make, tmp_path):
    assert not tiles(sheet(make(0), [], tmp_path))


def test_real_images(kvasir_352, tmp_path):
    """Masks of the data set itself as ground truth, shifted by some pixels as detections."""
    images, annotations, results = [], [], []
    for number, path in enumerate(sorted((kvasir_352 / "images").iterdir())[:3], 1):
        with Image.open(kvasir_352 / "masks" / path.name) as image:
            mask = (np.asarray(image.convert("L")) > 127).astype(np.uint8)
        height, width = mask.shape
        images.append({"id": number, "file_name": path.name, "height": height, "width": width})
        for records, shift in ((annotations, 0), (results, 4)):
            rle = mask_util.encode(np.asfortranarray(np.roll(mask, shift, axis=1)))
            records.append({"image_id": number, "category_id": 1, "segmentation": rle})
        results[-1]["score"] = 0.9
    gt = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "polyp"}]}
    scored = evaluate_lesions(gt, results)
    figure = plot_contact_sheet(scored, kvasir_352 / "images", tmp_path / "sheet.png")
    assert len(tiles(figure)) == 3
    for tile in tiles(figure):
        assert set(contours(tile)) == {"ground truth", "hit"}
