"""Plots: curves, matrices, contours, contact sheets."""

import json
import re

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from rectangles import rectangle
from scipy.stats import beta
from sklearn.metrics import auc, roc_curve

from imrcnn_d2.data.catalog import register_classification_dataset
from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES
from imrcnn_d2.engine import load_config
from imrcnn_d2.evaluation import (
    Bootstrap,
    ClassificationEvaluator,
    OperatingPoint,
    evaluate_classification,
    evaluate_lesions,
)
from imrcnn_d2.evaluation.calibration import Calibration
from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix, UnitCounts
from imrcnn_d2.evaluation.detection.curves import FROC, pr_curve
from imrcnn_d2.evaluation.detection.inputs import Regions
from imrcnn_d2.evaluation.subgroups import By, with_groups
from imrcnn_d2.modeling import ImageClassifier
from imrcnn_d2.report import plots
from imrcnn_d2.report.plots import curves, draw_all, plot_pr_panels, plot_robustness
from imrcnn_d2.report.plots.style import STYLES
from imrcnn_d2.report.tables import groups_table


def coco(number, annotations=(), size=(40, 50), **fields):
    """A COCO dict of images 1, 2, ...; ``fields`` have a value for each image."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": size[0], "width": size[1]}
        | {key: values[i - 1] for key, values in fields.items()}
        for i in range(1, number + 1)
    ]
    annotations = [{**annotation, "id": i} for i, annotation in enumerate(annotations, 1)]
    categories = [{"id": 1, "name": "polyp"}]
    return {"images": images, "categories": categories, "annotations": annotations}


def test_figures_are_saved_at_a_bounded_size_with_names_as_they_are(tmp_path):
    """``$`` begins no mathematics, and a name that begins with ``_`` is in the legend."""
    figure = Figure(figsize=(2, 1), layout="constrained")
    axes = figure.add_subplot(title=r"$\foo$")
    axes.plot([0, 1], label=plots.style.legend_label(r"_$\foo$"))
    axes.set_yticks([0, 1], [r"$\foo$", r"$\bar$"])
    assert [text.get_text() for text in axes.legend().get_texts()] == [r" _$\foo$"]
    path, most = tmp_path / "new" / "a.png", plots.style.MOST_PIXELS
    for saved, dpi, size in ((figure, 100, (200, 100)), (Figure((400, 2)), 200, (most, 40))):
        plots.style.save_figure(saved, path, dpi=dpi)
        with Image.open(path) as image:
            assert (image.format, image.size) == ("PNG", size)
    plots.style.save_figure(figure, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


OF_DETECTOR = ["confusion_matrix", "pr_curve", "froc", "calibration", "thresholds"]


@pytest.mark.parametrize("scores", [(0.9, 0.4), (), (None, None)])
def test_all_plots_of_a_detector(scores, tmp_path):
    expected = OF_DETECTOR[:1] if None in scores else OF_DETECTOR
    box = {"category_id": 1, "bbox": [0, 0, 10, 10]}
    data = coco(2, [{**box, "image_id": i} for i in (1, 2)], centre="AA")
    dt = [{**box, "image_id": 1, "score": score} for score in scores]
    results = evaluate_lesions(data, dt, iou_type="bbox")
    for i in (1, 2):
        Image.new("RGB", (50, 40)).save(tmp_path / f"{i}.png")
    paths = plots.draw_all(with_groups(results, [By("centre")]), tmp_path, tmp_path)
    assert [path.stem for path in paths] == [
        *(*expected, "by_centre", "contact_sheet", "contact_sheet_worst")
    ]
    assert all(np.asarray(Image.open(path).convert("L")).std() > 5 for path in paths)


def test_confusion_matrix(tmp_path):
    counts = np.array([[6, 1, 1], [0, 0, 0], [3, 2, np.nan]])
    matrix = ConfusionMatrix(["cancer", "ulcer", "background"], counts)
    both = {"a": matrix, "b": matrix}
    axes, other = plots.matrices.plot_confusion_matrix(both, tmp_path / "matrix.svg").axes
    assert (axes.get_title(), other.get_title()) == ("a", "b")
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert (cells[0, 0], cells[1, 0]) == ("6\n75.0 %", "1\n12.5 %")  # x is the prediction
    assert (cells[0, 1], cells[0, 2]) == ("0", "3")
    assert (2, 2) not in cells and len(axes.patches) == 1
    assert [tick.get_text() for tick in axes.get_yticklabels()] == matrix.classes
    (shade,) = [child for child in axes.get_children() if isinstance(child, AxesImage)]
    assert shade.get_array()[0].tolist() == [0.75, 0.125, 0.125]
    assert not shade.get_array()[1:].any()


def cells(table):
    lines = [line for line in table.splitlines() if "|" in line]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_table_and_plot_of_groups(tmp_path):
    """Centre A finds 2 of 3, B its only lesion; one lesion-free image each, a false alarm in B."""
    lesions = [rectangle(i, 0, 0, 10, 10, paris="Is") for i in (1, 2, 3, 5)]
    dt = [rectangle(i, 0, 0, 10, 10, score=0.9) for i in (1, 2, 5, 6)]
    bootstrap = Bootstrap(200)
    whole = evaluate_lesions(coco(6, lesions, centre="AAAABB"), dt, bootstrap=bootstrap)
    grouped = with_groups(whole, [By("centre"), By("paris")], bootstrap=bootstrap)
    rows = cells(groups_table(grouped, "centre"))
    assert rows[""] == ["all", "A", "B"]
    assert rows["images"] == ["6", "4", "2"] and rows["lesions"] == ["4", "3", "1"]
    assert [cell.split()[0] for cell in rows["lesion recall"]] == ["75.00", "66.67", "100.00"]
    assert [cell.split()[0] for cell in rows["image specificity"]] == ["50.00", "100.00", "0.00"]
    low, high = grouped.by_group["centre"].groups["A"].intervals["lesion"]["recall"]
    assert rows["lesion recall"][1] == f"66.67 [{low:.2f}, {high:.2f}] (n 3†)"
    assert rows["image specificity"][0].endswith(" (n 2†)")
    assert "†" in groups_table(grouped, "centre").splitlines()[-1]
    rows = cells(groups_table(grouped, "paris"))
    assert rows[""] == ["all", "Is"] and "lesion precision" not in rows
    first, _, axes, *_, last = plots.curves.plot_groups(grouped, "centre", tmp_path / "by.png").axes
    assert (axes.get_title(), last.get_title()) == ("recall (lesions)", "specificity (images)")
    labels = [label.get_text() for label in first.get_yticklabels()]
    assert labels == ["all\n4 lesions, 6 images", "A\n3 lesions, 4 images", "B\n1 lesion, 2 images"]
    dots = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    points = [(*dot.get_xdata(), *dot.get_ydata()) for dot in dots]
    assert points == [(75, 0), (pytest.approx(200 / 3), 1), (100, 2)]
    assert any(list(line.get_xdata()) == [low, high] for line in axes.lines)
    assert [text.get_text() for text in axes.texts] == ["4†", "3†", "1†", "n"]
    assert all(dot.get_markerfacecolor() == "white" for dot in dots)


def test_groups_at_the_threshold_of_the_weights(tmp_path):
    lesions = [rectangle(i, 0, 0, 10, 10) for i in range(1, 7)]
    dt = [rectangle(i, 0, 0, 10, 10, score=0.6) for i in range(1, 7)]
    point = {"operating_point": OperatingPoint(0.55, "f1", "val")}
    whole = evaluate_lesions(coco(6, lesions, centre="AAAAAB"), dt, **point)
    grouped = with_groups(whole, [By("centre")], **point)
    rows = cells(groups_table(grouped, "centre"))
    assert rows["tau_val.lesion recall"] == ["100.00 (n 6)", "100.00 (n 5)", "100.00 (n 1†)"]
    assert "lesion recall" not in rows
    figure = plots.curves.plot_groups(grouped, "centre", tmp_path / "by.png")
    dots = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "o"]
    assert {dot.get_xdata()[0] for dot in dots} == {100}
    assert "0.55" in figure.get_suptitle()


def test_groups_with_unknown_patients_and_undefined_metrics(tmp_path):
    data = coco(3, [rectangle(i, 0, 0, 10, 10) for i in (1, 2, 3)], centre="AAB")
    data["images"][0]["patient_id"] = data["images"][1]["patient_id"] = "p"
    whole = with_groups(evaluate_lesions(data, []), [By("centre")])
    assert cells(groups_table(whole, "centre"))["patients"] == ["1", "1", ""]
    panels = plots.curves.plot_groups(whole, "centre", tmp_path / "by.png").axes
    titles = [axes.get_title() for axes in panels]
    assert "specificity (images)" not in titles and "recall (lesions)" in titles
    nothing = with_groups(evaluate_lesions(coco(2, centre="AB"), []), [By("centre")])
    assert cells(groups_table(nothing, "centre"))["lesions"] == ["0", "0", "0"]


def test_contours_run_through_the_outermost_pixels():
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[3:9, 5:17] = 1
    mask[5:7, 8:12] = 0  # a hole
    nothing, boxes = np.zeros(1, int), np.array([[5.0, 3, 12, 6]])
    regions = Regions(nothing, nothing, boxes, [mask_util.encode(mask)])
    lines = sorted(plots.images.region_contours(regions, 0), key=len)
    assert all((line[0] == line[-1]).all() for line in lines)
    assert [line.min(axis=0).tolist() for line in lines] == [[7, 4], [5, 3]]
    assert [line.max(axis=0).tolist() for line in lines] == [[12, 7], [16, 8]]
    (line,) = plots.images.region_contours(Regions(nothing, nothing, boxes, None), 0)  # of a box
    assert line.min(axis=0).tolist() == [4.5, 2.5] and line.max(axis=0).tolist() == [16.5, 8.5]


def test_choice_of_images_over_several_models():
    # The sum of errors counts first, then the mean of the overlaps that are defined.
    nan, counts = np.nan, [((0, 90), (0, 80)), ((1, 90), (1, 90)), ((0, np.nan), (0, np.nan))]
    counts += [((2, 90), (0, 50)), ((0, 10), (0, nan))]
    rows = [[{"FP": fp, "FN": 0, "union_iou": iou} for fp, iou in models] for models in counts]
    assert plots.images.rank_images(rows) == [3, 1, 4, 0, 2]
    for most, chosen in ((9, [3, 1, 4, 0, 2]), (2, [3, 1]), (4, [3, 1, 4, 2])):
        assert plots.images.choose_images(rows, most) == chosen


def test_typical_images_are_spread_over_all():
    """Each stands for an equal share of the images; the median is first, the extremes are last."""
    for total, number in ((0, 12), (1, 12), (5, 12), (60, 12), (100, 7), (1000, 12)):
        ranked = list(range(total))
        chosen = plots.images.choose_typical(ranked, number)
        assert len(set(chosen)) == len(chosen) == min(total, number)
        shares = [int(rank * len(chosen) / total) for rank in sorted(chosen)]
        assert shares == list(range(len(chosen)))
        distances = [abs(rank - (total - 1) / 2) for rank in chosen]
        assert distances == sorted(distances)


SIZE = (60, 60)


def square(image_id, x, y, size=20, **fields):
    return rectangle(image_id, x, y, size, size, size=SIZE, **fields)


@pytest.fixture
def sheet(tmp_path):
    """A function that plots a contact sheet of COCO data, at a threshold of 0.7, and its tiles."""

    def do(number, annotations, results, name="{}.png", worst=False, max_images=12, **options):
        data = coco(number, annotations, SIZE)
        for image in data["images"]:
            image["file_name"] = name.format(image["id"])
            Image.new("RGB", SIZE, (120, 120, 120)).save(tmp_path / image["file_name"])
        scored, path = evaluate_lesions(data, results, **options), tmp_path / "sheet.png"
        shown = {"worst": worst, "max_images": max_images}
        figure = plots.images.plot_contact_sheet(scored, tmp_path, path, **shown)
        return figure, [axes for axes in figure.axes if axes.images]

    return do


def contours(axes):
    """(left, top, right, bottom) of the regions in a tile, by kind."""
    boxes = {}
    for line in axes.lines:
        xy = line.get_xydata()
        box = (*np.nanmin(xy, axis=0).tolist(), *np.nanmax(xy, axis=0).tolist())
        boxes.setdefault(line.get_label(), []).append(box)
    return boxes


def test_four_kinds_of_contours_where_they_belong(sheet, tmp_path):
    lesions = [square(1, 0, 0), square(1, 30, 0), square(1, 0, 40, 15, iscrowd=1)]
    # Of the last two one lies in the crowd and counts nowhere, one is below the threshold.
    places = (2, 0, 20, 0.9), (30, 30, 20, 0.8), (2, 42, 10, 0.95), (30, 0, 20, 0.6)
    results = [square(1, *place, score=score) for *place, score in places]
    figure, (tile,) = sheet(1, lesions, results)
    assert contours(tile) == {
        "ground truth": [(0, 0, 19, 19)],
        "missed lesion": [(30, 0, 49, 19)],
        "hit": [(2, 0, 21, 19)],
        "false alarm": [(30, 30, 49, 49)],
    }
    styles = plots.images.CONTOUR_STYLES
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(styles)
    colours = {kind: style["color"] for kind, style in styles.items()}
    assert colours["ground truth"] == colours["missed lesion"]
    assert colours["hit"] == colours["false alarm"] != colours["ground truth"]
    errors = {kind for kind, style in styles.items() if style["linestyle"] != "-"}
    assert errors == {"missed lesion", "false alarm"}
    # 18 of 22 columns are in common
    expected = 100 * 18 / 22
    assert tile.get_title() == f"1.png\nIoU {expected:.0f} % · 1 missed · 1 false alarm"
    assert sorted(text.get_text() for text in tile.texts) == ["0.80", "0.90"]
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for colour in colours.values():
        distance = np.abs(pixels - 255 * np.array(to_rgb(colour))).max(axis=2)
        assert (distance < 12).sum() > 50


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("iou", [0.5, 0.8, 1.0])
def test_sheets_have_the_hits_of_the_metrics(sheet, iou, iou_type):
    """L-shaped masks overlap by less than their boxes do."""
    lesions, results = [], []
    for i in range(1, 7):
        lesions += [square(i, 0, 0), square(i, 30, 30)]
        results += [square(i, i, 0, score=0.9), square(i, 30, 30, 18, score=0.8)]
        mask = np.zeros(SIZE, np.uint8, order="F")
        mask[30 : 40 + i, 30:50] = mask[30:50, 30:32] = 1
        rle = mask_util.encode(mask)
        results[-1] |= {"segmentation": {**rle, "counts": rle["counts"].decode()}}
        results[-1]["bbox"] = [30, 30, 20, 20]
    options = {"iou_threshold": iou, "iou_type": iou_type}
    expected = evaluate_lesions(coco(6, lesions, SIZE), results, **options).lesion
    for worst in (False, True):
        figure, tiles = sheet(6, lesions, results, worst=worst, **options)
        shown = [kind for tile in tiles for kind, boxes in contours(tile).items() for _ in boxes]
        assert shown.count("hit") == shown.count("ground truth") == expected["TP"]
        assert shown.count("missed lesion") == expected["FN"]
        assert shown.count("false alarm") == expected["FP"]
        titles = " ".join(tile.get_title() for tile in tiles)
        assert sum(map(int, re.findall(r"(\d+) missed", titles))) == expected["FN"]
        assert sum(map(int, re.findall(r"(\d+) false alarm", titles))) == expected["FP"]
        assert f"≥ {iou:g}" in figure.texts[0].get_text()


def test_tiny_errors_are_solid_and_thin_in_a_dashed_ring(sheet):
    """Of dashes as wide as the lesion only a propeller would be seen; but a hit has no dashes."""
    lesions = [square(1, 0, 0), square(1, 50, 50, 2), square(1, 10, 50, 2)]
    results = [square(1, 55, 5, 1, score=0.9), square(1, 10, 50, 2, score=0.8)]
    (tile,) = sheet(1, lesions, results)[1]
    rings = [line for line in tile.lines if line.get_label() == "_ring"]
    lines = [line for line in tile.lines if line not in rings]
    dashed = {line.get_label(): line.is_dashed() for line in lines if len(line.get_xdata()) < 30}
    assert dashed == dict.fromkeys(("ground truth", "missed lesion", "hit", "false alarm"), False)
    large = max(lines, key=lambda line: len(line.get_xdata()))
    assert large.is_dashed() and min(line.get_linewidth() for line in lines) < large.get_linewidth()
    centres = sorted(tuple(np.round(ring.get_xydata()[:-1].mean(axis=0), 3)) for ring in rings)
    assert centres == [(50.5, 50.5), (55, 5)] and all(ring.is_dashed() for ring in rings)


@pytest.mark.parametrize("shapes", [[(40, 60)] * 8, [(60, 60), (40, 90), (90, 80), (50, 60)] * 2])
def test_rows_fill_the_sheet(tmp_path, shapes):
    """Whatever the images' shapes, white is left for titles and legend alone."""
    for i, (height, width) in enumerate(shapes):
        Image.new("RGB", (width, height), (90, 60, 50)).save(tmp_path / f"{i}.png")
    tiles = [(tmp_path, f"{i}.png", "") for i in range(len(shapes))]
    figure, grid = plots.images.tile_sheet("", tiles, plots.images.CONTOUR_STYLES)
    plots.style.save_figure(figure, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    rows = [grid[:4], grid[4:]]
    for row in rows:
        boxes = [axes.get_position() for axes in row]
        assert len({round(box.y0, 6) for box in boxes}) == 1
        assert len({round(box.height, 6) for box in boxes}) == 1
        y = round((1 - (boxes[0].y0 + boxes[0].y1) / 2) * len(pixels))
        assert (pixels[y] > 250).mean() < 0.06


EXTREMES = {
    "no image": (0, SIZE, [], []),
    "no lesion": (2, SIZE, [], []),
    "no detection": (1, SIZE, [square(1, 0, 0)], []),
    "one pixel": (1, SIZE, [square(1, 0, 0, 1)], [square(1, 59, 59, 1, score=1.0)]),
    "an empty mask": (1, SIZE, [square(1, 0, 0, 0)], [square(1, 0, 0, 0, score=1.0)]),
    "all": (1, SIZE, [square(1, 0, 0, 60)], [square(1, 0, 0, 60, score=1.0)]),
    "a line": (2, (3, 2000), [], []),
    "a column": (2, (2000, 3), [], []),
    "a dot": (5, (1, 1), [], []),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_extremes_are_plotted(tmp_path, case):
    number, size, lesions, results = EXTREMES[case]
    for i in range(1, number + 1):
        Image.new("RGB", size[::-1]).save(tmp_path / f"{i}.png")
    if number and size != SIZE:
        lesions = [rectangle(1, 0, 0, 1, 1, size=size)]
        results = [rectangle(1, size[1] - 1, size[0] - 1, 1, 1, size=size, score=0.9)]
    scored = evaluate_lesions(coco(number, lesions, size), results)
    for worst in (False, True):
        path = tmp_path / f"sheet{worst}.png"
        plots.images.plot_contact_sheet(scored, tmp_path, path, worst=worst)
        with Image.open(path) as image:
            assert image.width == 1440 and image.height < 1500


def test_boxes_alone(sheet):
    lesions, results = [square(1, 0, 0), square(2, 0, 0)], [square(1, 0, 0, score=0.9)]
    for record in (*lesions, *results):
        del record["segmentation"]
    missed, hit = sheet(2, lesions, results, worst=True)[1]
    assert missed.get_title() == "2.png\n1 missed"
    assert hit.get_title() == "1.png\nbox IoU 100 %"
    assert contours(hit)["hit"] == [(-0.5, -0.5, 19.5, 19.5)]
    (missed,) = sheet(2, lesions, results, worst=True, max_images=1)[1]
    assert missed.get_title().startswith("2.png")


def test_several_classes_are_named(tmp_path):
    data = coco(1, [square(1, 0, 0), square(1, 30, 0, category_id=2)], SIZE)
    data["categories"].append({"id": 2, "name": "ulcer"})
    Image.new("RGB", SIZE).save(tmp_path / "1.png")
    scored = evaluate_lesions(data, [square(1, 0, 0, score=0.9)])
    figure = plots.images.plot_contact_sheet(scored, tmp_path, tmp_path / "sheet.png")
    assert [text.get_text() for text in figure.axes[0].texts] == ["ulcer", "polyp 0.90"]


def test_titles_and_images_that_are_not_there(sheet, tmp_path):
    name = "a_very_long_name_{}_of_a_file_that_is_no_use_in_a_title.png"
    figure, (tile,) = sheet(1, [], [], name)
    first, second = tile.get_title().split("\n")
    assert len(first) == 30 and first.startswith("a_very_lon") and first.endswith("title.png")
    assert second == "no lesion"
    assert figure.texts[0].get_text().startswith("1 of 1 images, ")
    assert "score ≥ 0.7" in figure.texts[0].get_text()
    assert not sheet(0, [], [])[1]
    scored = evaluate_lesions(coco(1, [], SIZE), [])
    with pytest.raises(FileNotFoundError, match="1.png"):
        plots.images.plot_contact_sheet(scored, tmp_path, tmp_path / "sheet.png")


def test_contact_sheet_of_real_images(kvasir_352, tmp_path):
    """Masks of the data set itself as ground truth, shifted by some pixels as detections."""
    data, results = coco(3), []
    for image, path in zip(data["images"], sorted((kvasir_352 / "images").iterdir()), strict=False):
        with Image.open(kvasir_352 / "masks" / path.name) as stored:
            mask = (np.asarray(stored.convert("L")) > 127).astype(np.uint8)
        image |= {"file_name": path.name, "height": len(mask), "width": len(mask[0])}
        lesion, moved = (mask_util.encode(np.asfortranarray(np.roll(mask, k, 1))) for k in (0, 4))
        record = {"image_id": image["id"], "category_id": 1}
        data["annotations"].append({**record, "segmentation": lesion})
        results.append({**record, "segmentation": moved, "score": 0.9})
    sheet = evaluate_lesions(data, results), kvasir_352 / "images", tmp_path / "sheet.png"
    tiles = [axes for axes in plots.images.plot_contact_sheet(*sheet).axes if axes.images]
    assert [set(contours(tile)) for tile in tiles] == [{"ground truth", "hit"}] * 3


def test_distortions_are_shown(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    axes = plots.plot_distortions(image, tmp_path / "d.png").axes
    assert len(axes) == len(DISTORTIONS) * 6
    assert np.array_equal(axes[0].images[0].get_array(), image)
    assert np.array_equal(axes[-1].images[0].get_array(), image[::-1, ::-1])  # half a turn


def test_review_sheets_show_every_image(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(23):
        Image.new("RGB", (500, 400), (0, 10 * i, 255 - 10 * i)).save(images / f"{i:02d}.png")
    sheets = plots.plot_review_sheets(images, tmp_path / "sheets")
    assert [sheet.name for sheet in sheets] == ["sheet_001.jpg", "sheet_002.jpg"]
    first, second = (np.asarray(Image.open(sheet), int) for sheet in sheets)
    assert first.shape == (4 * 368, 5 * 352, 3) and second.shape == (368, 5 * 352, 3)
    for i in (0, 7, 19, 22):
        sheet, place = (first, i) if i < 20 else (second, i - 20)
        y, x = 368 * (place // 5) + 140, 352 * (place % 5) + 176
        assert abs(sheet[y, x] - (0, 10 * i, 255 - 10 * i)).max() < 6
        assert (sheet[y + 212 : y + 226, x - 172 : x] < 100).any(), "its name"
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        plots.plot_review_sheets(images, tmp_path / "sheets")


CLASSES = ["cancer", "ulcer", "gastritis"]


def test_grad_cam_of_confident_misses_and_spread_hits():
    scores = {"cancer": (0.5, 0.9, 0.6, 0.7, 0.8), "ulcer": (0.4, 0.95, 0.6)}
    outcomes = [(name, str(score)) for name, of_class in scores.items() for score in of_class]
    rows = [{"label": "cancer", "predicted": name, "score": score} for name, score in outcomes]
    chosen = plots.images.choose_hits_and_misses(rows, CLASSES, 2)
    scores = [[float(row["score"]) for row in kind] for kind in chosen["cancer"]]
    assert scores == [[0.9, 0.5], [0.95, 0.6]]
    assert chosen["ulcer"] == ([], []), "ulcer was predicted, but none is there"


@pytest.fixture
def evaluated(tmp_path):
    """The config of an evaluation of six images, a model, and the folder of the evaluation."""
    rng = np.random.default_rng(0)
    content = coco(6, [{"image_id": i, "category_id": (i - 1) // 2 + 1} for i in range(1, 7)])
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    name = f"grad_cam_{tmp_path.name}"
    register_classification_dataset(name, tmp_path / "coco.json", tmp_path)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.NAME", "resnet18", "DATASETS.TEST", (name,)]
    cfg = load_config("configs/resnet50.yaml", [*opts, "OUTPUT_DIR", str(tmp_path)])
    folder = tmp_path / "inference" / name
    evaluator = ClassificationEvaluator(name, output_dir=str(folder))
    for i in range(1, 7):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        evaluator.process([{"image_id": i}], [{"scores": torch.tensor([0.5, 0.3, 0.2])}])
    evaluator.evaluate()
    yield cfg, ImageClassifier("resnet18", 3, input_size=64), folder
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_grad_cam_is_next_to_the_evaluation_or_there_is_a_hint(evaluated, monkeypatch, caplog):
    cfg, model, folder = evaluated
    cfg.INPUT.SIZE = 64
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr("imrcnn_d2.report.plots.images.find_spec", lambda name: None)
        plots.plot_test_grad_cams(cfg, model)
    assert "imrcnn-d2[gradcam]" in caplog.text
    pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    cfg.INPUT.SIZE = 224
    plots.plot_test_grad_cams(cfg, ImageClassifier("vit_tiny_patch16_224", 3))
    assert "vit_tiny_patch16_224" in caplog.text
    assert not (folder / "grad_cam.png").exists()
    cfg.INPUT.SIZE = 64
    plots.plot_test_grad_cams(cfg, model)
    image = cv2.imread(str(folder / "grad_cam.png"))
    assert image.shape[1] > image.shape[0] > 300
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 1000, "images and heat, in colour"


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


# Hit, false alarm, hit, false alarm, hit; four ground truths.
SCORES, HITS = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([True, False, True, False, True])
CURVE = pr_curve(SCORES, HITS, 4)


def steps_of(axes):
    return [line for line in axes.lines if line.get_drawstyle() == "steps-pre"]


def test_pr_curve_and_its_points(tmp_path):
    few = pr_curve(np.array([0.5]), np.array([True]), 3)  # no break-even point, none above 0.7
    # The points after three detections, two of them hits; then of as many detections as lesions.
    points = {"o": pytest.approx((50, 200 / 3)), "D": pytest.approx((50, 50))}
    for pr, marked, label in ((CURVE, points, "56.7, BEP 50.0"), (few, {}, "33.3, BEP n/a")):
        panels = {curves.PR_TITLE: {"polyp": pr}}
        (axes,) = plot_pr_panels(panels, tmp_path / "pr.png", tau=0.7).axes
        assert legend(axes)[0] == f"polyp: AP50_voc {label}"
        lines = [line for line in axes.lines if line.get_marker() != "None"]
        shown = {line.get_marker(): line.get_xydata() for line in lines if len(line.get_xdata())}
        assert {marker: tuple(np.ravel(xy)) for marker, xy in shown.items()} == marked
        x, y = steps_of(axes)[0].get_data()
        # The area under the plotted steps is what the legend says.
        assert np.sum(np.diff(x) * y[1:]) / 100 == pytest.approx(100 * pr.area)
    (axes,) = plot_pr_panels({curves.PR_TITLE: {}}, tmp_path / "pr.png", tau=0.7).axes
    assert [text.get_text() for text in axes.texts] == ["No detections"]


def test_pr_panels(tmp_path):
    """One for each class, four of them in rows of three; the same figure in two formats."""
    panels = {f"class {i}": {"one": CURVE, "two": CURVE} for i in range(4)}
    figure = plot_pr_panels(panels, tmp_path / "pr.png", tmp_path / "pr.svg", tau=0.7)
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    for axes in figure.axes:
        first, second = steps_of(axes)
        assert (first.get_label()[:3], second.get_label()[:3]) == ("one", "two")
        styles = [(line.get_color(), line.get_linestyle()) for line in (first, second)]
        assert all(one != two for one, two in zip(*styles, strict=True))
    with Image.open(tmp_path / "pr.png") as image:
        assert image.size == (3 * 1200, 2 * 1220)
    assert "<svg" in (tmp_path / "pr.svg").read_text()


def test_froc(tmp_path):
    """Hit, false alarm, hit, false alarm in two images; three lesions."""
    outcomes = HITS[:4], np.array([0, 0, 1, 1]), np.array([1, 2])
    froc = FROC(SCORES[:4], *outcomes)
    (axes,) = curves.plot_froc({"polyp": froc}, tmp_path / "froc.png", tau=0.7).axes
    steps, beyond, seven, point, *_ = axes.lines
    assert steps.get_drawstyle() == "steps-post"  # up at a hit, never on a slope
    x, y = steps.get_data()
    assert x == pytest.approx([0, 0, 0.5, 0.5, 1])
    assert y == pytest.approx([0, 100 / 3, 100 / 3, 200 / 3, 200 / 3])
    assert beyond.get_xydata() == pytest.approx(np.array([[1, 200 / 3], [8, 200 / 3]]))
    assert np.ravel(point.get_xydata()) == pytest.approx([0.5, 200 / 3])
    # At 1/8 and 1/4 the first hit, from 1/2 on two of three: the marks.
    rates = 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8
    marks = list(zip(rates, [100 / 3] * 2 + [200 / 3] * 5, strict=True))
    assert seven.get_xydata() == pytest.approx(np.array(marks)) and seven.get_marker() == "|"
    mean = (2 * 100 / 3 + 5 * 200 / 3) / 7
    assert legend(axes) == [f"polyp: mean {mean:.1f}", "operating point, score ≥ 0.7"]
    assert [tick.get_text() for tick in axes.get_xticklabels()][::4] == ["1/32", "1/2", "8"]

    runs = {"a": froc, "b": froc, "masks": FROC(np.ones(4), *outcomes, scored=False)}
    (axes,) = curves.plot_froc(runs, tmp_path / "froc.svg", tau=0.85).axes
    # A point without a false alarm is on the edge.
    assert np.ravel(axes.lines[3].get_xydata()) == pytest.approx([1 / 32, 100 / 3])
    assert legend(axes)[2] == "masks: n/a"
    assert len({line.get_color() for line in axes.get_legend().get_lines()[:3]}) == 3


def test_roc_of_images(tmp_path):
    def units(lesions, score):
        fields = dict.fromkeys(UnitCounts.__dataclass_fields__, np.zeros(len(lesions)))
        return UnitCounts(**fields | {"lesions": np.array(lesions), "score": np.array(score)})

    # Worked by hand: of 6 pairs of an image with and one without a lesion 5 are in order.
    one = units([1, 2, 1, 0, 0], [0.9, 0.8, 0.3, 0.5, 0.0])
    runs = {"one": one, "low": units([1, 0], [0.4, 0.2])}
    (axes,) = curves.plot_roc_curves(runs, tmp_path / "roc.svg", tau=0.5).axes
    (curve, dot), (low, low_dot) = (
        [line for line in axes.lines if to_rgb(line.get_color()) == to_rgb(STYLES[run][0])]
        for run in range(2)
    )
    assert auc(*curve.get_xydata().T) / 100**2 == pytest.approx(5 / 6)
    assert dot.get_xydata().tolist() == [[50, pytest.approx(200 / 3)]]  # at 0.5 itself, too
    assert legend(axes)[0] == "one: AUROC 83.3"
    assert low_dot.get_xydata().tolist() == [[0, 0]]  # no score reaches 0.5
    assert curve.get_linestyle() != low.get_linestyle()


def scored(classes, number=40, absent=()):
    rng = np.random.default_rng(0)
    labels = rng.choice([k for k in range(classes) if k not in absent], number)
    scores = rng.random((number, classes)) + 0.4 * np.eye(classes)[labels]
    scores /= scores.sum(axis=1, keepdims=True)
    truth = {"images": [{"id": i} for i in range(number)]}
    truth["categories"] = [{"id": k, "name": f"class {k}"} for k in range(classes)]
    truth["annotations"] = [
        {"id": i, "image_id": i, "category_id": int(k)} for i, k in enumerate(labels)
    ]
    results = [{"image_id": i, "scores": row.tolist()} for i, row in enumerate(scores)]
    return evaluate_classification(truth, results), labels, scores


@pytest.mark.parametrize("classes", [2, 5])
def test_roc_of_each_class(classes, tmp_path):
    results, labels, scores = scored(classes)
    figure = curves.plot_class_roc({"one": results, "two": results}, tmp_path / "roc.png")
    predicted = scores.argmax(axis=1)
    for k, axes in zip(range(classes), figure.axes, strict=True):
        _, line, *others = [line for line in axes.lines if line.get_linestyle() != "None"]
        dot, other = [dot for dot in axes.lines if dot.get_marker() == "o"]
        assert len(others) == 1
        false, true, _ = roc_curve(labels == k, scores[:, k], drop_intermediate=False)
        np.testing.assert_allclose(line.get_xydata(), 100 * np.stack([false, true], 1))
        share = [(predicted[labels != k] == k).mean(), (predicted[labels == k] == k).mean()]
        np.testing.assert_allclose(dot.get_xydata(), [100 * np.array(share)])
        area = results.recognition[f"auroc_class {k}"]
        assert line.get_label() == f"one: AUROC {area:.1f}"


def test_a_class_without_images_has_no_curve(tmp_path):
    results, *_ = scored(3, absent=(1,))
    figure = curves.plot_class_roc({"one": results}, tmp_path / "roc.svg")
    assert "one: n/a" in [line.get_label() for line in figure.axes[1].get_lines()]
    paths = draw_all(results, tmp_path)
    assert [path.stem for path in paths] == ["confusion_matrix", "roc_curve", "calibration"]
    assert all(path.is_file() for path in paths)


def test_calibration_points_intervals_and_counts(tmp_path):
    """Of four detections around 0.25 one hits, of two at 0.95 both."""
    score, hit = np.array([0.22, 0.24, 0.26, 0.28, 0.95, 0.95]), np.arange(6) > 2
    calibration = Calibration(score, hit, np.zeros(6, int), 1)
    top, bottom = curves.plot_calibration({"polyp": calibration}, tmp_path / "calibration.png").axes
    points, _, (bars,) = top.containers[0].lines
    assert points.get_xydata() == pytest.approx(np.array([[25, 25], [95, 100]]))
    clopper_pearson = 100 * beta.ppf(0.025, 1, 4), 100 * beta.ppf(0.975, 2, 3)
    assert tuple(bars.get_segments()[0][:, 1]) == pytest.approx(clopper_pearson)
    assert bars.get_segments()[1][:, 1] == pytest.approx([100 * 0.025**0.5, 100])
    assert [text.get_text() for text in bottom.texts] == [*"0040000002"]
    brier = 100 * np.mean((score - hit) ** 2)  # in percent, as in the tables
    # The two are off by 5 points, less than chance adds to the distance of four from theirs.
    assert legend(top) == ["ideal", f"polyp: ECE 0.0 %, Brier {brier:.1f} %"]

    nothing = Calibration(np.zeros(0), np.zeros(0, bool), np.zeros(0, int), 1)
    runs = {"a": calibration, "b": calibration, "none": nothing}
    top, bottom = curves.plot_calibration(runs, tmp_path / "calibration.svg").axes
    lines = [container.lines[0] for container in top.containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 3
    assert not bottom.texts and legend(top)[3] == "none: n/a"


def test_thresholds(tmp_path):
    """One panel for one run, one for each metric of several; without scores there are no rows."""

    def rows(specificity):
        values = [(dict.fromkeys(curves.THRESHOLD_COLUMNS, 100 - t), t / 100) for t in (10, 50, 90)]
        return [v | {"tau": tau, "image_specificity": specificity} for v, tau in values]

    (axes,) = curves.plot_thresholds({"IMR-CNN": rows(np.nan)}, tmp_path / "t.png", tau=0.6).axes
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([[0.1, 90], [0.5, 50], [0.9, 10]]))
    assert legend(axes) == ["Precision", "Recall", "F1", "threshold 0.6"]  # one is undefined
    assert "IMR-CNN" in axes.get_title()
    curves.plot_thresholds({"masks": []}, tmp_path / "t.png", tau=0.7)
    for defined, words in ((50, []), (np.nan, ["undefined"])):
        tables = {"a": rows(defined), "b": rows(np.nan)}
        panels = curves.plot_thresholds(tables, tmp_path / "t.svg", tau=0.7).axes
        assert [axes.get_title() for axes in panels] == list(curves.THRESHOLD_COLUMNS.values())
        assert legend(panels[0]) == ["a", "b", "threshold 0.7"]
        assert [text.get_text() for text in panels[3].texts] == words


def document(values, images=10, names=("jpeg", "rotation")):
    """Of two distortions, the second a point worse than the first."""
    rows = [{"distortion": "clean", "severity": 0, "level": None, "lesion/f1": 90}]
    for i, name in enumerate(names):
        for severity, value in zip(SEVERITIES, values, strict=True):
            f1 = None if value is None else value - i
            rows.append({"distortion": name, "severity": severity, "level": 1, "lesion/f1": f1})
    rows = [{**row, "lesion/fp_per_image": 0.5} for row in rows]
    return {"meta": {"dataset_sha256": "a", "images": images, "seed": 0}, "rows": rows}


def test_robustness(tmp_path):
    models = {"MR-CNN": document([80, 70, 60, 50, 40]), "IMR-CNN": document([85, 75, None, 0, 1])}
    figure = plot_robustness(models, tmp_path / "robustness.png")
    jpeg, rotation = figure.axes
    first, second = (line for line in jpeg.lines if line.get_linestyle() != "None")
    assert first.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert first.get_ydata().tolist() == [90, 80, 70, 60, 50, 40]
    assert np.isnan(second.get_ydata()[3]) and first.get_color() != second.get_color()
    assert rotation.lines[0].get_ydata().tolist() == [90, 79, 69, 59, 49, 39]
    ticks = [tick.get_text() for tick in jpeg.get_xticklabels()]
    assert ticks == ["none", "50", "30", "20", "10", "5"]
    assert jpeg.get_ylabel() == "lesion: f1 (%)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(models)

    every = {"a": document([1] * 5, names=tuple(DISTORTIONS))}
    figure = plot_robustness(every, tmp_path / "r.svg", metric="lesion/fp_per_image")
    titles = [distortion.title for distortion in DISTORTIONS.values()]
    assert [axes.get_title() for axes in figure.axes] == titles
    assert figure.axes[0].get_ylabel() == "lesion: fp_per_image"

    fewer, output = every | {"b": document([1] * 5, images=5)}, tmp_path / "refused.png"
    for refused, metric, named in ((fewer, "lesion/f1", "images"), (every, "segm/AP", "segm/AP")):
        with pytest.raises(ValueError, match=named):
            plot_robustness(refused, output, metric=metric)
    assert not output.exists()
